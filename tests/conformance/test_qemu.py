"""The QEMU engine: a part of the conformance suite that is quick enough for every run, and what only it has."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import ENGINES, IMAGES, ask, restored, until
from test_engine import (  # the same cases, on the fixture below
    test_a_build_that_is_not_here_is_refused_by_name_before_anything_is_read,
    test_a_guest_sees_its_image_and_nothing_of_the_host,
    test_a_program_that_is_not_in_the_image,
    test_an_exit_is_noticed_with_its_code_and_last_words,
    test_forks_differ_in_randomness,
    test_three_generations_of_a_busy_program,
)

from rethaw.engines.base import Engine, SandboxSpec
from rethaw.engines.microvm.accelerators import Accelerator
from rethaw.engines.microvm.engine import QemuEngine
from rethaw.engines.microvm.memory import File
from rethaw.engines.microvm.sandbox import QemuSandbox
from rethaw.model.errors import EngineError, EngineMismatch, Unavailable

pytestmark = pytest.mark.root
__all__ = [
    "test_a_build_that_is_not_here_is_refused_by_name_before_anything_is_read",
    "test_a_guest_sees_its_image_and_nothing_of_the_host",
    "test_a_program_that_is_not_in_the_image",
    "test_an_exit_is_noticed_with_its_code_and_last_words",
    "test_forks_differ_in_randomness",
    "test_three_generations_of_a_busy_program",
]
Boot = Callable[..., Any]


@pytest.fixture
def make_engine() -> Callable[[Path], Engine]:
    return ENGINES["qemu"]


async def test_the_disk_goes_with_the_snapshot(boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path) -> None:
    """Files of one generation are there in the next, and what one clone writes is not seen by the other."""
    box = await boot()
    await ask(box, "open('/srv/file', 'w').write('x' * 300_000)")
    await ask(
        box, "import os; gone = open('/srv/gone', 'w+'); gone.write('still here'); gone.flush(); os.unlink('/srv/gone')"
    )
    saved = await box.capture(staging / "one")
    assert saved.sections["disk.img"].stat().st_size < 64 << 20, "without holes"
    one, two = [await boot(await restored(engine, spec, saved)) for _ in range(2)]
    await ask(one, "open('/srv/file', 'a').write('one')")
    assert await ask(two, "len(open('/srv/file').read())") == 300_000
    assert await ask(one, "len(open('/srv/file').read())") == 300_003
    assert await ask(two, "gone.seek(0) or gone.read()") == "still here"
    again = await one.capture(staging / "two")
    third = await boot(await restored(engine, spec, again))
    assert await ask(third, "open('/srv/file').read()[-4:]") == "xone"


async def test_qemu_needs_no_way_to_private_directories(data_dir: Path, tmp_path: Path, spec: SandboxSpec) -> None:
    """Its user may not pass the node's directories: the kernel, too, is given to it as a descriptor."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    shutil.copytree(IMAGES / "microvm", private / "assets", ignore=shutil.ignore_patterns("*.ext4", ".*"))
    engine = QemuEngine(data_dir, private / "assets")
    box = await engine.boot(spec)
    try:
        assert await ask(box, "1 + 1") == 2
    finally:
        await box.destroy()
        await box.cleaned()
        await engine.close()


async def test_qemu_has_no_privileges(boot: Boot) -> None:
    box = await boot()
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{box.pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert {int(user) for user in status["Uid"].split()}.isdisjoint({0, os.getuid()})
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert (Path(f"/proc/{box.pid}/ns/net").readlink()) != Path("/proc/self/ns/net").readlink()
    assert [line.split(":")[0].strip() for line in Path(f"/proc/{box.pid}/net/dev").read_text().splitlines()[2:]] == [
        "lo"
    ]


async def test_the_memory_of_a_snapshot_cannot_be_changed(
    boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path
) -> None:
    """Clones map one file; nobody, QEMU included, can write to it."""
    box = await boot()
    await ask(box, "mark = 41")
    saved = await box.capture(staging / "one")
    before = (staging / "one" / "memory.img").read_bytes()
    other = await boot(await restored(engine, spec, saved))
    await ask(other, "held = bytes(30 << 20)")
    held = [p for p in Path(f"/proc/{other.pid}/fd").iterdir() if str(p.readlink()).startswith("/memfd:memory")]
    assert held
    with pytest.raises(PermissionError), held[0].open("r+b", buffering=0) as f:
        os.pwrite(f.fileno(), b"x", 0)
    assert (staging / "one" / "memory.img").read_bytes() == before
    assert await ask(await boot(await restored(engine, spec, saved)), "mark + 1") == 42


async def test_a_guest_that_cannot_be_let_run_after_a_save_is_gone(
    boot: Boot, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would stand still for ever, and look alive."""
    box = await boot()

    async def refused(timeout_s: float = 0) -> None:
        raise EngineError("no entropy")

    monkeypatch.setattr(box, "let_run", refused)
    with pytest.raises(EngineError, match="no entropy"):
        await box.capture(staging / "one")
    assert (await asyncio.wait_for(box.wait(), 10)).code is None
    assert not any((staging / "one").iterdir())


async def test_memory_of_another_size_is_refused(boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path) -> None:
    saved = await (await boot()).capture(staging / "one")
    with pytest.raises(EngineError, match=r"memory\.img is not the memory of a guest of 512 MiB"):
        await restored(engine, replace(spec, memory_bytes=512 << 20), saved)


async def test_a_guest_whose_qemu_dies_while_it_is_saved(boot: Boot, staging: Path) -> None:
    box = await boot()
    saving = asyncio.ensure_future(box.capture(staging / "one"))
    await asyncio.sleep(0)
    box.kill()
    with pytest.raises(EngineError, match=r"died|cannot be saved|gone"):
        await saving
    assert not list(staging.glob("one/*"))


@dataclass
class Broken:
    """A file for lazy restores that ends before the memory does."""

    path: Path
    lives: bool
    raw_bytes: int = 0
    users: int = 0

    async def open(self, size: int, table: Any) -> Broken:
        self.path.write_bytes(b"x" * 4096)
        self.users += 1
        return self

    def alive(self) -> bool:
        return self.lives

    async def prefetch(self) -> None: ...

    def touched(self, pages: Any) -> None: ...

    async def close(self) -> None:
        self.users -= 1


@pytest.mark.parametrize(("lives", "error"), [(True, EngineError), (False, Unavailable)])
async def test_pages_that_nobody_gives_are_the_snapshot_s_fault_only_if_their_server_lives(
    boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path, lives: bool, error: type[Exception]
) -> None:
    saved = await (await boot()).capture(staging / "one")
    memory = saved.sections.pop("memory.img")
    lazy = Broken(staging / "file", lives, memory.stat().st_size)
    with pytest.raises(error) as caught:
        await engine.restore(
            spec, saved.sections, build=saved.engine_build, cpu=saved.cpu, clock=saved.clock, lazy={"memory.img": lazy}
        )
    assert type(caught.value) is error
    await until(lambda: lazy.users == 0)


async def test_a_pipe_in_place_of_the_wanted_host_name_does_not_keep_the_starter(boot: Boot, staging: Path) -> None:
    """Nor a link: PID 1 looks there when the program asks for a name, and saves need PID 1."""
    box = await boot()
    await ask(box, "import os; os.makedirs('/run/rethaw', exist_ok=True); os.mkfifo('/run/rethaw/hostname')")
    name = await ask(box, "__import__('socket').gethostname()")
    await ask(box, "os.kill(1, 10)")
    await box.capture(staging / "pipe")
    await ask(box, "os.unlink('/run/rethaw/hostname'); open('/run/elsewhere', 'w').write('linked-name')")
    await ask(box, "os.symlink('/run/elsewhere', '/run/rethaw/hostname')")
    await ask(box, "os.kill(1, 10)")
    await box.capture(staging / "link")
    assert await ask(box, "__import__('socket').gethostname()") == name
    await ask(box, "os.unlink('/run/rethaw/hostname'); open('/run/rethaw/hostname', 'w').write('another-name')")
    await ask(box, "os.kill(1, 10)")
    await box.capture(staging / "name")  # which PID 1 answers after it
    assert await ask(box, "__import__('socket').gethostname()") == "another-name"


async def test_a_machine_that_ends_at_once_says_why(data_dir: Path, spec: SandboxSpec) -> None:
    """As QEMU does with /dev/kvm where that is closed to it, or does not do what it should."""
    broken = Accelerator("kvm", "0" * 64, ("-accel", "tcg", "-cpu", "none-such"))
    engine = QemuEngine(data_dir, IMAGES / "microvm", broken)
    try:
        with pytest.raises(EngineError, match="none-such"):
            await engine.boot(spec)
    finally:
        await engine.close()


async def test_a_snapshot_goes_on_with_the_accelerator_it_was_taken_under(
    boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path, data_dir: Path
) -> None:
    """One of TCG beside others under KVM; one of KVM nowhere else, and the refusal says so."""
    box = await boot()
    await ask(box, "x = 41")
    saved = await box.capture(staging / "one")
    other = QemuEngine(data_dir, IMAGES / "microvm", Accelerator("kvm", "0" * 64, ("-accel", "none-such")))
    try:
        assert await other.fits(saved.engine_build, saved.cpu)
        again = await other.restore(spec, saved.sections, build=saved.engine_build, cpu=saved.cpu, clock=saved.clock)
        assert await ask(again, "x + 1") == 42
        await again.destroy()
        await again.cleaned()
        with pytest.raises(EngineMismatch, match="another kind of CPU"):
            await engine.fits(saved.engine_build, "0" * 64)
    finally:
        await other.close()


async def test_a_clone_of_one_that_lives_goes_into_a_machine_created_ahead_and_shares_its_memory(
    boot: Boot, engine: QemuEngine, spec: SandboxSpec, staging: Path
) -> None:
    box = await boot()
    await ask(box, "data = bytes(range(256)) * 40_000")
    saved = await box.capture(staging / "one")
    first = await boot(await restored(engine, spec, saved))
    await engine.prepare(spec, 1)
    await until(lambda: engine.ahead(spec) == 1, 20)
    ahead = {path.name for path in engine.run_dir.glob("sb_*")}
    await engine.prepare(spec, 1)
    second = await boot(await restored(engine, spec, saved))
    assert second.id in ahead
    assert second.made.memory is first.made.memory
    await ask(second, "data = data[::-1]")
    assert await ask(first, "data == bytes(range(256)) * 40_000") is True
    assert await ask(second, "data == (bytes(range(256)) * 40_000)[::-1]") is True
    again = await second.capture(staging / "two")
    await first.destroy()
    third = await boot(await restored(engine, spec, again))
    assert await ask(third, "data == (bytes(range(256)) * 40_000)[::-1]") is True


async def test_a_machine_created_ahead_that_dies_while_it_takes_a_memory_is_replaced(
    boot: Boot, engine: QemuEngine, spec: SandboxSpec, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = await (await boot()).capture(staging / "one")
    first = await boot(await restored(engine, spec, saved))
    await engine.prepare(spec, 1)
    await until(lambda: engine.ahead(spec) == 1, 20)
    real = QemuSandbox.take

    async def killed(self: QemuSandbox, file: File) -> None:
        os.kill(self.pid, signal.SIGKILL)
        await real(self, file)

    monkeypatch.setattr(QemuSandbox, "take", killed)
    second = await boot(await restored(engine, spec, saved))
    assert await ask(second, "1 + 1") == 2
    memory = first.made.memory
    assert memory is not None and memory.users == 2, "the one that died has given it back"


async def test_a_disk_that_is_written_between_the_copy_and_the_pause_is_copied_again(
    boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it is not: a pause does not grow with what is on the disk."""
    copies: list[Path] = []
    writes: list[int] = []
    copy, count = QemuSandbox._copy_disk, QemuSandbox._disk_writes

    def copied(self: QemuSandbox, directory: Path) -> Any:
        copies.append(directory)
        return copy(self, directory)

    async def counted(self: QemuSandbox, qmp: Any) -> int:
        writes.append(await count(self, qmp))
        return writes[-1]

    monkeypatch.setattr(QemuSandbox, "_copy_disk", copied)
    monkeypatch.setattr(QemuSandbox, "_disk_writes", counted)
    box = await boot()
    await ask(box, "import os; f = open('/srv/file', 'wb'); f.write(b'a' * 5_000_000); f.flush()")
    await ask(box, "f.write(b'b' * 1000); f.flush()")
    for n in range(10):  # a guest's kernel writes what is left to write when it likes
        directory = staging / f"calm-{n}"
        await box.precopy(directory)
        calm = await box.capture(directory)
        quiet = writes[-1] == writes[-2]
        assert copies.count(directory) == (1 if quiet else 2)
        if quiet:
            break
    else:
        pytest.fail(f"the guest wrote to its disk in each pause: {writes}")
    copies.clear()
    await box.precopy(staging / "busy")
    await ask(box, "f.write(b'c' * 5_000_000); f.flush(); os.fsync(f.fileno())")
    busy = await box.capture(staging / "busy")
    assert copies == [staging / "busy", staging / "busy"]
    await box.precopy(staging / "cut")
    await ask(box, "os.ftruncate(f.fileno(), 1000); os.fsync(f.fileno())")
    cut = await box.capture(staging / "cut")
    for saved, size in ((calm, 5_001_000), (busy, 10_001_000), (cut, 1000)):
        again = await boot(await restored(engine, spec, saved))
        # From the disk, not from what the guest's kernel has of it in memory.
        await ask(again, "os.sync(); open('/proc/sys/vm/drop_caches', 'w').write('3')")
        assert await ask(again, "len(open('/srv/file', 'rb').read())") == size
        content = "(b'a' * 5_000_000 + b'b' * 1000 + b'c' * 5_000_000)"
        assert await ask(again, f"open('/srv/file', 'rb').read() == {content}[:{size}]") is True
        await again.destroy()
