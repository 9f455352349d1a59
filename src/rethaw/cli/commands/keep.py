"""Commands that take, keep and carry snapshots."""

from __future__ import annotations

from pathlib import Path

from rethaw.cli import output
from rethaw.cli.app import Json
from rethaw.cli.connect import client


def create(session: str, /, *, json: Json = False) -> None:
    """Take a snapshot of a session now, and print its id.

    For example:
      rethaw snapshot create s_06f2

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    """
    with client() as connection:
        found = connection.sessions.snapshot(session)
    output.emit(found) if json else output.data(found.id)


def pin(snapshot: str, /, *, json: Json = False) -> None:
    """Keep a snapshot whatever retention says.

    For example:
      rethaw snapshot pin snap_06f2

    Parameters
    ----------
    snapshot:
        A snapshot's or a session's id (its newest snapshot then), or a unique
        beginning of one.
    """
    _pin(snapshot, True, json)


def unpin(snapshot: str, /, *, json: Json = False) -> None:
    """Leave a pinned snapshot to retention again.

    For example:
      rethaw snapshot unpin snap_06f2

    Parameters
    ----------
    snapshot:
        A snapshot's or a session's id (its newest snapshot then), or a unique
        beginning of one.
    """
    _pin(snapshot, False, json)


def _pin(snapshot: str, pinned: bool, json: bool) -> None:
    with client() as connection:
        found = connection.snapshots.pin(snapshot, pinned)
    output.emit(found) if json else output.note(f"{found.id} is {'pinned' if found.pinned else 'not pinned'}")


def export(snapshot: str, file: Path, /, *, json: Json = False) -> None:
    """Write a snapshot, and all that a restore needs, into one file.

    The file can be imported here or elsewhere. It is not encrypted.

    For example:
      rethaw snapshot export snap_06f2 agent.snap

    Parameters
    ----------
    snapshot:
        A snapshot's or a session's id (its newest snapshot then), or a unique
        beginning of one.
    file:
        Where to; must not exist.
    """
    from rethaw.sdk.sizes import human_bytes

    with client() as connection:
        size = connection.snapshots.export(snapshot, file)
    output.emit({"file": str(file), "bytes": size}) if json else output.note(f"{file}: {human_bytes(size)}")


def import_(file: Path, /, *, json: Json = False) -> None:
    """Make a session of an exported snapshot, and print its id.

    It is suspended at the moment of the snapshot; "rethaw resume" lets it go
    on. The file is checked against its digest. The engine build, the CPU and
    the image must fit; what does not is named.

    For example:
      rethaw snapshot import agent.snap

    Parameters
    ----------
    file:
        What "rethaw snapshot export" wrote.
    """
    with client() as connection:
        session = connection.snapshots.import_file(file)
    output.emit(session.view) if json else output.data(session.id)
