"""What the tests of the snapshot store share: memory files that change as those of agents do, saving, loading."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import tempfile
from collections.abc import Callable, Collection, Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import strategies as st

from rethaw.model.types import SnapshotInfo
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.pages import PAGE
from rethaw.snapshots.staging import staging_for
from rethaw.snapshots.store import SnapshotStore

MEMORY, KERNEL = "pages.img", "kernel.img"
KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
Content = dict[str, bytes]
T = TypeVar("T")
_ids = itertools.count(1)
_opened: list[Path] = []


def new_snapshot() -> str:
    return f"snap_{next(_ids):05}"


def store_in(directory: Path, **options: Any) -> SnapshotStore:
    store = SnapshotStore(directory, **options)
    _opened.append(directory)
    store.open()
    return store


@pytest.fixture(autouse=True)
def swept() -> Iterator[None]:
    """Nothing stays in memory of stores that a test did not close (it killed them, or they did not open)."""
    yield
    while _opened:
        shutil.rmtree(staging_for(_opened.pop()), ignore_errors=True)


@contextmanager
def place() -> Generator[Path]:
    """A data directory of its own, for tests that hypothesis runs many times; nothing of it is left in staging."""
    directory = Path(tempfile.mkdtemp(prefix="rethaw-test-store-", dir="/dev/shm"))
    try:
        yield directory
    finally:
        shutil.rmtree(staging_for(directory), ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def home_of(store_or_data: SnapshotStore | Path) -> Path:
    data = store_or_data if isinstance(store_or_data, Path) else store_or_data.manifest_path("x").parents[2]
    return data / "snapshots" / "store"


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in home_of(directory).iterdir())


def info_of(snapshot: str, parent: str | None, path: str, digest: str, sections: Any, raw: int, stored: int) -> SnapshotInfo:  # fmt: skip
    return SnapshotInfo(
        id=snapshot, session="s_1", parent=parent, line=1, attempt=1, seq=7, generation="g", engine="gvisor",
        engine_build="b", cpu="c", image="i", path=path, digest=digest, sections=sections, resync="00", why="exchange",
        paused_ms=1, durable_ms=2, raw_bytes=raw, stored_bytes=stored,
    )  # fmt: skip


async def staged(store: SnapshotStore, snapshot: str, content: Content) -> dict[str, Path]:
    directory = await store.stage(snapshot, sum(map(len, content.values())))
    sections = {name: directory / name for name in content}
    for name, path in sections.items():
        path.write_bytes(content[name])
    return sections


async def save(
    store: SnapshotStore,
    content: Content,
    *,
    snapshot: str | None = None,
    parent: str | None = None,
    image: str = "image",
    paged: Collection[str] = (MEMORY,),
    keep: bool = True,
) -> SnapshotInfo:
    """As the saver does it. After a failure nothing stays staged."""
    snapshot = snapshot or new_snapshot()
    sections = await staged(store, snapshot, content)
    try:
        written = await store.write(snapshot, sections, paged, {"parent": parent, "image": image})
    except BaseException:
        store.drop_staged(snapshot)
        raise
    if keep:
        store.keep(snapshot)
    else:
        store.drop_staged(snapshot)
    return info_of(
        snapshot, parent, written.path, written.digest, written.sections, written.raw_bytes, written.stored_bytes
    )


async def load(store: SnapshotStore, info: SnapshotInfo, *, kept: bool = False) -> Content:
    """The sections' bytes; read from the store's files unless `kept`."""
    if not kept:
        store.drop_staged(info.id)
    found = await store.load(info)
    try:
        return {name: path.read_bytes() for name, path in found.items()}
    finally:
        store.done(info.id)


# ---------------------------------------------------------------- memory that changes


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def heap(seed: int, pages: int) -> bytes:
    """Pages that compress about as those of a Python heap do."""
    rng = np.random.default_rng(seed)
    words = rng.choice(rng.integers(0, 1 << 48, 64, dtype=np.uint64), (pages, PAGE // 8))
    words[rng.random((pages, PAGE // 8)) < 0.5] = 0
    return words.tobytes()


class Memory:
    """A memory file: a list of pages and an odd end."""

    def __init__(self, pages: Sequence[bytes] = (), tail: bytes = b"") -> None:
        self.pages = list(pages)
        self.tail = tail

    @property
    def data(self) -> bytes:
        return b"".join(self.pages) + self.tail

    def copy(self) -> Memory:
        return Memory(self.pages, self.tail)


# How many 8-byte words of a page change: around the number from which on a page is stored whole, too.
_WORDS = (1, 2, 17, 200, 255, 256, 257, 300, 511, 512)


def _grow(m: Memory, rng: random.Random) -> None:
    at = rng.randint(0, len(m.pages))
    m.pages[at:at] = [rng.randbytes(PAGE) for _ in range(rng.choice((1, 2, 15, 16, 17, 40)))]


def _vanish(m: Memory, rng: random.Random) -> None:
    at = rng.randint(0, len(m.pages))
    del m.pages[at : at + rng.choice((1, 3, 20))]


def _repeat(m: Memory, rng: random.Random) -> None:
    if m.pages:
        one = rng.choice(m.pages)
        for _ in range(rng.choice((1, 5))):
            m.pages[rng.randrange(len(m.pages))] = one


def _move(m: Memory, rng: random.Random) -> None:
    if m.pages:
        at, length = rng.randrange(len(m.pages)), rng.choice((1, 4, 20))
        cut = m.pages[at : at + length]
        del m.pages[at : at + length]
        to = rng.randint(0, len(m.pages))
        m.pages[to:to] = cut


def _zero(m: Memory, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 6))):
        if m.pages:
            m.pages[rng.randrange(len(m.pages))] = bytes(PAGE)


def _words(m: Memory, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 3, 20))):
        if m.pages:
            at = rng.randrange(len(m.pages))
            words = np.frombuffer(m.pages[at], dtype=np.uint64).copy()
            some = rng.sample(range(len(words)), rng.choice(_WORDS))
            words[some] ^= np.uint64(rng.getrandbits(64) | 1)
            m.pages[at] = words.tobytes()


def _wholly(m: Memory, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 3, 20))):
        if m.pages:
            m.pages[rng.randrange(len(m.pages))] = rng.randbytes(PAGE)


def _tail(m: Memory, rng: random.Random) -> None:
    m.tail = rng.choice((b"", bytes(7), rng.randbytes(1), rng.randbytes(PAGE - 1), rng.randbytes(100)))


def _empty(m: Memory, rng: random.Random) -> None:
    m.pages, m.tail = [], b""


CHANGES: dict[str, Callable[[Memory, random.Random], None]] = {
    "grow": _grow, "vanish": _vanish, "repeat": _repeat, "move": _move, "zero": _zero, "words": _words,
    "wholly": _wholly, "tail": _tail, "empty": _empty,
}  # fmt: skip

# "empty" last and once, so that shrinking leaves something to compare.
steps = st.lists(st.sampled_from([*CHANGES, "words", "words", "zero", "grow"]), min_size=1, max_size=4)
seeds = st.integers(0, 1 << 16)


def changed(memory: Memory, names: Sequence[str], seed: int) -> Memory:
    out, rng = memory.copy(), random.Random(seed)
    for name in names:
        CHANGES[name](out, rng)
    return out


def keyring(active: bytes | None = KEY, *old: bytes) -> Keyring:
    return Keyring(active, old)
