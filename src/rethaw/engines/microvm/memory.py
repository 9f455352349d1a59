"""A guest's memory on the host: a sealed file mapped privately, and what the guest has written over it.

The file is a memfd that nobody can change any more, so clones share its pages. What a guest writes lies in anonymous
pages of its QEMU; `/proc/PID/pagemap` tells them apart (present or swapped, and not a page of the file). A guest that
was booted has no file: over holes of one, each page would be there twice.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rethaw.engines.microvm import layout
from rethaw.engines.microvm.layout import PAGE
from rethaw.model.errors import EngineError

_PRESENT, _SWAPPED, _OF_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)


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
    return np.flatnonzero(((entries & (_PRESENT | _SWAPPED)) != 0) & ((entries & _OF_FILE) == 0))


def copy_written(pid: int, start: int, pages: NDArray[np.intp], positions: NDArray[np.intp], target: int) -> None:
    """Copy pages of a stopped guest to these positions in the file `target`."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as f:
        layout.gather(f.fileno(), start, pages, positions, target)


def copy_disk(source: Path, target: int) -> None:
    """A sparse file into one of the same size."""
    with source.open("rb", buffering=0) as f:
        pages = layout.written(f.fileno())
        layout.gather(f.fileno(), 0, pages, pages, target)
