"""Files of snapshots that the disk has lost, or has damaged, come back from the second place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from rethaw.model.errors import SnapshotUnusable
from rethaw.snapshots import manifest
from rethaw.snapshots.books import Books
from rethaw.snapshots.decode import Packs
from rethaw.snapshots.files import write_synced
from rethaw.snapshots.pack import Damaged
from rethaw.snapshots.remote import Remote

T = TypeVar("T")
log = logging.getLogger("rethaw.snapshots")


def unusable(snapshot: str, what: str, file: str) -> SnapshotUnusable:
    return SnapshotUnusable(
        f"snapshot {snapshot}: {what}", remedy="its parent is used instead", snapshot=snapshot, file=file
    )


async def healed(read: Callable[[], Awaitable[T]], bring: Callable[[str], Awaitable[bool]]) -> T:
    """What `read` gives. When it names a file that is missing or damaged here, and `bring` has got it from the second
    place, it is tried again. Raises SnapshotUnusable."""
    brought: set[str] = set()  # one file is named at a time
    while True:
        try:
            return await read()
        except SnapshotUnusable as error:
            file = str(error.details.get("file", ""))
            if file in brought or not await bring(file):
                raise
            brought.add(file)
            log.warning("%s; fetched again from the object store", error.message)


class Healer:
    """For the files of one store: `manifest_path` and `pack_path` say where they are."""

    def __init__(
        self, packs: Packs, books: Books, manifest_path: Callable[[str], Path], pack_path: Callable[[str], Path]
    ) -> None:
        self._packs, self._books = packs, books
        self._manifest_path, self._pack_path = manifest_path, pack_path

    async def bring(self, remote: Remote | None, snapshot: str, damaged: str) -> bool:
        """Fetch what `snapshot` lacks here. `damaged`: the file that is of no use. False: the second place has nothing."""
        record = None if remote is None else await remote.record(snapshot)
        if remote is None or record is None:
            return False
        path = self._manifest_path(snapshot)
        if not path.exists() or damaged == path.name:
            partial = path.with_name(f".{path.name}")
            await asyncio.to_thread(write_synced, partial, record.manifest)
            partial.rename(path)
        try:
            packs = manifest.decode_head(record.manifest, snapshot)[0].packs
        except Damaged as error:
            raise unusable(snapshot, f"its copy in the object store {error}", path.name) from error
        if damaged.endswith(".pack"):
            ident = damaged.removesuffix(".pack")
            self._packs.forget(ident)
            self._pack_path(ident).unlink(missing_ok=True)
        missing = [ref.id for ref in packs if not self._pack_path(ref.id).exists()]
        await remote.fetch(record.header, missing, self._pack_path)
        self._books.add(snapshot, packs)
        return True
