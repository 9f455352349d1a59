"""Memory and task limits by cgroup, version 1 or 2, whichever holds the controllers on this machine.

    v1: /sys/fs/cgroup/{memory,pids,...}/rethaw/OWNER/NAME     v2: /sys/fs/cgroup/rethaw/OWNER/NAME

Limits are set here; an engine that puts its processes in by itself is told `Group.path`. It may make the directory in
hierarchies that we do not use, so all of them are cleaned.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("rethaw.engines")
_MOUNTS = Path("/proc/self/mounts")
_OOM_LOOKS = 200  # after a notice, so often ...
_OOM_LOOK_S = 0.01  # ... at this pause


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _write(path: Path, value: str) -> None:
    # One unbuffered write: the kernel's answer (EBUSY when a limit is below what is used) must not be lost in a buffer.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _counter(text: str, name: str) -> int:
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return 0


@dataclass(frozen=True)
class Group:
    """The cgroup of one sandbox. `memory` and `pids` are its directories, None where no controller limits them; `path`
    is where it is below the root of each hierarchy in `mounts`."""

    path: str
    memory: Path | None
    pids: Path | None
    version: int
    mounts: tuple[Path, ...]

    @property
    def directories(self) -> list[Path]:
        return [mount / self.path.lstrip("/") for mount in self.mounts]

    def limit(self, memory_bytes: int) -> bool:
        """Set the memory limit; False when more than that is in use (the limit then stays as it was)."""
        if self.memory is None:
            return True
        if self.version == 2:
            # v2 would kill instead of refusing.
            if self.usage() > memory_bytes:
                return False
            _write(self.memory / "memory.max", str(memory_bytes))
            return True
        try:
            _write(self.memory / "memory.limit_in_bytes", str(memory_bytes))
        except OSError:
            return False
        # With swap, memory alone would only push pages out. Swap accounting may be off: then there is no such file.
        with contextlib.suppress(OSError):
            _write(self.memory / "memory.memsw.limit_in_bytes", str(memory_bytes))
        return True

    def raise_limit(self, memory_bytes: int) -> None:
        """Set a limit above the present one (v1 wants the memory+swap limit moved first)."""
        if self.memory is None:
            return
        if self.version == 1:
            with contextlib.suppress(OSError):
                _write(self.memory / "memory.memsw.limit_in_bytes", str(memory_bytes))
        self.limit(memory_bytes)

    def usage(self) -> int:
        """Bytes charged to it, page cache and files it wrote to memory-backed storage included."""
        if self.memory is None:
            return 0
        text = _read(self.memory / ("memory.current" if self.version == 2 else "memory.usage_in_bytes"))
        return int(text) if text.strip() else 0

    def oom_kills(self) -> int:
        if self.memory is None:
            return 0
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        return _counter(_read(self.memory / name), "oom_kill")

    def tasks(self) -> int:
        """Host tasks (threads) in it now."""
        return int(_read(self.pids / "pids.current") or 0) if self.pids is not None else 0

    def processes(self) -> list[int]:
        found: set[int] = set()
        for directory in self.directories:
            found.update(int(p) for p in _read(directory / "cgroup.procs").split())
        return sorted(found)

    def kill(self) -> None:
        """SIGKILL to everything in it. Whoever is in there was started for it."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def watch_oom(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` in the running loop when the kernel killed something in it; returns what ends the watch.

        Only v1 needs this: v2 kills the group as a whole (memory.oom.group)."""
        if self.memory is None or self.version == 2:
            return lambda: None
        loop = asyncio.get_running_loop()
        try:
            event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            control = os.open(self.memory / "memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
            try:
                _write(self.memory / "cgroup.event_control", f"{event} {control}")
            finally:
                os.close(control)
        except OSError as error:
            log.warning("no notice of out-of-memory kills in %s: %s", self.memory, error)
            return lambda: None

        def fired() -> None:
            with contextlib.suppress(OSError):
                os.eventfd_read(event)
            look(_OOM_LOOKS)

        def look(left: int) -> None:
            # The notice comes before the kernel has chosen its victim, and memory may be found without one.
            if self.oom_kills():
                callback()
            elif left and stop_once:
                loop.call_later(_OOM_LOOK_S, look, left - 1)

        def stop() -> None:
            if stop_once:
                stop_once.clear()
                loop.remove_reader(event)
                os.close(event)

        stop_once = [True]
        loop.add_reader(event, fired)
        return stop

    async def remove(self, timeout_s: float = 10.0) -> bool:
        """Remove its directories once the last process is gone; False when one stayed."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        pause = 0.005
        left = self.directories
        while left:
            for directory in list(left):
                with contextlib.suppress(FileNotFoundError, OSError):
                    directory.rmdir()
                if not directory.exists():
                    left.remove(directory)
            if left and asyncio.get_running_loop().time() > deadline:
                log.warning("cgroup %s still has processes %s", left[0], self.processes())
                return False
            if left:
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.2)
        return True


@dataclass(frozen=True)
class Cgroups:
    """Where this machine keeps its controllers. `notes` says what is missing, empty when all limits work."""

    memory: Path | None
    pids: Path | None
    version: int
    mounts: tuple[Path, ...] = ()
    notes: str = ""

    @property
    def works(self) -> bool:
        """Whether both limits can be set."""
        return self.memory is not None and self.pids is not None

    def group(self, owner: str, name: str) -> Group:
        """The group of that name, whether it exists or not."""
        path = f"/rethaw/{owner}/{name}"
        memory = self.memory / path[1:] if self.memory else None
        pids = self.pids / path[1:] if self.pids else None
        return Group(path, memory, pids, self.version, self.mounts)

    def create(self, owner: str, name: str, memory_bytes: int, pids: int) -> Group:
        """A new group under `owner` with its limits set. Raises OSError when the kernel refuses."""
        group = self.group(owner, name)
        for directory in dict.fromkeys(d for d in (group.memory, group.pids) if d is not None):
            for parent in (directory.parent.parent, directory.parent):
                parent.mkdir(exist_ok=True)
                if self.version == 2:
                    _write(parent / "cgroup.subtree_control", "+memory +pids")
            directory.mkdir(exist_ok=True)
        group.raise_limit(memory_bytes)
        if group.memory is not None and self.version == 2:
            with contextlib.suppress(OSError):
                _write(group.memory / "memory.swap.max", "0")
            _write(group.memory / "memory.oom.group", "1")
        if group.pids is not None:
            _write(group.pids / "pids.max", str(pids))
        return group

    def owned(self, owner: str) -> list[Group]:
        """The groups that exist under `owner`."""
        names: set[str] = set()
        for mount in self.mounts:
            with contextlib.suppress(OSError):
                names.update(entry.name for entry in (mount / "rethaw" / owner).iterdir() if entry.is_dir())
        return [self.group(owner, name) for name in sorted(names)]

    def disown(self, owner: str) -> None:
        """Remove the directories of `owner` if nothing is left in them."""
        for mount in self.mounts:
            for directory in (mount / "rethaw" / owner, mount / "rethaw"):
                with contextlib.suppress(OSError):
                    directory.rmdir()


def detect(mounts: Path = _MOUNTS) -> Cgroups:
    """What `mounts` offers. v2 counts only where it really has the controllers (hybrid machines leave it empty)."""
    v1: dict[str, Path] = {}
    hierarchies: list[Path] = []
    v2: Path | None = None
    for line in _read(mounts).splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup":
            hierarchies.append(Path(where))
            for name in {"memory", "pids"} & set(options.split(",")):
                v1.setdefault(name, Path(where))
        elif kind == "cgroup2":
            v2 = v2 or Path(where)
    if v2 is not None and {"memory", "pids"} <= set(_read(v2 / "cgroup.controllers").split()):
        try:
            _write(v2 / "cgroup.subtree_control", "+memory +pids")
        except OSError as error:
            return Cgroups(None, None, 2, (), f"cgroup v2 at {v2} cannot hand out its controllers: {error}")
        return Cgroups(v2, v2, 2, (v2,))
    missing = [name for name in ("memory", "pids") if name not in v1]
    if missing:
        return Cgroups(None, None, 1, (), f"no cgroup controller for {' and '.join(missing)}")
    return Cgroups(v1["memory"], v1["pids"], 1, tuple(hierarchies))
