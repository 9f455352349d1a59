"""Steps of images for real: each in its sandbox or placed, cached, and nothing left of one that fails."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from rethaw import Image
from rethaw.images import build, steps
from rethaw.images.builder import ImageStore
from rethaw.images.spec import base_digest, layers
from rethaw.model.errors import ImageError
from rethaw.model.image_types import ImageSpec, ImageStep

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
IMAGES = Path(os.environ.get("RETHAW_TEST_IMAGES", Path(tempfile.gettempdir()) / "rethaw-test-images"))
BASE = base_digest(ImageSpec())


def quiet(_: str) -> None:
    pass


def run(command: str, **env: str) -> ImageStep:
    return ImageStep(kind="run", words=(command,), env=env)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A store for this file, with the machine's base in it by hard links."""
    shared = pytest.MonkeyPatch()
    shared.setenv("RETHAW_IMAGES", str(IMAGES))
    asyncio.run(ImageStore(Path("/nowhere")).ensure(ImageSpec(), quiet))
    shared.undo()
    home = Path(tempfile.mkdtemp(prefix="store-", dir=IMAGES))
    (home / "images").mkdir()
    (home / "code").mkdir()
    subprocess.run(["cp", "-al", str(IMAGES / BASE), str(home / "images" / BASE)], check=True)
    yield home
    subprocess.run(["rm", "-rf", str(home)], check=True)


@pytest.fixture
def store(home: Path, monkeypatch: pytest.MonkeyPatch) -> ImageStore:
    monkeypatch.delenv("RETHAW_IMAGES", raising=False)
    return ImageStore(home)


@pytest.fixture
def performed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the steps that were really done."""
    done: list[int] = []
    real = steps.perform

    async def perform(spec: ImageSpec, number: int, *rest: Any) -> None:
        done.append(number)
        await real(spec, number, *rest)

    monkeypatch.setattr(steps, "perform", perform)
    return done


def blob(home: Path, **files: str) -> str:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size, info.mode = len(text), 0o755 if text.startswith("#!") else 0o644
            tar.addfile(info, io.BytesIO(text.encode()))
    digest = hashlib.sha256(raw.getvalue()).hexdigest()
    (home / "code" / f"{digest}.tar.gz").write_bytes(raw.getvalue())
    return digest


def add(digest: str, target: str) -> ImageStep:
    return ImageStep(kind="add", blob=digest, target=target)


def left(home: Path) -> set[str]:
    return {p.name for p in (home / "images").iterdir() if not p.name.endswith(".lock")}


async def test_commands_change_their_own_layer_only(store: ImageStore, home: Path, performed: list[int]) -> None:
    base = home / "images" / BASE / "rootfs"
    hosts = (base / "etc/hosts").read_text()
    first = run(
        "echo added >> /etc/hosts; rm /etc/issue; ln -s /etc /linked; mkdir -p /opt/a/b; echo $WHO > /opt/a/b/who",
        WHO="me",
    )
    second = run("cat /opt/a/b/who > /etc/seen; chmod 4755 /etc/seen; rm -r /opt/a; mv /etc/hosts /etc/hosts2")
    image = await store.ensure(ImageSpec(steps=(first, second)), quiet)
    below = home / "images" / layers(ImageSpec(steps=(first,)))[-1] / "rootfs"
    assert (below / "etc/hosts").read_text() == hosts + "added\n" and (base / "etc/hosts").read_text() == hosts
    assert not (below / "etc/issue").exists() and (base / "etc/issue").exists()
    assert (below / "opt/a/b/who").read_text() == "me\n" and str((below / "linked").readlink()) == "/etc"
    assert (image.rootfs / "etc/seen").read_text() == "me\n"
    assert (image.rootfs / "etc/seen").stat().st_mode & 0o7777 == 0o4755
    assert not (image.rootfs / "opt/a").exists() and not (image.rootfs / "etc/hosts").exists()
    assert (image.rootfs / "usr/bin/git").stat().st_ino == (base / "usr/bin/git").stat().st_ino
    assert {p.name for p in below.iterdir()} == {*(p.name for p in base.iterdir()), "linked"}
    performed.clear()
    await store.ensure(ImageSpec(steps=(first, second), env={"A": "1"}), quiet)
    assert performed == []
    other = await store.ensure(ImageSpec(steps=(first, run("true"))), quiet)
    assert performed == [1] and (other.rootfs / "etc/hosts").read_text() == hosts + "added\n"


async def test_commands_run_in_the_images_directory_which_is_made(store: ImageStore) -> None:
    image = Image.debian().run("pwd > /opt/first").workdir("/srv/deep").run("pwd > here").workdir("/srv/other")
    built = await store.ensure(image.spec, quiet)
    assert (built.rootfs / "opt/first").read_text() == "/\n"
    assert (built.rootfs / "srv/deep/here").read_text() == "/srv/deep\n"
    assert not (built.rootfs / "srv/other").exists()
    _, composed = await store.compose(built)
    assert (composed / "srv/other").is_dir()


async def test_a_step_that_fails_or_hangs_leaves_nothing(
    store: ImageStore, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, mounts = left(home), Path("/proc/self/mounts").read_text()
    failing = ImageSpec(steps=(run("for i in $(seq 20); do echo line $i; done; sleep 100 & exit 7"),))
    with pytest.raises(
        ImageError, match=r"(?s)step 1 of the image, `run for i.*its command exited with 7\):\n.*line 20"
    ) as e:
        await store.ensure(failing, quiet)
    assert "line 3\n" not in str(e.value) and left(home) == before
    monkeypatch.setattr(build, "STEP_TIMEOUT_S", 3.0)
    with pytest.raises(ImageError, match=r"`run sleep 1000`, took longer than 3s"):
        await store.ensure(ImageSpec(steps=(run("sleep 1000"),)), quiet)
    lying = run("rm -f /.rethaw/job.json; mkdir -p /.rethaw/out/names")
    with pytest.raises(ImageError, match=r"(?s)step 1 .*IsADirectoryError"):
        await store.ensure(ImageSpec(steps=(lying,)), quiet)
    assert left(home) == before and Path("/proc/self/mounts").read_text() == mounts
    assert _processes(home) == []


def _processes(home: Path) -> list[str]:
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(home) in command:
            found.append(command)
    return found


@pytest.mark.long
async def test_a_cancelled_step_leaves_nothing(store: ImageStore, home: Path) -> None:
    before = left(home)
    running = asyncio.Event()
    spec = ImageSpec(steps=(run("echo running; sleep 1000"),))
    task = asyncio.create_task(store.ensure(spec, lambda line: running.set() if "  running" in line else None))
    await asyncio.wait_for(running.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 60)
    assert left(home) == before and _processes(home) == []


async def test_a_node_that_is_killed_leaves_no_sandbox(store: ImageStore, home: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from rethaw.images.builder import ImageStore
from rethaw.model.image_types import ImageSpec, ImageStep
spec = ImageSpec(steps=(ImageStep(kind="run", words=("echo running; sleep 1000",)),))
asyncio.run(ImageStore(Path({str(home)!r})).ensure(spec, lambda line: print(line, flush=True)))
"""
    node = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)  # noqa: ASYNC220
    assert node.stdout is not None
    while b"  running" not in await asyncio.to_thread(node.stdout.readline):
        assert node.poll() is None
    assert any("runsc" in command for command in _processes(home))
    node.kill()
    node.wait()
    async with asyncio.timeout(30):
        while _processes(home):  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.05)
    spec = ImageSpec(steps=(run("echo running; sleep 1000"),))
    assert list((home / "images").glob(f".new-{layers(spec)[-1]}-*"))  # goes when it is built again


@pytest.fixture
def web() -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()


async def test_the_way_out_is_the_proxy_and_not_to_this_machine(
    store: ImageStore, web: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = "import urllib.request as r; print(r.urlopen('http://localhost.test:%d/x').read())"
    direct = f"import socket; socket.create_connection(('127.0.0.1', {web}), 5)"
    command = f'python3 -c "{direct}" || echo no card >> /etc/out; no_proxy= python3 -c "{fetch % web}" >> /etc/out'
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", _resolving)
    with pytest.raises(ImageError, match=r"403"):
        await store.ensure(ImageSpec(steps=(run(command),)), quiet)
    monkeypatch.setenv("RETHAW_BUILD_ALLOW", "localhost.test")
    image = await store.ensure(ImageSpec(steps=(run(command),)), quiet)
    assert (image.rootfs / "etc/out").read_text() == "no card\nb'hello'\n"


async def _resolving(host: str, port: int, **_: Any) -> list[Any]:
    assert host == "localhost.test"
    return [(2, 1, 6, "", ("127.0.0.1", port))]


async def test_files_are_placed_and_links_lead_nowhere_outside(store: ImageStore, home: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    digest = blob(home, data__a="1", run="#!/bin/sh\necho hi")
    spec = ImageSpec(
        steps=(run(f"ln -s {outside} /out; ln -s /etc /opt/conf"), add(digest, "/out"), add(digest, "/opt/conf"))
    )
    image = await store.ensure(spec, quiet)
    assert list(outside.iterdir()) == []
    assert (image.rootfs / str(outside).lstrip("/") / "data/a").read_text() == "1"
    assert (image.rootfs / "etc/data/a").read_text() == "1" and os.access(image.rootfs / "etc/run", os.X_OK)
    composed = (await store.compose(image, home / "code" / f"{digest}.tar.gz"))[1]
    assert (composed / "app/data/a").read_text() == "1"
    assert list((composed / ".rethaw/lib/rethaw/guest/__pycache__").glob("guestd.*.pyc"))
    with pytest.raises(
        ImageError, match=r"step 1 of the image, `add .*files are not on this node; start the agent again"
    ):
        await store.ensure(ImageSpec(steps=(add("0" * 64, "/x"),)), quiet)
    with pytest.raises(ImageError, match=r"/own of the image leads to /\.rethaw"):
        await store.ensure(ImageSpec(steps=(run("ln -s /.rethaw /own"), add(digest, "/own"))), quiet)
    with pytest.raises(ImageError, match=r"/proc is made anew"):
        await store.ensure(ImageSpec(steps=(add(blob(home, proc__x="x"), "/"),)), quiet)
    with pytest.raises(ImageError, match="/etc/apt is a directory of the image"):
        await store.ensure(ImageSpec(steps=(add(blob(home, apt="x"), "/etc"),)), quiet)


async def test_python_packages_of_several_steps_fit_together(store: ImageStore, home: Path) -> None:
    first = ImageStep(kind="pip", words=("six==1.15.0", "idna==3.7"))
    second = ImageStep(kind="pip", words=("six>=1.15", "charset-normalizer"))
    image = await store.ensure(ImageSpec(steps=(first, second)), quiet)
    packages = image.rootfs / "usr/local/lib/python3.11/dist-packages"
    assert [p.name for p in packages.glob("six-*")] == ["six-1.15.0.dist-info"]
    assert (image.rootfs / "usr/local/bin/normalizer").read_text().startswith("#!/usr/bin/python3\n")
    below = home / "images" / layers(ImageSpec(steps=(first,)))[-1] / "rootfs/usr/local/lib/python3.11/dist-packages"
    assert (packages / "idna/core.py").stat().st_ino == (below / "idna/core.py").stat().st_ino
    assert list((packages / "charset_normalizer/__pycache__").glob("api.cpython-311.pyc"))
    with pytest.raises(ImageError, match=r"(?s)step 2 of the image.*six"):
        await store.ensure(ImageSpec(steps=(first, ImageStep(kind="pip", words=("six==1.16.0",)))), quiet)


@pytest.mark.long
async def test_debian_packages_after_a_command(store: ImageStore) -> None:
    step = ImageStep(kind="apt", words=("hello",))
    image = await store.ensure(ImageSpec(steps=(run("echo x > /etc/x"), step)), quiet)
    assert (image.rootfs / "usr/bin/hello").exists() and (image.rootfs / "etc/x").exists()
    assert "Package: hello" in (image.rootfs / "var/lib/dpkg/status").read_text()
    assert not list((image.rootfs / "var/lib/apt/lists").glob("*Packages*"))


def _newest_python() -> Path | None:
    found = [p for p in Path("/root/.pyenv/versions").glob("3.*/bin/python3") if int(p.parts[-3].split(".")[1]) >= 12]
    return max(found, key=lambda p: int(p.parts[-3].split(".")[1]), default=None)


@pytest.mark.long
@pytest.mark.skipif(_newest_python() is None, reason="needs another Python")
async def test_a_newer_python_than_debians_runs_in_the_image(store: ImageStore, home: Path, tmp_path: Path) -> None:
    python = _newest_python()
    assert python is not None
    subprocess.run([python, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)  # noqa: ASYNC221
    (site,) = (tmp_path / "venv/lib").glob("python3.*/site-packages")
    (site / "mine.py").write_text("VALUE = 42\n")
    code = f"""
from pathlib import Path
from rethaw import Image
for digest, data in Image.from_env().uploads():
    Path({str(home / "code")!r}, digest + ".tar.gz").write_bytes(data)
    print(digest)
"""
    env = {"PYTHONPATH": str(Path(build.__file__).parents[2])}
    argv = [tmp_path / "venv/bin/python", "-c", code]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)  # noqa: ASYNC221
    assert done.returncode == 0, done.stderr
    said = "import ssl, sqlite3, ctypes, lzma, bz2, zlib, mine, sys; print(mine.VALUE, sys.version_info[1], sys.prefix)"
    look = run(f"/opt/rethaw-venv/bin/python3 -c '{said}' > /etc/said", LD_LIBRARY_PATH="/opt/rethaw-python/lib")
    library = {"LD_LIBRARY_PATH": "/opt/rethaw-python/lib"}
    more = ImageStep(kind="pip", words=("six==1.16.0", "charset-normalizer"), env=library)
    imported = run(
        "/opt/rethaw-venv/bin/python3 -c 'import six, charset_normalizer; print(six.__file__)' > /etc/imported",
        **library,
    )
    steps_ = (*(add(digest, "/") for digest in done.stdout.split()), look, more, imported)
    image = await store.ensure(ImageSpec(steps=steps_, python="/opt/rethaw-venv/bin/python3"), quiet)
    version = f"3.{python.parts[-3].split('.')[1]}"
    packages = f"/opt/rethaw-venv/lib/python{version}/site-packages"
    assert (image.rootfs / "etc/imported").read_text() == f"{packages}/six.py\n"
    script = (image.rootfs / "opt/rethaw-venv/bin/normalizer").read_text()
    assert script.startswith("#!/opt/rethaw-venv/bin/python3\n")
    inside = image.rootfs / packages[1:]
    assert (
        not (inside / "pip").exists() and not (image.rootfs / "usr/local/lib/python3.11/dist-packages/six.py").exists()
    )
    assert list((inside / "__pycache__").glob(f"six.cpython-{version.replace('.', '')}.pyc"))
    assert (image.rootfs / "etc/said").read_text() == f"42 {python.parts[-3].split('.')[1]} /opt/rethaw-venv\n"
