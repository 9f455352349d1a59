"""Commands that walk back in time: fork, rewind."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Flag, Json
from rethaw.cli.connect import client

Place = Parameter(allow_leading_hyphen=True)  # so that a negative number gets an answer that names it


def fork(
    session: str,
    /,
    *,
    at: Annotated[str | None, Place] = None,
    n: Annotated[int, Parameter(name=("-n", "--count"), allow_leading_hyphen=True)] = 1,
    redeliver: Annotated[bool, Flag] = False,
    json: Json = False,
) -> None:
    """Begin new sessions from where a session is, or was, and print their ids.

    They share its log and its pages up to there; what follows is their own.
    Model calls that were answered by then are not paid for again.

    For example:
      rethaw fork s_06f2
      rethaw fork s_06f2 -n 3
      rethaw fork s_06f2 --at snap_06f3
      rethaw fork s_06f2 --at 57

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    at:
        A snapshot, or an event by its number. Without it the newest snapshot; a
        running session takes one now.
    n:
        How many.
    redeliver:
        Deliver messages and signals again that came after that point.
    """
    with client() as connection:
        made = connection.sessions.fork(session, at=at, n=n, redeliver=redeliver)
    for one in made:
        if json:
            output.emit(one.view)
        else:
            output.data(one.id)


def rewind(
    session: str,
    /,
    *,
    to: Annotated[str, Place],
    redeliver: Annotated[bool, Flag] = False,
    json: Json = False,
) -> None:
    """Take a session back to an older point of its log and let it go on from there.

    Also one that has ended. What it did since stays in the log, marked as
    superseded: rethaw events SESSION --all-lines

    For example:
      rethaw rewind s_06f2 --to snap_06f3
      rethaw rewind s_06f2 --to 57

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    to:
        A snapshot, or an event by its number.
    redeliver:
        Deliver messages and signals again that came after that point.
    """
    from rethaw.cli.render import state_text

    with client() as connection:
        view = connection.sessions.rewind(session, to=to, redeliver=redeliver)
    if json:
        output.emit(view)
    else:
        output.data(f"{view.id}  {state_text(view)}")
