"""Keeps a guest's clocks and timers still while it is frozen, by changing a few numbers in the saved kernel state.

gVisor's restore moves the monotonic clock on by `now - Timekeeper.saveRealtime` when that is positive. With a
`saveRealtime` far in the future it stays where it was; the wall clock comes from the host and is right at once. That
one number is changed at the save (`freeze`), so a restore has nothing to do for it.

A relative `clock_nanosleep(CLOCK_REALTIME)`, which is what C's sleep() and the `sleep` program are, is saved as the wall
time at which it ends, and so is a timer_create(CLOCK_REALTIME), which is what the `timeout` program uses. Those ends are
found at the save and moved at each restore (`shift`) by the time frozen. (An absolute such timer looks the same and is
moved as well; nothing tells them apart. A timerfd, by which programs that keep appointments do it, is left alone.)

`checkpoint.img` of an uncompressed save is

    8 bytes magic | 8 bytes big-endian length | JSON metadata | 32 bytes hash | chunks [4 bytes big-endian length | bytes]

with no hash over the chunks. Numbers are written byte by byte as varints (signed ones zigzag), each byte a chunk of its
own. The clock is found by its value, which lies between the wall times right before and right after the save, and when a
file written in that moment has such a value too, by the shape of the record around it: exactly one hit, or nothing is
changed. Sleeps are found by shape and value.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

FAR_FUTURE_NS = 4_500_000_000_000_000_000  # year 2112: the last whole years whose zigzag varint still has 9 bytes
_VARINT_BYTES = 9
_CHUNK = b"\x00\x00\x00\x01"
_STEP = len(_CHUNK) + 1
_HEADER = 16
_HASH = 32
_SLEEP_TYPE = b"clockNanosleepRestartBlock"
# Record of three fields: interface (the clock), struct of one signed number (the end), unsigned number (an address).
_SLEEP_BEFORE = re.compile(rb"\x0d\x03\x0e.{3,16}\x00\x0b.{1,2}\x01\Z", re.DOTALL)
_SLEEP_AFTER = b"[\x02\x05]"  # the address, or nothing
# Record of the Timekeeper up to its fifth field: two clocks, the boot time, the monotonic time, and then the wall time.
_CLOCK_BEFORE = re.compile(
    rb"\x0d\x05\x06.{1,3}\x00\x06.{1,3}\x00\x0b.{1,2}\x01[\x80-\xff]{8}.\x01[\x80-\xff]{0,8}[\x00-\x7f]\x01\Z",
    re.DOTALL,
)
# Record of an enabled timer: two interfaces (clock, listener), each with the number of its type, then the setting, of
# which the second field is when it fires.
_INTERFACE = rb"\x0e\x01\x00([\x80-\xff]?[\x00-\x7f])\x06[\x80-\xff]{0,3}[\x00-\x7f]\x00"
_TIMER_BEFORE = re.compile(
    rb"\x0d\x04" + _INTERFACE * 2 + rb"\x0b[\x80-\xff]?[\x00-\x7f]\x0d\x03\x00\x01\x0b[\x80-\xff]?[\x00-\x7f]\x01\Z",
    re.DOTALL,
)
_TIMER_AFTER = b"[\x01\x05]"  # the period, or none
_TIMER_TYPE = b"pkg/sentry/kernel.IntervalTimer"
_CLOCK_TYPE = b"pkg/sentry/kernel.timekeeperClock"
_TYPE = re.compile(rb"\x00\x00\x00\x01\x11\x00\x00\x00\x01([\x01-\x7f])\x00\x00\x00\1", re.DOTALL)
_CONTEXT = 48


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


def spread(data: bytes) -> bytes:
    """`data` as it is written: each byte a chunk."""
    return b"".join(_CHUNK + bytes((byte,)) for byte in data)


def _number(data: bytes, offset: int) -> int | None:
    """The 9-byte number at `offset`, None when there is none."""
    raw = data[offset : offset + _VARINT_BYTES * _STEP]
    digits = raw[len(_CHUNK) :: _STEP]
    if len(digits) != _VARINT_BYTES or raw != spread(digits):
        return None
    if digits[-1] & 0x80 or not all(byte & 0x80 for byte in digits[:-1]):
        return None
    return _unzigzag(digits)


def body_start(data: bytes) -> int:
    """Where the chunks begin. Raises ValueError when `data` is no such file."""
    if len(data) < _HEADER:
        raise ValueError("shorter than its header")
    start = _HEADER + struct.unpack(">Q", data[8:_HEADER])[0] + _HASH
    if start >= len(data):
        raise ValueError("the metadata's length does not fit the file")
    return start


def find(data: bytes, before_ns: int, after_ns: int) -> list[tuple[int, int]]:
    """Every (file offset, value) of a 9-byte number written in one-byte chunks with before_ns <= value <= after_ns."""
    low, high = zigzag(before_ns), zigzag(after_ns)
    if len(low) != _VARINT_BYTES or len(high) != _VARINT_BYTES or before_ns > after_ns:
        return []
    # The window is a fraction of a second, so the upper bytes are all but constant: search for those, in C.
    hits: dict[int, int] = {}
    start = body_start(data)
    for upper in {low[6:], high[6:]}:
        needle = spread(upper)
        at = data.find(needle, start)
        while at != -1:
            offset = at - 6 * _STEP
            value = _number(data, offset) if offset >= start else None
            if value is not None and before_ns <= value <= after_ns:
                hits[offset] = value
            at = data.find(needle, at + 1)
    return sorted(hits.items())


def find_sleeps(data: bytes, after_ns: int) -> list[int]:
    """File offsets of the ends of relative sleeps on the wall clock that end after `after_ns`."""
    if data.find(_SLEEP_TYPE) == -1:
        return []
    later = _later(data, after_ns, _SLEEP_AFTER)
    return [offset for offset in later if _SLEEP_BEFORE.search(_context(data, offset))]


def find_timers(data: bytes, after_ns: int) -> list[int]:
    """File offsets of the ends of timer_create() timers on the wall clock that end after `after_ns`."""
    if data.find(_TIMER_TYPE) == -1:
        return []
    order = [data[m.end() : m.end() + m[1][0]] for m in _TYPE.finditer(data)]
    if order.count(_TIMER_TYPE) != 1 or order.count(_CLOCK_TYPE) != 1:
        return []
    # Types are numbered as they come, from a number that depends on what was written before.
    apart = order.index(_TIMER_TYPE) - order.index(_CLOCK_TYPE)
    offsets: list[int] = []
    for offset in _later(data, after_ns, _TIMER_AFTER):
        found = _TIMER_BEFORE.search(_context(data, offset))
        if found and _varint(found[2]) - _varint(found[1]) == apart:
            offsets.append(offset)
    return offsets


def _later(data: bytes, after_ns: int, following: bytes) -> Iterator[int]:
    """Offsets of 9-byte numbers over `after_ns` before a byte of `following`."""
    top = zigzag(after_ns)[-1]
    tops = b"".join(re.escape(bytes((digit,))) for digit in (top, min(top + 1, 0x3F)))
    # Anchored on the last, rarest byte: a search that starts with the eight before it takes ten times as long.
    pattern = re.compile(re.escape(_CHUNK) + b"[" + tops + b"]" + re.escape(_CHUNK) + following)
    for match in pattern.finditer(data, body_start(data)):
        offset = match.start() - (_VARINT_BYTES - 1) * _STEP
        value = _number(data, offset)
        if value is not None and value > after_ns:
            yield offset


def _varint(data: bytes) -> int:
    return sum((byte & 0x7F) << 7 * n for n, byte in enumerate(data))


def _context(data: bytes, offset: int) -> bytes:
    """The bytes before `offset`, as far as each is a chunk of its own."""
    raw = data[max(0, offset - _CONTEXT * _STEP) : offset]
    out = bytearray()
    while len(raw) >= _STEP and raw[-_STEP:-1] == _CHUNK:
        out.append(raw[-1])
        raw = raw[:-_STEP]
    out.reverse()
    return bytes(out)


def freeze(path: Path, before_ns: int, after_ns: int) -> dict[str, object]:
    """Make the clock saved in `path` stand still for whoever restores it. Blocking, a few ms.

    Returns notes for `Capture.clock`: `frozen`, `offset` and `saved_ns` of the number, `sleeps` for `shift`; or `frozen`
    false and `why` the file was left alone.
    """
    data = path.read_bytes()
    try:
        hits = find(data, before_ns, after_ns)
    except ValueError as error:
        return {"frozen": False, "why": str(error)}
    if len(hits) > 1:
        hits = [hit for hit in hits if _CLOCK_BEFORE.search(_context(data, hit[0]))]
    if len(hits) != 1:
        return {"frozen": False, "why": f"{len(hits)} numbers look like the time of the save"}
    offset, value = hits[0]
    sleeps = find_sleeps(data, value) + find_timers(data, value)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(spread(zigzag(FAR_FUTURE_NS)))
    return {"frozen": True, "offset": offset, "saved_ns": value, "sleeps": sleeps}


def sleeps_of(notes: dict[str, object]) -> tuple[int, list[int]]:
    """Time of the save and offsets of sleeps in notes that `freeze` made (they have been through JSON since)."""
    saved, offsets = notes.get("saved_ns"), notes.get("sleeps")
    if not isinstance(saved, int) or not isinstance(offsets, list):
        return 0, []
    return saved, [offset for offset in cast("list[object]", offsets) if isinstance(offset, int)]


def shift(data: bytes, offsets: list[int], saved_ns: int, restore_ms: float) -> bytes:
    """`data` with every sleep and timer ending as much later as the guest was frozen. `restore_ms`: how long the restore itself
    will take; a sleep may end late, never early. Offsets that hold no such number are left alone."""
    later = time.time_ns() - saved_ns + int(restore_ms * 1e6)
    out = bytearray(data)
    for offset in offsets:
        value = _number(data, offset)
        if value is not None and value > saved_ns and later > 0:
            number = zigzag(value + later)
            if len(number) == _VARINT_BYTES:
                out[offset : offset + _VARINT_BYTES * _STEP] = spread(number)
    return bytes(out)
