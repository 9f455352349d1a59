"""A guest's memory on the host: a sealed file mapped privately, and what the guest has written over it.

The file is a memfd that nobody can change any more, so clones share its pages. What a guest writes lies in anonymous
pages of its QEMU; `/proc/PID/pagemap` tells them apart (present or swapped, and not a page of the file). A guest that
was booted has no file: over holes of one, each page would be there twice.

A save copies in two steps (pre-copy): everything while the guest runs, and then, while it stands still, what it wrote
meanwhile. Where the kernel does not say what that is (see `tracking`), all that was ever written is copied then.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rethaw.engines.microvm import layout
from rethaw.engines.microvm.layout import PAGE
from rethaw.engines.microvm.tracking import Tracker
from rethaw.model.errors import EngineError

log = logging.getLogger("rethaw.engines")

_PRESENT, _SWAPPED, _OF_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)
_KIND, _MARKER = np.uint64(31), np.uint64(31)  # of swap; the last one stands where there is no page but its protection


def sealed(source: Path, pages: layout.Pages, size: int) -> int:
    """A descriptor of a file of `size` bytes with `pages`, which lie in `source` one after the other, and zeros elsewhere. It
    can never change again."""
    fd = os.memfd_create("memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        layout.scatter(source, pages, fd)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def written(pid: int, start: int, size: int) -> NDArray[np.intp]:
    """Numbers of the pages that the guest has written."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as f:
        data = os.pread(f.fileno(), size // PAGE * 8, start // PAGE * 8)
    entries = np.frombuffer(data, dtype=np.uint64)
    if len(entries) != size // PAGE:
        raise EngineError(f"the page map of QEMU process {pid} cannot be read")
    swapped = ((entries & _SWAPPED) != 0) & ((entries & _KIND) != _MARKER)
    return np.flatnonzero((((entries & _PRESENT) != 0) | swapped) & ((entries & _OF_FILE) == 0))


def copy_written(pid: int, start: int, pages: NDArray[np.intp], positions: NDArray[np.intp], target: int) -> None:
    """Copy pages of a stopped guest to these positions in the file `target`."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as f:
        layout.gather(f.fileno(), start, pages, positions, target)


class Memory:
    """The memory of one guest on its way into snapshots: `size` bytes at `start` of the process `pid`. `held`: the file
    that it was mapped from, if there is one, with the pages `known`. Blocking."""

    def __init__(self, pid: int, start: int, size: int, held: int | None, known: layout.Pages) -> None:
        self._pid, self._start, self._size = pid, start, size
        self._held, self._known = held, known
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
            pages = written(self._pid, self._start, self._size)
        stale = np.zeros(self._size // PAGE, dtype=bool)
        stale[pages] = True
        same = np.flatnonzero(~stale[self._known])
        with target.open("wb", buffering=0) as f:
            if self._held is not None:
                layout.gather(self._held, 0, self._known[same], same, f.fileno())
            self._copy(pages, f.fileno())

    def rest(self, target: Path) -> layout.Pages:
        """Once it stands still: what changed since `ahead`. All pages in the file, in its order."""
        tracker = self._tracker
        pages = written(self._pid, self._start, self._size) if tracker is None else tracker.changed()
        with target.open("r+b", buffering=0) as f:
            self._copy(pages, f.fileno())
        return np.concatenate(self._order)

    def _copy(self, pages: NDArray[np.intp], target: int) -> None:
        new = pages[self._place[pages] < 0]
        self._place[new] = self._count + np.arange(len(new))
        self._count += len(new)
        self._order.append(new.astype(np.int32))
        copy_written(self._pid, self._start, pages, self._place[pages], target)

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.close()


def copy_disk(source: Path, target: int) -> None:
    """A sparse file into one of the same size."""
    with source.open("rb", buffering=0) as f:
        pages = layout.written(f.fileno())
        layout.gather(f.fileno(), 0, pages, pages, target)
