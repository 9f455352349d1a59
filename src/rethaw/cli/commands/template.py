"""Commands for templates: agents kept warm, sessions started from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Json
from rethaw.cli.connect import client


def create(
    name: str,
    target: str | None = None,
    /,
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    image: str | None = None,
    memory: str | None = None,
    workdir: str | None = None,
    allow: Annotated[list[str] | None, Parameter(negative="")] = None,
    by: Literal["call", "line", "quiet"] | None = None,
    within: str = "5m",
    json: Json = False,
) -> None:
    """Start an agent, wait until it is warm, and keep it as it is then.

    It is warm when it calls ctx.ready(), when it prints the line
    "rethaw-ready", or when it has been quiet for a second: no CPU used, no
    event, no call open. Creating the same again is harmless.

    For example:
      rethaw template create writer agent.py::writer
      rethaw template create box --image base -- sleep infinity

    Parameters
    ----------
    name:
        What it is called.
    target:
        FILE.py[::NAME] of an agent in Python.
    command:
        With --image: the program to run, after "--".
    image:
        Run a command in this image: base, python, node, a rethaw.toml, an archive; see rethaw run --help.
    memory:
        What the sandbox may use, like 1GiB.
    workdir:
        Directory that it starts in.
    allow:
        HOST or HOST:PORT that it may connect to; may be given again.
    by:
        Only this makes it warm; for one that rests while it warms up.
    within:
        It must be warm by then.
    """
    from rethaw.cli.commands.run import agent_of
    from rethaw.model.durations import seconds

    options = {"memory": memory, "workdir": workdir, "allow": allow}
    given = {option: value for option, value in options.items() if value is not None}
    limit = seconds(within)
    with client() as connection:
        spec = agent_of(connection, target, list(command), image, given)
        made = connection.templates.create(name, spec, by=by, within=limit)
    if json:
        output.emit(made)
        return
    output.data(made.name)
    output.note(f"warm by {made.ready_by}, session {made.session}; start one: rethaw template start {made.name}")


def start(
    name: str,
    args: Annotated[str, Parameter(allow_leading_hyphen=True)] = "{}",
    /,
    *,
    key: str | None = None,
    queue: str | None = None,
    priority: Annotated[int | None, Parameter(allow_leading_hyphen=True)] = None,
    delay: str | None = None,
    ttl: str | None = None,
    concurrency_key: str | None = None,
    tag: Annotated[list[str] | None, Parameter(negative="")] = None,
    json: Json = False,
) -> None:
    """Start a session from a template and print its id.

    It goes on where the template stands. Its ctx.ready() returns ARGS.

    For example:
      rethaw template start writer '{"topic": "snapshots"}'

    Parameters
    ----------
    name:
        The template.
    args:
        Arguments as a JSON object.
    key:
        Starting again with this key gives the same session.
    queue:
        Whose limits it waits for.
    priority:
        Higher ones start first; 0 if not said.
    delay:
        It starts after so long.
    ttl:
        It fails if it has not started by then, counted from when it may.
    concurrency_key:
        The queue may limit how many with one key run at once.
    tag:
        To find it by; may be given again.
    """
    import json as json_module

    from rethaw.model.errors import InvalidInput

    try:
        given: object = json_module.loads(args)
    except ValueError as error:
        raise InvalidInput(f"ARGS is not JSON: {error}", remedy='write them like \'{"topic": "x"}\'') from error
    if not isinstance(given, dict):
        raise InvalidInput(f"ARGS {args[:40]!r} is no JSON object", remedy='write them like \'{"topic": "x"}\'')
    with client() as connection:
        session = connection.templates.start(
            name,
            cast("dict[str, Any]", given),
            key=key,
            queue=queue,
            priority=priority,
            delay=delay,
            ttl=ttl,
            concurrency_key=concurrency_key,
            tags=tag or (),
        )
    if json:
        output.emit(session.view)
    else:
        output.data(session.id)


def ls(*, json: Json = False) -> None:
    """List templates.

    For example:
      rethaw template ls
    """
    with client() as connection:
        found = connection.templates.list()
    if json:
        output.emit(found)
        return
    if not found:
        output.note("no templates; make one: rethaw template create NAME FILE.py")
        return
    rows = [
        [one.name, one.session, one.snapshot or "-", one.ready_by or "not yet", output.ago(one.created_at)]
        for one in found
    ]
    output.table(["TEMPLATE", "SESSION", "SNAPSHOT", "WARM BY", "AGE"], rows)


def rm(name: str, /, *, json: Json = False) -> None:
    """Remove a template. Sessions that were started from it go on.

    Its own session goes with it, unless others were started from it.

    For example:
      rethaw template rm writer

    Parameters
    ----------
    name:
        The template.
    """
    with client() as connection:
        gone = connection.templates.delete(name)
    if json:
        output.emit(gone)
    else:
        output.data(gone.name)
