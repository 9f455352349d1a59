"""Commands that look at sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Flag, Json
from rethaw.cli.connect import client
from rethaw.model.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from rethaw.sdk.listing import Wanted


def ls(
    *,
    state: Annotated[list[str] | None, Parameter(negative="")] = None,
    agent: str | None = None,
    tag: Annotated[list[str] | None, Parameter(negative="")] = None,
    queue: str | None = None,
    search: str | None = None,
    since: str | None = None,
    until: str | None = None,
    limit: int = 50,
    quiet: Annotated[bool, Flag, Parameter(name=("--quiet", "-q"))] = False,
    json: Json = False,
) -> None:
    """List sessions, newest first.

    For example:
      rethaw ls
      rethaw ls --state suspended --agent coder
      rethaw ls --tag nightly --search "heat pumps" --since 2d
      rethaw rm $(rethaw ls -q --state failed)

    Parameters
    ----------
    state:
        Only those in this state; given again, in any of them.
    agent:
        Only those of this agent.
    tag:
        Only those with this tag; given again, with all of them.
    queue:
        Only those of this queue.
    search:
        Only those with this text in their agent's name, key, tags or arguments.
    since:
        Only those created since then: 2026-01-31, 2026-01-31T09:00, or how long
        ago, like 2h.
    until:
        Only those created before that.
    limit:
        At most so many.
    quiet:
        Print ids only, whole.
    """
    from datetime import datetime

    from rethaw.cli.render import state_words
    from rethaw.sdk.listing import wanted

    if limit < 1:
        raise InvalidInput(f"limit {limit} is too small", remedy="use 1 or more")
    given = wanted(
        state=state, agent=agent, tag=tag, queue=queue, search=search, created_after=since, created_before=until
    )  # fmt: skip
    found = _rows(given, limit)
    if json:
        output.emit(found)
        return
    if quiet:
        for one in found:
            output.data(one["id"])
        return
    if not found:
        output.note("no sessions; start one: rethaw run FILE.py")
        return
    named = [other for one in found for other in (one["forked_from"], one["parent"]) if other]
    ids = output.short([*(one["id"] for one in found), *named])
    # Columns that say something of one of them at least.
    optional: dict[str, Callable[[dict[str, Any]], str]] = {
        "FORK OF": lambda one: ids[one["forked_from"]] if one["forked_from"] else "",
        "PARENT": lambda one: ids[one["parent"]] if one["parent"] else "",
        "QUEUE": lambda one: one["queue"] if one["queue"] != "default" else "",
        "TAGS": lambda one: " ".join(one["tags"]),
    }
    more = {name: told for name, told in optional.items() if any(told(one) for one in found)}

    def row(one: dict[str, Any]) -> list[str]:
        name, version = one["agent"]["name"], one["version"]
        return [
            ids[one["id"]],
            name if version is None else f"{name}@{version}",
            state_words(one["state"], one["reason"], one["exit_code"], degraded=one["degraded"]),
            output.ago(datetime.fromisoformat(one["updated_at"])),
            output.ago(datetime.fromisoformat(one["created_at"])),
            str(one["crashes"] or "-"),
            one["key"] or "-",
            *(told(one) or "-" for told in more.values()),
        ]

    output.table(
        ["SESSION", "AGENT", "STATE", "SINCE", "AGE", "CRASHES", "KEY", *more],
        [row(one) for one in found],
        codes=[["", "", output.state_color(one["state"]), *[""] * (4 + len(more))] for one in found],
    )


# What an older server may not say of a session.
_ABSENT: dict[str, Any] = {
    "forked_from": None, "parent": None, "queue": "default", "tags": [], "version": None, "exit_code": None,
    "degraded": False, "crashes": 0, "key": None,
}  # fmt: skip


def _rows(given: Wanted, limit: int) -> list[dict[str, Any]]:
    """Sessions as the server's JSON: to load the classes for them would take half as long as all the rest."""
    from rethaw.sdk import calls
    from rethaw.sdk.listing import PAGE

    found: list[dict[str, Any]] = []
    cursor = None
    with client() as connection:
        while len(found) < limit:
            page, cursor = connection.run(calls.list_rows(given, min(limit - len(found), PAGE), cursor))
            found += [{**_ABSENT, **one} for one in page]
            if cursor is None or not page:
                break
    return found


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
        output.emit({
            **output.jsonable(detail.view),
            "stats": output.jsonable(detail.stats),
            "attempts": output.jsonable(detail.attempts),
            "budget": output.jsonable(detail.budget),
            "spent": output.jsonable(detail.spent),
        })  # fmt: skip
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
