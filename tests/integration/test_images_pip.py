"""Python packages in an image: installed in a sandbox, from an index of this machine, by a pip that leaves no trace."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rethaw.images import proxy, pypi
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
PLACE = "usr/local/lib/python3.11/dist-packages"
HOST = "127.0.0.2"  # of this machine, and not the loopback that a sandbox takes for its own
LOGIN, PASSWORD = "reader", "noRealPassword"

# A source distribution's own build backend: nothing has to be fetched for it.
BACKEND = """
import os, sys, zipfile

def build_wheel(directory, settings=None, metadata=None):
    {body}
    name = "{name}-1.0-py3-none-any.whl"
    about = "{name}-1.0.dist-info"
    with zipfile.ZipFile(os.path.join(directory, name), "w") as wheel:
        wheel.writestr("{name}.py", "PLACE = " + repr(os.getcwd()))
        wheel.writestr(about + "/METADATA", "Metadata-Version: 2.1\\nName: {name}\\nVersion: 1.0\\n")
        wheel.writestr(about + "/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(about + "/RECORD", "{name}.py,,\\n")
    return name

def build_sdist(directory, settings=None): ...
"""


def quiet(_: str) -> None:
    pass


def wheel(name: str, version: str = "1.0", tag: str = "py3-none-any", needs: str = "") -> tuple[str, bytes]:
    raw = io.BytesIO()
    about = f"{name}-{version}.dist-info"
    required = f"Requires-Dist: {needs}\n" if needs else ""
    with zipfile.ZipFile(raw, "w") as file:
        file.writestr(f"{name}.py", f"VERSION = {version!r}\ndef main(): print('{name} says', VERSION)\n")
        file.writestr(f"{name}_template.py", "def {{ name }}: is no Python\n")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}")
        file.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{about}/entry_points.txt", f"[console_scripts]\n{name}-tool = {name}:main\n")
        file.writestr(f"{about}/RECORD", f"{name}.py,,\n{name}_template.py,,\n")
    return f"{name}-{version}-{tag}.whl", raw.getvalue()


def sdist(name: str, body: str) -> tuple[str, bytes]:
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    files = {"pyproject.toml": project, "backend.py": BACKEND.format(name=name, body=body), "PKG-INFO": about}
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for file, text in files.items():
            info = tarfile.TarInfo(f"{name}-1.0/{file}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return f"{name}-1.0.tar.gz", raw.getvalue()


FILES = dict(
    [
        wheel("plain"),
        wheel("plain", "2.0"),
        wheel("needing", needs="plain<2"),
        wheel("foreign", tag="cp39-cp39-manylinux1_x86_64"),
        sdist("made", "os.makedirs('/opt/made'); open('/opt/made/log', 'w').write(sys.executable)"),
        sdist("broken", "print('the compiler is on strike', flush=True); raise SystemExit(3)"),
        sdist("slow", "print('building slowly', flush=True); import time; time.sleep(1000)"),
    ]
)


@pytest.fixture(scope="module")
def index() -> Iterator[str]:
    """A private one: whoever has no login is refused."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            login = base64.b64encode(f"{LOGIN}:{PASSWORD}".encode()).decode()
            name = self.path.strip("/").rpartition("/")[2]
            status, body = 200, FILES.get(name, b"")
            if self.headers["Authorization"] != f"Basic {login}":
                status = 401
            elif self.path.startswith("/simple/"):
                found = [file for file in FILES if file.startswith(f"{name}-")]
                status = 200 if found else 404
                body = "".join(f'<a href="/files/{file}">{file}</a>' for file in found).encode()
            self.send_response(status)
            self.send_header(
                "Content-Type", "text/html" if self.path.startswith("/simple/") else "application/octet-stream"
            )
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer((HOST, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://{HOST}:{server.server_port}/simple"
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A store for this file, with the machine's base in it by hard links."""
    shared = pytest.MonkeyPatch()
    shared.setenv("RETHAW_IMAGES", str(IMAGES))
    asyncio.run(ImageStore(Path("/nowhere")).ensure(ImageSpec(), quiet))
    shared.undo()
    home = Path(tempfile.mkdtemp(prefix="store-", dir=IMAGES))
    (home / "images").mkdir()
    subprocess.run(["cp", "-al", str(IMAGES / BASE), str(home / "images" / BASE)], check=True)
    yield home
    subprocess.run(["rm", "-rf", str(home)], check=True)


@pytest.fixture
def store(home: Path, index: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ImageStore:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("RETHAW_IMAGES", raising=False)
    (tmp_path / "netrc").write_text(f"machine {HOST} login {LOGIN} password {PASSWORD}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("PIP_INDEX_URL", index)
    return ImageStore(home)


def left(home: Path) -> set[str]:
    return {p.name for p in (home / "images").iterdir() if not p.name.endswith(".lock")}


def inside(rootfs: Path, *argv: str) -> str:
    return subprocess.run(["chroot", rootfs, *argv], capture_output=True, text=True, check=True).stdout


def names(rootfs: Path) -> set[str]:
    return {p.relative_to(rootfs).as_posix() for p in rootfs.rglob("*")}


async def test_a_wheel_and_its_script_and_nothing_else(store: ImageStore, home: Path) -> None:
    told: list[str] = []
    image = await store.ensure(ImageSpec(pip=("plain==1.0",)), told.append)
    assert any("Successfully installed plain-1.0" in line for line in told)
    new = names(image.rootfs) - names(home / "images" / BASE / "rootfs")
    about = f"{PLACE}/plain-1.0.dist-info"
    ours = {"METADATA", "WHEEL", "RECORD", "INSTALLER", "REQUESTED", "entry_points.txt"}
    assert new - {PLACE} == {
        f"{PLACE}/plain.py",
        f"{PLACE}/plain_template.py",  # is no Python, and has no byte code
        f"{PLACE}/__pycache__",
        f"{PLACE}/__pycache__/plain.cpython-311.pyc",
        about,
        *(f"{about}/{name}" for name in ours),
        "usr/local/bin/plain-tool",
    }
    assert (image.rootfs / "usr/local/bin/plain-tool").read_text().startswith("#!/usr/bin/python3\n")
    assert inside(image.rootfs, "/usr/local/bin/plain-tool") == "plain says 1.0\n"
    cached = (image.rootfs / PLACE / "__pycache__/plain.cpython-311.pyc").read_bytes()
    assert cached[4:8] == b"\1\0\0\0", "byte code must not depend on the date of its source"
    for path in new:
        file = image.rootfs / path
        assert not file.is_file() or PASSWORD.encode() not in file.read_bytes(), path
    again: list[str] = []
    await store.ensure(ImageSpec(pip=("plain==1.0",)), again.append)
    assert again == []


async def test_a_package_without_a_wheel_is_built_in_the_sandbox(store: ImageStore) -> None:
    image = await store.ensure(ImageSpec(pip=("made",)), quiet)
    assert (image.rootfs / "opt/made/log").read_text() == "/usr/bin/python3"
    assert not Path("/opt/made").exists(), "a package's build ran on the node"
    said = inside(image.rootfs, "/usr/bin/python3", "-c", "import made; print(made.PLACE)")
    assert said.startswith("/.rethaw/tmp/"), "it was built where nothing stays"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("no-such-dist-xyzzy",), "No matching distribution found for no-such-dist-xyzzy"),
        (("broken",), "the compiler is on strike"),
        (("foreign",), "No matching distribution found for foreign"),
        (("plain==1.0 --hash=sha256:" + "0" * 64,), "DO NOT MATCH"),
        (("needing", "plain==2.0"), "conflict"),
    ],
)
async def test_what_pip_says_of_a_failure_is_shown_and_nothing_is_left(
    store: ImageStore, home: Path, words: tuple[str, ...], said: str
) -> None:
    before = left(home)
    with pytest.raises(ImageError, match=rf"(?s)step 1 of the image, `pip {words[0][:5]}.* exited with \d+\):.*{said}"):
        await store.ensure(ImageSpec(steps=(ImageStep(kind="pip", words=words),)), quiet)
    assert left(home) == before


async def test_later_packages_fit_to_those_before_and_hashes_are_checked(store: ImageStore, home: Path) -> None:
    (right,) = (hashlib.sha256(data).hexdigest() for name, data in FILES.items() if name.startswith("needing"))
    first = ImageStep(kind="pip", words=("plain<2",))
    hashed = ImageStep(kind="pip", words=(f"needing==1.0 --hash=sha256:{right}",))
    with pytest.raises(ImageError, match=r"(?s)step 2 .*conflict"):
        await store.ensure(ImageSpec(steps=(first, ImageStep(kind="pip", words=("plain==2.0",)))), quiet)
    with pytest.raises(ImageError, match=r"(?s)step 2 .*--require-hashes"):  # "plain" is there, but was taken without
        await store.ensure(ImageSpec(steps=(ImageStep(kind="run", words=("true",)), hashed)), quiet)
    image = await store.ensure(ImageSpec(steps=(first, hashed)), quiet)
    below = home / "images" / layers(ImageSpec(steps=(first,)))[-1] / "rootfs"
    assert (image.rootfs / PLACE / "needing.py").exists()
    assert (image.rootfs / PLACE / "plain.py").stat().st_ino == (below / PLACE / "plain.py").stat().st_ino
    newer = await store.ensure(
        ImageSpec(steps=(ImageStep(kind="pip", words=("plain",)), ImageStep(kind="pip", words=("plain<2",)))), quiet
    )
    found = sorted(p.name for p in (newer.rootfs / PLACE).glob("plain-*"))
    assert found == ["plain-1.0.dist-info"], "the version before is gone"
    assert inside(newer.rootfs, "/usr/local/bin/plain-tool") == "plain says 1.0\n"


async def test_a_build_of_packages_that_is_given_up_leaves_nothing(store: ImageStore, home: Path) -> None:
    before = left(home)
    running = asyncio.Event()
    spec = ImageSpec(pip=("slow",))
    task = asyncio.create_task(store.ensure(spec, lambda line: running.set() if "Preparing metadata" in line else None))
    waiter = asyncio.create_task(running.wait())
    await asyncio.wait({task, waiter}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    assert not task.done() and waiter.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 60)
    assert left(home) == before and processes(home) == []


def processes(home: Path) -> list[str]:
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(home) in command:
            found.append(command)
    return found


async def test_a_node_that_is_killed_while_packages_are_built_leaves_no_sandbox(store: ImageStore, home: Path) -> None:
    code = f"""
import asyncio
from pathlib import Path
from rethaw.images.builder import ImageStore
from rethaw.model.image_types import ImageSpec
spec = ImageSpec(pip=("slow",))
asyncio.run(ImageStore(Path({str(home)!r})).ensure(spec, lambda line: print(line, flush=True)))
"""
    node = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)  # noqa: ASYNC220
    assert node.stdout is not None
    while b"Preparing metadata" not in await asyncio.to_thread(node.stdout.readline):
        assert node.poll() is None
    assert any("runsc" in command for command in processes(home))
    node.kill()
    node.wait()
    async with asyncio.timeout(30):
        while processes(home):  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.05)


async def test_a_machine_without_pip_takes_the_wheel_of_pythons_own(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that `uv` installed has no pip beside it."""
    real = pypi.importlib.util.find_spec
    monkeypatch.setattr(pypi.importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    (name, place), *_ = pypi.tool().items()
    assert name == "pip" and place.suffix == ".whl"
    step = ImageStep(kind="pip", words=("plain==2.0",))
    image = await store.ensure(ImageSpec(steps=(step,)), quiet)
    assert inside(image.rootfs, "/usr/local/bin/plain-tool") == "plain says 2.0\n"


def test_what_pip_here_is_told(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("a certificate")
    (tmp_path / "netrc").write_text("machine one.test login a password b\nmachine other.test login c password d\n")
    listed = (
        f"default https://index.test/simple https://files.test\n:env:.index-url='https://one.test/x'\n"
        f"global.cert='{tmp_path}/ca.pem'\nglobal.find-links='/opt/wheels https://links.test/y'\nglobal.target='/nowhere'\n"
    )
    found = pypi.parse(listed, {"PIP_PRE": "1", "NETRC": f"{tmp_path}/netrc"})
    assert dict(found.values) == {"index-url": "https://one.test/x", "find-links": "https://links.test/y", "pre": "1"}
    assert (found.ca, found.hosts) == ("a certificate", ("links.test", "one.test"))
    assert found.logins == "machine one.test login a password b\n"
    plain = pypi.parse("default https://index.test/simple https://files.test\n", {})
    assert plain.hosts == ("files.test", "index.test") and plain.values == ()
    real = pypi.find()
    assert real.hosts and all("." in host for host in real.hosts), "pip says where it looks"


async def test_what_the_proxy_refuses_is_said_in_the_reason(tmp_path: Path) -> None:
    """pip shows nothing else of a tunnel that failed: the remedy was in the body, and nobody saw it."""
    async with proxy.serving(tmp_path / "sock", ()):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "sock"))
        writer.write(b"CONNECT 127.0.0.1:443 HTTP/1.1\r\n\r\n")
        line = await reader.readline()
        writer.close()
    assert line == (
        b"HTTP/1.1 403 rethaw: 127.0.0.1 is 127.0.0.1, which is not public; RETHAW_BUILD_ALLOW=127.0.0.1 allows it\r\n"
    )
