"""Snapshots as files: what is written is read back, and every kind of damage is named."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rethaw.model import faults
from rethaw.model.errors import RethawError, SnapshotUnusable, StorageFull
from rethaw.model.types import SnapshotInfo
from rethaw.snapshots import codec
from rethaw.snapshots.store import SnapshotStore, staging_for

RAW = {"pages": os.urandom(300_000) + bytes(5 << 20) + os.urandom(70_000), "kernel": b"state" * 9000, "empty": b""}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SnapshotStore]:
    store = SnapshotStore(tmp_path, reserve_bytes=1)
    store.open()
    yield store
    faults.configure("")
    store.close()
    assert not staging_for(tmp_path).exists()


async def save(store: SnapshotStore, snapshot: str = "snap_1", session: str = "s_1") -> SnapshotInfo:
    staged = store.stage(snapshot)
    sections = {name: staged / f"{name}.img" for name in RAW}
    for name, path in sections.items():
        path.write_bytes(RAW[name])
    path, stored = await store.write(session, snapshot, sections)
    return SnapshotInfo(
        id=snapshot, session=session, parent=None, line=1, attempt=1, seq=7, generation="g", engine="gvisor",
        engine_build="b", cpu="c", image="i", path=path, sections=stored, resync="00", why="exchange", paused_ms=1,
        durable_ms=2, raw_bytes=sum(s.raw_bytes for s in stored), stored_bytes=sum(s.stored_bytes for s in stored),
    )  # fmt: skip


def contents(files: dict[str, Path]) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files.items()}


async def test_what_was_saved_is_loaded(store: SnapshotStore) -> None:
    info = await save(store)
    store.drop_staged(info.id)
    assert contents(await store.load(info)) == RAW
    store.done(info.id)
    assert info.stored_bytes < info.raw_bytes
    await store.verify(info)


async def test_a_kept_snapshot_is_loaded_without_reading_the_disk(store: SnapshotStore, tmp_path: Path) -> None:
    info = await save(store)
    store.keep(info.id)
    shutil.rmtree(tmp_path / info.path)
    assert contents(await store.load(info)) == RAW


async def test_kept_data_stays_within_its_budget(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, kept_bytes=2 * sum(map(len, RAW.values())) + 10, reserve_bytes=1)
    store.open()
    try:
        for n in range(5):
            store.keep((await save(store, f"snap_{n}")).id)
        assert sorted(p.name for p in store.staging.iterdir()) == ["snap_3", "snap_4"]
    finally:
        store.close()


async def test_loads_at_the_same_time_do_not_disturb_each_other(store: SnapshotStore) -> None:
    info = await save(store)
    store.drop_staged(info.id)
    first, second = await store.load(info), await store.load(info)
    assert contents(first) == contents(second) == RAW
    store.done(info.id)
    assert contents(second) == RAW
    store.done(info.id)


@pytest.mark.parametrize("name", list(RAW))
@pytest.mark.parametrize("where", [0, 9, 17, -1])
async def test_a_flipped_byte_is_named(store: SnapshotStore, tmp_path: Path, name: str, where: int) -> None:
    info = await save(store)
    store.drop_staged(info.id)
    path = tmp_path / info.path / f"{name}.sec"
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(SnapshotUnusable, match=f"{info.id}.*{name}.sec"):
        await store.load(info)
    with pytest.raises(SnapshotUnusable):
        await store.verify(info)
    assert not list(store.staging.iterdir())


@pytest.mark.parametrize("length", [0, 5, 16, 100])
async def test_a_truncated_file_is_named(store: SnapshotStore, tmp_path: Path, length: int) -> None:
    info = await save(store)
    store.drop_staged(info.id)
    os.truncate(tmp_path / info.path / "pages.sec", length)
    with pytest.raises(SnapshotUnusable, match=r"pages\.sec has"):
        await store.load(info)


async def test_a_missing_file_is_named(store: SnapshotStore, tmp_path: Path) -> None:
    info = await save(store)
    store.drop_staged(info.id)
    (tmp_path / info.path / "kernel.sec").unlink()
    with pytest.raises(SnapshotUnusable, match=r"kernel\.sec cannot be read"):
        await store.load(info)


def test_a_file_that_claims_more_than_was_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"x" * 1000)
    section = codec.encode("pages", raw, tmp_path / "pages.sec")
    lying = section.model_copy(update={"raw_bytes": 999})
    with pytest.raises(SnapshotUnusable, match="claims 1000 raw bytes, 999"):
        codec.decode(lying, tmp_path / "pages.sec", tmp_path / "out", "snap_1")
    assert (tmp_path / "out").stat().st_size == 0


@pytest.mark.parametrize("point", ["store.written", "store.verified", "store.renamed"])
async def test_a_write_that_fails_leaves_nothing(store: SnapshotStore, tmp_path: Path, point: str) -> None:
    faults.configure(f"{point}=enospc")
    with pytest.raises(StorageFull, match="free disk space"):
        await save(store)
    assert [p.name for p in (tmp_path / "snapshots").rglob("*") if "snap" in p.name] == []
    faults.configure(f"{point}=raise")
    store.drop_staged("snap_1")
    with pytest.raises(RethawError):
        await save(store)
    faults.configure("")
    store.drop_staged("snap_1")
    assert (await save(store)).sections


async def test_an_earlier_process_leaves_no_staging(tmp_path: Path) -> None:
    old = staging_for(tmp_path) / "snap_old"
    old.mkdir(parents=True)
    store = SnapshotStore(tmp_path)
    store.open()
    assert not old.exists()
    assert store.staging.stat().st_mode & 0o777 == 0o700
    store.close()


async def test_delete_removes_all_of_it(store: SnapshotStore, tmp_path: Path) -> None:
    info = await save(store)
    store.keep(info.id)
    await store.delete(info)
    assert list((tmp_path / "snapshots").iterdir()) == []
    assert list(store.staging.iterdir()) == []
