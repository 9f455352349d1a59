"""npm packages in an image: from the registry of this machine's npm configuration, whose tokens stay outside."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from rethaw import Image
from rethaw.images import npm
from rethaw.images.builder import ImageStore
from rethaw.images.spec import layers
from rethaw.model.errors import ImageError

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
IMAGES = Path(os.environ.get("RETHAW_TEST_IMAGES", Path(tempfile.gettempdir()) / "rethaw-test-images"))
NODE = Image.debian().apt_install("nodejs", "npm")
TOKEN = "npm_thisIsNoRealToken"
# What its script can see of the build, and what the program says.
SCRIPT = "cp /.rethaw/npmrc* /opt/ 2>/dev/null; env > /opt/env; node main.js > /opt/script"


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def store() -> Iterator[ImageStore]:
    """A store for this file, with the machine's Debian with node in it by hard links."""
    shared = pytest.MonkeyPatch()
    shared.setenv("RETHAW_IMAGES", str(IMAGES))
    asyncio.run(ImageStore(Path("/nowhere")).ensure(NODE.spec, quiet))
    shared.delenv("RETHAW_IMAGES")
    home = Path(tempfile.mkdtemp(prefix="store-", dir=IMAGES))
    (home / "images").mkdir()
    for digest in layers(NODE.spec):
        subprocess.run(["cp", "-al", str(IMAGES / digest), str(home / "images" / digest)], check=True)
    yield ImageStore(home)
    shared.undo()
    subprocess.run(["rm", "-rf", str(home)], check=True)


def package(name: str, version: str) -> bytes:
    about = {"name": name, "version": version, "bin": {name: "main.js"}, "scripts": {"postinstall": SCRIPT}}
    files = {
        "package.json": json.dumps(about),
        "main.js": "#!/usr/bin/env node\nconsole.log(`${6 * 7} of " + version + "`)\n",
    }
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for file, text in files.items():
            info = tarfile.TarInfo(f"package/{file}")
            info.size, info.mode = len(text), 0o755
            tar.addfile(info, io.BytesIO(text.encode()))
    return raw.getvalue()


@pytest.fixture
def registry() -> Iterator[int]:
    """A private one: whoever has not got the token is refused."""
    tarballs = {version: package("answering", version) for version in ("1.0.0", "2.0.0")}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here = f"http://registry.test:{self.server.server_address[1]}"
            body, status = b"{}", 404
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status = 401
            elif self.path == "/answering":
                found = {
                    version: {
                        **{"name": "answering", "version": version, "bin": {"answering": "main.js"}},
                        **{"hasInstallScript": True, "scripts": {"postinstall": SCRIPT}},
                        "dist": {
                            "tarball": f"{here}/answering/-/answering-{version}.tgz",
                            "integrity": "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode(),
                        },
                    }
                    for version, data in tarballs.items()
                }
                body, status = (
                    json.dumps({"name": "answering", "dist-tags": {"latest": "2.0.0"}, "versions": found}).encode(),
                    200,
                )
            elif self.path.endswith(".tgz"):
                body, status = tarballs[self.path.rpartition("-")[2].removesuffix(".tgz")], 200
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()


async def _resolving(host: str, port: int, **_: Any) -> list[Any]:
    assert host == "registry.test"
    return [(2, 1, 6, "", ("127.0.0.1", port))]


@pytest.fixture
def configured(registry: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".npmrc").write_text(
        f"registry=http://registry.test:{registry}/\n//registry.test:{registry}/:_authToken=${{MINE}}\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("npm_config_userconfig", str(tmp_path / ".npmrc"))
    monkeypatch.setenv("MINE", TOKEN)


@pytest.mark.usefixtures("configured")
async def test_a_private_registrys_token_is_used_and_never_in_the_image(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", _resolving)
    said: list[str] = []
    image = Image.debian().npm_install("answering@1.0.0")
    root = (await store.ensure(image.spec, said.append)).rootfs
    assert "answering" in str((root / "usr/local/bin/answering").readlink())
    assert (root / "opt/script").read_text() == "42 of 1.0.0\n"
    assert sorted(p.name for p in root.glob("opt/npmrc*")) == ["npmrc-plain"]  # the script ran without the other
    assert "registry.test" in (root / "opt/npmrc-plain").read_text()
    places = [root / name for name in ("opt", "root", "etc", "usr/local")]
    hits = subprocess.run(["grep", "-rl", TOKEN, *places], check=False)  # noqa: ASYNC221
    assert hits.returncode == 1 and not (root / "root/.npm").exists()
    again: list[str] = []
    await store.ensure(image.spec, again.append)
    assert said and not again


@pytest.mark.usefixtures("configured")
async def test_a_package_that_is_not_there_is_named_and_leaves_nothing(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", _resolving)
    before = sorted(p.name for p in store.home.iterdir() if not p.name.endswith(".lock"))
    with pytest.raises(ImageError, match=r"(?s)`npm no-such-package`.*E404"):
        await store.ensure(Image.debian().npm_install("no-such-package").spec, quiet)
    assert sorted(p.name for p in store.home.iterdir() if not p.name.endswith(".lock")) == before


def test_npms_configuration_is_read_as_npm_reads_it(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("CERTIFICATE")
    weaker = f"registry=https://one.test/\ncafile = {tmp_path}/ca.pem\nloglevel=silly\n"
    stronger = "; a comment\nregistry = https://two.test/npm/\n@mine:registry=https://three.test\n//three.test/:_authToken=${T}\n"
    found = npm.parse([weaker, stronger], {"T": "secret", "npm_config_strict_ssl": "true"})
    assert found.hosts == ("three.test", "two.test") and "CERTIFICATE" in found.ca
    assert set(found.plain) == {
        "registry=https://two.test/npm/",
        "@mine:registry=https://three.test",
        "strict-ssl=true",
    }
    assert found.secret == ("//three.test/:_authToken=secret",)
    assert "secret" in found.files()["npmrc"] and "secret" not in found.files()["npmrc-plain"]
    assert npm.parse([], {}).env().get("NODE_EXTRA_CA_CERTS") is None
