"""What of a guest's memory and disk a snapshot has: the pages that were ever written, one after the other, and a map.

`memory.img` and `disk.img` hold pages without holes, so a disk of 8 GiB with 20 MiB on it is a file of 20 MiB. `pages.map`
says where they belong: magic, bytes of memory, bytes of disk, two counts, then the page numbers of each file in the
order of the file, as 32-bit numbers. All little-endian. A page that is in neither list is of zeros.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rethaw.model.errors import EngineError

PAGE = 4096
_HEAD = struct.Struct("<8sQQII")
_MAGIC = b"RTPAGES1"
_MOST = 1 << 30  # pages: 4 TiB
_COPY = 8 << 20  # bytes at once

Pages = NDArray[np.int32]
NONE: Pages = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class Layout:
    """`memory`, `disk`: page numbers in the order of the files; `memory_bytes`, `disk_bytes`: of the whole."""

    memory_bytes: int
    disk_bytes: int
    memory: Pages
    disk: Pages

    def encode(self) -> bytes:
        head = _HEAD.pack(_MAGIC, self.memory_bytes, self.disk_bytes, len(self.memory), len(self.disk))
        return head + self.memory.astype("<i4").tobytes() + self.disk.astype("<i4").tobytes()


def read(path: Path, memory: int, disk: int) -> Layout:
    """The map at `path` of files of so many bytes. Raises EngineError when it does not fit them."""
    try:
        data = path.read_bytes()
        magic, memory_bytes, disk_bytes, in_memory, on_disk = _HEAD.unpack_from(data)
        if magic != _MAGIC or len(data) != _HEAD.size + 4 * (in_memory + on_disk):
            raise ValueError("it is no map of pages")
        numbers = np.frombuffer(data, dtype="<i4", offset=_HEAD.size).astype(np.int32)
        out = Layout(memory_bytes, disk_bytes, numbers[:in_memory], numbers[in_memory:])
        for name, numbers, whole, size in (
            ("memory.img", out.memory, memory_bytes, memory),
            ("disk.img", out.disk, disk_bytes, disk),
        ):
            if whole % PAGE or whole // PAGE > _MOST or size != len(numbers) * PAGE:
                raise ValueError(f"{name} has {size} bytes, {len(numbers) * PAGE} were written")
            seen = np.bincount(numbers, minlength=1) if len(numbers) and int(numbers.min()) >= 0 else NONE
            if len(numbers) and (not len(seen) or int(numbers.max()) >= whole // PAGE or int(seen.max()) > 1):
                raise ValueError(f"it names pages of {name} that cannot be")
    except (OSError, ValueError, struct.error) as error:
        raise EngineError(f"section {path.name} cannot be used: {error}", remedy="restore an older snapshot") from None
    return out


def runs(numbers: NDArray[np.integer], positions: NDArray[np.integer]) -> Generator[tuple[int, int, int]]:
    """(first number, first position, pages) of what follows each other on both sides."""
    if not len(numbers):
        return
    breaks = np.flatnonzero((np.diff(numbers) != 1) | (np.diff(positions) != 1)) + 1
    starts = np.concatenate([[0], breaks])
    counts = np.diff(np.concatenate([starts, [len(numbers)]]))
    yield from zip(numbers[starts].tolist(), positions[starts].tolist(), counts.tolist(), strict=True)


def gather(source: int, offset: int, numbers: NDArray[np.integer], positions: NDArray[np.integer], target: int) -> None:
    """Copy the pages `numbers` of the file `source`, whose page 0 lies at `offset`, to `positions` of the file `target`."""
    for number, position, count in runs(numbers, positions):
        _copy(source, offset + number * PAGE, target, position * PAGE, count * PAGE)


def scatter(source: Path, numbers: Pages, target: int, first: int = 0) -> None:
    """The way back: the file `source`, from its page `first` on, page by page to where `numbers` says, in a file of zeros
    that has its full size."""
    with source.open("rb", buffering=0) as f:
        for number, position, count in runs(numbers, first + np.arange(len(numbers), dtype=np.int64)):
            _copy(f.fileno(), position * PAGE, target, number * PAGE, count * PAGE)


def _copy(source: int, begin: int, target: int, to: int, size: int) -> None:
    while size:
        data = os.pread(source, min(size, _COPY), begin)
        if not data:
            raise EngineError("pages of a guest cannot be read to their end")
        write(target, data, to)
        begin, to, size = begin + len(data), to + len(data), size - len(data)


def write(target: int, data: bytes | memoryview, at: int) -> None:
    """All of it: a file system that is nearly full takes a part and says so only at the next call."""
    view = memoryview(data)
    while view:
        done = os.pwrite(target, view, at)
        view, at = view[done:], at + done


def written(fd: int) -> Pages:
    """Numbers of the pages of a sparse file that are not in a hole."""
    found: list[Pages] = []
    for begin, end in extents(fd):
        found.append(np.arange(begin // PAGE, -(-end // PAGE), dtype=np.int32))
    return np.unique(np.concatenate(found)) if found else NONE


def extents(fd: int) -> Generator[tuple[int, int]]:
    at, end = 0, os.fstat(fd).st_size
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return
        stop = os.lseek(fd, at, os.SEEK_HOLE)
        yield at, stop
        at = stop
