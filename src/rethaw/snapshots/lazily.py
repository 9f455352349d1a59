"""Sections that a store gives lazily: as files whose pages are read when they are touched (see `lazy`).

DATA/snapshots/working/SESSION      pages that the session's newest life touched, see `WorkingSets`
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rethaw.model.errors import Unavailable
from rethaw.model.types import SnapshotInfo
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.lazy import LazyFile, LazyFiles, Ranges, sweep

log = logging.getLogger("rethaw.snapshots")

LAZY_FROM = 256 << 20  # bytes of a section; what is smaller is read whole sooner than by single touches
_AGAIN_S = 60.0  # until FUSE is looked for once more
_SETS = 256  # working sets that are remembered, 8 bytes for each run of pages


@dataclass
class Loaded:
    """Raw `sections`, and those in `lazy` instead. `done`: the engine has read the former."""

    sections: dict[str, Path]
    lazy: Mapping[str, Section]
    done: Callable[[], None]


@dataclass
class _Open:
    """A file and how many have it."""

    file: LazyFile
    session: str
    users: int = 0
    prefetched: bool = False
    touched: NDArray[np.int32] | None = None  # pairs of first page and count


@dataclass
class Handle:
    """One user's share of a file. `path` may be opened until `close`."""

    path: Path
    _owner: Lazily
    _open: _Open
    _closed: bool = False

    def alive(self) -> bool:
        return self._open.file.alive()

    async def prefetch(self) -> None:
        """Let what an earlier life of the session touched be read ahead. After the file was mapped."""
        await self._owner.prefetch(self._open)

    def touched(self, pages: NDArray[np.intp]) -> None:
        firsts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
        counts = np.diff(np.append(firsts, len(pages)))
        self._open.touched = np.stack([pages[firsts], counts], axis=1).astype(np.int32)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await self._owner.release(self._open)


@dataclass(frozen=True)
class Section:
    """See `engines.base.LazySection`."""

    raw_bytes: int
    _owner: Lazily
    _info: SnapshotInfo
    _name: str

    async def open(self, size: int, table: NDArray[np.int32]) -> Handle:
        return await self._owner.open(self._info, self._name, size, table)


class WorkingSets:
    """Which pages sessions touched, in order of first touch: files of pairs of 32-bit numbers, first page and count. Only
    hints, so they are not synced, and one that cannot be read is none."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def read(self, session: str) -> Ranges:
        """Blocking."""
        with contextlib.suppress(OSError, ValueError):
            pairs = np.fromfile(self._home / session, dtype="<i4").reshape(-1, 2)
            if (pairs >= 0).all():
                return [(first, count) for first, count in pairs.tolist()]
        return ()

    def write(self, session: str, ranges: NDArray[np.int32]) -> None:
        """Blocking."""
        partial = self._home / f".{session}"
        with contextlib.suppress(OSError):
            self._home.mkdir(mode=0o700, exist_ok=True)
            ranges.astype("<i4").tofile(partial)
            partial.rename(self._home / session)
            found = sorted(self._home.iterdir(), key=lambda path: path.stat().st_mtime)
            for path in found[:-_SETS]:
                path.unlink()


class Lazily:
    """`directory`: for the mount. `home`: where the packs are. Bound to one event loop from its first use on."""

    def __init__(self, directory: Path, home: Path, keys: Keyring, manifest_path: Callable[[str], Path]) -> None:
        self._directory, self._home, self._keys, self._manifest_path = directory, home, keys, manifest_path
        self._files: LazyFiles | None = None
        self._refused = 0.0  # when FUSE was refused
        self._starting = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._shared: dict[tuple[str, str, int], _Open] = {}
        self._damaged: set[str] = set()  # snapshots; a restore reads them whole, and finds what is wrong
        self._working = WorkingSets(home.parent / "working")

    def sweep(self) -> None:
        """Remove what an earlier process left. Blocking."""
        if self._directory.exists():
            with contextlib.suppress(OSError):
                sweep(self._directory)
                self._directory.rmdir()

    async def ready(self, snapshot: str) -> bool:
        """Whether sections of `snapshot` can be given lazily."""
        if snapshot in self._damaged:
            return False
        async with self._starting:
            if self._files is None and time.monotonic() - self._refused > _AGAIN_S:
                try:
                    self._files = await LazyFiles.start(
                        self._directory,
                        self._home,
                        self._keys,
                        damaged=lambda file, _: self._damaged.add(file.snapshot),
                    )
                except Unavailable as error:
                    log.warning("snapshots are read whole: %s", error)
                    self._refused = time.monotonic()
        return self._files is not None

    def section(self, info: SnapshotInfo, name: str, raw_bytes: int) -> Section:
        return Section(raw_bytes, self, info, name)

    async def open(self, info: SnapshotInfo, name: str, size: int, table: NDArray[np.int32]) -> Handle:
        """Raises SnapshotUnusable, KeyMissing, Unavailable."""
        if self._files is None:
            raise Unavailable("no server of lazy files runs", remedy="it is tried again")
        key = (info.id, name, size)
        async with self._opening:  # or restores at the same moment would not share
            found = self._shared.get(key)
            if found is None or not found.file.alive():
                manifest = self._manifest_path(info.id)
                file = await self._files.open(info.id, manifest, name, size, table, info.digest)
                found = self._shared[key] = _Open(file, info.session)
            found.users += 1
        return Handle(found.file.path, self, found)

    async def prefetch(self, opened: _Open) -> None:
        ranges = await asyncio.to_thread(self._working.read, opened.session)
        if ranges and self._files is not None:
            opened.prefetched = True
            with contextlib.suppress(OSError):
                await self._files.prefetch(opened.file, ranges)

    async def release(self, opened: _Open) -> None:
        """One user less; with the last one the file goes, and what was touched of it is remembered: as its users say, or what
        the kernel read, unless that was asked for in advance."""
        opened.users -= 1
        if opened.users:
            return
        for key, found in list(self._shared.items()):
            if found is opened:
                del self._shared[key]
        with contextlib.suppress(Unavailable):
            if opened.touched is not None:
                await asyncio.to_thread(self._working.write, opened.session, opened.touched)
            elif not opened.prefetched:
                touched = await opened.file.touched()
                await asyncio.to_thread(self._working.write, opened.session, np.array(touched, dtype=np.int32))
        await opened.file.close()

    async def close(self) -> None:
        """No process and no mount stays."""
        async with self._starting:
            self._refused = float("inf")
            files, self._files = self._files, None
            if files is not None:
                await files.close()
