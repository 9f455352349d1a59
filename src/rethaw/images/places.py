"""Writes into trees that others have had a hand in: their symbolic links lead where they lead inside, never to the host."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from rethaw.model.errors import ImageError

_LINKS = 40


def inside(rootfs: Path, target: str) -> Path:
    """The directory `target` of the tree, made where it is missing; links are followed as a chroot would. Blocking."""
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
            path.mkdir()
            path.chmod(0o755)
            mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            links += 1
            if links > _LINKS:
                raise ImageError(f"{target} of the image leads through too many links", remedy="use another place")
            where = str(path.readlink())
            if where.startswith("/"):
                done = []
            todo += [piece for piece in where.split("/") if piece not in ("", ".")][::-1]
        elif stat.S_ISDIR(mode):
            done.append(part)
        else:
            raise ImageError(f"{target} of the image leads through the file /{'/'.join([*done, part])}")
    if done[:1] == [".rethaw"]:
        raise ImageError(f"{target} of the image leads to /.rethaw, which is Rethaw's own", remedy="use another place")
    return rootfs.joinpath(*done)


def resolved(rootfs: Path, target: str) -> Path | None:
    """What `target` leads to in the tree, links followed as a chroot would; None if it leads nowhere. Blocking."""
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
        except OSError:
            return None
        if stat.S_ISLNK(mode):
            links += 1
            if links > _LINKS:
                return None
            where = str(path.readlink())
            done = [] if where.startswith("/") else done
            todo += [piece for piece in where.split("/") if piece not in ("", ".")][::-1]
        else:
            done.append(part)
    return rootfs.joinpath(*done)


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
