"""From a manifest back to raw sections: frames are read, checked and decompressed in parallel, each once."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rethaw.snapshots import pack as packs
from rethaw.snapshots.encode import Known, footer_hash, parallel
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.manifest import Ints, Manifest, PackRef, Pages
from rethaw.snapshots.pack import Damaged, Index
from rethaw.snapshots.pages import PAGE, Former, Words, as_pages, digests, hashes

_OPEN_PACKS = 256
_JOBS = 8
_AT_ONCE = 16  # runs that are written by one call
_WORDS = PAGE // 8
_DELTAS = 4096  # that are laid over their bases at a time: 48 MiB


class PackDamaged(Exception):
    """A pack that cannot be used, and why."""

    def __init__(self, pack: str, why: str) -> None:
        super().__init__(f"pack {pack} {why}")
        self.pack, self.why = pack, why


@dataclass
class _Open:
    fd: int
    index: Index

    def __del__(self) -> None:
        os.close(self.fd)


class Packs:
    """Open packs of a directory. Threads may share it."""

    def __init__(self, path_of: Callable[[str], Path], keys: Keyring) -> None:
        self._path_of = path_of
        self._keys = keys
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, ref: PackRef) -> _Open:
        """Raises PackDamaged."""
        with self._lock:
            if ref.id in self._open:
                self._open.move_to_end(ref.id)
                return self._open[ref.id]
        path = self._path_of(ref.id)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise PackDamaged(ref.id, f"cannot be read ({error.strerror})") from error
        try:
            if os.fstat(fd).st_size != ref.size:
                raise Damaged(f"has {os.fstat(fd).st_size} bytes, {ref.size} were written")
            if footer_hash(path) != ref.index_hash:
                raise Damaged("is damaged (its end is not the one that was written)")
            found = _Open(fd, packs.read_index(fd, ref.id, self._keys))
        except (Damaged, OSError) as error:
            os.close(fd)
            raise PackDamaged(ref.id, str(error)) from error
        except BaseException:
            os.close(fd)
            raise
        with self._lock:
            self._open[ref.id] = found
            while len(self._open) > _OPEN_PACKS:
                self._open.popitem(last=False)
        return found

    def forget(self, pack: str) -> None:
        with self._lock:
            self._open.pop(pack, None)

    def frame(self, ref: PackRef, number: int) -> bytes:
        """The content of one frame. Raises PackDamaged."""
        found = self.get(ref)
        index = found.index
        if not 0 <= number < len(index.lengths):
            raise PackDamaged(ref.id, f"has {len(index.lengths)} frames, frame {number} is wanted")
        try:
            data = packs.exactly(found.fd, int(index.offsets[number]), int(index.lengths[number]))
            return packs.raw_frame(index, number, data, self._keys)
        except (Damaged, OSError) as error:
            raise PackDamaged(ref.id, str(error)) from error

    def page(self, ref: PackRef, slot: int, bases: list[PackRef]) -> bytes:
        """One page alone: one frame, or two when it is a delta. `bases`: packs that deltas may refer to."""
        index = self.get(ref).index
        if not 0 <= slot < index.first_slot[-1]:
            raise PackDamaged(ref.id, f"has no page {slot}")
        number = int(np.searchsorted(index.first_slot, slot, side="right")) - 1
        at = (slot - int(index.first_slot[number])) * PAGE
        content = self.frame(ref, number)[at : at + PAGE]
        if index.base_pack[slot] < 0:
            return content
        ident = index.bases[int(index.base_pack[slot])]
        base = next((b for b in bases if b.id == ident), None)
        if base is None:
            raise PackDamaged(ref.id, f"refers to pack {ident}, which the manifest does not name")
        whole = self.page(base, int(index.base_slot[slot]), [])
        return (np.frombuffer(content, np.uint64) ^ np.frombuffer(whole, np.uint64)).tobytes()


@dataclass
class Resolved:
    """Where each page of a section is read from: a whole page, and a delta to lay over it (-1: none)."""

    pack: Ints
    slot: Ints
    delta_pack: Ints
    delta_slot: Ints


def resolve(section: Pages, refs: list[PackRef], store: Packs) -> Resolved:
    """Raises PackDamaged for references that lead nowhere."""
    pack, slot = section.pack.copy(), section.slot.copy()
    delta_pack, delta_slot = np.full(len(pack), -1, dtype=np.int32), np.full(len(pack), -1, dtype=np.int32)
    numbers = {ref.id: n for n, ref in enumerate(refs)}
    for number in _numbers(section.pack):
        mine = np.flatnonzero(section.pack == number)
        index = store.get(refs[number]).index
        slots = section.slot[mine]
        if int(slots.max()) >= int(index.first_slot[-1]) or int(slots.min()) < 0:
            raise PackDamaged(
                refs[number].id, f"has {int(index.first_slot[-1])} pages, page {int(slots.max())} is wanted"
            )
        deltas = mine[index.base_pack[slots] >= 0]
        if not len(deltas):
            continue
        table = np.array([numbers.get(base, -1) for base in index.bases], dtype=np.int32)
        delta_pack[deltas], delta_slot[deltas] = section.pack[deltas], section.slot[deltas]
        own = section.slot[deltas]
        pack[deltas], slot[deltas] = table[index.base_pack[own]], index.base_slot[own]
        if (pack[deltas] < 0).any():
            raise PackDamaged(refs[number].id, "refers to a pack that the manifest does not name")
    for number in _numbers(pack[delta_pack >= 0]):
        index = store.get(refs[number]).index
        slots = slot[(delta_pack >= 0) & (pack == number)]
        beyond = int(slots.max()) >= int(index.first_slot[-1]) or int(slots.min()) < 0
        if beyond or (index.base_pack[slots] >= 0).any():
            raise PackDamaged(refs[number].id, "is referred to by a delta where it has no whole page")
    return Resolved(pack, slot, delta_pack, delta_slot)


def _numbers(values: NDArray[np.integer[Any]]) -> list[int]:
    """The different numbers in `values`, without negative ones."""
    found: list[int] = np.unique(values).tolist()
    return [number for number in found if number >= 0]


class _Group(NamedTuple):
    """Pages that come out of one frame."""

    ref: PackRef
    frame: int
    runs: list[tuple[int, int, int]]  # of pages that follow each other on both sides: target, begin, end, in bytes


def _groups(pack: Ints, slot: Ints, wanted: NDArray[np.intp], refs: list[PackRef], store: Packs) -> list[_Group]:
    frame = np.zeros(len(wanted), dtype=np.int64)
    inside = np.zeros(len(wanted), dtype=np.int64)
    owners = pack[wanted]
    for number in _numbers(owners):
        mine = owners == number
        first = store.get(refs[number]).index.first_slot
        slots = slot[wanted[mine]].astype(np.int64)
        found = np.searchsorted(first, slots, side="right") - 1
        frame[mine], inside[mine] = found, slots - first[found]
    order = np.argsort(owners.astype(np.int64) << 32 | slot[wanted], kind="stable")  # by pack, frame, page in it
    owners, frame, inside, wanted = owners[order], frame[order], inside[order], wanted[order]
    if not len(wanted):
        return []
    other_frame = (np.diff(owners) != 0) | (np.diff(frame) != 0)
    breaks = np.flatnonzero(other_frame | (np.diff(wanted) != 1) | (np.diff(inside) != 1)) + 1
    starts = np.concatenate([[0], breaks])
    begins = inside[starts] * PAGE
    after = begins + np.diff(starts, append=len(wanted)) * PAGE
    runs = list(zip((wanted[starts] * PAGE).tolist(), begins.tolist(), after.tolist(), strict=True))
    first = np.concatenate([[0], np.flatnonzero(other_frame) + 1])
    first_run = np.searchsorted(starts, first)
    rows = zip(
        owners[first].tolist(), frame[first].tolist(), first_run.tolist(), [*first_run[1:].tolist(), len(runs)],
        strict=True,
    )  # fmt: skip
    return [_Group(refs[owner], number, runs[a:b]) for owner, number, a, b in rows]


def pages_into(fd: int, section: Pages, refs: list[PackRef], store: Packs, pool: Executor) -> None:
    """Fill the file `fd`, which has its full size and holds zeros, with a section's pages. Raises PackDamaged, OSError."""
    where = resolve(section, refs, store)

    # Read and written, never mapped: a store into a mapped file without room for it kills the process, and a mapping that
    # a traceback holds keeps the memory of a file that is gone.
    def lay(groups: list[_Group]) -> None:
        parts: list[memoryview] = []
        begin = end = 0
        for group in groups:
            data = memoryview(store.frame(group.ref, group.frame))
            for target, first, after in group.runs:
                if parts and (target != end or len(parts) == _AT_ONCE):
                    _write_parts(fd, parts, begin, end)
                    parts = []
                if not parts:
                    begin = target
                parts.append(data[first:after])
                end = target + after - first
        if parts:
            _write_parts(fd, parts, begin, end)

    def lay_over(groups: list[_Group]) -> None:
        for group in groups:
            data = memoryview(store.frame(group.ref, group.frame))
            for target, begin, end in group.runs:
                base = np.frombuffer(packs.exactly(fd, target, end - begin), dtype=np.uint64)
                part = memoryview((base ^ np.frombuffer(data[begin:end], dtype=np.uint64)).tobytes())
                _write_all(fd, part, target)

    wholes = _groups(where.pack, where.slot, np.flatnonzero(where.pack >= 0), refs, store)
    parallel(pool, lay, _shares(wholes))
    deltas = _groups(where.delta_pack, where.delta_slot, np.flatnonzero(where.delta_pack >= 0), refs, store)
    parallel(pool, lay_over, _shares(deltas))


def _write_parts(fd: int, parts: list[memoryview], begin: int, end: int) -> None:
    if (done := os.pwritev(fd, parts, begin)) != end - begin:
        _write_all(fd, memoryview(b"".join(parts))[done:], begin + done)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def _shares(groups: list[_Group]) -> list[list[_Group]]:
    size = max(1, -(-len(groups) // _JOBS))
    return [groups[n : n + size] for n in range(0, len(groups), size)]


def load(manifest: Manifest, target: dict[str, Path], store: Packs, pool: Executor) -> None:
    """Write every section into the file that `target` names for it. Raises PackDamaged, OSError."""
    for blob in manifest.blobs:
        with target[blob.name].open("wb", buffering=0) as f:
            done = 0
            for number in range(blob.first, blob.first + blob.count):
                data = store.frame(manifest.packs[blob.pack], number)
                _write_all(f.fileno(), memoryview(data), done)
                done += len(data)
            if done != blob.raw_bytes:
                raise PackDamaged(
                    manifest.packs[blob.pack].id,
                    f"holds {done} bytes of section {blob.name}, which has {blob.raw_bytes}",
                )
    for section in manifest.pages:
        with target[section.name].open("w+b", buffering=0) as f:
            f.truncate(len(section.pack) * PAGE)
            pages_into(f.fileno(), section, manifest.packs, store, pool)
            if section.raw_bytes % PAGE:
                f.truncate(section.raw_bytes)


def check(manifest: Manifest, store: Packs, pool: Executor) -> int:
    """Read every frame that the snapshot needs and compare it with its hash; the bytes read. Raises PackDamaged."""
    needed: dict[str, tuple[PackRef, set[int]]] = {ref.id: (ref, set()) for ref in manifest.packs}
    for section in manifest.pages:
        where = resolve(section, manifest.packs, store)
        for pack, slot in ((where.pack, where.slot), (where.delta_pack, where.delta_slot)):
            for number in _numbers(pack):
                ref = manifest.packs[number]
                first = store.get(ref).index.first_slot
                found = np.searchsorted(first, slot[pack == number].astype(np.int64), side="right") - 1
                needed[ref.id][1].update(_numbers(found))
    for blob in manifest.blobs:
        needed[manifest.packs[blob.pack].id][1].update(range(blob.first, blob.first + blob.count))

    def one(item: tuple[PackRef, set[int]]) -> int:
        ref, frames = item[0], item[1]
        for number in sorted(frames):
            store.frame(ref, number)
        return sum(int(store.get(ref).index.lengths[n]) for n in frames)

    return sum(parallel(pool, one, needed.values()))


def read_pages(refs: list[PackRef], pack: Ints, slot: Ints, store: Packs) -> Words:
    """The whole pages at these numbers in `refs` and slots, of zeros where the number is negative. Raises PackDamaged."""
    out = np.zeros((len(pack), _WORDS), dtype=np.uint64)
    for group in _groups(pack, slot, np.flatnonzero(pack >= 0), refs, store):
        content = _rows(store.frame(group.ref, group.frame))
        for target, begin, end in group.runs:
            out[target // PAGE : (target + end - begin) // PAGE] = content[begin // PAGE : end // PAGE]
    return out


def _rows(frame: bytes) -> Words:
    return np.frombuffer(frame, dtype=np.uint64).reshape(-1, _WORDS)


def known(snapshot: str, manifest: Manifest, section: Pages, raw: Path | None, store: Packs, pool: Executor) -> Known:
    """What the next save compares with, from a snapshot whose section lies in `raw`; None: it is read from the packs,
    and no page stays in memory. Raises PackDamaged, OSError."""
    count = len(section.pack)
    where = resolve(section, manifest.packs, store)
    deltas = np.flatnonzero(where.delta_pack >= 0)
    base_pack, base_slot = np.full(count, -1, dtype=np.int32), np.full(count, -1, dtype=np.int32)
    base_pack[deltas], base_slot[deltas] = where.pack[deltas], where.slot[deltas]
    row = np.full(count, -1, dtype=np.int32)
    if raw is None:
        found, own = _told_apart(where, deltas, manifest.packs, store, pool)
        former = Former(None, found, row, _rows(b""), own)
        return Known(snapshot, manifest.packs, section.pack, section.slot, base_pack, base_slot, former)
    content: Words = as_pages(np.memmap(raw, dtype=np.uint8, mode="r") if section.raw_bytes else b"")
    row[deltas] = np.arange(len(deltas), dtype=np.int32)
    # content = base ^ delta, so the base is content ^ delta: no base has to be read.
    bases = content[deltas] ^ read_pages(manifest.packs, where.delta_pack[deltas], where.delta_slot[deltas], store)
    found = hashes(content)
    own = np.zeros((count, 2), dtype=np.uint64)
    some = np.flatnonzero(section.pack >= 0)
    own[some] = digests(content, some)
    former = Former(content, found, row, bases, own)
    return Known(snapshot, manifest.packs, section.pack, section.slot, base_pack, base_slot, former)


def _told_apart(
    where: Resolved, deltas: NDArray[np.intp], refs: list[PackRef], store: Packs, pool: Executor
) -> tuple[Words, Words]:
    """Hashes and digests of all pages of a section, whose frames are read one after the other."""
    found = np.zeros(len(where.pack), dtype=np.uint64)
    own = np.zeros((len(where.pack), 2), dtype=np.uint64)

    def note(at: NDArray[np.intp] | slice, content: Words) -> None:
        found[at], own[at] = hashes(content), digests(content, np.arange(len(content)))

    def look(groups: list[_Group]) -> None:
        for group in groups:
            content = _rows(store.frame(group.ref, group.frame))
            for target, begin, end in group.runs:
                at = slice(target // PAGE, (target + end - begin) // PAGE)
                note(at, content[begin // PAGE : end // PAGE])

    whole = np.flatnonzero((where.pack >= 0) & (where.delta_pack < 0))
    parallel(pool, look, _shares(_groups(where.pack, where.slot, whole, refs, store)))
    for start in range(0, len(deltas), _DELTAS):
        some = deltas[start : start + _DELTAS]
        base = read_pages(refs, where.pack[some], where.slot[some], store)
        note(some, base ^ read_pages(refs, where.delta_pack[some], where.delta_slot[some], store))
    return found, own


__all__ = ["PackDamaged", "Packs", "check", "known", "load", "pages_into", "read_pages", "resolve"]
