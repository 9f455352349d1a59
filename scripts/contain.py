"""Run a command, then end whatever processes it left behind, and say so. Standard library only, Linux.

Processes that daemonised are caught as well: this one is their subreaper. Exit status is the command's.

    python3 scripts/contain.py COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 10.0


def descendants() -> dict[int, str]:
    """Every process below this one, with its command line."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    out: dict[int, str] = {}
    todo = [os.getpid()]
    while todo:
        for pid in children.get(todo.pop(), []):
            todo.append(pid)
            with contextlib.suppress(OSError):
                out[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
    return out


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _wait(pid: int) -> int:
    """The exit status of `pid`. Orphans of others are reaped meanwhile: who waits for one to be gone would wait for ever."""
    while True:
        found, status = os.waitpid(-1, 0)
        if found == pid:
            return os.waitstatus_to_exitcode(status)


def _gone_within(seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        _reap()
        if not descendants():
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)


def main(argv: list[str]) -> int:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    started: list[subprocess.Popen[bytes]] = []
    # Before the child starts: what is ignored here (SIGINT, in a shell's background) would be ignored by all below.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda n, _frame: [child.send_signal(n) for child in started])
    started.append(subprocess.Popen(argv))
    status = _wait(started[0].pid)
    if not _gone_within(_GRACE_S):
        for pid, command in descendants().items():
            sys.stderr.write(f"left behind, ending it: {pid} {command}\n")
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in descendants():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if _gone_within(_GRACE_S):
                break
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
