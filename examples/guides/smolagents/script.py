"""What a model might say to agent.py."""

from rethaw.testing.reply import by_turn

script = by_turn(
    [
        "Thought: the primes.\n<code>\nprimes = [n for n in range(30) if is_prime(n)]\nprint(primes)\n</code>",
        "Thought: their squares.\n<code>\ntotal = sum(n * n for n in primes)\nprint(total)\n</code>",
        "Thought: that is all.\n<code>\nfinal_answer(total)\n</code>",
    ]
)
