"""What does the snapshot store cost? `python -m benchmarks.store --json`; needs no privileges.

A memory file of a quarter of a GiB (`--mib`), made from a seed: pages as a Python heap has them, some that do not
compress, some zeros. Everything is done in the store's own places, the data directory under `--dir` (default: /tmp) and
staging in /dev/shm, in one process on an otherwise unused store.

`save_mib_s`: `store.write` of a first snapshot, raw MiB a second, with fsync and verification. `load_mib_s`: `store.load`
of a durable snapshot that staging does not hold, from the kernel's page cache. `raw_copy_mib_s`: a plain copy of the same
raw file, from the page cache as well, into the same staging file system; the two take turns. Medians. `load_ratio`: load
over raw copy. `dedup_ratio`: raw over stored bytes of ten generations in which a hundred pages change each time.
`restore_ms_gen3`, `restore_ms_gen1000`: `store.load` of the last of 1,000 generations (`--generations`) that each change
about 100 pages: a hot set in which a few words change, a cold one that wanders slowly and changes wholly; and of the very
same memory in a store that saw only its last three generations, so that there is as much to decompress but for where it
lies. The two take turns.
`heap_*`: a heap of 1 GiB (`--heap-mib`) of which 10 MiB change in each turn, half of that a little and half wholly:
`heap_turn_stored_mib` is what a turn adds to the store, `heap_changed_compressed_mib` the changed pages alone under the
same compression, `heap_write_ms` the time of `store.write`; medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
from backports import zstd
from numpy.typing import NDArray

from rethaw.model.types import SnapshotInfo
from rethaw.snapshots.pack import FRAME_PAGES
from rethaw.snapshots.pages import PAGE
from rethaw.snapshots.staging import staging_for
from rethaw.snapshots.store import SnapshotStore

MIB = 1 << 20
MEMORY = "pages.img"
WORDS = PAGE // 8
HOT, COLD = 60, 40  # pages that change in a generation
Rows = NDArray[np.uint64]


def heap_pages(rng: np.random.Generator, count: int) -> Rows:
    """Pointers into a few arenas, small numbers, short text, gaps: zstd makes about a quarter of it, as of real heaps."""
    out = np.zeros((count, WORDS), dtype=np.uint64)
    for start in range(0, count, 4096):
        rows = out[start : start + 4096]
        arenas = rng.integers(1 << 40, 1 << 46, 8, dtype=np.uint64) << np.uint64(1)
        kind = rng.integers(0, 8, rows.shape, dtype=np.uint8)
        pointers = arenas[rng.integers(0, 8, rows.shape)] + rng.integers(
            0, 1 << 12, rows.shape, dtype=np.uint64
        ) * np.uint64(16)
        np.copyto(rows, pointers, where=kind < 3)
        np.copyto(rows, rng.integers(1, 200, rows.shape, dtype=np.uint64), where=(kind >= 3) & (kind < 6))
    return out


def memory_pages(rng: np.random.Generator, count: int) -> Rows:
    """Seven tenths heap, two tenths that do not compress, one tenth zeros, in stretches as allocators leave them."""
    rows = heap_pages(rng, count)
    stretch = 64
    for start in range(0, count, stretch):
        pick = rng.random()
        if pick < 0.2:
            rows[start : start + stretch] = rng.integers(
                0, 1 << 63, rows[start : start + stretch].shape, dtype=np.uint64
            )
        elif pick < 0.3:
            rows[start : start + stretch] = 0
    return rows


def little(rng: np.random.Generator, rows: Rows, which: NDArray[np.int64]) -> None:
    """A few words of each page: reference counts, lengths, pointers."""
    for page in which:
        at = rng.integers(0, WORDS, int(rng.integers(1, 12)))
        rows[page, at] = rng.integers(0, 1 << 47, len(at), dtype=np.uint64)


def heap_of(rows: Rows) -> NDArray[np.int64]:
    """Pages that are neither zeros nor beyond compression. Only they change, so that a late generation is as much work to
    decompress as an early one, but for where its pages lie."""
    zeros = (rows == 0).sum(axis=1)
    return np.flatnonzero((zeros > 0) & (zeros < WORDS))


def next_generation(rng: np.random.Generator, rows: Rows, heap: NDArray[np.int64], generation: int) -> None:
    hot = rng.choice(len(heap) // 100 + HOT, HOT, replace=False)
    little(rng, rows, heap[hot])
    cold = (len(heap) // 2 + generation * 7 + np.arange(COLD) * 13) % len(heap)  # wanders on by seven pages each time
    rows[heap[cold]] = heap_pages(rng, COLD)


# ---------------------------------------------------------------- the store


class Place:
    """A store in a directory of its own, as a saver uses it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = SnapshotStore(directory, kept_bytes=0)
        self.store.open()
        self.raw = staging_for(directory).with_name(f"{staging_for(directory).name}-raw")
        self.raw.mkdir(exist_ok=True)

    def close(self) -> None:
        self.store.close()
        shutil.rmtree(self.raw, ignore_errors=True)

    async def save(self, snapshot: str, rows: Rows | Path, parent: str | None) -> tuple[SnapshotInfo, float]:
        """Its row, and the milliseconds of `store.write`. The staged pages stay until `drop`."""
        need = rows.stat().st_size if isinstance(rows, Path) else rows.nbytes
        staged = await self.store.stage(snapshot, need)
        if isinstance(rows, Path):
            copy(rows, staged / MEMORY)
        else:
            rows.tofile(staged / MEMORY)
        started = time.perf_counter()
        written = await self.store.write(
            snapshot, {MEMORY: staged / MEMORY}, (MEMORY,), {"parent": parent, "image": "i"}
        )
        took = (time.perf_counter() - started) * 1000
        info = SnapshotInfo(
            id=snapshot, session="s_1", parent=parent, line=1, attempt=1, seq=1, generation="g", engine="gvisor",
            engine_build="b", cpu="c", image="i", path=written.path, digest=written.digest, sections=written.sections,
            resync="00", why="exchange", paused_ms=0, durable_ms=took, raw_bytes=written.raw_bytes,
            stored_bytes=written.stored_bytes,
        )  # fmt: skip
        return info, took

    async def load(self, info: SnapshotInfo) -> float:
        """Milliseconds of `store.load`, with nothing of it in staging before and after."""
        self.store.drop_staged(info.id)
        started = time.perf_counter()
        await self.store.load(info)
        took = (time.perf_counter() - started) * 1000
        self.store.done(info.id)
        self.store.drop_staged(info.id)
        return took


def copy(source: Path, target: Path) -> float:
    """A plain copy; its milliseconds."""
    started = time.perf_counter()
    shutil.copyfile(source, target)
    return (time.perf_counter() - started) * 1000


@contextlib.contextmanager
def place(base: Path) -> Generator[Place]:
    directory = Path(tempfile.mkdtemp(prefix="rethaw-bench-store-", dir=base))
    made = Place(directory)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(directory, ignore_errors=True)


# ---------------------------------------------------------------- questions


async def throughput(base: Path, rows: Rows, rounds: int) -> dict[str, float]:
    mib = rows.nbytes / MIB
    saves: list[float] = []
    loads: list[float] = []
    copies: list[float] = []
    with place(base) as at:
        source = at.raw / "source"
        rows.tofile(source)
        for n in range(rounds):
            info, took = await at.save(f"snap_{n}", source, None if n == 0 else "snap_none")
            saves.append(took)
            at.store.drop_staged(info.id)
        info, _ = await at.save("snap_last", source, "snap_none")
        await at.load(info)
        for _ in range(rounds):
            copies.append(copy(source, at.raw / "copy"))
            (at.raw / "copy").unlink()
            loads.append(await at.load(info))
    load, raw = mib / _p50(loads) * 1000, mib / _p50(copies) * 1000
    return {
        "save_mib_s": round(mib / _p50(saves) * 1000, 1),
        "load_mib_s": round(load, 1),
        "raw_copy_mib_s": round(raw, 1),
        "load_ratio": round(load / raw, 2),
        "first_compressed_ratio": round(info.raw_bytes / info.stored_bytes, 2),
    }


async def ages(base: Path, rows: Rows, seed: int, generations: int, rounds: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    saves: list[float] = []
    raw = stored = 0
    heap = heap_of(rows)
    with place(base) as long, place(base) as short:
        last: dict[Place, SnapshotInfo] = {}
        for generation in range(1, generations + 1):
            if generation > 1:
                next_generation(rng, rows, heap, generation)
            for at in (long, short) if generation > generations - 3 else (long,):
                parent = last.get(at)
                info, took = await at.save(f"snap_{generation:05}", rows, parent.id if parent else None)
                if at is long:
                    saves.append(took)
                if generation <= 10 and at is long:
                    raw, stored = raw + info.raw_bytes, stored + info.stored_bytes
                if parent is not None:
                    at.store.drop_staged(parent.id)
                last[at] = info
        times: dict[Place, list[float]] = {long: [], short: []}
        for turn in range(rounds + 1):
            for at, info in last.items():
                took = await at.load(info)
                if turn:  # the first one opens packs
                    times[at].append(took)
        young, old = _p50(times[short]), _p50(times[long])
    return {
        "dedup_ratio": round(raw / stored, 2),
        "generations": generations,
        "generation_write_ms": _p50(saves[1:]),
        "restore_ms_gen3": young,
        f"restore_ms_gen{generations}": old,
        "restore_ratio": round(old / young, 2),
    }


def compressed(rows: Rows) -> int:
    """Bytes of `rows` in frames as the store makes them."""
    return sum(
        len(zstd.compress(rows[n : n + FRAME_PAGES].tobytes(), level=3)) for n in range(0, len(rows), FRAME_PAGES)
    )


async def large_heap(base: Path, mib: int, seed: int, turns: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    count, changes = mib * MIB // PAGE, 10 * MIB // PAGE
    stored: list[float] = []
    alone: list[float] = []
    took: list[float] = []
    with place(base) as at:
        source = at.raw / "heap"
        heap_pages(rng, count).tofile(source)
        rows: Rows = np.memmap(source, dtype=np.uint64, mode="r+").reshape(-1, WORDS)
        parent, _ = await at.save("snap_0", source, None)
        for turn in range(1, turns + 1):
            first = int(rng.integers(0, count - changes))
            which = np.arange(first, first + changes)
            little(rng, rows, which[: changes // 2])
            rows[which[changes // 2 :]] = heap_pages(rng, changes - changes // 2)
            alone.append(compressed(rows[which]) / MIB)
            info, ms = await at.save(f"snap_{turn}", source, parent.id)
            at.store.drop_staged(parent.id)
            parent = info
            stored.append(info.stored_bytes / MIB)
            took.append(ms)
        del rows
    return {
        "heap_mib": mib,
        "heap_turn_stored_mib": round(statistics.median(stored), 2),
        "heap_changed_compressed_mib": round(statistics.median(alone), 2),
        "heap_stored_ratio": round(statistics.median(stored) / statistics.median(alone), 2),
        "heap_write_ms": _p50(took),
    }


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    rows = memory_pages(np.random.default_rng(args.seed), args.mib * MIB // PAGE)
    out: dict[str, Any] = {"raw_mib": args.mib, "load_average": round(os.getloadavg()[0], 1)}
    out |= await throughput(args.dir, rows, args.rounds)
    small = rows[: args.generation_mib * MIB // PAGE].copy()
    del rows
    out |= await ages(args.dir, small, args.seed, args.generations, args.rounds)
    if args.heap_mib:
        out |= await large_heap(args.dir, args.heap_mib, args.seed, args.rounds)
    return out


def _p50(values: list[float]) -> float:
    return round(statistics.median(values), 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--mib", type=int, default=256, help="size of the memory file")
    parser.add_argument(
        "--generation-mib", type=int, default=64, help="size of the file that lives through generations"
    )
    parser.add_argument("--generations", type=int, default=1000)
    parser.add_argument("--heap-mib", type=int, default=1024, help="size of the large heap; 0: without it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the store's disk is")
    args = parser.parse_args()
    numbers = asyncio.run(measure(args))
    if not args.json:
        for name, value in numbers.items():
            sys.stdout.write(f"{name:>28} {value}\n")
    sys.stdout.write(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
