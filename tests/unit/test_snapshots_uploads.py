"""The uploader: what is up can be read back from the tier alone, and interruptions cost one object at most."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from upload_fixtures import KIB, MOST, Node, whole

from rethaw.model import faults
from rethaw.model.errors import Conflict, RethawError, SnapshotUnusable, TierUnavailable
from rethaw.snapshots.fetching import Fetcher, PackReader, restore_catalog
from rethaw.snapshots.records import PackPlace
from rethaw.snapshots.tiers.local import LocalTier
from rethaw.snapshots.uploads import Job, Uploader

POINTS = ("upload.object", "upload.put", "upload.noted", "upload.record", "upload.recorded", "upload.done")


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "node", LocalTier(tmp_path / "tier"))


@pytest.fixture(autouse=True)
def _no_faults() -> Any:
    yield
    faults.configure("")


async def eventually(what: Any, timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)


# ---------------------------------------------------------------- what ends up where


async def test_at_once(node: Node) -> None:
    job = node.job("snap_1", small=100, large=100 * KIB, empty=0)
    async with node.running(linger_s=1000) as uploader:
        assert await uploader.upload(job) > 0
        assert uploader.is_up("snap_1") and node.told == ["snap_1"]
        assert await uploader.upload(job) == 0.0
    await whole(node.tier, job)
    assert sum(node.tier.objects) == 100 * KIB + 100 and max(node.tier.objects) == MOST
    assert node.tier.records == ["snap_1"]


async def test_what_is_there_already_is_not_uploaded_again(node: Node) -> None:
    first, second = node.job("snap_1", base=50 * KIB), node.job("snap_2", base=50 * KIB, delta=300)
    async with node.running() as uploader:
        await uploader.upload(first)
        await uploader.upload(second)
    assert sum(node.tier.objects) == 50 * KIB + 300
    third = node.job("snap_3", base=50 * KIB, delta=300)
    async with node.running() as uploader:  # another process of the same node
        await uploader.upload(third)
    assert sum(node.tier.objects) == 50 * KIB + 300
    await whole(node.tier, first, second, third)


async def test_small_packs_wait_for_company(node: Node) -> None:
    jobs = [node.job(f"snap_{n}", **{f"p{n}": KIB}) for n in range(9)]
    async with node.running(linger_s=1000) as uploader:
        for job in jobs[:7]:
            await uploader.enqueue(job)
        await asyncio.sleep(0.05)
        assert node.tier.puts == [] and uploader.backlog.waiting == 7
        for job in jobs[7:]:
            await uploader.enqueue(job)
        await eventually(lambda: len(node.tier.records) >= 8)
        await uploader.flush()
        await asyncio.wait_for(uploader.drained(), 10)
    assert sum(node.tier.objects) == 9 * KIB and len(node.tier.objects) <= 2
    assert sorted(node.tier.records) == [job.snapshot for job in jobs] == sorted(node.told)
    await whole(node.tier, *jobs)


async def test_nobody_waits_longer_than_linger(node: Node) -> None:
    job = node.job("snap_1", p=10)
    async with node.running(linger_s=0.2) as uploader:
        started = time.monotonic()
        await uploader.enqueue(job)
        await asyncio.wait_for(uploader.drained(), 10)
        assert time.monotonic() - started > 0.15
    await whole(node.tier, job)


async def test_those_who_ask_at_once_share_objects(node: Node) -> None:
    jobs = [node.job(f"snap_{n}", **{f"p{n}": 100}) for n in range(20)]
    async with node.running() as uploader:
        await asyncio.gather(*map(uploader.upload, jobs))
    assert len(node.tier.objects) <= 3 and sorted(node.tier.records) == sorted(job.snapshot for job in jobs)
    await whole(node.tier, *jobs)


async def test_both_lanes_at_the_same_packs(node: Node) -> None:
    """A pack that is on its way in the background is waited for, not sent twice."""
    job, other = node.job("snap_1", base=20 * KIB), node.job("snap_2", base=20 * KIB, more=10)
    async with node.running() as uploader:
        node.tier.gate.clear()
        await uploader.enqueue(job)
        await asyncio.sleep(0.05)
        urgent = [asyncio.ensure_future(uploader.upload(j)) for j in (job, other)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in urgent)
        node.tier.gate.set()
        await asyncio.wait_for(asyncio.gather(*urgent, uploader.drained()), 10)
    assert sum(node.tier.objects) == 20 * KIB + 10
    assert Counter(node.tier.records) == {"snap_1": 1, "snap_2": 1}
    await whole(node.tier, job, other)


async def test_what_is_deleted_here_is_not_uploaded(node: Node) -> None:
    async with node.running(linger_s=1000) as uploader:
        await uploader.enqueue(node.job("snap_1", p=10))
        await uploader.forget("snap_1")
        await asyncio.wait_for(uploader.drained(), 10)
        gone = node.job("snap_2", gone=10)
        await uploader.enqueue(gone)
        await uploader.enqueue(node.job("snap_3", stays=10))
        gone.packs[0].path.unlink()
        await uploader.flush()
        await asyncio.wait_for(uploader.drained(), 10)
        assert node.tier.records == ["snap_3"]
        with pytest.raises(SnapshotUnusable):
            await uploader.upload(gone)
        await uploader.upload(node.job("snap_4", p4=10))
    assert "snap_1" not in node.tier.records


async def test_bad_files_fail_their_own_upload_only(node: Node) -> None:
    bad, good = node.job("snap_1", bad=100), node.job("snap_2", good=100)
    bad.packs[0].path.write_bytes(b"short")
    async with node.running() as uploader:
        results = await asyncio.gather(uploader.upload(bad), uploader.upload(good), return_exceptions=True)
        assert isinstance(results[0], SnapshotUnusable) and isinstance(results[1], float)
        no_manifest = node.job("snap_3", good=100)
        no_manifest.manifest.unlink()
        with pytest.raises(SnapshotUnusable, match="snap_3"):
            await uploader.upload(no_manifest)
    await whole(node.tier, good)


# ---------------------------------------------------------------- the tier is down, the node dies


async def test_while_the_tier_is_down_everything_waits(node: Node) -> None:
    jobs = [node.job(f"snap_{n:03}", **{f"p{n}": 5 * KIB}) for n in range(200)]
    node.tier.down = True
    async with node.running() as uploader:
        for job in jobs:
            await uploader.enqueue(job)
        await eventually(lambda: uploader.backlog.error)
        with pytest.raises(TierUnavailable):
            await uploader.upload(jobs[7])
        assert uploader.backlog.waiting == 200
        assert len(uploader._window) <= 64  # pyright: ignore[reportPrivateUsage]
    async with node.running() as uploader:  # the queue is on disk
        assert uploader.backlog.waiting == 200
        node.tier.down = False
        await asyncio.wait_for(uploader.drained(), 30)
        assert uploader.backlog == type(uploader.backlog)(0, None)
    assert sorted(node.tier.records) == [job.snapshot for job in jobs]
    assert all(abs(int(s[5:]) - n) < 16 for n, s in enumerate(node.tier.records))  # in order, a few at a time
    await whole(node.tier, *jobs[::20])


async def test_closing_ends_what_waits(node: Node) -> None:
    node.tier.gate.clear()
    async with node.running() as uploader:
        task = asyncio.ensure_future(uploader.upload(node.job("snap_1", p=10)))
        await asyncio.sleep(0.02)
    with pytest.raises(TierUnavailable, match="snap_1"):
        await task
    with pytest.raises(TierUnavailable):
        await uploader.upload(node.job("snap_2", p=10))


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("nth", [1, 2])
async def test_a_failure_at_any_step_is_made_good(node: Node, point: str, nth: int) -> None:
    jobs = [node.job(f"snap_{n}", **{f"p{n}": 20 * KIB, f"q{n}": 100}) for n in range(4)]
    faults.configure(f"{point}:{nth}=raise")
    async with node.running() as uploader:
        for job in jobs:
            await uploader.enqueue(job)
        await asyncio.wait_for(uploader.drained(), 10)
    await whole(node.tier, *jobs)
    total = sum(pack.size for job in jobs for pack in job.packs)
    assert total <= sum(node.tier.objects) <= total + MOST
    assert all(count <= 2 for count in Counter(node.tier.records).values())


@pytest.mark.parametrize("point", POINTS)
async def test_a_failure_at_once_is_told(node: Node, point: str) -> None:
    job = node.job("snap_1", p=20 * KIB)
    faults.configure(f"{point}:1=raise")
    async with node.running() as uploader:
        with pytest.raises(RethawError, match=point):
            await uploader.upload(job)
        await uploader.upload(job)
    await whole(node.tier, job)


async def test_half_written_memory_costs_an_upload_only(node: Node) -> None:
    job, again = node.job("snap_1", p=20 * KIB), node.job("snap_2", p=20 * KIB)
    async with node.running() as uploader:
        await uploader.upload(job)
    (known,) = (node.home / "remote/objects").iterdir()
    for text in (b"", b"{", b'{"packs": []}', b'{"packs": {"p": [[0, 0]]}}', b'{"packs": {"p": 3}}', b"\xff"):
        known.write_bytes(text)
        (node.home / "remote/objects/.half").write_bytes(b"")
        (node.home / "remote/jobs/0000000000000009-snap_9.json").write_bytes(text)
        async with node.running() as uploader:
            assert uploader.extents("p", 20 * KIB) is None
            await asyncio.wait_for(uploader.drained(), 10)
    async with node.running() as uploader:
        await uploader.upload(again)
    assert sum(node.tier.objects) == 2 * 20 * KIB
    await whole(node.tier, job, again)


# ---------------------------------------------------------------- garbage


async def collected(uploader: Uploader, live: set[str], rounds: int = 4) -> set[str]:
    """Names that the collections removed."""
    gone: set[str] = set()
    for _ in range(rounds):
        result = await uploader.collect(live)
        gone |= {*result.objects, *(f"snapshots/{s}" for s in result.snapshots)}
        await asyncio.sleep(0.12)
    return gone


async def test_what_nothing_needs_is_removed_after_the_grace_period(node: Node) -> None:
    kept, dropped = node.job("snap_1", base=20 * KIB), node.job("snap_2", base=20 * KIB, own=9 * KIB)
    async with node.running(grace_s=0.1) as uploader:
        await uploader.upload(kept)
        await uploader.upload(dropped)
        await node.tier.put("objects/orphan", b"of a crash")
        before = {f.name for f in await node.tier.list("")}
        assert await collected(uploader, {"snap_1", "snap_2"}) == {"objects/orphan"}
        gone = await collected(uploader, {"snap_1"})
        assert "snapshots/snap_2" in gone and len(gone) == 2
        assert {f.name for f in await node.tier.list("")} == (before - gone - {"objects/orphan"}) | {"owner/us"}
        assert not uploader.is_up("snap_2") and uploader.extents("own", 9 * KIB) is None
        await whole(node.tier, kept)
        # What was removed can come again.
        await uploader.upload(node.job("snap_3", own=9 * KIB))
    await whole(node.tier, kept, node.job("snap_3", own=9 * KIB))


async def test_nothing_is_removed_within_the_grace_period(node: Node) -> None:
    async with node.running(grace_s=3600) as uploader:
        await uploader.upload(node.job("snap_1", p=20 * KIB))
        result = await uploader.collect(set())
        assert result.condemned == 1 and not result.snapshots
        assert await collected(uploader, set()) == set()
        await whole(node.tier, node.job("snap_1", p=20 * KIB))


async def test_what_is_needed_again_is_kept(node: Node) -> None:
    """Condemned, then live again before the deletion: the record stays."""
    async with node.running(grace_s=0.1) as uploader:
        await uploader.upload(node.job("snap_1", p=20 * KIB))
        await uploader.collect(set())
        await asyncio.sleep(0.12)
        assert await collected(uploader, {"snap_1"}) == set()
        await whole(node.tier, node.job("snap_1", p=20 * KIB))
        assert {f.name.split("/")[0] for f in await node.tier.list("")} == {"objects", "snapshots", "owner"}


async def test_a_new_snapshot_does_not_lean_on_what_is_condemned(node: Node, tmp_path: Path) -> None:
    """Another node is about to delete the objects that this one means to refer to."""
    first = node.job("snap_1", base=20 * KIB)
    async with node.running(grace_s=0.4) as uploader:
        await uploader.upload(first)
        other = Node(tmp_path / "other", node.tier.inner)
        async with other.running(grace_s=0.4) as collector:
            await collector.collect(set())  # condemns snap_1
            await asyncio.sleep(0.45)
            assert (await collector.collect(set())).snapshots == ["snap_1"]
            assert (await collector.collect(set())).condemned == 1  # its object
            second = node.job("snap_2", base=20 * KIB)
            await uploader.upload(second)  # it looks, sees, and uploads again
            await asyncio.sleep(0.45)
            result = await collector.collect({"snap_2"})
            assert len(result.objects) == 1
    assert sum(node.tier.objects) == 2 * 20 * KIB
    await whole(node.tier, second)


async def test_objects_that_vanished_are_uploaded_again(node: Node) -> None:
    async with node.running() as uploader:
        await uploader.upload(node.job("snap_1", base=20 * KIB))
    for found in await node.tier.list("objects"):
        await node.tier.delete(found.name)
    async with node.running() as uploader:
        await uploader.upload(node.job("snap_2", base=20 * KIB))
    await whole(node.tier, node.job("snap_2", base=20 * KIB))


async def test_collecting_while_uploads_go_on(node: Node) -> None:
    """Every snapshot that is live at the end is whole, whatever the collections did between."""
    live: list[str] = []
    stop = asyncio.Event()
    async with node.running(grace_s=0.5) as uploader:

        async def collecting() -> None:
            while not stop.is_set():
                await uploader.collect(set(live))
                await asyncio.sleep(0.02)

        task = asyncio.ensure_future(collecting())
        jobs: dict[str, Job] = {}
        for n in range(60):
            packs = {f"p{m}": 3 * KIB for m in range(max(0, n - 2), n + 1)} | {"base": 40 * KIB}
            job = jobs[f"snap_{n:02}"] = node.job(f"snap_{n:02}", **packs)
            live.append(job.snapshot)
            del live[:-5]
            if n % 3:
                await uploader.enqueue(job)
            else:
                await uploader.upload(job)
            await asyncio.sleep(0.03)
        await asyncio.wait_for(uploader.drained(), 10)
        stop.set()
        await task
        await whole(node.tier, *(jobs[s] for s in live))
        assert len(await node.tier.list("snapshots")) < 60  # some were removed meanwhile


async def test_no_object_is_removed_beside_a_record_that_cannot_be_read(node: Node) -> None:
    async with node.running(grace_s=0.05) as uploader:
        await uploader.upload(node.job("snap_1", p=20 * KIB))
        await node.tier.put("objects/orphan", b"x")
        await node.tier.put("snapshots/snap_1", b"rot")
        result = await uploader.collect({"snap_1"})
        assert result.unreadable == ["snap_1"]
        assert await collected(uploader, {"snap_1"}) == set()
        # A dead one goes, and then the rest does.
        assert {"snapshots/snap_1", "objects/orphan"} <= await collected(uploader, set(), rounds=6)


async def test_a_node_that_lost_everything_deletes_nothing(node: Node, tmp_path: Path) -> None:
    """Started anew on the same bucket, it knows of no snapshot: those there are what it is to restore."""
    job = node.job("snap_1", p=20 * KIB)
    async with node.running(grace_s=0.05, owner=None) as uploader:
        await uploader.upload(job)
        await uploader.collect({"snap_1"})
    anew = Node(tmp_path / "anew", node.tier.inner)
    async with anew.running(grace_s=0.05, owner=None) as uploader:
        for _ in range(4):
            with pytest.raises(Conflict, match="another installation") as caught:
                await uploader.collect(set())
            await asyncio.sleep(0.06)
        await uploader.upload(anew.job("snap_2", q=10))
    await whole(node.tier, job)
    (other,) = await node.tier.list("owner")
    assert other.name in str(caught.value)
    async with node.running(grace_s=0.05, owner=None) as uploader:  # the same node after a restart
        await uploader.collect({"snap_1", "snap_2"})
    await node.tier.delete(other.name)  # somebody decides that it is gone for good
    async with anew.running(grace_s=0.05, owner=None) as uploader:
        assert "snapshots/snap_1" in await collected(uploader, {"snap_2"})
    await whole(node.tier, anew.job("snap_2", q=10))


@pytest.mark.parametrize("point", ["collect.condemn", "collect.deleted"])
async def test_a_collection_that_fails_is_gone_on_with(node: Node, point: str) -> None:
    async with node.running(grace_s=0.1) as uploader:
        kept = node.job("snap_1", base=20 * KIB)
        await uploader.upload(kept)
        await uploader.upload(node.job("snap_2", own=20 * KIB))
        faults.configure(f"{point}:1=raise")
        for _ in range(3):
            try:
                await uploader.collect({"snap_1"})
            except RethawError as error:
                assert point in str(error)
            await asyncio.sleep(0.12)
        await collected(uploader, {"snap_1"})
        assert len(await node.tier.list("")) == 3
    await whole(node.tier, kept)


# ---------------------------------------------------------------- back from the tier


async def test_a_node_without_its_disk_reads_everything(node: Node, tmp_path: Path) -> None:
    jobs = [node.job("snap_1", base=70 * KIB), node.job("snap_2", base=70 * KIB, delta=100)]
    async with node.running() as uploader:
        for job in jobs:
            await uploader.upload(job)
    found = {listed.snapshot: listed.header for listed in await restore_catalog(node.tier)}
    assert list(found) == ["snap_1", "snap_2"]
    fetcher = Fetcher(node.tier)
    other = Node(tmp_path / "other", node.tier.inner)
    for job in jobs:
        header = found[job.snapshot]
        assert header is not None and json.loads(header.info) == {"id": job.snapshot}
        for pack in job.packs:
            target = tmp_path / "other/packs" / pack.id
            # Asked twice at the same time, it is fetched once.
            await asyncio.gather(*(fetcher.fetch(pack.id, header.packs[pack.id], target) for _ in range(3)))
            assert target.read_bytes() == pack.path.read_bytes() and target.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in (tmp_path / "other/packs").iterdir()) == ["base", "delta"]
    # Its next snapshot leans on what is up already.
    async with other.running() as uploader:
        assert found["snap_2"] is not None
        uploader.learn(found["snap_2"])
        await uploader.upload(other.job("snap_3", base=70 * KIB, delta=100, new=50))
    assert other.tier.objects == [50]
    await whole(node.tier, *jobs, other.job("snap_3", base=70 * KIB, delta=100, new=50))


async def test_reads_fall_through_and_fill_the_disk(node: Node, tmp_path: Path) -> None:
    job = node.job("snap_1", base=70 * KIB)
    async with node.running() as uploader:
        await uploader.upload(job)
        places = {p.id: PackPlace(p.size, uploader.extents(p.id, p.size) or ()) for p in job.packs}
    data = job.packs[0].path.read_bytes()
    reader = PackReader(node.tier, lambda pack: tmp_path / "cache" / pack, places.get)
    try:
        assert await reader.read("base", 1000, 40 * KIB) == data[1000 : 1000 + 40 * KIB]
        await reader.filled()
        assert (tmp_path / "cache/base").read_bytes() == data
        node.tier.down = True  # from here on the disk has it
        assert await reader.read("base", 5, 10) == data[5:15]
        (tmp_path / "cache/base").write_bytes(data[:100])  # cut off, as by a crash of the disk
        assert await reader.read("base", 50, 50) == data[50:100]
        with pytest.raises(TierUnavailable):
            await reader.read("base", 50, 51)
        node.tier.down = False
        assert await reader.read("base", 50, 51) == data[50:101]
        await reader.filled()
        assert (tmp_path / "cache/base").read_bytes() == data
        with pytest.raises(SnapshotUnusable, match="neither"):
            await reader.read("unknown", 0, 1)
    finally:
        await reader.close()


async def test_a_fetch_that_fails_leaves_nothing(node: Node, tmp_path: Path) -> None:
    job = node.job("snap_1", base=70 * KIB)
    async with node.running() as uploader:
        await uploader.upload(job)
        place = PackPlace(70 * KIB, uploader.extents("base", 70 * KIB) or ())
    fetcher, target = Fetcher(node.tier), tmp_path / "cache/base"
    with pytest.raises(SnapshotUnusable):
        await fetcher.fetch("base", PackPlace(71 * KIB, place.extents), target)
    faults.configure("fetch.block=raise")
    with pytest.raises(RethawError, match=r"fetch\.block"):
        await fetcher.fetch("base", place, target)
    faults.configure("fetch.block=enospc")
    with pytest.raises(RethawError, match="no space left"):
        await fetcher.fetch("base", place, target)
    faults.configure("")
    for found in await node.tier.list("objects"):
        await node.tier.put(found.name, b"short")
    with pytest.raises(RethawError, match="has 5 bytes"):
        await fetcher.fetch("base", place, target)
    assert list((tmp_path / "cache").iterdir()) == []
    await fetcher.close()
