"""What is gVisor's own: which binary is used, kept and refused."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import ask, restored

from rethaw.engines.base import SandboxSpec
from rethaw.engines.gvisor.engine import GvisorEngine
from rethaw.engines.gvisor.runsc import digest, locate
from rethaw.model.errors import EngineMismatch, EngineUnusable

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

OLD = """#!/bin/sh
case "$1 $2" in
"--version ") echo "runsc version 0.0~20221219.0";;
"help checkpoint") printf '  -image-path string\\n  -leave-running\\n';;
"help restore") printf '  -bundle string\\n  -detach\\n  -image-path string\\n';;
"help create") printf '  -bundle string\\n  -pid-file string\\n';;
"flags ") printf '  -root string\\n  -platform value\\n  ptrace kvm\\n  -network value\\n  -ignore-cgroups\\n  -overlay\\n';;
esac
"""


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runsc of the user's, in a place where it can be replaced."""
    path = tmp_path / "runsc"
    shutil.copy(locate(), path)
    monkeypatch.setenv("RETHAW_RUNSC", str(path))
    return path


def upgrade(binary: Path) -> None:
    """Another build of the same program: bytes after an ELF file's end mean nothing."""
    data = binary.read_bytes() + b"newer"
    binary.unlink()
    binary.write_bytes(data)
    binary.chmod(0o755)


async def test_a_snapshot_outlives_the_binary_it_was_made_with(
    binary: Path, data_dir: Path, spec: SandboxSpec, staging: Path
) -> None:
    first = GvisorEngine(data_dir)
    box = await first.boot(spec)
    await ask(box, "mark = 42")
    build = await first.keep_build()
    assert build == digest(binary)
    upgrade(binary)
    # A running engine does not change its build.
    saved = await box.capture(staging / "one")
    assert saved.engine_build == build == await first.build()
    await box.destroy()
    await first.close()

    second = GvisorEngine(data_dir)
    try:
        assert await second.build() == digest(binary) != build
        box = await restored(second, spec, saved)
        assert await ask(box, "mark") == 42
        again = await box.capture(staging / "two")
        assert again.engine_build == build, "saved by the build that runs it"
        await box.destroy()

        kept = data_dir / "engines" / build / "runsc"
        assert kept.stat().st_mode & 0o777 == 0o755
        assert await second.prune_builds({build}) == []
        assert kept.exists()
    finally:
        await second.close()

    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    third = GvisorEngine(data_dir)
    try:
        with pytest.raises(EngineMismatch, match=f"{build}.*is damaged"):
            await restored(third, spec, saved)
        kept.unlink()
        with pytest.raises(EngineMismatch, match=f"{build}.*is gone") as caught:
            await restored(third, spec, saved)
        assert str(kept) in str(caught.value.remedy)
    finally:
        await third.close()


async def test_builds_that_no_snapshot_needs_are_removed(binary: Path, data_dir: Path) -> None:
    first = GvisorEngine(data_dir)
    old = await first.build()
    await first.close()
    upgrade(binary)
    second = GvisorEngine(data_dir)
    new = await second.build()
    assert await second.prune_builds(set()) == [old]
    assert (data_dir / "engines" / new / "runsc").exists()
    await second.close()


async def test_the_runsc_of_debian_12_main_is_refused_with_what_to_install(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runsc"
    path.write_text(OLD)
    path.chmod(0o755)
    monkeypatch.setenv("RETHAW_RUNSC", str(path))
    engine = GvisorEngine(data_dir)
    with pytest.raises(EngineUnusable, match=r"20221219.*overlay2") as caught:
        await engine.build()
    assert "bookworm-backports" in str(caught.value)
    report = await engine.probe()
    assert not report.ok
    assert "bookworm-backports" in report.remedy
    await engine.close()


@pytest.mark.parametrize("what", ["missing", "not runsc", "not a program"])
async def test_no_runsc(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    path = tmp_path / "runsc"
    if what == "not runsc":
        shutil.copy("/bin/true", path)
    elif what == "not a program":
        path.write_text("text")
    monkeypatch.setenv("RETHAW_RUNSC", str(path))
    engine = GvisorEngine(data_dir)
    with pytest.raises(EngineUnusable, match=str(path)):
        await engine.boot(SandboxSpec("x", tmp_path, 64 << 20, 10, ("/bin/true",)))
    report = await engine.probe()
    assert not report.ok
    assert report.remedy
    await engine.close()


async def test_a_hung_engine_is_a_failed_probe(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runsc"
    real = locate()
    path.write_text(f'#!/bin/sh\ncase "$*" in *create*--*|*bundle=*) exec sleep 1000;; esac\nexec {real} "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("RETHAW_RUNSC", str(path))
    engine = GvisorEngine(data_dir)
    report = await asyncio.wait_for(engine.probe(timeout_s=2.0), 30)
    assert not report.ok
    assert "booting a guest" in report.detail
    assert "within 2s" in report.detail
    await engine.close()


async def test_the_node_s_environment_does_not_reach_the_sandbox(monkeypatch: pytest.MonkeyPatch, boot: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret-key")
    box = await boot()
    await ask(box, "1")
    environ = Path(f"/proc/{box.pid}/environ").read_bytes()
    assert b"a-secret-key" not in environ
    assert "OPENAI_API_KEY" not in await ask(box, "dict(__import__('os').environ)")
