"""Images of another tool, made by hand: OCI layouts and `docker save` archives of layers that tests write down."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

IMAGES = Path(os.environ.get("RETHAW_TEST_IMAGES", Path(tempfile.gettempdir()) / "rethaw-test-images"))
MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
APPLETS = ("sh", "cat", "echo", "ls", "mkdir", "sleep", "env", "id", "rm", "mktemp", "wc", "true", "pwd", "tr", "kill")


def entry(name: str, data: bytes | str | None = None, **about: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A member: a file of `data`, else a directory; `link`, `hard`, `type`, `mode`, `uid`, `gid` say otherwise."""
    info = tarfile.TarInfo(name)
    content = data.encode() if isinstance(data, str) else data or b""
    info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
    info.mode = about.pop("mode", 0o755 if data is None else 0o644)
    if "link" in about:
        info.type, info.linkname = tarfile.SYMTYPE, about.pop("link")
    if "hard" in about:
        info.type, info.linkname = tarfile.LNKTYPE, about.pop("hard")
    for key, value in about.items():
        setattr(info, key, value)
    info.size = len(content)
    return info, content


def layer(entries: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return raw.getvalue()


class Layout:
    """An OCI layout in a directory."""

    def __init__(self, top: Path) -> None:
        self.top = top
        (top / "blobs/sha256").mkdir(parents=True)
        (top / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.manifests: list[dict[str, Any]] = []

    def blob(self, data: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (self.top / "blobs/sha256" / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    def add(self, layers: list[bytes], config: dict[str, Any], name: str = "", machine: str = MACHINE) -> None:
        """The odd ones among the layers are compressed."""
        about = {
            "architecture": machine,
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in layers]},
        }
        packed = [gzip.compress(one, 1, mtime=0) if number % 2 else one for number, one in enumerate(layers)]
        manifest = {
            "schemaVersion": 2,
            "config": self.blob(json.dumps(about).encode(), "config.v1+json"),
            "layers": [self.blob(one, "layer.v1.tar") for one in packed],
        }
        described = self.blob(json.dumps(manifest).encode(), "manifest.v1+json")
        described["platform"] = {"os": "linux", "architecture": machine}
        if name:
            described["annotations"] = {"org.opencontainers.image.ref.name": name}
        self.manifests.append(described)
        (self.top / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self.manifests}))


def docker_save(path: Path, layers: list[bytes], config: dict[str, Any], tag: str = "made:latest") -> Path:
    """An archive as older versions of docker write it."""
    about = {
        "architecture": MACHINE,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in layers]},
    }
    names = [f"{number:064x}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": "about.json", "RepoTags": [tag], "Layers": names}]
    members = [entry(name, one) for name, one in zip(names, layers, strict=True)]
    members += [entry("about.json", json.dumps(about)), entry("manifest.json", json.dumps(manifest))]
    data = layer(members)
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def busybox() -> bytes:
    """Debian's static one: a program without a C library beside it. Fetched once."""
    kept = IMAGES / ".busybox-static"
    if not kept.exists():
        IMAGES.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            subprocess.run(["chmod", "755", work], check=True)
            subprocess.run(["apt-get", "download", "busybox-static"], cwd=work, check=True, capture_output=True)
            (package,) = Path(work).glob("busybox-static_*.deb")
            subprocess.run(["dpkg-deb", "-x", package, f"{work}/x"], check=True)
            fresh = IMAGES / f".busybox-{os.getpid()}"
            fresh.write_bytes((Path(work) / "x/bin/busybox").read_bytes())
            fresh.rename(kept)
    return kept.read_bytes()


def busybox_layers() -> list[bytes]:
    """A root of nothing but busybox; its loader's cache and preloads would break any other program's."""
    first = [entry("bin"), entry("bin/busybox", busybox(), mode=0o755)]
    first += [entry(f"bin/{name}", "", link="busybox") for name in APPLETS]
    second = [
        entry("etc"),
        entry("etc/ld.so.cache", "not one of ours"),
        entry("srv"),
        entry("srv/data", "from the image\n"),
    ]
    return [layer(first), layer(second)]


_PYTHON = (
    "usr/bin/python3*",
    "usr/bin/dash",
    "usr/bin/sh",
    "usr/bin/ls",
    "usr/bin/which*",
    "usr/bin/dirname",
    "bin",
    "lib",
    "lib64",
)
_LIBRARIES = ("usr/lib64", "usr/lib64/*", "usr/lib/*-linux-gnu*/*.so*", "usr/lib/python3*/**/*", "etc/python3*/*")


def python_layer(tree: Path, pip: bool) -> bytes:
    """A Python with a shell, out of a Debian `tree`; with Debian's python3-pip if `pip`."""
    raw, taken = io.BytesIO(), set[str]()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for pattern in (*_PYTHON, *_LIBRARIES, *(("usr/bin/pip3",) if pip else ())):
            for path in sorted(tree.glob(pattern)):
                name = path.relative_to(tree).as_posix()
                behind = "__pycache__" in name or (not pip and "/dist-packages/" in name)
                if name not in taken and not behind and (path.is_symlink() or path.is_file()):
                    taken.add(name)
                    tar.add(path, name)
    return raw.getvalue()
