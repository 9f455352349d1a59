"""One gVisor sandbox: its channel, its saves, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import select
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rethaw.engines import processes
from rethaw.engines.base import CAPABILITIES, Capture, Exit
from rethaw.engines.cgroups import Group
from rethaw.engines.guestlog import GuestLog
from rethaw.engines.gvisor import clock, direct, epoll
from rethaw.engines.gvisor.exec import GvisorExec
from rethaw.engines.gvisor.runsc import Result, Runsc, call
from rethaw.model import faults
from rethaw.model.errors import EngineError, StorageFull

if TYPE_CHECKING:
    from rethaw.engines.base import SandboxSpec, Terminal

log = logging.getLogger("rethaw.engines")

SECTIONS = ("checkpoint.img", "pages_meta.img", "pages.img")
PAGED = frozenset({"pages.img"})
SAVE_TIMEOUT_S = 120.0
SAVE_SLACK = 64 << 20  # what the sentry itself needs while it saves
# A sentry wakes up every 0.8 ms for as long as it lives, which takes 2.3 % of a CPU; how late it may be makes that 0.9 %
# and 0.3 % (measured with 30 idle guests, runsc 20240729). It is also how late a guest's own timers may be.
SLACK_NS, RESTING_SLACK_NS, PUNCTUAL_SLACK_NS = 4_000_000, 50_000_000, 50_000
PUNCTUAL_S = 1.0  # a start or restore would take 25 ms more with it


class GvisorSandbox:
    """See `engines.base.Sandbox`. Made by the engine around a process that exists already."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def __init__(
        self,
        *,
        id: str,
        spec: SandboxSpec,
        pid: int,
        runsc: Runsc,
        root: Path,
        bundle: Path,
        group: Group,
        limit: int,
        channel: tuple[int, int],
        guest_log: GuestLog,
        cpu: str,
        freeze_clock: Callable[[], bool],
        forget: Callable[[GvisorSandbox], None],
    ) -> None:
        self.id = id
        self.spec = spec
        self.pid = pid
        self.runsc = runsc
        self.root = root
        self.bundle = bundle
        self.group = group
        self.log = guest_log
        self._limit = limit
        self._channel = channel
        self._cpu = cpu
        self._freeze_clock = freeze_clock
        self._forget = forget
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[Exit] = self._loop.create_future()
        self._saving = asyncio.Lock()
        self._staged: list[Path] = []
        self._settling: asyncio.Task[None] | None = None
        self._killed = False
        self._had_exec = False
        self._opened = False
        self._resting = False
        self._slack: asyncio.TimerHandle | None = None
        self._cleaning: asyncio.Task[None] | None = None
        self._pidfd = os.pidfd_open(pid)
        # A pid from a file may be somebody else's by now.
        if not any(argument == id or argument.endswith(id) for argument in processes.command_line(pid)):
            os.close(self._pidfd)
            raise EngineError(f"sandbox {id} died while it was started")
        self._loop.add_reader(self._pidfd, self._died)
        self._stop_oom = group.watch_oom(self._out_of_memory)

    async def open_channel(self) -> None:
        """Wrap the pipe ends. Only for a sandbox that is handed out."""
        stdin, stdout = self._channel
        self._opened = True
        self._slack = self._loop.call_later(PUNCTUAL_S, self._relax)
        self.reader = asyncio.StreamReader(limit=1 << 20, loop=self._loop)
        await self._loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self.reader, loop=self._loop), os.fdopen(stdout, "rb", buffering=0)
        )
        transport, protocol = await self._loop.connect_write_pipe(
            lambda: asyncio.streams.FlowControlMixin(loop=self._loop), os.fdopen(stdin, "wb", buffering=0)
        )
        self.writer = asyncio.StreamWriter(transport, protocol, None, self._loop)

    # ------------------------------------------------------------------ save

    async def precopy(self, directory: Path) -> None:
        """Nothing to gain: runsc reads memory only while the guest stands still."""

    async def capture(self, directory: Path, then: Callable[[], Awaitable[None]] | None = None) -> Capture:
        async with self._saving:
            return await self._capture(directory, then)

    async def _capture(self, directory: Path, then: Callable[[], Awaitable[None]] | None) -> Capture:
        if self._exit.done():
            raise EngineError(f"sandbox {self.id} cannot be saved: {self._exit.result().detail}")
        if self._had_exec:
            raise EngineError(
                f"sandbox {self.id} cannot be saved: a program was run in it by exec",
                remedy="restore its snapshot anew",
            )
        try:
            faults.point("engine.capture.before")
            directory.mkdir(parents=True, exist_ok=True)
            if any(directory.iterdir()):
                raise EngineError(f"{directory} is not empty", remedy="save into a new directory")
        except OSError as error:
            raise _storage(error, directory) from error
        self._make_room(directory)
        before_ns, started = time.time_ns(), time.perf_counter()
        try:
            result = await self._dump(directory)
            engine_ms = (time.perf_counter() - started) * 1000
            after_ns = time.time_ns()
            if result.code != 0:
                raise self._failed_save(result.err or result.out, directory)
            if then is not None:
                await then()
            sections = {name: directory / name for name in SECTIONS}
            raw_bytes = sum(path.stat().st_size for path in sections.values())
            notes: dict[str, object] = {"frozen": False, "why": f"not proven for runsc {self.runsc.features.version}"}
            if self._freeze_clock():
                notes = clock.freeze(sections["checkpoint.img"], before_ns, after_ns)
            await asyncio.to_thread(epoll.hush, sections["checkpoint.img"])
            if not notes["frozen"]:
                log.warning("the clock of %s will jump when it is restored: %s", self.id, notes["why"])
            faults.point("engine.capture.after")
        except BaseException as error:
            for name in SECTIONS:
                with contextlib.suppress(OSError):
                    (directory / name).unlink()
            if isinstance(error, OSError):
                raise _storage(error, directory) from error
            raise
        return Capture(sections, "gvisor", self.runsc.sha256, self._cpu, notes, raw_bytes, engine_ms, PAGED)

    async def _dump(self, directory: Path) -> Result:
        control = self.control
        if control is not None:
            return await direct.save(control, directory, SAVE_TIMEOUT_S)
        flags = self.runsc.checkpoint_flags
        argv = self.runsc.command(self.root, "checkpoint", *flags, f"-image-path={directory}", self.id)
        return await call(argv, SAVE_TIMEOUT_S)

    @property
    def control(self) -> Path | None:
        """The sandbox's own socket, when what is said there is known."""
        path = self.root / f"runsc-{self.id}.sock"
        return path if direct.speaks(self.runsc.features.version) and path.exists() else None

    def _failed_save(self, text: str, directory: Path) -> EngineError | StorageFull:
        text = re.sub(r"\s+", " ", text).strip()[-500:]
        if not self.alive():
            return EngineError(f"sandbox {self.id} died while it was saved: {text}")
        if "no space left" in text or "disk quota exceeded" in text:
            return StorageFull(f"no room in {directory} to save sandbox {self.id}", remedy="free some space there")
        return EngineError(f"runsc could not save sandbox {self.id}: {text}")

    def _make_room(self, directory: Path) -> None:
        """Pages that the sentry writes to memory-backed storage are charged to its own cgroup, for as long as the files
        live: without room for them, saving a guest that uses half its memory would kill it."""
        if self.group.memory is None:
            return
        usage = self.group.usage()
        self.group.raise_limit(max(self._limit, usage) + usage + SAVE_SLACK)
        self._staged.extend(directory / name for name in SECTIONS)
        if self._settling is None or self._settling.done():
            self._settling = self._loop.create_task(self._settle())

    async def _settle(self) -> None:
        """Take the room back as the staged files go."""
        while not self._exit.done():
            await asyncio.sleep(0.25)
            if self._saving.locked():
                continue
            staged = self._staged_bytes()
            if self.group.limit(self._limit + staged) and not staged:
                return

    def _staged_bytes(self) -> int:
        total = 0
        for path in list(self._staged):
            try:
                total += path.stat().st_blocks * 512
            except OSError:
                self._staged.remove(path)
        return total

    # ------------------------------------------------------------------ programs beside the guest's own

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str = "/",
        env: Sequence[tuple[str, str]] = (),
        terminal: Terminal | None = None,
    ) -> GvisorExec:
        async with self._saving:
            if not self.alive():
                raise EngineError(f"sandbox {self.id} is gone: no program can be run in it")
            self._had_exec = True
        flags = [f"-cwd={cwd}", *(f"-cap={name}" for name in CAPABILITIES)]  # its own, not those of PID 1
        if terminal is not None:
            flags.append(f"-env=TERM={terminal.kind}")
        flags += [f"-env={name}={value}" for name, value in env]
        return await GvisorExec.start(self.runsc.command(self.root, "exec", *flags, self.id, *argv), terminal)

    # ------------------------------------------------------------------ end

    async def wait(self) -> Exit:
        return await asyncio.shield(self._exit)

    def alive(self) -> bool:
        """Whether its process runs right now, whatever has been noticed so far."""
        return not self._exit.done() and not select.select([self._pidfd], [], [], 0)[0]

    def kill(self) -> None:
        if not self._exit.done():
            self._killed = True
            processes.kill(self._pidfd)

    def hold(self, held: bool) -> None:
        """Stop what was created ahead, or let it go on: until it is used it has nothing to do, and would do it often."""
        if not self._exit.done():
            processes.stop(self._pidfd, held)

    def rest(self, resting: bool) -> None:
        self._resting = resting
        if self._slack is None:
            self._relax()

    def attend(self) -> None:
        if self._slack is not None:
            self._slack.cancel()
        elif not self._exit.done():
            processes.slacken(self.pid, PUNCTUAL_SLACK_NS)
        self._slack = self._loop.call_later(PUNCTUAL_S, self._relax)

    def _relax(self) -> None:
        self._slack = None
        if not self._exit.done():
            processes.slacken(self.pid, RESTING_SLACK_NS if self._resting else SLACK_NS)

    def cpu_s(self) -> float:
        return sum(processes.cpu_s(pid) for pid in self.group.processes())

    def out_of_memory(self) -> bool:
        return self.group.oom_kills() > 0

    def _out_of_memory(self) -> None:
        # The kernel may have killed only one address space of the guest, which gVisor cannot go on without.
        processes.kill(self._pidfd)

    def _died(self) -> None:
        self._loop.remove_reader(self._pidfd)
        if self._slack is not None:
            self._slack.cancel()
        code = processes.exit_status(self._pidfd, self.pid)
        os.close(self._pidfd)
        self._stop_oom()
        self.log.drain()
        oom = self.group.oom_kills() > 0
        if oom:
            detail = f"out of memory: its limit is {self.spec.memory_bytes >> 20} MiB"
        elif self._killed:
            detail, code = "killed", None
        else:
            tail = self.log.tail[-600:]
            said = f": {tail}" if tail else ""
            detail = f"exited with {code}{said}" if code is not None else f"ended{said}"
        if not self._exit.done():
            self._exit.set_result(Exit(code, oom, detail))

    async def destroy(self) -> None:
        self.kill()
        await self.wait()
        if self._cleaning is None:
            self._cleaning = self._loop.create_task(self._clean())

    async def cleaned(self) -> None:
        """Until nothing of a destroyed sandbox is left on the machine."""
        if self._cleaning is not None:
            await asyncio.shield(self._cleaning)

    async def _clean(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
        if self._opened:
            self.writer.close()
            # Reading on would only see what nobody wants any more.
            transport = getattr(self.reader, "_transport", None)
            if transport is not None:
                transport.close()
        else:
            for fd in self._channel:
                os.close(fd)
        self.log.remove()
        self.group.kill()
        remove_state(self.root, self.id)
        shutil.rmtree(self.bundle, ignore_errors=True)
        await self.group.remove()
        self._forget(self)

    async def memory(self) -> int:
        if self.group.memory is not None:
            return max(0, self.group.usage() - self._staged_bytes())
        try:
            text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        except OSError:
            return 0
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        return int(found.group(1)) * 1024 if found else 0


def remove_state(root: Path, id: str) -> None:
    """What `runsc delete` removes of a dead sandbox, without the 20 ms of a process start (1.4 s with -force)."""
    with contextlib.suppress(OSError):
        for path in root.iterdir():
            if path.name == f"runsc-{id}.sock" or path.name.startswith(f"{id}_sandbox:"):
                with contextlib.suppress(OSError):
                    path.unlink()


def _storage(error: OSError, directory: Path) -> EngineError | StorageFull:
    if error.errno in (28, 122):
        return StorageFull(f"no room in {directory}", remedy="free some space there")
    return EngineError(f"cannot save into {directory}: {error}")
