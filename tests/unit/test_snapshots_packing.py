"""Packs into objects and back: every byte of every pack comes back by range, whatever their sizes."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from rethaw.snapshots.packing import Extent, Wanted, cover, cut, gaps, lay

LEAST, MOST = 8, 32
SIZES = st.lists(st.integers(0, 100), max_size=12)


def wanted(sizes: list[int]) -> list[Wanted]:
    return [Wanted(f"p{n}", Path(f"p{n}"), 0, size) for n, size in enumerate(sizes)]


def rest(pieces: list[Wanted], taken: list[Wanted]) -> list[Wanted]:
    """What is left after `taken`, the beginning of `pieces`."""
    left: list[Wanted] = []
    todo = sum(piece.length for piece in taken)
    for piece in pieces:
        take = min(piece.length, todo)
        todo -= take
        left.append(piece._replace(offset=piece.offset + take, length=piece.length - take))
    return left


def pack_all(sizes: list[int]) -> tuple[list[int], dict[str, list[Extent]], dict[str, bytes]]:
    """Object sizes, extents by pack, and the objects' contents."""
    contents = {f"p{n}": random.Random(n).randbytes(size) for n, size in enumerate(sizes)}
    pieces, extents, objects, lengths = wanted(sizes), dict[str, list[Extent]](), dict[str, bytes](), list[int]()
    while taken := cut(pieces, whole=True, least=LEAST, most=MOST):
        name = f"objects/{len(objects)}"
        objects[name] = b"".join(contents[p.pack][p.offset : p.offset + p.length] for p in taken)
        lengths.append(len(objects[name]))
        for pack, found in lay(name, taken).items():
            extents.setdefault(pack, []).extend(found)
        pieces = rest(pieces, taken)
    return lengths, extents, objects


@given(SIZES, st.data())
def test_every_byte_comes_back_by_range(sizes: list[int], data: st.DataObject) -> None:
    lengths, extents, objects = pack_all(sizes)
    assert sum(lengths) == sum(sizes)
    for n, size in enumerate(sizes):
        content = random.Random(n).randbytes(size)
        offset = data.draw(st.integers(0, size))
        length = data.draw(st.integers(0, size - offset))
        found = cover(extents.get(f"p{n}", []), offset, length)
        assert found is not None
        got = b"".join(objects[e.object][e.object_offset : e.object_offset + e.length] for e in found)
        assert got == content[offset : offset + length]
        assert cover(extents.get(f"p{n}", []), 0, size + 1) is None


@given(SIZES)
def test_objects_are_neither_too_large_nor_needlessly_small(sizes: list[int]) -> None:
    lengths, _, _ = pack_all(sizes)
    assert all(length <= MOST for length in lengths)
    assert sum(length < LEAST for length in lengths) <= 1
    if sum(sizes) >= LEAST + MOST:
        assert all(length >= LEAST for length in lengths)


@given(SIZES)
def test_little_waits_for_company(sizes: list[int]) -> None:
    taken = cut(wanted(sizes), whole=False, least=LEAST, most=MOST)
    length = sum(piece.length for piece in taken)
    assert length == (0 if sum(sizes) < LEAST else min(sum(sizes), MOST))


@given(st.integers(0, 60), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=8))
@example(0, [(1, 0)])
def test_gaps_and_cover_agree_with_counting(size: int, ranges: list[tuple[int, int]]) -> None:
    covered = {byte for offset, length in ranges for byte in range(offset, offset + length)}
    holes = gaps(size, ranges)
    assert [byte for offset, length in holes for byte in range(offset, offset + length)] == [
        byte for byte in range(size) if byte not in covered
    ]
    assert all(length > 0 for _, length in holes)
    extents = [Extent(f"o{n}", 1000 * n, offset, length) for n, (offset, length) in enumerate(ranges)]
    found = cover(extents, 0, size)
    assert (found is None) == bool(holes)
    at = 0
    for extent in found or ():
        number = int(extent.object[1:])
        assert extent.pack_offset == at and extent.length > 0
        assert extent.object_offset - 1000 * number == extent.pack_offset - ranges[number][0]
        assert extent.end <= sum(ranges[number])
        at = extent.end
    assert found is None or at == size
