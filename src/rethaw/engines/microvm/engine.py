"""The QEMU engine: boots and restores microVMs, by TCG (KVM is still to come)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, cast

from rethaw.engines import cgroups as cgroup_layout
from rethaw.engines.base import CAPABILITIES, OPEN_FILES, ProbeReport, SandboxSpec
from rethaw.engines.home import Home
from rethaw.engines.microvm import initramfs, layout, machine, memory, tsc
from rethaw.engines.microvm.assets import REMEDY, Assets, Kernel, disk_id
from rethaw.engines.microvm.qmp import Qmp
from rethaw.engines.microvm.sandbox import DISK, MAP, MEMORY, SECTIONS, STATE, Made, QemuSandbox
from rethaw.model import faults
from rethaw.model.errors import EngineError, EngineMismatch, EngineUnusable
from rethaw.model.ids import new_id

MIB = 1 << 20
DISK_BYTES = 8 << 30  # sparse
GUEST_SLACK = 64 * MIB  # kernel and starter of a guest
HOST_SLACK = 192 * MIB  # QEMU itself, 64 MiB of translated code among it
START_TIMEOUT_S = 120.0


class QemuEngine:
    """See `engines.base.Engine`. `assets`: where kernel and disks of images are kept, shared by whoever likes."""

    name = "qemu"
    fixed_memory = True

    def __init__(self, data_dir: Path, assets: Path | None = None) -> None:
        data_dir = data_dir.absolute()
        self._home = Home(data_dir, run="vm", mark="guest=", program=machine.QEMU)
        self.assets = Assets(assets or data_dir / "engines" / "microvm")
        self._cgroups = cgroup_layout.detect()
        self._opening = asyncio.Lock()
        self._build: str | None = None
        self._cpu = hashlib.sha256(b"qemu tcg max").hexdigest()
        self._turns = asyncio.Semaphore(os.cpu_count() or 1)  # more at once would only make each of them late
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
                await asyncio.to_thread(tsc.khz)
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
        self._check(build, cpu, await self.build())
        return True

    def _check(self, build: str, cpu: str, own: str) -> None:
        if build != own:
            raise EngineMismatch(
                f"this snapshot was taken by another QEMU or guest kernel ({build}, here {own[:12]})",
                remedy="restore it where it was taken, or install that version",
                build=build,
            )
        if cpu != self._cpu:
            raise EngineMismatch(
                f"this snapshot was taken on another kind of CPU ({cpu[:12]}, here {self._cpu[:12]})",
                remedy="restore it on a machine with the CPU it was taken on",
                cpu=cpu,
            )

    async def prune_builds(self, keep: set[str]) -> list[str]:
        return []

    # ------------------------------------------------------------------ boot and restore

    async def boot(self, spec: SandboxSpec) -> QemuSandbox:
        kernel = await self._open()
        faults.point("engine.boot.before")
        blank = await self.assets.blank(DISK_BYTES)
        shared = await self.assets.image(spec)
        async with self._turns:
            return await self._booted(spec, kernel, shared, blank)

    async def _booted(self, spec: SandboxSpec, kernel: Kernel, shared: tuple[Path, Path], blank: Path) -> QemuSandbox:
        sandbox = await self._start(spec, kernel, shared, blank, None, None)
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
        self, spec: SandboxSpec, sections: dict[str, Path], *, build: str, cpu: str, clock: dict[str, object]
    ) -> QemuSandbox:
        kernel = await self._open()
        self._check(build, cpu, await self.build())
        for name in SECTIONS:
            if name not in sections or not sections[name].is_file():
                raise EngineError(f"section {name} is missing", remedy="restore an older snapshot")
        faults.point("engine.restore.before")
        pages = layout.read(sections[MAP], sections[MEMORY], sections[DISK])
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
            return await self._restored(spec, kernel, shared, pages, sections)

    async def _restored(
        self,
        spec: SandboxSpec,
        kernel: Kernel,
        shared: tuple[Path, Path],
        pages: layout.Layout,
        sections: dict[str, Path],
    ) -> QemuSandbox:
        sandbox = await self._start(spec, kernel, shared, sections[DISK], pages, sections)
        try:
            qmp = await sandbox.connect(START_TIMEOUT_S)
            await _loaded(qmp)
            await qmp.run("cont")
            await sandbox.let_run()
            faults.point("engine.restore.after")
        except BaseException:
            self._discard(sandbox)
            raise
        return sandbox

    async def _start(
        self,
        spec: SandboxSpec,
        kernel: Kernel,
        shared: tuple[Path, Path],
        disk: Path,
        pages: layout.Layout | None,
        sections: dict[str, Path] | None,
    ) -> QemuSandbox:
        """`disk`: a whole one, or with `pages` what is on it."""
        id = new_id("sb")
        size = _size(spec)
        directory = self._home.path / id
        try:
            group = self._cgroups.create(self._home.owner, id, size + HOST_SLACK, 64)
        except OSError as error:
            raise EngineError(f"cannot prepare a sandbox: {error}", remedy="see `rethaw doctor`") from error

        def start() -> Made:
            with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:

                def kept(fd: int, stack: contextlib.ExitStack) -> int:
                    stack.callback(os.close, fd)
                    return fd

                directory.mkdir(parents=True, mode=0o700)
                own = kept(os.open(directory / "disk", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), ours)
                held, state = None, None
                if pages is None or sections is None:
                    os.ftruncate(own, disk.stat().st_size)
                    memory.copy_disk(disk, own)
                else:
                    os.ftruncate(own, pages.disk_bytes)
                    layout.scatter(disk, pages.disk, own)
                    held = kept(memory.sealed(sections[MEMORY], pages.memory, size), ours)
                    state = kept(os.open(sections[STATE], os.O_RDONLY | os.O_CLOEXEC), theirs)
                saved = kept(os.memfd_create("state", os.MFD_CLOEXEC), ours)
                image_fd = kept(os.open(kernel.image, os.O_RDONLY | os.O_CLOEXEC), theirs)
                initrd = kept(os.memfd_create("initrd", os.MFD_CLOEXEC), theirs)
                with os.fdopen(os.dup(initrd), "wb") as f:
                    f.write(kernel.initramfs.read_bytes())
                    f.write(initramfs.of_one(_config(spec), spec.hostname))
                base, layer = (kept(os.open(path, os.O_RDONLY | os.O_CLOEXEC), theirs) for path in shared)
                pairs = {name: socket.socketpair() for name in machine.SOCKETS}
                for here, there in pairs.values():
                    theirs.callback(there.close)
                    ours.callback(here.close)
                    here.setblocking(False)
                fds = {name: there.fileno() for name, (_, there) in pairs.items()}
                files = machine.Files(image_fd, initrd, held, base, layer, own, saved, state, fds)
                argv = machine.command(directory, size, files)
                groups = [path for path in group.directories if path.is_dir()]
                pid = machine.start(argv, machine.new_user(), files.all(), directory / "stderr", groups)
                ours.pop_all()
                sockets = {name: here for name, (here, _) in pairs.items()}
                disks = tuple(disk_id(path) for path in shared)
                known = layout.NONE if pages is None else pages.memory
                return Made(directory, pid, group, sockets, held, known, size, own, saved, disks)

        try:
            made = await asyncio.to_thread(start)
        except BaseException as error:
            await asyncio.to_thread(shutil.rmtree, directory, True)
            await group.remove()
            if isinstance(error, OSError):
                raise EngineError(f"cannot start a sandbox: {error}", remedy="see `rethaw doctor`") from error
            raise
        build = self._build
        assert build is not None
        log_file = self._home.logs / f"sandbox-{id}.log"
        sandbox = QemuSandbox(id, spec, made, log_file, build, self._cpu, self._live.discard)
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
        """Nothing is made ahead but what all guests share."""
        if count:
            await self._open()
            await self.assets.image(spec)

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
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for sandbox in list(self._live):
            if not sandbox.alive():
                await sandbox.destroy()
                await sandbox.cleaned()
        await asyncio.to_thread(self._home.close, self._cgroups)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


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
