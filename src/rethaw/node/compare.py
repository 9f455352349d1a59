"""What differs between the files of two snapshots.

Each tree is reduced to what it has on top of its image, so that two agents on different images compare by what they
themselves did. Size, mode, owner, target and times tell most differences; a file of which they cannot tell is hashed.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rethaw.model.looking import FileChange, FileKind

_KERNEL = {"/proc", "/sys", "/dev", "/.rethaw"}
# Written by the engine or by guestd at each boot, or empty directories that they mount over.
_NOISE = {"/run/rethaw"}
_KINDS: dict[int, FileKind] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@dataclass(frozen=True)
class Found:
    """One file, as far as a comparison goes."""

    kind: FileKind
    mode: int
    size: int
    mtime_ns: int
    uid: int
    gid: int
    ctime_ns: int = 0
    target: str | None = None


@dataclass(frozen=True)
class Tree:
    """`own`: what differs from the image, None for what it has no more. `image`: all of the image."""

    own: dict[str, Found | None]
    image: dict[str, Found]

    def at(self, path: str) -> Found | None:
        return self.own[path] if path in self.own else self.image.get(path)


@dataclass(frozen=True)
class Doubt:
    """Both sides of one path that differs, or may. `unsure`: only the contents can tell."""

    before: Found | None
    after: Found | None
    unsure: bool


def above(out: bytes, rootfs: Path | None) -> Tree:
    """The tree that `inside` printed, and what its image has. Blocking, 0.1 s for a base image."""
    own: dict[str, Found | None] = {}
    for line in out.splitlines():
        values = cast("dict[str, Any]", json.loads(line))
        path = str(values.pop("path"))
        if path not in _NOISE:
            own[path] = Found(**values)
    image = {} if rootfs is None else _image(rootfs)
    for path, base in image.items():
        found = own.get(path)
        if found is None:
            own[path] = None
        elif _alike(found, base):
            del own[path]
    return Tree(own, image)


def _image(rootfs: Path) -> dict[str, Found]:
    out: dict[str, Found] = {}
    root = str(rootfs)
    waiting = [root]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                path = entry.path[len(root) :]
                if path in _KERNEL or path in _NOISE:
                    continue
                info = entry.stat(follow_symlinks=False)
                kind = _KINDS.get(stat.S_IFMT(info.st_mode), "device")
                out[path] = Found(
                    kind,
                    stat.S_IMODE(info.st_mode),
                    info.st_size if kind == "file" else 0,
                    info.st_mtime_ns,
                    info.st_uid,
                    info.st_gid,
                    target=str(Path(entry.path).readlink()) if kind == "link" else None,
                )
                if kind == "directory":
                    waiting.append(entry.path)
    return out


def _alike(one: Found, other: Found) -> bool:
    """By all that is known but the time of the inode's change, which making an image moves."""
    if (one.kind, one.mode, one.uid, one.gid, one.target) != (
        other.kind, other.mode, other.uid, other.gid, other.target
    ):  # fmt: skip
        return False
    # Of a directory only its own attributes count: what came and went in it is told by itself.
    return one.kind != "file" or (one.size, one.mtime_ns) == (other.size, other.mtime_ns)


def trees(before: Tree, after: Tree) -> dict[str, Doubt]:
    """Paths that differ or may, in order."""
    out: dict[str, Doubt] = {}
    for path in sorted(before.own.keys() | after.own.keys()):
        old, new = before.at(path), after.at(path)
        if old is None or new is None:
            if old is not new:
                out[path] = Doubt(old, new, False)
        elif not _alike(old, new) or (path in before.own and path in after.own and old.ctime_ns != new.ctime_ns):
            out[path] = Doubt(old, new, old.kind == new.kind == "file" and old.size == new.size)
    return out


def settle(found: dict[str, Doubt], hashes: dict[str, tuple[str, str]]) -> list[FileChange]:
    """The differences that are left once contents were compared ("-" for one that could not be read)."""
    out: list[FileChange] = []
    for path, doubt in found.items():
        old, new = doubt.before, doubt.after
        if old is None and new is not None:
            out.append(FileChange(path=path, change="added", kind=new.kind, size_after=new.size))
        elif old is not None and new is None:
            out.append(FileChange(path=path, change="removed", kind=old.kind, size_before=old.size))
        elif old is not None and new is not None:
            what = _what(old, new, hashes.get(path) if doubt.unsure else None)
            if what:
                out.append(
                    FileChange(
                        path=path,
                        change="changed",
                        kind=new.kind,
                        size_before=old.size,
                        size_after=new.size,
                        what=what,
                    )
                )
    return out


def _what(old: Found, new: Found, hashes: tuple[str, str] | None) -> tuple[str, ...]:
    same_bytes = hashes is not None and hashes[0] == hashes[1] != "-"
    differs = {
        "kind": old.kind != new.kind,
        "content": new.kind == "file" and (old.size != new.size or (hashes is not None and not same_bytes)),
        "mode": old.mode != new.mode,
        "owner": (old.uid, old.gid) != (new.uid, new.gid),
        "target": old.target != new.target,
    }
    return tuple(name for name, yes in differs.items() if yes)
