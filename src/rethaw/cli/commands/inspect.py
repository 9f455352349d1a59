"""Commands that look into snapshots. Nothing here changes a session."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Flag, Json
from rethaw.cli.connect import client

if TYPE_CHECKING:
    from rethaw.model.types import SnapshotInfo

Hyphens = Parameter(allow_leading_hyphen=True)


def shell(snapshot: str, /, *command: Annotated[str, Hyphens], idle: str = "15m", json: Json = False) -> int:
    """Open a shell inside a snapshot, or run COMMAND there.

    It is a restore that is thrown away: the agent's processes stand still, no
    model answers, nothing is logged and nothing that you change is kept. The
    exit code is the command's.

    For example:
      rethaw shell s_06f2
      rethaw shell snap_06f2 -- head /proc/loadavg
      echo 'cd /app; ls -l' | rethaw shell snap_06f2

    Parameters
    ----------
    snapshot:
        A snapshot's or a session's id (its newest snapshot then), or a unique
        beginning of one.
    command:
        What to run in place of a shell; write it after "--".
    idle:
        End it after so long without a byte either way.
    """
    from rethaw.cli import terminal
    from rethaw.model.durations import seconds
    from rethaw.model.errors import InvalidInput
    from rethaw.model.looking import IDLE_MAX_S

    limit = seconds(idle)
    if not 0 < limit <= IDLE_MAX_S:
        raise InvalidInput(f"--idle {idle} is out of range", remedy="use up to 1d")
    with client() as connection:
        if json:
            found = terminal.collect(connection, snapshot, command, limit)
            output.emit(found)
            return int(found["exit_code"])
        return terminal.run(connection, snapshot, command, limit)


def files(
    snapshot: str,
    path: str = "/",
    /,
    *,
    recursive: Annotated[bool, Flag, Parameter(name=("--recursive", "-r"))] = False,
    json: Json = False,
) -> None:
    """List files of a snapshot: mode, size, time of change, path.

    For example:
      rethaw snapshot files s_06f2 /app
      rethaw snapshot files snap_06f2 /etc/passwd --json

    Parameters
    ----------
    snapshot:
        A snapshot's or a session's id (its newest snapshot then), or a unique
        beginning of one.
    path:
        A file, or a directory whose content is listed.
    recursive:
        What is below as well. Of "/" without /proc, /sys and /dev.
    """
    from rethaw.cli import looking

    with client() as connection:
        found = connection.snapshots.files(snapshot, os.fsencode(path), deep=recursive)
    if json:
        output.emit(found)
        return
    for line in looking.listing(found):
        output.data(line)


def cat(snapshot: str, path: str, /, *, json: Json = False) -> None:
    """Print a file of a snapshot, byte for byte.

    With --json: {"path", "content"}, the content in base64.

    For example:
      rethaw snapshot cat s_06f2 /app/notes.md

    Parameters
    ----------
    snapshot:
        A snapshot's or a session's id (its newest snapshot then), or a unique
        beginning of one.
    path:
        A regular file.
    """
    with client() as connection:
        if json:
            output.emit({"path": path, "content": connection.snapshots.read(snapshot, os.fsencode(path))})
            return
        for chunk in connection.snapshots.content(snapshot, os.fsencode(path)):
            output.raw(chunk)


def get(snapshot: str, path: str, destination: Path, /, *, json: Json = False) -> None:
    """Copy a file or directory out of a snapshot.

    Links stay links; devices, pipes and sockets are left out.

    For example:
      rethaw snapshot get s_06f2 /app ./app-then

    Parameters
    ----------
    snapshot:
        A snapshot's or a session's id (its newest snapshot then), or a unique
        beginning of one.
    path:
        What to copy.
    destination:
        Its new name, or a directory in which it keeps its own.
    """
    from rethaw.model.errors import NotFound

    if destination.is_dir():
        destination /= Path(path.rstrip("/")).name or "root"
    if not destination.parent.is_dir():
        raise NotFound(f"there is no directory {str(destination.parent)!r}", remedy="make it first")
    with client() as connection:
        left_out = connection.snapshots.get(snapshot, os.fsencode(path), destination)
    for line in left_out:
        output.note(f"left out: {output.plain(line)}")
    if json:
        output.emit({"path": path, "destination": str(destination), "left_out": left_out})
    else:
        output.data(str(destination))


def diff(
    before: str,
    after: str,
    /,
    *,
    no_files: Annotated[bool, Flag, Parameter(name="--no-files")] = False,
    json: Json = False,
) -> None:
    """Say what changed between two snapshots: files, events, model calls.

    What the agents' images brought and what the kernel makes up is left out.
    Of snapshots on different lines, what each has since they parted.

    For example:
      rethaw diff snap_06f2 snap_06g7
      rethaw diff snap_06f2 s_06f1 --json

    Parameters
    ----------
    before:
        A snapshot's or a session's id (its newest snapshot then), or a unique
        beginning of one.
    after:
        The other one.
    no_files:
        Compare the logs only, which restores nothing.
    """
    from rethaw.cli import looking

    with client() as connection:
        found = connection.snapshots.diff(before, after, files=not no_files)
    if json:
        output.emit(found)
        return
    for line in looking.difference(found, with_files=not no_files):
        output.data(line)


def verify(*names: str, all: Annotated[bool, Flag, Parameter(name="--all")] = False, json: Json = False) -> int:
    """Read every stored byte of snapshots and check it.

    A damaged one ends it with exit code 10, once all were looked at.

    For example:
      rethaw snapshot verify snap_06f2
      rethaw snapshot verify s_06f2 s_07aa
      rethaw snapshot verify --all

    Parameters
    ----------
    names:
        Ids of snapshots, or of sessions (all their snapshots then), or unique
        beginnings.
    all:
        Those of every session.
    """
    from rethaw.model.errors import InvalidInput, NotFound, SnapshotUnusable
    from rethaw.sdk.sizes import human_bytes

    if bool(names) == all:
        raise InvalidInput("say which snapshots, or --all", remedy="see `rethaw snapshot verify --help`")
    whole = damaged = 0
    with client() as connection:
        wanted: list[str] = []
        for name in names:
            wanted += _ids(connection.snapshots.every(name)) if name.startswith("s_") else [name]
        if all:
            wanted = _ids(connection.snapshots.every())
        for one in wanted:
            try:
                found = connection.snapshots.verify(one)
            except SnapshotUnusable as error:
                damaged += 1
                if len(wanted) == 1 and not json:
                    raise
                if json:
                    output.emit({"snapshot": one, "ok": False, "error": error.message})
                else:
                    output.data(f"{one}  damaged: {output.plain(error.message)}")
                continue
            except NotFound:
                if one in names:
                    raise
                continue  # retention let it go meanwhile
            whole += 1
            if json:
                output.emit(found)
            else:
                output.data(f"{found.snapshot}  whole  {human_bytes(found.bytes)}  {found.ms:.0f} ms")
    if len(wanted) != 1:
        output.note(f"{whole} of {whole + damaged} snapshots are whole")
    sys.stdout.flush()
    return SnapshotUnusable.exit_code if damaged else 0


def _ids(found: list[SnapshotInfo]) -> list[str]:
    return [one.id for one in found]
