"""Proves that the engine works here: a real guest goes through boot, save and restore, with its clock watched.

The guest is the host's own Python with the few libraries it needs, so that no image has to be built first.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rethaw.engines.base import ProbeReport, Sandbox, SandboxSpec
from rethaw.engines.microvm.assets import REMEDY
from rethaw.model.errors import EngineError, EngineUnusable, RethawError

if TYPE_CHECKING:
    from rethaw.engines.microvm.engine import QemuEngine

_PROGRAM = """
import sys, time
for n, line in enumerate(sys.stdin, 1):
    if line == "sleep\\n":
        time.sleep(1)
    print(n, line, end="", flush=True)
"""
_SLEEP_S = 1.0
_HOLD_S = 1.2
_PYTHON = Path("/usr/bin/python3")
_LEFT_OUT = (
    "test",
    "idlelib",
    "ensurepip",
    "lib2to3",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
    "tkinter",
    "turtledemo",
)


def _rootfs(where: Path) -> None:
    """Debian's own Python with its libraries. Blocking."""
    if not _PYTHON.exists():
        raise EngineError(f"this machine has no {_PYTHON}", remedy="apt-get install python3-minimal")
    for name in ("usr/bin", "usr/lib", "proc", "dev", "sys", "tmp", "run"):
        (where / name).mkdir(parents=True, exist_ok=True)
    program = _PYTHON.resolve()
    shutil.copy(program, where / "usr/bin/python3")
    library = Path("/usr/lib") / program.name
    shutil.copytree(library, where / library.relative_to("/"), ignore=shutil.ignore_patterns(*_LEFT_OUT), symlinks=True)
    objects = [str(program), *_extensions(library)]
    listing = subprocess.run(["ldd", *objects], capture_output=True, text=True, check=False).stdout
    for found in set(re.findall(r"(/[^\s():]+\.so[^\s():]*)", listing)):
        target = where / found.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(Path(found).resolve(), target)


def _extensions(library: Path) -> list[str]:
    """What the starter loads beside the program itself."""
    names = ("_ctypes", "resource", "_json", "fcntl", "select")
    return [str(path) for path in (library / "lib-dynload").glob("*.so") if path.name.startswith(names)]


async def _hear(sandbox: Sandbox, expected: str) -> None:
    said = (await sandbox.reader.readline()).decode(errors="replace").strip()
    if said != expected:
        raise EngineError(f"the probe guest said {said!r} instead of {expected!r}")


async def _ask(sandbox: Sandbox, line: str, expected: str) -> None:
    sandbox.writer.write(f"{line}\n".encode())
    await _hear(sandbox, expected)


async def probe(engine: QemuEngine, timeout_s: float) -> ProbeReport:
    """See `Engine.probe`."""
    version, step = "?", "looking for QEMU"
    sandboxes: list[Sandbox] = []
    times: dict[str, float] = {}
    work: list[Path] = []

    async def run() -> float:
        nonlocal version, step
        version = await engine.version()
        base = engine.run_dir / f"probe-{os.urandom(4).hex()}"
        work.append(base)
        step = "making a small root filesystem"
        await asyncio.to_thread(_rootfs, base / "root")
        image = f"probe-{base.name}"
        spec = SandboxSpec(image, base / "root", 64 << 20, 64, ("/usr/bin/python3", "-I", "-S", "-c", _PROGRAM))
        work.extend(await engine.assets.image(spec))
        step = "booting a guest"
        started = time.perf_counter()
        first = await engine.boot(spec)
        sandboxes.append(first)
        await _ask(first, "hello", "1 hello")
        times["boot"] = (time.perf_counter() - started) * 1000
        step = "saving the guest while it runs"
        first.writer.write(b"sleep\n")
        await asyncio.sleep(_SLEEP_S / 4)
        saved = await first.capture(base / "save")
        times["save"] = saved.engine_ms
        await _hear(first, "2 sleep")
        await _ask(first, "on", "3 on")
        step = "destroying the guest"
        await first.destroy()
        await asyncio.sleep(_HOLD_S)
        step = "restoring the guest"
        started = time.perf_counter()
        second = await engine.restore(spec, saved.sections, build=saved.engine_build, cpu=saved.cpu, clock=saved.clock)
        sandboxes.append(second)
        times["restore"] = (time.perf_counter() - started) * 1000
        step = "hearing from the restored guest"
        restored = time.perf_counter()
        await _hear(second, "2 sleep")
        slept = time.perf_counter() - restored
        await _ask(second, "back", "3 back")
        return slept

    try:
        slept = await asyncio.wait_for(run(), timeout_s)
    except (RethawError, OSError, TimeoutError) as error:
        took = f"no answer within {timeout_s:.0f} s" if isinstance(error, TimeoutError) else str(error)
        detail = error.message if isinstance(error, EngineUnusable) else f"failed at {step}: {took}"
        return ProbeReport("qemu", False, version, detail, REMEDY)
    finally:
        for sandbox in sandboxes:
            await sandbox.destroy()
        for path in work:
            await asyncio.to_thread(_remove, path)
    still = slept > _SLEEP_S / 5  # three quarters were left, and the guest's first steps count; else nothing is left
    name = (await engine.accelerator()).name
    how = f"by TCG, which is about ten times slower than a CPU ({engine.why_not_kvm})" if name == "tcg" else "by KVM"
    clock = "the clock stands still while frozen" if still else "timers fire early after a restore"
    return ProbeReport(
        "qemu",
        True,
        version,
        f"boot, save and restore work {how}; {clock}",
        "",
        times["boot"],
        times["save"],
        times["restore"],
        {"clock_frozen": still, "timer_left_s": round(slept, 3), "accelerator": name},
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
