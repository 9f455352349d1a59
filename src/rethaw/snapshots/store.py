"""The node's snapshots: a staging area in memory, a directory on disk, and recently used raw sections in between.

    DATA/snapshots/SESSION/SNAPSHOT/NAME.sec     a section, see `codec`
    DATA/snapshots/SESSION/SNAPSHOT/manifest     JSON: the SnapshotInfo as committed, for people and for rescue
    STAGING/SNAPSHOT/NAME                        raw sections: being saved, being restored, or kept for the next restore

A snapshot appears on disk by one rename, after each file and the directory were synced and every file was read back
and checked. The database row comes after that (the saver's business), so a row always has its files.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rethaw.model import faults
from rethaw.model.errors import StorageFull
from rethaw.model.types import MIB, Section, SnapshotInfo
from rethaw.snapshots import codec


def staging_for(data_dir: Path) -> Path:
    """The memory-backed directory that belongs to `data_dir`."""
    return Path("/dev/shm") / f"rethaw-{hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:12]}"


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.iterdir())


class SnapshotStore:
    """`kept_bytes`: how much raw, already durable data staging may keep for quick restores (oldest use goes first).

    `reserve_bytes`: staging refuses a new capture when its file system has less room than this.
    """

    def __init__(self, data_dir: Path, *, kept_bytes: int = 1024 * MIB, reserve_bytes: int = 256 * MIB) -> None:
        self._data = data_dir
        self._staging = staging_for(data_dir)
        self._kept: OrderedDict[str, int] = OrderedDict()
        self._in_use: dict[str, int] = {}
        self._files: dict[str, dict[str, Path]] = {}  # staged sections of a capture, under the engine's own file names
        self._kept_bytes = kept_bytes
        self._reserve = reserve_bytes
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="snapshots")

    @property
    def staging(self) -> Path:
        return self._staging

    def open(self) -> None:
        """Make the directories; drop what an earlier process left in staging (all of it is on disk or worthless)."""
        for path in (self._data / "snapshots", self._staging):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.chmod(0o700)
        for old in self._staging.iterdir():
            shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        shutil.rmtree(self._staging, ignore_errors=True)

    def stage(self, snapshot: str) -> Path:
        """An empty staging directory for a capture. Raises StorageFull when staging has no room."""
        stat = os.statvfs(self._staging)
        free = stat.f_bavail * stat.f_frsize
        if free < self._reserve:
            self._evict(0)
            stat = os.statvfs(self._staging)
            free = stat.f_bavail * stat.f_frsize
            if free < self._reserve:
                raise StorageFull(
                    f"the staging area {self._staging} has {free // MIB} MiB left, {self._reserve // MIB} are wanted",
                    remedy="free memory or suspend sessions",
                )
        path = self._staging / snapshot
        path.mkdir(mode=0o700)
        return path

    def drop_staged(self, snapshot: str) -> None:
        """Forget staged files of `snapshot` (a failed save, or a snapshot that is not wanted any more)."""
        self._kept.pop(snapshot, None)
        self._files.pop(snapshot, None)
        shutil.rmtree(self._staging / snapshot, ignore_errors=True)

    async def write(self, session: str, snapshot: str, sections: dict[str, Path]) -> tuple[str, tuple[Section, ...]]:
        """Make staged sections durable and verified. Returns (path relative to the data directory, sections).

        Raises StorageFull, SnapshotUnusable (what was read back differs) or OSError; then nothing is left on disk.
        """
        result = await asyncio.to_thread(self._write, session, snapshot, sections)
        self._files[snapshot] = dict(sections)
        return result

    def _write(self, session: str, snapshot: str, sections: dict[str, Path]) -> tuple[str, tuple[Section, ...]]:
        home = self._data / "snapshots" / session
        final, partial = home / snapshot, home / f".{snapshot}"
        try:
            fresh = not home.exists()
            partial.mkdir(parents=True, mode=0o700)
            jobs = {
                name: self._pool.submit(codec.encode, name, raw, partial / f"{name}.sec")
                for name, raw in sorted(sections.items(), key=lambda item: -item[1].stat().st_size)[1:]
            }
            largest = max(sections.items(), key=lambda item: item[1].stat().st_size)
            done = [codec.encode(*largest, partial / f"{largest[0]}.sec"), *(job.result() for job in jobs.values())]
            faults.point("store.written")
            for section in done:
                codec.decode(section, partial / f"{section.name}.sec", None, snapshot)
            faults.point("store.verified")
            _sync_directory(partial)
            partial.rename(final)
            faults.point("store.renamed")
            _sync_directory(home)
            if fresh:
                _sync_directory(home.parent)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            if isinstance(error, OSError) and (full := codec.storage_full(error, f"snapshot {snapshot}")):
                raise full from error
            raise
        return str(final.relative_to(self._data)), tuple(sorted(done, key=lambda s: s.name))

    async def write_manifest(self, info: SnapshotInfo) -> None:
        """Put the manifest beside the sections. Not needed to restore from the database's row."""

        def write() -> None:
            path = self._data / info.path / "manifest"
            path.write_text(info.model_dump_json(indent=1))

        await asyncio.to_thread(write)

    def keep(self, snapshot: str) -> None:
        """The staged raw sections of a durable snapshot may stay for quick restores, within the budget."""
        path = self._staging / snapshot
        if path.exists():
            self._kept[snapshot] = _size(path)
            self._kept.move_to_end(snapshot)
            self._evict(self._kept_bytes)

    def _evict(self, budget: int) -> None:
        total = sum(self._kept.values())
        for snapshot in list(self._kept):
            if total <= budget:
                break
            if self._in_use.get(snapshot):
                continue
            total -= self._kept[snapshot]
            self.drop_staged(snapshot)

    async def load(self, info: SnapshotInfo) -> dict[str, Path]:
        """Raw sections of `info`, ready for an engine. Call `done` when the engine has read them.

        Raises SnapshotUnusable naming snapshot and file, or StorageFull.
        """
        self._in_use[info.id] = self._in_use.get(info.id, 0) + 1
        try:
            directory = self._staging / info.id
            if info.id in self._kept:
                self._kept.move_to_end(info.id)
                return self._files.get(info.id) or {s.name: directory / s.name for s in info.sections}
            faults.point("store.load")
            directory = self.stage(f"{info.id}.load{os.urandom(4).hex()}")
            try:
                await asyncio.gather(
                    *(
                        asyncio.to_thread(
                            codec.decode, s, self._data / info.path / f"{s.name}.sec", directory / s.name, info.id
                        )
                        for s in info.sections
                    )
                )
                target = self._staging / info.id
                if not target.exists():
                    directory.rename(target)
                    directory = target
                    self._kept[info.id] = _size(directory)
                    self._evict(self._kept_bytes)
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise
            return {s.name: directory / s.name for s in info.sections}
        except BaseException:
            self.done(info.id)
            raise

    def done(self, snapshot: str) -> None:
        """The engine has read what `load` gave."""
        left = self._in_use.get(snapshot, 0) - 1
        if left > 0:
            self._in_use[snapshot] = left
        else:
            self._in_use.pop(snapshot, None)
            for extra in self._staging.glob(f"{snapshot}.load*"):
                shutil.rmtree(extra, ignore_errors=True)

    async def verify(self, info: SnapshotInfo) -> None:
        """Read every file of `info` and check it. Raises SnapshotUnusable."""
        for section in info.sections:
            await asyncio.to_thread(
                codec.decode, section, self._data / info.path / f"{section.name}.sec", None, info.id
            )

    async def delete(self, info: SnapshotInfo) -> None:
        """Remove the files of `info`, durable and staged."""
        self.drop_staged(info.id)

        def remove() -> None:
            shutil.rmtree(self._data / info.path, ignore_errors=True)
            home = (self._data / info.path).parent
            if home.exists() and not any(home.iterdir()):
                home.rmdir()

        await asyncio.to_thread(remove)
