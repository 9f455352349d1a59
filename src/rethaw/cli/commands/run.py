"""`rethaw run`: start a session and watch it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Flag, Json
from rethaw.cli.connect import client

if TYPE_CHECKING:
    from rethaw.model.types import AgentSpec
    from rethaw.sdk.agents import Agent, Options
    from rethaw.sdk.client import Client
    from rethaw.sdk.limits import Budget
    from rethaw.sdk.session import Session
    from rethaw.sdk.starting import Starting

_INTERRUPTED = 130
Number = Parameter(allow_leading_hyphen=True)  # so that a negative one gets an answer that names it


def run(
    target: Annotated[str | None, Parameter(show=False)] = None,
    /,
    *rest: Annotated[str, Parameter(show=False)],
    image: str | None = None,
    agent: str | None = None,
    detach: Annotated[bool, Flag, Parameter(name=("--detach", "-d"))] = False,
    interactive: Annotated[bool, Flag, Parameter(name=("--interactive", "-i"))] = False,
    tty: Annotated[bool, Flag, Parameter(name=("--tty", "-t"))] = False,
    detach_keys: str | None = None,
    mount_copy: Annotated[list[str] | None, Parameter(negative="")] = None,
    rm: Annotated[bool, Flag, Parameter(name="--rm")] = False,
    dry_run: Annotated[bool, Flag] = False,
    key: str | None = None,
    name: str | None = None,
    env: Annotated[list[str] | None, Parameter(name=("--env", "-e"), negative="")] = None,
    memory: str | None = None,
    durability: str | None = None,
    idle_suspend: str | None = None,
    nap: str | None = None,
    max_duration: str | None = None,
    workdir: str | None = None,
    template: str | None = None,
    engine: str | None = None,
    queue: str | None = None,
    priority: Annotated[int | None, Parameter(allow_leading_hyphen=True)] = None,
    delay: str | None = None,
    ttl: str | None = None,
    concurrency_key: str | None = None,
    tag: Annotated[list[str] | None, Parameter(negative="")] = None,
    retries: Annotated[int | None, Number] = None,
    retry_delay: str | None = None,
    retry_on: Annotated[list[str] | None, Parameter(negative="")] = None,
    budget_tokens: Annotated[int | None, Number] = None,
    budget_money: Annotated[str | None, Number] = None,
    budget_calls: Annotated[int | None, Number] = None,
    budget_wall: str | None = None,
    allow: Annotated[list[str] | None, Parameter(negative="")] = None,
    json: Json = False,
) -> int:
    """Start a session and watch its output. Ctrl-C detaches; the session goes on.

    Of FILE.py it takes the function with @rethaw.agent over it (NAME if there
    are several). Options that are not listed here are that function's
    arguments, by name, typed as it says (rethaw run FILE.py --help lists them);
    after "--" all are. With --image, what
    follows "--" is any command. The result is printed at the end, and the exit
    code is the session's.

    For example:
      rethaw run examples/hello.py
      rethaw run research.py::researcher --topic "heat pumps" --depth 3
      rethaw run -d --key nightly-2026-01-01 report.py
      rethaw run --agent researcher@2 --topic "heat pumps"
      rethaw run --image base -- sh -c 'echo hello; sleep 5'
      rethaw run -it --image base -- bash
      rethaw run -i --rm --image base -- wc -l < notes.txt
      rethaw run -it --image base --mount-copy . -- bash

    Parameters
    ----------
    image:
        Run a command in this image: base or python (Debian with Python, git and ripgrep), node (that with nodejs and npm),
        a rethaw.toml with a table [image], an archive of "docker save" or an OCI layout (whose own command runs if none is
        given), or the digest of one that "rethaw image ls" lists.
    agent:
        NAME[@VERSION] of a deployed agent, in place of FILE.py.
    detach:
        Print the session's id and return at once.
    interactive:
        The command reads what is typed here, or this stdin; without it, nothing.
    tty:
        The command gets a terminal. Ctrl-P Ctrl-Q detaches; `rethaw attach` comes back.
    detach_keys:
        Other keys for that, like ctrl-a,d; or "none".
    mount_copy:
        DIR[:TARGET]: a copy of DIR is in the session at TARGET (/work if not said), where the command starts. Nothing is
        written back: `rethaw cp` fetches files. May be given again.
    rm:
        Erase the session when it has ended.
    dry_run:
        Show what would travel to the server, and start nothing.
    key:
        Starting again with this key gives the same session.
    name:
        The agent's name; else the function's or the command's.
    env:
        NAME=VALUE for the agent's environment; may be given again. No secrets: snapshots keep them.
    memory:
        What the sandbox may use, like 1GiB.
    durability:
        What an answer of the model survives: local, replicated or relaxed.
    idle_suspend:
        How long it may wait before it is suspended, like 20s; "never".
    nap:
        Suspend it also when it did nothing for so long, whatever it waits for, and wake it after this time, like 1h, or at a
        key, a request or a message. Its clock stands still meanwhile.
    max_duration:
        End it after so long.
    workdir:
        Directory that it starts in.
    template:
        "auto": the first start makes a template of the agent, later ones begin there, with its file imported.
    engine:
        gvisor, or qemu for a microVM with a kernel of its own; else the server's default.
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
    retries:
        So many new attempts when its program fails.
    retry_delay:
        How long after a failure, like 1s; doubled each time.
    retry_on:
        After which failures: exit, crash_loop, out_of_memory; may be given again. Else the first two.
    budget_tokens:
        Stop it once it has used so many tokens, input and output together.
    budget_money:
        Stop it once its tokens have cost so much, like 5.00; needs prices in rethaw.toml.
    budget_calls:
        Stop it after so many model calls.
    budget_wall:
        Stop it once it has run so long, like 2h; suspended time is not counted.
    allow:
        HOST or HOST:PORT that it may connect to, like api.github.com or "*.pypi.org:443"; may be given again.
    """
    from rethaw.cli.joined import Joined
    from rethaw.sdk.starting import starting

    how = starting(
        queue=queue, priority=priority, delay=delay, ttl=ttl, concurrency_key=concurrency_key, tags=tag or ()
    )
    given: dict[str, Any] = {
        "name": name,
        "env": _environment(env) if env else None,
        "memory": memory,
        "durability": durability,
        "idle_suspend": idle_suspend,
        "nap": nap,
        "max_duration": max_duration,
        "workdir": workdir,
        "template": template,
        "engine": engine,
        "retries": _retries(retries, retry_delay, retry_on),
        "budget": _budget(budget_tokens, budget_money, budget_calls, budget_wall),
        "allow": allow,
    }
    given = {option: value for option, value in given.items() if value is not None}
    joined = Joined(interactive=interactive, tty=tty, detach_keys=detach_keys, rm=rm).with_copies(mount_copy or ())
    joined.checked(image, detached=detach or dry_run, json=json)
    if dry_run:
        from rethaw.cli.dryrun import show

        return show(target, list(rest), image, given, json, joined)
    with client(patient=not detach) as connection:
        if agent is not None:
            tokens = [*([target] if target is not None else []), *rest]
            session = _of_name(connection, agent, tokens, image, given, key, how)
        elif image is not None:
            command = [*([target] if target is not None else []), *rest]
            spec = joined.over(connection, of_command(image, command, given, connection))
            session = connection.sessions.start(spec, key=key, **how.given())
        else:
            session = _of_file(connection, target, list(rest), given, key, how)
        if detach:
            if json:
                output.emit(session.view)
            else:
                output.data(session.id)
            return 0
        code = joined.watch(connection, session)
        code = _watch(connection, session, json) if code is None else code
        joined.after(connection, session.id)
        return code


def agent_of(
    connection: Client, target: str | None, command: list[str], image: str | None, given: dict[str, Any]
) -> AgentSpec:
    """What is to be run, from FILE.py[::NAME] (whose code is uploaded) or from an image and a command."""
    from rethaw.model.errors import InvalidInput

    if image is not None:
        return of_command(image, [*([target] if target is not None else []), *command], given, connection)
    if target is None or command:
        raise InvalidInput("what to run is not named", remedy="write FILE.py, or --image base -- COMMAND ARG ...")
    return changed_agent(target, given).uploaded(connection)


def changed_agent(
    target: str | None, given: dict[str, Any], key: str | None = None, how: Starting | None = None
) -> Agent[..., Any]:
    """The agent of FILE.py[::NAME] with the options of the command line."""
    from rethaw.model.errors import InvalidInput
    from rethaw.sdk.agents import Agent, find

    if target is None:
        raise InvalidInput("nothing to run is named", remedy="write rethaw run FILE.py, or --image base -- COMMAND")
    file, _, chosen = target.partition("::")
    found = find(file, chosen or None)
    return Agent[..., Any](found.function, _overridden(found.options, given), key=key, how=how)


def of_command(image: str, command: list[str], given: dict[str, Any], connection: Client | None = None) -> AgentSpec:
    """`connection`: what the image takes from this machine is uploaded there."""
    from rethaw.cli import imagefile
    from rethaw.model.errors import InvalidInput
    from rethaw.sdk.agents import options

    found, form = imagefile.resolved(image, connection)
    command = command or list(found.command)
    if not command:
        raise InvalidInput("no command is given", remedy="write rethaw run --image base -- COMMAND ARG ...")
    name = given.pop("name", None) or PurePosixPath(command[0]).name or "command"
    return _overridden(options(name), given).spec(command=tuple(command), image=form)


def _of_file(
    connection: Client,
    target: str | None,
    tokens: list[str],
    given: dict[str, Any],
    key: str | None,
    how: Starting,
) -> Session[Any]:
    from rethaw.cli.arguments import parse

    changed = changed_agent(target, given, key, how)
    args = parse(changed.function, tokens)
    return connection.sessions.start(changed.uploaded(connection), args, key=key, **changed.starting.given())


def _of_name(
    connection: Client,
    agent: str,
    tokens: list[str],
    image: str | None,
    given: dict[str, Any],
    key: str | None,
    how: Starting,
) -> Session[Any]:
    from rethaw.cli.arguments import parse
    from rethaw.model.errors import InvalidInput
    from rethaw.sdk.versions import named
    from rethaw.sdk.versions import parse as parse_name

    if image is not None:
        raise InvalidInput("both --agent and --image are given", remedy="give one of them")
    if given:
        option = f"--{next(iter(given)).replace('_', '-')}"
        raise InvalidInput(
            f"{option} belongs to the agent's definition, which --agent {agent} takes as it was deployed",
            remedy=f"leave {option} out, or deploy another version",
        )
    name, version = parse_name(agent)
    found = connection.agents.get(name, version)
    one = named(name, found.version)
    args = parse(found.function() or one.function, tokens)
    spec = one.uploaded(connection)
    return connection.sessions.start(spec, args, key=key, **how.over(one.starting).given())


def _overridden(base: Options, given: dict[str, Any]) -> Options:
    """`base` with what the command line says, checked as in Python."""
    from rethaw.sdk.agents import options

    if given.get("idle_suspend") == "never":
        given = {**given, "idle_suspend": None}
    given = _with_base(base, given)
    checked = options(given.get("name") or base.name, **{k: v for k, v in given.items() if k != "name"})
    changes = {field: getattr(checked, field) for field in given}
    if "env" in changes:
        changes["env"] = {**base.env, **changes["env"]}
    if "allow" in changes:
        changes["allow"] = (*base.allow, *(rule for rule in changes["allow"] if rule not in base.allow))
    return dataclasses.replace(base, **changes)


def _retries(count: int | None, delay: str | None, on: list[str] | None) -> dict[str, Any] | None:
    given = {"max": count, "delay": delay, "on": tuple(on) if on else None}
    return {name: value for name, value in given.items() if value is not None} or None


def _budget(tokens: int | None, money: str | None, calls: int | None, wall: str | None) -> Budget | None:
    from rethaw.sdk.limits import Budget

    made = Budget(tokens=tokens, money=money, model_calls=calls, wall=wall)
    return None if made == Budget() else made


def _with_base(base: Options, given: dict[str, Any]) -> dict[str, Any]:
    """What the command line says of retries and of the budget, over what the file says of the rest of them."""
    from rethaw.sdk.limits import Retries

    given = dict(given)
    if "retries" in given:
        given["retries"] = dataclasses.replace(base.retries or Retries(), **given["retries"])
    if "budget" in given:
        given["budget"] = given["budget"].over(base.budget)
    return given


def _environment(pairs: list[str]) -> dict[str, str]:
    from rethaw.model.errors import InvalidInput

    out: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InvalidInput(f"--env {pair!r} has no '='", remedy="write --env NAME=VALUE")
        out[name] = value
    return out


def _watch(connection: Client, session: Session[Any], json: bool) -> int:
    from rethaw.cli import attach
    from rethaw.model.enums import State
    from rethaw.sdk import calls

    output.note(f"session {session.id}; Ctrl-C detaches")
    try:
        attach.follow(connection, session.id, all_to_stderr=json)
        view = connection.patient(calls.get(session.id))
        outcome = connection.patient(calls.result(session.id, 0))
    except KeyboardInterrupt:
        output.note("")
        output.note(f"detached; {session.id} goes on. Come back: rethaw logs -f {session.id}")
        output.note(f"look at it: rethaw show {session.id}   end it: rethaw cancel {session.id}")
        return _INTERRUPTED
    if json:
        output.emit({
            "session": view.id,
            "state": view.state.value,
            "reason": view.reason.value,
            "detail": view.detail,
            "exit_code": view.exit_code,
            "result": outcome.result,
        })  # fmt: skip
    elif outcome.result is not None:
        output.data(outcome.result if isinstance(outcome.result, str) else _pretty(outcome.result))
    if view.state is State.COMPLETED:
        return view.exit_code or 0
    by_itself = f"its program ended with exit code {view.exit_code}" if view.reason.value == "exited" else ""
    said = output.plain(view.detail or by_itself or view.reason.value)
    sys.stdout.flush()
    sys.stderr.write(f"rethaw: session {view.id} {view.state.value}: {said}; see `rethaw why {view.id}`\n")
    return view.exit_code or 1


def _pretty(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=2)
