"""Uploads on every tier, in their real sizes; and while an S3 service comes and goes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tier_fixtures import fresh

from rethaw.model.errors import TierUnavailable
from rethaw.snapshots import records
from rethaw.snapshots.fetching import Fetcher, RemotePacks, restore_catalog
from rethaw.snapshots.packing import LEAST, MOST
from rethaw.snapshots.tiers.base import Tier
from rethaw.snapshots.tiers.s3 import S3Tier
from rethaw.snapshots.tiers.settings import S3Settings
from rethaw.snapshots.uploads import Job, PackFile, Uploader
from rethaw.testing.faultproxy import FaultProxy

MIB = 1 << 20


def job(home: Path, snapshot: str, **sizes: int) -> Job:
    manifest = home / f"{snapshot}.manifest"
    manifest.write_bytes(snapshot.encode() * 1000)
    packs: list[PackFile] = []
    for name, size in sizes.items():
        path = home / name
        if not path.exists():
            path.write_bytes(random.Random(name).randbytes(size))
        packs.append(PackFile(name, path, size))
    return Job(snapshot, manifest, tuple(packs), b'{"id": "%s"}' % snapshot.encode())


async def whole(tier: Tier, found: Job) -> None:
    remote = RemotePacks(tier)
    record = await records.read(tier, found.snapshot)
    assert record.manifest == found.manifest.read_bytes()
    for pack in found.packs:
        extents = record.header.packs[pack.id].extents
        assert await remote.read(extents, 0, pack.size) == pack.path.read_bytes()


async def test_up_and_back(tier: Tier, tmp_path: Path) -> None:
    first = job(tmp_path, "snap_1", base=45 * MIB, small=50_000)
    second = job(tmp_path, "snap_2", base=45 * MIB, delta=10 * MIB)
    uploader = Uploader(tier, tmp_path / "remote", linger_s=0.2, grace_s=2.0)
    await uploader.start()
    try:
        await uploader.upload(first)
        await uploader.enqueue(second)
        await asyncio.wait_for(uploader.drained(), 60)
        sizes = [found.size for found in await tier.list("objects")]
        assert sum(sizes) == 55 * MIB + 50_000 and all(LEAST <= size <= MOST for size in sizes)
        await whole(tier, first)
        await whole(tier, second)

        # snap_1 is deleted: its record goes, then the object that only it needed stays as long as the base shares it.
        end = asyncio.get_running_loop().time() + 60
        while len(await tier.list("snapshots")) > 1:
            assert asyncio.get_running_loop().time() < end
            await uploader.collect({"snap_2"})
            await asyncio.sleep(0.2)
    finally:
        await uploader.close()
    (listed,) = await restore_catalog(tier)
    assert listed.snapshot == "snap_2" and listed.header is not None and listed.header.info == second.info
    fetcher = Fetcher(tier)
    for pack in second.packs:
        await fetcher.fetch(pack.id, listed.header.packs[pack.id], tmp_path / "back" / pack.id)
        assert (tmp_path / "back" / pack.id).read_bytes() == pack.path.read_bytes()


@pytest.fixture
def proxy(moto: S3Settings) -> Iterator[FaultProxy]:
    where = urlsplit(moto.endpoint)
    with FaultProxy((str(where.hostname), int(where.port or 0))) as found:
        yield found


@pytest.mark.parametrize("fault", ["down", "slow", "cut", "503", "403"])
async def test_uploads_go_on_when_the_service_is_back(
    moto: S3Settings, proxy: FaultProxy, tmp_path: Path, fault: str
) -> None:
    tier = S3Tier(replace(fresh(moto), endpoint=proxy.url, timeout_s=1.0))
    first, second = job(tmp_path, "snap_1", a=20 * MIB, b=1000), job(tmp_path, "snap_2", a=20 * MIB, c=1000)
    uploader = Uploader(tier, tmp_path / "remote", linger_s=0, retry_s=(0.05, 0.2))
    await uploader.start()
    try:
        proxy.fault = fault
        await uploader.enqueue(first)
        with pytest.raises(TierUnavailable):
            await uploader.upload(second)
        end = asyncio.get_running_loop().time() + 30
        while uploader.backlog.error is None:
            assert asyncio.get_running_loop().time() < end
            await asyncio.sleep(0.02)
        assert uploader.backlog.waiting == 1 and tier.label in str(uploader.backlog.error)
        proxy.fault = None
        await asyncio.wait_for(uploader.drained(), 30)
        assert uploader.backlog.error is None
        await uploader.upload(second)
    finally:
        proxy.fault = None
        await uploader.close()
    await whole(tier, first)
    await whole(tier, second)
