"""Keeps what a guest no longer watches from coming back to it at a restore, by changing a few numbers in the saved kernel state.

gVisor's epoll keeps what is ready in a list whose links are part of its entries, and an entry that is taken off keeps a link
to its former neighbour. What a program has removed by EPOLL_CTL_DEL is saved then as long as such a link leads to it, and a
restore reports everything saved as ready, so the program is told of a descriptor that it has closed. Most look it up and find
nothing. Those that keep a pointer in its place (tokio, and so most Rust programs) follow it into freed memory: Codex hung or
died of it in about every fifteenth thaw. Here what no epoll instance has in its table any more gets an empty mask, for which
nothing is ever reported.

The format is told in `clock`. A record of n fields is `0b type 0d n fields`, a reference `06 object 00`, an object of the stream
`02 number` before its record. Of types only the numbers are in records, counted from 1 in the order in which they are described.
"""

from __future__ import annotations

import re
from pathlib import Path

from rethaw.engines.gvisor.clock import spread

_INTEREST, _KEY = b"pkg/sentry/vfs.epollInterest", b"pkg/sentry/vfs.epollInterestKey"
_TYPE = re.compile(rb"\x00\x00\x00\x01\x11\x00\x00\x00\x01([\x01-\x7f])\x00\x00\x00\1", re.DOTALL)
_FIRST = b"pkg/sentry/kernel.Kernel"  # number 1: what comes before it is of another part of the file
_FIELDS = 8
_MASK = 3  # its place among them
_STEP = 5  # bytes of the file for one of the stream
_BACK = 12


class _Unknown(Exception):
    """Not written as it is known here."""


class _Reader:
    """The stream from a file offset on, as far as each byte is a chunk of its own."""

    def __init__(self, data: bytes, offset: int) -> None:
        self._data = data
        self.offset = offset

    def byte(self) -> int:
        at = self.offset
        if self._data[at : at + 4] != b"\x00\x00\x00\x01":
            raise _Unknown("a longer chunk")
        self.offset = at + _STEP
        return self._data[at + 4]

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def reference(self) -> int | None:
        """The object's number; None when it leads into the middle of one."""
        root = self.number()
        steps = self.number()
        for _ in range(steps):
            step = self.number()
            if step & 1:  # negative: the length of a field's name
                self._text((step >> 1) + 1)
        if steps:
            self._type()
            return None
        return root

    def _text(self, length: int) -> None:
        if self._data[self.offset : self.offset + 4] != length.to_bytes(4, "big"):
            raise _Unknown("another text")
        self.offset += 4 + length

    def _type(self) -> None:
        kind = self.number()
        if kind in (0, 2):  # a type's number, or an array's length
            self.number()
        if kind == 4:
            self._type()
        if kind in (1, 2, 3, 4):
            self._type()

    def skip(self, kind: int) -> None:
        """Past a value of this kind."""
        if kind in (0, 1, 2):  # bool, signed, unsigned
            self.number()
        elif kind == 6:
            self.reference()
        elif kind == 11:
            self.number()
            self.skip(self.byte())
        elif kind == 13:
            for _ in range(self.number()):
                self.skip(self.byte())
        elif kind == 14:  # interface
            self._type()
            self.skip(self.byte())
        elif kind not in (5, 12):  # nothing
            raise _Unknown(f"kind {kind}")


def find_stale(data: bytes) -> list[tuple[int, int]]:
    """(file offset, bytes of the stream) of the masks of what no epoll instance has in its table. Empty when there is nothing
    of the kind, or when the file is not written as it is known here."""
    if data.find(_INTEREST) == -1:
        return []
    numbers = _numbers(data)
    if numbers is None:
        return []
    try:
        masks, keys = _interests(data, _record(numbers[0], _FIELDS))
        live = _live(data, _record(numbers[1], 2), keys)
    except (_Unknown, IndexError):
        return []
    if not live or not live <= masks.keys():
        return []
    return [place for number, place in masks.items() if number not in live]


def _numbers(data: bytes) -> tuple[int, int] | None:
    """Of the types of what is watched, and of its key."""
    found: dict[bytes, int] = {}
    count = 0
    for match in _TYPE.finditer(data):
        name = data[match.end() : match.end() + match[1][0]]
        if b"/" not in name:  # the first of 17 fields
            continue
        if count or name == _FIRST:
            count += 1
        if name in (_INTEREST, _KEY):
            found[name] = count
            if len(found) == 2:
                return found[_INTEREST], found[_KEY]
    return None


def _record(kind: int, fields: int) -> bytes:
    number = bytes((kind,)) if kind < 0x80 else bytes((kind & 0x7F | 0x80, kind >> 7))
    return spread(b"\x0b" + number + bytes((0x0D, fields, 0x06)))


def _interests(data: bytes, needle: bytes) -> tuple[dict[int, tuple[int, int]], set[int]]:
    """By number of the object the place of its mask; and where the keys in such objects lie."""
    masks: dict[int, tuple[int, int]] = {}
    keys: set[int] = set()
    at = data.find(needle)
    while at != -1:
        reader = _Reader(data, at + len(needle) - _STEP)
        for field in range(_FIELDS):
            begin = reader.offset
            kind = reader.byte()
            if field == 1:
                keys.add(begin)
            if field == _MASK:
                if kind != 2:
                    raise _Unknown("no mask")
                begin = reader.offset
                reader.number()
                masks[_number_before(data, at, 0x02)] = begin, (reader.offset - begin) // _STEP
            else:
                reader.skip(kind) if field < _FIELDS - 1 else None
        at = data.find(needle, at + 1)
    return masks, keys


def _live(data: bytes, needle: bytes, keys: set[int]) -> set[int]:
    """Numbers of the objects in the tables of epoll instances: maps from keys to references."""
    live: set[int] = set()
    at = data.find(needle)
    while at != -1:
        if at not in keys:
            count = _number_before(data, at, 0x0A)
            reader = _Reader(data, at)
            reader.byte()
            for n in range(count):
                reader.skip(0x0B)
                if n == 0 and reader.byte() != 0x06:
                    raise _Unknown("no table of references")
                live.add(reader.reference() or 0)
            at = reader.offset - _STEP
        at = data.find(needle, at + 1)
    return live


def _number_before(data: bytes, offset: int, mark: int) -> int:
    """The number that ends at `offset` and begins after a byte `mark`."""
    found: list[int] = []
    for n in range(1, _BACK):
        at = offset - n * _STEP
        byte = _Reader(data, at).byte()
        if found and byte < 0x80:
            if byte != mark:
                break
            return sum((value & 0x7F) << 7 * place for place, value in enumerate(reversed(found)))
        found.append(byte)
    raise _Unknown("no number")


def hush(path: Path) -> int:
    """Empty those masks in the file `path`; how many there were. Blocking, a few ms."""
    stale = find_stale(path.read_bytes())
    if stale:
        with path.open("r+b") as file:
            for offset, length in stale:
                file.seek(offset)
                file.write(spread(b"\x80" * (length - 1) + b"\x00"))
    return len(stale)
