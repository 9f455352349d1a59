"""Commands for versions of agents: deploy, list, pin; another version for a session."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Json
from rethaw.cli.connect import client

if TYPE_CHECKING:
    from rethaw.model.types import SessionView
    from rethaw.model.versions import Upgraded
    from rethaw.sdk.client import Client

_LOOK_S = 0.1
Number = Parameter(allow_leading_hyphen=True)  # so that a negative number gets an answer that names it


def deploy(file: str, /, *, json: Json = False) -> None:
    """Register a version of an agent, to be started by its name from anywhere.

    Starts by name take it from now on, unless a version is pinned. Sessions
    that there are stay on the version that they began with, until
    `rethaw upgrade`. Deploying an equal one again changes nothing.

    For example:
      rethaw deploy research.py
      rethaw deploy agents.py::researcher
      rethaw run --agent researcher --goal "heat pumps"

    Parameters
    ----------
    file:
        FILE.py[::NAME] of an agent in Python.
    """
    with client() as connection:
        version, new = connection.agents.deploy(file)
        current = version if version.current else connection.agents.get(version.agent)
    if json:
        output.emit({**output.jsonable(version), "new": new})
        return
    output.data(f"{version.agent}@{version.version}")
    output.note(f"version {version.label} of {version.agent}" if new else f"it is version {version.label} already")
    if not version.current:
        output.note(
            f"starts by name take version {current.version}, which is pinned: rethaw agent unpin {version.agent}"
        )


def ls(*, json: Json = False) -> None:
    """List agents: what a start by name takes, and how many sessions are unfinished.

    For example:
      rethaw agent ls
    """
    with client() as connection:
        found = connection.agents.list()
    if json:
        output.emit(found)
        return
    if not found:
        output.note("no agents; deploy one: rethaw deploy FILE.py")
        return
    rows = [
        [
            one.agent,
            one.label if one.current else "-",
            "pinned" if one.pinned else "deployed" if one.current else "never deployed",
            output.ago(one.deployed_at),
            str(one.sessions),
        ]
        for one in found
    ]
    output.table(["AGENT", "VERSION", "", "DEPLOYED", "SESSIONS"], rows)


def show(name: str, /, *, json: Json = False) -> None:
    """Show the versions of an agent, what it takes, and which session runs which.

    For example:
      rethaw agent show researcher

    Parameters
    ----------
    name:
        The agent's name.
    """
    with client() as connection:
        found = connection.agents.show(name)
    if json:
        output.emit(found)
        return
    rows = [
        [
            one.label,
            one.spec.entry or " ".join(one.spec.command),
            "-" if one.deployed_at is None else output.ago(one.deployed_at),
            str(one.sessions),
            "pinned" if one.pinned else "starts by name take it" if one.current else "",
        ]
        for one in found.versions
    ]
    output.table(["VERSION", "RUNS", "DEPLOYED", "SESSIONS", ""], rows)
    shown = next((one for one in found.versions if one.current), found.versions[0])
    if (function := shown.function()) is not None:
        from rethaw.cli.arguments import described

        output.data("")
        output.data(f"Arguments of version {shown.version}:")
        for line in described(function) or ["  none"]:
            output.data(output.plain(line))
    if found.sessions:
        output.data("")
        ids = output.short(one.session for one in found.sessions)
        output.table(
            ["SESSION", "VERSION", "STATE"],
            [[ids[one.session], str(one.version or "-"), one.state] for one in found.sessions],
        )


def pin(name: str, version: Annotated[int, Number], /, *, json: Json = False) -> None:
    """Let starts by name take this version, whatever is deployed later.

    For example:
      rethaw agent pin researcher 2

    Parameters
    ----------
    name:
        The agent's name.
    version:
        The number of one of its versions.
    """
    with client() as connection:
        _current(connection.agents.pin(name, version), json)


def unpin(name: str, /, *, json: Json = False) -> None:
    """Let starts by name take what was deployed last.

    For example:
      rethaw agent unpin researcher

    Parameters
    ----------
    name:
        The agent's name.
    """
    with client() as connection:
        _current(connection.agents.unpin(name), json)


def _current(version: Any, json: bool) -> None:
    if json:
        output.emit(version)
    else:
        output.data(f"{version.agent}@{version.version}")


def upgrade(
    session: str | None = None,
    file: str | None = None,
    /,
    *,
    all_of: str | None = None,
    to: Annotated[int | None, Number] = None,
    from_: Annotated[int | None, Parameter(name="--from", allow_leading_hyphen=True)] = None,
    files: Literal["keep", "fresh"] = "keep",
    within: str = "5m",
    json: Json = False,
) -> int:
    """Let a session go on with another version of its agent, newer or older.

    The new code boots with the context of the old one: its log
    (ctx.history(), ctx.fresh is true), the inbox from the message whose turn
    did not finish on, signals that came and were not used, callback addresses
    that were handed out, and the files of the last snapshot. It waits until
    the new code runs. Also for a session that has ended, because of a bug say.

    For example:
      rethaw upgrade s_06f2
      rethaw upgrade s_06f2 research.py
      rethaw upgrade s_06f2 --to 1
      rethaw upgrade s_06f2 --from 57 --files fresh
      rethaw upgrade --all-of researcher

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    file:
        FILE.py[::NAME] to go on with; else what a start by name takes.
    all_of:
        Every unfinished session of this agent.
    to:
        A version's number: rethaw agent show AGENT.
    from_:
        Go on from this event: what came after it is left, as in a rewind.
    files:
        keep: those that the agent changed, of the last snapshot. fresh: the new
        image's alone.
    within:
        How long to wait for it.
    """
    from rethaw.model.durations import seconds
    from rethaw.model.errors import InvalidInput, RethawError

    if all_of is not None:
        if file is not None:
            raise InvalidInput("a session and --all-of are given", remedy="give one of them")
        session, file = None, session
    elif session is None:
        raise InvalidInput("no session is named", remedy="write SESSION, or --all-of AGENT")
    if file is not None and to is not None:
        raise InvalidInput("both a file and --to are given", remedy="give one of them")
    if all_of is not None and from_ is not None:
        raise InvalidInput("--from is about one session", remedy="name the session")
    limit, failed = seconds(within), 0
    with client() as connection:
        for one in [session] if session is not None else _unfinished(connection, all_of or ""):
            try:
                done = connection.sessions.upgrade(one, to if file is None else file, from_seq=from_, files=files)
                view = _settled(connection, done, limit)
            except RethawError as error:
                if all_of is None:
                    raise
                failed += 1
                output.note(f"{one}: {error}")
                continue
            failed += view.state.value == "failed"
            if json:
                output.emit({**output.jsonable(done), "session": output.jsonable(view)})
            else:
                _say(done, view)
    return 1 if failed else 0


def _unfinished(connection: Client, agent: str) -> list[str]:
    connection.agents.show(agent)  # or it says that there is none
    views = [v for v in connection.sessions.list(agent=agent, limit=100_000) if not v.state.final]
    mine = [v.id for v in views if not (v.key or "").startswith("template:")]
    if not mine:
        output.note(f"no session of {agent} is unfinished")
    return mine


def _settled(connection: Client, done: Upgraded, limit_s: float) -> SessionView:
    """The session once it runs its new version, has ended, or is not about to."""
    from rethaw.sdk import calls

    until = time.monotonic() + limit_s
    while True:
        view = connection.patient(calls.get(done.session.id))
        waits = view.state.value in ("starting", "resuming", "recovering")
        if not done.changed or not waits or time.monotonic() > until:
            return view
        time.sleep(_LOOK_S)


def _say(done: Upgraded, view: SessionView) -> None:
    from rethaw.cli.render import state_text
    from rethaw.model.versions import label

    after = label(done.to_version, view.version_digest)
    if not done.changed:
        output.data(f"{view.id}  runs version {after} already; {state_text(view)}")
        return
    with_files = f" and the files of {done.files}" if done.files else ""
    output.data(f"{view.id}  version {done.from_version} -> {after}; {state_text(view)}")
    output.note(f"it has the log up to event {done.at}{with_files}")
    if view.state.value == "failed":
        output.note(
            f"{view.detail or view.reason.value}; back again: rethaw upgrade {view.id} --to {done.from_version}"
        )
