"""Staging: within its budget, the oldest goes first, nothing in use goes, and who finds no room waits or is told why."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from store_fixtures import MEMORY, load, noise, save, store_in

from rethaw.model.errors import SnapshotUnusable, StorageFull
from rethaw.model.types import MIB
from rethaw.snapshots import staging as staging_module
from rethaw.snapshots.pages import PAGE
from rethaw.snapshots.staging import Staging, staging_for
from rethaw.snapshots.store import SnapshotStore

PART = 64 * 1024


class Room:
    """A staging area of ten parts, of which four may be kept."""

    def __init__(self, path: Path, *, wait_s: float = 30.0, budget: int = 10 * PART, kept: int = 4 * PART) -> None:
        self.gone: list[str] = []
        self.area = Staging(path, budget=budget, kept_bytes=kept, wait_s=wait_s, dropped=self.gone.append)
        self.area.open()

    async def make(self, name: str, parts: int = 1) -> Path:
        path = await self.area.make(name, parts * PART)
        (path / "raw").write_bytes(b"x" * parts * PART)
        return path

    async def kept(self, name: str, parts: int = 1) -> Path:
        path = await self.make(name, parts)
        self.area.keep(name)
        return path

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.area.path.iterdir())


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    return tmp_path / "staging"


async def blocked(task: asyncio.Task[Path]) -> None:
    """`task` has had its turn and found no room."""
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()


async def test_an_earlier_process_leaves_no_staging(tmp_path: Path) -> None:
    old = staging_for(tmp_path) / "snap_old"
    old.mkdir(parents=True)
    store = store_in(tmp_path)
    assert not old.exists()
    assert store.staging.path.stat().st_mode & 0o777 == 0o700
    store.close()
    assert not staging_for(tmp_path).exists()


async def test_what_was_used_least_recently_goes_first(shm: Path) -> None:
    room = Room(shm)
    for name in "abcd":
        await room.kept(name)
    assert room.area.kept("a") == shm / "a"  # looked at: younger than b now
    await room.kept("e")
    assert (room.names, room.gone) == (["a", "c", "d", "e"], ["b"])
    await room.kept("large", 3)
    assert (room.names, room.gone) == (["e", "large"], ["b", "c", "d", "a"])


async def test_what_is_in_use_stays(shm: Path) -> None:
    room = Room(shm)
    for name in "ab":
        await room.kept(name, 2)
    room.area.use("a")
    room.area.use("a")
    await room.kept("c", 4)
    assert "a" in room.names
    room.area.done("a")
    await room.make("d", 3)
    assert "a" in room.names
    room.area.done("a")
    await room.kept("e", 4)
    assert "a" not in room.names


async def test_what_is_dropped_while_it_is_read_goes_when_that_is_done(shm: Path) -> None:
    """A save of one session dropped the raw pages from which a fork of it was just being restored."""
    room = Room(shm)
    path = await room.kept("a")
    room.area.use("a")
    room.area.use("a")
    room.area.drop("a")
    assert (path / "raw").exists()
    room.area.done("a")
    assert (path / "raw").exists()
    room.area.done("a")
    assert (room.names, room.gone) == ([], ["a"])


async def test_kept_data_makes_room_for_a_capture(shm: Path) -> None:
    room = Room(shm)
    for name in "abcd":
        await room.kept(name)
    await room.make("capture", 8)
    assert room.names == ["c", "capture", "d"]
    assert room.gone == ["a", "b"]


@pytest.mark.parametrize("how", ["drop", "keep"])
async def test_a_capture_waits_for_room(shm: Path, how: str) -> None:
    room = Room(shm)
    await room.make("first", 6)
    second = asyncio.create_task(room.make("second", 6))
    await blocked(second)
    third = asyncio.create_task(room.make("third", 3))
    await asyncio.wait_for(third, 20)  # fits beside the first
    await blocked(second)
    getattr(room.area, how)("third")
    await blocked(second)
    getattr(room.area, how)("first")
    assert await asyncio.wait_for(second, 20) == shm / "second"


async def test_a_capture_gets_the_room_of_what_was_in_use(shm: Path) -> None:
    room = Room(shm, kept=10 * PART)
    await room.kept("a", 6)
    room.area.use("a")
    await room.make("first", 1)
    waiting = asyncio.create_task(room.make("b", 5))
    await blocked(waiting)
    room.area.done("a")
    await asyncio.wait_for(waiting, 20)
    assert room.names == ["b", "first"]


async def test_no_room_is_refused_with_numbers(shm: Path) -> None:
    room = Room(shm, wait_s=0.0, budget=10 * MIB)
    await room.area.make("first", 7 * MIB)
    with pytest.raises(StorageFull, match=rf"{shm} has no room for 4 MiB \(7 of 10 MiB .*staging_bytes"):
        await room.area.make("second", 4 * MIB)
    assert room.names == ["first"]
    await room.area.make("third", 3 * MIB)


async def test_one_that_is_larger_than_all_goes_alone(shm: Path) -> None:
    room = Room(shm)
    for name in "ab":
        await room.kept(name)
    await room.make("small", 1)
    large = asyncio.create_task(room.make("large", 30))
    await blocked(large)
    room.area.drop("small")
    assert await asyncio.wait_for(large, 20) == shm / "large"
    assert room.names == ["large"]
    after = asyncio.create_task(room.make("after", 1))
    await blocked(after)
    room.area.keep("large")
    await asyncio.wait_for(after, 20)
    assert room.names == ["after"]


@pytest.mark.parametrize("frees", [True, False])
async def test_memory_that_others_fill_counts(shm: Path, monkeypatch: pytest.MonkeyPatch, frees: bool) -> None:
    room = Room(shm, wait_s=0.0)
    await room.kept("a", 2)
    honest = os.statvfs(shm)

    def statvfs(path: Path) -> SimpleNamespace:
        free = 2 if frees and not (shm / "a").exists() else 0
        return SimpleNamespace(f_bavail=free * PART // honest.f_frsize, f_frsize=honest.f_frsize)

    monkeypatch.setattr(staging_module.os, "statvfs", statvfs)
    if frees:
        await room.make("b", 2)
        assert room.names == ["b"]
    else:
        with pytest.raises(StorageFull):
            await room.make("b", 2)


async def test_kept_files_that_somebody_removed_are_read_again(shm: Path) -> None:
    room = Room(shm)
    path = await room.kept("a")
    shutil.rmtree(path)
    assert room.area.kept("a") is None
    assert room.gone == ["a"]
    assert await room.make("a") == path


# ---------------------------------------------------------------- as the store uses it

CONTENT = {MEMORY: noise(1, 20 * PAGE) + bytes(99)}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SnapshotStore]:
    store = store_in(tmp_path)
    yield store
    store.close()


def counted(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> list[object]:
    calls: list[object] = []
    honest: Callable[..., object] = getattr(module, name)

    def counting(*args: object, **options: object) -> object:
        calls.append(args)
        return honest(*args, **options)

    monkeypatch.setattr(module, name, counting)
    return calls


async def test_loads_at_the_same_time_share_one_copy(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from rethaw.snapshots import decode

    info = await save(store, CONTENT, keep=False)
    calls = counted(monkeypatch, decode, "load")
    found = await asyncio.gather(*(store.load(info) for _ in range(8)))
    assert len(calls) == 1
    for files in found:
        assert files[MEMORY].read_bytes() == CONTENT[MEMORY]
        store.drop_staged(info.id)  # another reader's end, or a later save: this one is not disturbed
    for files in found:
        assert files[MEMORY].read_bytes() == CONTENT[MEMORY]
        store.done(info.id)
    assert not list(store.staging.path.iterdir())
    assert await load(store, info) == CONTENT


async def test_loads_at_the_same_time_of_a_damaged_snapshot_all_say_so(store: SnapshotStore) -> None:
    info = await save(store, CONTENT, keep=False)
    store.manifest_path(info.id).write_bytes(b"")
    found = await asyncio.gather(*(store.load(info) for _ in range(4)), return_exceptions=True)
    assert [type(error) for error in found] == [SnapshotUnusable] * 4
    assert not list(store.staging.path.iterdir())


async def test_a_load_that_finds_no_room_can_be_tried_again(tmp_path: Path) -> None:
    store = store_in(tmp_path, staging_bytes=50 * PAGE, wait_s=0.0)
    info = await save(store, CONTENT, keep=False)
    await store.stage("snap_other", 40 * PAGE)
    with pytest.raises(StorageFull, match="has no room"):
        await store.load(info)
    store.drop_staged("snap_other")
    assert await load(store, info) == CONTENT
    store.close()


async def test_deleting_what_is_being_read_does_not_disturb_the_reader(store: SnapshotStore) -> None:
    info = await save(store, CONTENT)
    files = await store.load(info)
    await store.delete(info.id)
    assert files[MEMORY].read_bytes() == CONTENT[MEMORY]
    store.done(info.id)
    assert not list(store.staging.path.iterdir())
    with pytest.raises(SnapshotUnusable):
        await store.load(info)
