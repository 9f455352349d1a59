"""The part of Rethaw that every sandbox has: its own modules, standard library only, under /.rethaw/lib."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import rethaw

LIB = ".rethaw/lib/rethaw"
COMMAND = ".rethaw/bin/rethaw"  # for programs in any language; the directory is the last one of their PATH
SCRIPT = b"""#!/bin/sh
exec python3 -I -c 'import sys; sys.path.insert(0, "/.rethaw/lib")
from rethaw.guest.command import main
sys.exit(main())' "$@"
"""
_PATTERNS = (
    "__init__.py",
    "guest/*.py",
    "channel/*.py",
    "model/__init__.py",
    "model/annotations.py",
    "model/durations.py",
    "model/errors.py",
    "model/faults.py",
    "model/typed.py",
    # An agent's file says `@rethaw.agent` at its top, and it is imported inside as well.
    "sdk/__init__.py",
    "sdk/agents.py",
    "sdk/functions.py",
    "sdk/images.py",
    "sdk/limits.py",
    "sdk/sizes.py",
)
# One date for all of them: equal contents are equal trees, whenever and from wherever they were installed.
MODIFIED = 1_700_000_000


def files() -> dict[str, bytes]:
    """Path below the package to contents. Blocking."""
    package = Path(rethaw.__file__).parent
    found: dict[str, bytes] = {}
    for pattern in _PATTERNS:
        for path in sorted(package.glob(pattern)):
            found[path.relative_to(package).as_posix()] = path.read_bytes()
    return found


def digest(contents: dict[str, bytes]) -> str:
    """sha256 hex of the guest modules."""
    total = hashlib.sha256(SCRIPT)
    for name, data in sorted(contents.items()):
        total.update(f"{name}\0{len(data)}\0".encode())
        total.update(data)
    return total.hexdigest()


def install(contents: dict[str, bytes], rootfs: Path) -> None:
    """Write them into a tree. Blocking."""
    for name, data in [*((f"{LIB}/{name}", data) for name, data in contents.items()), (COMMAND, SCRIPT)]:
        path = rootfs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755 if name == COMMAND else 0o644)
        os.utime(path, (MODIFIED, MODIFIED))
