"""Commands that read a session's log."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Flag, Json
from rethaw.cli.connect import client

_PAGE = 1000


def events(
    session: str,
    /,
    *,
    follow: Annotated[bool, Flag, Parameter(name=("--follow", "-f"))] = False,
    after: int = 0,
    limit: int | None = None,
    type: Annotated[list[str] | None, Parameter(name=("--type", "-t"), negative="")] = None,
    all_lines: Annotated[bool, Flag] = False,
    json: Json = False,
) -> None:
    """Print a session's context log, one event a line.

    With --json each line is a JSON object (bodies in base64).

    For example:
      rethaw events s_06f2
      rethaw events -f s_06f2 --type snapshot.created --type exchange.completed
      rethaw events s_06f2 --all-lines --json

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    follow:
        Go on as events come, until the session ends.
    after:
        Begin after this seq.
    limit:
        At most so many.
    type:
        Only events of this type; may be given again.
    all_lines:
        What crashes took back as well, marked superseded.
    """
    from rethaw.cli.render import event_line
    from rethaw.model.enums import EventType
    from rethaw.model.errors import InvalidInput

    for one in type or ():
        if one not in list(EventType):
            raise InvalidInput(f"{one!r} is not a type of event", remedy=f"use one of {', '.join(EventType)}")
    shown = 0
    with client(patient=follow) as connection:
        handle = connection.sessions.get(session)
        source = handle.events(after=after, follow=follow, types=type or (), all_lines=all_lines)
        for event in source:
            if limit is not None and shown >= limit:
                break
            shown += 1
            if json:
                output.emit(event)
            else:
                output.data(event_line(event))


def logs(
    session: str,
    /,
    *,
    follow: Annotated[bool, Flag, Parameter(name=("--follow", "-f"))] = False,
    stream: Literal["stdout", "stderr", "both"] = "both",
    json: Json = False,
) -> None:
    """Print what the program wrote: its stdout to stdout, its stderr to stderr.

    What a crash took back is left out.

    For example:
      rethaw logs s_06f2
      rethaw logs -f s_06f2
      rethaw logs s_06f2 --stream stderr 2> errors.txt

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    follow:
        Go on as it writes, until the session ends.
    stream:
        Only this one.
    """
    from rethaw.cli import attach

    wanted = ("stdout", "stderr") if stream == "both" else (stream,)
    with client(patient=follow) as connection:
        handle = connection.sessions.get(session)
        if json:
            for event in handle.events(follow=follow, types=("output",)):
                if event.data.get("stream") in wanted:
                    output.emit(event)
        elif follow:
            attach.follow(connection, handle.id, quiet=True, streams=wanted)
        else:
            line = attach.OneLine(lambda data, err: output.raw(data, stderr=err), output.note)
            for event in handle.events(types=("output",)):
                name = str(event.data.get("stream"))
                if name in wanted and event.body:
                    line.take(name, int(event.data.get("offset", 0)), event.body, event.attempt)
