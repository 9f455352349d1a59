"""Raw sections in memory-backed storage: being saved, being restored, or kept for the next restore and comparison.

    STAGING/SNAPSHOT/NAME    a raw section, under the engine's own file name

All of it is on disk as well or worthless, so a new process begins by emptying the directory. The budget bounds the sum;
what is kept makes room for what is saved, and a capture waits a while for room before it is refused.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from rethaw.model.errors import StorageFull
from rethaw.model.types import MIB


def lazy_for(data_dir: Path) -> Path:
    """Where the file system of lazy sections is mounted, beside staging."""
    staging = staging_for(data_dir)
    return staging.with_name(f"{staging.name}-lazy")


def staging_for(data_dir: Path) -> Path:
    """The memory-backed directory that belongs to `data_dir`."""
    return Path("/dev/shm") / f"rethaw-{hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:12]}"


def storage_full(error: OSError, what: str) -> StorageFull | None:
    """`error` as StorageFull when that is what it says, else None."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"no space left for {what}", remedy="free disk space; the agent keeps running meanwhile")
    return None


def default_budget() -> int:
    """A quarter of the machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def _size(path: Path) -> int:
    return sum(f.stat().st_blocks * 512 for f in path.iterdir())


class Staging:
    """`budget`: bytes that captures, restores and what is kept may take together. `kept_bytes`: bytes of durable
    snapshots that stay for quick restores. `dropped` is told of each snapshot whose raw sections went."""

    def __init__(
        self, path: Path, *, budget: int, kept_bytes: int, wait_s: float, dropped: Callable[[str], None]
    ) -> None:
        self.path = path
        self._budget = budget
        self._kept_bytes = kept_bytes
        self._wait_s = wait_s
        self._dropped = dropped
        self._kept: OrderedDict[str, int] = OrderedDict()
        self._reserved: dict[str, int] = {}
        self._in_use: dict[str, int] = {}
        self._doomed: set[str] = set()  # dropped while in use
        self._freed = asyncio.Event()

    def open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path.chmod(0o700)
        for old in self.path.iterdir():
            shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _room(self, need: int) -> bool:
        """Whether `need` more bytes fit, after evicting what is kept."""
        self._evict(max(0, self._budget - sum(self._reserved.values()) - need))
        used = sum(self._kept.values()) + sum(self._reserved.values())
        stat = os.statvfs(self.path)
        if stat.f_bavail * stat.f_frsize < need:
            self._evict(0)
            stat = os.statvfs(self.path)
        fits = stat.f_bavail * stat.f_frsize >= need
        # One that is larger than the whole budget may still go alone.
        return fits and (used + need <= self._budget or not self._reserved)

    async def make(self, name: str, need: int) -> Path:
        """An empty directory for about `need` bytes. Raises StorageFull when there was no room for `wait_s`."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._wait_s
        while not self._room(need):
            self._freed.clear()
            left = end - loop.time()
            if left <= 0:
                raise StorageFull(
                    f"the staging area {self.path} has no room for {need // MIB} MiB "
                    f"({sum(self._reserved.values()) // MIB} of {self._budget // MIB} MiB are being saved)",
                    remedy="free memory, suspend sessions, or raise snapshots.staging_bytes",
                )
            try:
                await asyncio.wait_for(self._freed.wait(), min(left, 1.0))
            except TimeoutError:
                continue
        path = self.path / name
        path.mkdir(mode=0o700)
        self._reserved[name] = need
        return path

    def drop(self, name: str) -> None:
        """Forget what lies under `name`; if somebody reads it, once that is done."""
        if self._in_use.get(name):
            self._doomed.add(name)
        else:
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._doomed.discard(name)
        self._reserved.pop(name, None)
        self._kept.pop(name, None)
        shutil.rmtree(self.path / name, ignore_errors=True)
        self._freed.set()
        self._dropped(name)

    def keep(self, name: str) -> None:
        """What lies under `name` is durable elsewhere, and stays within the budget."""
        path = self.path / name
        self._reserved.pop(name, None)
        if path.exists():
            self._kept[name] = _size(path)
            self._kept.move_to_end(name)
            self._evict(self._kept_bytes)
        self._freed.set()

    def kept(self, name: str) -> Path | None:
        """Where the raw sections of `name` lie, if they are kept."""
        if name not in self._kept:
            return None
        if not (self.path / name).is_dir():  # somebody cleaned the memory up behind our back
            self._remove(name)
            return None
        self._kept.move_to_end(name)
        return self.path / name

    def use(self, name: str) -> None:
        """Somebody reads it: it is not evicted before `done`."""
        self._in_use[name] = self._in_use.get(name, 0) + 1

    def done(self, name: str) -> None:
        left = self._in_use.get(name, 0) - 1
        if left > 0:
            self._in_use[name] = left
        else:
            self._in_use.pop(name, None)
            if name in self._doomed:
                self._remove(name)
            self._evict(self._kept_bytes)
            self._freed.set()

    def _evict(self, budget: int) -> None:
        total = sum(self._kept.values())
        for name in list(self._kept):
            if total <= budget:
                break
            if not self._in_use.get(name):
                total -= self._kept[name]
                self._remove(name)
