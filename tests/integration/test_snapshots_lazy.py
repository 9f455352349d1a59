"""Files that are read out of packs when they are touched: a real FUSE server, real mappings, other users, sudden deaths."""

from __future__ import annotations

import asyncio
import errno
import itertools
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rethaw.model.errors import KeyMissing, RethawError, SnapshotUnusable, Unavailable
from rethaw.snapshots import decode, lazy, lazyd, manifest
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.lazy import LazyFile, LazyFiles
from rethaw.snapshots.pages import PAGE
from rethaw.snapshots.store import SnapshotStore

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs FUSE"),
]
MEMORY, OTHER = "memory.img", "other.img"
KEY = bytes(range(32))
NOBODY = 65534
_ids = itertools.count(1)


def until(condition: Callable[[], Any], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.005)


def mounts(directory: Path) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(directory) in line]


def servers(directory: Path) -> list[str]:
    """Processes that serve something below `directory`, but zombies."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"lazyd" in (said := path.read_bytes()) and str(directory).encode() in said:
                found.append(path.parent.name)
        except OSError:
            continue
    return found


class Place:
    """A store, and files out of it."""

    def __init__(self, directory: Path, keys: Keyring | None = None) -> None:
        self.store = SnapshotStore(directory / "data", keys=keys, kept_bytes=0)
        self.store.open()
        self.home = directory / "data" / "snapshots" / "store"
        self.directory = directory / "lazy"
        self.damage: list[tuple[str, str]] = []
        self.files: LazyFiles | None = None

    async def start(self) -> LazyFiles:
        self.files = await LazyFiles.start(
            self.directory, self.home, self.store.keys, damaged=lambda file, why: self.damage.append((file.name, why))
        )
        return self.files

    async def save(self, memory: bytes, parent: str | None = None) -> str:
        snapshot = f"snap_{next(_ids):05}"
        staged = await self.store.stage(snapshot, len(memory))
        sections = {MEMORY: staged / MEMORY, OTHER: staged / OTHER}
        sections[MEMORY].write_bytes(memory)
        sections[OTHER].write_bytes(b"other")
        await self.store.write(snapshot, sections, (MEMORY,), {"parent": parent, "image": "i"})
        self.store.drop_staged(snapshot)
        return snapshot

    async def open(self, snapshot: str, table: Any, size: int | None = None, section: str = MEMORY) -> LazyFile:
        assert self.files is not None
        numbers = np.asarray(table, dtype=np.int32)
        size = len(numbers) * PAGE if size is None else size
        return await self.files.open(snapshot, self.store.manifest_path(snapshot), section, size, numbers)

    def manifest(self, snapshot: str) -> manifest.Manifest:
        return manifest.decode(self.store.manifest_path(snapshot).read_bytes(), snapshot, self.store.keys)

    def spoil(self, snapshot: str, frame: int) -> None:
        """One byte of a frame, in place, of the pack that the snapshot added."""
        ref = self.manifest(snapshot).packs[-1]
        at = int(self.store.packs.get(ref).index.offsets[frame]) + 20
        with (self.home / f"{ref.id}.pack").open("r+b", buffering=0) as f:
            byte = os.pread(f.fileno(), 1, at)
            os.pwrite(f.fileno(), bytes([byte[0] ^ 1]), at)

    async def close(self) -> None:
        if self.files is not None:
            await self.files.close()
        self.store.close()


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    made = Place(tmp_path)
    yield made
    await made.close()
    assert not mounts(tmp_path)
    assert not servers(tmp_path)
    assert not made.directory.exists()


def noise(seed: int, pages: int) -> bytes:
    return np.random.default_rng(seed).bytes(pages * PAGE)


def changed(memory: bytes, rng: random.Random) -> bytes:
    """Some pages a little, some wholly, some to zeros, some moved."""
    pages = [memory[n : n + PAGE] for n in range(0, len(memory), PAGE)]
    for _ in range(30):
        at = rng.randrange(len(pages))
        words = np.frombuffer(pages[at], dtype=np.uint64).copy()
        words[rng.sample(range(len(words)), 5)] ^= np.uint64(rng.getrandbits(63) | 1)
        pages[at] = words.tobytes()
    for _ in range(5):
        pages[rng.randrange(len(pages))] = rng.randbytes(PAGE)
        pages[rng.randrange(len(pages))] = bytes(PAGE)
    at = rng.randrange(len(pages))
    cut = pages[at : at + 7]
    del pages[at : at + 7]
    to = rng.randrange(len(pages))
    pages[to:to] = cut
    return b"".join(pages)


def laid_out(memory: bytes, table: Any) -> bytes:
    return b"".join(bytes(PAGE) if n < 0 else memory[n * PAGE : (n + 1) * PAGE] for n in np.asarray(table).tolist())


def child(code: str, *descriptors: int, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        pass_fds=descriptors,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def started(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def reading(path: Path) -> bytes:
    return await asyncio.to_thread(path.read_bytes)


@pytest.mark.parametrize("keys", [None, Keyring(KEY)], ids=["clear", "sealed"])
async def test_reads_what_was_saved(tmp_path: Path, place: Place, keys: Keyring | None) -> None:
    place.store.close()
    place.store = SnapshotStore(tmp_path / "data", keys=keys, kept_bytes=0)
    place.store.open()
    await place.start()
    rng = random.Random(7)
    memory, parent, deltas = noise(1, 200) + bytes(20 * PAGE) + noise(2, 80), None, 0
    for _ in range(5):
        parent = await place.save(memory, parent)
        found = place.manifest(parent)
        deltas += int((decode.resolve(found.pages[0], found.packs, place.store.packs).delta_pack >= 0).sum())
        count = len(memory) // PAGE
        straight = await place.open(parent, range(count))
        assert await reading(straight.path) == memory
        assert sum(pages for _, pages in await straight.touched()) == count
        odd = [rng.choice((-1, n, n, rng.randrange(count))) for n in range(count)] + [-1] * 300
        file = await place.open(parent, odd, len(odd) * PAGE - 1000)
        whole = laid_out(memory, odd)[:-1000]
        with file.path.open("rb", buffering=0) as f:
            for _ in range(40):
                at, size = rng.randrange(len(whole) + PAGE), rng.randrange(300_000)
                assert os.pread(f.fileno(), size, at) == whole[at : at + size]
        assert await reading(file.path) == whole
        await straight.close()
        await file.close()
        memory = changed(memory, rng)
    assert deltas > 50
    assert place.damage == []


async def test_a_section_without_pages_and_a_table_that_does_not_fit(place: Place) -> None:
    await place.start()
    snapshot = await place.save(noise(1, 4))
    empty = await place.save(b"")
    assert await reading((await place.open(empty, [-1, -1])).path) == bytes(2 * PAGE)
    assert await reading((await place.open(snapshot, [], 0)).path) == b""
    with pytest.raises(SnapshotUnusable, match=r"table names pages"):
        await place.open(snapshot, [0, 4])
    with pytest.raises(SnapshotUnusable, match=r"table of 1 pages does not fit"):
        await place.open(snapshot, [0], 2 * PAGE)
    with pytest.raises(SnapshotUnusable, match=r"no section"):
        await place.open(snapshot, [0], section=OTHER)
    assert place.files is not None and place.files.alive()
    assert not list(place.directory.glob("*.table"))


async def test_another_user_gets_at_it_by_a_descriptor_only_and_changes_nothing(place: Place) -> None:
    await place.start()
    memory = noise(1, 64)
    file = await place.open(await place.save(memory), range(64))
    fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    code = f"""
import errno, mmap, os
try:
    open({str(file.path)!r})
except PermissionError:
    print("closed")
again = os.open("/proc/self/fd/{fd}", os.O_RDWR)
private = mmap.mmap(again, 0, mmap.MAP_PRIVATE)
print(private[5 * {PAGE} : 5 * {PAGE} + 8].hex())
private[0:{64 * PAGE}] = b"w" * {64 * PAGE}
for what in (
    lambda: mmap.mmap(again, 0, mmap.MAP_SHARED),
    lambda: os.pwrite(again, b"x", 0),
    lambda: os.ftruncate(again, 0),
    lambda: os.open("/proc/self/fd/{fd}", os.O_RDWR | os.O_TRUNC),
    lambda: os.posix_fallocate(again, 0, 1 << 20),
    lambda: os.fchmod(again, 0o777),
    lambda: os.fchown(again, {NOBODY}, {NOBODY}),
):
    try:
        what()
        print("done!")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""
    done = await asyncio.to_thread(child, code, fd, user=NOBODY, group=NOBODY, extra_groups=[])
    assert done.stderr == ""
    said = done.stdout.split()
    assert said[:2] == ["closed", memory[5 * PAGE : 5 * PAGE + 8].hex()]
    assert said[2:] == ["ENODEV", "ENOSYS", "ENOSYS", "EROFS", "ENOSYS", "EPERM", "EPERM"]
    os.close(fd)
    assert await reading(file.path) == memory


async def test_names_do_not_go_and_nothing_is_made(place: Place) -> None:
    await place.start()
    file = await place.open(await place.save(noise(1, 4)), range(4))
    for what in (file.path.unlink, (file.path.parent / "new").mkdir, (file.path.parent / "new").touch):
        with pytest.raises(OSError):
            what()
    assert os.listdir(file.path.parent) == [file.name]  # noqa: PTH208
    await file.close()
    assert os.listdir(file.path.parent) == []  # noqa: PTH208


async def test_private_mappings_share_what_was_read_and_outlive_the_name(place: Place) -> None:
    files = await place.start()
    memory = noise(1, 256)
    snapshot = await place.save(memory)
    file = await place.open(snapshot, range(256))
    with file.path.open("rb") as f:
        one = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        assert one[:] == memory
        asked = (await files.stats())["asked"]
        two = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        one[:PAGE] = bytes(PAGE)
        assert two[:] == memory
        assert (await files.stats())["asked"] == asked
    for path in place.home.glob("*.pack"):  # collected meanwhile
        path.unlink()
    later = await place.open(snapshot, range(256))
    with later.path.open("rb") as f:
        rest = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    await later.close()
    assert not later.path.exists()
    assert rest[:] == memory
    for mapped in (one, two, rest):
        mapped.close()


async def test_prefetch_reads_the_working_set_of_the_last_time(place: Place) -> None:
    files = await place.start()
    memory = noise(1, 2048)
    snapshot = await place.save(memory)
    first = await place.open(snapshot, range(2048))
    with first.path.open("rb", buffering=0) as f:
        for page in (1500, 3, 700):
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            os.pread(f.fileno(), PAGE, page * PAGE)
    recorded = await first.touched()
    # What lies in one frame comes with the page that was asked for.
    assert [page for page, _ in recorded] == [1500, 1488, 3, 0, 700, 688]
    assert sum(count for _, count in recorded) == 48
    second = await place.open(snapshot, range(2048))
    await files.prefetch(second, recorded)
    wanted = {n for page, count in recorded for n in range(page, page + count)}

    async def there() -> set[int]:
        return {n for page, count in await second.touched() for n in range(page, page + count)}

    end = time.monotonic() + 15
    while not wanted <= await there():
        assert time.monotonic() < end
    assert len(await there()) < 600


async def test_damage_reaches_its_readers_only_and_is_reported(place: Place) -> None:
    await place.start()
    memory = noise(1, 160)  # does not compress: frames of 16 pages in order
    snapshot = await place.save(memory)
    other = await place.save(noise(2, 16), snapshot)
    file, sound = await place.open(snapshot, range(160)), await place.open(other, range(16))
    place.spoil(snapshot, 5)
    with file.path.open("rb", buffering=0) as f:
        for page in (0, 79, 96, 159):
            assert os.pread(f.fileno(), PAGE, page * PAGE) == memory[page * PAGE : (page + 1) * PAGE]
        for page in (80, 95):
            with pytest.raises(OSError) as caught:
                os.pread(f.fileno(), PAGE, page * PAGE)
            assert caught.value.errno == errno.EIO
        fd = f.fileno()
        code = f"""
import mmap
mapped = mmap.mmap({fd}, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
print(mapped[79 * {PAGE}], mapped[96 * {PAGE}], flush=True)
print(mapped[85 * {PAGE}])
"""
        done = await asyncio.to_thread(child, code, fd)
    assert done.returncode == -signal.SIGBUS
    assert done.stdout.split() == [str(memory[79 * PAGE]), str(memory[96 * PAGE])]
    assert await reading(sound.path) == noise(2, 16)
    assert len(await file.touched()) > 0  # what was reported came before this answer
    pack = place.manifest(snapshot).packs[-1].id
    assert {name for name, _ in place.damage} == {file.name}
    assert f"pack {pack}" in place.damage[0][1] and "frame 5" in place.damage[0][1]
    assert len(file.damage) == len(place.damage) == 1


async def test_damage_that_is_found_when_it_is_opened(place: Place) -> None:
    await place.start()
    snapshot = await place.save(noise(1, 16))
    path = place.store.manifest_path(snapshot)
    assert place.files is not None
    with pytest.raises(SnapshotUnusable, match="its hash does not match"):
        await place.files.open(snapshot, path, MEMORY, PAGE, np.zeros(1, dtype=np.int32), "00" * 16)
    pack = place.manifest(snapshot).packs[-1].id
    (place.home / f"{pack}.pack").rename(place.home / "gone")
    with pytest.raises(SnapshotUnusable, match="cannot be read") as caught:
        await place.open(snapshot, [0])
    assert caught.value.details["file"] == f"{pack}.pack"
    path.unlink()
    with pytest.raises(SnapshotUnusable, match=r"No such file"):
        await place.open(snapshot, [0])


async def test_a_key_that_is_missing(tmp_path: Path, place: Place) -> None:
    sealed = Place(tmp_path / "sealed", Keyring(KEY))
    snapshot = await sealed.save(noise(1, 16))
    files = await LazyFiles.start(tmp_path / "other", sealed.home, Keyring())
    with pytest.raises(KeyMissing, match="is not configured"):
        await files.open(snapshot, sealed.store.manifest_path(snapshot), MEMORY, PAGE, np.zeros(1, dtype=np.int32))
    await files.close()
    await sealed.close()


async def test_a_server_that_is_killed(place: Place) -> None:
    files = await place.start()
    memory = noise(1, 512)
    snapshot = await place.save(memory)
    file = await place.open(snapshot, range(512))
    with file.path.open("rb", buffering=0) as f:
        mapped = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        assert mapped[:PAGE] == memory[:PAGE]
        (pid,) = servers(place.directory)
        os.kill(int(pid), signal.SIGKILL)
        until(lambda: not file.alive())
        assert not files.alive()
        with pytest.raises(OSError):
            os.pread(f.fileno(), PAGE, 400 * PAGE)
        code = f"import mmap; mmap.mmap({f.fileno()}, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)[400 * {PAGE}]"
        assert (await asyncio.to_thread(child, code, f.fileno())).returncode != 0
    with pytest.raises(Unavailable):
        await file.touched()
    later = await place.open(snapshot, range(512))
    assert files.alive() and later.alive() and not file.alive()
    assert await reading(later.path) == memory
    assert len(mounts(place.directory)) == 1
    await file.close()
    mapped.close()


async def test_a_server_that_is_killed_leaves_no_mount_even_if_nobody_asks(place: Place) -> None:
    await place.start()
    (pid,) = servers(place.directory)
    os.kill(int(pid), signal.SIGKILL)
    end = time.monotonic() + 15
    while mounts(place.directory):
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


async def test_a_call_under_way_when_the_server_dies(place: Place) -> None:
    await place.start()
    snapshot = await place.save(noise(1, 16))
    (pid,) = servers(place.directory)
    os.kill(int(pid), signal.SIGSTOP)
    opening = asyncio.create_task(place.open(snapshot, range(16)))
    end = time.monotonic() + 15
    while not list(place.directory.glob("*.table")):
        assert time.monotonic() < end
        await asyncio.sleep(0.005)
    os.kill(int(pid), signal.SIGKILL)
    with pytest.raises(Unavailable, match="ended"):
        await opening
    assert await reading((await place.open(snapshot, range(16))).path) == noise(1, 16)


async def test_a_server_that_does_not_end_is_made_to(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "_END_S", 0.2)
    await place.start()
    (pid,) = servers(place.directory)
    os.kill(int(pid), signal.SIGSTOP)
    await place.close()
    place.files = None


async def test_a_node_that_is_killed_leaves_nothing(place: Place, tmp_path: Path) -> None:
    snapshot = await place.save(noise(1, 16))
    code = f"""
import asyncio, sys
from pathlib import Path
import numpy as np
from rethaw.snapshots.lazy import LazyFiles
async def main():
    files = await LazyFiles.start(Path({str(place.directory)!r}), Path({str(place.home)!r}))
    path = Path({str(place.store.manifest_path(snapshot))!r})
    file = await files.open({snapshot!r}, path, {MEMORY!r}, {16 * PAGE}, np.arange(16, dtype=np.int32))
    print(file.path, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    with started("-c", code) as node:
        assert node.stdout is not None
        path = Path((await asyncio.to_thread(node.stdout.readline)).decode().strip())
        fd = os.open(path, os.O_RDONLY)
        assert len(os.pread(fd, PAGE, 0)) == PAGE
        node.kill()
        until(lambda: not servers(tmp_path) and not mounts(tmp_path))
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(OSError):
            os.pread(fd, PAGE, 15 * PAGE)
        os.close(fd)
    (place.directory / "old.table").touch()  # had it been opening one
    files = await place.start()
    assert files.alive()
    assert len(list(place.directory.iterdir())) == 1


async def test_a_start_detaches_what_a_killed_server_left(place: Place, tmp_path: Path) -> None:
    left = place.directory / "left"
    left.mkdir(parents=True)
    with started("-m", "rethaw.snapshots.lazyd", str(left)) as server:
        assert server.stdout is not None and b"ready" in await asyncio.to_thread(server.stdout.readline)
        server.kill()
    until(lambda: _dead(left))
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place.directory)], check=True)  # noqa: ASYNC221 - nested
    (place.directory / "inner").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place.directory / "inner")], check=True)  # noqa: ASYNC221
    await place.start()
    assert len(mounts(tmp_path)) == 1


def _dead(mount: Path) -> bool:
    try:
        os.stat(mount)  # noqa: PTH116
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


async def test_where_there_is_no_fuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no.so").write_bytes(b"")
    monkeypatch.setenv("FUSE_LIBRARY_PATH", str(tmp_path / "no.so"))
    with pytest.raises(Unavailable, match=f"apt-get install {lazyd.PACKAGE}"):
        await LazyFiles.start(tmp_path / "lazy", tmp_path)
    assert not (tmp_path / "lazy").exists()
    monkeypatch.delenv("FUSE_LIBRARY_PATH")
    (tmp_path / "file").touch()
    with pytest.raises(RethawError, match="cannot be used"):
        await LazyFiles.start(tmp_path / "file" / "lazy", tmp_path)


async def test_libfuse_2_beside_3_does_not_stand_in_its_way() -> None:
    """The binding takes what is called just `fuse` first."""
    code = """
import ctypes.util
real = ctypes.util.find_library
ctypes.util.find_library = lambda name: "libfuse.so.2" if name == "fuse" else real(name)
from rethaw.snapshots import lazyd
print(lazyd.library().fuse_version_major)
"""
    done = await asyncio.to_thread(child, code)
    assert done.stdout.strip() == "3", done.stderr


async def test_what_lies_in_the_frame_of_a_touched_page_comes_with_it_and_nothing_else(place: Place) -> None:
    files = await place.start()
    memory = noise(1, 64)  # does not compress: frames of 16 pages in order
    file = await place.open(await place.save(memory), [*range(64), *[-1] * 64])
    with file.path.open("rb") as f:
        mapped = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        for page, first in ((37, 32), (100, 96)):
            before = (await files.stats())["asked"]
            assert mapped[page * PAGE] == laid_out(memory, [*range(64), *[-1] * 64])[page * PAGE]
            assert (await files.stats())["asked"] - before == PAGE
            content = laid_out(memory, [*range(64), *[-1] * 64])[first * PAGE : (first + 16) * PAGE]
            assert mapped[first * PAGE : (first + 16) * PAGE] == content
            assert (await files.stats())["asked"] - before == PAGE, "they were there"
        pages = {n for start, count in await file.touched() for n in range(start, start + count)}
        assert pages == {*range(32, 48), *range(96, 112)}
        mapped.close()


TOUCHING = """
import hashlib, mmap, os, random, sys, threading
fd, pages, seed = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
mapped = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
with open(sys.argv[4], "rb") as f:
    expected = f.read()
print("ready", flush=True)
def touch(rng):
    order = list(range(pages))
    rng.shuffle(order)
    for page in order:
        at = page * 4096
        if mapped[at:at + 4096] != expected[at:at + 4096]:
            os.write(1, b"wrong\\n")
threads = [threading.Thread(target=touch, args=(random.Random(seed * 10 + n),)) for n in range(4)]
for one in threads: one.start()
for one in threads: one.join()
print("done", flush=True)
"""


async def _touching(file: LazyFile, expected: Path, pages: int, count: int) -> list[subprocess.Popen[bytes]]:
    out: list[subprocess.Popen[bytes]] = []
    fd = os.open(file.path, os.O_RDONLY)
    for seed in range(count):
        arguments = ["-c", TOUCHING, str(fd), str(pages), str(seed), str(expected)]
        out.append(subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, pass_fds=[fd]))  # noqa: ASYNC220
    os.close(fd)
    for process in out:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == b"ready\n"
    return out


async def test_many_who_touch_the_same_frames_at_once(place: Place, tmp_path: Path) -> None:
    """Pages that are stored wait for those who read them, and the other way round: nobody waits for ever."""
    files = await place.start()
    pages = 2000
    memory = noise(1, pages // 2) + bytes(100 * PAGE) + noise(2, pages // 2 - 100)
    (tmp_path / "expected").write_bytes(memory)
    file = await place.open(await place.save(memory), range(pages))
    processes = await _touching(file, tmp_path / "expected", pages, 3)
    await files.prefetch(file, [(n, 40) for n in range(0, pages - 40, 50)])
    for process in processes:
        out, _ = await asyncio.wait_for(asyncio.to_thread(process.communicate), 60)
        assert out == b"done\n" and process.returncode == 0
    assert files.alive() and place.damage == []


async def test_a_server_that_is_killed_while_many_touch_its_pages(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of storing pages, when it waits for itself."""
    monkeypatch.setattr(lazy, "_WATCH_S", (0.1, 1.0))
    await place.start()
    pages = 4000
    memory = noise(1, pages)
    (tmp_path / "expected").write_bytes(memory)
    snapshot = await place.save(memory)
    for generation in range(6):
        file = await place.open(snapshot, range(pages))
        processes = await _touching(file, tmp_path / "expected", pages, 2)
        await asyncio.sleep(0.01 * generation)
        for pid in servers(place.directory):
            os.kill(int(pid), signal.SIGKILL)
        for process in processes:
            out, _ = await asyncio.wait_for(asyncio.to_thread(process.communicate), 30)
            assert b"wrong" not in out and process.returncode in (-signal.SIGBUS, 0)
        end = time.monotonic() + 30
        while mounts(place.directory) or servers(place.directory):
            assert time.monotonic() < end
            await asyncio.sleep(0.01)


async def test_a_server_that_hangs_is_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "_WATCH_S", (0.05, 0.5))
    await place.start()
    file = await place.open(await place.save(noise(1, 64)), range(64))
    (pid,) = servers(place.directory)
    os.kill(int(pid), signal.SIGSTOP)
    end = time.monotonic() + 15
    while file.alive() or mounts(place.directory):
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    assert await reading((await place.open(file.snapshot, range(64))).path) == noise(1, 64)


async def test_a_server_that_dies_just_after_it_opened_a_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    await place.start()
    snapshot = await place.save(noise(1, 16))
    real = lazy._inode

    def killing(path: Path) -> int:
        for pid in servers(place.directory):
            os.kill(int(pid), signal.SIGKILL)
        until(lambda: not servers(place.directory))
        return real(path)

    monkeypatch.setattr(lazy, "_inode", killing)
    with pytest.raises(Unavailable, match="ended"):
        await place.open(snapshot, range(16))
    monkeypatch.setattr(lazy, "_inode", real)
    assert await reading((await place.open(snapshot, range(16))).path) == noise(1, 16)
