"""The pages of a file that `lazyd` serves: where each lies in the packs, found once, and read when they are asked for."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from rethaw.snapshots import decode, manifest, pack
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.manifest import Ints, PackRef
from rethaw.snapshots.pack import Damaged, Index
from rethaw.snapshots.pages import PAGE

_CACHE_BYTES = 64 << 20
AROUND = 16  # pages, as in a frame
_ZEROS = bytes(1 << 20)


class _Source:
    """A pack that stays open, even if it is removed, as long as a file needs it."""

    def __init__(self, ref: PackRef, store: decode.Packs) -> None:
        opened = store.get(ref)
        self.id, self.fd, self.index, self._held = ref.id, opened.fd, opened.index, opened


class Frames:
    """Frames out of packs, the last ones kept. Threads may share it."""

    def __init__(self, keys: Keyring) -> None:
        self._keys = keys
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self.raw_bytes = self.stored_bytes = 0

    def get(self, source: _Source, number: int) -> bytes:
        """Raises Damaged, OSError, RethawError."""
        with self._lock:
            if (found := self._kept.get((source.id, number))) is not None:
                self._kept.move_to_end((source.id, number))
                return found
        index: Index = source.index
        data = pack.exactly(source.fd, int(index.offsets[number]), int(index.lengths[number]))
        raw = pack.raw_frame(index, number, data, self._keys)
        with self._lock:
            self.raw_bytes += len(raw)
            self.stored_bytes += len(data)
            if (source.id, number) not in self._kept:
                self._kept[source.id, number] = raw
                self._bytes += len(raw)
            while self._bytes > _CACHE_BYTES:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return raw


class _Spots:
    """For each page of a file the source, the frame in it and the page in that; -1: none."""

    def __init__(self, count: int) -> None:
        self.owner = np.full(count, -1, dtype=np.int32)
        self.frame = np.full(count, -1, dtype=np.int32)
        self.inside = np.zeros(count, dtype=np.int16)

    def fill(self, pack_numbers: Ints, slots: Ints, sources: dict[int, _Source]) -> None:
        for number, source in sources.items():
            mine = np.flatnonzero(pack_numbers == number)
            first = source.index.first_slot
            wanted = slots[mine].astype(np.int64)
            frame = np.searchsorted(first, wanted, side="right") - 1
            self.owner[mine], self.frame[mine], self.inside[mine] = number, frame, wanted - first[frame]

    def follow(self) -> NDArray[np.bool_]:
        """Which pages lie in their frame right after the page before, or are of zeros like it."""
        same = np.diff(self.owner) == 0
        return same & ((self.owner[1:] < 0) | ((np.diff(self.frame) == 0) & (np.diff(self.inside) == 1)))


class Content:
    """The pages of one file."""

    def __init__(self, size: int, whole: _Spots, delta: _Spots, sources: dict[int, _Source], frames: Frames) -> None:
        self.size = size
        self.inode = 0  # by which the kernel knows it, once that is known
        self._whole, self._delta = whole, delta
        self._sources, self._frames = sources, frames
        self._starts = np.ones(len(whole.owner), dtype=np.bool_)
        self._starts[1:] = ~(whole.follow() & delta.follow())
        self._breaks = np.append(np.flatnonzero(self._starts), len(whole.owner))
        self._seen = np.zeros(len(whole.owner), dtype=np.bool_)
        self._order: list[list[int]] = []
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """All that is asked for up to the file's end. Raises Damaged, OSError, RethawError."""
        end = min(offset + size, self.size)
        if end <= offset:
            return b""
        first, after = offset // PAGE, -(-end // PAGE)
        self._note(first, after)
        breaks: list[int] = (np.flatnonzero(self._starts[first + 1 : after]) + (first + 1)).tolist()
        parts = [self._run(a, b) for a, b in itertools.pairwise((first, *breaks, after))]
        parts[-1] = parts[-1][: len(parts[-1]) - (after * PAGE - end)]
        parts[0] = parts[0][offset - first * PAGE :]
        return b"".join(parts)

    def around(self, offset: int) -> tuple[int, int]:
        """The pages that come with the one at `offset` at no further cost, its own included: first and after the last. Those
        that follow each other in its frame, at most AROUND of them."""
        page = offset // PAGE
        at = int(np.searchsorted(self._breaks, page, side="right"))
        aligned = page - page % AROUND
        return max(int(self._breaks[at - 1]), aligned), min(int(self._breaks[at]), aligned + AROUND)

    def _run(self, first: int, after: int) -> memoryview:
        """Pages that follow each other in their frames."""
        size = (after - first) * PAGE
        if self._whole.owner[first] < 0:
            return memoryview(_ZEROS if size <= len(_ZEROS) else bytes(size))[:size]
        whole = self._part(self._whole, first, size)
        if self._delta.owner[first] < 0:
            return whole
        delta = np.frombuffer(self._part(self._delta, first, size), dtype=np.uint64)
        return memoryview((np.frombuffer(whole, dtype=np.uint64) ^ delta).tobytes())

    def _part(self, spots: _Spots, first: int, size: int) -> memoryview:
        source = self._sources[int(spots.owner[first])]
        begin = int(spots.inside[first]) * PAGE
        try:
            return memoryview(self._frames.get(source, int(spots.frame[first])))[begin : begin + size]
        except (Damaged, OSError) as error:
            raise Damaged(f"pack {source.id} {error}") from error

    def _note(self, first: int, after: int) -> None:
        with self._lock:
            new = np.flatnonzero(~self._seen[first:after]) + first
            if not len(new):
                return
            self._seen[new] = True
            for run in np.split(new, np.flatnonzero(np.diff(new) != 1) + 1):
                if self._order and sum(self._order[-1]) == run[0]:
                    self._order[-1][1] += len(run)
                else:
                    self._order.append([int(run[0]), len(run)])

    def touched(self) -> list[list[int]]:
        with self._lock:
            return [list(one) for one in self._order]


class Opener:
    """Makes files out of manifests."""

    def __init__(self, store: Path, keys: Keyring) -> None:
        self._keys = keys
        self._packs = decode.Packs(lambda ident: store / f"{ident}.pack", keys)
        self._sources: WeakValueDictionary[str, _Source] = WeakValueDictionary()
        self.frames = Frames(keys)

    def open(self, snapshot: str, path: Path, hashed: str | None, section: str, size: int, table: Path) -> Content:
        """Raises Damaged, PackDamaged, OSError, RethawError, ValueError."""
        data = manifest.read(path)
        if hashed is not None and pack.digest(data).hex() != hashed:
            raise Damaged("is damaged (its hash does not match)")
        found = manifest.decode(data, snapshot, self._keys)
        pages = next((p for p in found.pages if p.name == section), None)
        if pages is None:
            raise Damaged(f"has no section {section} in pages")
        wanted: Ints = np.fromfile(table, dtype="<i4").astype(np.int32)
        if size < 0 or len(wanted) != -(-size // PAGE):
            raise ValueError(f"a table of {len(wanted)} pages does not fit a file of {size} bytes")
        if len(wanted) and not -1 <= int(wanted.min()) <= int(wanted.max()) < len(pages.pack):
            raise ValueError(f"the table names pages that section {section} of {len(pages.pack)} pages does not have")
        where = decode.resolve(pages, found.packs, self._packs)
        needed: list[int] = np.unique(np.concatenate([where.pack, where.delta_pack])).tolist()
        sources = {number: self._source(found.packs[number]) for number in needed if number >= 0}
        whole, delta = _Spots(len(wanted)), _Spots(len(wanted))
        whole.fill(_through(where.pack, wanted), _through(where.slot, wanted), sources)
        delta.fill(_through(where.delta_pack, wanted), _through(where.delta_slot, wanted), sources)
        return Content(size, whole, delta, sources, self.frames)

    def _source(self, ref: PackRef) -> _Source:
        found = self._sources.get(ref.id)
        if found is None:
            self._sources[ref.id] = found = _Source(ref, self._packs)
        return found


def _through(values: Ints, table: Ints) -> Ints:
    """The value of each page that the table names, -1 where it names none."""
    out = np.full(len(table), -1, dtype=np.int32)
    some = table >= 0
    out[some] = values[table[some]]
    return out
