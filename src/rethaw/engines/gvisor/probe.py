"""Proves that the engine works here: a real guest goes through boot, save and restore, with its clock watched.

The guest is the host's own shell with the few libraries it needs, so that nothing has to be downloaded first.
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

from rethaw.engines.base import ProbeReport, SandboxSpec
from rethaw.engines.gvisor.runsc import REMEDY
from rethaw.model.errors import EngineError, EngineUnusable, RethawError

if TYPE_CHECKING:
    from rethaw.engines.gvisor.engine import GvisorEngine
    from rethaw.engines.gvisor.sandbox import GvisorSandbox

_SCRIPT = 'n=0; while read l; do n=$((n+1)); case $l in sleep) sleep 1;; esac; echo "$n $l"; done'
_SLEEP_S = 1.0
_HOLD_S = 1.2


def _tiny_rootfs(where: Path) -> None:
    """/bin/sh and /bin/sleep with their libraries. Blocking."""
    for name in ("proc", "dev", "sys", "tmp", "run", "bin"):
        (where / name).mkdir(parents=True, exist_ok=True)
    wanted: set[str] = set()
    for name in ("sh", "sleep"):
        program = shutil.which(name)
        if program is None:
            raise EngineError(f"this machine has no {name}", remedy="install coreutils and a shell")
        shutil.copy(Path(program).resolve(), where / "bin" / name)
        listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
        wanted.update(re.findall(r"(/[^\s()]+)", listing))
    for library in wanted:
        target = where / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(Path(library).resolve(), target)


async def _ask(sandbox: GvisorSandbox, line: str, expect: str) -> None:
    sandbox.writer.write(f"{line}\n".encode())
    await _hear(sandbox, expect)


async def _hear(sandbox: GvisorSandbox, expect: str) -> None:
    got = (await sandbox.reader.readline()).decode(errors="replace").strip()
    if got != expect:
        raise EngineError(f"the probe guest said {got!r} instead of {expect!r}; {sandbox.log.tail}")


async def probe(engine: GvisorEngine, timeout_s: float) -> ProbeReport:
    """See `Engine.probe`."""
    version = "?"
    step = "looking for runsc"
    sandboxes: list[GvisorSandbox] = []
    times: dict[str, float] = {}
    work: list[Path] = []

    async def run() -> tuple[bool, float]:
        nonlocal version, step
        version = await engine.version()
        base = engine.run_dir / f"probe-{os.urandom(4).hex()}"
        work.append(base)
        step = "making a small root filesystem"
        await asyncio.to_thread(_tiny_rootfs, base / "root")
        spec = SandboxSpec("probe", base / "root", 64 << 20, 64, ("/bin/sh", "-c", _SCRIPT))
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
        times["restore"] = (time.perf_counter() - started) * 1000
        sandboxes.append(second)
        step = "hearing from the restored guest"
        restored = time.perf_counter()
        await _hear(second, "2 sleep")
        slept = time.perf_counter() - restored
        await _ask(second, "back", "3 back")
        return bool(saved.clock.get("frozen")), slept

    try:
        frozen, slept = await asyncio.wait_for(run(), timeout_s)
    except (RethawError, OSError, TimeoutError) as error:
        took = f"no answer within {timeout_s:.0f}s" if isinstance(error, TimeoutError) else str(error)
        remedy = REMEDY if isinstance(error, EngineUnusable) else "run as root, with cgroups and /proc mounted"
        detail = error.message if isinstance(error, EngineUnusable) else f"failed at {step}: {took}"
        return ProbeReport("gvisor", False, version, detail, remedy)
    finally:
        for sandbox in sandboxes:
            await sandbox.destroy()
        for path in work:
            await asyncio.to_thread(shutil.rmtree, path, True)
    still = slept > _SLEEP_S / 2
    if frozen and still:
        engine.prove_clock()
    clock = "the clock stands still while frozen" if frozen and still else "timers fire early after a restore"
    return ProbeReport(
        "gvisor",
        True,
        version,
        f"boot, save and restore work; {clock}; limits by {engine.limits()}",
        "",
        times["boot"],
        times["save"],
        times["restore"],
        {"clock_frozen": frozen and still, "timer_left_s": round(slept, 3), "limits": engine.limits()},
    )
