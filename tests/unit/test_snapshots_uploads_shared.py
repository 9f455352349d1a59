"""Two nodes share a tier: both upload, lean on each other's packs and collect, and every live snapshot stays whole."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from upload_fixtures import KIB, Node, whole

from rethaw.model.errors import ObjectMissing
from rethaw.snapshots import records
from rethaw.snapshots.tiers.local import LocalTier
from rethaw.snapshots.uploads import Job, Uploader

GRACE_S = 0.8
LIVE = 8


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 6))])
async def test_two_nodes_share_a_tier(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    tier = LocalTier(tmp_path / "tier")
    live: dict[str, Job] = {}
    stop = asyncio.Event()

    async def collecting(uploader: Uploader) -> None:
        while not stop.is_set():
            await uploader.collect(set(live))
            await asyncio.sleep(chance.uniform(0, 0.1))

    async def working(node: Node, uploader: Uploader) -> None:
        for n in range(60):
            snapshot = f"snap_{node.home.name}{n:02}"
            packs = {f"{snapshot}-p": chance.choice([100, 3 * KIB, 40 * KIB])}
            if live and chance.random() < 0.8:  # based on another one, perhaps of the other node
                base = chance.choice(list(live.values()))
                try:
                    name = records.name_of(base.snapshot)
                    uploader.learn(await records.read_header(tier, base.snapshot, await tier.size(name)))
                except ObjectMissing:
                    pass  # not up yet
                packs |= {pack.id: pack.size for pack in chance.sample(base.packs, min(len(base.packs), 3))}
            job = live[snapshot] = node.job(snapshot, **packs)
            await (uploader.upload(job) if chance.random() < 0.5 else uploader.enqueue(job))
            while len(live) > LIVE:
                del live[chance.choice(list(live)[:4])]
            await asyncio.sleep(chance.uniform(0, 0.08))

    a, b = Node(tmp_path / "a", tier), Node(tmp_path / "b", tier)
    async with a.running(grace_s=GRACE_S) as first, b.running(grace_s=GRACE_S) as second:
        collectors = [asyncio.ensure_future(collecting(uploader)) for uploader in (first, second)]
        await asyncio.gather(working(a, first), working(b, second))
        await asyncio.wait_for(asyncio.gather(first.drained(), second.drained()), 30)
        # All that is dead goes in the end, and nothing else.
        end = asyncio.get_running_loop().time() + 20
        while len(await tier.list("snapshots")) > len(live):
            assert asyncio.get_running_loop().time() < end
            await asyncio.sleep(0.05)
        await asyncio.sleep(GRACE_S)
        stop.set()
        await asyncio.gather(*collectors)
    await whole(tier, *live.values())
