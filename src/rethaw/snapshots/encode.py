"""From raw sections to a pack and a manifest: compare with a former snapshot, compress what is new.

A page's delta always refers to a page that is stored whole, so reading takes one hop however long the chain of saves.
And a manifest never refers to more than MAX_PACKS packs: when there would be more, the pages that are left of the
emptiest ones are stored anew, and those of frames of which less than half is left. So the thousandth restore reads about
as many places as the third, and decompresses about as much.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from backports import zstd
from numpy.typing import NDArray

from rethaw.snapshots import pack as packs
from rethaw.snapshots import pages
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.manifest import ZERO, Blob, Ints, Manifest, PackRef, Pages
from rethaw.snapshots.pack import BLOB, BLOB_BYTES, DELTAS, FRAME_PAGES, PAGES, Frame
from rethaw.snapshots.pages import PAGE, Bools, Former, Plan, Words

MAX_PACKS = 32
_LEVEL, _BLOB_LEVEL = 3, 1  # measured: level 3 is no slower on pages, level 1 is smaller on a gVisor kernel state
_BATCH = 32  # frames compressed by one job
_NO_PAGES: Words = np.empty((0, PAGE // 8), dtype=np.uint64)

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Known:
    """A snapshot's pages as the next save compares with them. `former.pages` may be a mapped file; `base_pack` (number in
    `packs`) and `base_slot` say where the whole page that a delta refers to lies."""

    snapshot: str
    packs: list[PackRef]
    pack: Ints
    slot: Ints
    base_pack: Ints
    base_slot: Ints
    former: Former

    def thin(self) -> Known:
        """The same without any page in memory: 44 bytes for each instead of 4096."""
        rows = np.full(len(self.pack), -1, dtype=np.int32)
        former = Former(None, self.former.hashes, rows, _NO_PAGES, self.former.digests)
        return replace(self, former=former)

    def places(self) -> tuple[tuple[Ints, Ints], tuple[Ints, Ints]]:
        """Numbers of packs and slots: of the pages, and of what deltas refer to."""
        return (self.pack, self.slot), (self.base_pack, self.base_slot)

    def whole(self, at: Ints) -> tuple[Ints, Ints]:
        """Where the whole pages lie that deltas against the pages `at` refer to: numbers in `packs`, and slots."""
        indirect = self.base_pack[at] >= 0
        pack = np.where(indirect, self.base_pack[at], self.pack[at])
        return pack, np.where(indirect, self.base_slot[at], self.slot[at])


ReadPages = Callable[[list[PackRef], Ints, Ints], Words]  # the whole pages at these numbers of packs and slots
FirstSlots = Callable[[PackRef], NDArray[np.int64]]  # of a pack's frames, and the number of its slots


@dataclass
class Encoded:
    """What `write` made. `known`: by section, for the next save."""

    manifest: Manifest
    pack_bytes: int
    known: dict[str, Known] = field(default_factory=dict[str, Known])


def write(
    snapshot: str,
    meta: dict[str, Any],
    paged: dict[str, Path],
    blobs: dict[str, Path],
    former: dict[str, Known],
    pack: str,
    target: Path,
    keys: Keyring,
    pool: Executor,
    read: ReadPages | None = None,
    first_slots: FirstSlots | None = None,
) -> Encoded:
    """Compare, compress, and write `target` durably. `read`: gives pages of `former` that are not in memory any more.
    `first_slots`: of the packs of `former`. Blocking. Raises OSError, Damaged, and what those two raise."""
    job = _Job(snapshot, pack, pool, _renewed(former, first_slots), read)
    for name, path in paged.items():
        job.add_pages(name, path, former.get(name))
    for name, path in blobs.items():
        job.add_blob(name, path)
    index, size = packs.write(
        target, pack, job.frames, job.base_ids, job.column(job.delta_packs), job.column(job.delta_slots), keys
    )
    del index
    ref = PackRef(pack, size, footer_hash(target))
    return job.finish(meta, ref, size)


def footer_hash(path: Path) -> str:
    """The hash of a pack's index, from its footer."""
    with path.open("rb") as f:
        f.seek(-32, 2)
        return f.read(packs.HASH).hex()


def parallel(pool: Executor, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    return list(pool.map(function, items))


class _Job:
    """One save. The new pack is number 0 of each section's own list until `finish` puts the lists together."""

    def __init__(
        self, snapshot: str, pack: str, pool: Executor, renewed: dict[str, Bools], read: ReadPages | None
    ) -> None:
        self.snapshot = snapshot
        self.pack = pack
        self.pool = pool
        self.renewed = renewed
        self.read = read
        self.frames: list[Frame] = []
        self.slots = 0
        self.base_ids: list[str] = []  # of the new pack
        self.delta_packs: list[Ints] = []
        self.delta_slots: list[Ints] = []
        self.known: dict[str, Known] = {}
        self.sections: list[Pages] = []
        self.blobs: list[Blob] = []

    @staticmethod
    def column(parts: Sequence[Ints]) -> Ints:
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def _compress(self, kind: int, content: Words, level: int) -> None:
        """Frames of `content`, in order."""

        def some(start: int) -> list[Frame]:
            compressor = zstd.ZstdCompressor(level=level)
            out: list[Frame] = []
            for at in range(start, min(start + _BATCH * FRAME_PAGES, len(content)), FRAME_PAGES):
                raw = content[at : at + FRAME_PAGES].tobytes()
                out.append(Frame(kind, len(raw), compressor.compress(raw, zstd.ZstdCompressor.FLUSH_FRAME)))
            return out

        for found in parallel(self.pool, some, range(0, len(content), _BATCH * FRAME_PAGES)):
            self.frames += found
        self.slots += len(content)

    def add_pages(self, name: str, path: Path, former: Known | None) -> None:
        raw_bytes = path.stat().st_size
        content = pages.as_pages(np.memmap(path, dtype=np.uint8, mode="r") if raw_bytes else b"")
        found = pages.hashes(content)
        renew = self.renewed.get(name)
        compared = None if former is None else self._compared(former)
        plan = pages.plan(content, found, compared, renew)
        whole, deltas = plan.stored()
        pack = np.full(len(content), ZERO, dtype=np.int32)
        slot = np.zeros(len(content), dtype=np.int32)
        # The section's own list of packs: the new one, then the former's.
        kept = np.flatnonzero(plan.same >= 0)
        if former is not None:
            pack[kept] = former.pack[plan.same[kept]] + 1
            slot[kept] = former.slot[plan.same[kept]]
        pack[whole], slot[whole] = 0, self.slots + np.arange(len(whole), dtype=np.int32)
        self._compress(PAGES, _gather(content, whole), _LEVEL)
        pack[deltas], slot[deltas] = 0, self.slots + np.arange(len(deltas), dtype=np.int32)
        bases = compared.base_of(plan.base[deltas]) if compared is not None and len(deltas) else None
        if bases is not None:
            self._compress(DELTAS, content[deltas] ^ bases, _LEVEL)
        twins = np.flatnonzero(~plan.zero & (plan.same < 0) & (plan.twin != np.arange(len(plan.twin))))
        pack[twins], slot[twins] = pack[plan.twin[twins]], slot[plan.twin[twins]]
        self.sections.append(Pages(name, raw_bytes, pack, slot))
        self._remember(name, content, found, plan, deltas, bases, former, pack, slot)

    def _compared(self, former: Known) -> Former:
        """`former.former`, able to read what is not in memory."""

        def read(at: Ints) -> Words:
            assert self.read is not None
            return self.read(former.packs, *former.whole(at))

        return replace(former.former, read=read)

    def _remember(
        self,
        name: str,
        content: Words,
        found: Words,
        plan: Plan,
        deltas: Ints,
        bases: Words | None,
        former: Known | None,
        pack: Ints,
        slot: Ints,
    ) -> None:
        count = len(content)
        base_pack, base_slot = np.full(count, -1, dtype=np.int32), np.full(count, -1, dtype=np.int32)
        row = np.full(count, -1, dtype=np.int32)
        kept_bases = _NO_PAGES
        if former is not None:
            same = np.flatnonzero(plan.same >= 0)
            source = plan.same[same]
            base_pack[same] = np.where(former.base_pack[source] >= 0, former.base_pack[source] + 1, -1)
            base_slot[same] = former.base_slot[source]
            old = former.former.base_row[source]
            held = old >= 0
            row[same[held]] = np.arange(int(held.sum()), dtype=np.int32)
            kept_bases = former.former.bases[old[held]]
            # A delta's base: what its former page itself refers to, or that page.
            base_pack[deltas], base_slot[deltas] = former.whole(plan.base[deltas])
            base_pack[deltas] += 1
            self._note_bases(base_pack[deltas], base_slot[deltas], former)
        if bases is not None:
            row[deltas] = len(kept_bases) + np.arange(len(deltas), dtype=np.int32)
            kept_bases = np.concatenate([kept_bases, bases])
        twins = np.flatnonzero(plan.twin != np.arange(count))
        base_pack[twins], base_slot[twins] = base_pack[plan.twin[twins]], base_slot[plan.twin[twins]]
        row[twins] = row[plan.twin[twins]]
        apart = (base_pack >= 0) & (row < 0)
        self.known[name] = Known(
            self.snapshot,
            [] if former is None else former.packs,
            pack,
            slot,
            base_pack,
            base_slot,
            Former(content, found, row, kept_bases, plan.digests, apart),
        )

    def _note_bases(self, base_pack: Ints, base_slot: Ints, former: Known) -> None:
        """Number the base packs of new deltas in the new pack's own list."""
        numbers = np.zeros(len(former.packs) + 1, dtype=np.int32)
        for number in np.unique(base_pack):
            ident = former.packs[int(number) - 1].id
            if ident not in self.base_ids:
                self.base_ids.append(ident)
            numbers[number] = self.base_ids.index(ident)
        self.delta_packs.append(numbers[base_pack])
        self.delta_slots.append(base_slot)

    def add_blob(self, name: str, path: Path) -> None:
        first = len(self.frames)
        compressor = zstd.ZstdCompressor(level=_BLOB_LEVEL)
        raw_bytes = 0
        with path.open("rb") as f:
            while raw := f.read(BLOB_BYTES):
                data = compressor.compress(raw, zstd.ZstdCompressor.FLUSH_FRAME)
                self.frames.append(Frame(BLOB, len(raw), data))
                raw_bytes += len(raw)
        self.blobs.append(Blob(name, raw_bytes, 0, first, len(self.frames) - first))

    def finish(self, meta: dict[str, Any], new: PackRef, size: int) -> Encoded:
        """Put the sections' lists of packs together, and leave out what nothing refers to."""
        refs: list[PackRef] = [new]
        numbers: dict[str, int] = {new.id: 0}
        for section in self.sections:
            known = self.known[section.name]
            mine = [new, *known.packs]
            used = np.unique(np.concatenate([section.pack, known.base_pack]))
            table = np.full(len(mine) + 1, -1, dtype=np.int32)  # its last entry serves the number -1
            for number in used[used >= 0]:
                ref = mine[int(number)]
                if ref.id not in numbers:
                    numbers[ref.id] = len(refs)
                    refs.append(ref)
                table[number] = numbers[ref.id]
            section.pack = table[section.pack]
            known.pack, known.base_pack = section.pack, table[known.base_pack]
            known.packs = refs
        return Encoded(Manifest(self.snapshot, meta, refs, self.sections, self.blobs), size, self.known)


def _gather(content: Words, indices: Ints) -> Words:
    """`content[indices]`, without a copy where that is the whole of it."""
    return content if len(indices) == len(content) else content[indices]


def _renewed(former: dict[str, Known], first_slots: FirstSlots | None) -> dict[str, Bools]:
    """By section, the pages of a former snapshot that must not be referred to: those of zeros, which lie nowhere, and,
    when its pages lie scattered over too many packs, those in the emptiest packs and frames, and deltas against such."""
    renewed = {name: known.pack == ZERO for name, known in former.items()}
    count = max((len(known.packs) for known in former.values()), default=0)
    if count < MAX_PACKS:
        return renewed
    refs = next(known.packs for known in former.values() if len(known.packs) == count)
    worn = _worn(former.values(), count)
    for number, ref in enumerate(refs):
        lost = _lost(former.values(), number, first_slots(ref)) if first_slots and not worn[number] else None
        for name, known in former.items():
            for pack, slot in known.places():
                mine = np.flatnonzero(pack == number)
                renewed[name][mine] |= worn[number] if lost is None else lost[slot[mine]]
    return renewed


def _worn(former: Collection[Known], count: int) -> Bools:
    """Which of `count` packs are the emptiest, all sections together."""
    live = np.zeros(count, dtype=np.int64)
    for known in former:
        for pack, _ in known.places():
            live += np.bincount(pack[pack >= 0], minlength=count)
    worn = np.zeros(count, dtype=np.bool_)
    worn[np.argsort(live, kind="stable")[: count - MAX_PACKS // 2]] = True
    return worn


def _lost(former: Collection[Known], number: int, first_slots: NDArray[np.int64]) -> Bools:
    """Which slots of a pack lie in a frame of which less than half is left, all sections together."""
    sizes = np.diff(first_slots)
    live = np.zeros(len(sizes), dtype=np.int64)
    for known in former:
        for pack, slot in known.places():
            frame = np.searchsorted(first_slots, slot[pack == number], side="right") - 1
            live += np.bincount(frame, minlength=len(sizes))
    return np.repeat(2 * live < sizes, sizes)
