"""Looking into snapshots: the calls, and what unpacks an archive that came from a guest."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import quote, urlencode

from rethaw.model.errors import Conflict, InvalidInput, Unavailable
from rethaw.model.looking import FileChange, FileEntry, Verified
from rethaw.model.types import SnapshotInfo
from rethaw.sdk.calls import Call, path

LOOK_S = 120.0  # a restore, on top of the client's own timeout
_CHUNK = 1 << 20


@dataclass(frozen=True)
class LogSide:
    """What one side's log has after the common point, up to its snapshot. `events`: type to how many."""

    session: str
    line: int
    after: int
    upto: int
    events: dict[str, int] = field(default_factory=dict[str, int])
    model_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class Difference:
    """From snapshot `before` to `after`. `common`: {session, line, seq} that both come from, None if none is known."""

    before: SnapshotInfo
    after: SnapshotInfo
    files: list[FileChange]
    common: dict[str, Any] | None
    log: dict[str, LogSide]


def _object(body: bytes) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(body))


def _known(cls: Any, values: dict[str, Any]) -> Any:
    """`cls` from the fields it knows, with a path's odd bytes put back."""
    raw = values.get("path_hex")
    if raw:
        values = {**values, "path": os.fsdecode(bytes.fromhex(str(raw)))}
    if dataclasses.is_dataclass(cls):
        names = {f.name for f in dataclasses.fields(cls)}
        return cast("Any", cls)(**{k: v for k, v in values.items() if k in names})
    return cls.model_validate({k: v for k, v in values.items() if k in cls.model_fields})


def _snapshot(values: dict[str, Any]) -> SnapshotInfo:
    known = {k: v for k, v in values.items() if k in SnapshotInfo.model_fields}
    return SnapshotInfo.model_validate_json(json.dumps(known))


def _at(snapshot: str, what: str, where: str | bytes, **more: str) -> str:
    """The address of a path in a snapshot, byte for byte."""
    query = urlencode(more)
    return f"{path('snapshots', snapshot, what)}?path={quote(os.fsencode(where), safe='/')}" + (query and f"&{query}")


def files(snapshot: str, where: str | bytes, deep: bool) -> Call[list[FileEntry]]:
    more = {"deep": "true"} if deep else {}
    return Call(
        "GET",
        _at(snapshot, "files", where, **more),
        lambda b: [cast("FileEntry", _known(FileEntry, row)) for row in _object(b)["files"]],
        wait_s=LOOK_S,
    )


def content(snapshot: str, where: str | bytes) -> Call[bytes]:
    return Call("GET", _at(snapshot, "content", where), bytes, accept="application/octet-stream", wait_s=LOOK_S)


def archive(snapshot: str, where: str | bytes) -> Call[bytes]:
    return Call("GET", _at(snapshot, "archive", where), bytes, accept="application/x-tar", wait_s=LOOK_S)


def verify(snapshot: str) -> Call[Verified]:
    return Call(
        "POST",
        path("snapshots", snapshot, "verify"),
        lambda b: cast("Verified", _known(Verified, _object(b))),
        content=b"{}",
        wait_s=600,
    )


def diff(before: str, after: str, with_files: bool) -> Call[Difference]:
    def read(body: bytes) -> Difference:
        found = _object(body)
        return Difference(
            _snapshot(found["before"]),
            _snapshot(found["after"]),
            [cast("FileChange", _known(FileChange, row)) for row in found["files"]],
            found["common"],
            {name: cast("LogSide", _known(LogSide, side)) for name, side in found["log"].items()},
        )

    params = {"before": before, "after": after, "files": "true" if with_files else "false"}
    return Call("GET", "/v1/diff", read, params=params, wait_s=600)


# ---------------------------------------------------------------- archives


def unpack(source: IO[bytes], target: Path) -> list[str]:
    """Write the tar that `source` gives as `target`, which must not exist. Returns what was left out, with why.

    The tar's author is a program in a sandbox, so nothing of it is trusted: every name stays below `target`, nothing is
    written through a link (links are made last), and only permission bits are kept. Raises Conflict, InvalidInput,
    Unavailable when it is cut off.
    """
    if os.path.lexists(target):
        raise Conflict(f"{str(target)!r} exists already", remedy="name another destination, or remove it first")
    left_out: list[str] = []
    links: list[tuple[Path, str]] = []
    modes: list[tuple[Path, int]] = []
    try:
        with tarfile.open(fileobj=source, mode="r|") as tar:
            for member in tar:
                where = _place(member.name, target)
                if member.isdir():
                    where.mkdir(mode=0o700)
                    modes.append((where, member.mode & 0o777))
                elif member.isreg():
                    _write(tar, member, where)
                elif member.issym():
                    links.append((where, member.linkname))
                else:
                    left_out.append(f"{member.name}: no file, directory or link")
    except tarfile.TarError as error:
        raise Unavailable(f"what came is not a whole archive: {error}", remedy="try again") from error
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        raise InvalidInput(f"the archive does not fit together: {error}") from error
    for where, points_to in links:
        if os.path.lexists(where) or (where != target and _through_link(where.parent, target)):
            left_out.append(f"{where}: another file has this name")
        else:
            where.symlink_to(points_to)
    for where, mode in reversed(modes):
        where.chmod(mode)
    return left_out


def _place(name: str, target: Path) -> Path:
    parts = name.rstrip("/").split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise InvalidInput(f"the archive has a file {name!r}, which would lie elsewhere")
    return target.joinpath(*parts[1:])


def _through_link(directory: Path, target: Path) -> bool:
    while directory not in (target, directory.parent):
        if not stat.S_ISDIR(directory.lstat().st_mode):
            return True
        directory = directory.parent
    return False


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, where: Path) -> None:
    source = tar.extractfile(member)
    fd = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as out:
        left = member.size
        while left and source is not None:
            data = source.read(min(left, _CHUNK))
            if not data:
                raise tarfile.ReadError("it ends too early")
            out.write(data)
            left -= len(data)
        os.fchmod(out.fileno(), member.mode & 0o777)
    os.utime(where, (member.mtime, member.mtime))
