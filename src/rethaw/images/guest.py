"""The part of Rethaw that every sandbox has: its own modules, standard library only, under /.rethaw/lib."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import rethaw
from rethaw.images import places, presets, runtime

LIB = ".rethaw/lib/rethaw"
COMMAND = ".rethaw/bin/rethaw"  # for programs in any language; the directory is the last one of their PATH
SCRIPT = b"""#!/bin/sh
exec python3 -I -c 'import sys; sys.path.insert(0, "/.rethaw/lib")
from rethaw.guest.command import main
sys.exit(main())' "$@"
"""
# Without a shell or a python3 on PATH. Alone it sees nothing of the program's settings of Python.
PRIVATE_SCRIPT = f"""#!{runtime.PYTHON} -IS
import sys
sys.path.insert(0, "/.rethaw/lib")
from rethaw.guest.command import main
sys.exit(main())
""".encode()
_PYTHON = "/usr/bin/python3"
_OLDEST = 9  # minor version of Python that the modules run on
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
    """sha256 hex of the guest modules and of what is installed with them."""
    total = hashlib.sha256(SCRIPT)  # the other one is in the digest of what has it
    for name, data in sorted({**contents, **presets.FILES}.items()):
        total.update(f"{name}\0{len(data)}\0".encode())
        total.update(data)
    return total.hexdigest()


def python(rootfs: Path) -> str:
    """The interpreter that runs Rethaw's own part of a tree: the private one if it has that. Blocking."""
    return runtime.PYTHON if (rootfs / runtime.HOME).is_dir() else _PYTHON


def agents_python(rootfs: Path, path: str) -> str:
    """The interpreter for an agent that is a Python function: the first python3 of 3.9 or newer on `path`, as the tree's
    links say, else Rethaw's own. Nothing is executed. Blocking."""
    if python(rootfs) == _PYTHON:
        return _PYTHON
    for directory in path.split(":"):
        name = f"{directory.rstrip('/')}/python3"
        found = places.resolved(rootfs, name) if name.startswith("/") else None
        if found is not None and found.is_file() and os.access(found, os.X_OK):
            version = re.fullmatch(r"python3\.(\d+)", found.name)
            if version is None or int(version[1]) >= _OLDEST:
                return name
    return runtime.PYTHON


def install(contents: dict[str, bytes], rootfs: Path, script: bytes = SCRIPT) -> None:
    """Write them into a tree. Blocking."""
    for name, data in [*((f"{LIB}/{name}", data) for name, data in contents.items()), (COMMAND, script)]:
        path = rootfs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755 if name == COMMAND else 0o644)
        os.utime(path, (MODIFIED, MODIFIED))
    presets.install(rootfs, MODIFIED)
