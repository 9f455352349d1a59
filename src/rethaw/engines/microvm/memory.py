"""A guest's memory on the host: a sealed file mapped privately, and what the guest has written over it.

The file is a memfd that nobody can change any more, so clones share its pages. What a guest writes lies in anonymous
pages of its QEMU; `/proc/PID/pagemap` tells them apart (present or swapped, and not a page of the file). A guest that
was booted has no file: over holes of one, each page would be there twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rethaw.model.errors import EngineError

PAGE = 4096
_PRESENT, _SWAPPED, _OF_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)
_AT_ONCE = 1 << 20  # bytes that are copied by one call
_COPY = 8 << 20


def sealed(source: Path, size: int) -> int:
    """A descriptor of a file of `size` bytes with what is in `source`, which can never change again."""
    fd = os.memfd_create("memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        copy_data(source, fd)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def copy_data(source: Path | int, target: int) -> int:
    """Copy what is not a hole in `source` into a file that has its full size and holds zeros; the bytes copied."""
    copied = 0
    with contextlib.ExitStack() as stack:
        if isinstance(source, Path):
            source = stack.enter_context(source.open("rb", buffering=0)).fileno()
        at, end = 0, os.fstat(source).st_size
        while at < end:
            try:
                at = os.lseek(source, at, os.SEEK_DATA)
            except OSError:
                break
            stop = os.lseek(source, at, os.SEEK_HOLE)
            while at < stop:
                data = os.pread(source, min(_COPY, stop - at), at)
                if not data:
                    break
                _write(target, data, at)
                at += len(data)
                copied += len(data)
    return copied


def _write(target: int, data: bytes, at: int) -> None:
    """All of it: a file system that is nearly full takes a part and says so only at the next call."""
    view = memoryview(data)
    while view:
        done = os.pwrite(target, view, at)
        view, at = view[done:], at + done


def written(pid: int, start: int, size: int) -> NDArray[np.intp]:
    """Numbers of the pages that the guest has written."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as f:
        data = os.pread(f.fileno(), size // PAGE * 8, start // PAGE * 8)
    entries = np.frombuffer(data, dtype=np.uint64)
    if len(entries) != size // PAGE:
        raise EngineError(f"the page map of QEMU process {pid} cannot be read")
    return np.flatnonzero(((entries & (_PRESENT | _SWAPPED)) != 0) & ((entries & _OF_FILE) == 0))


def copy_pages(pid: int, start: int, pages: NDArray[np.intp], target: int) -> None:
    """Copy pages of a stopped guest to their places in the file `target`."""
    if not len(pages):
        return
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    firsts = pages[np.concatenate([[0], breaks])].tolist()
    counts = np.diff(np.concatenate([[0], breaks, [len(pages)]])).tolist()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as f:
        source = f.fileno()
        for first, count in zip(firsts, counts, strict=True):
            at, end = first * PAGE, (first + count) * PAGE
            while at < end:
                data = os.pread(source, min(_AT_ONCE, end - at), start + at)
                if not data:
                    raise EngineError(f"the memory of QEMU process {pid} cannot be read")
                _write(target, data, at)
                at += len(data)
