"""What a model might say to agent.py."""

from rethaw.testing.reply import Reply, by_turn

script = by_turn(
    [
        Reply("Let me look.", tool_calls=[("in_stock", {"fruit": "apples"})]),
        Reply("And the others.", tool_calls=[("in_stock", {"fruit": "pears"})]),
        lambda r: Reply(f"There are {sum(int(t.text) for t in r.turns if t.role == 'tool')} together."),
    ]
)
