"""Commands that reach into a running session's sandbox: exec, cp."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Flag, Json
from rethaw.cli.connect import client

if TYPE_CHECKING:
    from rethaw.sdk.session import Session

Hyphens = Parameter(allow_leading_hyphen=True)


def exec_(
    session: str,
    /,
    *command: Annotated[str, Hyphens],
    interactive: Annotated[bool, Flag, Parameter(name=("--interactive", "-i"))] = False,
    tty: Annotated[bool, Flag, Parameter(name=("--tty", "-t"))] = False,
    env: Annotated[tuple[str, ...], Parameter(name=("--env", "-e"), negative="")] = (),
    workdir: Annotated[str | None, Parameter(name=("--workdir", "-w"))] = None,
    json: Json = False,
) -> int:
    """Run a command in a running session's sandbox, beside its agent.

    The command belongs to the session: it is in its snapshots and is not
    disturbed by saves. A session that waits suspended goes on for it, and
    does not go to sleep while it runs. When this end leaves, the command is
    hung up. A crash or a suspension cuts the connection: exit code 70. Else
    the exit code is the command's.

    For example:
      rethaw exec s_06f2 -- ls -l /app
      rethaw exec -it s_06f2 -- sh
      rethaw exec -i s_06f2 -- python3 - < check.py

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    command:
        What to run; write it after "--".
    interactive:
        Pass standard input on.
    tty:
        Give it a terminal. Needs one here.
    env:
        NAME=VALUE, on top of the agent's environment. May be given again.
    workdir:
        Where to run it; without this where the agent was started.
    """
    from rethaw.cli import terminal
    from rethaw.model.errors import InvalidInput
    from rethaw.sdk import inside

    if not command:
        raise InvalidInput("no command is named", remedy="write `rethaw exec SESSION -- COMMAND ...`")
    if tty and (json or not (sys.stdin.isatty() and sys.stdout.isatty())):
        raise InvalidInput("-t needs a terminal here", remedy="leave out -t" if not json else "leave out --json")
    given: dict[str, str] = {}
    for text in env:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise InvalidInput(f"--env {text!r} is not NAME=VALUE", remedy="write --env DEBUG=1")
        given[name] = value
    with client() as connection:
        if json:
            data = sys.stdin.buffer.read() if interactive else None
            request = inside.exec_request(command, given, workdir, takes_input=interactive)
            done = inside.run(connection.target, session, request, data, None)
            texts = {"stdout": done.stdout.decode(errors="replace"), "stderr": done.stderr.decode(errors="replace")}
            output.emit({**texts, "exit_code": done.exit_code})
            return done.exit_code
        from rethaw.sdk.shell import Exec

        size = terminal.size_now() if tty else None
        request = inside.exec_request(command, given, workdir, terminal=size, takes_input=interactive)
        with Exec(connection.target, session, request) as program:
            return terminal.join(program, interactive=tty, feed=interactive or tty)


def cp(source: str, destination: str, /, *, json: Json = False) -> None:
    """Copy files into a running session's sandbox or out of it.

    One of both is SESSION:PATH. Directories are copied whole; modes are kept
    and links stay links. Like container programs do it: into an existing
    directory it keeps its name, else it gets the new one; PATH/. is what is
    in a directory; "-" is a tar on standard input or output. A relative PATH
    is below the agent's working directory.

    For example:
      rethaw cp s_06f2:/app/report.pdf .
      rethaw cp ./data s_06f2:/app/data
      rethaw cp ./src/. s_06f2:/app

    Parameters
    ----------
    source:
        LOCAL, SESSION:PATH, or "-".
    destination:
        SESSION:PATH, LOCAL, or "-".
    """
    from rethaw.cli.table import STREAM
    from rethaw.model.errors import InvalidInput

    source, destination = ("-" if text == STREAM else text for text in (source, destination))
    there, here = _remote(source), _remote(destination)
    if (there is None) == (here is None):
        raise InvalidInput(
            f"one of {source!r} and {destination!r} must be SESSION:PATH",
            remedy="write `rethaw cp SESSION:PATH LOCAL` or `rethaw cp LOCAL SESSION:PATH`",
        )
    with client() as connection:
        if there is not None:
            session = connection.sessions.get(there[0])
            left_out = _out(session, there[1], destination)
        else:
            assert here is not None
            session = connection.sessions.get(here[0])
            left_out = _in(session, source, here[1])
    for line in left_out:
        output.note(f"left out: {output.plain(line)}")
    if json and destination != "-":
        output.emit({"session": session.id, "source": source, "destination": destination, "left_out": left_out})


def _out(session: Session[object], path: str, destination: str) -> list[str]:
    from pathlib import Path

    from rethaw.sdk import copying

    if destination == "-":
        for chunk in copying.read_tar(session, path):
            output.raw(chunk)
        return []
    return copying.copy_out(session, path, Path(destination), progress=_progress())


def _in(session: Session[object], source: str, path: str) -> list[str]:
    from pathlib import Path

    from rethaw.sdk import copying

    if source == "-":
        copying.write_tar(session, sys.stdin.buffer, path)
        return []
    return copying.copy_in(session, Path(source), path, trailing=source.endswith(("/.", "/")), progress=_progress())


def _progress() -> object:
    """Says how far a long copy is, on a terminal."""
    import time

    from rethaw.sdk.sizes import human_bytes

    if not sys.stderr.isatty():
        return None
    began = last = time.monotonic()

    def told(size: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - began > 1 and now - last > 0.2:
            last = now
            sys.stderr.write(f"\r\x1b[K{human_bytes(size)}, {human_bytes(int(size / (now - began)))}/s")
            sys.stderr.flush()

    return told


def _remote(text: str) -> tuple[str, str] | None:
    """Session and path of SESSION:PATH. A local name with a colon is written with a slash before it: ./a:b"""
    session, colon, path = text.partition(":")
    if not colon or "/" in session or session in ("", ".", "-"):
        return None
    return session, path or "."
