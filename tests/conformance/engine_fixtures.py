"""Engines under test, a root filesystem for them, and a guest that does what it is told line by line."""

from __future__ import annotations

import ast
import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from rethaw.engines.base import Capture, Engine, Sandbox, SandboxSpec
from rethaw.engines.gvisor.engine import GvisorEngine
from rethaw.engines.microvm.engine import QemuEngine
from rethaw.images.builder import ImageStore
from rethaw.model.image_types import ImageSpec

MIB = 1 << 20
IMAGES = Path(os.environ.get("RETHAW_TEST_IMAGES", Path(tempfile.gettempdir()) / "rethaw-test-images"))
ENGINES: dict[str, Callable[[Path], Engine]] = {
    "gvisor": GvisorEngine,
    "qemu": lambda data_dir: QemuEngine(data_dir, IMAGES / "microvm"),
}

# Each line is Python: an expression answers its repr, a statement answers None, both on one line.
GUEST = r"""
import json, os, sys, threading, time
names = {"__name__": "guest"}
for line in sys.stdin:
    source = json.loads(line)
    try:
        try:
            code = compile(source, "line", "eval")
        except SyntaxError:
            exec(compile(source, "line", "exec"), names)
            answer = None
        else:
            answer = eval(code, names)
    except BaseException as error:
        answer = "%s: %s" % (type(error).__name__, error)
    print(repr(answer), flush=True)
"""


async def ask(sandbox: Sandbox, source: str, timeout_s: float = 30.0) -> Any:
    """Run `source` in the guest; the value it answers."""
    import json

    sandbox.writer.write(json.dumps(source).encode() + b"\n")
    await sandbox.writer.drain()
    line = await asyncio.wait_for(sandbox.reader.readline(), timeout_s)
    assert line, f"the guest is gone: {await asyncio.wait_for(sandbox.wait(), 5)}"
    return ast.literal_eval(line.decode())


async def restored(engine: Engine, spec: SandboxSpec, saved: Capture) -> Sandbox:
    """A new sandbox from `saved`."""
    return await engine.restore(spec, saved.sections, build=saved.engine_build, cpu=saved.cpu, clock=saved.clock)


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Wait for a condition."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.02)


@pytest.fixture(scope="session")
def rootfs() -> Path:
    """The base image, built once for this machine."""
    os.environ["RETHAW_IMAGES"] = str(IMAGES)
    try:
        store = ImageStore(IMAGES)
    finally:
        del os.environ["RETHAW_IMAGES"]
    return asyncio.run(store.ensure(ImageSpec(), lambda _: None)).rootfs


# A guest of QEMU without KVM takes seconds to boot: the whole suite on it is in `make test-long`, some of it in test_qemu.py.
@pytest.fixture(params=["gvisor", pytest.param("qemu", marks=pytest.mark.long)])
def make_engine(request: pytest.FixtureRequest) -> Callable[[Path], Engine]:
    return ENGINES[request.param]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def engine(make_engine: Callable[[Path], Engine], data_dir: Path) -> AsyncIterator[Engine]:
    made = make_engine(data_dir)
    yield made
    await made.close()


@pytest.fixture
def staging() -> Any:
    """A directory in memory, as the node uses for saves."""
    directory = Path(tempfile.mkdtemp(prefix="rethaw-engine-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def spec(rootfs: Path) -> SandboxSpec:
    return SandboxSpec(
        image_digest="test",
        rootfs=rootfs,
        memory_bytes=256 * MIB,
        pids=128,
        argv=("/usr/bin/python3", "-u", "-c", GUEST),
        env=(("MARK", "conformance"),),
    )


@pytest.fixture(scope="session")
def warm() -> Any:
    """Captures of guests that have just started, by spec: a boot by emulation takes seconds, a restore half of one."""
    directory = Path(tempfile.mkdtemp(prefix="rethaw-engine-test-", dir="/dev/shm"))
    captures: dict[SandboxSpec, Capture] = {}

    async def guest(engine: Engine, spec: SandboxSpec) -> Sandbox:
        if spec in captures:
            return await restored(engine, spec, captures[spec])
        box = await engine.boot(spec)
        try:
            await ask(box, "None")
            captures[spec] = await box.capture(directory / str(len(captures)))
        except BaseException:
            await box.destroy()
            raise
        return box

    yield guest
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
async def boot(engine: Engine, spec: SandboxSpec, warm: Any) -> AsyncIterator[Callable[..., Any]]:
    """Boots sandboxes (or adopts given ones) that are destroyed at the end. Those of `spec` itself may come from a capture
    where a boot takes long."""
    made: list[Sandbox] = []

    async def one(sandbox: Sandbox | None = None, *, with_spec: SandboxSpec | None = None) -> Sandbox:
        if sandbox is None and with_spec is None and engine.name == "qemu":
            sandbox = await warm(engine, spec)
        sandbox = sandbox or await engine.boot(with_spec or spec)
        made.append(sandbox)
        return sandbox

    yield one
    for sandbox in made:
        await sandbox.destroy()
