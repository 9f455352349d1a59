"""Applies what a step changed in its sandbox to a tree. The sandbox may lie: nothing that it says is followed outside.

It gives a tar of what is new or changed, and the names of everything that is there at the end.
"""

from __future__ import annotations

import filecmp
import os
import stat
import tarfile
from pathlib import Path, PurePosixPath

from rethaw.images import places
from rethaw.images.spec import KERNELS
from rethaw.model.errors import ImageError

MAX_BYTES = 16 << 30
MAX_MEMBERS = 2_000_000


def apply(out: Path, rootfs: Path) -> None:
    """`out` has changes.tar and names (each ended by a zero byte); `rootfs` is a link copy of the tree below. Blocking."""
    try:
        with (out / "names").open("rb") as file:
            names = set(file.read(1 << 30).split(b"\0"))
        if b"." not in names:
            raise ValueError("no list of files")
        with tarfile.open(out / "changes.tar", "r:") as tar:
            _remove(rootfs, names)
            _add(tar, rootfs)
    except (OSError, ValueError, tarfile.TarError) as error:
        raise ImageError(
            f"what the step changed cannot be read: {error}",
            remedy="it must leave the image's python3 and /.rethaw as they are",
        ) from error


def _remove(rootfs: Path, names: set[bytes]) -> None:
    stack = [b""]
    root = os.fsencode(rootfs)
    while stack:
        below = stack.pop()
        with os.scandir(os.path.join(root, below)) as entries:  # noqa: PTH118 - bytes
            for entry in entries:
                name = below + b"/" + entry.name if below else entry.name
                if not below and os.fsdecode(name) in KERNELS:
                    continue
                if name not in names:
                    places.clear(Path(os.fsdecode(entry.path)))
                elif entry.is_dir(follow_symlinks=False):
                    stack.append(name)


def _add(tar: tarfile.TarFile, rootfs: Path) -> None:
    total = count = 0
    directories: list[tuple[Path, tarfile.TarInfo]] = []
    for member in tar:
        count += 1
        total += max(0, member.size)
        if total > MAX_BYTES or count > MAX_MEMBERS:
            raise ImageError(f"the step wrote more than {MAX_BYTES >> 30} GiB or {MAX_MEMBERS} files")
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or not name.parts or "\0" in member.name:
            raise ValueError(f"a file named {member.name!r}")
        if name.parts[0] in KERNELS:
            continue
        path = _parent(rootfs, name) / name.name
        if member.isdir():
            if not path.is_dir() or path.is_symlink():
                places.clear(path)
                path.mkdir()
            directories.append((path, member))
        elif member.issym():
            places.clear(path)
            path.symlink_to(member.linkname)
            os.lchown(path, member.uid, member.gid)
        elif member.isfile():
            _file(tar, member, path)
    for path, member in reversed(directories):  # children first: a time survives what is written below
        if path.is_dir() and not path.is_symlink():
            _dress(path, member)


def _parent(rootfs: Path, name: PurePosixPath) -> Path:
    path = rootfs
    for part in name.parts[:-1]:
        path /= part
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise ValueError(f"{name} lies below something that is no directory")
    return path


def _file(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(member)
    if source is None:
        raise ValueError(f"no contents of {member.name}")
    fresh = path.with_name(f".rethaw-new-{os.getpid()}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as out, source:
        while data := source.read(1 << 20):
            out.write(data)
    _dress(fresh, member)
    if _same(fresh, path):
        fresh.unlink()  # only its change time was new: the layer below keeps it
        return
    if path.is_dir() and not path.is_symlink():
        places.clear(path)
    fresh.replace(path)


def _same(fresh: Path, path: Path) -> bool:
    try:
        one, two = fresh.lstat(), path.lstat()
    except OSError:
        return False
    alike = stat.S_ISREG(two.st_mode) and all(
        getattr(one, f) == getattr(two, f) for f in ("st_mode", "st_uid", "st_gid", "st_size")
    )
    return alike and int(one.st_mtime) == int(two.st_mtime) and filecmp.cmp(fresh, path, shallow=False)


def _dress(path: Path, member: tarfile.TarInfo) -> None:
    os.chown(path, member.uid, member.gid)
    path.chmod(member.mode & 0o7777)
    os.utime(path, (max(0, member.mtime), max(0, member.mtime)))
