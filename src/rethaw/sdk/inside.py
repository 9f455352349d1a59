"""What reaches into a session's sandbox while it runs: programs beside the agent, files, links to its ports."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rethaw.model.dialing import ExecRequest
from rethaw.model.durations import Duration, seconds
from rethaw.model.errors import InvalidInput, Unavailable
from rethaw.model.looking import TerminalSize
from rethaw.sdk.calls import Call, path, to_json

if TYPE_CHECKING:
    from rethaw.sdk.aclient import AsyncClient
    from rethaw.sdk.client import Client
    from rethaw.sdk.session import Session
    from rethaw.sdk.shell import Exec
    from rethaw.sdk.transport import Target

HOUR = "1h"


@dataclass(frozen=True)
class Executed:
    """A program that has ended by itself."""

    exit_code: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True)
class Link:
    """`url` leads everybody who has it to one port of one session, until `expires_at`."""

    url: str
    expires_at: datetime


def link(session: str, port: int, expires: Duration = HOUR) -> Call[Link]:
    def read(body: bytes) -> Link:
        found = json.loads(body)
        return Link(str(found["url"]), datetime.fromisoformat(str(found["expires_at"])))

    content = to_json({"port": port, "expires_s": seconds(expires)})
    return Call("POST", path("sessions", session, "links"), read, content=content)


def exec_request(
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    workdir: str | None = None,
    *,
    terminal: TerminalSize | None = None,
    takes_input: bool = False,
) -> ExecRequest:
    """Raises InvalidInput for a command that is one string: how it is to be split is for its author to say."""
    if isinstance(command, str) or not command:
        raise InvalidInput(f"command {command!r} is not a list of words", remedy='write ["sh", "-c", "..."]')
    return ExecRequest(
        command=tuple(command), env=dict(env or {}), workdir=workdir, terminal=terminal, input=takes_input
    )


def run(target: Target, session: str, request: ExecRequest, given: bytes | None, timeout_s: float | None) -> Executed:
    """To its end. Raises WaitTimeout after `timeout_s`, when it is hung up; Unavailable when the connection is lost."""
    from rethaw.model.errors import WaitTimeout
    from rethaw.sdk.shell import LOST, Exec

    out: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    late = threading.Event()
    with Exec(target, session, request) as program:

        def stop() -> None:
            late.set()
            program.close()

        def feed() -> None:
            program.write(given or b"")
            program.end_input()

        timer = threading.Timer(timeout_s, stop) if timeout_s is not None else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        if given is not None:
            threading.Thread(target=feed, daemon=True).start()
        try:
            while (got := program.read()) is not None:
                out[got[0]].append(got[1])
        except Unavailable:
            if late.is_set():
                raise WaitTimeout(f"{request.command[0]} did not end within {timeout_s:g} s and was hung up") from None
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if program.why and program.exit_code == LOST:
            raise Unavailable(program.why, remedy="what the program did by then is done; look, and run it again")
        return Executed(program.exit_code or 0, b"".join(out["stdout"]), b"".join(out["stderr"]))


class Inside:
    """Of a `Session`."""

    id: str
    client: Client

    def exec(
        self,
        command: Sequence[str],
        *,
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        timeout: Duration | None = None,
    ) -> Executed:
        """Run `command` in the session's sandbox, beside its agent and in its environment, to its end. A session that
        waits suspended is resumed for it. A crash cuts it off (Unavailable); a save does not.

        Raises NotFound for a program that is not there, SessionEnded, WaitTimeout."""
        request = exec_request(command, env, workdir, takes_input=input is not None)
        limit = None if timeout is None else seconds(timeout)
        return run(self.client.target, self.id, request, input, limit)

    def program(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        terminal: TerminalSize | None = None,
        input: bool = True,
    ) -> Exec:
        """Like `exec`, to talk to while it runs; close it."""
        from rethaw.sdk.shell import Exec

        request = exec_request(command, env, workdir, terminal=terminal, takes_input=input)
        return Exec(self.client.target, self.id, request)

    def copy_out(self, path: str | bytes, target: str | Path) -> list[str]:
        """Copy a file or directory of the sandbox to `target` (below it when that is a directory). Links stay links. Returns
        what was left out, with why. Raises NotFound, Conflict, InvalidInput."""
        from rethaw.sdk import copying

        return copying.copy_out(cast("Session[Any]", self), path, Path(target))

    def copy_in(self, source: str | Path, path: str | bytes) -> list[str]:
        """Copy a file or directory of this machine to `path` in the sandbox (below it when that is a directory there)."""
        from rethaw.sdk import copying

        return copying.copy_in(cast("Session[Any]", self), Path(source), path)

    def link(self, port: int, expires: Duration = HOUR) -> Link:
        """A signed address of what listens on `port` in the sandbox, for HTTP and WebSocket."""
        return self.client.run(link(self.id, port, expires))


class AsyncInside:
    """Of an `AsyncSession`."""

    id: str
    client: AsyncClient

    async def exec(
        self,
        command: Sequence[str],
        *,
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        timeout: Duration | None = None,
    ) -> Executed:
        """See `Session.exec`. It goes on in a thread of its own when this is cancelled."""
        request = exec_request(command, env, workdir, takes_input=input is not None)
        limit = None if timeout is None else seconds(timeout)
        return await asyncio.to_thread(run, self.client.target, self.id, request, input, limit)

    async def link(self, port: int, expires: Duration = HOUR) -> Link:
        """A signed address of what listens on `port` in the sandbox, for HTTP and WebSocket."""
        return await self.client.run(link(self.id, port, expires))
