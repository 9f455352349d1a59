"""What a Linux binary needs: names of shared libraries, and the newest version of the C library."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB, _DT_STRSZ = 1, 5, 10
_GLIBC = re.compile(rb"\0GLIBC_2\.(\d+)(?:\.\d+)?(?=\0)")


@dataclass(frozen=True)
class Needs:
    libraries: tuple[str, ...] = ()
    glibc: int = 0  # 36 of 2.36


def needs(path: Path) -> Needs | None:
    """None of what is no 64-bit little-endian ELF file."""
    try:
        with path.open("rb") as file:
            if file.read(6) != b"\x7fELF\x02\x01":
                return None
        data = path.read_bytes()
        return Needs(_libraries(data), max((int(found) for found in _GLIBC.findall(data)), default=0))
    except (OSError, struct.error, ValueError, IndexError):
        return None


def _libraries(data: bytes) -> tuple[str, ...]:
    start, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    loads: list[tuple[int, int, int]] = []
    dynamic: tuple[int, int] | None = None
    for i in range(count):
        kind, _, offset, address, _, length, _, _ = struct.unpack_from("<IIQQQQQQ", data, start + i * size)
        if kind == _PT_LOAD:
            loads.append((address, offset, length))
        elif kind == _PT_DYNAMIC:
            dynamic = (offset, length)
    if dynamic is None:
        return ()
    found: list[tuple[int, int]] = []
    for at in range(dynamic[0], dynamic[0] + dynamic[1], 16):
        tag, value = struct.unpack_from("<QQ", data, at)
        if tag == 0:
            break
        found.append((tag, value))
    table = next((value for tag, value in found if tag == _DT_STRTAB), 0)
    base = next((offset + table - address for address, offset, n in loads if address <= table < address + n), 0)
    length = next((value for tag, value in found if tag == _DT_STRSZ), 0)
    strings = data[base : base + length]
    return tuple(strings[v : strings.index(b"\0", v)].decode() for tag, v in found if tag == _DT_NEEDED)
