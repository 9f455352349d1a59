"""The QEMU engine: boots and restores microVMs, by KVM where that works and by TCG elsewhere (see `accelerators`)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rethaw.engines import cgroups as cgroup_layout
from rethaw.engines.base import CAPABILITIES, NOTHING_LAZY, OPEN_FILES, LazySection, ProbeReport, SandboxSpec
from rethaw.engines.home import Home
from rethaw.engines.microvm import accelerators, initramfs, layout, machine, memory
from rethaw.engines.microvm.accelerators import TCG, Accelerator
from rethaw.engines.microvm.assets import REMEDY, Assets, Kernel, disk_id
from rethaw.engines.microvm.qmp import Qmp
from rethaw.engines.microvm.sandbox import DISK, MAP, MEMORY, SECTIONS, STATE, Made, QemuSandbox
from rethaw.engines.shelves import Shelves
from rethaw.model import faults
from rethaw.model.errors import EngineError, EngineMismatch, EngineUnusable, Unavailable
from rethaw.model.ids import new_id

MIB = 1 << 20
DISK_BYTES = 8 << 30  # sparse
GUEST_SLACK = 64 * MIB  # kernel and starter of a guest
HOST_SLACK = 192 * MIB  # QEMU itself, 64 MiB of translated code among it
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Parts:
    """What a guest is made of. `disks`: base and layer of its image."""

    kernel: Kernel
    disks: tuple[Path, Path]
    accelerator: Accelerator


class QemuEngine:
    """See `engines.base.Engine`. `assets`: where kernel and disks of images are kept, shared by whoever likes."""

    name = "qemu"
    fixed_memory = True
    lazy = frozenset({MEMORY})

    def __init__(self, data_dir: Path, assets: Path | None = None, accelerator: Accelerator | None = None) -> None:
        """`accelerator`: whether it works or not; None: the best one that does."""
        data_dir = data_dir.absolute()
        self._home = Home(data_dir, run="vm", mark="guest=", program=machine.QEMU)
        self.assets = Assets(assets or data_dir / "engines" / "microvm")
        self._cgroups = cgroup_layout.detect()
        self._opening = asyncio.Lock()
        self._build: str | None = None
        self._choosing = asyncio.Lock()
        self._accelerator = accelerator
        self.why_not_kvm = ""
        self._turns = asyncio.Semaphore(os.cpu_count() or 1)  # more at once would only make each of them late
        self._files = memory.Files(self._in_background)
        self._shelves = Shelves[QemuSandbox](self._created, self._discard, self._in_background)
        self._live: set[QemuSandbox] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------------ the binary

    async def _open(self) -> Kernel:
        async with self._opening:
            if self._build is None:
                await asyncio.to_thread(self._home.open)
                found = shutil.which(machine.QEMU)
                if found is None:
                    raise EngineUnusable(f"{machine.QEMU} is not installed", remedy=REMEDY)
                kernel = await self.assets.kernel()
                binary = await asyncio.to_thread(lambda: hashlib.sha256(Path(found).read_bytes()))
                binary.update(kernel.digest.encode())
                self._build = binary.hexdigest()
            return await self.assets.kernel()

    async def build(self) -> str:
        await self._open()
        assert self._build is not None
        return self._build

    async def keep_build(self) -> str:
        return await self.build()

    async def fits(self, build: str, cpu: str) -> bool:
        await self._fitting(build, cpu)
        return True

    async def _fitting(self, build: str, cpu: str) -> Accelerator:
        """What a snapshot can go on with. Raises EngineMismatch."""
        own = await self.build()
        if build != own:
            raise EngineMismatch(
                f"this snapshot was taken by another QEMU or guest kernel ({build}, here {own[:12]})",
                remedy="restore it where it was taken, or install that version",
                build=build,
            )
        if cpu == TCG.cpu:  # it is the same everywhere
            return TCG
        best = await self.accelerator()
        if cpu != best.cpu:
            without = f"; here without KVM: {self.why_not_kvm}" if self.why_not_kvm else ""
            raise EngineMismatch(
                f"this snapshot was taken on another kind of CPU ({cpu[:12]}, here {best.cpu[:12]}{without})",
                remedy="restore it on a machine with the CPU it was taken on",
                cpu=cpu,
            )
        return best

    async def accelerator(self) -> Accelerator:
        """What runs new guests. The first time, where there is /dev/kvm, a probe guest's verdict may take a while."""
        async with self._choosing:
            if self._accelerator is None:
                build = await self.build()
                found = await accelerators.choose(self.assets.directory, build, self._try_kvm)
                self._accelerator, self.why_not_kvm = found
        return self._accelerator

    async def _try_kvm(self) -> str:
        from rethaw.engines.microvm import probe  # it needs this module

        other = QemuEngine(self._home.data_dir, self.assets.directory, accelerators.kvm())
        try:
            report = await probe.probe(other, accelerators.PROBE_S)
        finally:
            await other.close()
        works = report.ok and report.notes.get("clock_frozen") is True
        return "" if works else f"a guest with /dev/kvm: {report.detail}"

    async def prune_builds(self, keep: set[str]) -> list[str]:
        return []

    # ------------------------------------------------------------------ boot and restore

    async def boot(self, spec: SandboxSpec) -> QemuSandbox:
        kernel = await self._open()
        accelerator = await self.accelerator()
        faults.point("engine.boot.before")
        blank = await self.assets.blank(DISK_BYTES)
        shared = await self.assets.image(spec)
        async with self._turns:
            return await self._booted(spec, Parts(kernel, shared, accelerator), blank)

    async def _booted(self, spec: SandboxSpec, parts: Parts, blank: Path) -> QemuSandbox:
        sandbox = await self._start(spec, parts, blank, blank.stat().st_size, None)
        try:
            await sandbox.connect(START_TIMEOUT_S)
            try:
                await sandbox.started(START_TIMEOUT_S)
            except EngineError as error:
                where = f"within {spec.memory_bytes // MIB} MiB"
                raise EngineError(f"the guest did not come up {where}: {error.message}") from error
            faults.point("engine.boot.after")
        except BaseException:
            self._discard(sandbox)
            raise
        return sandbox

    async def restore(
        self,
        spec: SandboxSpec,
        sections: dict[str, Path],
        *,
        build: str,
        cpu: str,
        clock: dict[str, object],
        lazy: Mapping[str, LazySection] = NOTHING_LAZY,
    ) -> QemuSandbox:
        kernel = await self._open()
        accelerator = await self._fitting(build, cpu)
        for name in SECTIONS:
            if name not in lazy and (name not in sections or not sections[name].is_file()):
                raise EngineError(f"section {name} is missing", remedy="restore an older snapshot")
        faults.point("engine.restore.before")
        in_memory = lazy[MEMORY].raw_bytes if MEMORY in lazy else sections[MEMORY].stat().st_size
        pages = layout.read(sections[MAP], in_memory, sections[DISK].stat().st_size)
        if pages.memory_bytes != _size(spec):
            raise EngineError(f"section {MEMORY} is not the memory of a guest of {spec.memory_bytes // MIB} MiB")
        shared = await self.assets.image(spec)
        own = await asyncio.to_thread(lambda: [disk_id(path) for path in shared])
        if clock.get("disks") != own:
            raise EngineMismatch(
                f"this snapshot stands on disks of image {spec.image_digest[:12]} that were made elsewhere",
                remedy="restore it where it was taken",
            )
        async with self._turns:
            return await self._restored(spec, Parts(kernel, shared, accelerator), pages, sections, lazy.get(MEMORY))

    async def _restored(
        self,
        spec: SandboxSpec,
        parts: Parts,
        pages: layout.Layout,
        sections: dict[str, Path],
        lazy: LazySection | None,
        *,
        anew: bool = False,
    ) -> QemuSandbox:
        sandbox = ahead = None
        if lazy is not None:
            file = await self._files.lazily(lazy, pages.memory_bytes, pages.memory)
        else:
            file = self._files.find(sections[MEMORY], pages.memory_bytes)
        if not anew and pages.disk_bytes == DISK_BYTES and parts.accelerator is self._accelerator:
            sandbox = ahead = self._shelves.take(spec)
        try:
            if sandbox is not None and file is not None:
                try:
                    await sandbox.take(file)
                except BaseException:
                    self._files.release(file)
                    raise
            if sandbox is None:
                file = file or self._files.make(pages.memory_bytes)
                sandbox = await self._start(spec, parts, None, pages.disk_bytes, file)
            await self._go_on(sandbox, pages, sections)
            faults.point("engine.restore.after")
        except BaseException as error:
            gone = file is not None and file.lazy is not None and not file.lazy.alive()
            if sandbox is not None:
                self._discard(sandbox)
            if gone and isinstance(error, EngineError):  # which says nothing about the snapshot
                raise Unavailable(
                    "what gives the guest's memory ended meanwhile", remedy="it is tried again"
                ) from error
            if ahead is None or not isinstance(error, EngineError):
                raise
        else:
            return sandbox
        # Whatever went wrong with a machine that had waited says nothing about a new one.
        return await self._restored(spec, parts, pages, sections, lazy, anew=True)

    async def _go_on(self, sandbox: QemuSandbox, pages: layout.Layout, sections: dict[str, Path]) -> None:
        """What waits for a snapshot gets it. Pages and disk are filled in while QEMU starts: it reads neither before."""
        made = sandbox.made
        assert made.memory is not None
        filling = [asyncio.to_thread(_fill_disk, sections, pages, made)]
        if made.memory.lazy is None:
            filling.append(self._files.fill(made.memory, sections[MEMORY], pages.memory))
        filled = asyncio.gather(*filling)
        try:
            qmp = await sandbox.connect(START_TIMEOUT_S)
        finally:
            await filled
        sandbox.known = pages.memory
        await sandbox.touch_less(qmp)
        await qmp.run("migrate-incoming", uri=f"fd:{made.state}")
        await _loaded(qmp)
        await qmp.run("cont")
        await sandbox.let_run()

    async def _created(self, spec: SandboxSpec) -> QemuSandbox:
        """One that waits for a snapshot."""
        parts = Parts(await self._open(), await self.assets.image(spec), await self.accelerator())
        file = self._files.make(_size(spec))
        sandbox = await self._start(spec, parts, None, DISK_BYTES, file)
        try:
            await sandbox.connect(START_TIMEOUT_S)
        except BaseException:
            self._discard(sandbox)
            raise
        return sandbox

    async def _start(
        self,
        spec: SandboxSpec,
        parts: Parts,
        disk: Path | None,
        disk_bytes: int,
        file: memory.File | None,
    ) -> QemuSandbox:
        """`disk`: what is on its own at first. `file`: its memory, of a guest that waits for a snapshot; given back if
        there is no sandbox in the end."""
        id = new_id("sb")
        size = _size(spec)
        directory = self._home.path / id

        def start(group: cgroup_layout.Group) -> Made:
            with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:

                def kept(fd: int, stack: contextlib.ExitStack) -> int:
                    stack.callback(os.close, fd)
                    return fd

                directory.mkdir(parents=True, mode=0o700)
                own = kept(os.open(directory / "disk", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), ours)
                os.ftruncate(own, disk_bytes)
                if disk is not None:
                    memory.copy_disk(disk, own)
                saved = kept(os.memfd_create("saved", os.MFD_CLOEXEC), ours)
                state = None if file is None else kept(os.memfd_create("state", os.MFD_CLOEXEC), ours)
                image_fd = initrd = None
                if file is None:
                    image_fd = kept(os.open(parts.kernel.image, os.O_RDONLY | os.O_CLOEXEC), theirs)
                    initrd = kept(os.memfd_create("initrd", os.MFD_CLOEXEC), theirs)
                    with os.fdopen(os.dup(initrd), "wb") as f:
                        f.write(parts.kernel.initramfs.read_bytes())
                        f.write(initramfs.of_one(_config(spec), spec.hostname))
                base, layer = (kept(os.open(path, os.O_RDONLY | os.O_CLOEXEC), theirs) for path in parts.disks)
                pairs = {name: socket.socketpair() for name in machine.SOCKETS}
                for here, there in pairs.values():
                    theirs.callback(there.close)
                    ours.callback(here.close)
                    here.setblocking(False)
                fds = {name: there.fileno() for name, (_, there) in pairs.items()}
                held = None if file is None else file.fd
                files = machine.Files(image_fd, initrd, held, base, layer, own, saved, state, fds)
                argv = machine.command(directory, size, files, parts.accelerator)
                groups = [path for path in group.directories if path.is_dir()]
                pid = machine.start(
                    argv, machine.new_user(), files.all(), directory / "stderr", groups, parts.accelerator.group
                )
                ours.pop_all()
                sockets = {name: here for name, (here, _) in pairs.items()}
                disks = tuple(disk_id(path) for path in parts.disks)
                return Made(directory, pid, group, sockets, file, size, own, saved, state, disks)

        group: cgroup_layout.Group | None = None
        try:
            group = self._cgroups.create(self._home.owner, id, size + HOST_SLACK, 64)
            made = await asyncio.to_thread(start, group)
        except BaseException as error:
            if file is not None:
                self._files.release(file)
            await asyncio.to_thread(shutil.rmtree, directory, True)
            if group is not None:
                await group.remove()
            if isinstance(error, OSError):
                raise EngineError(f"cannot start a sandbox: {error}", remedy="see `rethaw doctor`") from error
            raise
        build = self._build
        assert build is not None
        log_file = self._home.logs / f"sandbox-{id}.log"
        sandbox = QemuSandbox(
            id, spec, made, log_file, build, parts.accelerator.cpu, self._live.discard, self._files.release
        )
        self._live.add(sandbox)
        return sandbox

    def _discard(self, sandbox: QemuSandbox) -> None:
        async def gone() -> None:
            await sandbox.destroy()
            await sandbox.cleaned()

        sandbox.kill()
        self._in_background(gone())

    # ------------------------------------------------------------------ the rest

    async def prepare(self, spec: SandboxSpec, count: int) -> None:
        if count:  # what all guests share, too
            await self._open()
            await self.assets.image(spec)
        self._shelves.prepare(spec, count)

    def ahead(self, spec: SandboxSpec) -> int:
        """How many of `spec` are ready now."""
        return self._shelves.ready(spec)

    async def prune_images(self, keep: set[str]) -> None:
        await self.assets.prune(keep)

    async def probe(self, timeout_s: float = 60.0) -> ProbeReport:
        from rethaw.engines.microvm import probe  # it needs this module

        return await probe.probe(self, timeout_s)

    async def version(self) -> str:
        """What QEMU calls itself."""
        await self._open()
        process = await asyncio.create_subprocess_exec(machine.QEMU, "--version", stdout=asyncio.subprocess.PIPE)
        said, _ = await process.communicate()
        return said.decode(errors="replace").partition("\n")[0].removeprefix("QEMU emulator version ")[:80]

    @property
    def run_dir(self) -> Path:
        """A directory that lives as long as this engine. Only once it was used."""
        return self._home.path

    async def sweep_orphans(self) -> int:
        return await self._home.sweep(self._cgroups)

    async def close(self) -> None:
        self._shelves.close()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for sandbox in list(self._live):
            if not sandbox.alive():
                await sandbox.destroy()
                await sandbox.cleaned()
        await asyncio.to_thread(self._home.close, self._cgroups)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _fill_disk(sections: dict[str, Path], pages: layout.Layout, made: Made) -> None:
    layout.scatter(sections[DISK], pages.disk, made.own)
    assert made.state is not None
    layout.write(made.state, sections[STATE].read_bytes(), 0)


async def _loaded(qmp: Qmp) -> None:
    """Until QEMU has read the state that it was started with."""
    end = asyncio.get_running_loop().time() + START_TIMEOUT_S
    while asyncio.get_running_loop().time() < end:
        status = await qmp.run("query-status")
        if not isinstance(status, dict) or cast("dict[str, object]", status).get("status") != "inmigrate":
            return
        await asyncio.sleep(0.002)
    raise EngineError(f"QEMU did not load the state within {START_TIMEOUT_S:g} s")


def _size(spec: SandboxSpec) -> int:
    """Bytes of the guest's memory: what the program may use, and what kernel and starter need beside it."""
    return -(-(spec.memory_bytes + spec.memory_bytes // 16 + GUEST_SLACK) // (2 * MIB)) * 2 * MIB


def _config(spec: SandboxSpec) -> dict[str, object]:
    limits = {"RLIMIT_NOFILE": OPEN_FILES, "RLIMIT_NPROC": spec.pids, "RLIMIT_CORE": 0}
    return {
        "argv": list(spec.argv),
        "env": spec.environment(),
        "limits": limits,
        "capabilities": list(CAPABILITIES.values()),
        "memory_bytes": spec.memory_bytes,
        "pids": spec.pids,
    }
