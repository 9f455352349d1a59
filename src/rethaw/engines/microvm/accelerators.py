"""What runs the instructions of a guest: KVM, where a probe guest comes through boot, save and restore with it; else TCG,
QEMU's own emulation, which is about ten times slower and works everywhere.

That /dev/kvm is there and opens says little: nested in some virtual machines no guest ever gets beyond its first
instructions. So the first guest of each machine, kernel and QEMU is a probe, under a timeout, and its verdict is kept:

ASSETS/kvm.json         {"key": what it holds for, "why": why KVM is not used, or ""}
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rethaw.engines import cpu
from rethaw.engines.microvm import tsc

DEVICE = Path("/dev/kvm")
PROBE_S = 20.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")
Try = Callable[[], Awaitable[str]]  # why a guest does not work with KVM, or nothing


@dataclass(frozen=True)
class Accelerator:
    """`cpu`: digest of what a guest sees of its CPU; a snapshot can go on only where it is the same. `options`: QEMU's.
    `group`: one more that its process needs, to open the device."""

    name: str
    cpu: str
    options: tuple[str, ...]
    group: int | None = None

    def kernel_arguments(self) -> str:
        """What the guest's kernel is told. Blocking the first time."""
        return f" tsc_early_khz={tsc.khz()}" if self.name == "tcg" else ""


TCG = Accelerator("tcg", hashlib.sha256(b"qemu tcg max").hexdigest(), ("-accel", "tcg,tb-size=64", "-cpu", "max"))


def kvm(device: Path = DEVICE) -> Accelerator:
    """The guest sees this machine's CPU. Raises OSError without the device."""
    shown = cpu.digest(frozenset({*cpu.features(), "accelerator=kvm"}))
    found = device.stat()
    group = None if found.st_mode & 0o006 == 0o006 else found.st_gid
    return Accelerator("kvm", shown, ("-accel", "kvm", "-cpu", "host"), group)


def refusal(device: Path = DEVICE) -> str:
    """Why KVM need not even be tried here, or nothing. QEMU runs without privileges, so that root may open it is not
    enough."""
    try:
        found = device.stat()
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"this machine has no {device}"
    except OSError as error:
        return f"{device} cannot be opened ({error.strerror})"
    if not stat.S_ISCHR(found.st_mode):
        return f"{device} is no device"
    for_others = found.st_mode & 0o006 == 0o006
    for_group = found.st_mode & 0o060 == 0o060 and found.st_gid != 0
    if not (for_others or for_group):
        return f"{device} is for root alone (chgrp kvm {device}; chmod 0660 {device} lets QEMU's own user in)"
    return ""


async def choose(directory: Path, build: str, probe: Try, device: Path = DEVICE) -> tuple[Accelerator, str]:
    """What new guests run by, and why it is not KVM. `build`: of QEMU and kernel; `probe` is asked where no verdict is kept
    in `directory`."""
    if why := await asyncio.to_thread(refusal, device):
        return TCG, why
    best = kvm(device)
    key = f"{_BOOT.read_text().strip()} {build} {best.cpu} {best.group}"
    kept = directory / "kvm.json"
    verdict = await asyncio.to_thread(_read, kept)
    if verdict.get("key") != key:
        verdict = {"key": key, "why": await probe()}
        await asyncio.to_thread(_write, kept, verdict)
    why = str(verdict["why"])
    return (TCG, why) if why else (best, "")


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found: Any = json.loads(path.read_text())
        if isinstance(found, dict) and isinstance(found.get("why"), str):  # pyright: ignore[reportUnknownMemberType]
            return found  # pyright: ignore[reportUnknownVariableType]
    return {}


def _write(path: Path, verdict: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    with contextlib.suppress(OSError):  # the next one probes again
        partial.write_text(json.dumps(verdict))
        partial.replace(path)
