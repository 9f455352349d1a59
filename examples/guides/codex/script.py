"""What a model might say to Codex."""

import re

from rethaw.testing.conversation import ProviderRequest
from rethaw.testing.reply import Reply, by_turn

PATCH = """\
*** Begin Patch
*** Add File: primes.py
+found = [n for n in range(2, 30) if all(n % m for m in range(2, n))]
+input()
+print(found)
*** End Patch
"""


def _go_on(request: ProviderRequest) -> Reply:
    """Enter, for the program that waits for it."""
    number = re.findall(r"session ID (\d+)", request.last_text)[0]
    return Reply("", tool_calls=[("write_stdin", {"session_id": int(number), "chars": "\n", "yield_time_ms": 20_000})])


def _found(request: ProviderRequest) -> Reply:
    printed = re.findall(r"^\[.*\]", request.last_text, re.MULTILINE)
    return Reply(f"The primes are {printed[0]}.")


script = by_turn(
    [
        Reply("First the file.", tool_calls=[("exec_command", {"cmd": f"apply_patch <<'EOF'\n{PATCH}EOF"})]),
        Reply("", tool_calls=[("exec_command", {"cmd": "python3 primes.py", "tty": True, "yield_time_ms": 1000})]),
        _go_on,
        _found,
    ]
)
