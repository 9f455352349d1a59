"""What does a lazy restore cost a guest? `python -m benchmarks.lazy --json`, as root; needs QEMU and FUSE (libfuse3-3).

A microVM of 1 GiB (`--mib`) runs a program with a heap of 600 MiB (`--heap-mib`) that compresses to about half. It is saved
and stored. Then it is restored again and again, and touches 50 MB of its heap (`--touched-mb`), in runs of 16 pages at places that
differ each time. Milliseconds from the wish to restore it, with a machine created ahead, to its answer, medians over `--rounds`; the ways take turns:

`raw_ms_p50`: its memory lies in memory as it is, in the file of another clone. `lazy_ms_p50`: pages come from the store's
packs when they are touched, and what the session touched in its last life is asked for in advance: the same heap pages, as
an agent goes on with what it worked on. `cold_ms_p50`: lazy, with nothing known about the session. `eager_ms_p50`: all of
it is read from the packs, then laid out in memory. `lazy_over_raw`, `cold_over_raw`: by raw. Packs are in the kernel's page
cache in all of them. `boot_ms`: of the guest once, to its program's first word, without making the heap.
`python -m benchmarks.lazy_pages` has the pages alone, without a guest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.pause import tell

from rethaw.engines.base import Capture, SandboxSpec
from rethaw.engines.microvm.engine import QemuEngine
from rethaw.engines.microvm.sandbox import QemuSandbox
from rethaw.images.builder import ImageStore
from rethaw.model.image_types import ImageSpec
from rethaw.model.types import SnapshotInfo
from rethaw.snapshots.store import SnapshotStore
from rethaw.testing.server import image_cache

MIB = 1 << 20
RUN = 16  # pages
RUN_BYTES = RUN * 4096
PROGRAM = """
import random, sys
RUN = 65536
def fill(mib):
    block = random.Random(1).randbytes(1 << 19).hex().encode()
    heap = bytearray(mib << 20)
    for at in range(0, len(heap), 1 << 20):
        shift = at >> 20
        heap[at:at + (1 << 20)] = block[shift:] + block[:shift]
    for at in range(0, len(heap), 4096):
        heap[at:at + 4] = at.to_bytes(4, "little")
    return heap
print("ready", flush=True)
heap = fill(int(sys.stdin.readline()))
print("filled", flush=True)
for line in sys.stdin:
    total = 0
    for run in line.split():
        at = int(run) * RUN
        total += sum(heap[at + 1:at + RUN:4096])
    print(total, flush=True)
"""


def _now_ms() -> float:
    return time.perf_counter() * 1000


class Bench:
    def __init__(self, work: Path, data: Path, rootfs: Path, args: argparse.Namespace) -> None:
        argv = ("/usr/bin/python3", "-c", PROGRAM)
        # What the guest's kernel gets beside it, see the engine.
        program = (args.mib - 64) * 16 // 17 * MIB
        self.spec = SandboxSpec("bench", rootfs, program, 512, argv, (("PATH", "/usr/bin"),))
        self.engine = QemuEngine(work / "data", image_cache() / "microvm")
        self.work, self.data, self.args = work, data, args
        self.store = SnapshotStore(data, kept_bytes=0, lazy_from=1)
        self.store.open()
        self.rng = np.random.default_rng(args.seed)

    async def save(self) -> float:
        """Milliseconds of the boot."""
        began = _now_ms()
        box = await self.engine.boot(self.spec)
        await self._hear(box, b"ready\n")
        booted = _now_ms() - began
        box.writer.write(b"%d\n" % self.args.heap_mib)
        await self._hear(box, b"filled\n")
        staged = await self.store.stage("snap_lazy", self.args.mib * MIB)
        saved = await box.capture(staged)
        await box.destroy()
        sections = {name: staged / name for name in saved.sections}
        written = await self.store.write("snap_lazy", sections, saved.paged, {"parent": None, "image": "i"})
        self.saved, self.raw_bytes = saved, written.raw_bytes
        self.info = SnapshotInfo(
            id="snap_lazy", session="s_1", parent=None, line=1, attempt=1, seq=1, generation="g", engine="qemu",
            engine_build=saved.engine_build, cpu=saved.cpu, image="i", path=written.path, digest=written.digest,
            sections=written.sections, resync="00", why="exchange", paused_ms=0, durable_ms=0,
            raw_bytes=written.raw_bytes, stored_bytes=written.stored_bytes,
        )  # fmt: skip
        self.store.drop_staged("snap_lazy")
        return booted

    async def _hear(self, box: QemuSandbox, expected: bytes) -> None:
        said = await asyncio.wait_for(box.reader.readline(), 600)
        if said != expected:
            raise RuntimeError(f"the guest said {said!r}, not {expected!r}")

    def places(self) -> list[int]:
        runs = self.args.heap_mib * MIB // RUN_BYTES
        return self.rng.permutation(runs)[: int(self.args.touched_mb * 1e6) // RUN_BYTES].tolist()

    async def _ready(self) -> None:
        """A machine is created ahead, as it is for a session that sleeps."""
        await self.engine.prepare(self.spec, 1)
        deadline = time.monotonic() + 60
        while not self.engine.ahead(self.spec):
            if time.monotonic() > deadline:
                raise RuntimeError("no machine was created ahead")
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # what the last life left is cleared away

    async def _touch(self, box: QemuSandbox, places: list[int]) -> bytes:
        box.writer.write(" ".join(map(str, places)).encode() + b"\n")
        return await asyncio.wait_for(box.reader.readline(), 600)

    async def _restored(self, sections: dict[str, Path], saved: Capture, lazy: Any = None) -> QemuSandbox:
        more = {} if lazy is None else {"lazy": lazy}
        return await self.engine.restore(
            self.spec, sections, build=saved.engine_build, cpu=saved.cpu, clock=saved.clock, **more
        )

    async def lazy(self, places: list[int], forget: bool = False) -> tuple[float, bytes]:
        await self._ready()
        if forget:
            (self.data / "snapshots" / "working" / self.info.session).unlink(missing_ok=True)
        began = _now_ms()
        loaded = await self.store.load_lazily(self.info, self.engine.lazy)
        if not loaded.lazy:
            raise RuntimeError("it was not read lazily")
        box = await self._restored(loaded.sections, self.saved, loaded.lazy)
        loaded.done()
        said = await self._touch(box, places)
        took = _now_ms() - began
        await self._end(box)
        return took, said

    async def eager(self, places: list[int]) -> tuple[float, bytes]:
        self.store.drop_staged(self.info.id)
        await self._ready()
        began = _now_ms()
        box = await self._restored(await self.store.load(self.info), self.saved)
        said = await self._touch(box, places)
        took = _now_ms() - began
        self.store.done(self.info.id)
        self.store.drop_staged(self.info.id)
        await self._end(box)
        return took, said

    async def raw(self, sections: dict[str, Path], places: list[int]) -> tuple[float, bytes]:
        await self._ready()
        began = _now_ms()
        box = await self._restored(sections, self.saved)
        said = await self._touch(box, places)
        took = _now_ms() - began
        await self._end(box)
        return took, said

    async def _end(self, box: QemuSandbox) -> None:
        await box.destroy()
        await box.cleaned()

    async def measure(self, rounds: int) -> dict[str, Any]:
        booted = await self.save()
        times: dict[str, list[float]] = {name: [] for name in ("raw", "lazy", "cold", "eager")}
        for number in range(rounds + 1):  # the first one opens packs and makes what restores share
            places = self.places()
            eager, first = await self.eager(places)
            cold, second = await self.lazy(places, forget=True)
            lazy, third = await self.lazy(places)
            sections = await self.store.load(self.info)
            other = await self._restored(sections, self.saved)  # whose memory file is shared
            raw, fourth = await self.raw(sections, places)
            await self._end(other)
            self.store.done(self.info.id)
            if not first == second == third == fourth:
                raise RuntimeError("the ways do not read the same")
            if number:
                for name, took in zip(times, (raw, lazy, cold, eager), strict=True):
                    times[name].append(took)
        out: dict[str, Any] = {f"{name}_ms_p50": round(statistics.median(some), 1) for name, some in times.items()}
        out["lazy_over_raw"] = round(out["lazy_ms_p50"] / out["raw_ms_p50"], 2)
        out["cold_over_raw"] = round(out["cold_ms_p50"] / out["raw_ms_p50"], 2)
        return {**out, "raw_mib": self.raw_bytes // MIB, "boot_ms": round(booted)}

    async def close(self) -> None:
        await self.engine.close()
        await self.store.close_lazy()
        self.store.close()


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    os.environ.setdefault("RETHAW_IMAGES", str(image_cache()))
    images = ImageStore(image_cache())
    _, rootfs = await images.compose(await images.ensure(ImageSpec(), tell))
    work = Path(tempfile.mkdtemp(prefix="rethaw-bench-", dir="/dev/shm"))
    data = Path(tempfile.mkdtemp(prefix="rethaw-bench-lazy-", dir=args.dir))
    bench = Bench(work, data, rootfs, args)
    out: dict[str, Any] = {"memory_mib": args.mib, "heap_mib": args.heap_mib, "touched_mb": args.touched_mb}
    try:
        return {**out, **await bench.measure(args.rounds), "load_average": round(os.getloadavg()[0], 1)}
    finally:
        await bench.close()
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(data, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lazy", description=__doc__)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--mib", type=int, default=1024, help="memory of the guest")
    parser.add_argument("--heap-mib", type=int, default=600, help="heap of its program")
    parser.add_argument("--touched-mb", type=float, default=50.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the store's disk is")
    args = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("needs root")
    if args.heap_mib + 128 > args.mib or args.touched_mb * 1e6 > args.heap_mib * MIB:
        parser.error(f"--heap-mib {args.heap_mib} does not fit in --mib {args.mib}, or --touched-mb not in it")
    numbers = asyncio.run(measure(args))
    if not args.json:
        for name, value in numbers.items():
            sys.stdout.write(f"{name:>20} {value}\n")
    sys.stdout.write(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
