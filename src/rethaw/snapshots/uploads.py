"""Uploading snapshots to a tier, in the background or at once.

    objects/OBJECT       bytes of packs, 8 to 32 MiB (`packing`); random names, never written twice
    snapshots/SNAPSHOT   a snapshot's record (`records`), after every object that it names
    condemned/RANDOM     what the garbage collector is about to delete (`collecting`)
    owner/ID             whose collections may delete here

In the background, packs are laid together in the order in which snapshots came; a few records are put at a time. Less than 8 MiB wait for company, for
`linger_s` at most. `upload` does not wait (an agent's answer may hang on it): its packs go up at once, together with those
of others that ask at the same moment, and then objects may be as small as a pack. `flush` does the same for all.

What is up where is remembered (`places`), what waits is on disk (`jobs`), so a crash repeats one object at most. While the
tier does not answer, the background tries again with growing pauses; `upload` raises.

A record refers only to objects that are known to stay: see `collecting` for the rule and its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rethaw.model import faults
from rethaw.model.errors import ObjectMissing, SnapshotUnusable, TierUnavailable
from rethaw.snapshots import packing, records
from rethaw.snapshots.collecting import OBJECTS, Collected, Collector, condemned
from rethaw.snapshots.jobs import Job, JobFiles, PackFile
from rethaw.snapshots.packing import Extent, Wanted
from rethaw.snapshots.places import Places, own_id
from rethaw.snapshots.records import Header, PackPlace
from rethaw.snapshots.tiers.base import Tier
from rethaw.snapshots.tiers.settings import DEFAULT_LINGER_S

__all__ = ["Backlog", "Job", "PackFile", "Uploader"]

log = logging.getLogger("rethaw.snapshots")
DEFAULT_GRACE_S = 3600.0
_WINDOW = 64  # jobs of the background in memory
_RECORDS_AT_ONCE = 8
Uploaded = Callable[[str, float], Awaitable[None]]


@dataclass(frozen=True)
class Backlog:
    """`waiting`: snapshots. `error`: why the last try failed, None when it did not."""

    waiting: int
    error: str | None


def _now() -> float:
    """Goes on while the machine sleeps, because the collector's clock does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Uploader:
    """The uploads of one node. `state_dir` is its own: DATA/snapshots/remote.

    `on_uploaded(snapshot, ms)` is awaited once a snapshot's record is durable, `ms` after it came. `grace_s` must be the
    same for all who share the tier, and so must `owner` (`Collector`); None: an id of its own, kept in `state_dir`.
    `retry_s`: first and longest pause after a failure.
    """

    def __init__(
        self,
        tier: Tier,
        state_dir: Path,
        *,
        linger_s: float = DEFAULT_LINGER_S,
        least: int = packing.LEAST,
        most: int = packing.MOST,
        grace_s: float = DEFAULT_GRACE_S,
        retry_s: tuple[float, float] = (1.0, 60.0),
        on_uploaded: Uploaded | None = None,
        owner: str | None = None,
    ) -> None:
        self._tier = tier
        self._places = Places(state_dir)
        self._files = JobFiles(state_dir)
        self._linger, self._least, self._most = linger_s, least, most
        self._grace = grace_s
        self._retry = retry_s
        self._on_uploaded = on_uploaded
        self._owner_file = state_dir / "owner"
        self._owner = owner
        self._collector: Collector | None = None
        self._window: dict[str, Job] = {}
        self._urgent: dict[str, tuple[Job, asyncio.Future[None]]] = {}
        self._flying: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)  # pack -> ranges on their way
        self._recording: set[str] = set()
        self._flush = False
        self._error: str | None = None
        self._changed = asyncio.Condition()
        self._version = 0  # grows with each change, so that none is missed between a look and a wait
        self._tasks: list[asyncio.Task[None]] = []
        self._looked = float("-inf")  # when `condemned/` was looked at
        self._look_lock = asyncio.Lock()
        self._sure: set[str] = set()  # objects that were there after that look

    # ------------------------------------------------------------------ for callers

    async def start(self) -> None:
        """Go on with what an earlier process left. Raises OSError."""
        await asyncio.to_thread(self._places.load)
        await asyncio.to_thread(self._files.load)
        self._tasks = [asyncio.ensure_future(self._background()), asyncio.ensure_future(self._at_once())]

    async def close(self) -> None:
        """Stop; what waits stays on disk. Pending `upload` calls raise TierUnavailable."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        for job, future in self._urgent.values():
            if not future.done():
                future.set_exception(self._unavailable(job.snapshot, "the node stops"))
        self._urgent.clear()

    async def enqueue(self, job: Job) -> None:
        """Upload `job` in the background. Once only, however often it is asked. Raises OSError when the disk is full."""
        if not self._places.is_up(job.snapshot):
            self._files.add(job)
            await self._notify()

    async def upload(self, job: Job) -> float:
        """Upload `job` now; returns once its record is durable, with the milliseconds that it took.

        Raises TierUnavailable (enqueue it then), SnapshotUnusable when its files are not what they should be.
        """
        started = time.monotonic()
        if self._places.is_up(job.snapshot):
            return 0.0
        if not self._tasks:
            raise self._unavailable(job.snapshot, "the uploader does not run")
        if job.snapshot not in self._urgent:
            self._urgent[job.snapshot] = (job, asyncio.get_running_loop().create_future())
            await self._notify()
        future = self._urgent[job.snapshot][1]
        await asyncio.shield(future)
        return (time.monotonic() - started) * 1000

    async def flush(self) -> None:
        """Small packs wait no longer for company."""
        self._flush = True
        await self._notify()

    async def drained(self) -> None:
        """Returns once nothing waits in the background."""
        async with self._changed:
            await self._changed.wait_for(lambda: not len(self._files))

    async def forget(self, snapshot: str) -> None:
        """It was deleted here: it is not uploaded any more. Its record goes with the next collections."""
        self._files.remove(snapshot)
        self._window.pop(snapshot, None)
        await self._notify()

    @property
    def backlog(self) -> Backlog:
        return Backlog(len(self._files), self._error)

    def is_up(self, snapshot: str) -> bool:
        """Whether this node knows that the snapshot's record is durable in the tier."""
        return self._places.is_up(snapshot)

    def extents(self, pack: str, size: int) -> tuple[Extent, ...] | None:
        """Where a whole pack is in the tier; None when this node knows of no complete copy."""
        return self._places.cover(pack, size)

    def learn(self, header: Header) -> None:
        """A snapshot of another node was fetched: its packs are up, and snapshots based on it need not upload them."""
        self._places.learn({pack: place.extents for pack, place in header.packs.items()})
        self._places.set_up(header.snapshot)

    async def collect(self, live: Collection[str]) -> Collected:
        """Remove from the tier what nothing needs (`Collector.collect`). Uploads may go on meanwhile."""
        if self._collector is None:
            self._collector = Collector(self._tier, self._grace, self._owner or own_id(self._owner_file))
        result = await self._collector.collect(live)
        for name in result.objects:
            self._forget_object(name)
        for snapshot in result.snapshots:
            self._places.set_down(snapshot)
        return result

    # ------------------------------------------------------------------ the two lanes

    async def _background(self) -> None:
        pause = self._retry[0]
        while True:
            seen = self._version
            self._window = {job.snapshot: job for job in self._files.first(_WINDOW, self._window)}
            jobs = list(self._window.values())
            due = min((job.since for job in jobs), default=0.0) + self._linger
            whole = self._flush or time.monotonic() >= due
            try:
                done, moved = await self._advance(jobs, whole=whole)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                self._failed(jobs, error)
                await self._pause(self._version, pause * random.uniform(0.5, 1))
                pause = min(2 * pause, self._retry[1])
                continue
            pause, self._error = self._retry[0], None
            for snapshot in done:
                self._files.remove(snapshot)
                self._window.pop(snapshot, None)
            if done or moved:
                await self._notify()
                continue
            if not jobs:
                self._flush = False
            await self._pause(seen, due - time.monotonic() if jobs and not whole else None)

    def _failed(self, jobs: Sequence[Job], error: Exception) -> None:
        if isinstance(error, SnapshotUnusable):
            for job in jobs:
                if why := _unusable(job):
                    log.warning("snapshot %s is not uploaded: %s", job.snapshot, why)
                    self._files.remove(job.snapshot)
        elif self._error is None:
            log.warning("uploads wait: %s", error)
        self._error = str(error)

    async def _at_once(self) -> None:
        while True:
            seen = self._version
            batch = dict(self._urgent)
            try:
                done, moved = await self._advance([job for job, _ in batch.values()], whole=True)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                # One with bad files must not fail the others: they are tried again without it.
                bad = [s for s, (job, _) in batch.items() if isinstance(error, SnapshotUnusable) and _unusable(job)]
                for snapshot in bad or batch:
                    self._settle(snapshot, batch[snapshot][1], error)
                continue
            for snapshot in done:
                self._settle(snapshot, batch[snapshot][1], None)
            if done or moved:
                await self._notify()
            else:
                await self._pause(seen, None)

    def _settle(self, snapshot: str, future: asyncio.Future[None], error: Exception | None) -> None:
        self._urgent.pop(snapshot, None)
        if future.done():
            return
        if error is None:
            future.set_result(None)
            self._files.remove(snapshot)
        else:
            future.set_exception(error)
            future.exception()  # nobody may be waiting any more

    async def _pause(self, seen: int, seconds: float | None) -> None:
        """Until something changed after `seen`, or the time is over."""
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if seconds is None else max(seconds, 0.001)):
                    await self._changed.wait_for(lambda: self._version != seen)

    async def _notify(self) -> None:
        self._version += 1
        async with self._changed:
            self._changed.notify_all()

    # ------------------------------------------------------------------ steps

    async def _advance(self, jobs: Sequence[Job], *, whole: bool) -> tuple[list[str], bool]:
        """Put the records of jobs that are complete, then one object. Returns (snapshots that are up, whether an object
        was put)."""
        if not jobs:
            return [], False
        await self._look()
        done = [job.snapshot for job in jobs if self._places.is_up(job.snapshot)]
        # The other lane may be at the same snapshot.
        ready = [
            job
            for job in jobs
            if job.snapshot not in done and job.snapshot not in self._recording and self._complete(job)
        ][:_RECORDS_AT_ONCE]
        self._recording.update(job.snapshot for job in ready)
        results = await asyncio.gather(*map(self._record, ready), return_exceptions=True)
        for job, result in zip(ready, results, strict=True):
            if isinstance(result, BaseException):
                raise result
            if result:
                done.append(job.snapshot)
        if ready:
            return done, True
        pieces = packing.cut(self._wanted(jobs), whole=whole, least=self._least, most=self._most)
        if pieces:
            await self._put(pieces)
        return done, bool(pieces)

    def _complete(self, job: Job) -> bool:
        return all(self._places.cover(pack.id, pack.size) is not None for pack in job.packs)

    def _wanted(self, jobs: Sequence[Job]) -> list[Wanted]:
        """What is neither up nor on its way, oldest first, as far as one cut looks."""
        found: list[Wanted] = []
        seen: set[str] = set()
        total = 0
        for job in jobs:
            for pack in job.packs:
                if pack.id in seen:
                    continue
                seen.add(pack.id)
                for offset, length in self._places.gaps(pack.id, pack.size, self._flying.get(pack.id, ())):
                    found.append(Wanted(pack.id, pack.path, offset, length))
                    total += length
            if total >= self._most + self._least:
                break
        return found

    async def _put(self, pieces: Sequence[Wanted]) -> None:
        name = f"{OBJECTS}/{os.urandom(15).hex()}"
        ranges = [(piece.pack, (piece.offset, piece.length)) for piece in pieces]
        for pack, part in ranges:
            self._flying[pack].append(part)
        try:
            faults.point("upload.object")
            await self._tier.put(name, [(piece.path, piece.offset, piece.length) for piece in pieces])
            faults.point("upload.put")
            self._sure.add(name)
            self._places.add(name, packing.lay(name, pieces))
            faults.point("upload.noted")
        finally:
            for pack, part in ranges:
                self._flying[pack].remove(part)
                if not self._flying[pack]:
                    del self._flying[pack]
            await self._notify()

    async def _record(self, job: Job) -> bool:
        """Put the record of a complete job. False: an object turned out to be gone, the job is not complete any more."""
        looked = self._looked
        try:
            packs: dict[str, PackPlace] = {}
            for pack in job.packs:
                extents = self._places.cover(pack.id, pack.size)
                if extents is None:
                    return False
                packs[pack.id] = PackPlace(pack.size, extents)
            header = Header(job.snapshot, job.info, packs)
            if not await self._all_there(header.objects):
                return False
            try:
                manifest = await asyncio.to_thread(job.manifest.read_bytes)
            except OSError as error:
                raise SnapshotUnusable(
                    f"the manifest {job.manifest} cannot be read: {error.strerror}",
                    remedy="an older snapshot is used instead",
                    snapshot=job.snapshot,
                    file=str(job.manifest),
                ) from error
            data = await asyncio.to_thread(records.encode, header, manifest)
            faults.point("upload.record")
            if _now() - looked > self._grace / 2:
                return False  # it took long; the collector may have looked since
            await self._tier.put(records.name_of(job.snapshot), data)
            faults.point("upload.recorded")
            if self._on_uploaded is not None:  # before it counts as done here, so that it is told again if that fails
                await self._on_uploaded(job.snapshot, (time.monotonic() - job.since) * 1000)
            self._places.set_up(job.snapshot)
            faults.point("upload.done")
        finally:
            self._recording.discard(job.snapshot)
        return True

    # ------------------------------------------------------------------ what is sure to stay

    async def _look(self) -> None:
        """Look at `condemned/` if the last look is too long ago, and forget the objects that are named there."""
        async with self._look_lock:
            if _now() - self._looked < self._grace / 4:
                return
            began = _now()
            lists = await condemned(self._tier)
            self._sure.clear()
            for _, names in lists.values():
                for name in names:
                    self._forget_object(name)
            self._looked = began

    async def _all_there(self, objects: Collection[str]) -> bool:
        """Whether all are, asked since the last look."""
        limit = asyncio.Semaphore(_RECORDS_AT_ONCE)

        async def there(name: str) -> bool:
            try:
                async with limit:
                    await self._tier.size(name)
            except ObjectMissing:
                self._forget_object(name)
                return False
            self._sure.add(name)
            return True

        return all(await asyncio.gather(*(there(name) for name in objects if name not in self._sure)))

    def _forget_object(self, name: str) -> None:
        self._sure.discard(name)
        if self._places.forget(name):
            log.info("object %s is not in %s any more; what it held is uploaded again", name, self._tier.label)

    def _unavailable(self, snapshot: str, why: str) -> TierUnavailable:
        return TierUnavailable(
            f"snapshot {snapshot} was not uploaded to {self._tier.label}: {why}",
            remedy="it is uploaded after the next start",
            object=records.name_of(snapshot),
            tier=self._tier.label,
        )


def _unusable(job: Job) -> str | None:
    """What is wrong with the job's own files, if anything."""
    files: Mapping[Path, int] = {job.manifest: 0, **{pack.path: pack.size for pack in job.packs}}
    for path, size in files.items():
        try:
            if (found := path.stat().st_size) < size:
                return f"{path} has {found} bytes, {size} are needed"
        except OSError as error:
            return f"{path}: {error.strerror}"
    return None
