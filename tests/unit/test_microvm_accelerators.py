"""What runs a guest's instructions: KVM only after a guest came through with it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from rethaw.engines.microvm import accelerators, machine
from rethaw.engines.microvm.accelerators import TCG

FILES = machine.Files(3, 4, None, 5, 6, 7, 8, None, {name: 20 + n for n, name in enumerate(machine.SOCKETS)})


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A device that opens (/dev/null by another name), for everybody."""
    path = tmp_path / "kvm"
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    path.chmod(0o666)
    return path


def test_without_a_device_that_qemu_may_open_kvm_is_not_tried(device: Path) -> None:
    assert accelerators.refusal(device) == ""
    device.chmod(0o600)
    assert accelerators.refusal(device) == (
        f"{device} is for root alone (chgrp kvm {device}; chmod 0660 {device} lets QEMU's own user in)"
    )
    device.chmod(0o660)
    assert "for root alone" in accelerators.refusal(device)  # whose group it is
    os.chown(device, 0, 104)
    assert accelerators.refusal(device) == ""
    device.unlink()
    assert accelerators.refusal(device) == f"this machine has no {device}"
    device.write_bytes(b"")
    assert accelerators.refusal(device) == f"{device} is no device"


async def test_a_verdict_is_kept_for_this_boot_and_build(tmp_path: Path, device: Path) -> None:
    asked: list[str] = []

    async def works() -> str:
        asked.append("works")
        return ""

    async def fails() -> str:
        asked.append("fails")
        return "it hangs"

    chosen, why = await accelerators.choose(tmp_path, "b1", fails, device)
    assert chosen is TCG and why == "it hangs"
    chosen, why = await accelerators.choose(tmp_path, "b1", works, device)
    assert chosen is TCG and why == "it hangs" and asked == ["fails"]
    chosen, why = await accelerators.choose(tmp_path, "b2", works, device)
    assert chosen.name == "kvm" and not why and asked == ["fails", "works"]
    chosen, why = await accelerators.choose(tmp_path, "b2", fails, device)
    assert chosen.name == "kvm" and not why and asked == ["fails", "works"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"key": 1}', b'{"why": 1}'])
async def test_a_damaged_verdict_is_none(tmp_path: Path, device: Path, content: bytes) -> None:
    (tmp_path / "kvm.json").write_bytes(content)

    async def fails() -> str:
        return "it hangs"

    assert await accelerators.choose(tmp_path, "b", fails, device) == (TCG, "it hangs")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("kvm.json", "kvm")]


def test_a_guest_under_kvm_has_the_machines_cpu_and_its_own_digest(device: Path) -> None:
    device.chmod(0o660)
    os.chown(device, 0, 104)
    kvm = accelerators.kvm(device)
    assert kvm.group == 104 and kvm.cpu != TCG.cpu and len(kvm.cpu) == 64
    argv = machine.command(Path("/x"), 1 << 28, FILES, kvm)
    assert argv[argv.index("-accel") + 1] == "kvm" and argv[argv.index("-cpu") + 1] == "host"
    assert "tsc_early_khz" not in argv[argv.index("-append") + 1]
    argv = machine.command(Path("/x"), 1 << 28, FILES, TCG)
    assert argv[argv.index("-accel") + 1].startswith("tcg") and "tsc_early_khz" in argv[argv.index("-append") + 1]
