"""Saves and loads that are cancelled in the middle: nothing is left, nothing is taken away under a thread that works on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from store_fixtures import KERNEL, MEMORY, files, heap, load, noise, save, store_in

from rethaw.model import faults
from rethaw.snapshots import decode
from rethaw.snapshots.store import SnapshotStore

CONTENT = {MEMORY: heap(1, 40) + noise(1, 5000), KERNEL: b"state" * 900}
CHANGED = {MEMORY: b"changed!" + CONTENT[MEMORY][8:], KERNEL: b"other"}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SnapshotStore]:
    store = store_in(tmp_path)
    yield store
    store.close()


class Gate:
    """A place where a thread waits until it is let go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.open.wait(30)

    async def until_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 30)


def gate_at(monkeypatch: pytest.MonkeyPatch, name: str) -> Gate:
    """At a fault point."""
    gate = Gate()

    def point(passed: str) -> None:
        if passed == name:
            gate()

    monkeypatch.setattr(faults, "point", point)
    return gate


async def cancelled(task: asyncio.Task[object], gate: Gate) -> None:
    """Twice, as by a timeout and then by the end of the server."""
    await gate.until_reached()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done(), "it went away while its thread was at work"
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 30)


@pytest.mark.parametrize("point", ["store.written", "store.verified", "store.between", "store.renamed"])
async def test_a_save_that_is_cancelled_leaves_nothing(
    store: SnapshotStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    first = await save(store, CONTENT)
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        gate = gate_at(patch, point)
        await cancelled(asyncio.create_task(save(store, CHANGED, parent=first.id)), gate)
    assert files(tmp_path) == before
    assert [p.name for p in store.staging.path.iterdir()] == [first.id]
    second = await save(store, CHANGED, parent=first.id)
    await store.delete(first.id)
    assert await load(store, second) == CHANGED
    await store.delete(second.id)
    assert files(tmp_path) == []


async def test_a_load_that_is_cancelled_can_be_tried_again(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread went on writing into the directory that the cancelled load removed."""
    info = await save(store, CONTENT, keep=False)
    gate, honest = Gate(), decode.load

    def waiting(*args: object) -> None:
        gate()
        honest(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(decode, "load", waiting)
        first = asyncio.create_task(store.load(info))
        await gate.until_reached()
        other = asyncio.create_task(store.load(info))
        await cancelled(first, gate)
        assert {n: p.read_bytes() for n, p in (await asyncio.wait_for(other, 30)).items()} == CONTENT
    store.done(info.id)
    assert await load(store, info) == CONTENT


async def test_a_snapshot_deleted_while_a_child_is_saved_leaves_what_that_needs(
    store: SnapshotStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await save(store, CONTENT)
    with monkeypatch.context() as patch:
        gate = gate_at(patch, "store.written")
        saving = asyncio.create_task(save(store, CHANGED, parent=first.id))
        await gate.until_reached()
        await store.delete(first.id)
        assert len(files(tmp_path)) == 2, "the former pack, and the partial one"
        gate.open.set()
        second = await asyncio.wait_for(saving, 30)
    assert await load(store, second) == CHANGED
    await store.delete(second.id)
    assert files(tmp_path) == []


async def test_a_snapshot_deleted_while_it_is_loaded(
    store: SnapshotStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = await save(store, CONTENT, keep=False)
    gate, honest = Gate(), decode.load

    def waiting(*args: object) -> None:
        gate()
        honest(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(decode, "load", waiting)
        loading = asyncio.create_task(store.load(info))
        await gate.until_reached()
        await store.delete(info.id)
        gate.open.set()
        found = await asyncio.wait_for(loading, 30)
    assert {n: p.read_bytes() for n, p in found.items()} == CONTENT
    store.done(info.id)
    store.drop_staged(info.id)
    assert files(tmp_path) == []
