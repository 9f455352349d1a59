"""What a model might say to Claude Code."""

import re

from rethaw.testing.conversation import ProviderRequest
from rethaw.testing.reply import Reply, by_turn

PRIMES = "print([n for n in range(2, 20) if all(n % m for m in range(2, n))])\n"


def _found(request: ProviderRequest) -> Reply:
    printed = re.findall(r"\[2, 3, [\d, ]+\]", "".join(turn.text for turn in request.turns if turn.role == "tool"))
    return Reply(f"The primes are {printed[-1] if printed else request.turns}.")


script = by_turn(
    [
        Reply("First the file.", tool_calls=[("Write", {"file_path": "/project/primes.py", "content": PRIMES})]),
        Reply(
            "Below 20 is not enough.",
            tool_calls=[("Edit", {"file_path": "/project/primes.py", "old_string": "20", "new_string": "30"})],
        ),
        Reply("", tool_calls=[("Bash", {"command": "python3 primes.py | tee found", "description": "Run it"})]),
        Reply("", tool_calls=[("Read", {"file_path": "/project/found"})]),
        _found,
    ]
)
