"""One microVM: its channel, its saves, its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import secrets
import select
import shutil
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from rethaw.engines import processes
from rethaw.engines.base import Capture, Exit
from rethaw.engines.cgroups import Group
from rethaw.engines.guestlog import GuestLog
from rethaw.engines.microvm import layout, machine, tracking
from rethaw.engines.microvm.exec import Execs
from rethaw.engines.microvm.layout import NONE, Layout, Pages
from rethaw.engines.microvm.memory import File, Memory
from rethaw.engines.microvm.qmp import Qmp
from rethaw.model import faults
from rethaw.model.errors import EngineError, StorageFull

if TYPE_CHECKING:
    from rethaw.engines.base import Exec, SandboxSpec, Terminal

log = logging.getLogger("rethaw.engines")

MEMORY, DISK, MAP, STATE = "memory.img", "disk.img", "pages.map", "machine.img"
SECTIONS = (MEMORY, DISK, MAP, STATE)
PAGED = frozenset({MEMORY, DISK})
STATE_MOST = 16 << 20  # bytes
ANSWER_S, SYNC_S = 20.0, 60.0
_LAST_WORDS_S = 1.0  # until the end of a machine is noticed whose socket is closed
_ENTROPY = 64
# What changes a disk, or may have before it failed. Later QEMUs have the last one.
_WRITES = (
    "wr_operations",
    "unmap_operations",
    "failed_wr_operations",
    "failed_unmap_operations",
    "zone_append_operations",
)
_UNREADABLE = (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)
_ADDRESS = re.compile(r"\bis (0x[0-9a-f]{1,16})\b")
T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """What the engine made for a sandbox. `memory`: the file that its memory is mapped from, unless it boots. Descriptors:
    `own`, its disk; `saved`, where QEMU writes its state; `state`, where it reads one. `sockets`: our ends, by name. `disks`:
    ids of those that it shares."""

    directory: Path
    pid: int
    group: Group
    sockets: dict[str, socket.socket]
    memory: File | None
    size: int
    own: int
    saved: int
    state: int | None
    disks: tuple[str, ...]


class QemuSandbox:
    """See `engines.base.Sandbox`. Made by the engine around a process that it started."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def __init__(
        self,
        id: str,
        spec: SandboxSpec,
        made: Made,
        log_file: Path,
        build: str,
        cpu: str,
        forget: Callable[[QemuSandbox], None],
        release: Callable[[File], None],
    ) -> None:
        self.id = id
        self.spec = spec
        self.pid = made.pid
        self.group = made.group
        self._made = made
        self._prefetching: asyncio.Task[None] | None = None
        self.known: Pages = NONE  # what its memory file has
        self._build, self._cpu = build, cpu
        self._forget = forget
        self._release = release
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[Exit] = self._loop.create_future()
        self._ended: tuple[int, bool] | None = None  # as the guest itself said
        self._killed = False
        self._saving = asyncio.Lock()
        self._cleaning: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._answers: asyncio.Queue[str] = asyncio.Queue()
        self._qmp: Qmp | None = None
        self._execs: Execs | None = None
        self._pages: Memory | None = None  # from the first save on
        self._ahead: Path | None = None  # where the next save has begun
        self._disk_ahead: tuple[int, Pages] | None = None  # writes until its disk was copied there, and what was copied
        self.log = GuestLog(log_file, made.sockets["errors"].detach())
        self._console = GuestLog(log_file.with_name(f"console-{id}.log"), made.sockets["console"].detach())
        self._pidfd = os.pidfd_open(made.pid)
        self._loop.add_reader(self._pidfd, self._died)

    @property
    def made(self) -> Made:
        return self._made

    # ------------------------------------------------------------------ its beginning

    async def connect(self, timeout_s: float) -> Qmp:
        """Take hold of machine and ports. Once: one created ahead is connected already."""
        if self._qmp is not None:
            return self._qmp
        reader, self._control = await machine.streams(self._made.sockets["control"])
        self.reader, self.writer = await machine.streams(self._made.sockets["channel"])
        self._listening = self._loop.create_task(self._listen(reader))
        try:
            self._qmp = await self._or_death(Qmp.connect(self._made.sockets["qmp"], timeout_s))
        except EngineError as error:
            await asyncio.wait([self._exit], timeout=_LAST_WORDS_S)
            if self._exit.done():
                raise EngineError(f"sandbox {self.id} died: {self._exit.result().detail}") from error
            raise
        return self._qmp

    async def take(self, file: File) -> None:
        """One that was created ahead gets another memory file, before it goes on from a snapshot. Raises EngineError."""
        qmp = self._qmp
        assert qmp is not None
        start = await self._memory_start(qmp)
        theirs = await self._or_death(qmp.give(file.fd))
        try:
            await asyncio.to_thread(tracking.map_over, self.pid, start, self._made.size, theirs)
        except OSError as error:
            raise EngineError(f"sandbox {self.id} cannot get another memory: {error}") from error
        former, self._made = self._made.memory, replace(self._made, memory=file)
        if former is not None:
            self._release(former)

    async def touch_less(self, qmp: Qmp) -> None:
        """Of a memory that is read when it is touched."""
        lazy = self._made.memory and self._made.memory.lazy
        if lazy is not None:
            start = await self._memory_start(qmp)
            try:
                await asyncio.to_thread(tracking.small_pages, self.pid, start, self._made.size)
            except OSError as error:
                log.info("QEMU process %d reads its memory in large pieces: %s", self.pid, error)
            self._prefetching = self._loop.create_task(lazy.prefetch())

    async def started(self, timeout_s: float) -> None:
        """Until the guest's own starter has started the program."""
        await self._answer("started", timeout_s)

    async def let_run(self, timeout_s: float = ANSWER_S) -> None:
        """Clock and entropy, then the program."""
        seed = secrets.token_bytes(_ENTROPY).hex()
        await self._tell(f"run {time.time_ns()} {seed}", "running", timeout_s)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ValueError, OSError):
            while line := await reader.readline():
                words = line.decode(errors="replace").split()
                if len(words) == 3 and words[0] == "ended" and words[1].isdigit():
                    self._ended = (int(words[1]), words[2] == "1")
                elif self._answers.qsize() < 16:
                    self._answers.put_nowait(" ".join(words))

    async def _tell(self, line: str, expected: str, timeout_s: float) -> None:
        while not self._answers.empty():
            self._answers.get_nowait()
        self._control.write(line.encode() + b"\n")
        await self._answer(expected, timeout_s)

    async def _answer(self, expected: str, timeout_s: float) -> None:
        try:
            said = await self._or_death(asyncio.wait_for(self._answers.get(), timeout_s))
        except TimeoutError:
            raise EngineError(
                f"the guest of sandbox {self.id} did not say {expected!r} within {timeout_s:g} s"
            ) from None
        if said != expected:
            raise EngineError(f"the guest of sandbox {self.id} said {said[:300]!r} instead of {expected!r}")

    async def _or_death(self, work: Awaitable[T]) -> T:
        """`work`, or EngineError when the machine is gone first."""
        task = asyncio.ensure_future(work)
        await asyncio.wait([task, self._exit], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        with contextlib.suppress(BaseException):
            await task
        raise EngineError(f"sandbox {self.id} died: {self._exit.result().detail}")

    # ------------------------------------------------------------------ save

    async def precopy(self, directory: Path) -> None:
        async with self._saving:
            try:
                await self._copy_ahead(directory)
            except OSError as error:
                with contextlib.suppress(OSError):
                    (directory / MEMORY).unlink()
                self._check_memory(error)
                raise _storage(error, directory) from error

    async def _copy_ahead(self, directory: Path) -> None:
        self._can_be_saved()
        qmp = self._qmp
        assert qmp is not None
        self._ahead = None
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise EngineError(f"{directory} is not empty", remedy="save into a new directory")
        memory = await self._memory(qmp)
        await self._tell("sync", "synced", SYNC_S)
        writes = await self._disk_writes(qmp)
        self._disk_ahead = writes, await asyncio.to_thread(self._copy_disk, directory)
        await asyncio.to_thread(memory.ahead, directory / MEMORY)
        self._ahead = directory

    async def _disk_writes(self, qmp: Qmp) -> int:
        """How often its disk was written, as far as that has ended: more later, if one is under way."""
        said = await self._or_death(qmp.run("query-blockstats"))
        for found in cast("list[dict[str, Any]]", said) if isinstance(said, list) else []:
            stats = found.get("stats")
            if found.get("node-name") == machine.OWN and isinstance(stats, dict):
                counted = cast("dict[str, object]", stats)
                numbers = [counted.get(name) for name in _WRITES]
                return sum(number for number in numbers if isinstance(number, int))
        raise EngineError(f"QEMU does not say how often the disk of sandbox {self.id} was written")

    def _copy_disk(self, directory: Path) -> Pages:
        with (directory / DISK).open("wb", buffering=0) as f:
            disk = layout.written(self._made.own)
            layout.gather(self._made.own, 0, disk, np.arange(len(disk)), f.fileno())
        return disk

    def _check_memory(self, error: OSError) -> None:
        """A guest with pages that nobody can give any more would never be saved again, and die at the next of them."""
        if self._made.memory is not None and self._made.memory.lazy is not None and error.errno in _UNREADABLE:
            log.warning("sandbox %s has lost pages of its memory: %s", self.id, error)
            self.kill()

    def _can_be_saved(self) -> None:
        if self._exit.done():
            raise EngineError(f"sandbox {self.id} cannot be saved: {self._exit.result().detail}")
        if self._execs is not None:
            raise EngineError(f"sandbox {self.id} cannot be saved: a program was run in it")

    async def capture(self, directory: Path, then: Callable[[], Awaitable[None]] | None = None) -> Capture:
        async with self._saving:
            try:
                return await self._capture(directory, then)
            except BaseException as error:
                for name in SECTIONS:
                    with contextlib.suppress(OSError):
                        (directory / name).unlink()
                if isinstance(error, OSError):
                    self._check_memory(error)
                    raise _storage(error, directory) from error
                raise

    async def _capture(self, directory: Path, then: Callable[[], Awaitable[None]] | None) -> Capture:
        self._can_be_saved()
        qmp = self._qmp
        assert qmp is not None
        faults.point("engine.capture.before")
        if self._ahead != directory:
            await self._copy_ahead(directory)
        self._ahead = None
        memory = await self._memory(qmp)
        started = time.perf_counter()
        try:
            await self._tell("quiet", "quiet", ANSWER_S)
            await self._or_death(qmp.run("stop"))
            try:
                await self._or_death(
                    qmp.run("xen-save-devices-state", filename=f"/proc/self/fd/{self._made.saved}", live=False)
                )
                same = self._disk_ahead is not None and await self._disk_writes(qmp) == self._disk_ahead[0]
                pages = await asyncio.to_thread(self._copy_rest, directory, memory, same)
            finally:
                await self._or_death(qmp.run("cont"))
        finally:
            await self._go_on()
        engine_ms = (time.perf_counter() - started) * 1000
        if then is not None:
            await then()
        size = os.fstat(self._made.saved).st_size
        if not 0 < size <= STATE_MOST:
            raise EngineError(f"the state of sandbox {self.id} has {size} bytes, at most {STATE_MOST} are allowed")
        (directory / STATE).write_bytes(os.pread(self._made.saved, size, 0))
        (directory / MAP).write_bytes(pages.encode())
        faults.point("engine.capture.after")
        sections = {name: directory / name for name in SECTIONS}
        clock: dict[str, object] = {"frozen": True, "disks": list(self._made.disks)}
        raw_bytes = sum(path.stat().st_size for path in sections.values())
        return Capture(sections, "qemu", self._build, self._cpu, clock, raw_bytes, engine_ms, PAGED)

    async def _go_on(self) -> None:
        """After a save. A guest that does not get its clock and entropy stands still for ever: it has to go."""
        if self._exit.done():
            return
        try:
            await self.let_run()
        except EngineError:
            self.kill()
            raise

    async def _memory_start(self, qmp: Qmp) -> int:
        said = await self._or_death(qmp.run("human-monitor-command", command_line="gpa2hva 0"))
        found = _ADDRESS.search(said) if isinstance(said, str) else None
        if found is None:
            raise EngineError(f"QEMU does not say where the memory is: {str(said)[:200]}")
        return int(found.group(1), 16)

    async def _memory(self, qmp: Qmp) -> Memory:
        if self._pages is None:
            made = self._made
            start = await self._memory_start(qmp)
            self._pages = await asyncio.to_thread(Memory, self.pid, start, made.size, made.memory, self.known)
        return self._pages

    def _copy_rest(self, directory: Path, pages: Memory, same_disk: bool) -> Layout:
        """`same_disk`: nobody wrote there since it was copied, which is so nearly always: the guest's kernel has just been
        made to write what it had, and keeps what comes after in its memory for some seconds."""
        whole = pages.rest(directory / MEMORY)
        disk = self._disk_ahead[1] if same_disk and self._disk_ahead is not None else self._copy_disk(directory)
        return Layout(self._made.size, os.fstat(self._made.own).st_size, whole, disk)

    # ------------------------------------------------------------------ programs beside the guest's own

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str = "/",
        env: Sequence[tuple[str, str]] = (),
        terminal: Terminal | None = None,
    ) -> Exec:
        if not self.alive():
            raise EngineError(f"sandbox {self.id} is gone")
        if self._execs is None:
            self._execs = Execs(*await machine.streams(self._made.sockets["exec"]))
        return await self._execs.start(argv, cwd, env, terminal)

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
        """Stop what was created ahead, or let it go on."""
        if not self._exit.done():
            processes.stop(self._pidfd, held)

    def rest(self, resting: bool) -> None:
        """Nothing to gain here: an idle guest does not wake up."""

    def attend(self) -> None:
        """It always does."""

    def cpu_s(self) -> float:
        return sum(processes.cpu_s(pid) for pid in self.group.processes())

    def out_of_memory(self) -> bool:
        return self.group.oom_kills() > 0 or (self._ended is not None and self._ended[1])

    def _died(self) -> None:
        self._loop.remove_reader(self._pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self._leaving = self._loop.create_task(self._take_leave())

    async def _take_leave(self) -> None:
        """What the guest said last may still lie in the socket, which has its end now."""
        if self._listening is not None:
            await asyncio.wait([self._listening], timeout=1.0)
        self.log.drain()
        self._console.drain()
        code, oom = self._ended or (None, self.group.oom_kills() > 0)
        tail = self.log.tail[-600:]
        if oom:
            detail = f"out of memory: its limit is {self.spec.memory_bytes >> 20} MiB"
        elif self._killed or code is None:
            detail, code = "killed" if self._killed else f"ended{self._last_words()}", None
        else:
            detail = f"exited with {code}" + (f": {tail}" if tail else "")
        if self._listening is not None:
            self._listening.cancel()
        if not self._exit.done():
            self._exit.set_result(Exit(code, oom, detail))
        os.close(self._pidfd)  # not before: until now somebody may ask whether it lives

    def _last_words(self) -> str:
        said = ""
        with contextlib.suppress(OSError):
            said = (self._made.directory / "stderr").read_text(errors="replace")
        said = " ".join((self._console.tail or said)[-400:].split())
        return f": {said}" if said else ""

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
        if self._prefetching is not None:
            self._prefetching.cancel()
        if self._execs is not None:
            self._execs.close()
        for writer in (getattr(self, "_control", None), getattr(self, "writer", None), self._qmp):
            if writer is not None:
                writer.close()
        for ours in self._made.sockets.values():
            if ours.fileno() >= 0 and self._qmp is None:
                ours.close()
        if self._pages is not None:
            self._pages.close()
        for fd in (self._made.own, self._made.saved, self._made.state):
            if fd is not None:
                os.close(fd)
        if self._made.memory is not None:
            self._release(self._made.memory)
        self.log.remove()
        self._console.remove()
        self.group.kill()
        await asyncio.to_thread(shutil.rmtree, self._made.directory, True)
        await self.group.remove()
        self._forget(self)

    async def memory(self) -> int:
        return self.group.usage() if self.group.memory is not None else self.spec.memory_bytes


def _storage(error: OSError, directory: Path) -> EngineError | StorageFull:
    if error.errno in (28, 122):
        return StorageFull(f"no room in {directory}", remedy="free some space there")
    return EngineError(f"cannot save into {directory}: {error}")
