"""The gVisor engine: boots, restores and keeps sandboxes ahead."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from rethaw.engines import cgroups as cgroup_layout
from rethaw.engines import cpu as cpu_features
from rethaw.engines.base import NOTHING_LAZY, LazySection, ProbeReport, SandboxSpec
from rethaw.engines.guestlog import GuestLog
from rethaw.engines.gvisor import clock as saved_clock
from rethaw.engines.gvisor import direct
from rethaw.engines.gvisor import spec as oci
from rethaw.engines.gvisor.runsc import Builds, Result, Runsc, call, spawn
from rethaw.engines.gvisor.sandbox import SECTIONS, GvisorSandbox
from rethaw.engines.home import Home
from rethaw.engines.shelves import Shelves
from rethaw.model import faults
from rethaw.model.errors import EngineError, EngineMismatch
from rethaw.model.ids import new_id

log = logging.getLogger("rethaw.engines")

START_TIMEOUT_S = 60.0
AT_ONCE = (os.cpu_count() or 1) + 2  # boots and restores; each keeps one CPU busy, and more of them only wait longer
RESTORE_MS = 300.0  # a small guest takes 60-120 ms, 1 GiB about 0.9 s; a sleep may end late, never early
RESTORE_BYTES_PER_MS = 1.2e6
PIPE_BYTES = 256 << 10
# Builds on which the frozen clock was checked by hand; any other is believed once its own probe has shown it.
PROBE_IMAGE = "probe"
CLOCK_CHECKED = re.compile(r"^(release-20240729|0\.0~20240729)\b")


class GvisorEngine:
    """See `engines.base.Engine`. `data_dir` is the node's data directory; several engines may share one."""

    name = "gvisor"
    fixed_memory = False
    lazy: frozenset[str] = frozenset()  # runsc reads all of it

    def __init__(self, data_dir: Path) -> None:
        self._home = Home(data_dir.absolute())
        self._cgroups = cgroup_layout.detect()
        self._builds = Builds(self._home.engines, ignore_cgroups=not self._cgroups.works)
        self._runsc: Runsc | None = None
        self._cpu: frozenset[str] = frozenset()
        self._opening = asyncio.Lock()
        self._at_once = asyncio.Semaphore(AT_ONCE)
        self._shelves = Shelves[GvisorSandbox](self._create_current, self._discard, self._in_background)
        self._live: set[GvisorSandbox] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------------ the binary

    async def _open(self) -> Runsc:
        """The build this engine uses from its first use on, whatever becomes of the file on PATH."""
        async with self._opening:
            if self._runsc is None:
                await asyncio.to_thread(self._home.open)
                if self._cgroups.notes:
                    log.warning("sandboxes run without limits of memory and processes: %s", self._cgroups.notes)
                self._cpu = await asyncio.to_thread(cpu_features.features)
                await asyncio.to_thread(cpu_features.remember, self._home.engines / "cpu", self._cpu)
                self._runsc = await self._builds.current()
            return self._runsc

    async def build(self) -> str:
        return (await self._open()).sha256

    async def version(self) -> str:
        """What the build calls itself."""
        return (await self._open()).features.version

    async def keep_build(self) -> str:
        return (await self._open()).sha256

    async def fits(self, build: str, cpu: str) -> bool:
        current = await self._open()
        self._check_cpu(cpu)
        if build == current.sha256:
            return True
        try:
            await self._builds.kept(build)
        except EngineMismatch:
            return False
        return True

    async def prune_builds(self, keep: set[str]) -> list[str]:
        """Remove kept builds that no snapshot needs any more (`keep`: those that some does); their digests."""
        return await self._builds.prune(keep if self._runsc is None else keep | {self._runsc.sha256})

    def prove_clock(self) -> None:
        """The probe saw the clock of this build stand still."""
        if self._runsc is not None and not CLOCK_CHECKED.match(self._runsc.features.version):
            self._clock_proof(self._runsc).touch()

    def _clock_proof(self, runsc: Runsc) -> Path:
        return self._home.engines / runsc.sha256 / "clock-proven"

    def _freezes(self, runsc: Runsc, spec: SandboxSpec) -> bool:
        if CLOCK_CHECKED.match(runsc.features.version) or spec.image_digest == PROBE_IMAGE:
            return True
        return self._clock_proof(runsc).exists()

    # ------------------------------------------------------------------ boot and restore

    async def boot(self, spec: SandboxSpec) -> GvisorSandbox:
        runsc = await self._open()
        faults.point("engine.boot.before")

        async def start(sandbox: GvisorSandbox) -> Result:
            return await call(runsc.command(sandbox.root, "start", sandbox.id), START_TIMEOUT_S)

        sandbox = await self._begin(self._shelves.take(spec), spec, runsc, "start", start)
        return await self._hand_out(sandbox, "engine.boot.after")

    async def restore(
        self,
        spec: SandboxSpec,
        sections: dict[str, Path],
        *,
        build: str,
        cpu: str,
        clock: dict[str, object],
        lazy: Mapping[str, LazySection] = NOTHING_LAZY,
    ) -> GvisorSandbox:
        current = await self._open()
        runsc = current if build == current.sha256 else await self._builds.kept(build)
        self._check_cpu(cpu)
        for name in SECTIONS:
            if name not in sections or not sections[name].is_file():
                raise EngineError(f"section {name} is missing", remedy="restore an older snapshot")
        faults.point("engine.restore.before")
        ahead = self._shelves.take(spec) if runsc is current else None
        links = self._home.path / "restore" / new_id("r")

        async def restore(sandbox: GvisorSandbox) -> Result:
            control, files = sandbox.control, sections
            if control is None or saved_clock.sleeps_of(clock)[1]:
                await asyncio.to_thread(_link, links, sections, clock)
                files = {name: links / name for name in SECTIONS}
            if control is not None:
                result = await direct.restore(control, files, START_TIMEOUT_S)
                if result.code == 0:
                    direct.note_running(sandbox.root, sandbox.id)
                return result
            flags = ("-detach", f"-image-path={links}", f"-bundle={sandbox.bundle}")
            return await call(runsc.command(sandbox.root, "restore", *flags, sandbox.id), START_TIMEOUT_S)

        try:
            sandbox = await self._begin(ahead, spec, runsc, "restore", restore)
        finally:
            if links.exists():
                self._in_background(asyncio.to_thread(shutil.rmtree, links, True))
        return await self._hand_out(sandbox, "engine.restore.after")

    def _check_cpu(self, cpu: str) -> None:
        if cpu == cpu_features.digest(self._cpu):
            return
        needed = cpu_features.recall(self._home.engines / "cpu", cpu)
        if needed is None:
            raise EngineMismatch(
                f"this snapshot was taken on another CPU (features {cpu[:12]}, here {cpu_features.digest(self._cpu)[:12]})",
                remedy="restore it on a machine with the CPU it was taken on",
                cpu=cpu,
            )
        missing = sorted(needed - self._cpu)
        if missing:
            raise EngineMismatch(
                f"this snapshot needs CPU features that are not here: {' '.join(missing)}",
                remedy="restore it on a machine that has them",
                cpu=cpu,
            )

    async def _begin(
        self,
        ahead: GvisorSandbox | None,
        spec: SandboxSpec,
        runsc: Runsc,
        verb: str,
        give_life: Callable[[GvisorSandbox], Awaitable[Result]],
    ) -> GvisorSandbox:
        """Bring a created sandbox to life (`ahead`, or a new one); it is destroyed when that fails."""
        sandbox = ahead
        try:
            async with self._at_once:
                sandbox = sandbox or await self._create(spec, runsc)
                result = await give_life(sandbox)
            if result.code == 0:
                return sandbox
            # What died while it waited says nothing about the next one.
            if ahead is None or ahead.alive() or ahead.group.oom_kills():
                raise self._refused(verb, spec, sandbox.group, result.err or result.out)
        except BaseException:
            if sandbox is not None:
                self._discard(sandbox)
            raise
        self._discard(sandbox)
        return await self._begin(None, spec, runsc, verb, give_life)

    def _refused(self, verb: str, spec: SandboxSpec, group: cgroup_layout.Group, text: str) -> EngineError:
        text = re.sub(r"\s+", " ", text).strip()[-600:]
        if group.oom_kills() > 0:
            return EngineError(
                f"runsc {verb} ran out of memory within {spec.memory_bytes >> 20} MiB", remedy="raise the memory limit"
            )
        return EngineError(f"runsc {verb} failed: {text or 'it said nothing'}", remedy="see `rethaw doctor`")

    async def _create(self, spec: SandboxSpec, runsc: Runsc) -> GvisorSandbox:
        """A sandbox that waits for `start` or `restore`."""
        id = new_id("sb")
        root = self._home.root(runsc.sha256)
        limit = oci.memory_limit(spec.memory_bytes)
        try:
            # runsc tells the guest the limit it finds as MemTotal, and leaves a cgroup that exists as it is.
            group = self._cgroups.create(self._home.owner, id, spec.memory_bytes, oci.task_limit(spec.pids))
            bundle = oci.write_bundle(spec, self._home.bundle(id), None if runsc.ignore_cgroups else group.path)
        except OSError as error:
            raise EngineError(
                f"cannot prepare a sandbox with {limit} bytes: {error}", remedy="see `rethaw doctor`"
            ) from error
        pid_file = root / f"{id}.pid"
        guest_in, our_in = os.pipe2(os.O_CLOEXEC)
        our_out, guest_out = os.pipe2(os.O_CLOEXEC)
        our_err, guest_err = os.pipe2(os.O_CLOEXEC)
        guest_log = GuestLog(self._home.logs / f"sandbox-{id}.log", our_err)
        code: int | None = None
        try:
            for fd in (our_in, our_out):
                with contextlib.suppress(OSError):
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            argv = runsc.command(root, "create", f"-bundle={bundle}", f"-pid-file={pid_file}", id)
            try:
                code = await spawn(argv, guest_in, guest_out, guest_err, START_TIMEOUT_S)
            finally:
                for fd in (guest_in, guest_out, guest_err):
                    os.close(fd)
            guest_log.drain()
            if code != 0:
                raise self._refused("create", spec, group, guest_log.tail)
            group.raise_limit(limit)
            try:
                pid = int(pid_file.read_text())
                sandbox = GvisorSandbox(
                    id=id,
                    spec=spec,
                    pid=pid,
                    runsc=runsc,
                    root=root,
                    bundle=bundle,
                    group=group,
                    limit=limit,
                    channel=(our_in, our_out),
                    guest_log=guest_log,
                    cpu=cpu_features.digest(self._cpu),
                    freeze_clock=lambda: self._freezes(runsc, spec),
                    forget=self._live.discard,
                )
            except (OSError, ValueError) as error:
                raise self._refused("create", spec, group, guest_log.tail or str(error)) from None
            finally:
                pid_file.unlink(missing_ok=True)
        except BaseException:
            for fd in (our_in, our_out):
                os.close(fd)
            guest_log.remove()
            self._in_background(self._remove_failed(runsc, root, id, group))
            raise
        self._live.add(sandbox)
        return sandbox

    async def _remove_failed(self, runsc: Runsc, root: Path, id: str, group: cgroup_layout.Group) -> None:
        group.kill()
        with contextlib.suppress(EngineError):
            await call(runsc.command(root, "delete", "-force", id), START_TIMEOUT_S)
        group.kill()
        shutil.rmtree(self._home.bundle(id), ignore_errors=True)
        await group.remove()

    async def _hand_out(self, sandbox: GvisorSandbox, fault_point: str) -> GvisorSandbox:
        try:
            faults.point(fault_point)
            await sandbox.open_channel()
        except BaseException:
            self._discard(sandbox)
            raise
        return sandbox

    # ------------------------------------------------------------------ created ahead

    async def prepare(self, spec: SandboxSpec, count: int) -> None:
        self._shelves.prepare(spec, count)

    def ahead(self, spec: SandboxSpec) -> int:
        """How many of `spec` are ready now."""
        return self._shelves.ready(spec)

    async def _create_current(self, spec: SandboxSpec) -> GvisorSandbox:
        return await self._create(spec, await self._open())

    def _discard(self, sandbox: GvisorSandbox) -> None:
        sandbox.kill()
        self._in_background(self._destroyed(sandbox))

    async def _destroyed(self, sandbox: GvisorSandbox) -> None:
        await sandbox.destroy()
        await sandbox.cleaned()

    # ------------------------------------------------------------------ the rest

    async def probe(self, timeout_s: float = 30.0) -> ProbeReport:
        from rethaw.engines.gvisor import probe  # it needs this module

        return await probe.probe(self, timeout_s)

    @property
    def run_dir(self) -> Path:
        """A directory that lives as long as this engine. Only once it was used."""
        return self._home.path

    def limits(self) -> str:
        """What is limited by cgroups here, for a reader."""
        return self._cgroups.notes or f"cgroup v{self._cgroups.version}"

    async def prune_images(self, keep: set[str]) -> None:
        """It makes nothing of images."""

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
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("background work of the engine failed", exc_info=task.exception())


def _link(directory: Path, sections: dict[str, Path], notes: dict[str, object]) -> None:
    """The sections under the names that runsc wants. It follows links, so only a kernel state in which some program
    sleeps by the wall clock is copied, to move the end of that sleep."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    saved_ns, sleeps = saved_clock.sleeps_of(notes)
    for name in SECTIONS:
        if name == "checkpoint.img" and sleeps:
            restore_ms = RESTORE_MS + sections["pages.img"].stat().st_size / RESTORE_BYTES_PER_MS
            state = saved_clock.shift(sections[name].read_bytes(), sleeps, saved_ns, restore_ms)
            (directory / name).write_bytes(state)
        else:
            (directory / name).symlink_to(sections[name].absolute())
