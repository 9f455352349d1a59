"""Cutting request bodies so that a conversation is stored once, however often it is sent.

A body is three spans: `head`, up to and including the `[` of the first top-level array named in `GROWING`; `chain`, the
array's elements; `tail`, the rest. Each is a segment (0001_log.sql: segments) or, for the chain, one segment for each
element, whose key is the SHA-256 of the chain's bytes up to there. The next turn of a conversation finds the key of all
that came before by hashing, and stores what follows. Long strings and members are parts of their own, so that an
element that comes back slightly changed (a moved cache marker) costs its small change only.

Where a cut is made never matters for exactness, only for economy: the spans' bytes are taken as they are, one after
the other. Scanning works on the body as Latin-1, in which every byte is one character and JSON's structure is ASCII.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rethaw.model.errors import RethawError

log = logging.getLogger("rethaw.log")

GROWING = frozenset({"messages", "input", "contents"})  # OpenAI Chat and Anthropic; OpenAI Responses; Gemini
CUT = 1024  # bytes: strings, elements and members from this size on are parts of their own, smaller ones stay inline
_OPAQUE_PART = 4 << 20  # bytes: what is no JSON is cut into pieces of this size
_INLINE, _REFERENCE = 0, 1
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder(strict=False)


class _Running(Protocol):
    def update(self, data: memoryview, /) -> None: ...
    def digest(self) -> bytes: ...


Known = Mapping[int, "set[bytes]"]  # bytes of a chain: keys that are stored


@dataclass(frozen=True)
class Segment:
    key: bytes
    prev: bytes | None
    size: int  # bytes of the whole expansion
    parts: bytes  # packed


@dataclass
class Plan:
    """A body as keys of segments, with the segments and contents that are perhaps not stored yet."""

    size: int
    head: bytes | None = None
    chain: bytes | None = None
    tail: bytes | None = None
    segments: list[Segment] = field(default_factory=list[Segment])
    contents: dict[bytes, bytes] = field(default_factory=dict[bytes, bytes])
    ends: list[tuple[int, bytes]] = field(default_factory=list[tuple[int, bytes]])  # boundaries of the chain

    @property
    def new_bytes(self) -> int:
        return sum(map(len, self.contents.values())) + sum(len(s.parts) for s in self.segments)


def plan(body: bytes, known: Known | None = None) -> Plan:
    """Cut `body`; `known`: boundaries of chains that are stored already. CPU only: 5 MB take about 10 ms when known."""
    out = Plan(len(body))
    if body:
        skipped = _cut(out, body, known or {})
        if not _exact(out, body, skipped):
            log.error("a request of %d bytes was cut wrongly and is stored whole", len(body))
            out = Plan(len(body))
            out.head = _whole(out, memoryview(body), (), None)
    return out


def _exact(out: Plan, body: bytes, skipped: tuple[int, int]) -> bool:
    """Whether the segments' parts, one after the other, are `body` without the span that was known."""
    pieces = (piece for segment in out.segments for piece in unpack(segment.parts))
    new = b"".join(out.contents[piece[0]] if isinstance(piece, tuple) else piece for piece in pieces)
    return new == body[: skipped[0]] + body[skipped[1] :]


def _cut(out: Plan, body: bytes, known: Known) -> tuple[int, int]:
    """Fill `out`; returns the span of `body` that is stored already."""
    text = body.decode("latin-1")
    view = memoryview(body)
    start, cuts = _head(text)
    if start is None:
        out.head = _whole(out, view, cuts or range(_OPAQUE_PART, len(body), _OPAQUE_PART), text if cuts else None)
        return 0, 0
    out.head = _whole(out, view[:start], cuts, text)
    digest, done = _skip_known(out, view[start:], known)
    pos = start + done
    for end in _elements(text, pos, first=done == 0):
        digest.update(view[pos:end])
        key = digest.digest()
        out.segments.append(Segment(key, out.chain, end - start, _pack(out, view, _strings(text, pos, end))))
        out.ends.append((end - start, key))
        out.chain = key
        pos = end
    out.tail = _whole(out, view[pos:], [cut - pos for cut in _tail_cuts(text, pos)], text[pos:])
    return start, start + done


def _skip_known(out: Plan, chain: memoryview, known: Known) -> tuple[_Running, int]:
    """The running hash and length of the longest known beginning of `chain`."""
    running = hashlib.sha256()
    best, best_end, pos = running.copy(), 0, 0
    for end in sorted(known):
        if end > len(chain):
            break
        running.update(chain[pos:end])
        pos = end
        key = running.digest()
        if key in known[end]:
            out.ends.append((end, key))
            out.chain = key
            best, best_end = running.copy(), end
    return best, best_end


# ---------------------------------------------------------------- scanning


class _Odd(Exception):
    """The text is no JSON from here on, or none that we know how to cut."""


def _value(text: str, pos: int) -> int:
    """Where the value that starts at `pos` ends."""
    try:
        return _DECODER.raw_decode(text, pos)[1]
    except (ValueError, RecursionError, StopIteration) as e:
        raise _Odd from e


def _space(text: str, pos: int) -> int:
    match = _SPACE.match(text, pos)
    return match.end() if match else pos


def _head(text: str) -> tuple[int | None, list[int]]:
    """Index after the `[` of the growing array (None: there is none), and where to cut before it."""
    cuts: list[int] = []
    try:
        pos = _space(text, 0)
        if text[pos : pos + 1] != "{":
            return None, []
        pos += 1
        while True:
            member = pos = _space(text, pos)
            if text[pos : pos + 1] != '"':
                return None, cuts
            end = _value(text, pos)
            name = _DECODER.raw_decode(text, pos)[0]
            pos = _space(text, end)
            if text[pos : pos + 1] != ":":
                return None, cuts
            pos = _space(text, pos + 1)
            if name in GROWING and text[pos : pos + 1] == "[":
                return pos + 1, cuts
            pos = _member(text, member, pos, cuts)
            pos = _space(text, pos)
            if text[pos : pos + 1] != ",":
                return None, cuts
            pos += 1
    except _Odd:
        return None, cuts


def _member(text: str, start: int, value: int, cuts: list[int]) -> int:
    """The end of a member that starts at `start`, whose value starts at `value`; large ones are cut off, arrays by
    element."""
    inner: list[int] = []
    if text[value : value + 1] == "[":
        inner = list(_elements(text, value + 1, first=True))
        pos = _space(text, inner[-1] if inner else value + 1)
        if text[pos : pos + 1] != "]":
            raise _Odd
        end = pos + 1
    else:
        end = _value(text, value)
    if end - start >= CUT:
        cuts.extend((start, *inner, end))
    return end


def _elements(text: str, pos: int, *, first: bool) -> Iterable[int]:
    """Ends of the elements of an array from `pos` on (after its `[`, or after an element), while it is JSON."""
    try:
        while True:
            at = _space(text, pos)
            if not first:
                if text[at : at + 1] != ",":
                    return
                at = _space(text, at + 1)
            if text[at : at + 1] in ("]", ""):
                return
            pos = _value(text, at)
            first = False
            yield pos
    except _Odd:
        return


def _tail_cuts(text: str, pos: int) -> list[int]:
    """Where to cut what follows the growing array's last element."""
    cuts: list[int] = []
    try:
        pos = _space(text, pos)
        if text[pos : pos + 1] == "]":
            pos = _space(text, pos + 1)
            while text[pos : pos + 1] == ",":
                member = pos = _space(text, pos + 1)
                pos = _space(text, _value(text, pos))
                if text[pos : pos + 1] != ":":
                    break
                pos = _space(text, _member(text, member, _space(text, pos + 1), cuts))
    except _Odd:
        pass
    return cuts or list(range(pos + _OPAQUE_PART, len(text), _OPAQUE_PART))


def _strings(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """[start, end) cut so that each long string is a piece of its own."""
    out: list[tuple[int, int]] = []
    pos = start
    if end - start >= CUT:
        for match in _STRING.finditer(text, start, end):
            if match.end() - match.start() >= CUT:
                if match.start() > pos:
                    out.append((pos, match.start()))
                out.append(match.span())
                pos = match.end()
    if pos < end:
        out.append((pos, end))
    return out


# ---------------------------------------------------------------- packing


def _whole(out: Plan, view: memoryview, cuts: Iterable[int], text: str | None) -> bytes:
    """One segment for all of `view`, cut at `cuts` and (where there is text) at long strings. Returns its key."""
    pieces: list[tuple[int, int]] = []
    pos = 0
    for cut in (*cuts, len(view)):
        if cut > pos:
            pieces.extend(_strings(text, pos, cut) if text is not None else [(pos, cut)])
            pos = cut
    key = hashlib.sha256(view).digest()
    out.segments.append(Segment(key, None, len(view), _pack(out, view, pieces)))
    return key


def _pack(out: Plan, view: memoryview, pieces: Iterable[tuple[int, int]]) -> bytes:
    """Parts in order: tag, 4 bytes of size, then the bytes themselves or the SHA-256 of a content."""
    packed = bytearray()
    small = bytearray()

    def flush() -> None:
        if small:
            packed.append(_INLINE)
            packed.extend(len(small).to_bytes(4, "big"))
            packed.extend(small)
            small.clear()

    for start, end in pieces:
        if end - start < CUT:
            small += view[start:end]
            continue
        flush()
        data = bytes(view[start:end])
        digest = hashlib.sha256(data).digest()
        out.contents[digest] = data
        packed.append(_REFERENCE)
        packed.extend(len(data).to_bytes(4, "big"))
        packed.extend(digest)
    flush()
    return bytes(packed)


def unpack(parts: bytes) -> list[bytes | tuple[bytes, int]]:
    """Inline bytes, or (digest, size) of a content, in order. Raises RethawError for what `_pack` did not make."""
    out: list[bytes | tuple[bytes, int]] = []
    pos = 0
    while pos < len(parts):
        tag, size = parts[pos], int.from_bytes(parts[pos + 1 : pos + 5], "big")
        length = size if tag == _INLINE else 32
        piece = parts[pos + 5 : pos + 5 + length]
        if tag not in (_INLINE, _REFERENCE) or len(piece) != length:
            raise RethawError("a stored segment is damaged", position=pos)
        out.append(piece if tag == _INLINE else (piece, size))
        pos += 5 + length
    return out
