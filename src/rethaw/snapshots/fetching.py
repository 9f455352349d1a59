"""Reading snapshots back from a tier, for a node that does not have their files (any more).

`restore_catalog` says which snapshots there are; a record (`records.read`) has the manifest and where the packs are;
`RemotePacks` reads ranges of packs; `Fetcher` fills in whole pack files; `PackReader` reads from the nearest place that
has the bytes and fills that in behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rethaw.model import faults
from rethaw.model.errors import ObjectDamaged, ObjectMissing, RethawError, SnapshotUnusable, StorageFull
from rethaw.snapshots import records
from rethaw.snapshots.packing import Extent, cover
from rethaw.snapshots.records import Header, PackPlace
from rethaw.snapshots.tiers.base import Tier

log = logging.getLogger("rethaw.snapshots")
_AT_ONCE = 4
_BLOCK = 8 << 20
_HEADERS_AT_ONCE = 8


@dataclass(frozen=True)
class Listed:
    """A snapshot in the tier. `header` None: its record cannot be used, `error` says why."""

    snapshot: str
    header: Header | None
    error: str | None = None


async def restore_catalog(tier: Tier) -> list[Listed]:
    """All snapshots that the tier has records of, by name; `header.info` is their SnapshotInfo as JSON.

    Raises TierUnavailable. A damaged record does not hide the others.
    """
    limit = asyncio.Semaphore(_HEADERS_AT_ONCE)

    async def look(name: str, size: int) -> Listed | None:
        snapshot = name.removeprefix(f"{records.FOLDER}/")
        async with limit:
            try:
                return Listed(snapshot, await records.read_header(tier, snapshot, size))
            except ObjectMissing:  # deleted since it was listed
                return None
            except ObjectDamaged as error:
                return Listed(snapshot, None, str(error))

    found = await asyncio.gather(*(look(f.name, f.size) for f in await tier.list(records.FOLDER)))
    return [listed for listed in found if listed is not None]


class RemotePacks:
    """Ranges of packs, straight from a tier."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._limit = asyncio.Semaphore(_AT_ONCE)

    async def read(self, extents: Sequence[Extent], offset: int, length: int) -> bytes:
        """Exactly `length` bytes of the pack that `extents` make up.

        Raises ObjectMissing, ObjectDamaged, TierUnavailable; SnapshotUnusable when `extents` do not hold that range.
        """
        parts = cover(extents, offset, length)
        if parts is None:
            raise SnapshotUnusable(
                f"the bytes {offset} to {offset + length} of a pack are in no object",
                remedy="an older snapshot is used instead",
            )

        async def get(part: Extent) -> bytes:
            async with self._limit:
                return await self._tier.get(part.object, part.object_offset, part.length)

        return b"".join(await asyncio.gather(*map(get, parts)))


class Fetcher:
    """Whole packs from a tier into files. One pack is fetched once, however many ask for it at the same time."""

    def __init__(self, tier: Tier) -> None:
        self._remote = RemotePacks(tier)
        self._running: dict[Path, asyncio.Task[None]] = {}

    async def fetch(self, pack: str, place: PackPlace, target: Path) -> None:
        """Make `target` the whole pack, durable, or leave nothing there. A file of the right size is left as it is.

        Raises as `RemotePacks.read`, and StorageFull.
        """
        if await asyncio.to_thread(_size_of, target) == place.size:
            return
        task = self._running.get(target)
        if task is None:
            task = self._running[target] = asyncio.ensure_future(self._fetch(pack, place, target))
            task.add_done_callback(lambda done: self._ended(target, done))
        await asyncio.shield(task)

    def _ended(self, target: Path, task: asyncio.Task[None]) -> None:
        self._running.pop(target, None)
        if not task.cancelled():
            task.exception()  # who waited may have gone

    async def close(self) -> None:
        """End what is under way; nothing half-written stays."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, pack: str, place: PackPlace, target: Path) -> None:
        if cover(place.extents, 0, place.size) is None:
            raise SnapshotUnusable(
                f"pack {pack} is not whole in the tier", remedy="an older snapshot is used instead", file=pack
            )
        partial = target.with_name(f".{target.name}.{os.urandom(6).hex()}")
        try:
            await asyncio.to_thread(target.parent.mkdir, mode=0o700, parents=True, exist_ok=True)
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                for offset in range(0, place.size, _BLOCK):
                    length = min(_BLOCK, place.size - offset)
                    data = await self._remote.read(place.extents, offset, length)
                    await asyncio.to_thread(_write, fd, data)
                    faults.point("fetch.block")
                await asyncio.to_thread(os.fsync, fd)
            finally:
                os.close(fd)
            partial.rename(target)
            await asyncio.to_thread(_sync, target.parent)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(
                    f"no space left for pack {pack} at {target}",
                    remedy="free disk space; reads go to the tier meanwhile",
                ) from error
            raise
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


class PackReader:
    """Reads packs from this node's disk if they are there, else from the tier, and then fills the disk in behind.

    `path_of(pack)`: its file here, there or not. `place_of(pack)`: where it is in the tier, None if nowhere.
    One pack is filled in at a time; the reads that wait for nothing else go first.
    """

    def __init__(self, tier: Tier, path_of: Callable[[str], Path], place_of: Callable[[str], PackPlace | None]) -> None:
        self._remote = RemotePacks(tier)
        self._fetcher = Fetcher(tier)
        self._path_of, self._place_of = path_of, place_of
        self._filling: dict[str, asyncio.Task[None]] = {}
        self._one = asyncio.Semaphore(1)

    async def read(self, pack: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises SnapshotUnusable when the pack is nowhere, and as `RemotePacks.read`."""
        path = self._path_of(pack)
        found = await asyncio.to_thread(_read, path, offset, length)
        if found is not None:
            return found
        place = self._place_of(pack)
        if place is None:
            raise SnapshotUnusable(
                f"pack {pack} is neither at {path} nor in the tier",
                remedy="an older snapshot is used instead",
                file=str(path),
            )
        data = await self._remote.read(place.extents, offset, length)
        if pack not in self._filling:
            task = self._filling[pack] = asyncio.ensure_future(self._fill(pack, place, path))
            task.add_done_callback(lambda _: self._filling.pop(pack, None))
        return data

    async def filled(self) -> None:
        """Returns once nothing is being filled in any more."""
        while self._filling:
            await asyncio.gather(*self._filling.values())

    async def close(self) -> None:
        for task in list(self._filling.values()):
            task.cancel()
        await asyncio.gather(*self._filling.values(), return_exceptions=True)
        await self._fetcher.close()

    async def _fill(self, pack: str, place: PackPlace, path: Path) -> None:
        async with self._one:
            try:
                await self._fetcher.fetch(pack, place, path)
            except (RethawError, OSError) as error:
                log.info("pack %s is read from the tier, it cannot be kept here: %s", pack, error)


def _read(path: Path, offset: int, length: int) -> bytes | None:
    """From a file here; None when it is not there or ends too early (then the tier may have it whole)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        parts: list[bytes] = []
        done = 0
        while done < length:
            part = os.pread(fd, length - done, offset + done)
            if not part:
                return None
            parts.append(part)
            done += len(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def _size_of(path: Path) -> int | None:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return None


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
