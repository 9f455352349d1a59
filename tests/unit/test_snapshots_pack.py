"""Packs: laid out as documented, read within their caps, refused in words when anything is off."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from store_damage import PACK_FOOTER, PACK_HEADER, IndexTables, PackFile, b3, boundaries
from store_fixtures import KEY, OTHER, heap, keyring, noise, place

from rethaw.model.errors import KeyMissing
from rethaw.snapshots import pack
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.pack import BLOB, DELTAS, MAX_INDEX, PAGES, Damaged, Frame
from rethaw.snapshots.pages import PAGE

PLAIN = Keyring()


def frame(kind: int, raw: bytes) -> Frame:
    return Frame(kind, len(raw), zstd.compress(raw))


RAWS = [heap(1, 16), heap(2, 3), b"state" * 9000, heap(3, 2), b"x"]
KINDS = [PAGES, PAGES, BLOB, DELTAS, BLOB]


def written(path: Path, keys: Keyring = PLAIN, ident: str = "pk_1") -> pack.Index:
    frames = [frame(kind, raw) for kind, raw in zip(KINDS, RAWS, strict=True)]
    base_pack, base_slot = np.array([1, 0], dtype=np.int32), np.array([70_000, 2], dtype=np.int32)
    index, size = pack.write(path, ident, frames, ["pk_0", "pk_x"], base_pack, base_slot, keys)
    assert size == path.stat().st_size
    return index


def opened(path: Path, keys: Keyring = PLAIN, ident: str = "pk_1") -> pack.Index:
    with path.open("rb") as file:
        return pack.read_index(file.fileno(), ident, keys)


def content(path: Path, index: pack.Index, number: int, keys: Keyring = PLAIN) -> bytes:
    with path.open("rb") as file:
        stored = pack.exactly(file.fileno(), int(index.offsets[number]), int(index.lengths[number]))
    return pack.raw_frame(index, number, stored, keys)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pk_1.pack"


@pytest.mark.parametrize("keys", [PLAIN, keyring()], ids=["clear", "sealed"])
def test_what_was_written_is_read(path: Path, keys: Keyring) -> None:
    first, second = written(path, keys), opened(path, keys)
    for index in (first, second):
        assert [content(path, index, n, keys) for n in range(len(RAWS))] == RAWS
        assert index.first_slot.tolist() == [0, 16, 19, 19, 21, 21]
        assert index.base_pack.tolist() == [-1] * 19 + [1, 0]
        assert index.base_slot.tolist() == [-1] * 19 + [70_000, 2]
        assert index.bases == ["pk_0", "pk_x"]
        assert index.key_id == keys.active


def test_a_pack_without_frames(path: Path) -> None:
    none = np.empty(0, dtype=np.int32)
    pack.write(path, "pk_1", [], [], none, none, PLAIN)
    index = opened(path)
    assert len(index.lengths) == 0
    assert index.first_slot.tolist() == [0]


def test_a_pack_lies_as_documented(path: Path) -> None:
    """Parsed by hand from the layout in the module: a format that changes silently would leave old packs unreadable."""
    written(path)
    data = path.read_bytes()
    magic, version, flags, key, zero, name = struct.unpack("<8sHH8sI40s", data[:64])
    assert (magic, version, flags, key, zero, name) == (b"RTHWPACK", 1, 0, bytes(8), 0, b"pk_1".ljust(40, b"\0"))
    parts = PackFile.of(data)  # checks footer and hash
    assert parts.raw == len(parts.plain)
    tables = IndexTables.of(parts.plain)
    assert tables.counts == [5, 21, 2]
    assert tables.kinds == KINDS
    assert tables.raws == [len(raw) for raw in RAWS]
    assert (tables.base_pack, tables.base_slot) == ([1, 0], [70_000, 2])
    assert tables.bases == [b"pk_0".ljust(40, b"\0"), b"pk_x".ljust(40, b"\0")]
    at = PACK_HEADER
    for raw, length, hashed in zip(RAWS, tables.lengths, tables.hashes, strict=True):
        stored = data[at : at + length]
        assert (b3(stored), zstd.decompress(stored)) == (hashed, raw)
        at += length
    assert at == parts.offset
    assert parts.data == data
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_sealed_pack_says_so_and_shows_nothing(path: Path) -> None:
    keys = keyring()
    written(path, keys)
    data = path.read_bytes()
    assert struct.unpack_from("<HH8s", data, 8) == (1, 1, bytes.fromhex(str(keys.active)))
    with pytest.raises(zstd.ZstdError):
        zstd.decompress(PackFile.of(data).index)
    with pytest.raises(KeyMissing, match=str(keys.active)):
        opened(path, keyring(OTHER))
    with pytest.raises(KeyMissing, match=str(keys.active)):
        opened(path)


@pytest.mark.parametrize("keys", [PLAIN, keyring()], ids=["clear", "sealed"])
def test_every_flipped_byte_is_noticed(path: Path, keys: Keyring) -> None:
    index = written(path, keys)
    data = path.read_bytes()
    end = int(index.offsets[-1]) + int(index.lengths[-1])
    for at in [*range(PACK_HEADER), *range(PACK_HEADER, end, 11), *range(end, len(data))]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        if PACK_HEADER <= at < end:
            number = int(np.searchsorted(index.offsets, at, side="right")) - 1
            with pytest.raises(Damaged, match=f"frame {number} at byte {index.offsets[number]} does not match"):
                content(path, opened(path, keys), number, keys)
        else:
            with pytest.raises(Damaged):
                opened(path, keys)


def test_every_cut_and_every_addition_is_noticed(path: Path) -> None:
    written(path)
    data = path.read_bytes()
    for size in {0, 1, 47, 48, 63, 111, 112, *boundaries(data), *range(0, len(data), 97)} - {len(data)}:
        path.write_bytes(data[:size])
        with pytest.raises(Damaged):
            opened(path)
    for more in (b"\0", bytes(48), b"RTHWPACK-the-end", data, data[-PACK_FOOTER:]):
        path.write_bytes(data + more)
        if data + more != data + data:
            with pytest.raises(Damaged):
                opened(path)


def test_a_newer_version_is_refused_by_name(path: Path) -> None:
    written(path)
    parts = PackFile.of(path.read_bytes())
    path.write_bytes(parts.field(8, "<H", 2).data)
    with pytest.raises(Damaged, match=r"of version 2, this Rethaw reads version 1; use a newer one"):
        opened(path)
    path.write_bytes(parts.field(10, "<H", 2).data)
    with pytest.raises(Damaged, match=r"has flags 2.*use a newer one"):
        opened(path)


def test_a_pack_under_another_name_is_refused(path: Path) -> None:
    written(path, ident="pk_2")
    with pytest.raises(Damaged, match="is the pack b'pk_2'"):
        opened(path)


# ---------------------------------------------------------------- crafted: every hash is right


def crafted(path: Path, change: Callable[[IndexTables], None]) -> None:
    parts = PackFile.of(path.read_bytes())
    tables = IndexTables.of(parts.plain)
    change(tables)
    path.write_bytes(parts.with_plain(tables.plain()).data)


def put(tables: IndexTables, name: str, at: int, value: int) -> None:
    getattr(tables, name)[at] = value


HUGE = 0xFFFF_FFFF
CRAFTED: dict[str, Callable[[IndexTables], None]] = {
    "more frames": lambda t: put(t, "counts", 0, HUGE),
    "one frame more": lambda t: put(t, "counts", 0, 6),
    "more slots": lambda t: put(t, "counts", 1, HUGE),
    "more bases": lambda t: put(t, "counts", 2, HUGE),
    "a long frame": lambda t: put(t, "lengths", 0, HUGE),
    "a border moved": lambda t: t.lengths.__setitem__(slice(2), [t.lengths[0] - 1, t.lengths[1] + 1]),
    "large raw pages": lambda t: put(t, "raws", 0, 17 * PAGE),
    "huge raw pages": lambda t: put(t, "raws", 0, HUGE - HUGE % PAGE),
    "half a page": lambda t: put(t, "raws", 0, 16 * PAGE - 1),
    "a large blob": lambda t: put(t, "raws", 2, (1 << 20) + 1),
    "an unknown kind": lambda t: put(t, "kinds", 0, 3),
    "another kind": lambda t: put(t, "kinds", 0, DELTAS),
    "a base pack that is not there": lambda t: put(t, "base_pack", 0, 2),
    "a base slot beyond all": lambda t: put(t, "base_slot", 0, HUGE),
    "trailing names": lambda t: t.bases.append(bytes(40)),
}


@pytest.mark.parametrize("what", list(CRAFTED))
def test_an_index_that_lies_is_refused(path: Path, what: str) -> None:
    written(path)
    crafted(path, CRAFTED[what])
    tracemalloc.start()
    try:
        with pytest.raises(Damaged):
            index = opened(path)
            for number in range(len(RAWS)):  # lengths that only the frames' hashes contradict
                content(path, index, number)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_an_index_of_large_frames_allocates_nothing(path: Path) -> None:
    """Slots were spread out before the sizes of frames were looked at: 25 bytes in the file asked for 8 MiB."""
    written(path)

    def change(tables: IndexTables) -> None:
        for name in ("lengths", "raws", "kinds", "hashes"):
            column = getattr(tables, name)
            column[:] = [column[0]] * 20_000
        tables.raws[:] = [HUGE - HUGE % PAGE] * 20_000
        tables.counts[0] = 20_000

    crafted(path, change)
    tracemalloc.start()
    try:
        with pytest.raises(Damaged, match="contradicts itself, at frame 0"):
            opened(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_lengths_in_the_footer_are_capped_before_anything_is_read(path: Path) -> None:
    written(path)
    parts = PackFile.of(path.read_bytes())
    lying = PackFile(parts.header, parts.frames, parts.index, MAX_INDEX + 1, parts.offset)
    path.write_bytes(lying.data)
    with pytest.raises(Damaged, match=f"index of {MAX_INDEX + 1} bytes"):
        opened(path)
    path.write_bytes(PackFile(parts.header, parts.frames, parts.index, parts.raw + 1, parts.offset).data)
    with pytest.raises(Damaged, match=f"holds {parts.raw} bytes where {parts.raw + 1} were stored"):
        opened(path)
    path.write_bytes(PackFile(parts.header, parts.frames, parts.index, parts.raw - 1, parts.offset).data)
    with pytest.raises(Damaged):
        opened(path)
    place = struct.pack("<QII", 1 << 63, HUGE, HUGE)
    path.write_bytes(path.read_bytes()[:-PACK_FOOTER] + place + bytes(16) + b"RTHWPACK-the-end")
    with pytest.raises(Damaged, match="cut off"):
        opened(path)


def test_a_frame_that_holds_more_than_it_says_is_not_inflated(path: Path) -> None:
    bomb = Frame(BLOB, 10, zstd.compress(bytes(256 << 20)))
    none = np.empty(0, dtype=np.int32)
    index, _ = pack.write(path, "pk_1", [bomb, Frame(BLOB, 10, b"no zstd")], [], none, none, PLAIN)
    with pytest.raises(Damaged, match="where 10 were stored"):
        content(path, index, 0)
    with pytest.raises(Damaged, match="does not decompress"):
        content(path, index, 1)


def test_a_sealed_frame_in_anothers_place_is_damage(path: Path) -> None:
    """A ring says SnapshotUnusable of its own; a pack's reader says Damaged, so that the snapshot gets named."""
    keys = keyring()
    index = written(path, keys)
    data = path.read_bytes()
    other = bytes(data[int(index.offsets[4]) :][: int(index.lengths[4])])
    index.hashes = index.hashes[:16] + b3(other) + index.hashes[32:]
    with pytest.raises(Damaged, match=r"frame 1 does not open"):
        pack.raw_frame(index, 1, other, keys)


def test_a_write_that_was_not_stored_as_written_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk gives back is compared before the pack counts."""
    honest = os.pread

    def rotten(fd: int, length: int, offset: int) -> bytes:
        data = bytearray(honest(fd, length, offset))
        if data:
            data[-1] ^= 1
        return bytes(data)

    monkeypatch.setattr(os, "pread", rotten)
    with pytest.raises(Damaged, match="frame 0"):
        written(path)


def test_writes_that_the_system_cuts_short_go_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.write

    def short(fd: int, data: memoryview) -> int:
        return honest(fd, data[:777])

    monkeypatch.setattr(os, "write", short)
    index = written(path)
    monkeypatch.undo()
    assert [content(path, index, n) for n in range(len(RAWS))] == RAWS


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["counts", "lengths", "raws", "kinds", "base_pack", "base_slot"]), st.integers(0, 5),
                          st.one_of(st.integers(0, 20), st.integers(0, 1 << 16), st.just(HUGE))), min_size=1, max_size=3))  # fmt: skip
def test_no_crafted_index_ends_in_anything_but_damage(changes: list[tuple[str, int, int]]) -> None:
    with place() as directory:
        path = directory / "pk_1.pack"
        written(path)

        def change(tables: IndexTables) -> None:
            for name, at, value in changes:
                column = getattr(tables, name)
                column[at % len(column)] = value & {"kinds": 0xFF, "base_pack": 0xFFFF}.get(name, HUGE)

        crafted(path, change)
        try:
            index = opened(path)
            found = [content(path, index, n) for n in range(len(index.lengths))]
        except Damaged:
            return
        assert found == RAWS


def test_random_bytes_are_no_pack(path: Path) -> None:
    for size in (0, 10, 112, 200, 5000):
        path.write_bytes(noise(size, size))
        with pytest.raises(Damaged):
            opened(path)
        path.write_bytes(b"RTHWPACK" + struct.pack("<HH", 1, 0) + noise(size, size) + bytes(100) + b"RTHWPACK-the-end")
        with pytest.raises(Damaged):
            opened(path)


def test_keys(path: Path) -> None:
    """A pack of the former key opens as long as that key is configured."""
    written(path, keyring(KEY))
    later = keyring(OTHER, KEY)
    assert [content(path, opened(path, later), n, later) for n in range(len(RAWS))] == RAWS
