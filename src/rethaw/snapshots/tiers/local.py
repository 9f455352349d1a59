"""A tier that is a directory: another disk, or a network file system that many machines mount.

    ROOT/a/b/NAME       an object
    ROOT/.part/RANDOM   one that is being written; whatever a crash leaves there is removed after an hour

A put is durable when it returns: file synced, renamed, each directory on the way synced. (obstore's own local store
renames without syncing, so it is not used here.)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rethaw.model.errors import ObjectMissing, RethawError, StorageFull, TierUnavailable
from rethaw.snapshots.tiers import base
from rethaw.snapshots.tiers.base import Found, Source

_BLOCK = 4 << 20
_PARTS = ".part"
_STALE_S = 3600.0
_T = TypeVar("_T")


class LocalTier:
    """Objects as files below `root`, which is made when it is not there. Files have the mode 0600, directories 0700."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.label = f"directory {root}"

    async def put(self, name: str, data: Source) -> None:
        path = self._root / base.check_name(name)
        cancelled = threading.Event()
        try:
            await self._run(name, lambda: self._put(path, data, cancelled))
        except asyncio.CancelledError:
            cancelled.set()  # the thread goes on; it must not make the object appear any more
            raise

    async def get(self, name: str, offset: int, length: int) -> bytes:
        base.check_range(offset, length)
        path = self._root / base.check_name(name)

        def read() -> bytes:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(fd).st_size
                if offset + length > size:
                    raise base.too_short(name, self.label, size, offset, length)
                parts: list[bytes] = []
                done = 0
                while done < length:
                    part = os.pread(fd, length - done, offset + done)
                    if not part:  # cut off since fstat
                        raise base.too_short(name, self.label, offset + done, offset, length)
                    parts.append(part)
                    done += len(part)
                return b"".join(parts)
            finally:
                os.close(fd)

        return await self._run(name, read)

    async def size(self, name: str) -> int:
        path = self._root / base.check_name(name)

        def look() -> int:
            if not path.is_file():
                path.stat()  # says what is wrong, if anything but its kind is
                raise base.missing(name, self.label)
            return path.stat().st_size

        return await self._run(name, look)

    async def list(self, prefix: str) -> Sequence[Found]:
        folder = base.check_prefix(prefix)
        try:
            return await self._run(folder or "*", lambda: self._list(self._root / folder))
        except ObjectMissing:
            return []

    async def delete(self, name: str) -> None:
        path = self._root / base.check_name(name)

        def remove() -> None:
            path.unlink()
            _sync(path.parent)

        with contextlib.suppress(ObjectMissing):
            await self._run(name, remove)

    async def _run(self, name: str, work: Callable[[], _T]) -> _T:
        try:
            return await asyncio.to_thread(work)
        except RethawError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR) and self._root.is_dir():
                raise base.missing(name, self.label) from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(
                    f"no space left for object {name} in {self.label}",
                    remedy="free disk space there",
                    object=name,
                    tier=self.label,
                ) from error
            raise TierUnavailable(
                f"object {name}: {self.label} cannot be used: {error.strerror}",
                remedy="check that it is mounted, and its permissions",
                object=name,
                tier=self.label,
                reason="directory",
            ) from error

    def _put(self, path: Path, data: Source, cancelled: threading.Event) -> None:
        self._make(self._root)
        parts = self._root / _PARTS
        self._make(parts)
        _sweep(parts)
        partial = parts / os.urandom(12).hex()
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                for chunk in base.chunks(data, _BLOCK):
                    view = memoryview(chunk)
                    while view:
                        view = view[os.write(fd, view) :]
                    if cancelled.is_set():
                        raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
                os.fsync(fd)
            finally:
                os.close(fd)
            self._make(path.parent)
            if cancelled.is_set():
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync(path.parent)

    def _make(self, path: Path) -> None:
        """A directory that survives a power cut, and those above it up to the root's own parent."""
        if path.is_dir():
            return
        if path != self._root:
            self._make(path.parent)
        path.mkdir(mode=0o700, exist_ok=True, parents=path == self._root)
        _sync(path.parent)

    def _list(self, folder: Path) -> list[Found]:
        self._make(self._root)  # a new tier is an empty one
        found: list[Found] = []
        pending = [folder]
        while pending:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
                        continue
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        stat = entry.stat()
                        name = str(Path(entry.path).relative_to(self._root))
                        found.append(
                            Found(name, stat.st_size, stat.st_mtime, f"{stat.st_mtime_ns}-{stat.st_ino}-{stat.st_size}")
                        )
        return sorted(found, key=lambda f: f.name)


def _sweep(parts: Path) -> None:
    """Remove what crashes left. Young files may be another process's."""
    oldest = time.time() - _STALE_S
    for path in parts.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                path.unlink()


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
