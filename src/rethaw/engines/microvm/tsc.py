"""The frequency of this machine's time stamp counter, which a guest under TCG sees as its own.

A guest that measures it against the emulated timer gets it wrong, or never ends measuring, when the host is busy: two of
five boots hung. So it is told.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import time
from collections.abc import Callable

_RDTSC = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"  # rdtsc; shl rdx, 32; or rax, rdx; ret
_MEASURE_S = 0.05
_ROUNDS = 5


@functools.cache
def khz() -> int:
    """kHz, from the best of some rounds of 50 ms. Blocking."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(_RDTSC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    counter: Callable[[], int] = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    found: list[tuple[int, float]] = []
    for _ in range(_ROUNDS):
        before, ticks, after = time.monotonic_ns(), counter(), time.monotonic_ns()
        time.sleep(_MEASURE_S)
        before_end, ticks_end, after_end = time.monotonic_ns(), counter(), time.monotonic_ns()
        doubt = after - before + after_end - before_end
        took = (before_end + after_end - before - after) / 2
        found.append((doubt, (ticks_end - ticks) / took * 1e6))
    return round(min(found)[1])
