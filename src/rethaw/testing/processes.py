"""Processes and mounts of one data directory, found in /proc: what a test must not leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rethaw.model.errors import Unavailable


def command_line(pid: int) -> list[str]:
    """argv of `pid`; empty when it is gone, or a zombie, or a kernel thread."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def alive(pid: int) -> bool:
    """Whether `pid` runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def parent(pid: int) -> int:
    """Parent's pid, 0 when `pid` is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def mentioning(text: str) -> list[int]:
    """Running processes whose command line contains `text`, this one and its parents left out."""
    own, pid = set[int](), os.getpid()
    while pid > 1:
        own.add(pid)
        pid = parent(pid)
    return [p for p in pids() if p not in own and alive(p) and any(text in arg for arg in command_line(p))]


def descendants(pid: int) -> list[int]:
    """`pid` and all below it."""
    children: dict[int, list[int]] = {}
    for p in pids():
        children.setdefault(parent(p), []).append(p)
    found, todo = list[int](), [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def state_of(pid: int) -> str:
    """The kernel's letter for what it does (R, S, T...), empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Whether there was something to kill."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


_RUNSC_S = 10.0


@dataclass(frozen=True)
class GvisorProcess:
    """One gVisor sandbox as the host sees it."""

    id: str
    pid: int
    root: str

    def _runsc(self, *args: str) -> subprocess.CompletedProcess[str]:
        # runsc-sandbox runs from the very build that made it, so its own binary is the right one to talk to it.
        binary = f"/proc/{self.pid}/exe"
        command = [binary, f"--root={self.root}", *args]
        try:
            return subprocess.run(command, check=False, capture_output=True, text=True, timeout=_RUNSC_S)
        except subprocess.TimeoutExpired:  # stopped meanwhile
            return subprocess.CompletedProcess(command, 1, "", "")

    def status(self) -> str:
        """created, running, stopped, or empty when it is gone."""
        if state_of(self.pid) == "T":  # created ahead and stopped until it is used: it would not answer
            return "created"
        try:
            state: dict[str, str] = json.loads(self._runsc("state", self.id).stdout)
        except (OSError, ValueError):
            return ""
        return state.get("status", "")

    def kill_guest(self) -> bool:
        """SIGKILL its PID 1 (guestd), from inside as it were; whether that was possible."""
        with contextlib.suppress(OSError):
            return self._runsc("kill", self.id, "KILL").returncode == 0
        return False


@dataclass(frozen=True)
class QemuProcess:
    """One microVM as the host sees it."""

    id: str
    pid: int

    def status(self) -> str:
        """created, running, or empty when it is gone."""
        if state_of(self.pid) == "T":  # created ahead and stopped until it is used
            return "created"
        return "running" if alive(self.pid) else ""

    def kill_guest(self) -> bool:
        """Nothing of the host's reaches a process in it: always False."""
        return False


Box = GvisorProcess | QemuProcess


def qemu(root: Path) -> list[QemuProcess]:
    """The microVMs whose directory is below `root`."""
    out: list[QemuProcess] = []
    for pid in pids():
        argv = command_line(pid)
        if argv and argv[0] == "qemu-system-x86_64" and alive(pid):
            name = argv[argv.index("-name") + 1].removeprefix("guest=") if "-name" in argv else ""
            if Path(name).is_relative_to(root):
                out.append(QemuProcess(Path(name).name, pid))
    return out


def gvisor(root: Path) -> list[GvisorProcess]:
    """The sandboxes whose runsc --root is below `root`."""
    out: list[GvisorProcess] = []
    for pid in pids():
        argv = command_line(pid)
        if not argv or argv[0] != "runsc-sandbox" or not alive(pid):
            continue
        at = next((a.partition("=")[2] for a in argv if a.startswith("--root=")), "")
        if Path(at).is_relative_to(root):
            out.append(GvisorProcess(argv[-1], pid, at))
    return out


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Return once `condition()` is true. Raises Unavailable naming `what`."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise Unavailable(f"{what} did not happen within {timeout_s:g} s")
        time.sleep(0.02)


def mounts_below(directory: Path) -> list[str]:
    """Mount points at or below `directory`, deepest first."""
    out: list[str] = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split()[1])
        if Path(point).is_relative_to(directory):
            out.append(point)
    return sorted(out, key=len, reverse=True)


def sweep(directory: Path) -> None:
    """Kill what runs on `directory` and unmount what is mounted there."""
    text = str(directory)
    end = time.monotonic() + 20
    while (left := mentioning(text)) and time.monotonic() < end:
        for pid in left:
            kill(pid)
        time.sleep(0.05)
    for point in mounts_below(directory):
        subprocess.run(["umount", "-l", point], check=False, capture_output=True)
