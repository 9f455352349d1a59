"""The client: `Client().sessions.start(...)`, and `Session`, what starting gives. `aclient` is the same with await."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import httpx2

from rethaw.model.durations import Duration, optional_seconds, seconds
from rethaw.model.enums import State
from rethaw.model.errors import Unavailable, WaitTimeout
from rethaw.sdk import calls
from rethaw.sdk.calls import Call
from rethaw.sdk.limits import Budget, add_names
from rethaw.sdk.listing import PAGE, Page, When, wanted
from rethaw.sdk.sse import Parser
from rethaw.sdk.starting import starting
from rethaw.sdk.transport import PATIENCE_S, POLL_S, TIMEOUT_S, OnGap, Patience, Target, failure
from rethaw.sdk.types import Detail, Message, Outcome, Why

if TYPE_CHECKING:
    from pathlib import Path

    from rethaw.model.loads import MachineLoad
    from rethaw.model.types import AgentSpec, Event, SessionView, SnapshotInfo
    from rethaw.model.versions import Files, Upgraded
    from rethaw.sdk.agents import Agent
    from rethaw.sdk.queues import Queues
    from rethaw.sdk.schedules import Schedules
    from rethaw.sdk.session import Session
    from rethaw.sdk.snapshots import Snapshots
    from rethaw.sdk.templates import Templates
    from rethaw.sdk.trees import Images
    from rethaw.sdk.versions import Agents

T = TypeVar("T")


class Client:
    """Speaks to one server. Close it, or use it in a `with` block.

    `url` and `token` default to RETHAW_URL and RETHAW_TOKEN, then to what `rethaw up` wrote for this user. `timeout`
    is for one answer. `patience`: how long streams and waits outlast a server that is away, trying again; plain calls
    never try again. `on_gap` is called when such a time begins.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        timeout: Duration = TIMEOUT_S,
        patience: Duration = PATIENCE_S,
        on_gap: OnGap | None = None,
    ) -> None:
        self.target = Target.find(url, token, seconds(timeout))
        self.patience_s = seconds(patience)
        self.on_gap = on_gap
        self.http = httpx2.Client(**self.target.settings)
        self.sessions = Sessions(self)
        self.blobs = Blobs(self)

    # Loaded when they are used: most commands use none of them.

    @cached_property
    def snapshots(self) -> Snapshots:
        from rethaw.sdk.snapshots import Snapshots

        return Snapshots(self)

    @cached_property
    def templates(self) -> Templates:
        from rethaw.sdk.templates import Templates

        return Templates(self)

    @cached_property
    def images(self) -> Images:
        from rethaw.sdk.trees import Images

        return Images(self)

    @cached_property
    def queues(self) -> Queues:
        from rethaw.sdk.queues import Queues

        return Queues(self)

    @cached_property
    def schedules(self) -> Schedules:
        from rethaw.sdk.schedules import Schedules

        return Schedules(self)

    @cached_property
    def agents(self) -> Agents:
        from rethaw.sdk.versions import Agents

        return Agents(self)

    @property
    def url(self) -> str:
        return self.target.url

    def close(self) -> None:
        self.http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, call: Call[T]) -> T:
        """One call. Raises the server's error as the class it was, Unavailable when there is no answer."""
        try:
            response = self.http.request(**self.target.request(call))
            body = response.read()
        except httpx2.HTTPError as e:
            raise self.target.unavailable(e) from e
        if response.status_code >= 400:
            raise calls.error_of(response.status_code, body, url=self.url, token_source=self.target.source)
        try:
            return call.read(body)
        except (ValueError, KeyError, TypeError) as e:
            raise Unavailable(
                f"{self.url} gave an answer that is not Rethaw's to {call.method} {call.path}",
                remedy="check RETHAW_URL",
            ) from e

    def patient(self, call: Call[T]) -> T:
        """One call that is harmless to repeat, tried again while the server is away."""
        patience = Patience(self.patience_s, self.on_gap)
        while True:
            try:
                return self.run(call)
            except Unavailable as e:
                time.sleep(patience.pause(e))

    def health(self) -> dict[str, Any]:
        """{"ok": true, "version": ...}; needs no token."""
        return self.run(calls.health())

    def nodes(self) -> list[dict[str, Any]]:
        """Rows of the server's nodes."""
        return self.run(calls.nodes())

    def top(self, *, limit: int = 200, ended: bool = False) -> MachineLoad:
        """What the newest `limit` sessions that have not ended (`ended`: those too) take of their machine."""
        from rethaw.sdk import top

        return self.run(top.call(limit, ended))

    def doctor(self) -> list[dict[str, Any]]:
        """Reports of the server's engines, after a guest went through each."""
        return self.run(calls.doctor())


class Blobs:
    """Agent code on the server."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def put(self, data: bytes) -> str:
        """Upload; returns the sha256 in hex that names it. Repeating it is harmless."""
        return self._client.run(calls.put_blob(data))

    def has(self, digest: str) -> bool:
        """Whether it is there already."""
        return self._client.run(calls.has_blob(digest))


class Sessions:
    """Sessions by id or by a unique prefix of one."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def _session(self, view: SessionView) -> Session[Any]:
        # Loaded here: lists do not need what it takes to look inside.
        from rethaw.sdk.session import Session

        return Session(self._client, view.id, view)

    def start(
        self,
        agent: AgentSpec,
        args: dict[str, Any] | None = None,
        *,
        key: str | None = None,
        queue: str | None = None,
        priority: int | None = None,
        delay: Duration | None = None,
        ttl: Duration | None = None,
        concurrency_key: str | None = None,
        tags: Sequence[str] = (),
    ) -> Session[Any]:
        """Start `agent`. With a `key` that is known the existing session comes back (KeyReused if it differs).

        `queue` and `concurrency_key`: whose limits it waits for. `priority`: higher ones first. `delay`: how long until it
        may start; `ttl`: how long from then until it must have started, or it fails. `tags`: to find it by."""
        how = starting(
            queue=queue, priority=priority, delay=delay, ttl=ttl, concurrency_key=concurrency_key, tags=tags
        )  # fmt: skip
        view = self._client.run(calls.start(agent, args or {}, key, how))
        return self._session(view)

    def get(self, session: str) -> Session[Any]:
        """Raises NotFound, AmbiguousId."""
        view = self._client.run(calls.get(session))
        return self._session(view)

    def list(
        self,
        *,
        state: str | Sequence[str] | None = None,
        agent: str | None = None,
        tag: str | Sequence[str] | None = None,
        queue: str | None = None,
        search: str | None = None,
        created_after: When | None = None,
        created_before: When | None = None,
        limit: int = 100,
    ) -> list[SessionView]:
        """Newest first, at most `limit`. `state`: one or several. `tag`: all of them. `search`: a text in the agent's name,
        the key, tags or arguments. Times: a datetime, "2026-01-31T09:00", or how long ago, like "2h"."""
        given = wanted(
            state=state, agent=agent, tag=tag, queue=queue, search=search, created_after=created_after,
            created_before=created_before,
        )  # fmt: skip
        out: list[SessionView] = []
        cursor: str | None = None
        while len(out) < limit:
            page = self._client.run(calls.list_sessions(given, min(limit - len(out), PAGE), cursor))
            out += page.sessions
            cursor = page.next
            if cursor is None or not page.sessions:
                break
        return out

    def page(
        self,
        *,
        state: str | Sequence[str] | None = None,
        agent: str | None = None,
        tag: str | Sequence[str] | None = None,
        queue: str | None = None,
        search: str | None = None,
        created_after: When | None = None,
        created_before: When | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page:
        """One page of `list`, at most 1000 sessions, and the cursor of the next."""
        given = wanted(
            state=state, agent=agent, tag=tag, queue=queue, search=search, created_after=created_after,
            created_before=created_before,
        )  # fmt: skip
        return self._client.run(calls.list_sessions(given, limit, cursor))

    def every(
        self,
        *,
        state: str | Sequence[str] | None = None,
        agent: str | None = None,
        tag: str | Sequence[str] | None = None,
        queue: str | None = None,
        search: str | None = None,
        created_after: When | None = None,
        created_before: When | None = None,
    ) -> Iterator[SessionView]:
        """All of `list`, fetched as you go on."""
        given = wanted(
            state=state, agent=agent, tag=tag, queue=queue, search=search, created_after=created_after,
            created_before=created_before,
        )  # fmt: skip
        cursor: str | None = None
        while True:
            page = self._client.run(calls.list_sessions(given, PAGE, cursor))
            yield from page.sessions
            cursor = page.next
            if cursor is None:
                return

    def detail(self, session: str) -> Detail:
        """The session and its numbers."""
        return self._client.run(calls.detail(session))

    def why(self, session: str) -> Why:
        """What it waits for, since when, what wakes it, where it would resume."""
        return self._client.run(calls.why(session))

    def send(self, session: str, payload: Any, *, idempotency_key: str | None = None) -> Message:
        """Put `payload` (JSON) into the inbox. A repeated key gives the first message."""
        return self._client.run(calls.send(session, calls.to_json(payload), idempotency_key))

    def send_json(self, session: str, text: str | bytes, *, idempotency_key: str | None = None) -> Message:
        """`send` of JSON text, kept byte for byte."""
        return self._client.run(calls.send(session, calls.checked_json(text), idempotency_key))

    def signal(self, session: str, name: str, payload: Any = None, *, idempotency_key: str | None = None) -> str:
        """Complete a wait for `name`, now or when it opens; returns the signal's id."""
        return self._client.run(calls.signal(session, name, calls.to_json(payload), idempotency_key))

    def signal_json(self, session: str, name: str, text: str | bytes, *, idempotency_key: str | None = None) -> str:
        """`signal` with JSON text, kept byte for byte."""
        return self._client.run(calls.signal(session, name, calls.checked_json(text), idempotency_key))

    def inbox(self, session: str) -> list[Message]:
        return self._client.run(calls.inbox(session))

    def outbox(self, session: str, *, after: int = 0, wait: Duration | None = None) -> list[Message]:
        """Published messages numbered above `after`. With `wait`: as soon as there is one, [] when there was none, or
        once the session has ended."""
        deadline = time.monotonic() + (optional_seconds(wait) or 0.0)
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                found = self._client.patient(calls.outbox(session, after, min(left, POLL_S)))
            except WaitTimeout:
                found = []
            if found or time.monotonic() >= deadline:
                return found
            if (self._client.patient(calls.get(session))).state.final:
                return self._client.patient(calls.outbox(session, after, 0.0))

    def events(
        self, session: str, *, after: int = 0, limit: int = 1000, types: Sequence[str] = (), all_lines: bool = False
    ) -> list[Event]:
        """One page of the log after seq `after`; `all_lines` has superseded events too."""
        return self._client.run(calls.events(session, after, limit, types, all_lines))

    def stream(
        self,
        session: str,
        *,
        after: int = 0,
        types: Sequence[str] = (),
        all_lines: bool = False,
        until_final: bool = True,
    ) -> Iterator[Event]:
        """Events after seq `after` as they come, each once, across lost connections and restarts of the server.

        Ends after the session's last event (`until_final`), else never.
        """
        client, last, patience = self._client, after, Patience(self._client.patience_s, self._client.on_gap)
        call = calls.follow(session, types, all_lines, until_final)
        while True:
            parser, fresh = Parser(), False
            try:
                with client.http.stream(**client.target.stream_request(call, last)) as response:
                    if response.status_code >= 400:
                        body = response.read()
                        raise calls.error_of(
                            response.status_code, body, url=client.url, token_source=client.target.source
                        )
                    patience.succeeded()
                    for chunk in response.iter_bytes():
                        for found in parser.feed(chunk):
                            event = calls.event(found.data)
                            if event.seq > last:
                                last, fresh = event.seq, True
                                yield event
                if until_final:
                    view = client.run(calls.get(session))
                    # A server that shuts down ends the stream as well: ask once more unless all was seen.
                    if view.state.final and (not fresh or last >= view.last_seq):
                        return
            except httpx2.HTTPError as e:
                if not isinstance(e, httpx2.ReadTimeout):
                    time.sleep(patience.pause(client.target.unavailable(e)))
            except Unavailable as e:
                time.sleep(patience.pause(e))

    def logs(self, session: str, *, stream: Literal["stdout", "stderr", "both"] = "stdout") -> bytes:
        """What the program has written so far, superseded output left out."""
        return self._client.run(calls.logs(session, stream))

    def outcome(self, session: str) -> Outcome:
        """Where it stands, at once."""
        return self._client.run(calls.result(session, 0))

    def result(self, session: str, *, timeout: Duration | None = None) -> Any:
        """What the agent returned, once it did. Raises WaitTimeout, and SessionFailed when it ended otherwise."""
        limit = optional_seconds(timeout)
        deadline = None if limit is None else time.monotonic() + limit
        while True:
            left = POLL_S if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                found = self._client.patient(calls.result(session, min(left, POLL_S)))
            except WaitTimeout:
                found = None
            if found is not None and State(found.state).final:
                if found.state == State.COMPLETED:
                    return found.result
                raise failure(self._client.patient(calls.get(session)))
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeout(
                    f"session {session} has no result after {limit:g} s", remedy="wait longer, or see `rethaw why`"
                )

    def exchanges(self, session: str) -> list[dict[str, Any]]:
        return self._client.run(calls.exchanges(session))

    def suspend(self, session: str) -> SessionView:
        """Snapshot and release; stays so until `resume`."""
        return self._client.run(calls.action(session, "suspend", {}))

    def resume(self, session: str) -> SessionView:
        return self._client.run(calls.action(session, "resume", {}))

    def cancel(self, session: str, *, now: bool = False) -> SessionView:
        """SIGTERM and a grace period, or `now`."""
        return self._client.run(calls.action(session, "cancel", {"now": now}))

    def crash(self, session: str, what: Literal["sandbox", "node", "db"] = "sandbox") -> SessionView:
        """Kill it, to see it come back."""
        return self._client.run(calls.action(session, "crash", {"what": what}))

    def fork(
        self, session: str, *, at: int | str | None = None, n: int = 1, redeliver: bool = False
    ) -> list[Session[Any]]:
        """`n` new sessions that begin where `session` was at `at`: a seq of its log, a snapshot's id, or None for its
        newest snapshot (of a running session one is taken). Messages and signals that came after that are delivered to
        them only with `redeliver`. Raises InvalidInput, NotFound, Conflict."""
        views = self._client.run(calls.fork(session, at, n, redeliver))
        return [self._session(view) for view in views]

    def rewind(self, session: str, *, to: int | str, redeliver: bool = False) -> SessionView:
        """Take the session back to `to` (a seq or a snapshot's id), also one that has ended. Its log keeps both lines."""
        return self._client.run(calls.rewind(session, to, redeliver))

    def retry(self, session: str, *, memory: str | int | None = None) -> SessionView:
        """Begin the next attempt now, of a session that failed, was cancelled or waits for the time of a retry. `memory`:
        what it may use from then on, like "1GiB"."""
        return self._client.run(calls.retry(session, memory))

    def budget(self, session: str, limits: Budget, *, add: Sequence[str] = ()) -> SessionView:
        """Give the session other limits; those named in `add` are added to what it has. One that its budget has stopped
        goes on where it was."""
        return self._client.run(calls.budget(session, limits.spec(), add_names(add)))

    def upgrade(
        self,
        session: str,
        to: int | Agent[..., Any] | Path | str | None = None,
        *,
        from_seq: int | None = None,
        files: Files = "keep",
    ) -> Upgraded:
        """Let the session go on with another version of its agent: `to`, by its number or as an agent (or FILE.py[::NAME]);
        None takes what a start by name does. The new code boots with the context of the old one (`ctx.history()`,
        `ctx.fresh`), its inbox, its open waits, and unless `files="fresh"` the files of the last snapshot. `from_seq`: the
        log up to this event is its context, what came after is left. Also one that has ended.

        Answers once the new attempt is on its way. Raises NotFound, InvalidInput, Conflict."""
        from rethaw.sdk import versions

        spec = None
        if to is not None and not isinstance(to, int):
            spec = versions.found(to).uploaded(self._client)
        number = to if isinstance(to, int) else None
        return self._client.run(versions.upgrade(session, number, spec, from_seq, files))

    def snapshot(self, session: str) -> SnapshotInfo:
        """Take one now."""
        return self._client.run(calls.snapshot(session))

    def snapshots(self, session: str) -> list[SnapshotInfo]:
        return self._client.run(calls.snapshots(session))

    def delete(self, session: str, *, force: bool = False) -> dict[str, Any]:
        """Erase it whole; leaves a tombstone. Raises Conflict while it runs, unless `force`, which cancels first."""
        return self._client.run(calls.delete(session, force))
