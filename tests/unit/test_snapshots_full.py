"""Disks and memory that fill up or fail at any step: nothing is left, what was there is unharmed, the next save works."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import KERNEL, MEMORY, files, heap, home_of, keyring, load, noise, place, save, store_in

from rethaw.model import faults
from rethaw.model.errors import RethawError, SnapshotUnusable, StorageFull
from rethaw.snapshots import staging as staging_module
from rethaw.snapshots import store as store_module
from rethaw.snapshots.pages import PAGE
from rethaw.snapshots.store import SnapshotStore

POINTS = ["store.written", "store.verified", "store.between", "store.renamed"]
FIRST = {MEMORY: heap(1, 30) + noise(1, 9 * PAGE), KERNEL: b"state" * 900}
SECOND = {MEMORY: b"changed!" + FIRST[MEMORY][8:] + noise(2, 5), KERNEL: b"other" * 900}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SnapshotStore]:
    store = store_in(tmp_path)
    yield store
    faults.configure("")
    store.close()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("action", ["enospc", "raise"])
async def test_a_write_that_fails_leaves_nothing(store: SnapshotStore, tmp_path: Path, point: str, action: str) -> None:
    first = await save(store, FIRST)
    before = files(tmp_path)
    faults.configure(f"{point}={action}")
    with pytest.raises(StorageFull if action == "enospc" else RethawError, match="free disk space" if action == "enospc" else point):  # fmt: skip
        await save(store, SECOND, parent=first.id)
    assert files(tmp_path) == before
    assert [p.name for p in store.staging.path.iterdir()] == [first.id]
    faults.configure("")
    second = await save(store, SECOND, parent=first.id)
    assert await load(store, first) == FIRST
    assert await load(store, second) == SECOND
    await store.delete(first.id)
    await store.delete(second.id)
    assert files(tmp_path) == []


SYSTEM = ["open", "write", "fsync", "pread", "lseek"]


@pytest.mark.parametrize("call", SYSTEM)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
async def test_a_system_call_that_fails_at_any_pass(
    store: SnapshotStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    code: int,
) -> None:
    """The first, second, ... of them during a save, until none fails any more. Where only the parent cannot be read, the
    save goes on without it."""
    first = await save(store, FIRST)
    before = files(tmp_path)
    honest = getattr(os, call)
    for nth in range(1, 40):
        passes = 0

        def failing(*args: Any, nth: int = nth, **options: Any) -> Any:
            nonlocal passes
            passes += 1
            if passes == nth:
                raise OSError(code, os.strerror(code))
            return honest(*args, **options)

        monkeypatch.setattr(os, call, failing)
        try:
            second = await save(store, SECOND, parent=first.id)
        except (StorageFull, OSError) as error:
            assert isinstance(error, StorageFull) is (code != errno.EIO)
            assert files(tmp_path) == before
            continue
        finally:
            monkeypatch.undo()
        if nth > passes:
            break
        assert "is not compared with" in caplog.text, f"{call} number {nth} failed and nobody noticed"
        assert await load(store, second) == SECOND
        await store.delete(second.id)
        assert files(tmp_path) == before
        caplog.clear()
    else:
        pytest.fail(f"{call} never ran out")
    assert await load(store, first) == FIRST
    assert await load(store, second) == SECOND


@pytest.fixture
def small() -> Iterator[Path]:
    """A tmpfs of 512 KiB."""
    with place() as directory:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k,mode=0700", "tmpfs", str(directory)], check=True)
        try:
            yield directory
        finally:
            subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
@pytest.mark.parametrize("sealed", [False, True])
async def test_a_disk_that_is_really_full(small: Path, sealed: bool) -> None:
    store = store_in(small, keys=keyring() if sealed else None)
    content = [{MEMORY: noise(n, 70 * PAGE), KERNEL: noise(n, 1000)} for n in range(3)]
    first = await save(store, content[0])
    before = files(small)
    with pytest.raises(StorageFull, match=f"{home_of(small)}.*free disk space"):
        await save(store, content[1], parent=first.id)
    assert files(small) == before
    assert await load(store, first) == content[0]
    await store.delete(first.id)
    second = await save(store, content[2])
    assert await load(store, second) == content[2]
    store.close()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
@pytest.mark.parametrize("room", [0, 8, 60, 99])
async def test_a_staging_area_that_fills_up_during_a_load(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Storing into a mapped file without room killed the process, and a blob cut short was handed out."""
    store = store_in(tmp_path)
    memory = b"".join(noise(n % 25, PAGE) for n in range(0, 150, 2))  # scattered: no runs
    content = {MEMORY: memory, KERNEL: noise(3, 100 * 1024)}
    info = await save(store, content, keep=False)
    store.staging.path = small
    filler = small / "filler"
    with filler.open("wb", buffering=0) as file:
        file.write(bytes(512 * 1024 - room * 4096))
    elsewhere, honest = tmp_path, os.statvfs

    def statvfs(path: Path) -> os.statvfs_result:  # the room goes only after it was found
        return honest(elsewhere)

    monkeypatch.setattr(staging_module.os, "statvfs", statvfs)
    with pytest.raises(StorageFull, match="no space left"):
        await store.load(info)
    assert [p.name for p in small.iterdir()] == ["filler"]
    filler.unlink()
    assert await load(store, info) == content
    store.close()


async def test_a_pack_is_verified_before_it_counts(
    store: SnapshotStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = os.pread

    def pread(fd: int, length: int, at: int) -> bytes:
        return bytes(length) if length > 1000 else honest(fd, length, at)

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(SnapshotUnusable, match=r"snap_\d+: pack pk_\w+ is damaged \(frame 0"):
        await save(store, FIRST)
    assert files(tmp_path) == []


async def test_a_manifest_is_verified_before_it_counts(
    store: SnapshotStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(path: Path, data: bytes) -> None:
        path.write_bytes(data[:-1])

    monkeypatch.setattr(store_module, "write_synced", short)
    with pytest.raises(SnapshotUnusable, match=r"snap_\d+: "):
        await save(store, FIRST)
    assert files(tmp_path) == []
