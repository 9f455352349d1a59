"""The store gives a large section lazily or whole: when which, what clones share, what happens after damage."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_fixtures import KERNEL, MEMORY, heap, home_of, noise, save, store_in

from rethaw.model.errors import SnapshotUnusable, Unavailable
from rethaw.model.types import SnapshotInfo
from rethaw.snapshots import lazily, lazy
from rethaw.snapshots.lazily import Handle, Section
from rethaw.snapshots.lazy import LazyFiles
from rethaw.snapshots.pages import PAGE
from rethaw.snapshots.store import SnapshotStore

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs FUSE"),
]
PAGES = 300


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SnapshotStore]:
    made = store_in(tmp_path, kept_bytes=0, lazy_from=PAGES * PAGE)
    yield made
    await made.close_lazy()
    made.close()
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


async def saved(store: SnapshotStore, content: dict[str, bytes], **options: Any) -> SnapshotInfo:
    info = await save(store, content, paged=[n for n in content if n != KERNEL], keep=False, **options)
    store.drop_staged(info.id)
    return info


async def opened(section: Section, table: Sequence[int] | None = None) -> Handle:
    pages = range(section.raw_bytes // PAGE) if table is None else table
    return await section.open(len(pages) * PAGE, np.asarray(pages, dtype=np.int32))


async def read(handle: Handle) -> bytes:
    return await asyncio.to_thread(handle.path.read_bytes)


async def test_a_large_section_is_a_file_and_the_others_are_here(store: SnapshotStore) -> None:
    content = {MEMORY: heap(1, PAGES), KERNEL: noise(2, 5000), "small.img": heap(3, PAGES - 1)}
    info = await saved(store, content)
    loaded = await store.load_lazily(info, [MEMORY, "small.img"])
    assert {n: p.read_bytes() for n, p in loaded.sections.items()} == {n: content[n] for n in (KERNEL, "small.img")}
    assert set(loaded.lazy) == {MEMORY} and loaded.lazy[MEMORY].raw_bytes == PAGES * PAGE
    handle = await opened(loaded.lazy[MEMORY])
    assert await read(handle) == content[MEMORY] and handle.alive()
    directory = next(iter(loaded.sections.values())).parent
    loaded.done()
    assert not directory.exists()
    await handle.close()
    assert not handle.path.exists()
    await handle.close()  # again does no harm


async def test_what_is_not_asked_for_or_is_in_memory_still_is_given_whole(store: SnapshotStore, tmp_path: Path) -> None:
    content = {MEMORY: heap(1, PAGES), KERNEL: noise(2, 50)}
    info = await saved(store, content)
    loaded = await store.load_lazily(info, [])
    assert not loaded.lazy and loaded.sections[MEMORY].read_bytes() == content[MEMORY]
    loaded.done()
    keeping = store_in(tmp_path / "keeping", lazy_from=PAGE)
    kept = await save(keeping, content, keep=True)
    loaded = await keeping.load_lazily(kept, [MEMORY])
    assert not loaded.lazy and loaded.sections[MEMORY].read_bytes() == content[MEMORY]
    loaded.done()
    keeping.close()


async def test_clones_share_a_file_and_the_next_life_has_its_pages_prefetched(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = await saved(store, {MEMORY: heap(1, PAGES), KERNEL: b"k"})
    one, two = [(await store.load_lazily(info, [MEMORY])).lazy[MEMORY] for _ in range(2)]
    first, second = await asyncio.gather(opened(one), opened(two))
    other = await opened(one, range(10))  # of another size: another guest
    assert first.path == second.path != other.path
    await other.close()
    with first.path.open("rb", buffering=0) as f:
        os.pread(f.fileno(), PAGE, 100 * PAGE)
    await first.close()
    assert second.path.exists()
    await second.close()
    assert not second.path.exists()

    asked: list[lazy.Ranges] = []
    real = LazyFiles.prefetch

    async def noted(self: LazyFiles, file: lazy.LazyFile, ranges: lazy.Ranges) -> None:
        asked.append(ranges)
        await real(self, file, ranges)

    monkeypatch.setattr(LazyFiles, "prefetch", noted)
    again = await opened((await store.load_lazily(info, [MEMORY])).lazy[MEMORY])
    await again.prefetch()
    await again.close()
    (ranges,) = asked
    assert any(start <= 100 < start + count for start, count in ranges)
    assert sum(count for _, count in ranges) < PAGES


async def test_a_working_set_outlives_the_server(store: SnapshotStore, tmp_path: Path) -> None:
    info = await saved(store, {MEMORY: heap(1, PAGES), KERNEL: b"k"})
    handle = await opened((await store.load_lazily(info, [MEMORY])).lazy[MEMORY])
    with handle.path.open("rb", buffering=0) as f:
        os.pread(f.fileno(), PAGE, 50 * PAGE)
    await handle.close()
    sets = lazily.WorkingSets(tmp_path / "snapshots" / "working")
    assert any(first <= 50 < first + count for first, count in sets.read(info.session))
    (file,) = (tmp_path / "snapshots" / "working").iterdir()
    for spoilt in (b"odd", b"\xff" * 16):
        file.write_bytes(spoilt)
        assert list(sets.read(info.session)) == []
        again = await opened((await store.load_lazily(info, [MEMORY])).lazy[MEMORY])
        await again.prefetch()
        assert again.alive()
        await again.close()
    assert list(sets.read(info.session)) == []  # nothing was touched the last time


def test_only_the_newest_working_sets_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazily, "_SETS", 3)
    sets = lazily.WorkingSets(tmp_path / "working")
    for n in range(5):
        sets.write(f"s_{n}", np.array([(n, 2), (7, 1)], dtype=np.int32))
        os.utime(tmp_path / "working" / f"s_{n}", (n, n))
    assert [list(sets.read(f"s_{n}")) for n in range(5)] == [[], [], *([(n, 2), (7, 1)] for n in (2, 3, 4))]
    assert list(sets.read("../x")) == []


async def test_damage_makes_the_next_restore_read_all_and_name_it(store: SnapshotStore, tmp_path: Path) -> None:
    info = await saved(store, {MEMORY: noise(1, PAGES * PAGE), KERNEL: b"k"})
    handle = await opened((await store.load_lazily(info, [MEMORY])).lazy[MEMORY])
    (pack,) = home_of(tmp_path).glob("*.pack")
    with pack.open("r+b", buffering=0) as f:
        at = pack.stat().st_size // 2
        byte = os.pread(f.fileno(), 1, at)
        os.pwrite(f.fileno(), bytes([byte[0] ^ 1]), at)
    with pytest.raises(OSError, match=r"(?i)input/output error"):
        await read(handle)
    await handle.close()
    with pytest.raises(SnapshotUnusable, match=f"{info.id}.*{pack.stem}"):
        await store.load_lazily(info, [MEMORY])


async def test_without_fuse_all_is_read(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    async def refuse(*_: Any, **__: Any) -> LazyFiles:
        tried.append(1)
        raise Unavailable("no FUSE here", remedy="apt install libfuse3-3")

    monkeypatch.setattr(lazily.LazyFiles, "start", refuse)
    content = {MEMORY: heap(1, PAGES), KERNEL: b"k"}
    info = await saved(store, content)
    for _ in range(2):
        loaded = await store.load_lazily(info, [MEMORY])
        assert not loaded.lazy and loaded.sections[MEMORY].read_bytes() == content[MEMORY]
        loaded.done()
    assert tried == [1]  # it is looked for again after a while, not at each restore


async def test_a_working_set_does_not_grow_by_what_was_prefetched(store: SnapshotStore, tmp_path: Path) -> None:
    """What the kernel read in a life is what it was asked for in advance as well: only the guest's own page map tells."""
    info = await saved(store, {MEMORY: heap(1, PAGES), KERNEL: b"k"})
    sets = lazily.WorkingSets(tmp_path / "snapshots" / "working")

    async def life(*pages: int, told: bool) -> set[int]:
        handle = await opened((await store.load_lazily(info, [MEMORY])).lazy[MEMORY])
        await handle.prefetch()
        with handle.path.open("rb", buffering=0) as f:
            for page in pages:
                os.pread(f.fileno(), PAGE, page * PAGE)
        if told:
            handle.touched(np.array(sorted(pages), dtype=np.intp))
        await handle.close()
        return {n for first, count in sets.read(info.session) for n in range(first, first + count)}

    first = await life(3, told=False)
    assert 3 in first and 200 not in first
    assert await life(200, told=False) == first, "a life that told nothing, of which much was prefetched"
    assert await life(199, 200, 40, told=True) == {40, 199, 200}
    assert await life(told=True) == set()
