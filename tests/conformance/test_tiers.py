"""What every tier keeps to: the contract of rethaw.snapshots.tiers.base."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rethaw.model.errors import (
    InvalidInput,
    ObjectDamaged,
    ObjectMissing,
    RethawError,
    SnapshotUnusable,
    StorageFull,
    TierUnavailable,
)
from rethaw.snapshots.tiers.base import Tier
from rethaw.snapshots.tiers.local import LocalTier
from rethaw.snapshots.tiers.s3 import S3Tier
from rethaw.snapshots.tiers.settings import S3Settings

MIB = 1 << 20
DATA = random.Random(1).randbytes(100_000)


def named(error: RethawError, tier: Tier, name: str) -> None:
    """An error says which object, which tier, and what to do."""
    assert name in str(error) and tier.label in str(error) and error.remedy
    assert error.details["object"] == name and error.details["tier"] == tier.label


@pytest.mark.parametrize("size", [0, 1, 32 * MIB])
async def test_round_trip(tier: Tier, size: int) -> None:
    data = random.Random(size).randbytes(size)
    await tier.put("objects/a", data)
    assert await tier.size("objects/a") == size
    assert await tier.get("objects/a", 0, size) == data
    (found,) = await tier.list("objects")
    assert (found.name, found.size) == ("objects/a", size)


async def test_from_files(tier: Tier, tmp_path: Path) -> None:
    for name, size in (("a", 5 * MIB), ("b", 20 * MIB), ("empty", 0)):
        (tmp_path / name).write_bytes(random.Random(size).randbytes(size))
    a, b = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    await tier.put("small", tmp_path / "a")
    await tier.put("large", tmp_path / "b")
    await tier.put("empty", tmp_path / "empty")
    await tier.put("none", [])
    pieces = [(tmp_path / "b", 3, 17 * MIB), (tmp_path / "empty", 0, 0), (tmp_path / "a", MIB, 4 * MIB)]
    await tier.put("pieces", pieces)
    assert await tier.get("small", 0, len(a)) == a and await tier.get("large", 0, len(b)) == b
    assert await tier.size("empty") == 0 and await tier.size("none") == 0
    assert await tier.get("pieces", 0, 21 * MIB) == b[3 : 3 + 17 * MIB] + a[MIB:]


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (0, 1), (99_999, 1), (100_000, 0), (1, 99_999), (50_000, 50_000), (12_345, 678)]
)
async def test_ranges(tier: Tier, offset: int, length: int) -> None:
    await tier.put("a", DATA)
    assert await tier.get("a", offset, length) == DATA[offset : offset + length]


@pytest.mark.parametrize(("offset", "length"), [(0, 100_001), (99_999, 2), (100_000, 1), (100_001, 0), (1 << 40, 5)])
async def test_ranges_beyond_the_end(tier: Tier, offset: int, length: int) -> None:
    await tier.put("a", DATA)
    with pytest.raises(ObjectDamaged, match="has 100000 bytes") as caught:
        await tier.get("a", offset, length)
    named(caught.value, tier, "a")
    await tier.put("empty", b"")
    with pytest.raises(ObjectDamaged):
        await tier.get("empty", 0, 1)


async def test_putting_again(tier: Tier) -> None:
    await tier.put("a", DATA)
    (first,) = await tier.list("")
    await tier.put("a", DATA)
    assert await tier.get("a", 0, len(DATA)) == DATA and len(await tier.list("")) == 1
    await tier.put("a", b"other")
    assert await tier.get("a", 0, 5) == b"other"
    (last,) = await tier.list("")
    assert last.size == 5 and last.tag != first.tag


async def test_missing(tier: Tier) -> None:
    for put_first in (False, True):  # an empty tier, and one that holds something else
        if put_first:
            await tier.put("objects/b", b"x")
        for call in (tier.get("objects/a", 0, 1), tier.get("objects/a", 0, 0), tier.size("objects/a")):
            if isinstance(tier, LocalTier) and not put_first:
                call.close()  # a directory that is not there at all may be one that is not mounted
                continue
            with pytest.raises(ObjectMissing) as caught:
                await call
            named(caught.value, tier, "objects/a")
    for name in ("objects", "objects/b/c"):
        with pytest.raises(ObjectMissing):
            await tier.size(name)


async def test_listing(tier: Tier) -> None:
    names = ["a", "b/1", "b/2/x", "b2/1", "b.c/1", "c/1"]
    for name in names:
        await tier.put(name, name.encode())
    assert [f.name for f in await tier.list("")] == sorted(names)
    for prefix in ("b", "b/"):
        assert [f.name for f in await tier.list(prefix)] == ["b/1", "b/2/x"]
    assert [f.name for f in await tier.list("b/2")] == ["b/2/x"]
    assert list(await tier.list("nothing")) == []
    newest = max(f.modified for f in await tier.list(""))
    assert abs(newest - (await tier.list("c"))[0].modified) < 60


async def test_more_objects_than_a_page_holds(tier: Tier) -> None:
    names = [f"many/{n:04}" for n in range(1050)]
    limit = asyncio.Semaphore(16)

    async def put(name: str) -> None:
        async with limit:
            await tier.put(name, name.encode())

    await asyncio.gather(*map(put, names))
    found = await tier.list("many")
    assert [f.name for f in found] == names
    assert all(f.size == 9 for f in found)


async def test_concurrent_puts_and_gets(tier: Tier, kind: str) -> None:
    contents = {f"objects/{n}": random.Random(n).randbytes(MIB + 7 + n) for n in range(12)}
    await asyncio.gather(*(tier.put(name, data) for name, data in contents.items()))
    got = await asyncio.gather(*(tier.get(name, n, MIB) for name in contents for n in (0, 7)))
    for n, name in enumerate(contents):
        assert got[2 * n] == contents[name][:MIB] and got[2 * n + 1] == contents[name][7 : MIB + 7]
    if kind == "moto":
        return  # it closes an object under a reader that is replaced at the same time
    same = contents["objects/0"]
    await asyncio.gather(
        *(tier.put("objects/0", same) for _ in range(4)), *(tier.get("objects/0", 0, 9) for _ in range(4))
    )
    assert await tier.get("objects/0", 0, len(same)) == same


async def test_deleting_twice(tier: Tier) -> None:
    await tier.put("a/b", b"x")
    for name in ("a/b", "a/b", "never", "a/c"):
        await tier.delete(name)
    assert list(await tier.list("")) == []
    with pytest.raises(ObjectMissing):
        await tier.size("a/b")
    await tier.put("a/b", b"y")
    assert await tier.get("a/b", 0, 1) == b"y"


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "..", "a/../b", "./a", ".hidden", "a b", "ä", "a\0", "x" * 513, "a\n", "*"]
)
async def test_names_that_no_tier_takes(tier: Tier, name: str) -> None:
    for call in (tier.put(name, b"x"), tier.get(name, 0, 1), tier.size(name), tier.delete(name)):
        with pytest.raises(InvalidInput):
            await call
    with pytest.raises(InvalidInput):
        await tier.get("a", -1, 1)
    with pytest.raises(InvalidInput):
        await tier.get("a", 0, -1)


async def test_an_interrupted_put_leaves_nothing_visible(tier: Tier, tmp_path: Path) -> None:
    await tier.put("before", b"x")
    big = tmp_path / "big"
    big.write_bytes(bytes(64 * MIB))
    for turns in (1, 3, 50):
        task = asyncio.ensure_future(tier.put("a", big))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    with pytest.raises(ObjectMissing):
        await tier.size("a")
    assert [f.name for f in await tier.list("")] == ["before"]
    await tier.put("a", big)
    assert await tier.size("a") == 64 * MIB


@pytest.mark.parametrize("size", [MIB, 20 * MIB])
async def test_a_file_that_is_not_what_it_should_be(tier: Tier, tmp_path: Path, size: int) -> None:
    await tier.put("before", b"x")
    short = tmp_path / "short"
    short.write_bytes(bytes(size))
    with pytest.raises(SnapshotUnusable, match=f"short ends after {size} bytes, {size + 1}"):
        await tier.put("a", [(short, 0, size), (short, 0, size + 1)])
    with pytest.raises(SnapshotUnusable, match="absent cannot be read"):
        await tier.put("a", tmp_path / "absent")
    with pytest.raises(SnapshotUnusable, match="absent cannot be read"):
        await tier.put("a", [(short, 0, size), (tmp_path / "absent", 0, 1)])
    assert [f.name for f in await tier.list("")] == ["before"]


# ---------------------------------------------------------------- access is lost


async def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    root = tmp_path / "tier"
    tier = LocalTier(root)
    await tier.put("a", b"x")
    root.rename(tmp_path / "elsewhere")
    root.write_text("a file in its place")
    for call in (tier.put("a", b"x"), tier.get("a", 0, 1), tier.size("a"), tier.delete("a"), tier.list("a")):
        with pytest.raises(TierUnavailable) as caught:
            await call
        named(caught.value, tier, "a")
    root.unlink()
    with pytest.raises(TierUnavailable):
        await tier.get("a", 0, 1)
    (tmp_path / "elsewhere").rename(root)
    assert await tier.get("a", 0, 1) == b"x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
async def test_a_directory_without_permission(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path / "tier")
    await tier.put("b/a", b"x")
    (tmp_path / "tier" / "b").chmod(0)
    try:
        for call in (tier.put("b/a", b"x"), tier.get("b/a", 0, 1), tier.size("b/a"), tier.delete("b/a")):
            with pytest.raises(TierUnavailable, match="Permission denied"):
                await call
    finally:
        (tmp_path / "tier" / "b").chmod(0o700)
    assert await tier.get("b/a", 0, 1) == b"x"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    point = tmp_path / "disk"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)


def remount(point: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(point)], check=True)


@pytest.mark.root
async def test_a_disk_that_became_read_only(small_disk: Path) -> None:
    tier = LocalTier(small_disk / "tier")
    await tier.put("a", b"x")
    remount(small_disk, "ro")
    for call in (tier.put("a", b"y"), tier.delete("a")):
        with pytest.raises(TierUnavailable, match="Read-only file system") as caught:
            await call
        named(caught.value, tier, "a")
    assert await tier.get("a", 0, 1) == b"x"
    remount(small_disk, "rw")
    await tier.put("a", b"y")
    assert await tier.get("a", 0, 1) == b"y"


@pytest.mark.root
async def test_disk_full(small_disk: Path) -> None:
    tier = LocalTier(small_disk / "tier")
    await tier.put("a", bytes(3 * MIB))
    with pytest.raises(StorageFull, match="no space left") as caught:
        await tier.put("b", bytes(3 * MIB))
    named(caught.value, tier, "b")
    assert [f.name for f in await tier.list("")] == ["a"]
    assert [p.name for p in small_disk.rglob("*") if p.is_file()] == ["a"]  # nothing half-written stays
    await tier.delete("a")
    await tier.put("b", bytes(3 * MIB))
    assert await tier.size("b") == 3 * MIB


@pytest.mark.long
async def test_wrong_credentials(ceph: S3Settings) -> None:
    right = S3Tier(ceph)
    await right.put("a", b"x")
    for settings in (replace(ceph, secret_access_key="wrong"), replace(ceph, access_key_id="nobody")):
        tier = S3Tier(settings)
        for call in (
            tier.put("a", b"x"),
            tier.get("a", 0, 1),
            tier.size("a"),
            tier.delete("a"),
            tier.put("a", bytes(20 * MIB)),
        ):
            with pytest.raises(TierUnavailable, match="refuses the credentials") as caught:
                await call
            named(caught.value, tier, "a")
            assert "AWS_SECRET_ACCESS_KEY" in str(caught.value.remedy)
        with pytest.raises(TierUnavailable, match="refuses the credentials"):
            await tier.list("")
    assert await right.get("a", 0, 1) == b"x"


@pytest.mark.parametrize("service", ["moto", pytest.param("ceph", marks=pytest.mark.long)])
async def test_no_such_bucket(service: str, request: pytest.FixtureRequest) -> None:
    tier = S3Tier(replace(request.getfixturevalue(service), bucket="nobody-made-it"))
    for call in (tier.put("a", b"x"), tier.get("a", 0, 1), tier.list("")):
        with pytest.raises(TierUnavailable, match="no such bucket"):
            await call


async def test_the_environment_does_not_redirect_a_bucket(moto: S3Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads AWS_* by itself; what is configured counts."""
    for name in ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "elsewhere-1")
    monkeypatch.setenv("AWS_BUCKET", "another")
    tier = S3Tier(replace(moto, prefix="environment"))
    await tier.put("a", b"x")
    assert await tier.get("a", 0, 1) == b"x"


# ---------------------------------------------------------------- a directory's own


async def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        await LocalTier(tmp_path / "tier").put("a/b/c", b"x")
    finally:
        os.umask(old)
    for path in [tmp_path / "tier", *(tmp_path / "tier").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


async def test_what_a_crash_left_is_removed_after_a_while(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path / "tier")
    await tier.put("a", b"x")
    old, young = tmp_path / "tier/.part/old", tmp_path / "tier/.part/young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    await tier.put("b", b"x")
    assert not old.exists() and young.exists()
    assert [f.name for f in await tier.list("")] == ["a", "b"]
