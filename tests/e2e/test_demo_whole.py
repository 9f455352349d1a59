"""`make demo` as its reader runs it, and stopped in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rethaw.testing import processes
from rethaw.testing.server import image_cache

DEMO = Path(__file__).parents[2] / "examples" / "coder" / "demo.py"
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which(os.environ.get("RETHAW_RUNSC", "runsc")) is None,
        reason="needs root and runsc",
    ),
]


@pytest.fixture
def place() -> Iterator[Path]:
    """A temporary directory of its own, so that what the demo leaves behind can be told from others' files. Short:
    Unix sockets lie below it."""
    path = Path(tempfile.mkdtemp(prefix="rd-"))
    path.chmod(0o711)
    yield path
    processes.sweep(path)
    shutil.rmtree(path, ignore_errors=True)


def start(place: Path) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("MODEL", "RETHAW_CONFIG", "RETHAW_DATA_DIR")}
    env |= {"TMPDIR": str(place), "RETHAW_TEST_IMAGES": str(image_cache())}
    return subprocess.Popen(
        [sys.executable, str(DEMO)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def left(place: Path) -> list[str]:
    running = [" ".join(processes.command_line(p)) for p in processes.mentioning(str(place))]
    return running + processes.mounts_below(place) + [p.name for p in place.iterdir()]


@pytest.mark.timeout(300)
def test_demo_holds_its_promises(place: Path) -> None:
    process = start(place)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    numbers = json.loads(output.splitlines()[-1])
    assert numbers["ok"] is True
    assert numbers["model_calls_made"] == numbers["model_calls_needed"] == 10
    assert numbers["restores"] == 2
    for text in ("no process of it is left", "SIGKILL to server", "has served 4 requests"):
        assert text in output
    assert left(place) == []


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_stopped_in_the_middle_leaves_nothing(place: Path, number: signal.Signals) -> None:
    process = start(place)
    assert process.stdout is not None
    for line in process.stdout:
        if "[start_server]" in line:
            break
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert left(place) == []
