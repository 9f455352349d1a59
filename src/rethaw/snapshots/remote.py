"""A second place for snapshots: what the disk has goes up, what the disk has lost comes back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from rethaw.model.errors import ObjectDamaged, ObjectMissing
from rethaw.model.types import SnapshotInfo
from rethaw.snapshots import records
from rethaw.snapshots.fetching import Fetcher
from rethaw.snapshots.manifest import PackRef
from rethaw.snapshots.records import Header
from rethaw.snapshots.tiers.base import Tier
from rethaw.snapshots.uploads import Job, PackFile, Uploader

log = logging.getLogger("rethaw.snapshots")


class Remote:
    """`tier` for the store. `uploader` was made for the same tier."""

    def __init__(self, tier: Tier, uploader: Uploader) -> None:
        self.uploader = uploader
        self._tier = tier
        self._fetcher = Fetcher(tier)

    async def start(self) -> None:
        await self.uploader.start()

    async def close(self) -> None:
        await self.uploader.close()
        await self._fetcher.close()

    @staticmethod
    def job(info: SnapshotInfo, manifest: Path, packs: Sequence[PackRef], path_of: Callable[[str], Path]) -> Job:
        files = tuple(PackFile(ref.id, path_of(ref.id), ref.size) for ref in packs)
        return Job(info.id, manifest, files, info.model_dump_json().encode())

    async def record(self, snapshot: str) -> records.Record | None:
        """What the tier knows of `snapshot`, None when it is not there. Raises TierUnavailable."""
        try:
            found = await records.read(self._tier, snapshot)
        except ObjectMissing:
            return None
        except ObjectDamaged as error:
            log.warning("the record of snapshot %s: %s", snapshot, error)
            return None
        self.uploader.learn(found.header)
        return found

    async def fetch(self, header: Header, wanted: Collection[str], path_of: Callable[[str], Path]) -> None:
        """Bring packs to the disk. Raises TierUnavailable, StorageFull, SnapshotUnusable."""
        for pack in wanted:
            place = header.packs.get(pack)
            if place is not None:
                with contextlib.suppress(ObjectMissing, ObjectDamaged):  # the restore names what is missing
                    await self._fetcher.fetch(pack, place, path_of(pack))
