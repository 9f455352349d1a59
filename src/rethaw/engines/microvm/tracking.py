"""Which pages of a running QEMU's memory were written since one last asked.

Linux keeps count of it (since 6.7) in memory that is registered with a userfaultfd for asynchronous write protection:
nobody has to answer a fault, the first write to a page only lifts its protection, and the ioctl PAGEMAP_SCAN names the
pages without it and protects them anew, in one step. A process can register only its own memory, and QEMU does not know
how, so it is made to: its main thread is stopped for a few system calls by ptrace, which takes about 2 ms. QEMU keeps the
descriptor; it needs no privilege for it (UFFD_USER_MODE_ONLY).

Soft-dirty bits would do as well, but not every kernel is built with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import struct
import time
from collections.abc import Generator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PAGE = 4096
_SEIZE, _INTERRUPT, _GET, _SET, _STEP, _DETACH = 0x4206, 0x4207, 12, 13, 9, 17
_SYSCALL = b"\x0f\x05"
_NONE = (1 << 64) - 1
_STOP_S = 2.0
_NR_IOCTL, _NR_CLOSE, _NR_MMAP, _NR_MADVISE, _NR_USERFAULTFD = 16, 3, 9, 28, 323
_READ_WRITE, _PRIVATE_FIXED = 3, 0x12
_NOHUGEPAGE = 15
_CLOEXEC, _USER_MODE_ONLY = 0o2000000, 1
_UFFD_API, _WP_ASYNC = 0xAA, 1 << 15
_UFFDIO_API, _UFFDIO_REGISTER, _MODE_WP = 0xC018AA3F, 0xC020AA00, 2
_PAGEMAP_SCAN = 0xC0606610
_WP_MATCHING, _CHECK_WPASYNC = 1, 2  # flags
_WRITTEN, _FILE = 2, 4  # categories
_REGIONS = 16384  # that one call names at most

_REGISTERS = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs gs"
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in _REGISTERS.split()]


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    ctypes.set_errno(0)
    if _libc.ptrace(request, pid, 0, data) < 0 and ctypes.get_errno():
        raise OSError(ctypes.get_errno(), f"ptrace {request:#x}: {os.strerror(ctypes.get_errno())}")


def _until_stopped(pid: int) -> None:
    """Not by `waitpid`: the process is somebody else's child too, who would take its news."""
    end = time.monotonic() + _STOP_S
    while (state := Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) != "t":
        if state in "ZX" or time.monotonic() > end:
            raise OSError(errno.ESRCH, f"process {pid} does not stop")
        time.sleep(0)


class _Stopped:
    """The main thread of a process, stopped between two instructions."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        self._saved = _Registers()
        try:
            self._at = self._find()
            _ptrace(_GET, pid, ctypes.addressof(self._saved))
            self.scratch = (int(self._saved.rsp) - 4096) & ~15  # beyond what the thread may use below its stack
            self._former = os.pread(self._memory, 64, self.scratch)
        except BaseException:
            os.close(self._memory)
            raise

    def _find(self) -> int:
        """Where it has a system call instruction: there is one in what the kernel maps into every process."""
        for line in Path(f"/proc/{self._pid}/maps").read_text().splitlines():
            if line.endswith("[vdso]"):
                begin, end = (int(number, 16) for number in line.split()[0].split("-"))
                found = os.pread(self._memory, end - begin, begin).find(_SYSCALL)
                if found >= 0:
                    return begin + found
        raise OSError(errno.ENOSYS, f"process {self._pid} has no system call to borrow")

    def put(self, data: bytes) -> None:
        os.pwrite(self._memory, data, self.scratch)

    def call(self, number: int, *arguments: int) -> int:
        """Raises OSError as the call itself would."""
        now = _Registers.from_buffer_copy(self._saved)
        now.rip, now.rax, now.orig_rax = self._at, number, _NONE
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(now, name, value)
        _ptrace(_SET, self._pid, ctypes.addressof(now))
        _ptrace(_STEP, self._pid)
        _until_stopped(self._pid)
        _ptrace(_GET, self._pid, ctypes.addressof(now))
        result = ctypes.c_longlong(now.rax).value
        if now.rip != self._at + len(_SYSCALL):
            raise OSError(errno.EINTR, f"process {self._pid} got a signal instead")
        if result < 0:
            raise OSError(-result, f"system call {number} in process {self._pid}: {os.strerror(-result)}")
        return result

    def as_it_was(self) -> None:
        try:
            os.pwrite(self._memory, self._former, self.scratch)
            _ptrace(_SET, self._pid, ctypes.addressof(self._saved))
        finally:
            os.close(self._memory)


@contextlib.contextmanager
def _stopped(pid: int) -> Generator[_Stopped]:
    """All of it on one thread: that is what the kernel takes for the tracer."""
    _ptrace(_SEIZE, pid)
    try:
        _ptrace(_INTERRUPT, pid)
        _until_stopped(pid)
        thread = _Stopped(pid)
        try:
            yield thread
        finally:
            thread.as_it_was()
    finally:
        with contextlib.suppress(OSError):  # it is gone
            _ptrace(_DETACH, pid)


def small_pages(pid: int, start: int, size: int) -> None:
    """No huge pages in this memory of the process `pid`, which asked for them: with them a page of a mapped file that is
    touched has the kernel read 4 MiB of it. Raises OSError. Blocking, about 1 ms."""
    with _stopped(pid) as thread:
        thread.call(_NR_MADVISE, start, size, _NOHUGEPAGE)


def map_over(pid: int, start: int, size: int, fd: int) -> None:
    """Map the process's own descriptor `fd` privately, in place of what it has there. Raises OSError. Blocking, about 1 ms."""
    with _stopped(pid) as thread:
        thread.call(_NR_MMAP, start, size, _READ_WRITE, _PRIVATE_FIXED, fd, 0)


class Tracker:
    """Counts writes to `size` bytes at the address `start` of the process `pid`, from its making on. Blocking."""

    def __init__(self, pid: int, start: int, size: int) -> None:
        """Raises OSError where the kernel cannot do it; the process runs on as before."""
        if platform.machine() != "x86_64":
            raise OSError(errno.ENOSYS, f"not on {platform.machine()}")
        self._start, self._size = start, size
        with _stopped(pid) as thread:
            fd = thread.call(_NR_USERFAULTFD, _CLOEXEC | _USER_MODE_ONLY)
            try:
                thread.put(struct.pack("QQQ", _UFFD_API, _WP_ASYNC, 0))
                thread.call(_NR_IOCTL, fd, _UFFDIO_API, thread.scratch)
                thread.put(struct.pack("QQQQ", start, size, _MODE_WP, 0))
                thread.call(_NR_IOCTL, fd, _UFFDIO_REGISTER, thread.scratch)
            except BaseException:
                thread.call(_NR_CLOSE, fd)
                raise
        self._map = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.changed()
        except BaseException:
            self.close()
            raise

    def changed(self) -> NDArray[np.intp]:
        """Numbers of the pages that were written since the last call, ascending. Pages of a mapped file that were only
        read are not among them. Raises OSError when the process is gone."""
        regions = np.empty((_REGIONS, 3), dtype=np.uint64)
        found: list[NDArray[np.intp]] = []
        at, end = self._start, self._start + self._size
        while at < end:
            arguments = bytearray(
                struct.pack(
                    "12Q", 96, _WP_MATCHING | _CHECK_WPASYNC, at, end, 0, regions.ctypes.data, _REGIONS, 0,
                    _FILE, _WRITTEN | _FILE, 0, _WRITTEN,
                )
            )  # fmt: skip
            count = fcntl.ioctl(self._map, _PAGEMAP_SCAN, arguments)
            at = int.from_bytes(arguments[32:40], "little")  # how far it came
            begins, ends = regions[:count, 0].astype(np.intp), regions[:count, 1].astype(np.intp)
            firsts, counts = (begins - self._start) // PAGE, (ends - begins) // PAGE
            # Each region's pages, one after the other, without a loop over them.
            before = np.concatenate([[0], np.cumsum(counts)[:-1]]) if count else counts
            found.append(np.repeat(firsts - before, counts) + np.arange(int(counts.sum()), dtype=np.intp))
        return np.concatenate(found) if found else np.empty(0, dtype=np.intp)

    def close(self) -> None:
        """Stop asking. The process goes on counting until it ends, which nobody notices."""
        os.close(self._map)
