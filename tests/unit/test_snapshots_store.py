"""The snapshot store: what was saved is what is loaded, whatever it was compared with and whatever was deleted since."""

from __future__ import annotations

import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
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
from rethaw.snapshots import decode, manifest, pages
from rethaw.snapshots.encode import MAX_PACKS
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


# ---------------------------------------------------------------- many generations


def packs_of(store: SnapshotStore, info: SnapshotInfo) -> int:
    return len(manifest.decode_head(store.manifest_path(info.id).read_bytes(), info.id)[0].packs)


def touched(memory: bytes, rng: random.Random, generation: int) -> bytes:
    """Three hot pages change a little, one cold page wholly, one page moves in now and then."""
    out = bytearray(memory)
    for page in (1, 2, 3):
        at = page * PAGE + 8 * rng.randrange(PAGE // 8)
        out[at : at + 8] = rng.randbytes(8)
    cold = 4 + generation % (len(out) // PAGE - 5)
    out[cold * PAGE : (cold + 1) * PAGE] = rng.randbytes(PAGE)
    if generation % 17 == 0:
        out[5 * PAGE : 5 * PAGE] = rng.randbytes(PAGE)
    return bytes(out)


def decompressed(store: SnapshotStore, info: SnapshotInfo) -> int:
    """Pages in all the frames that a restore reads."""
    found = manifest.decode(store.manifest_path(info.id).read_bytes(), info.id, store.keys)
    where = decode.resolve(found.pages[0], found.packs, store.packs)
    total = 0
    for number, ref in enumerate(found.packs):
        first = store.packs.get(ref).index.first_slot
        slots = np.concatenate([where.slot[where.pack == number], where.delta_slot[where.delta_pack == number]])
        frames = np.unique(np.searchsorted(first, slots, side="right") - 1)
        total += int(np.diff(first)[frames].sum())
    return total


def test_a_late_restore_decompresses_little_more_than_an_early_one() -> None:
    """Pages that change one by one, all over the memory, leave frames behind of which only a page or two are wanted."""

    async def live(directory: Path) -> None:
        store, rng, count = store_in(directory), random.Random(3), 640
        pages = [heap(n, 1) for n in range(count)]
        info = await save(store, {MEMORY: b"".join(pages)})
        most = 0
        for generation in range(160):
            for at in range(4):
                pages[(generation * 7 + at * 13) % count] = rng.randbytes(PAGE)
            former, info = info, await save(store, {MEMORY: b"".join(pages)}, parent=info.id)
            store.drop_staged(former.id)
            if generation >= 60:
                most = max(most, decompressed(store, info))
        assert await load(store, info) == {MEMORY: b"".join(pages)}
        assert most < 1.4 * count
        store.close()

    with place() as directory:
        run(live(directory))


def test_manifests_stay_flat_over_hundreds_of_generations() -> None:
    async def live(directory: Path) -> None:
        store, rng = store_in(directory), random.Random(7)
        memory, second = heap(5, 90), heap(6, 30)
        content: dict[str, Content] = {}
        infos: list[SnapshotInfo] = []
        for n in range(220):
            memory, second = touched(memory, rng, n), touched(second, rng, n)
            data = {MEMORY: memory, "second.img": second, "third.img": noise(n // 3, 2 * PAGE), KERNEL: b"%d" % n}
            paged = (MEMORY, "second.img", "third.img")
            info = await save(store, data, parent=infos[-1].id if infos else None, paged=paged)
            content[info.id] = data
            infos.append(info)
            assert packs_of(store, info) <= MAX_PACKS + 1
            if len(infos) > 3 and n % 50:  # most go, some stay from every age
                await store.delete(infos.pop(-3).id)
        middle = infos[len(infos) // 2]
        forks: list[SnapshotInfo] = []
        for n in range(3):
            data = {**content[middle.id], MEMORY: touched(content[middle.id][MEMORY], rng, n)}
            forks.append(await save(store, data, parent=middle.id, paged=(MEMORY, "second.img", "third.img")))
            content[forks[-1].id] = data
        for info in [*infos, *forks]:
            assert await load(store, info) == content[info.id]
        # Packs hold dead pages beside the living; not without bound.
        for info in [*infos[:-1], *forks]:
            await store.delete(info.id)
        assert store.stored_bytes() < 4 * infos[-1].raw_bytes
        assert await load(store, infos[-1]) == content[infos[-1].id]
        await store.delete(infos[-1].id)
        assert files(directory) == []
        store.close()

    with place() as directory:
        run(live(directory))


@pytest.mark.parametrize("restarted", [False, True])
async def test_what_left_memory_is_compared_all_the_same(tmp_path: Path, restarted: bool) -> None:
    """A save adds as little when staging has no room for the former snapshot beside the new one, deltas included."""
    content = [heap(n, 1) for n in range(600)]
    need = len(content) * PAGE
    store = store_in(tmp_path, staging_bytes=need * 3 // 2, kept_bytes=0, wait_s=0.1)
    parent = await save(store, {MEMORY: b"".join(content)})
    for turn in range(6):
        assert store.staging.kept(parent.id) is None
        if restarted:
            store.close()
            store = store_in(tmp_path, staging_bytes=need * 3 // 2, kept_bytes=0, wait_s=0.1)
        for n in range(turn * 5, turn * 5 + 20):  # most of them are deltas already
            content[n] = content[n][: PAGE - 8] + noise(100 * turn + n, 8)
        parent = await save(store, {MEMORY: b"".join(content)}, parent=parent.id)
        assert parent.stored_bytes < 6000, "deltas of 20 pages, and a manifest"
        assert await load(store, parent) == {MEMORY: b"".join(content)}
    store.close()


async def test_a_page_of_the_parent_that_cannot_be_read_costs_space_not_the_save(tmp_path: Path) -> None:
    store = store_in(tmp_path, kept_bytes=0)
    content = bytearray(heap(1, 300))
    parent = await save(store, {MEMORY: bytes(content)})
    path = store.pack_path(next(p.stem for p in (tmp_path / "snapshots" / "store").glob("*.pack")))
    with path.open("r+b") as f:  # a frame, which nobody reads before a delta is wanted
        f.seek(2000)
        f.write(bytes(64))
    content[:8] = b"\xff" * 8
    info = await save(store, {MEMORY: bytes(content)}, parent=parent.id)
    assert await load(store, info) == {MEMORY: bytes(content)}
    store.close()


@pytest.mark.parametrize("hashes", ["constant", "zero", "two bits"])
def test_page_hashes_that_collide_cost_space_not_bytes(monkeypatch: pytest.MonkeyPatch, hashes: str) -> None:
    honest = pages.hashes

    def colliding(rows: pages.Words) -> pages.Words:
        found = honest(rows)
        return found & np.uint64(3) if hashes == "two bits" else np.full_like(found, 0 if hashes == "zero" else 7)

    monkeypatch.setattr(pages, "hashes", colliding)
    monkeypatch.setattr(decode, "hashes", colliding)
    script = [(["repeat", "words", "zero"], n, "previous") for n in range(6)]
    script += [(["move", "grow", "tail", "vanish"], n, "older") for n in range(6)]
    with place() as directory:
        run(generations(directory, script, {2, 5}, {}))


# ---------------------------------------------------------------- one page alone


async def test_one_page_takes_one_frame_or_two(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory([noise(n, PAGE) for n in range(50)] + [bytes(PAGE)] * 3, b"odd end")
    first = await save(store, {MEMORY: memory.data})
    memory.pages[7] = b"changed!" + memory.pages[7][8:]
    memory.pages[20] = noise(99, PAGE)
    second = await save(store, {MEMORY: memory.data}, parent=first.id)
    read: list[int] = []
    honest = decode.Packs.frame

    def counting(self: decode.Packs, ref: Any, number: int) -> bytes:
        read.append(number)
        return honest(self, ref, number)

    monkeypatch.setattr(decode.Packs, "frame", counting)
    frames = {7: 2, 50: 0, 51: 0, 52: 0}
    for number, page in enumerate([*memory.pages, memory.tail.ljust(PAGE, b"\0")]):
        read.clear()
        assert store.page(second, MEMORY, number) == page
        assert len(read) == frames.get(number, 1), number


async def test_new_sessions_are_compared_with_the_first_of_their_image(store: SnapshotStore, tmp_path: Path) -> None:
    first = await save(store, BASE, image="one")
    same = await save(store, BASE, image="one")
    other = await save(store, BASE, image="two")
    assert same.stored_bytes < first.stored_bytes / 4 < other.stored_bytes
    await store.delete(first.id)
    assert await load(store, same) == BASE
    third = await save(store, BASE, image="one")  # compared with nothing: the first is gone
    assert third.stored_bytes > first.stored_bytes / 2
    fourth = await save(store, BASE, image="one")
    assert fourth.stored_bytes < first.stored_bytes / 4
    store.close()
    store = store_in(tmp_path)
    fifth = await save(store, BASE, image="one")
    assert fifth.stored_bytes < first.stored_bytes / 4
    assert await load(store, fifth) == BASE
    store.close()


async def test_empty_sections(store: SnapshotStore) -> None:
    for content in ({MEMORY: b""}, {MEMORY: b"", KERNEL: b""}, {KERNEL: b""}, {}, {MEMORY: bytes(5 * PAGE)}):
        first = await save(store, content)
        second = await save(store, content, parent=first.id)
        grown = await save(store, {MEMORY: noise(1, 10)}, parent=second.id)
        assert await load(store, first) == await load(store, second) == content
        assert await load(store, grown) == {MEMORY: noise(1, 10)}
        assert await store.verify(second) > 0


async def test_sections_that_change_their_names_and_kinds(store: SnapshotStore) -> None:
    data = noise(1, 3 * PAGE)
    first = await save(store, {"a": data, "b": data[::-1]}, paged=("a",))
    content = {"b": data[::-1], "c": data, "a": data}
    second = await save(store, content, paged=("b", "c"), parent=first.id)
    assert await load(store, second) == content


async def test_a_page_that_stands_twice_in_a_run_is_no_run(store: SnapshotStore) -> None:
    """Slots 0, 1, 1, 3 span as many as there are pages, and were written as 0, 1, 2, 3."""
    a, b, c, d = (noise(n, PAGE) for n in range(4))
    first = await save(store, {MEMORY: a + b + c + d})
    second = await save(store, {MEMORY: a + b + b + d}, parent=first.id)
    assert await load(store, second) == {MEMORY: a + b + b + d}
