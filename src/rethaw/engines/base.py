"""What an engine is: something that boots, saves and restores sandboxes. Knows sections, paths and pids; no sessions.

Sizes are bytes, times milliseconds where the name ends in `_ms`, else seconds. Everything is asyncio; no call here
blocks the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# Of a guest's programs. Capabilities: what apt, dpkg, pip and git need as root, and what a dev server on port 80 needs, with
# Linux' numbers. All of it is about the guest's own kernel; none of it reaches the host.
CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_KILL": 5,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
}
# Of guestd alone, beside those: a fork gets a host name of its own.
GUESTD_CAPABILITIES = {**CAPABILITIES, "CAP_SYS_ADMIN": 21}
OPEN_FILES = 65536


@dataclass(frozen=True)
class Base:
    """A tree, by digest."""

    digest: str
    rootfs: Path


@dataclass(frozen=True)
class SandboxSpec:
    """All that a sandbox is made of. Equal specs can share sandboxes created ahead, so nothing about a session is here.

    `memory_bytes` is what the guest may use; the engine adds its own overhead to the limit it sets on the host. `base`: the
    tree that `rootfs` was made from by adding to it, whose files it links to.
    """

    image_digest: str
    rootfs: Path
    memory_bytes: int
    pids: int
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    hostname: str = "agent"
    base: Base | None = None

    def environment(self) -> dict[str, str]:
        """`env`, and what every program expects."""
        return {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            **dict(self.env),
        }


@dataclass(frozen=True)
class Capture:
    """What a save wrote. `sections`: name to file, all inside the directory given to `Sandbox.capture`.

    `cpu` is the digest of the CPU features that a restore needs, `clock` the engine's own notes for the frozen clock
    (give both back to `Engine.restore`), `engine_ms` the time the engine itself took. `paged`: the sections that are pages
    of memory, most of them as in the capture before.
    """

    sections: dict[str, Path]
    engine: str
    engine_build: str
    cpu: str
    clock: dict[str, object]
    raw_bytes: int
    engine_ms: float
    paged: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Exit:
    """How a sandbox ended. `code` is None when nobody could tell (it was killed). `oom`: it hit its memory limit."""

    code: int | None
    oom: bool
    detail: str


@dataclass(frozen=True)
class ProbeReport:
    """What became of a guest that went through boot, save and restore. `remedy` is empty when `ok`."""

    engine: str
    ok: bool
    version: str
    detail: str
    remedy: str = ""
    boot_ms: float | None = None
    save_ms: float | None = None
    restore_ms: float | None = None
    notes: Mapping[str, object] = field(default_factory=dict[str, object])


@dataclass(frozen=True)
class Terminal:
    """A terminal for a program: its size in characters and the name of its kind."""

    columns: int = 80
    rows: int = 24
    kind: str = "xterm-256color"


class Exec(Protocol):
    """A program started in a sandbox beside the one that it was made for."""

    async def read(self) -> tuple[str, bytes] | None:
        """The next bytes that it wrote, with "stdout" or "stderr" (a terminal's are all "stdout"). None once it has
        ended and all was read; what its children still write after its end is not waited for."""
        ...

    async def write(self, data: bytes) -> None:
        """To its standard input; waits while that is full. Nothing happens when nobody reads there any more."""
        ...

    def end_input(self) -> None:
        """Its standard input has ended. A terminal's does not end: there Ctrl-D (byte 4) says so."""
        ...

    def resize(self, columns: int, rows: int) -> None:
        """The terminal has another size now; nothing happens without one."""
        ...

    async def wait(self) -> int:
        """Its exit code (128 + signal for a killed one). When the sandbox died under it, some code but 0."""
        ...

    async def close(self) -> None:
        """Let go of it. Whoever wants the program to be gone for certain destroys the sandbox."""
        ...


class Sandbox(Protocol):
    """One running sandbox. `reader` and `writer` are its standard output and input: the channel."""

    id: str
    pid: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def precopy(self, directory: Path) -> None:
        """Begin a save into `directory` (created if missing, must be empty) while the guest runs, so that `capture` into
        the same directory needs less time. Engines that have nothing to gain by it do nothing. Raises as `capture`.
        """
        ...

    async def capture(self, directory: Path, then: Callable[[], Awaitable[None]] | None = None) -> Capture:
        """Save into `directory` (created if missing, must be empty but for a `precopy`); the guest always runs on
        afterwards.

        `then` is awaited as soon as the guest's state is there: what an engine still does to the files need not keep
        the guest waiting. What it raises is raised, and the save is void.

        Raises EngineError (StorageFull when there was no room) with the guest still running, unless it died; and in a
        sandbox that had an `exec`.
        """
        ...

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str = "/",
        env: Sequence[tuple[str, str]] = (),
        terminal: Terminal | None = None,
    ) -> Exec:
        """Run `argv` beside the guest's own processes, with the guest's environment and `env` on top.

        Only for sandboxes that are thrown away: engines cannot save one that had an exec (gVisor's next restore would
        panic), so `capture` raises EngineError from now on. Raises EngineError when the sandbox is gone. A program that
        does not exist shows in its exit code alone.
        """
        ...

    async def wait(self) -> Exit:
        """Until the sandbox is gone. May be called by several tasks, and again later."""
        ...

    def kill(self) -> None:
        """SIGKILL at once. Does not wait; `wait` resolves a few milliseconds later."""
        ...

    async def destroy(self) -> None:
        """Kill and clean up. Returns once no process of it is left; slow cleaning goes on in the background."""
        ...

    def rest(self, resting: bool) -> None:
        """A hint: while it rests, the guest waits for nothing but its channel, and may be late for its own timers (by up
        to 50 ms) where that saves CPU."""
        ...

    def attend(self) -> None:
        """A hint: somebody waits for what the guest does next. For a second it is as punctual as it can be."""
        ...

    def out_of_memory(self) -> bool:
        """Whether the kernel killed some of it for its memory limit, as seen right now. Then the rest of it is not to
        be trusted: what looks like a program that ended by itself may be one that was killed."""
        ...

    def cpu_s(self) -> float:
        """Seconds of CPU time that its processes have used, engine overhead included; 0 where nobody counts. Falls when
        one of them ends."""
        ...

    async def memory(self) -> int:
        """Bytes that it takes on the host right now, engine overhead included."""
        ...


class LazyFile(Protocol):
    """A file whose pages are read when they are touched."""

    @property
    def path(self) -> Path:
        """Where it may be opened until `close`."""
        ...

    def alive(self) -> bool:
        """Whether pages that were not read yet can be."""
        ...

    async def prefetch(self) -> None:
        """Let what will probably be touched be read ahead. After it was mapped: a mapping may drop what was read."""
        ...

    def touched(self, pages: NDArray[np.intp]) -> None:
        """Pages of it that the guest has got, as ascending numbers: what a later `prefetch` is for."""
        ...

    async def close(self) -> None:
        """One user less. Descriptors and mappings stay good."""
        ...


class LazySection(Protocol):
    """A section of a snapshot that was not read."""

    @property
    def raw_bytes(self) -> int:
        """How long it is."""
        ...

    async def open(self, size: int, table: NDArray[np.int32]) -> LazyFile:
        """A file of `size` bytes with the pages of the section that `table` names, -1: zeros. Restores of the same snapshot
        share it. Raises SnapshotUnusable, Unavailable."""
        ...


NOTHING_LAZY: Mapping[str, LazySection] = MappingProxyType({})


class Engine(Protocol):
    """Makes sandboxes. One per node process and data directory."""

    name: str
    fixed_memory: bool  # a guest can only be restored with the memory that it had
    lazy: frozenset[str]  # sections that `restore` need not have as files

    async def build(self) -> str:
        """sha256 hex of the engine binary in use. Raises EngineUnusable when there is none that fits."""
        ...

    async def boot(self, spec: SandboxSpec) -> Sandbox:
        """A new sandbox that runs `spec.argv`."""
        ...

    async def prepare(self, spec: SandboxSpec, count: int) -> None:
        """Keep `count` sandboxes of `spec` created ahead (0: none); filled and refilled in the background."""
        ...

    async def restore(
        self,
        spec: SandboxSpec,
        sections: dict[str, Path],
        *,
        build: str,
        cpu: str,
        clock: dict[str, object],
        lazy: Mapping[str, LazySection] = NOTHING_LAZY,
    ) -> Sandbox:
        """A new sandbox that goes on where `sections` were captured. The files are read, never changed. What is in `lazy` need
        not be among them; Unavailable when who gives it is gone.

        Its monotonic clock goes on from the value it had at the capture. Raises EngineMismatch, naming what differs,
        before any page is read; EngineError when the engine could not read the sections.
        """
        ...

    async def probe(self, timeout_s: float = 30.0) -> ProbeReport:
        """Take a small guest through boot, save and restore. Never raises for an engine that does not work."""
        ...

    async def keep_build(self) -> str:
        """Copy the engine binary into the data directory (once), so that snapshots outlive upgrades; its sha256."""
        ...

    async def fits(self, build: str, cpu: str) -> bool:
        """Whether a snapshot of that build can be restored here. Raises EngineMismatch naming CPU features that lack."""
        ...

    async def prune_builds(self, keep: set[str]) -> list[str]:
        """Remove kept binaries that no snapshot needs any more (`keep`: digests that some does); their digests."""
        ...

    async def prune_images(self, keep: set[str]) -> None:
        """Remove what was made of images that nobody needs any more (`keep`: digests of those that somebody does)."""
        ...

    async def sweep_orphans(self) -> int:
        """Remove what dead node processes of this data directory left behind; the number of sandboxes found."""
        ...

    async def close(self) -> None:
        """Discard sandboxes created ahead and wait for background work. Sandboxes handed out are not touched."""
        ...
