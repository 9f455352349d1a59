"""An image that another tool made, as `docker save` or an OCI layout, on its way to a server.

What travels is a tar.gz of `image.json` (what the image says of itself, and the names of its layers, lowest first) and of
the layers as they are. The server unpacks them.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import platform as machines
import posixpath
import re
import tarfile
import tempfile
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, cast

from rethaw.model.errors import InvalidInput, NotFound, TooLarge
from rethaw.sdk.additions import MAX_BYTES, MIB, TIME, digest

_JSON_BYTES = 4 * MIB  # more is no manifest
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_KEPT = 4  # archives in the cache
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}


@dataclass(frozen=True)
class Archive:
    """An image in the file or directory `path`, read when it was named; its layers are read when it travels."""

    path: Path
    chosen: str  # "name:tag", if the file holds several
    architecture: str
    layers: tuple[str, ...]
    config: dict[str, Any] = field(hash=False)  # Env, WorkingDir, Entrypoint, Cmd, User of the image
    diff_ids: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return "/"

    @property
    def words(self) -> tuple[str, ...]:
        return ()

    @property
    def env(self) -> dict[str, str]:
        pairs = (str(one).partition("=") for one in self.config.get("Env") or ())
        return {name: value for name, equals, value in pairs if equals}

    @property
    def command(self) -> tuple[str, ...]:
        """Entrypoint and Cmd."""
        return tuple(str(one) for key in ("Entrypoint", "Cmd") for one in self.config.get(key) or ())

    @property
    def workdir(self) -> str | None:
        found = posixpath.normpath("/" + str(self.config.get("WorkingDir") or "")).lstrip("/")
        return f"/{found}" if found else None

    @property
    def about(self) -> dict[str, Any]:
        """image.json."""
        names = [f"layers/{number}" for number in range(len(self.layers))]
        return {
            "architecture": self.architecture,
            "layers": names,
            "diff_ids": list(self.diff_ids),
            "config": {key: self.config[key] for key in sorted(self.config)},
        }

    def pack(self) -> bytes:
        """The tar.gz, from ~/.cache/rethaw if the file has not changed since. Raises InvalidInput, NotFound, TooLarge."""
        if self.path.is_dir():
            return _packed(self)
        try:
            stat = self.path.stat()
        except OSError:
            raise NotFound(f"there is no file {str(self.path)!r}", remedy="name the archive of an image") from None
        state = repr((1, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, self.about, self.layers))
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rethaw" / "oci"
        which = hashlib.sha256(state.encode()).hexdigest()
        with contextlib.suppress(OSError):
            for kept in home.glob(f"{which}-*.tar.gz"):
                data = kept.read_bytes()
                if digest(data)[:16] in kept.name:  # a power cut may have left half of it
                    kept.touch()
                    return data
        data = _packed(self)
        with contextlib.suppress(OSError):  # without room for it, it is made anew
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            fresh = home / f".{os.getpid()}"
            fresh.write_bytes(data)
            fresh.rename(home / f"{which}-{digest(data)[:16]}.tar.gz")
            for old in sorted(home.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
                old.unlink(missing_ok=True)
        return data

    def described(self) -> dict[str, Any]:
        """What `rethaw run --dry-run` tells."""
        with _opened(self.path) as files:
            found = [{"name": name, "bytes": files.size(name)} for name in self.layers]
        return {"source": str(self.path), "target": "/", "files": found}


def read(path: Path, name: str | None = None, platform: str | None = None) -> Archive:
    """The image in a `docker save` archive (.tar, .tar.gz), an OCI layout directory or an archive of one. `name`: which of
    several; `platform`: like "linux/arm64", else that of this machine. Raises InvalidInput, NotFound."""
    if not path.exists():
        raise NotFound(
            f"there is no image {str(path)!r}", remedy="`docker save IMAGE -o FILE.tar` writes one; or an OCI layout"
        )
    wanted = platform or f"linux/{MACHINES.get(machines.machine(), machines.machine())}"
    with _opened(path) as files:
        if files.has("manifest.json"):
            config, layers = _docker(path, files, name)
        elif files.has("index.json"):
            config, layers = _layout(path, files, name, wanted)
        else:
            raise InvalidInput(
                f"{path} is no image: it has neither manifest.json nor index.json",
                remedy="`docker save IMAGE -o FILE.tar` writes one (`docker export` does not)",
            )
        about = _object(path, files, config)
        for layer in layers:
            if not files.has(layer):
                raise InvalidInput(f"{path} lacks the layer {layer}", remedy="save the image again")
        diffs = cast("list[Any]", cast("dict[str, Any]", about.get("rootfs") or {}).get("diff_ids") or [])
        if len(diffs) != len(layers):
            raise InvalidInput(f"{path} has {len(layers)} layers and names {len(diffs)}", remedy="save the image again")
    if str(about.get("os") or "linux") != "linux":
        raise InvalidInput(f"{path} is an image for {about['os']}", remedy="use one for Linux")
    inner = cast("dict[str, Any]", about.get("config") or {})
    kept = {k: v for k, v in inner.items() if k in ("Env", "WorkingDir", "Entrypoint", "Cmd", "User") and v}
    architecture = str(about.get("architecture") or wanted.rpartition("/")[2])
    return Archive(path, name or "", architecture, tuple(layers), kept, tuple(str(one) for one in diffs))


# ---------------------------------------------------------------- both forms


def _docker(path: Path, files: _Files, name: str | None) -> tuple[str, list[str]]:
    found = _json(path, files, "manifest.json")
    entries = [cast("dict[str, Any]", one) for one in cast("list[Any]", found)] if isinstance(found, list) else []
    if name is not None:
        named = [one for one in entries if {name, f"{name}:latest"} & set(one.get("RepoTags") or ())]
    else:
        named = entries
    if len(named) != 1:
        tags = sorted(str(tag) for one in entries for tag in one.get("RepoTags") or ())
        raise _choose(path, name, tags)
    return str(named[0].get("Config")), [str(layer) for layer in named[0].get("Layers") or ()]


def _layout(path: Path, files: _Files, name: str | None, wanted: str) -> tuple[str, list[str]]:
    manifests = _manifests(path, _object(path, files, "index.json"))
    if name is not None:
        found = [one for one in manifests if _called(one) == name]
        if not found:
            raise _choose(path, name, sorted(filter(None, map(_called, manifests))))
        manifests = found
    for _ in range(4):  # an index may hold indexes
        if len(manifests) != 1 or manifests[0].get("mediaType") not in _INDEXES:
            break
        manifests = _manifests(path, _object(path, files, _blob(path, manifests[0])))
    if len(manifests) > 1:
        for_: dict[str, list[dict[str, Any]]] = {}
        for one in manifests:
            for_.setdefault(_platform(one), []).append(one)
        for_.pop("unknown/unknown", None)  # what was attested about the others
        fitting = for_.get(wanted) or [
            one for key, some in for_.items() if key.startswith(f"{wanted}/") for one in some
        ]
        if not fitting and set(for_) != {""}:
            raise InvalidInput(
                f"{path} has no image for {wanted}, but for {', '.join(sorted(for_))}", remedy="save that"
            )
        manifests = fitting or manifests
        if len(manifests) > 1:
            raise _choose(path, name, sorted(filter(None, map(_called, manifests))))
    if not manifests:
        raise InvalidInput(f"{path} holds no image", remedy="save the image again")
    manifest = _object(path, files, _blob(path, manifests[0]))
    layers = cast("list[dict[str, Any]]", manifest.get("layers") or [])
    return _blob(path, cast("dict[str, Any]", manifest.get("config") or {})), [_blob(path, one) for one in layers]


def _manifests(path: Path, index: dict[str, Any]) -> list[dict[str, Any]]:
    found = index.get("manifests")
    if not isinstance(found, list):
        raise InvalidInput(f"{path}: its index names no manifests", remedy="save the image again")
    return [cast("dict[str, Any]", one) for one in cast("list[Any]", found) if isinstance(one, dict)]


def _called(manifest: dict[str, Any]) -> str:
    notes = cast("dict[str, Any]", manifest.get("annotations") or {})
    return str(notes.get("org.opencontainers.image.ref.name") or "")


def _platform(manifest: dict[str, Any]) -> str:
    about = cast("dict[str, Any]", manifest.get("platform") or {})
    return "/".join(str(about[key]) for key in ("os", "architecture", "variant") if about.get(key))


def _choose(path: Path, name: str | None, names: list[str]) -> InvalidInput:
    listed = ", ".join(names) or "without names"
    if name is not None:
        return InvalidInput(f"{path} has no image {name!r}; it has {listed}", remedy="name one of them")
    return InvalidInput(f"{path} does not hold one image: {listed}", remedy="name=... chooses one, or save one only")


def _blob(path: Path, descriptor: dict[str, Any]) -> str:
    found = _DIGEST.fullmatch(str(descriptor.get("digest")))
    if found is None:
        raise InvalidInput(
            f"{path}: {descriptor.get('digest')!r} is not the digest of a part of it", remedy="save the image again"
        )
    return f"blobs/sha256/{found[1]}"


def _json(path: Path, files: _Files, name: str) -> Any:
    try:
        if files.size(name) > _JSON_BYTES:
            raise ValueError("it is too large")
        with files.open(name) as file:
            data = file.read()
        expected = name.removeprefix("blobs/sha256/")
        if expected != name and hashlib.sha256(data).hexdigest() != expected:
            raise ValueError("it is not what its digest says")
        return json.loads(data)
    except (KeyError, OSError, ValueError, tarfile.TarError) as error:
        raise InvalidInput(f"{path}: {name} cannot be read: {error}", remedy="save the image again") from None


def _object(path: Path, files: _Files, name: str) -> dict[str, Any]:
    found = _json(path, files, name)
    if not isinstance(found, dict):
        raise InvalidInput(f"{path}: {name} is not what it should be", remedy="save the image again")
    return cast("dict[str, Any]", found)


# ---------------------------------------------------------------- files of a directory or archive


class _Files(Protocol):
    def has(self, name: str) -> bool: ...
    def size(self, name: str) -> int: ...
    def open(self, name: str) -> IO[bytes]: ...


class _Directory:
    def __init__(self, top: Path) -> None:
        self._top = top

    def _path(self, name: str) -> Path:
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise InvalidInput(f"{self._top} names a file outside of it: {name!r}", remedy="save the image again")
        return self._top / name

    def has(self, name: str) -> bool:
        return self._path(name).is_file()

    def size(self, name: str) -> int:
        return self._path(name).stat().st_size

    def open(self, name: str) -> IO[bytes]:
        return self._path(name).open("rb")


class _Tar:
    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._members = {posixpath.normpath(member.name): member for member in tar}

    def _member(self, name: str) -> tarfile.TarInfo | None:
        for _ in range(4):  # older archives link to layers that another image of theirs has too
            member = self._members.get(posixpath.normpath(name))
            if member is None or not member.issym():
                return member
            name = posixpath.join(posixpath.dirname(name), member.linkname)
        return None

    def has(self, name: str) -> bool:
        member = self._member(name)
        return member is not None and (member.isfile() or member.islnk())

    def size(self, name: str) -> int:
        member = self._member(name)
        return member.size if member is not None else 0

    def open(self, name: str) -> IO[bytes]:
        member = self._member(name)
        file = self._tar.extractfile(member) if member is not None else None
        if file is None:
            raise KeyError(name)
        return file


@contextlib.contextmanager
def _opened(path: Path) -> Generator[_Files]:
    if path.is_dir():
        yield _Directory(path)
        return
    try:
        with contextlib.ExitStack() as stack:
            file: IO[bytes] = stack.enter_context(path.open("rb"))
            head = file.read(4)
            file.seek(0)
            if head[:2] == _GZIP:  # to be read in any order, it is unpacked once
                plain = stack.enter_context(tempfile.TemporaryFile())
                with gzip.GzipFile(fileobj=file) as packed:
                    while data := packed.read(1 << 20):
                        plain.write(data)
                plain.seek(0)
                file = plain
            yield _Tar(stack.enter_context(tarfile.open(fileobj=file, mode="r:")))
    except (OSError, EOFError, tarfile.TarError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(
            f"{path} is no archive of an image: {error}", remedy="`docker save IMAGE -o FILE.tar` writes one"
        ) from None


# ---------------------------------------------------------------- what travels


def _packed(image: Archive) -> bytes:
    out = io.BytesIO()
    with _opened(image.path) as files:
        levels = {_level(files, layer) for layer in image.layers}
        with (
            gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0, compresslevel=max(levels, default=1)) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            _member(tar, "image.json", io.BytesIO(data := json.dumps(image.about, sort_keys=True).encode()), len(data))
            for number, layer in enumerate(image.layers):
                with files.open(layer) as file:
                    reading = _Reading(file)
                    _member(tar, f"layers/{number}", reading, files.size(layer))
                expected = layer.removeprefix("blobs/sha256/")
                if expected != layer and reading.digest.hexdigest() != expected:
                    raise InvalidInput(f"{image.path}: the layer {layer} is damaged", remedy="save the image again")
                _fitting(image, out)
    _fitting(image, out)
    return out.getvalue()


def _fitting(image: Archive, out: io.BytesIO) -> None:
    if out.tell() > MAX_BYTES:
        raise TooLarge(
            f"{image.path} has more than {MAX_BYTES // MIB} MiB when packed, which is the most that travels",
            remedy="make it smaller: a slim base, and no caches of package managers in it",
        )


def _level(files: _Files, layer: str) -> int:
    """Of compression; none for what is compressed."""
    with files.open(layer) as file:
        head = file.read(4)
    return 0 if head[:2] == _GZIP or head == _ZSTD else 1


class _Reading:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        return data


def _member(tar: tarfile.TarFile, name: str, file: Any, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o644, TIME
    tar.addfile(member, file)
