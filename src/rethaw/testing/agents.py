"""`AgentServer`: a real server and a scripted model, to test agents on. The plugin's fixture `rethaw_server` gives one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, cast

from rethaw.model.durations import Duration, seconds
from rethaw.model.errors import Conflict, InvalidInput, NotFound, RethawError, Unavailable
from rethaw.testing.server import RunningServer

if TYPE_CHECKING:
    from rethaw.sdk.aclient import AsyncClient
    from rethaw.sdk.agents import Agent
    from rethaw.sdk.asession import AsyncSession
    from rethaw.sdk.client import Client
    from rethaw.sdk.session import Session
    from rethaw.testing.model import ScriptedModel

P = ParamSpec("P")
R = TypeVar("R")
What = Literal["sandbox", "node", "db"]
_LOOK_S = 0.05
_COMES_BACK_S = 120.0
_SHOWN_EVENTS = 25
_SHOWN_BYTES = 2000


def missing() -> str | None:
    """Why no server can run here, in words; None when nothing speaks against it."""
    if sys.platform != "linux":
        return f"a Rethaw server needs Linux, and this is {sys.platform}"
    if os.geteuid() != 0:
        return 'a Rethaw server needs root, since it runs sandboxes: sudo env "PATH=$PATH" python -m pytest'
    if not (os.environ.get("RETHAW_RUNSC") or shutil.which("runsc") or shutil.which("qemu-system-x86_64")):
        return "there is no engine: install runsc (gVisor); `sudo rethaw doctor` says what else is missing"
    return None


class AgentServer:
    """`model` says what the model answers, `client` speaks to the server; `start`, `wait_for` and `crash` are short ways.
    `config`: tables of rethaw.toml on top of the scripted providers."""

    __test__ = False  # nothing for pytest to collect

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        from rethaw.testing.model import ScriptedModel

        given = dict(config or {})
        self.model: ScriptedModel = ScriptedModel()
        providers = {**self.model.settings(), **given.pop("providers", {})}
        self.server = RunningServer(providers=providers, config=given)
        self._client: Client | None = None

    def open(self) -> AgentServer:
        """Start it. Raises Unavailable, whose `details["log"]` is the end of the server's log."""
        try:
            self.server.start()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Stop it and remove all of it."""
        if self._client is not None:
            self._client.close()
        self.server.close()
        self.model.close()

    def reset(self) -> None:
        """As new: no session, nothing scripted, and it runs."""
        if not self.server.running:
            self.server.restart()
        for view in self.client.sessions.list(limit=1 << 20):
            with contextlib.suppress(NotFound):
                self.client.sessions.delete(view.id, force=True)
        self.model.reset()

    # ------------------------------------------------------------ speaking to it

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def token(self) -> str:
        return self.server.token

    @property
    def client(self) -> Client:
        """One client for all tests; it outlives crashes of the server."""
        from rethaw.sdk.client import Client

        if self._client is None:
            self._client = Client(self.url, self.token, patience=_COMES_BACK_S)
        return self._client

    def async_client(self) -> AsyncClient:
        """A new one, for `async with`."""
        from rethaw.sdk.aclient import AsyncClient

        return AsyncClient(self.url, self.token, patience=_COMES_BACK_S)

    @property
    def aio(self) -> AsyncAgentServer:
        """`wait_for` and `crash` as coroutines."""
        return AsyncAgentServer(self)

    def start(self, agent: Agent[P, R], *args: P.args, **kwargs: P.kwargs) -> Session[R]:
        """A session of `agent` on this server."""
        return agent.start_on(self.client, *args, **kwargs)

    # ------------------------------------------------------------ waiting and crashing

    def wait_for(
        self,
        session: Session[Any] | AsyncSession[Any],
        *,
        output: str | None = None,
        state: str | None = None,
        waiting: str | None = None,
        sent: Any = None,
        event: str | None = None,
        calls: int | None = None,
        condition: Callable[[], object] | None = None,
        timeout: Duration = "60s",
    ) -> None:
        """Return once all that is asked for holds.

        `output`: the text is in what the program wrote to stdout. `state`: like "suspended". `waiting`: it waits for the
        signal of that name ("inbox": for a message). `sent`: that payload is in its outbox. `event`: one of that type is in
        its log. `calls`: so many model calls arrived, of all sessions of this test. `condition`: anything else. Raises
        AssertionError telling what the session did instead, at once when it ended otherwise.
        """
        wanted = self._wanted(session.id, output, state, waiting, sent, event, calls, condition)
        if not wanted:
            raise InvalidInput("wait_for was not told what for", remedy="pass output=, state=, waiting=, sent=, ...")
        limit = seconds(timeout)
        end = time.monotonic() + limit
        while True:
            with contextlib.suppress(Unavailable):  # a server that was killed is on its way back
                over = self.client.sessions.get(session.id).state.final  # asked first, so that the looks are newer
                left = [what for what, holds in wanted.items() if not holds()]
                if not left:
                    return
                if over:
                    raise AssertionError(f"{', '.join(left)}: the session ended without it\n{self.report(session.id)}")
            if time.monotonic() > end:
                raise AssertionError(f"{', '.join(wanted)}: not within {limit:g} s\n{self.report(session.id)}")
            time.sleep(_LOOK_S)

    def _wanted(
        self,
        ident: str,
        output: str | None,
        state: str | None,
        waiting: str | None,
        sent: Any,
        event: str | None,
        calls: int | None,
        condition: Callable[[], object] | None,
    ) -> dict[str, Callable[[], object]]:
        sessions = self.client.sessions
        wanted: dict[str, Callable[[], object]] = {}
        if output is not None:
            wanted[f"output {output!r}"] = lambda: output.encode() in sessions.logs(ident)
        if state is not None:
            wanted[f"state {state!r}"] = lambda: sessions.get(ident).state.value == state
        if waiting is not None:
            wanted[f"waiting for {waiting!r}"] = lambda: any(
                waiting in (wait.name, wait.kind) for wait in sessions.why(ident).waiting_for
            )
        if sent is not None:
            wanted[f"{sent!r} in its outbox"] = lambda: any(m.payload == sent for m in sessions.outbox(ident))
        if event is not None:
            wanted[f"event {event!r}"] = lambda: sessions.events(ident, types=[event], limit=1)
        if calls is not None:
            wanted[f"{calls} model calls"] = lambda: self.model.calls >= calls
        if condition is not None:
            wanted["the condition"] = condition
        return wanted

    def crash(self, session: Session[Any] | AsyncSession[Any], what: What = "sandbox") -> None:
        """SIGKILL, and return once it was felt: to the sandbox of `session`; to the "node", which is the whole server (it is
        started again); to the database, "db". Raises Conflict when the session has no sandbox (it is suspended, or over)."""
        if what == "node":
            self.server.kill9()
            self.server.restart()
            return
        before = self.client.sessions.get(session.id).view.crashes
        self.client.sessions.crash(session.id, what)
        if what == "db":
            self._until("the database is back", self._database_answers)
        else:
            self._until("the crash is noticed", lambda: self._crashed(session.id, before))

    def _database_answers(self) -> bool:
        self.client.sessions.list(limit=1)
        return True

    def _crashed(self, ident: str, before: int) -> bool:
        view = self.client.sessions.get(ident).view
        if view.state.final and view.crashes == before:
            raise Conflict(f"session {ident} ended before it could be crashed", remedy="crash it while it works")
        return view.crashes > before

    def _until(self, what: str, done: Callable[[], bool]) -> None:
        end = time.monotonic() + _COMES_BACK_S
        while True:
            with contextlib.suppress(Unavailable):
                if done():
                    return
            if time.monotonic() > end:
                raise Unavailable(f"{what}: not within {_COMES_BACK_S:g} s", log=self.server.log_tail())
            time.sleep(_LOOK_S)

    # ------------------------------------------------------------ telling

    def report(self, session: str | None = None) -> str:
        """What `session`, or each of this test's, did; for the message of a test that failed."""
        lines: list[str] = []
        try:
            found = [session] if session else [view.id for view in self.client.sessions.list(limit=10)]
            for ident in found:
                lines += self._told(ident)
        except RethawError as error:
            lines += [str(error), "the server's log ends:", self.server.log_tail(20)]
        lines.append(f"{self.model.calls} model calls: {[prompt[:60] for prompt in self.model.prompts[-10:]]}")
        return "\n".join(lines)

    def _told(self, ident: str) -> list[str]:
        sessions = self.client.sessions
        view, why = sessions.get(ident).view, sessions.why(ident)
        head = f"session {ident} of {view.agent.name}: {view.state.value}, {view.detail or view.reason.value}"
        waits = [f"{wait.kind} {wait.name or ''}".strip() for wait in why.waiting_for]
        lines = [head + (f"; waits for {', '.join(waits)}" if waits else "")]
        last = sessions.events(ident, after=max(0, view.last_seq - _SHOWN_EVENTS), all_lines=True)
        for event in last:
            mark = " (superseded)" if event.superseded else ""
            lines.append(f"  {event.seq:>4} {event.type.value}{mark} {str(cast('object', event.data))[:160]}")
        for stream in ("stdout", "stderr"):
            if written := sessions.logs(ident, stream=stream)[-_SHOWN_BYTES:]:
                lines += [f"  {stream}:", *(f"  | {row}" for row in written.decode(errors="replace").splitlines())]
        return lines


class AsyncAgentServer:
    """`rethaw_server.aio`: what would block, in a thread."""

    def __init__(self, server: AgentServer) -> None:
        self._server = server

    async def wait_for(self, session: Session[Any] | AsyncSession[Any], **what: Any) -> None:
        """See `AgentServer.wait_for`."""
        await asyncio.to_thread(self._server.wait_for, session, **what)

    async def crash(self, session: Session[Any] | AsyncSession[Any], what: What = "sandbox") -> None:
        """See `AgentServer.crash`."""
        await asyncio.to_thread(self._server.crash, session, what)
