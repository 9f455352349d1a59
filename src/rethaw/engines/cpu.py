"""The CPU features that a saved guest may be using, as a digest that a snapshot carries.

A guest picks its code by CPUID once (libc's memcpy, numpy, V8) and would meet an illegal instruction on a lesser CPU.
"""

from __future__ import annotations

import hashlib
import platform
import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def features(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Architecture, vendor and instruction set flags of this machine's CPUs (those that all have)."""
    text = cpuinfo.read_text()
    common: set[str] | None = None
    for match in re.finditer(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE):
        flags = set(match.group(1).split())
        common = flags if common is None else common & flags
    vendor = re.search(r"^(?:vendor_id|CPU implementer)\s*:\s*(\S+)", text, re.MULTILINE)
    return frozenset({f"arch={platform.machine()}", f"vendor={vendor.group(1) if vendor else '?'}", *(common or ())})


def digest(names: frozenset[str]) -> str:
    """sha256 hex of a feature set."""
    return hashlib.sha256(" ".join(sorted(names)).encode()).hexdigest()


def remember(directory: Path, names: frozenset[str]) -> str:
    """Write the set under its digest into `directory`, so that a later mismatch can name what is missing."""
    name = digest(names)
    path = directory / f"{name}.txt"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f".{name}.new"
        temporary.write_text(" ".join(sorted(names)))
        temporary.replace(path)
    return name


def recall(directory: Path, name: str) -> frozenset[str] | None:
    """The set that `remember` wrote under this digest; None when unknown or damaged."""
    try:
        names = frozenset((directory / f"{name}.txt").read_text().split())
    except OSError:
        return None
    return names if digest(names) == name else None
