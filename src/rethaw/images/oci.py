"""Turns an image of another tool, as `rethaw.sdk.oci` packs it, into a tree: layer over layer, as its tool would.

The archive is foreign. A path is followed through the links of the tree as a chroot would, never outside; what is not a
file, a directory or a link is left out, and nothing of it is executed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import posixpath
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from backports import zstd

from rethaw.images import build, places
from rethaw.images.spec import KERNELS
from rethaw.model.errors import ImageError

MAX_BYTES = 16 << 30
MAX_MEMBERS = 2_000_000
_JSON_BYTES = 4 << 20
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_REMEDY = "save the image again"


def unpack(archive: Path, rootfs: Path, work: Path, progress: Callable[[str], None]) -> None:
    """Make `rootfs` of the tar.gz `archive`. `work`: a directory of ours, made and removed. Blocking; raises ImageError."""
    work.mkdir()
    try:
        about = _spread(archive, work)
        theirs, ours = str(about.get("architecture")), _MACHINES.get(platform.machine(), platform.machine())
        if theirs != ours:
            raise ImageError(
                f"the image is for {theirs}, this node is {ours}", remedy=f"save it with --platform linux/{ours}"
            )
        rootfs.mkdir()
        rootfs.chmod(0o755)
        layers, diffs = about["layers"], about["diff_ids"]
        room = _Room()
        for number, name in enumerate(layers):
            progress(f"layer {number + 1} of {len(layers)}")
            _layer(work / str(name), str(diffs[number]), rootfs, room, f"layer {number + 1}")
        _settle(rootfs)
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, zlib.error) as error:
        raise ImageError(f"the image cannot be unpacked: {error}", remedy=_REMEDY) from error
    except (tarfile.TarError, zstd.ZstdError) as error:
        raise ImageError(f"the image cannot be unpacked: {error}", remedy=_REMEDY) from error
    finally:
        places.clear(work)


def _spread(archive: Path, work: Path) -> dict[str, Any]:
    """image.json; the layers go to `work`. Names are ours or the archive is refused."""
    (work / "layers").mkdir()
    about: dict[str, Any] | None = None
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            head, _, number = member.name.partition("/")
            ours = member.name == "image.json" or (head == "layers" and number.isdecimal())
            source = tar.extractfile(member) if ours and member.isfile() else None
            if source is None:
                raise ValueError(f"it has a part {member.name!r}")
            if member.name == "image.json":
                about = cast("dict[str, Any]", json.loads(source.read(_JSON_BYTES)))
                continue
            with (work / "layers" / str(int(number))).open("xb") as out:
                while data := source.read(1 << 20):
                    out.write(data)
    if about is None or len(about["layers"]) != len(about["diff_ids"]):
        raise ValueError("it does not say what it is")
    for number, name in enumerate(about["layers"]):
        if name != f"layers/{number}":
            raise ValueError(f"it has no layer {number}")
    return about


class _Room:
    """What an image may still take."""

    def __init__(self) -> None:
        self.bytes = 0
        self.members = 0

    def take(self, member: tarfile.TarInfo) -> None:
        self.bytes += max(0, member.size)
        self.members += 1
        if self.bytes > MAX_BYTES or self.members > MAX_MEMBERS:
            raise ImageError(f"the image has more than {MAX_BYTES >> 30} GiB or {MAX_MEMBERS} files")


class _Checked:
    """A stream whose digest is known at its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data

    def end(self) -> str:
        while self.read(1 << 20):
            pass
        return f"sha256:{self._digest.hexdigest()}"


def _plain(file: IO[bytes]) -> IO[bytes]:
    head = file.read(4)
    file.seek(0)
    if head[:2] == b"\x1f\x8b":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=file))
    if head == b"\x28\xb5\x2f\xfd":
        return cast("IO[bytes]", zstd.ZstdFile(file))
    return file


def _layer(source: Path, diff: str, rootfs: Path, room: _Room, what: str) -> None:
    mine: set[str] = set()  # what this layer brought: its whiteouts are about the layers below
    directories: dict[str, tarfile.TarInfo] = {}
    with source.open("rb") as file:
        checked = _Checked(_plain(file))
        with tarfile.open(fileobj=cast("IO[bytes]", checked), mode="r|") as tar:
            for member in tar:
                room.take(member)
                _member(tar, member, rootfs, mine, directories)
        if checked.end() != diff:
            raise ValueError(f"{what} is not what its digest says")
    for name, member in sorted(
        directories.items(), reverse=True
    ):  # children first: a time survives what is written below
        if places.is_plain(rootfs, name):  # it, or what led to it, may be a link by now
            _dress(rootfs / name, member)


def _member(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    rootfs: Path,
    mine: set[str],
    directories: dict[str, tarfile.TarInfo],
) -> None:
    name = _clean(member.name)
    if not name or name.partition("/")[0] in KERNELS:
        return  # made anew in each sandbox
    above, _, last = name.rpartition("/")
    parent = places.inside(rootfs, above)
    here = parent.relative_to(rootfs).as_posix()
    at = last if here == "." else f"{here}/{last}"
    if at.partition("/")[0] in KERNELS:
        return
    if last == _OPAQUE:
        _empty(parent, "" if here == "." else f"{here}/", mine)
    elif last.startswith(_WHITEOUT):
        _remove(parent / last[len(_WHITEOUT) :], at[: -len(last)] + last[len(_WHITEOUT) :], mine)
    elif _place(tar, member, rootfs, parent / last, directories, at):
        mine.add(at)


def _clean(name: str) -> str:
    if "\0" in name or ".." in name.split("/"):
        raise ValueError(f"a path leads outside: {name!r}")
    return posixpath.normpath("/" + name).lstrip("/")


def _remove(path: Path, at: str, mine: set[str]) -> None:
    if path.name in ("", ".", ".."):
        raise ValueError(f"a whiteout names {path.name!r}")
    if path.is_dir() and not path.is_symlink():
        if any(one == at or one.startswith(f"{at}/") for one in mine):
            _empty(path, f"{at}/", mine)
            return
    elif at in mine:
        return
    places.clear(path)


def _empty(directory: Path, at: str, mine: set[str]) -> None:
    """Without what the layers below have in it."""
    for path in list(directory.iterdir()):
        if not at and path.name in KERNELS:
            continue
        _remove(path, f"{at}{path.name}", mine)


def _place(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    rootfs: Path,
    path: Path,
    directories: dict[str, tarfile.TarInfo],
    at: str,
) -> bool:
    if member.isdir():
        if path.is_symlink() or not path.is_dir():
            places.clear(path)
            path.mkdir()
        directories[at] = member
    elif member.issym():
        places.clear(path)
        path.symlink_to(member.linkname)
        os.chown(path, member.uid, member.gid, follow_symlinks=False)
    elif member.islnk():
        target = _clean(member.linkname)
        above, _, last = target.rpartition("/")
        source = places.inside(rootfs, above) / last
        if not source.is_symlink() and not source.is_file():
            raise ValueError(f"{at} is a link to {target}, which is not there")
        if source != path:
            places.clear(path)
            os.link(source, path, follow_symlinks=False)
    elif member.isfile():
        _file(tar, member, path)
    else:
        return False  # devices and pipes
    return True


def _file(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(member)
    if source is None:
        raise ValueError(f"there are no contents of {member.name}")
    places.clear(path)  # never a write into what a link shares
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as out, source:
        while data := source.read(1 << 20):
            out.write(data)
    _dress(path, member)


def _dress(path: Path, member: tarfile.TarInfo) -> None:
    os.chown(path, member.uid, member.gid)
    path.chmod(member.mode & 0o7777)
    os.utime(path, (max(0, member.mtime), max(0, member.mtime)))


def _settle(rootfs: Path) -> None:
    """What a sandbox needs of any tree: mount points, names of this machine, root's home."""
    for name in KERNELS:
        path = rootfs / name
        if path.is_symlink() or not path.is_dir():
            places.clear(path)
            path.mkdir()
    for name in ("app", "root"):
        places.inside(rootfs, name)
    (rootfs / "tmp").chmod(0o1777)
    etc = places.inside(rootfs, "etc")
    for name, text in build.NAMES.items():
        places.clear(etc / name)
        (etc / name).write_text(text)
        (etc / name).chmod(0o644)
