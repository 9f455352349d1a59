"""What died half-way goes, after a grace period; what lives stays, whatever else is saved, deleted or unreadable."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from store_damage import ManifestFile
from store_fixtures import KERNEL, MEMORY, files, heap, home_of, load, noise, save, store_in

from rethaw.model import faults
from rethaw.model.errors import SnapshotUnusable
from rethaw.snapshots import manifest
from rethaw.snapshots.pages import PAGE
from rethaw.snapshots.store import SnapshotStore

FIRST = {MEMORY: heap(1, 30) + noise(1, 9 * PAGE), KERNEL: b"state" * 900}
SECOND = {MEMORY: b"changed!" + FIRST[MEMORY][8:] + noise(2, 5), KERNEL: b"other" * 900}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SnapshotStore]:
    store = store_in(tmp_path)
    yield store
    store.close()


def age(directory: Path, seconds: float) -> None:
    """Make every file older than it is."""
    for path in home_of(directory).iterdir():
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


async def test_delete_removes_what_only_that_snapshot_needed(store: SnapshotStore, tmp_path: Path) -> None:
    first = await save(store, FIRST)
    second = await save(store, SECOND, parent=first.id)
    assert len(files(tmp_path)) == 4
    await store.delete(first.id)
    assert len(files(tmp_path)) == 3  # the child needs its pack
    with pytest.raises(SnapshotUnusable, match=rf"{first.id}\.manifest cannot be read"):
        await store.load(first)
    assert await load(store, second) == SECOND
    await store.delete(second.id)
    assert files(tmp_path) == []
    await store.delete(second.id)  # again, and of what never was
    await store.delete("snap_none")
    assert store.stored_bytes() == 0


async def test_a_pack_that_nothing_refers_to_any_more_goes_with_its_snapshot(
    store: SnapshotStore, tmp_path: Path
) -> None:
    """A child that shares nothing keeps nothing."""
    first = await save(store, {MEMORY: noise(1, 5 * PAGE)})
    second = await save(store, {MEMORY: noise(2, 5 * PAGE)}, parent=first.id)
    await store.delete(first.id)
    assert len(files(tmp_path)) == 2
    assert await load(store, second) == {MEMORY: noise(2, 5 * PAGE)}


DYING = """
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import store_fixtures as f
from rethaw.model import faults
from rethaw.snapshots import store as module

async def main():
    store = f.store_in(Path({directory!r}))
    first = await f.save(store, {{f.MEMORY: f.heap(1, 30), f.KERNEL: b"first"}}, snapshot="snap_first")
    honest = faults.point
    faults.point = lambda name: os._exit(7) if name == {point!r} else honest(name)
    if {point!r} == "store.unlinked":
        second = await f.save(store, {{f.MEMORY: f.heap(1, 29)}}, snapshot="snap_second", parent="snap_first")
        await store.delete("snap_second")
    await f.save(store, {{f.MEMORY: b"changed!" + f.heap(1, 31)[8:]}}, snapshot="snap_second", parent="snap_first")

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("point", "left"),
    [("store.written", 1), ("store.verified", 2), ("store.between", 2), ("store.renamed", 2), ("store.unlinked", 1)],
)
async def test_a_process_that_dies_leaves_what_is_collected(tmp_path: Path, point: str, left: int) -> None:
    script = DYING.format(tests=str(Path(__file__).parent), directory=str(tmp_path), point=point)
    ended = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert ended.returncode == 7
    store = store_in(tmp_path)
    pack = min(p.name for p in home_of(tmp_path).glob("[!.]*.pack"))
    assert len(files(tmp_path)) == 2 + left
    assert not list(store.staging.path.iterdir())
    assert await store.collect({"snap_first"}, 600) == 0
    assert len(files(tmp_path)) == 2 + left
    age(tmp_path, 601)
    assert await store.collect({"snap_first"}, 600) >= 1
    assert files(tmp_path) == [pack, "snap_first.manifest"]
    again = await save(store, FIRST, snapshot="snap_second", parent="snap_first")
    assert await load(store, again) == FIRST
    await store.delete(again.id)
    await store.delete("snap_first")
    assert files(tmp_path) == []
    store.close()


async def test_collect_beside_saves_takes_nothing_of_theirs(
    store: SnapshotStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any grace, at each step of a save."""
    first = await save(store, FIRST)
    live = {first.id}
    points = ["store.written", "store.verified", "store.between"]
    for n, point in enumerate(points):
        reached, go_on = threading.Event(), threading.Event()

        def wait(
            name: str, point: str = point, reached: threading.Event = reached, go_on: threading.Event = go_on
        ) -> None:
            if name == point:
                reached.set()
                assert go_on.wait(30)

        with monkeypatch.context() as patch:
            patch.setattr(faults, "point", wait)
            saving = asyncio.create_task(save(store, {**SECOND, KERNEL: bytes([n])}, parent=first.id))
            assert await asyncio.to_thread(reached.wait, 30)
            age(tmp_path, 601)
            assert await store.collect(live, 0.0) == 0
            go_on.set()
            info = await asyncio.wait_for(saving, 30)
        live.add(info.id)
        assert await load(store, info) == {**SECOND, KERNEL: bytes([n])}
    assert await store.collect(live, 0.0) == 0
    assert len(files(tmp_path)) == 2 * len(live)


async def test_strange_files_are_left_alone(store: SnapshotStore, tmp_path: Path) -> None:
    (home_of(tmp_path) / "README").write_text("not ours")
    (home_of(tmp_path) / "lost+found").mkdir()
    info = await save(store, FIRST)
    age(tmp_path, 601)
    assert await store.collect({info.id}, 600) == 0
    assert {"README", "lost+found"} <= set(files(tmp_path))
    assert await load(store, info) == FIRST


async def test_a_manifest_that_could_not_be_read_keeps_its_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One failed read while the store was opened, and the next sweep removed what a live snapshot needs."""
    store = store_in(tmp_path)
    first = await save(store, FIRST)
    second = await save(store, SECOND, parent=first.id)
    store.close()
    honest = manifest.read

    def failing(path: Path) -> bytes:
        if path.stem == second.id:
            raise OSError(5, "Input/output error")
        return honest(path)

    monkeypatch.setattr(manifest, "read", failing)
    store = store_in(tmp_path)
    age(tmp_path, 601)
    await store.delete(first.id)
    await store.collect({second.id}, 600)
    assert len(files(tmp_path)) == 3
    monkeypatch.undo()
    assert await load(store, second) == SECOND
    assert await store.collect({second.id}, 600) == 0
    assert await load(store, second) == SECOND
    assert await store.collect(set(), 600) >= 1
    assert files(tmp_path) == []
    store.close()


async def test_a_snapshot_of_a_newer_version_keeps_its_packs(tmp_path: Path) -> None:
    """An older Rethaw, started once by mistake, took away what the newer one had stored."""
    store = store_in(tmp_path)
    first = await save(store, FIRST)
    second = await save(store, SECOND, parent=first.id)
    store.close()
    path = store.manifest_path(second.id)
    data = path.read_bytes()
    path.write_bytes(ManifestFile.of(data).field(8, "<H", 2).data)
    store = store_in(tmp_path)
    await store.delete(first.id)
    age(tmp_path, 601)
    assert await store.collect({second.id}, 600) == 0
    store.close()
    path.write_bytes(data)
    store = store_in(tmp_path)
    assert await load(store, second) == SECOND
    assert await store.collect({second.id}, 0) == 0
    store.close()


async def test_a_damaged_manifest_holds_nothing_up(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    first = await save(store, FIRST)
    second = await save(store, {MEMORY: noise(7, 3 * PAGE)}, image="other")
    store.close()
    store.manifest_path(first.id).write_bytes(b"damaged")
    store = store_in(tmp_path)
    age(tmp_path, 601)
    assert await store.collect({first.id, second.id}, 600) == 1  # its pack
    assert await load(store, second) == {MEMORY: noise(7, 3 * PAGE)}
    with pytest.raises(SnapshotUnusable, match=first.id):
        await store.load(first)
    assert await store.collect({second.id}, 600) == 1
    assert len(files(tmp_path)) == 2
    store.close()
