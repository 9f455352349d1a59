"""Commands that look at sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Flag, Json
from rethaw.cli.connect import client

if TYPE_CHECKING:
    from rethaw.model.types import SessionView


def ls(
    *,
    state: str | None = None,
    agent: str | None = None,
    limit: int = 50,
    quiet: Annotated[bool, Flag, Parameter(name=("--quiet", "-q"))] = False,
    json: Json = False,
) -> None:
    """List sessions, newest first.

    For example:
      rethaw ls
      rethaw ls --state suspended --agent coder
      rethaw rm $(rethaw ls -q --state failed)

    Parameters
    ----------
    state:
        Only those in this state.
    agent:
        Only those of this agent.
    limit:
        At most so many.
    quiet:
        Print ids only, whole.
    """
    from rethaw.cli.render import state_text
    from rethaw.model.enums import State
    from rethaw.model.errors import InvalidInput

    if state is not None and state not in list(State):
        raise InvalidInput(f"{state!r} is not a state", remedy=f"use one of {', '.join(State)}")
    if limit < 1:
        raise InvalidInput(f"limit {limit} is too small", remedy="use 1 or more")
    with client() as connection:
        views = connection.sessions.list(state=state, agent=agent, limit=limit)
    if json:
        output.emit(views)
        return
    if quiet:
        for view in views:
            output.data(view.id)
        return
    if not views:
        output.note("no sessions; start one: rethaw run FILE.py")
        return
    ids = output.short([*(view.id for view in views), *(view.forked_from for view in views if view.forked_from)])
    forked = any(view.forked_from for view in views)

    def row(view: SessionView) -> list[str]:
        crashes = str(view.crashes) if view.crashes else "-"
        return [
            ids[view.id],
            view.agent.name if view.version is None else f"{view.agent.name}@{view.version}",
            state_text(view),
            output.ago(view.updated_at),
            output.ago(view.created_at),
            crashes,
            view.key or "-",
            *([ids[view.forked_from] if view.forked_from else "-"] if forked else []),
        ]

    output.table(
        ["SESSION", "AGENT", "STATE", "SINCE", "AGE", "CRASHES", "KEY", *(["FORK OF"] if forked else [])],
        [row(view) for view in views],
        codes=[["", "", output.state_color(view.state.value), *[""] * (4 + forked)] for view in views],
    )


def show(session: str, /, *, json: Json = False) -> None:
    """Show a session, and what durability did for it.

    For example:
      rethaw show s_06f2
      rethaw show s_06f2 --json | jq .stats

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    """
    from rethaw.cli.render import show_lines

    with client() as connection:
        detail = connection.sessions.detail(session)
    if json:
        output.emit({**output.jsonable(detail.view), "stats": output.jsonable(detail.stats)})
        return
    for line in show_lines(detail):
        output.data(line)


def why(session: str, /, *, json: Json = False) -> None:
    """Say what a session waits for, since when, and what wakes it.

    And which snapshot is its last, and where it would go on from there.

    For example:
      rethaw why s_06f2

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    """
    from rethaw.cli.render import why_lines

    with client() as connection:
        found = connection.sessions.why(session)
    if json:
        output.emit(found)
        return
    for line in why_lines(session, found):
        output.data(line)


def snapshot_ls(session: str, /, *, json: Json = False) -> None:
    """List a session's snapshots, oldest first.

    PAUSED is how long the session stood still, DURABLE how long it took until
    the snapshot was on disk and committed, pause included, UPLOADED until the
    object store had it. STORED is what it added to the store.

    For example:
      rethaw snapshot ls s_06f2

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    """
    from rethaw.sdk.sizes import human_bytes

    with client() as connection:
        found = connection.sessions.snapshots(session)
    if json:
        output.emit(found)
        return
    if not found:
        output.note("no snapshots yet")
        return
    ids = output.short(one.id for one in found)
    rows = [
        [
            ids[one.id],
            str(one.seq),
            str(one.line),
            one.why,
            f"{one.paused_ms:.0f} ms",
            f"{one.durable_ms:.0f} ms",
            "" if one.uploaded_ms is None else f"{one.uploaded_ms:.0f} ms",
            human_bytes(one.raw_bytes),
            human_bytes(one.stored_bytes),
            output.ago(one.created_at),
            f"unusable: {one.unusable}" if one.unusable else "pinned" if one.pinned else "",
        ]
        for one in found
    ]
    output.table(["SNAPSHOT", "SEQ", "LINE", "WHY", "PAUSED", "DURABLE", "UPLOADED", "RAW", "STORED", "AGE", ""], rows)


def version(*, json: Json = False) -> None:
    """Print the version of this program, and of the server if one answers.

    For example:
      rethaw version
    """
    from rethaw import __version__
    from rethaw.model.errors import RethawError

    server: str | None = None
    try:
        with client() as connection:
            server = str(connection.health().get("version"))
    except RethawError:
        pass
    if json:
        output.emit({"client": __version__, "server": server})
        return
    output.data(f"rethaw {__version__}")
    output.note(f"server {server}" if server else "no server answers")
