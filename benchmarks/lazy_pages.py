"""What do pages cost that are read when they are touched? `python -m benchmarks.lazy_pages --json`; needs root and FUSE (libfuse3-3).

A guest's memory of 1 GiB (`--mib`), made from a seed: half of it zeros, in stretches, the rest as a Python heap has it.
It is saved in one snapshot. Then a process gets it, maps it privately and touches 50 MB of it (`--touched-mb`): runs of 16
pages at random places that are not zeros, in random order. Three ways take turns, medians over `--rounds`:

`lazy_ms_p50`: a new file of the FUSE server, of which the kernel holds nothing. `eager_ms_p50`: all pages read from the
packs into /dev/shm, then scattered into a memfd, as an eager restore does. `raw_ms_p50`: the whole memory lies in /dev/shm
already. `lazy_over_raw`: lazy over raw. `read_over_touched`: bytes that the server decompressed over
bytes touched. `prefetch_ms_p50`: lazy, after the pages of an earlier round were asked for in advance, with the asking.
`open_ms_p50`: the part of lazy before the first page is touched. Packs are in the kernel's page cache in all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.store import heap_pages
from numpy.typing import NDArray

from rethaw.engines.microvm import layout
from rethaw.snapshots import decode, manifest
from rethaw.snapshots.lazy import READ_AHEAD_KIB, LazyFile, LazyFiles
from rethaw.snapshots.pages import PAGE
from rethaw.snapshots.store import SnapshotStore

MIB = 1 << 20
MEMORY = "memory.img"
STRETCH, RUN = 64, 16  # pages
SNAPSHOT = "snap_lazy"
Ints = NDArray[np.int32]


def _now_ms() -> float:
    return time.perf_counter() * 1000


def touch(fd: int, size: int, offsets: NDArray[np.int64]) -> int:
    """Map it and read a word of each page at `offsets`."""
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        words = np.frombuffer(mapped, dtype=np.uint64)
        total = int(np.bitwise_xor.reduce(words[offsets // 8]))
        del words
    return total


class Bench:
    def __init__(self, base: Path, args: argparse.Namespace) -> None:
        self.base, self.shm = base, Path(tempfile.mkdtemp(prefix="rethaw-bench-lazy-", dir="/dev/shm"))
        self.size = args.mib * MIB
        self.rng = np.random.default_rng(args.seed)
        stretches = self.size // PAGE // STRETCH
        used = np.sort(self.rng.permutation(stretches)[: stretches // 2])
        self.numbers = (used[:, None] * STRETCH + np.arange(STRETCH)).reshape(-1).astype(np.int32)
        self.table: Ints = np.full(self.size // PAGE, -1, dtype=np.int32)
        self.table[self.numbers] = np.arange(len(self.numbers), dtype=np.int32)
        self.runs = int(args.touched_mb * 1e6) // (RUN * PAGE)
        self.store = SnapshotStore(base, kept_bytes=0)
        self.store.open()
        self.pool = ThreadPoolExecutor(4)
        self.whole = self.shm / "whole"

    async def save(self) -> None:
        staged = await self.store.stage(SNAPSHOT, len(self.numbers) * PAGE)
        with (staged / MEMORY).open("wb") as f:
            for start in range(0, len(self.numbers), 8192):
                heap_pages(self.rng, min(8192, len(self.numbers) - start)).tofile(f)
        with self.whole.open("wb+", buffering=0) as f:
            f.truncate(self.size)
            layout.scatter(staged / MEMORY, self.numbers, f.fileno())
        meta: dict[str, Any] = {"parent": None, "image": "i"}
        self.digest = (await self.store.write(SNAPSHOT, {MEMORY: staged / MEMORY}, (MEMORY,), meta)).digest
        self.store.drop_staged(SNAPSHOT)

    def places(self) -> NDArray[np.int64]:
        """Offsets of the pages that one round touches."""
        some = self.rng.permutation(len(self.numbers) // RUN)[: self.runs]
        pages = self.numbers.reshape(-1, RUN)[some].astype(np.int64)
        return (pages * PAGE).reshape(-1)

    async def lazy(self, files: LazyFiles, offsets: NDArray[np.int64], prefetch: list[Any] | None = None) -> Any:
        """Milliseconds until it is open and in all, the sum, and the file."""
        began = _now_ms()
        path = self.store.manifest_path(SNAPSHOT)
        file = await files.open(SNAPSHOT, path, MEMORY, self.size, self.table, self.digest)
        opened = _now_ms()
        asking = None if prefetch is None else asyncio.create_task(files.prefetch(file, prefetch))
        total = await asyncio.to_thread(self._touched, file, offsets)
        took = _now_ms() - began
        if asking is not None:
            await asking
        return opened - began, took, total, file

    def _touched(self, file: LazyFile, offsets: NDArray[np.int64]) -> int:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return touch(fd, self.size, offsets)
        finally:
            os.close(fd)

    def eager(self, offsets: NDArray[np.int64]) -> tuple[float, int]:
        began = _now_ms()
        found = manifest.decode(self.store.manifest_path(SNAPSHOT).read_bytes(), SNAPSHOT, self.store.keys)
        section = self.shm / MEMORY
        decode.load(found, {MEMORY: section}, self.store.packs, self.pool)
        fd = os.memfd_create("memory", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self.size)
            layout.scatter(section, self.numbers, fd)
            total = touch(fd, self.size, offsets)
            return _now_ms() - began, total
        finally:
            os.close(fd)
            section.unlink()

    def raw(self, offsets: NDArray[np.int64]) -> tuple[float, int]:
        began = _now_ms()
        fd = os.open(self.whole, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return touch(fd, self.size, offsets), _now_ms() - began
        finally:
            os.close(fd)

    async def measure(self, rounds: int, read_ahead: int) -> dict[str, Any]:
        times: dict[str, list[float]] = {name: [] for name in ("lazy", "open", "prefetch", "eager", "raw")}
        read: list[float] = []
        files = await LazyFiles.start(self.shm / "files", self.base / "snapshots" / "store", read_ahead_kib=read_ahead)
        try:
            for number in range(
                rounds + 1
            ):  # the first one warms up what a node has warm: indexes, page cache of packs
                offsets = self.places()
                before = (await files.stats())["raw"]
                opened, lazy, first, file = await self.lazy(files, offsets)
                ratio = ((await files.stats())["raw"] - before) / (len(offsets) * PAGE)
                recorded = await file.touched()
                await file.close()
                _, prefetched, second, file = await self.lazy(files, offsets, recorded)
                await file.close()
                eager, third = await asyncio.to_thread(self.eager, offsets)
                fourth, raw = await asyncio.to_thread(self.raw, offsets)
                if not first == second == third == fourth:
                    raise RuntimeError("the ways do not read the same")
                if number:
                    read.append(ratio)
                    for name, took in zip(times, (lazy, opened, prefetched, eager, raw), strict=True):
                        times[name].append(took)
        finally:
            await files.close()
        out: dict[str, Any] = {f"{name}_ms_p50": round(statistics.median(some), 1) for name, some in times.items()}
        out["lazy_over_raw"] = round(out["lazy_ms_p50"] / max(out["raw_ms_p50"], 0.1), 2)
        out["read_over_touched"] = round(statistics.median(read), 2)
        return out

    def close(self) -> None:
        self.pool.shutdown()
        self.store.close()
        shutil.rmtree(self.shm, ignore_errors=True)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    base = Path(tempfile.mkdtemp(prefix="rethaw-bench-lazy-", dir=args.dir))
    bench = Bench(base, args)
    out: dict[str, Any] = {"memory_mib": args.mib, "touched_mb": args.touched_mb, "read_ahead_kib": args.read_ahead}
    try:
        await bench.save()
        return {
            **out,
            **await bench.measure(args.rounds, args.read_ahead),
            "load_average": round(os.getloadavg()[0], 1),
        }
    finally:
        bench.close()
        shutil.rmtree(base, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lazy_pages", description=__doc__)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--mib", type=int, default=1024, help="memory of the guest")
    parser.add_argument("--touched-mb", type=float, default=50.0)
    parser.add_argument("--read-ahead", type=int, default=READ_AHEAD_KIB, help="KiB around a page that is touched")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the store's disk is")
    args = parser.parse_args()
    numbers = asyncio.run(measure(args))
    if not args.json:
        for name, value in numbers.items():
            sys.stdout.write(f"{name:>20} {value}\n")
    sys.stdout.write(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
