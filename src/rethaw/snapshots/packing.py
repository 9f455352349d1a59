"""Which bytes of which packs go into which object, as pure functions.

Packs are of any size; objects are of a size that object stores like. So packs are laid one after the other and the
stream is cut into objects: an object may hold several packs, and a pack may span several objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

LEAST = 8 << 20  # bytes; smaller objects only when nobody can wait
MOST = 32 << 20


class Extent(NamedTuple):
    """`length` bytes of a pack, from `pack_offset` on, are in `object` from `object_offset` on."""

    object: str
    object_offset: int
    pack_offset: int
    length: int

    @property
    def end(self) -> int:
        """Where it ends in the pack."""
        return self.pack_offset + self.length


class Wanted(NamedTuple):
    """Bytes of a pack that are in no object yet."""

    pack: str
    path: Path
    offset: int
    length: int


def gaps(size: int, covered: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset, length) of what `covered`, ranges in any order, leaves of `size` bytes."""
    found: list[tuple[int, int]] = []
    at = 0
    for offset, length in sorted(covered):
        if min(offset, size) > at:
            found.append((at, min(offset, size) - at))
        at = max(at, offset + length)
        if at >= size:
            break
    if at < size:
        found.append((at, size - at))
    return found


def cut(wanted: Sequence[Wanted], *, whole: bool, least: int = LEAST, most: int = MOST) -> list[Wanted]:
    """What the next object holds: the first `most` bytes of `wanted`.

    Less than `least` bytes wait for company (an empty answer), unless `whole`. Then the last but one object leaves the
    last one `least` bytes, so that there is one small object at most, and only when there is too little for two.
    """
    total = sum(piece.length for piece in wanted)
    if total == 0 or (total < least and not whole):
        return []
    take = min(total, most)
    if whole and 0 < total - take < least and total >= 2 * least:
        take = total - least
    found: list[Wanted] = []
    for piece in wanted:
        if take == 0:
            break
        if piece.length:
            part = piece._replace(length=min(piece.length, take))
            found.append(part)
            take -= part.length
    return found


def lay(name: str, pieces: Iterable[Wanted]) -> dict[str, list[Extent]]:
    """Where each pack's bytes are in the object `name` that holds `pieces`, by pack."""
    found: dict[str, list[Extent]] = {}
    at = 0
    for piece in pieces:
        found.setdefault(piece.pack, []).append(Extent(name, at, piece.offset, piece.length))
        at += piece.length
    return found


def cover(extents: Iterable[Extent], offset: int, length: int) -> list[Extent] | None:
    """The bytes from `offset` on as extents that neither overlap nor leave a hole, in order. None: some are nowhere."""
    end = offset + length
    found: list[Extent] = []
    at = offset
    ordered = sorted(extents, key=lambda e: e.pack_offset)
    n = 0
    while at < end:
        best: Extent | None = None
        while n < len(ordered) and ordered[n].pack_offset <= at:
            if best is None or ordered[n].end > best.end:
                best = ordered[n]
            n += 1
        # Whatever was passed before ends at `at` or earlier, since the furthest of it was taken.
        if best is None or best.end <= at:
            return None
        skip = at - best.pack_offset
        part = Extent(best.object, best.object_offset + skip, at, min(best.end, end) - at)
        found.append(part)
        at = part.end
    return found
