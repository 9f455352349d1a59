"""The snapshot store: what was saved is what is loaded, whatever it was compared with and whatever was deleted since."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fixtures import (
    KERNEL,
    MEMORY,
    Content,
    Memory,
    changed,
    files,
    heap,
    load,
    noise,
    place,
    run,
    save,
    seeds,
    steps,
    store_in,
)  # fmt: skip

from rethaw.model.types import SnapshotInfo
from rethaw.snapshots.pages import PAGE
from rethaw.snapshots.store import SnapshotStore


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SnapshotStore]:
    store = store_in(tmp_path)
    yield store
    store.close()
    assert not store.staging.path.exists()


BASE = {MEMORY: heap(1, 60) + bytes(40 * PAGE) + noise(1, 20 * PAGE + 77), KERNEL: b"state" * 9000, "empty": b""}


async def test_what_was_saved_is_loaded(store: SnapshotStore) -> None:
    info = await save(store, BASE)
    assert await load(store, info) == BASE
    assert info.stored_bytes < info.raw_bytes == sum(map(len, BASE.values()))
    assert {s.name: s.raw_bytes for s in info.sections} == {name: len(data) for name, data in BASE.items()}
    assert 0 < await store.verify(info) <= info.stored_bytes


async def test_a_kept_snapshot_is_loaded_without_reading_the_disk(store: SnapshotStore, tmp_path: Path) -> None:
    info = await save(store, BASE)
    shutil.rmtree(tmp_path / "snapshots")
    assert await load(store, info, kept=True) == BASE


# ---------------------------------------------------------------- generations

generation = st.tuples(steps, seeds, st.sampled_from(["previous", "previous", "none", "older", "deleted"]))


async def generations(directory: Path, script: list[Any], gone: set[int], options: dict[str, Any]) -> None:
    memory = Memory([noise(n, PAGE) for n in range(20)], b"odd end")
    content: dict[str, Content] = {}
    infos: list[SnapshotInfo] = []
    deleted: list[str] = []
    store = store_in(directory, **options)
    for n, (names, seed, parent) in enumerate(script):
        memory = changed(memory, names, seed)
        snapshot = f"snap_{n}"
        content[snapshot] = {
            MEMORY: memory.data,
            KERNEL: noise(seed, seed % 5000),
            "second.img": memory.data[: PAGE * 3],
        }
        of = {
            "previous": infos[-1].id if infos else None,
            "none": None,
            "older": infos[seed % len(infos)].id if infos else None,
            "deleted": deleted[-1] if deleted else None,
        }[parent]
        info = await save(
            store, content[snapshot], snapshot=snapshot, parent=of, paged=(MEMORY, "second.img"), keep=bool(seed % 3)
        )
        infos.append(info)
        if parent == "deleted" and len(infos) > 2:
            victim = infos.pop(seed % (len(infos) - 1))
            await store.delete(victim.id)
            deleted.append(victim.id)
    for info in infos:
        assert await load(store, info) == content[info.id]
    store.close()
    store = store_in(directory, **options)
    for n, info in enumerate(list(infos)):
        if n in gone:
            await store.delete(info.id)
            infos.remove(info)
    for info in infos:
        assert await load(store, info) == content[info.id]
        await store.verify(info)
    for info in infos:
        await store.delete(info.id)
    assert files(directory) == []
    store.close()


@settings(deadline=None, max_examples=40)
@given(st.lists(generation, min_size=1, max_size=7), st.sets(st.integers(0, 6)))
def test_every_generation_is_loaded_as_it_was(script: list[Any], gone: set[int]) -> None:
    with place() as directory:
        run(generations(directory, script, gone, {}))


async def test_a_page_in_the_place_of_zeros_is_no_delta(store: SnapshotStore) -> None:
    """Few words differ from a page of zeros, but that page lies in no pack that a delta could name."""
    whole = noise(1, PAGE)
    first = await save(store, {MEMORY: whole + bytes(PAGE) + noise(2, PAGE)})
    content = {MEMORY: whole + bytes(800) + b"few words" + bytes(PAGE - 809) + noise(2, PAGE)}
    second = await save(store, content, parent=first.id)
    assert await load(store, second) == content
