"""A guest's memory on the host: a sealed file mapped privately, and what the guest has written over it.

The file is a memfd that nobody can change any more, so clones share its pages. What a guest writes lies in anonymous
pages of its QEMU; `/proc/PID/pagemap` tells them apart (present or swapped, and not a page of the file). A guest that
was booted has no file: over holes of one, each page would be there twice.

A save copies in two steps (pre-copy): everything while the guest runs, and then, while it stands still, what it wrote
meanwhile. Where the kernel does not say what that is (see `tracking`), all that was ever written is copied then.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rethaw.engines.base import LazyFile, LazySection
from rethaw.engines.microvm import layout
from rethaw.engines.microvm.layout import PAGE
from rethaw.engines.microvm.tracking import Tracker
from rethaw.model.errors import EngineError

log = logging.getLogger("rethaw.engines")

_PRESENT, _SWAPPED, _OF_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)
_KIND, _MARKER = np.uint64(31), np.uint64(31)  # of swap; the last one stands where there is no page but its protection


_AT_ONCE = 2048  # pages, 8 MiB
_THREADS = 2

Key = tuple[int, ...]


@dataclass
class File:
    """A memory file and how many sandboxes have it. `filling`: done once the file holds what it shall, for ever. `lazy`: it
    is one whose pages come when they are touched."""

    fd: int
    size: int
    users: int = 1
    key: Key | None = None
    filling: asyncio.Future[None] | None = None
    lazy: LazyFile | None = None


class Files:
    """The memory files of an engine. Guests restored from the same section while one of them lives share its file."""

    def __init__(self, in_background: Callable[[Coroutine[Any, Any, None]], object]) -> None:
        self._known: dict[Key, File] = {}
        self._in_background = in_background

    def make(self, size: int) -> File:
        """An empty one."""
        fd = os.memfd_create("memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        return File(fd, size)

    def find(self, section: Path, size: int) -> File | None:
        """The one with the pages of `section`, for one more user."""
        found = self._known.get(_key(section))
        if found is None or found.size != size:
            return None
        found.users += 1
        return found

    async def fill(self, file: File, section: Path, pages: layout.Pages) -> None:
        """Until `file` has `pages`, which lie in `section` one after the other, and can never change again."""
        if file.filling is None:
            file.key = _key(section)
            self._known.setdefault(file.key, file)
            file.filling = asyncio.ensure_future(asyncio.to_thread(_fill, file.fd, section, pages))
        await asyncio.shield(file.filling)

    async def lazily(self, section: LazySection, size: int, pages: layout.Pages) -> File:
        """One with `pages`, which lie in `section` one after the other. Raises as `LazySection.open`."""
        table = np.full(size // PAGE, -1, dtype=np.int32)
        table[pages] = np.arange(len(pages), dtype=np.int32)
        opened = await section.open(size, table)
        try:
            fd = await asyncio.to_thread(os.open, opened.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._in_background(opened.close())
            raise EngineError(f"{opened.path} cannot be opened: {error.strerror}") from error
        return File(fd, size, lazy=opened)

    def release(self, file: File) -> None:
        """One user less."""
        file.users -= 1
        if file.users:
            return
        if file.key is not None and self._known.get(file.key) is file:
            del self._known[file.key]
        if file.lazy is not None:
            self._in_background(file.lazy.close())
        if file.filling is None or file.filling.done():
            _let_go(file)
        else:
            file.filling.add_done_callback(lambda _: _let_go(file))


def _let_go(file: File) -> None:
    if file.filling is not None and not file.filling.cancelled():
        file.filling.exception()  # whoever waited may be gone
    os.close(file.fd)


def _key(section: Path) -> Key:
    found = section.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _fill(fd: int, section: Path, pages: layout.Pages) -> None:
    part = -(-len(pages) // _THREADS)

    def some(first: int) -> None:
        layout.scatter(section, pages[first : first + part], fd, first)

    with ThreadPoolExecutor(_THREADS) as pool:  # most of the time goes into the kernel
        list(pool.map(some, range(0, len(pages), max(part, 1))))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)


def mapped(pid: int, start: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Numbers of the pages that the guest has written, and of all that it has got: also of its file."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as f:
        data = os.pread(f.fileno(), size // PAGE * 8, start // PAGE * 8)
    entries = np.frombuffer(data, dtype=np.uint64)
    if len(entries) != size // PAGE:
        raise EngineError(f"the page map of QEMU process {pid} cannot be read")
    swapped = ((entries & _SWAPPED) != 0) & ((entries & _KIND) != _MARKER)
    there = ((entries & _PRESENT) != 0) | swapped
    return np.flatnonzero(there & ((entries & _OF_FILE) == 0)), np.flatnonzero(there)


class Memory:
    """The memory of one guest on its way into snapshots: `size` bytes at `start` of the process `pid`. `file`: what
    it was mapped from, if there is one, with the pages `known`. Blocking."""

    def __init__(self, pid: int, start: int, size: int, file: File | None, known: layout.Pages) -> None:
        self._pid, self._start, self._size = pid, start, size
        self._file, self._known = file, known
        self._place = np.full(size // PAGE, -1, dtype=np.intp)  # of each page in the file, the same in every save
        self._place[known] = np.arange(len(known))
        self._order = [known]
        self._count = len(known)
        self._tracker: Tracker | None = None
        try:
            self._tracker = Tracker(pid, start, size)
        except OSError as error:
            log.info("saves of QEMU process %d copy all of its memory while it stands still: %s", pid, error)

    @property
    def tracked(self) -> bool:
        return self._tracker is not None

    def ahead(self, target: Path) -> None:
        """While the guest runs, before each save: a new file with its pages, of which some may change meanwhile."""
        pages = np.empty(0, dtype=np.intp)
        if self._tracker is not None:
            self._tracker.changed()  # before anything is read
            pages, got = mapped(self._pid, self._start, self._size)
            if self._file is not None and self._file.lazy is not None:
                self._file.lazy.touched(got)
        stale = np.zeros(self._size // PAGE, dtype=bool)
        stale[pages] = True
        same = np.flatnonzero(~stale[self._known])
        with target.open("wb", buffering=0) as f:
            if self._file is not None:
                layout.gather(self._file.fd, 0, self._known[same], same, f.fileno())
            self._copy(pages, f.fileno())

    def rest(self, target: Path) -> layout.Pages:
        """Once it stands still: what changed since `ahead`. All pages in the file, in its order."""
        tracker = self._tracker
        pages = mapped(self._pid, self._start, self._size)[0] if tracker is None else tracker.changed()
        with target.open("r+b", buffering=0) as f:
            self._copy(pages, f.fileno())
        return np.concatenate(self._order)

    def _copy(self, pages: NDArray[np.intp], target: int) -> None:
        """Pages of zeros are left out, if they always were: a third of a guest's memory was written once and is free."""
        with Path(f"/proc/{self._pid}/mem").open("rb", buffering=0) as f:
            for number, _, count in layout.runs(pages, pages):
                for first in range(number, number + count, _AT_ONCE):
                    size = min(_AT_ONCE, number + count - first) * PAGE
                    data = os.pread(f.fileno(), size, self._start + first * PAGE)
                    if len(data) != size:
                        raise EngineError("pages of a guest cannot be read to their end")
                    self._put(first, data, target)

    def _put(self, first: int, data: bytes, target: int) -> None:
        rows = np.frombuffer(data, dtype=np.uint64).reshape(-1, PAGE // 8)
        place = self._place[first : first + len(rows)]
        some = (rows[:, 0] != 0) | (place >= 0)
        perhaps = np.flatnonzero(~some)
        some[perhaps] = rows[perhaps].any(axis=1)
        new = np.flatnonzero(some & (place < 0))
        place[new] = self._count + np.arange(len(new))
        self._count += len(new)
        self._order.append((first + new).astype(np.int32))
        view, kept = memoryview(data), np.flatnonzero(some)
        for row, position, count in layout.runs(kept, place[kept]):
            layout.write(target, view[row * PAGE : (row + count) * PAGE], position * PAGE)

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.close()


def copy_disk(source: Path, target: int) -> None:
    """A sparse file into one of the same size."""
    with source.open("rb", buffering=0) as f:
        pages = layout.written(f.fileno())
        layout.gather(f.fileno(), 0, pages, pages, target)
