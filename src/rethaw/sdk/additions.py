"""Files of the caller's disk that travel into an image, packed so that equal files have equal bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rethaw.model.errors import InvalidInput, NotFound, TooLarge
from rethaw.sdk import ignore

MIB = 1 << 20
MAX_BYTES = 512 * MIB  # of one upload, unpacked; the server's limits are the same
MAX_FILES = 50_000


@dataclass(frozen=True)
class Entry:
    """One member of an archive: a file's `path` (or its `data`), or a symbolic link's `link`."""

    name: str
    path: Path | None = None
    data: bytes | None = None
    link: str | None = None
    executable: bool = False

    @property
    def size(self) -> int:
        if self.data is not None:
            return len(self.data)
        return self.path.stat().st_size if self.path is not None else 0


@dataclass(frozen=True)
class Addition:
    """`source`, a file or directory, to be at `target`. Read when an agent is started, not before."""

    source: Path
    target: str
    ignored: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Where its archive is unpacked."""
        return self.target if self.source.is_dir() else self.target.rpartition("/")[0] or "/"

    @property
    def words(self) -> tuple[str, ...]:
        return ()

    def entries(self) -> list[Entry]:
        """Sorted by name. Raises InvalidInput, NotFound, TooLarge, naming the file."""
        if self.source.is_dir():
            found = list(walk(self.source, ignore.of(self.source, self.ignored)))
        elif self.source.is_file():
            found = [_entry(self.source, self.target.rpartition("/")[2])]
        else:
            raise NotFound(f"there is no file {str(self.source)!r} to add to the image", remedy="correct its path")
        return checked(found, str(self.source))

    def pack(self) -> bytes:
        return pack(self.entries())

    def described(self) -> dict[str, Any]:
        """What `rethaw run --dry-run` tells."""
        files = [{"name": entry.name, "bytes": entry.size} for entry in self.entries()]
        return {"source": str(self.source), "target": self.target, "files": files}


def checked(entries: Iterable[Entry], source: str) -> list[Entry]:
    """Sorted, and no more than a server takes."""
    found = sorted(entries, key=lambda entry: entry.name)
    sizes = [(entry.size, entry.name) for entry in found]
    total = sum(size for size, _ in sizes)
    if total > MAX_BYTES or len(found) > MAX_FILES:
        largest = ", ".join(f"{name} ({size // MIB} MiB)" for size, name in sorted(sizes, reverse=True)[:3])
        raise TooLarge(
            f"{source} has {len(found)} files of {total // MIB} MiB, at most {MAX_FILES} of {MAX_BYTES // MIB} MiB "
            f"travel; the largest: {largest}",
            remedy="leave out what is not needed, by ignore=[...], exclude=[...] or a .rethawignore file",
        )
    return found


def pack(entries: Iterable[Entry]) -> bytes:
    """A tar.gz of them. Owner, times and all of the mode but "executable" are left out."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0, compresslevel=1) as out,
        tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for entry in entries:
            member = tarfile.TarInfo(entry.name)
            if entry.link is not None:
                member.type, member.linkname = tarfile.SYMTYPE, entry.link
                tar.addfile(member)
                continue
            member.mode, member.mtime = 0o755 if entry.executable else 0o644, TIME
            data = entry.data if entry.data is not None else entry.path.read_bytes() if entry.path is not None else b""
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


TIME = 1_700_000_000  # of every file: equal files are equal archives


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def walk(top: Path, rules: ignore.Rules) -> Iterator[Entry]:
    stack = [top]
    while stack:
        with os.scandir(stack.pop()) as listing:
            for found in sorted(listing, key=lambda one: one.name):
                path = Path(found.path)
                name = path.relative_to(top).as_posix()
                real = found.is_dir(follow_symlinks=False)
                if rules.ignores(name, real):
                    continue
                if real:
                    stack.append(path)
                elif found.is_symlink():
                    yield _link(path, name, top)
                else:
                    yield _entry(path, name)


def _link(path: Path, name: str, top: Path) -> Entry:
    where = str(path.readlink())
    inside = os.path.normpath(os.path.join(os.path.dirname(name), where))  # noqa: PTH118, PTH120 - of text, not of files
    if where.startswith("/") or inside == ".." or inside.startswith("../"):
        raise InvalidInput(
            f"{path} is a link that leads out of {top}: {where}",
            remedy="ignore it, or put a copy of the file in its place",
        )
    return Entry(name, link=where)


def _entry(path: Path, name: str) -> Entry:
    if not path.is_file():
        raise InvalidInput(f"{path} is no file, directory or link", remedy="ignore it")
    if not os.access(path, os.R_OK):
        raise InvalidInput(f"{path} cannot be read", remedy="ignore it, or change its mode")
    return Entry(name, path, executable=os.access(path, os.X_OK))
