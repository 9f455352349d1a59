"""Unpacks an agent's code without trusting the archive."""

from __future__ import annotations

import os
import posixpath
import tarfile
import zlib
from pathlib import Path

from rethaw.model.errors import ImageError

MAX_BYTES = 512 << 20
MAX_MEMBERS = 50_000


def extract(archive: Path, target: Path) -> None:
    """Unpack the tar.gz `archive` into the directory `target`. Blocking.

    Files, directories and symbolic links that stay inside; anything else raises ImageError naming it. Owner is root,
    set-id bits are dropped, times are kept.
    """
    target.mkdir(parents=True, exist_ok=True)
    links: set[str] = set()
    total = count = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                count += 1
                total += max(0, member.size)
                if count > MAX_MEMBERS or total > MAX_BYTES:
                    raise ImageError(
                        f"the code archive is larger than {MAX_BYTES >> 20} MiB or {MAX_MEMBERS} files",
                        remedy="leave out what the agent does not need",
                    )
                name = _inside(member.name, links)
                if name:
                    _place(tar, member, name, target, links)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ImageError(
            f"the code archive {archive.name} cannot be unpacked: {error}", remedy="upload it again"
        ) from None


def _inside(name: str, links: set[str]) -> str:
    """`name` normalised; raises when it leads out of the directory."""
    clean = posixpath.normpath(name)
    parts = clean.split("/")
    if clean.startswith("/") or ".." in parts or "\0" in name:
        raise ImageError(f"the code archive has a path that leads outside: {name!r}", remedy="pack relative paths")
    if any("/".join(parts[:i]) in links for i in range(1, len(parts))):
        raise ImageError(f"the code archive has a path through a link: {name!r}", remedy="pack the files themselves")
    return "" if clean == "." else clean


def _place(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, target: Path, links: set[str]) -> None:
    path = target / name
    mode = member.mode & 0o755 | (0o700 if member.isdir() else 0o600) | 0o044
    path.parent.mkdir(parents=True, exist_ok=True)
    if member.isdir():
        path.mkdir(exist_ok=True)
        path.chmod(mode | 0o055)
        return
    if path.is_symlink() or path.exists():
        path.unlink()  # a later member of that name wins, as with tar
        links.discard(name)
    if member.isfile():
        source = tar.extractfile(member)
        if source is None:
            raise ImageError(f"the code archive has no contents for {name!r}", remedy="upload it again")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as out, source:
            while data := source.read(1 << 20):
                out.write(data)
            os.fchmod(out.fileno(), mode)
        os.utime(path, (max(0, member.mtime), max(0, member.mtime)))
    elif member.issym():
        where = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        if member.linkname.startswith("/") or where == ".." or where.startswith("../"):
            raise ImageError(
                f"the code archive has a link that leads outside: {name!r} -> {member.linkname!r}",
                remedy="pack the files themselves",
            )
        path.symlink_to(member.linkname)
        links.add(name)
    else:
        raise ImageError(f"the code archive has {name!r}, which is no file, directory or symbolic link")
