"""Writes into trees that others have had a hand in: their symbolic links lead where they lead inside, never to the host."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from rethaw.model.errors import ImageError

_LINKS = 40


def inside(rootfs: Path, target: str) -> Path:
    """The directory `target` of the tree, made where it is missing; links are followed as a chroot would. Blocking."""

    def missing(path: Path) -> None:
        path.mkdir()
        path.chmod(0o755)

    try:
        done = _followed(rootfs, target, missing)
    except NotADirectoryError as error:
        raise ImageError(f"{target} of the image leads through a file") from error
    if done is None:
        raise ImageError(f"{target} of the image leads through too many links", remedy="use another place")
    if not rootfs.joinpath(*done).is_dir():
        raise ImageError(f"{target} of the image leads to the file /{'/'.join(done)}")
    if done[:1] == [".rethaw"]:
        raise ImageError(f"{target} of the image leads to /.rethaw, which is Rethaw's own", remedy="use another place")
    return rootfs.joinpath(*done)


def resolved(rootfs: Path, target: str) -> Path | None:
    """What `target` leads to in the tree, links followed as a chroot would; None if it leads nowhere. Blocking."""

    def missing(path: Path) -> None:
        raise FileNotFoundError(path)

    try:
        done = _followed(rootfs, target, missing)
    except OSError:
        return None
    return None if done is None else rootfs.joinpath(*done)


def is_plain(rootfs: Path, name: str) -> bool:
    """Whether `name` is a directory of the tree with no link on the way to it. Blocking."""
    path = rootfs
    for part in name.split("/"):
        path = path / part
        try:
            if not stat.S_ISDIR(path.lstat().st_mode):
                return False
        except OSError:
            return False
    return True


def _followed(rootfs: Path, target: str, missing: Callable[[Path], None]) -> list[str] | None:
    """The parts of where `target` leads; None after too many links. A path that is not there is given to `missing`, which
    makes it or raises. Raises OSError for what lies below a file."""
    todo = [part for part in target.split("/") if part not in ("", ".")][::-1]
    done: list[str] = []
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            done = done[:-1]
            continue
        path = rootfs.joinpath(*done, part)
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            missing(path)
            mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            links += 1
            if links > _LINKS:
                return None
            where = str(path.readlink())
            if where.startswith("/"):
                done = []
            todo += [piece for piece in where.split("/") if piece not in ("", ".")][::-1]
        else:
            done.append(part)
    return done


def clear(path: Path) -> None:
    """Whatever is there goes, a link itself and not what it leads to. Blocking."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        shutil.rmtree(path)
    else:
        path.unlink()


def merge(source: Path, rootfs: Path, target: str) -> None:
    """Move what is in the directory `source` (on the same disk, made by us) to `target` of the tree. Files replace files;
    a file where a directory is raises ImageError. Blocking."""
    base = inside(rootfs, target)
    stack = [(source, base, target.rstrip("/"))]
    while stack:
        here, there, said = stack.pop()
        with os.scandir(here) as entries:
            for entry in entries:
                goal = there / entry.name
                if entry.is_dir(follow_symlinks=False):
                    below = inside(rootfs, f"{goal.relative_to(rootfs).as_posix()}")
                    stack.append((Path(entry.path), below, f"{said}/{entry.name}"))
                    continue
                if goal.is_dir() and not goal.is_symlink():
                    raise ImageError(
                        f"{said}/{entry.name} is a directory of the image and cannot become a file",
                        remedy="choose another target",
                    )
                goal.unlink(missing_ok=True)
                Path(entry.path).rename(goal)
