"""Commands for schedules: sessions that start by the clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Flag, Json
from rethaw.cli.connect import client

if TYPE_CHECKING:
    from datetime import datetime

    from rethaw.model.queue_types import Schedule
    from rethaw.sdk.client import Client


def create(
    name: str,
    target: Annotated[str | None, Parameter(show=False)] = None,
    /,
    *rest: Annotated[str, Parameter(show=False)],
    cron: str | None = None,
    every: str | None = None,
    tz: str = "UTC",
    catch_up: Literal["latest", "none", "all"] = "latest",
    overlap: Literal["allow", "skip"] = "allow",
    replace: Annotated[bool, Flag] = False,
    image: str | None = None,
    memory: str | None = None,
    max_duration: str | None = None,
    queue: str | None = None,
    priority: Annotated[int | None, Parameter(allow_leading_hyphen=True)] = None,
    delay: str | None = None,
    ttl: str | None = None,
    concurrency_key: str | None = None,
    tag: Annotated[list[str] | None, Parameter(negative="")] = None,
    json: Json = False,
) -> None:
    """Start sessions of an agent by the clock.

    Of FILE.py it takes the agent as `rethaw run` does, with its arguments, and
    its code as it is now. Creating the same again changes nothing. Each session
    has the tag schedule:NAME.

    For example:
      rethaw schedule create daily --cron "0 9 * * 1-5" --tz Europe/Berlin \\
        report.py --topic news
      rethaw schedule create poll --every 15m --overlap skip report.py
      rethaw schedule create clean --cron @daily --image base -- rm -rf /tmp/x

    Parameters
    ----------
    name:
        What it is called.
    cron:
        Minute, hour, day, month and weekday; @hourly, @daily and so on too.
    every:
        In place of cron: so often, from now on, like 15m.
    tz:
        The time zone of cron, like Europe/Berlin.
    catch_up:
        What is started of the times that passed while no server ran.
    overlap:
        "skip" leaves out a time while a session of an earlier one goes on.
    replace:
        Put it in the place of one of this name.
    image:
        Run a command in this image, as with `rethaw run`.
    memory:
        What the sandbox may use, like 1GiB.
    max_duration:
        End each session after so long.
    queue:
        Whose limits its sessions wait for.
    priority:
        Higher ones start first; 0 if not said.
    delay:
        Each starts so long after its time.
    ttl:
        It fails if it has not started by then, counted from when it may.
    concurrency_key:
        The queue may limit how many with one key run at once.
    tag:
        To find them by; may be given again.
    """
    from rethaw.cli.commands.run import agent_of
    from rethaw.sdk.starting import starting

    how = starting(
        queue=queue, priority=priority, delay=delay, ttl=ttl, concurrency_key=concurrency_key, tags=tag or ()
    )
    given = {"memory": memory, "max_duration": max_duration}
    given = {option: value for option, value in given.items() if value is not None}
    with client() as connection:
        args: dict[str, Any] = {}
        if image is None and target is not None:
            from rethaw.cli.arguments import parse
            from rethaw.sdk.agents import find

            file, _, chosen = target.partition("::")
            found = find(file, chosen or None)
            args, how, rest = parse(found.function, rest), how.over(found.starting), ()
        agent = agent_of(connection, target, list(rest), image, given)
        made = connection.schedules.create(
            name, agent, args, cron=cron, every=every, tz=tz, catch_up=catch_up, overlap=overlap, replace=replace,
            **how.given(),
        )  # fmt: skip
    if json:
        output.emit(made)
        return
    output.data(made.name)
    output.note(f"first at {_when(made.next_at)}")


def ls(*, json: Json = False) -> None:
    """List schedules.

    For example:
      rethaw schedule ls
    """
    with client() as connection:
        found = connection.schedules.list()
    if json:
        output.emit(found)
        return
    if not found:
        output.note("no schedules; make one: rethaw schedule create NAME --every 1h FILE.py")
        return
    output.table(
        ["SCHEDULE", "AGENT", "WHEN", "NEXT", "LAST"],
        [
            [
                one.name,
                one.agent.name,
                _rule(one),
                "paused" if one.paused else _when(one.next_at),
                f"{one.firings[0].what} {_when(one.firings[0].due)}" if one.firings else "-",
            ]
            for one in found
        ],
    )


def show(name: str, /, *, json: Json = False) -> None:
    """Show a schedule and what became of its last times.

    For example:
      rethaw schedule show daily

    Parameters
    ----------
    name:
        The schedule.
    """
    import json as json_module

    with client() as connection:
        found = connection.schedules.get(name)
    if json:
        output.emit(found)
        return
    options = found.options.model_dump(exclude_defaults=True, mode="json")
    rows = [
        ("schedule", f"{found.name}{', paused' if found.paused else ''}"),
        ("agent", f"{found.agent.name}  {found.agent.entry or ' '.join(found.agent.command)}"),
        ("arguments", json_module.dumps(found.args, ensure_ascii=False) if found.args else ""),
        ("when", _rule(found)),
        ("next", "-" if found.paused else _when(found.next_at)),
        ("catch up", found.catch_up),
        ("overlap", found.overlap),
        ("options", json_module.dumps(options, ensure_ascii=False) if options else ""),
    ]
    for title, value in rows:
        if value:
            output.data(f"{title:<11} {output.plain(value)}")
    if found.firings:
        output.data("")
        output.table(
            ["DUE", "WHAT", "SESSION", ""],
            [[_when(one.due), one.what, one.session or "-", one.detail or ""] for one in found.firings],
        )


def pause(name: str, /, *, json: Json = False) -> None:
    """Start nothing by a schedule until it is resumed.

    What it misses meanwhile is not caught up.

    For example:
      rethaw schedule pause daily

    Parameters
    ----------
    name:
        The schedule.
    """
    _act("pause", name, json)


def resume(name: str, /, *, json: Json = False) -> None:
    """Go on with a paused schedule.

    For example:
      rethaw schedule resume daily

    Parameters
    ----------
    name:
        The schedule.
    """
    _act("resume", name, json)


def trigger(name: str, /, *, json: Json = False) -> None:
    """Start a session of a schedule now, and print its id.

    For example:
      rethaw logs -f $(rethaw schedule trigger daily)

    Parameters
    ----------
    name:
        The schedule.
    """
    with client() as connection:
        session = connection.schedules.trigger(name)
    if json:
        output.emit(session.view)
    else:
        output.data(session.id)


def rm(name: str, /, *, json: Json = False) -> None:
    """Remove a schedule. Sessions that it started go on.

    For example:
      rethaw schedule rm daily

    Parameters
    ----------
    name:
        The schedule.
    """
    _act("delete", name, json)


def _act(what: Literal["pause", "resume", "delete"], name: str, json: bool) -> None:
    with client() as connection:
        found = _asked(connection, what, name)
    if json:
        output.emit(found)
    else:
        output.data(found.name)


def _asked(connection: Client, what: Literal["pause", "resume", "delete"], name: str) -> Schedule:
    schedules = connection.schedules
    if what == "pause":
        return schedules.pause(name)
    return schedules.resume(name) if what == "resume" else schedules.delete(name)


def _rule(one: Schedule) -> str:
    from rethaw.model.durations import human

    return f"every {human(one.every_s)}" if one.every_s is not None else f"{one.cron} ({one.tz})"


def _when(at: datetime) -> str:
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}"
