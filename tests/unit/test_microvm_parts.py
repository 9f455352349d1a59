"""Parts of the microVM engine that need no machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rethaw.engines.base import ProbeReport
from rethaw.engines.microvm import assets, initramfs, layout, memory, tsc
from rethaw.engines.microvm.layout import PAGE
from rethaw.engines.microvm.qmp import MAX_LINE, Qmp
from rethaw.engines.microvm.tracking import Tracker
from rethaw.model.errors import EngineError, EngineUnusable
from rethaw.server.doctor import recommended
from rethaw.server.engines import engines_of


def test_an_archive_is_aligned() -> None:
    for size in range(9):
        assert len(initramfs.cpio({"n" * (size + 1): (0o100644, bytes(size))})) % 4 == 0


def test_another_init_makes_another_kernel_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    before = initramfs.digest()
    monkeypatch.setattr(initramfs, "INIT", initramfs.INIT + "# changed")
    assert initramfs.digest() != before


def test_a_part_that_was_written_is_not_taken_for_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file system that is nearly full takes a part of a write."""
    honest = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: honest(fd, bytes(data)[:1000], at))
    (tmp_path / "source").write_bytes(os.urandom(3 * PAGE))
    with (tmp_path / "target").open("w+b") as f:
        f.truncate(3 * PAGE)
        layout.scatter(tmp_path / "source", np.arange(3, dtype=np.int32), f.fileno())
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


def test_the_time_stamp_counter_is_measured() -> None:
    assert 100_000 < tsc.khz() < 10_000_000


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 4)), max_size=6))
def test_holes_cost_nothing_and_everything_comes_back(parts: list[tuple[int, int]]) -> None:
    source, packed, target = (os.memfd_create(name) for name in ("source", "packed", "target"))
    try:
        for fd in (source, target):
            os.ftruncate(fd, 64 * PAGE)
        for at, count in parts:
            os.pwrite(source, os.urandom(count * PAGE), at * PAGE)
        pages = layout.written(source)
        layout.gather(source, 0, pages, np.arange(len(pages)), packed)
        assert os.fstat(packed).st_size == os.fstat(source).st_blocks * 512 == len(pages) * PAGE
        layout.scatter(Path(f"/proc/self/fd/{packed}"), pages, target)
        assert os.pread(source, 64 * PAGE, 0) == os.pread(target, 64 * PAGE, 0)
    finally:
        for fd in (source, packed, target):
            os.close(fd)


DAMAGES: list[tuple[Callable[[Path, Path, Path], object], str]] = [
    (lambda m, d, t: t.write_bytes(b"RTPAGES9" + t.read_bytes()[8:]), "no map"),
    (lambda m, d, t: t.write_bytes(t.read_bytes()[:-1]), "no map"),
    (lambda m, d, t: t.write_bytes(t.read_bytes()[:10]), "pages.map"),
    (lambda m, d, t: t.write_bytes(t.read_bytes()[:-4] + b"\xff\xff\xff\xff"), "cannot be"),
    (lambda m, d, t: t.write_bytes(t.read_bytes()[:-4] + (9).to_bytes(4, "little")), "cannot be"),
    (lambda m, d, t: t.write_bytes(t.read_bytes()[:-4] + bytes(4)), "cannot be"),
    (lambda m, d, t: m.write_bytes(b"x"), "memory.img has 1 bytes"),
    (lambda m, d, t: t.unlink(), "pages.map"),
]


@pytest.mark.parametrize(("change", "said"), DAMAGES)
def test_a_map_that_does_not_fit_is_refused(
    change: Callable[[Path, Path, Path], object], said: str, tmp_path: Path
) -> None:
    memory_file, disk_file, map_file = tmp_path / "memory.img", tmp_path / "disk.img", tmp_path / "pages.map"
    whole = layout.Layout(8 * PAGE, 9 * PAGE, np.array([3, 1], np.int32), np.array([0, 7], np.int32))
    memory_file.write_bytes(bytes(2 * PAGE))
    disk_file.write_bytes(bytes(2 * PAGE))
    map_file.write_bytes(whole.encode())
    found = layout.read(map_file, 2 * PAGE, 2 * PAGE)
    assert (found.memory.tolist(), found.disk.tolist()) == ([3, 1], [0, 7])
    change(memory_file, disk_file, map_file)
    with pytest.raises(EngineError, match=said):
        layout.read(map_file, memory_file.stat().st_size, disk_file.stat().st_size)


async def test_what_is_sealed_cannot_be_changed(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"abcd" * 1024)
    files = memory.Files(asyncio.ensure_future)
    file = files.make(5 * PAGE)
    await files.fill(file, tmp_path / "source", np.array([2], np.int32))
    fd = file.fd
    assert os.pread(fd, 5 * PAGE, 0) == bytes(2 * PAGE) + b"abcd" * 1024 + bytes(2 * PAGE)
    for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, 1 << 20)):
        with pytest.raises(PermissionError):
            change()
    files.release(file)


async def test_clones_share_a_memory_file_for_as_long_as_one_of_them_lives(tmp_path: Path) -> None:
    source, pages = tmp_path / "source", np.arange(2, dtype=np.int32)
    source.write_bytes(b"abcd" * 2048)
    files = memory.Files(asyncio.ensure_future)
    assert files.find(source, 4 * PAGE) is None
    first = files.make(4 * PAGE)
    await files.fill(first, source, pages)
    assert files.find(source, 8 * PAGE) is None, "another size"
    assert files.find(source, 4 * PAGE) is first
    files.release(first)
    assert files.find(source, 4 * PAGE) is first
    source.unlink()
    source.write_bytes(b"efgh" * 2048)
    assert files.find(source, 4 * PAGE) is None, "another file of that name"
    files.release(first)
    files.release(first)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(first.fd)


async def test_a_memory_file_that_cannot_be_filled_is_not_shared(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"short")
    files = memory.Files(asyncio.ensure_future)
    file = files.make(4 * PAGE)
    with pytest.raises(EngineError, match="to their end"):
        await files.fill(file, source, np.arange(2, dtype=np.int32))
    files.release(file)
    assert files.find(source, 4 * PAGE) is None


# ---------------------------------------------------------------- which pages were written

WRITER = """
import ctypes, mmap, sys
file = open(sys.argv[1], "rb") if len(sys.argv) > 1 else None
fd, size = (file.fileno() if file else -1), 64 << 12
memory = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE | (0 if file else mmap.MAP_ANONYMOUS), prot=3)
memory[5 << 12] = 1
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    verb, page = line.split()
    if verb == "write":
        memory[int(page) << 12] = 7
    print(memory[int(page) << 12], flush=True)
"""


@pytest.fixture(params=["anonymous", "file"])
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process without privileges, and where its memory begins."""
    argv = ["/usr/bin/python3", "-c", WRITER]
    if request.param == "file":
        backing = Path(f"/dev/shm/rethaw-test-{os.getpid()}")
        backing.write_bytes(b"x" * (64 << 12))
        argv.append(str(backing))
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", user=65534, group=65534
    )
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    process.kill()
    process.communicate()
    if request.param == "file":
        backing.unlink()


def told(process: subprocess.Popen[str], verb: str, page: int) -> int:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{verb} {page}\n")
    process.stdin.flush()
    return int(process.stdout.readline())


@pytest.mark.root
def test_writes_are_counted_from_one_asking_to_the_next(writer: tuple[subprocess.Popen[str], int]) -> None:
    process, start = writer
    tracker = Tracker(process.pid, start, 64 * PAGE)
    assert told(process, "read", 9) in (0, ord("x"))
    assert told(process, "write", 5) == 7
    assert {5} <= set(tracker.changed().tolist()) <= {5, 9}
    assert tracker.changed().tolist() == []
    for page in (63, 0, 1, 2, 40):
        told(process, "write", page)
    assert tracker.changed().tolist() == [0, 1, 2, 40, 63]
    told(process, "write", 1)
    assert told(process, "read", 40) == 7
    assert tracker.changed().tolist() == [1]
    written, got = memory.mapped(process.pid, start, 64 * PAGE)
    assert written.tolist() in (
        [0, 1, 2, 5, 40, 63], [0, 1, 2, 5, 9, 40, 63],
    ), "protection without a page is no page"  # fmt: skip
    assert {*written.tolist(), 9} <= set(got.tolist()) <= {*written.tolist(), 9}
    tracker.close()


@pytest.mark.root
def test_a_process_whose_writes_cannot_be_counted_runs_on_as_before(writer: tuple[subprocess.Popen[str], int]) -> None:
    process, start = writer
    with pytest.raises(OSError, match="Invalid argument"):
        Tracker(process.pid, start + 1, 64 * PAGE)
    assert told(process, "write", 3) == 7
    assert "userfaultfd" not in " ".join(str(f.readlink()) for f in Path(f"/proc/{process.pid}/fd").iterdir())
    tracker = Tracker(process.pid, start, 64 * PAGE)
    assert told(process, "write", 3) == 7
    assert tracker.changed().tolist() == [3]
    tracker.close()


@pytest.mark.root
def test_where_writes_are_not_counted_a_save_copies_again_all_that_was_ever_written(
    writer: tuple[subprocess.Popen[str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, start = writer
    for counted in (True, False):
        if not counted:

            def refuse(*_: int) -> Tracker:
                raise OSError(38, "not on this kernel")

            monkeypatch.setattr(memory, "Tracker", refuse)
        saver = memory.Memory(process.pid, start, 64 * PAGE, None, layout.NONE)
        assert saver.tracked == counted
        target = tmp_path / f"memory-{counted}"
        saver.ahead(target)
        told(process, "write", 20)
        told(process, "write", 21)
        order = saver.rest(target).tolist()
        content = target.read_bytes()
        for page in (5, 20, 21):
            at = order.index(page) * PAGE
            assert content[at] in (1, 7)
            assert content[at + 1 : at + PAGE] in (bytes(PAGE - 1), b"x" * (PAGE - 1))
        saver.close()


# ---------------------------------------------------------------- QEMU's answers are not trusted

_held: list[socket.socket] = []  # the other ends: a collected one is closed


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    for end in _held:
        end.close()
    _held.clear()


HELLO = json.dumps({"QMP": {"version": {}}}).encode() + b"\n"
DONE = b'{"return": {}}\n'


async def talk(*said: bytes, close: bool = False) -> Qmp:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    _held.append(theirs)

    async def say() -> None:
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(theirs, b"".join(said))
        if close:
            theirs.close()

    speaking = asyncio.ensure_future(say())
    try:
        return await Qmp.connect(ours, 0.5)
    finally:
        speaking.cancel()


async def test_events_between_answers_are_passed_over() -> None:
    qmp = await talk(HELLO, DONE, b'{"event": "STOP", "timestamp": {}}\n', b'{"return": {"status": "paused"}}\n')
    assert await qmp.run("query-status") == {"status": "paused"}
    qmp.close()


@pytest.mark.parametrize(
    "said",
    [b"", b"nonsense\n", b"[]\n", b"{}\n", b"{" * 9999 + b"\n", b'{"QMP": ' + b"1" * MAX_LINE + b"}\n", b"\xff\xfe\n"],
)
@pytest.mark.parametrize("close", [True, False])
async def test_a_qemu_that_says_nothing_sensible(said: bytes, close: bool) -> None:
    with pytest.raises(EngineError, match="QEMU"):
        await talk(said, close=close)


async def test_a_command_that_is_refused_is_told_in_qemus_words() -> None:
    qmp = await talk(HELLO, DONE, b'{"error": {"class": "GenericError", "desc": "no such thing"}}\n')
    with pytest.raises(EngineError, match=r"refuses stop: .*no such thing"):
        await qmp.run("stop")
    qmp.close()


async def test_a_qemu_that_falls_silent() -> None:
    qmp = await talk(HELLO, DONE)
    with pytest.raises(EngineError, match=r"did not answer within 0\.1 s"):
        await qmp.run("stop", timeout_s=0.1)
    qmp.close()


def test_a_layer_has_what_the_tree_has_beyond_its_base(tmp_path: Path) -> None:
    base, rootfs, tree = tmp_path / "base", tmp_path / "rootfs", tmp_path / "tree"
    for name in ("etc/same", "etc/changed", "usr/bin/deep"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    shutil.copytree(base, rootfs, copy_function=os.link)
    (rootfs / "etc/changed").unlink()
    (rootfs / "etc/changed").write_text("otherwise")
    (rootfs / "app/code").mkdir(parents=True)
    (rootfs / "app/code/agent.py").write_text("pass")
    (rootfs / "app/code").chmod(0o711)
    (rootfs / "app/link").symlink_to("code/agent.py")
    (rootfs / "app/empty").mkdir()
    tree.mkdir()
    assert assets._differences(rootfs, base, tree)
    found = {str(p.relative_to(tree)) for p in tree.rglob("*")}
    assert found == {"etc", "etc/changed", "app", "app/code", "app/code/agent.py", "app/link", "app/empty"}
    assert (tree / "etc/changed").read_text() == "otherwise"
    assert (tree / "app/code").stat().st_mode & 0o777 == 0o711
    assert (tree / "app/link").readlink() == Path("code/agent.py")


@pytest.mark.skipif(shutil.which("mke2fs") is None, reason="needs e2fsprogs")
def test_an_image_of_more_files_than_a_disk_took_did_not_boot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A disk took 200,000 files, whatever was in the image."""
    monkeypatch.setattr(assets, "_FILES", 64)
    (tmp_path / "rootfs").mkdir()
    for number in range(3000):
        (tmp_path / "rootfs" / str(number)).touch()
    assets._make_image(tmp_path / "disk", tmp_path / "rootfs")
    said = subprocess.run(["dumpe2fs", "-h", str(tmp_path / "disk")], capture_output=True, text=True, check=True).stdout
    counted = {key: value.strip() for key, _, value in (line.partition(":") for line in said.splitlines())}
    assert int(counted["Inode count"]) - int(counted["Free inodes"]) > 3000


async def test_disks_of_images_that_nobody_needs_go(tmp_path: Path) -> None:
    disks = assets.Assets(tmp_path)
    names = [f"layer-{n}-x.ext4" for n in "abcdef"] + ["image-0-x.ext4", "blank-8192.ext4"]
    for age, name in enumerate(names):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    await disks.prune({"f"}, spare=2)
    assert {p.name for p in tmp_path.iterdir()} == {*names} - {"layer-c-x.ext4", "layer-d-x.ext4", "layer-e-x.ext4"}
    await disks.prune(set(), spare=0)
    assert {p.name for p in tmp_path.iterdir()} == {"blank-8192.ext4"}


def test_a_node_names_the_engines_it_has(tmp_path: Path) -> None:
    engines = engines_of(tmp_path, "qemu", assets=tmp_path)
    assert engines.names == ("qemu", "gvisor")
    assert engines.of(None).name == "qemu"
    assert engines.of("gvisor").name == "gvisor"
    with pytest.raises(EngineUnusable, match="no engine 'xen'; use one of qemu, gvisor"):
        engines.of("xen")


@pytest.mark.parametrize(
    ("works", "said", "ok"),
    [
        ({"gvisor": True, "qemu": True}, "recommended: gvisor; qemu for agents", True),
        ({"gvisor": True, "qemu": False}, "recommended: gvisor", True),
        ({"gvisor": False, "qemu": True}, "recommended: qemu (the default here is gvisor)", False),
        ({"qemu": True, "gvisor": True}, "recommended: gvisor (the default here is qemu)", True),
        ({"gvisor": False, "qemu": False}, "none works", False),
    ],
)
def test_the_doctor_recommends_an_engine(works: dict[str, bool], said: str, ok: bool) -> None:
    found = recommended([ProbeReport(name, good, "1", "") for name, good in works.items()])
    assert found.said.startswith(said) and found.ok is ok
