"""What a model might say to agent.py."""

from rethaw.testing.reply import Reply, by_turn

PRIMES = "found = [n for n in range(2, 30) if all(n % m for m in range(2, n))]\nprint(found)\n"

script = by_turn(
    [
        Reply("First the program.", tool_calls=[("write_file", {"name": "primes.py", "content": PRIMES})]),
        Reply("It is there; I run it now.", tool_calls=[("run_command", {"command": "python3 primes.py"})]),
        Reply("How long is it?", tool_calls=[("run_command", {"command": "wc -l < primes.py"})]),
        lambda r: Reply(f"The primes below thirty, found in {r.tool_results[0].splitlines()[0]} lines."),
    ]
)
