"""Fault points: named places in the code where a test may kill, fail or slow the process. Off by default.

`RETHAW_FAULTS="saver.staged:3=kill,pg.append=delay:0.2"`: at the third pass of `saver.staged` the process sends itself
SIGKILL; every pass of `pg.append` takes 0.2 s more. Actions: `kill`, `raise` (RethawError), `enospc` (OSError),
`delay:SECONDS`. Without the variable a point costs one dictionary test.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass

from rethaw.model.errors import InvalidInput, RethawError


@dataclass
class _Fault:
    nth: int  # 0: every pass
    action: str
    passes: int = 0


def parse(text: str) -> dict[str, _Fault]:
    """The faults that `text` (form of RETHAW_FAULTS) names. Raises InvalidInput naming the part that does not fit."""
    out: dict[str, _Fault] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        where, _, action = part.partition("=")
        name, _, nth = where.partition(":")
        action = action or "kill"
        if action.split(":")[0] not in ("kill", "raise", "enospc", "delay") or (nth and not nth.isdigit()):
            raise InvalidInput(f"{part!r} in RETHAW_FAULTS is not a fault", remedy="write name[:nth][=kill|raise|...]")
        out[name] = _Fault(int(nth or 0), action)
    return out


_faults: dict[str, _Fault] = parse(os.environ.get("RETHAW_FAULTS", ""))
names: set[str] = set()  # every point passed so far while faults are on, for the chaos harness


def configure(text: str) -> None:
    """Replace the faults of this process (tests)."""
    _faults.clear()
    _faults.update(parse(text))


def point(name: str) -> None:
    """A place where the process may be made to fail. Blocking (`delay` sleeps): tests only."""
    if not _faults:
        return
    names.add(name)
    fault = _faults.get(name)
    if fault is None:
        return
    fault.passes += 1
    if fault.nth and fault.passes != fault.nth:
        return
    kind, _, value = fault.action.partition(":")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "raise":
        raise RethawError(f"fault point {name}")
    elif kind == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    else:
        time.sleep(float(value or 0.1))
