"""Does a microVM's pause grow with what changed or with the guest's size? `python -m benchmarks.pause --json`, as root.

Guests of several sizes (`--sizes`, MiB) run a program with a heap of 24 MiB, by the engine alone. Each is saved again and
again: the program writes so many MB (`--changed`), all that was ever written is copied ahead (`precopy`), the program
writes them once more, and the guest is captured. `pause_MB`: for each size, the median milliseconds of the capture, in
which the guest stands still; for each size `ahead_MB` is the copy before it, in which it does not. `growth_MB`: the pause
of the largest guest over that of the smallest one. The first capture of each guest is not counted.
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

from rethaw.engines.base import SandboxSpec
from rethaw.engines.microvm.engine import QemuEngine
from rethaw.engines.microvm.sandbox import QemuSandbox
from rethaw.images.builder import ImageStore
from rethaw.model.image_types import ImageSpec
from rethaw.testing.server import image_cache

MIB = 1 << 20
HEAP_MIB = 24
PAGE = 4096
PROGRAM = f"""
import sys
heap = bytearray({HEAP_MIB} << 20)
for at in range(0, len(heap), {PAGE}):
    heap[at] = at >> 12 & 255
print("ready", flush=True)
for line in sys.stdin:
    for at in range(0, int(line) * {PAGE}, {PAGE}):
        heap[at] = heap[at] + 1 & 255
    print("done", flush=True)
"""


async def one(
    rootfs: Path, mib: int, changed: list[float], rounds: int
) -> dict[float, tuple[list[float], list[float]]]:
    """By MB changed: milliseconds of the copies ahead and of the captures."""
    work = Path(tempfile.mkdtemp(prefix="rethaw-bench-", dir="/dev/shm"))
    argv = ("/usr/bin/python3", "-c", PROGRAM)
    spec = SandboxSpec("bench", rootfs, mib * MIB, 512, argv, (("PATH", "/usr/bin"),))
    engine = QemuEngine(work / "data", image_cache() / "microvm")

    async def write(box: QemuSandbox, mb: float) -> None:
        box.writer.write(b"%d\n" % (mb * 1e6 / PAGE))
        assert await box.reader.readline() == b"done\n"

    async def save(box: QemuSandbox, mb: float) -> tuple[float, float]:
        directory = work / "image"
        await write(box, mb)
        started = time.perf_counter()
        await box.precopy(directory)
        ahead = (time.perf_counter() - started) * 1000
        await write(box, mb)
        pause = (await box.capture(directory)).engine_ms
        shutil.rmtree(directory)
        return ahead, pause

    try:
        box = await engine.boot(spec)
        assert await box.reader.readline() == b"ready\n"
        await save(box, 0)
        out: dict[float, tuple[list[float], list[float]]] = {}
        for mb in changed:
            took = [await save(box, mb) for _ in range(rounds)]
            out[mb] = ([ahead for ahead, _ in took], [pause for _, pause in took])
        await box.destroy()
        return out
    finally:
        await engine.close()
        shutil.rmtree(work, ignore_errors=True)


def tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


async def measure(sizes: list[int], changed: list[float], rounds: int) -> dict[str, Any]:
    os.environ.setdefault("RETHAW_IMAGES", str(image_cache()))
    images = ImageStore(image_cache())
    _, rootfs = await images.compose(await images.ensure(ImageSpec(), tell))
    numbers: dict[str, Any] = {"engine": "qemu", "sizes_mib": sizes, "rounds": rounds}
    found = {mib: await one(rootfs, mib, changed, rounds) for mib in sizes}
    for mb in changed:
        pauses = {mib: round(statistics.median(found[mib][mb][1]), 1) for mib in sizes}
        numbers[f"pause_{mb:g}"] = pauses
        numbers[f"ahead_{mb:g}"] = {mib: round(statistics.median(found[mib][mb][0]), 1) for mib in sizes}
        numbers[f"growth_{mb:g}"] = round(pauses[max(sizes)] / pauses[min(sizes)], 2)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pause", description=__doc__)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096], help="of the guests, MiB")
    parser.add_argument("--changed", type=float, nargs="+", default=[1, 20], help="MB written between two saves")
    parser.add_argument("--rounds", type=int, default=9, help="saves of each kind")
    args = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("needs root")
    if max(args.changed) * 1e6 > HEAP_MIB * MIB:
        parser.error(f"--changed {max(args.changed):g} is more than the heap of {HEAP_MIB} MiB")
    numbers = asyncio.run(measure(args.sizes, args.changed, args.rounds))
    if not args.json:
        for name, value in numbers.items():
            sys.stdout.write(f"{name:>16} {value}\n")
    sys.stdout.write(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
