"""What a model might say to agent.py."""

from rethaw.testing.reply import by_turn

script = by_turn(
    [
        "```python\ndata = [3, 1, 4, 1, 5, 9, 2, 6]\nlen(data)\n```",
        "```python\nmean = sum(data) / len(data)\n```",
        "```python\nprint(mean)\n```",
        lambda r: f"The mean is {r.last_text.splitlines()[-1]}.",
    ]
)
