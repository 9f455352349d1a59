"""Watching and killing processes that are not our children, without ever hitting a reused pid."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
from pathlib import Path

# _IOWR(0xFF, 11, 64 bytes) of linux/pidfd.h; exit status since Linux 6.15, once the process is reaped.
_PIDFD_GET_INFO = (3 << 30) | (64 << 16) | (0xFF << 8) | 11
_PIDFD_INFO_EXIT = 1 << 3


def exit_status(pidfd: int, pid: int) -> int | None:
    """Exit code (128 + signal for a killed one) of an ended process that some other process may have reaped already.

    None when nothing tells any more: kernels before 6.15 forget it with the zombie.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZX":
            return _decode(int(fields[49]))
    buffer = bytearray(64)
    struct.pack_into("Q", buffer, 0, _PIDFD_INFO_EXIT)
    with contextlib.suppress(OSError):
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, buffer)
        mask = struct.unpack_from("Q", buffer, 0)[0]
        if mask & _PIDFD_INFO_EXIT:
            return _decode(struct.unpack_from("i", buffer, 60)[0])
    return None


def _decode(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def kill(pidfd: int) -> None:
    """SIGKILL; no error when it is gone already."""
    with contextlib.suppress(ProcessLookupError, OSError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def stop(pidfd: int, stopped: bool) -> None:
    """SIGSTOP or SIGCONT; no error when it is gone already."""
    with contextlib.suppress(ProcessLookupError, OSError):
        signal.pidfd_send_signal(pidfd, signal.SIGSTOP if stopped else signal.SIGCONT)


def slacken(pid: int, slack_ns: int) -> None:
    """Let the kernel wake the threads of a process so much late for a timer, which lets it do several at once. Threads
    that they begin inherit it. No error when it is gone, or when this kernel does not offer it. Blocking, under 1 ms."""
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                Path(f"/proc/{thread.name}/timerslack_ns").write_text(str(slack_ns))


def command_line(pid: int) -> list[str]:
    """argv of a process, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def cpu_s(pid: int) -> float:
    """Seconds of CPU time that a process has used, 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def find(argument_prefix: str) -> dict[int, list[str]]:
    """Processes that have an argument starting with `argument_prefix`: pid to argv. Blocking, a few ms."""
    found: dict[int, list[str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            argv = command_line(int(entry.name))
            if any(argument.startswith(argument_prefix) for argument in argv):
                found[int(entry.name)] = argv
    return found


def kill_verified(pid: int, argument_prefix: str) -> bool:
    """SIGKILL `pid` if it still is the process that has such an argument."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # The pidfd pins the process, so what is read now is about the one that will be killed.
        if not any(argument.startswith(argument_prefix) for argument in command_line(pid)):
            return False
        kill(pidfd)
        return True
    finally:
        os.close(pidfd)
