"""The built wheel in an empty virtual environment: `rethaw up` as root, everything else as somebody without rights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rethaw.testing import processes
from rethaw.testing.server import image_cache

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory that everybody may enter, removed with every process that uses it."""
    path = Path(tempfile.mkdtemp(prefix="rethaw-w-"))
    path.chmod(0o755)
    yield path
    processes.sweep(path / "data")
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def wheel(place: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", place],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = place.glob("*.whl")
    return path


def test_wheel_has_all_of_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
        metadata = next(n for n in archive.namelist() if n.endswith("/METADATA"))
        text = archive.read(metadata).decode()
        assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())
    listed = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tracked = {name.removeprefix("src/") for name in listed.split()}
    assert tracked <= packed and {n for n in packed - tracked if not n.startswith("rethaw/")} == set()
    assert any(name.endswith(".sql") for name in packed)
    assert "License-Expression: Apache-2.0" in text and "Requires-Python: >=3.11" in text


@pytest.fixture(scope="module")
def venv(place: Path, wheel: Path) -> Path:
    path = place / "venv"
    subprocess.run([sys.executable, "-m", "venv", path], check=True)
    pip = [path / "bin/pip", "install", "-q", "--disable-pip-version-check"]
    lock = ROOT / "requirements/run.lock"
    subprocess.run([*pip, "--require-hashes", "-r", lock], check=True, stdin=subprocess.DEVNULL)
    subprocess.run([*pip, "--no-deps", wheel], check=True, stdin=subprocess.DEVNULL)
    subprocess.run([path / "bin/pip", "check"], check=True)
    return path


def test_up_and_run_from_the_wheel(place: Path, venv: Path) -> None:
    home, theirs = place / "home", place / "theirs"
    for directory in (home, theirs):
        directory.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    image_cache().mkdir(parents=True, exist_ok=True)
    env = {
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "HOME": str(home),
        "RETHAW_DATA_DIR": str(place / "data"),
        "RETHAW_IMAGES": str(image_cache()),
        "RETHAW_LISTEN": "127.0.0.1:0",
    }

    def rethaw(*args: str, as_root: bool = False) -> subprocess.CompletedProcess[str]:
        rights = {} if as_root else {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        own = env if as_root else {"PATH": env["PATH"], "HOME": str(theirs), **credentials}
        return subprocess.run(
            [venv / "bin/rethaw", *args], env=own, cwd=theirs, text=True, capture_output=True, timeout=240, check=False,
            stdin=subprocess.DEVNULL, **rights,
        )  # fmt: skip

    credentials: dict[str, str] = {}
    denied = rethaw("up")
    assert denied.returncode == 2 and "sudo" in denied.stderr
    started = rethaw("up", "--detach", "--json", as_root=True)
    assert started.returncode == 0, started.stderr
    server = json.loads(started.stdout)
    try:
        again = rethaw("up", "--detach", "--json", as_root=True)
        assert json.loads(again.stdout) == server, again.stderr
        found = json.loads((home / ".config/rethaw/credentials.json").read_text())
        credentials |= {"RETHAW_URL": found["url"], "RETHAW_TOKEN": found["token"]}
        assert found["url"] == server["url"]

        done = rethaw("run", "--image", "base", "--", "sh", "-c", "echo from the wheel")
        assert (done.returncode, done.stdout) == (0, "from the wheel\n"), done.stderr
        (theirs / "agent.py").write_text(
            "import rethaw\n@rethaw.agent\ndef twice(ctx, n: int) -> int:\n    return 2 * n\n"
        )
        done = rethaw("run", "agent.py", "--n", "21")
        assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
        version = json.loads(rethaw("version", "--json").stdout)
        assert version["client"] == version["server"]
    finally:
        os.kill(server["pid"], signal.SIGTERM)
        end = time.monotonic() + 60
        while processes.alive(server["pid"]) and time.monotonic() < end:
            time.sleep(0.05)
    assert not processes.alive(server["pid"])
    assert processes.mentioning(str(place / "data")) == []
