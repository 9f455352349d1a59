"""A store under any order of saves, forks, loads, deletions, sweeps and deaths, some of them at once: live snapshots are
always what they were, and in the end nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import threading
from collections.abc import Coroutine, Generator
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from store_fixtures import (
    KERNEL,
    MEMORY,
    Content,
    Memory,
    changed,
    files,
    home_of,
    keyring,
    load,
    noise,
    save,
    seeds,
    steps,
    store_in,
)

from rethaw.model import faults
from rethaw.model.types import SnapshotInfo
from rethaw.snapshots import encode
from rethaw.snapshots.pages import PAGE
from rethaw.snapshots.staging import staging_for

T = TypeVar("T")
POINTS = ["store.written", "store.verified", "store.between", "store.renamed"]


class Died(BaseException):
    """The process ends here: nothing after it in the store's code runs."""


@contextlib.contextmanager
def at_point(name: str, action: Any) -> Generator[None]:
    honest = faults.point
    faults.point = lambda point: action() if point == name else honest(point)  # type: ignore[assignment]
    try:
        yield
    finally:
        faults.point = honest  # type: ignore[assignment]


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="rethaw-test-store-", dir="/dev/shm"))
        self.loop = asyncio.new_event_loop()
        self.store = store_in(self.directory, kept_bytes=600_000)
        self.live: dict[str, tuple[SnapshotInfo, Content]] = {}
        self.memory: dict[str, Memory] = {}
        self.dead: list[str] = []
        self.keys = 0
        self.count = 0

    def teardown(self) -> None:
        for snapshot in list(self.live):
            self.run(self.store.delete(snapshot))
        self.run(self.store.collect(set(), 0.0))
        left = files(self.directory)
        self.store.close()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(staging_for(self.directory), ignore_errors=True)
        shutil.rmtree(self.directory)
        assert left == []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    # ------------------------------------------------------------ steps

    def make(self, parent: str | None, names: list[str], seed: int) -> tuple[str, Memory, Content]:
        self.count += 1
        before = self.memory[parent] if parent in self.memory else Memory([noise(n, PAGE) for n in range(12)])
        memory = changed(before, names, seed)
        content = {MEMORY: memory.data, KERNEL: noise(seed, seed % 3000), "second.img": memory.data[:5000]}
        return f"snap_{self.count:04}", memory, content

    async def saved(self, parent: str | None, names: list[str], seed: int) -> None:
        snapshot, memory, content = self.make(parent, names, seed)
        info = await save(
            self.store, content, snapshot=snapshot, parent=parent, paged=(MEMORY, "second.img"), keep=seed % 3 > 0
        )
        self.live[snapshot] = (info, content)
        self.memory[snapshot] = memory

    async def deleted(self, snapshot: str) -> None:
        del self.live[snapshot]
        self.dead.append(snapshot)
        await self.store.delete(snapshot)

    def one(self, seed: int) -> str:
        return sorted(self.live)[seed % len(self.live)]

    # ------------------------------------------------------------ rules

    @rule(names=steps, seed=seeds)
    def save_alone(self, names: list[str], seed: int) -> None:
        self.run(self.saved(None, names, seed))

    @precondition(lambda self: self.live)
    @rule(names=steps, seed=seeds, of=seeds)
    def save_child(self, names: list[str], seed: int, of: int) -> None:
        self.run(self.saved(self.one(of), names, seed))

    @precondition(lambda self: self.dead)
    @rule(names=steps, seed=seeds)
    def save_child_of_the_dead(self, names: list[str], seed: int) -> None:
        self.run(self.saved(self.dead[seed % len(self.dead)], names, seed))

    @precondition(lambda self: self.live)
    @rule(names=steps, seed=seeds, of=seeds)
    def fork(self, names: list[str], seed: int, of: int) -> None:
        async def both() -> None:
            parent = self.one(of)
            await asyncio.gather(self.saved(parent, names, seed), self.saved(parent, names, seed + 1))

        self.run(both())

    @precondition(lambda self: self.live)
    @rule(of=seeds, kept=st.booleans())
    def load_one(self, of: int, kept: bool) -> None:
        info, content = self.live[self.one(of)]
        assert self.run(load(self.store, info, kept=kept)) == content

    @precondition(lambda self: self.live)
    @rule(of=seeds)
    def delete(self, of: int) -> None:
        self.run(self.deleted(self.one(of)))

    @precondition(lambda self: self.live)
    @rule(names=steps, seed=seeds, of=seeds, victim=seeds, point=st.sampled_from(POINTS), sweep=st.booleans())
    def delete_during_a_save(self, names: list[str], seed: int, of: int, victim: int, point: str, sweep: bool) -> None:
        """The save stands still at `point` until the deletion is through."""
        reached, go_on = threading.Event(), threading.Event()

        def wait() -> None:
            reached.set()
            assert go_on.wait(30)

        async def both() -> None:
            saving = asyncio.create_task(self.saved(self.one(of), names, seed))
            assert await asyncio.to_thread(reached.wait, 30)
            await self.deleted(self.one(victim))
            if sweep and point != "store.renamed":  # from there on only the grace protects it
                await self.store.collect(set(self.live), 0.0)
            go_on.set()
            await saving

        with at_point(point, wait):
            self.run(both())

    @precondition(lambda self: self.live)
    @rule(of=seeds, victim=seeds, other=seeds)
    def load_beside_deletions(self, of: int, victim: int, other: int) -> None:
        async def all_at_once() -> None:
            info, content = self.live[self.one(of)]
            loading = [asyncio.create_task(load(self.store, info, kept=True)) for _ in range(3)]
            gone = self.one(victim)
            if gone != info.id:
                await self.deleted(gone)
            for found in await asyncio.gather(*loading):
                assert found == content
            also = self.live[self.one(other)]
            assert await load(self.store, also[0], kept=True) == also[1]

        self.run(all_at_once())

    @rule()
    def collect(self) -> None:
        assert self.run(self.store.collect(set(self.live), 0.0)) >= 0

    def reopen(self) -> None:
        self.store.close()
        self.store = store_in(self.directory, kept_bytes=600_000, keys=[None, keyring()][self.keys % 2])

    @rule(rotate=st.booleans())
    def restart(self, rotate: bool) -> None:
        if not self.keys:  # once a pack is sealed, the key has to stay
            self.keys += rotate
        self.reopen()

    @rule(names=steps, seed=seeds, of=seeds, point=st.sampled_from(POINTS))
    def die_during_a_save(self, names: list[str], seed: int, of: int, point: str) -> None:
        """Files as they are at `point`, and a new process."""
        aside = self.directory / "aside"

        def die() -> None:
            shutil.copytree(home_of(self.directory), aside)
            raise Died

        parent = self.one(of) if self.live else None
        snapshot, _, content = self.make(parent, names, seed)
        with at_point(point, die), contextlib.suppress(Died):
            self.run(save(self.store, content, snapshot=snapshot, parent=parent, paged=(MEMORY, "second.img")))
        shutil.rmtree(home_of(self.directory))
        aside.rename(home_of(self.directory))
        self.reopen()
        self.dead.append(snapshot)
        if seed % 2:
            self.run(self.store.collect(set(self.live), 0.0))
            assert len([name for name in files(self.directory) if name.endswith(".manifest")]) == len(self.live)

    # ------------------------------------------------------------ always

    @invariant()
    def manifests_are_there(self) -> None:
        assert {f"{snapshot}.manifest" for snapshot in self.live} <= set(files(self.directory))

    @precondition(lambda self: self.live)
    @rule()
    def all_live_ones_are_what_they_were(self) -> None:
        for info, content in self.live.values():
            assert self.run(load(self.store, info)) == content


class FewPacks(StoreMachine):
    """The same with so few packs a snapshot that pages are stored anew all the time."""

    def __init__(self) -> None:
        self.former, encode.MAX_PACKS = encode.MAX_PACKS, 4
        super().__init__()

    def teardown(self) -> None:
        encode.MAX_PACKS = self.former
        super().teardown()


TestStore = StoreMachine.TestCase
TestStore.settings = settings(deadline=None, max_examples=12, stateful_step_count=25)
TestFewPacks = FewPacks.TestCase
TestFewPacks.settings = settings(deadline=None, max_examples=8, stateful_step_count=25)
