"""A process that is killed at any step of an upload: the next one finishes, and sends one object twice at most."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rethaw.snapshots import records
from rethaw.snapshots.fetching import RemotePacks
from rethaw.snapshots.tiers.local import LocalTier

KIB = 1 << 10
MOST = 32 * KIB
SNAPSHOTS, SIZES = 4, (40 * KIB, 300)

PROGRAM = """
import asyncio, sys
from pathlib import Path
from rethaw.snapshots.tiers.local import LocalTier
from rethaw.snapshots.uploads import Job, PackFile, Uploader

async def main(home, queue):
    uploader = Uploader(LocalTier(home / "tier"), home / "remote", linger_s=0, least=8192, most=32768)
    await uploader.start()
    if queue:
        for manifest in sorted((home / "manifests").iterdir()):
            packs = sorted((home / "packs").glob(manifest.name + "-*"))
            files = tuple(PackFile(p.name, p, p.stat().st_size) for p in packs)
            await uploader.enqueue(Job(manifest.name, manifest, files, b"{}"))
    await uploader.drained()
    await uploader.close()

asyncio.run(main(Path(sys.argv[1]), sys.argv[2] == "queue"))
"""


def run(home: Path, what: str, faults: str = "") -> int:
    env = {**os.environ, "RETHAW_FAULTS": faults}
    return subprocess.run([sys.executable, "-c", PROGRAM, str(home), what], env=env, timeout=60, check=False).returncode


def written(home: Path) -> None:
    for folder in ("manifests", "packs"):
        (home / folder).mkdir()
    for n in range(SNAPSHOTS):
        (home / f"manifests/snap_{n}").write_bytes(b"manifest %d" % n)
        for m, size in enumerate(SIZES):
            (home / f"packs/snap_{n}-{m}").write_bytes(random.Random(10 * n + m).randbytes(size))


@pytest.mark.parametrize("nth", [1, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "point", ["upload.object", "upload.put", "upload.noted", "upload.record", "upload.recorded", "upload.done"]
)
def test_killed_at_any_step(tmp_path: Path, point: str, nth: int) -> None:
    written(tmp_path)
    assert run(tmp_path, "queue", f"{point}:{nth}=kill") == -signal.SIGKILL
    # The catalog is not asked again: what waits is on disk.
    assert run(tmp_path, "go on") == 0

    async def check() -> None:
        tier = LocalTier(tmp_path / "tier")
        remote = RemotePacks(tier)
        for n in range(SNAPSHOTS):
            record = await records.read(tier, f"snap_{n}")
            assert record.manifest == b"manifest %d" % n
            for pack, place in record.header.packs.items():
                assert await remote.read(place.extents, 0, place.size) == (tmp_path / "packs" / pack).read_bytes()
        stored = sum(found.size for found in await tier.list("objects"))
        assert SNAPSHOTS * sum(SIZES) <= stored <= SNAPSHOTS * sum(SIZES) + MOST
        assert len(list((tmp_path / "remote/jobs").iterdir())) == 0

    asyncio.run(check())
