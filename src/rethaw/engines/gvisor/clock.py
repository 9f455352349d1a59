"""Keeps a guest's monotonic clock still while it is frozen, by changing one number in the saved kernel state.

gVisor's restore moves the monotonic clock on by `now - Timekeeper.saveRealtime` when that is positive. With a
`saveRealtime` far in the future it stays where it was; the wall clock comes from the host and is right at once.
`checkpoint.img` of an uncompressed save is

    8 bytes magic | 8 bytes big-endian length | JSON metadata | 32 bytes hash | chunks [4 bytes big-endian length | bytes]

with no hash over the chunks. Numbers are written byte by byte as varints (signed ones zigzag), each byte a chunk of its
own. The number is found by its value: it lies between the wall times right before and right after the save. Exactly one
hit, or the file is left alone.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

FAR_FUTURE_NS = 4_500_000_000_000_000_000  # year 2112: the last whole years whose zigzag varint still has 9 bytes
_VARINT_BYTES = 9
_CHUNK = b"\x00\x00\x00\x01"
_HEADER = 16
_HASH = 32


def zigzag(value: int) -> bytes:
    """The varint of a non-negative signed number, low bits first."""
    value <<= 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _unzigzag(data: bytes) -> int:
    value = 0
    for shift, byte in enumerate(data):
        value |= (byte & 0x7F) << 7 * shift
    return value >> 1 if not value & 1 else -(value >> 1) - 1


def _spread(data: bytes) -> bytes:
    return b"".join(_CHUNK + bytes((byte,)) for byte in data)


def body_start(data: bytes | mmap.mmap) -> int:
    """Where the chunks begin. Raises ValueError when `data` is no such file."""
    if len(data) < _HEADER:
        raise ValueError("shorter than its header")
    start = _HEADER + struct.unpack(">Q", data[8:_HEADER])[0] + _HASH
    if start >= len(data):
        raise ValueError("the metadata's length does not fit the file")
    return start


def find(data: bytes | mmap.mmap, before_ns: int, after_ns: int) -> list[tuple[int, int]]:
    """Every (file offset, value) of a 9-byte number written in one-byte chunks with before_ns <= value <= after_ns."""
    low, high = zigzag(before_ns), zigzag(after_ns)
    if len(low) != _VARINT_BYTES or len(high) != _VARINT_BYTES or before_ns > after_ns:
        return []
    # The window is a fraction of a second, so the upper bytes are all but constant: search for those, in C.
    hits: dict[int, int] = {}
    step = len(_CHUNK) + 1
    start = body_start(data)
    for upper in {low[6:], high[6:]}:
        needle = _spread(upper)
        at = data.find(needle, start)
        while at != -1:
            offset = at - 6 * step
            if offset >= start:
                raw = bytes(data[offset : offset + _VARINT_BYTES * step])
                digits = raw[len(_CHUNK) :: step]
                if raw == _spread(digits) and all(byte & 0x80 for byte in digits[:-1]):
                    value = _unzigzag(digits)
                    if before_ns <= value <= after_ns:
                        hits[offset] = value
            at = data.find(needle, at + 1)
    return sorted(hits.items())


def freeze(path: Path, before_ns: int, after_ns: int) -> dict[str, object]:
    """Make the clock saved in `path` stand still for whoever restores it. Blocking, about 1 ms a MB.

    Returns notes for `Capture.clock`: `frozen`, and `offset` and `saved_ns` of the number, or `why` it was left alone.
    """
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                hits = find(data, before_ns, after_ns)
            except ValueError as error:
                return {"frozen": False, "why": str(error)}
        if len(hits) != 1:
            return {"frozen": False, "why": f"{len(hits)} numbers look like the time of the save"}
        offset, value = hits[0]
        file.seek(offset)
        file.write(_spread(zigzag(FAR_FUTURE_NS)))
    return {"frozen": True, "offset": offset, "saved_ns": value}
