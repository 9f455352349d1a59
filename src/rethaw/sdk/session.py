"""What starting a session gives: the session as an object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from rethaw.model.durations import Duration
from rethaw.sdk import calls
from rethaw.sdk.inside import Inside

if TYPE_CHECKING:
    from pathlib import Path

    from rethaw.model.enums import State
    from rethaw.model.types import Event, SessionView, SnapshotInfo
    from rethaw.model.versions import Files, Upgraded
    from rethaw.sdk.agents import Agent
    from rethaw.sdk.client import Client
    from rethaw.sdk.limits import Budget
    from rethaw.sdk.types import Detail, Message, Why

R_co = TypeVar("R_co", covariant=True)


class Session(Inside, Generic[R_co]):
    """One session. `R` is the type of its result. `view` is as of the last `refresh` (or call that returned one)."""

    def __init__(self, client: Client, id: str, view: SessionView) -> None:
        self.client = client
        self.id = id
        self.view = view
        self.built: Callable[[Any], R_co] | None = None  # makes the agent's type of the result's JSON

    def __repr__(self) -> str:
        return f"<Session {self.id} of {self.view.agent.name}: {self.view.state.value}>"

    @property
    def state(self) -> State:
        """As of the last refresh."""
        return self.view.state

    def refresh(self) -> SessionView:
        self.view = self.client.run(calls.get(self.id))
        return self.view

    def result(self, timeout: Duration | None = None) -> R_co:
        """What the agent returned, once it did. Raises WaitTimeout, and SessionFailed when it ended otherwise."""
        result = self.client.sessions.result(self.id, timeout=timeout)
        return cast("R_co", result) if self.built is None else self.built(result)

    def send(self, payload: Any, *, idempotency_key: str | None = None) -> Message:
        return self.client.sessions.send(self.id, payload, idempotency_key=idempotency_key)

    def signal(self, name: str, payload: Any = None, *, idempotency_key: str | None = None) -> str:
        return self.client.sessions.signal(self.id, name, payload, idempotency_key=idempotency_key)

    def outbox(self, *, after: int = 0, wait: Duration | None = None) -> list[Message]:
        return self.client.sessions.outbox(self.id, after=after, wait=wait)

    def events(
        self, *, after: int = 0, follow: bool = False, types: Sequence[str] = (), all_lines: bool = False
    ) -> Iterator[Event]:
        """The log after seq `after`, page by page; with `follow` until the session's last event."""
        if follow:
            for event in self.client.sessions.stream(self.id, after=after, types=types, all_lines=all_lines):
                yield event
            return
        while page := self.client.sessions.events(self.id, after=after, types=types, all_lines=all_lines):
            for event in page:
                yield event
            after = page[-1].seq

    def stream(self, *, after: int = 0, types: Sequence[str] = (), all_lines: bool = False) -> Iterator[Event]:
        """Events after seq `after` as they come, each once, until the session's last one. Lost connections and restarts of the
        server are bridged; to go on later, in another process, pass the seq of the last event that was seen."""
        return self.client.sessions.stream(self.id, after=after, types=types, all_lines=all_lines)

    def logs(self, *, stream: Literal["stdout", "stderr", "both"] = "stdout") -> bytes:
        return self.client.sessions.logs(self.id, stream=stream)

    def detail(self) -> Detail:
        return self.client.sessions.detail(self.id)

    def why(self) -> Why:
        return self.client.sessions.why(self.id)

    def suspend(self) -> SessionView:
        self.view = self.client.sessions.suspend(self.id)
        return self.view

    def resume(self) -> SessionView:
        self.view = self.client.sessions.resume(self.id)
        return self.view

    def cancel(self, *, now: bool = False) -> SessionView:
        self.view = self.client.sessions.cancel(self.id, now=now)
        return self.view

    def crash(self, what: Literal["sandbox", "node", "db"] = "sandbox") -> SessionView:
        self.view = self.client.sessions.crash(self.id, what)
        return self.view

    def fork(self, *, at: int | str | None = None, n: int = 1, redeliver: bool = False) -> list[Session[R_co]]:
        """New sessions from here, or from `at`; see `Sessions.fork`."""
        forks = self.client.sessions.fork(self.id, at=at, n=n, redeliver=redeliver)
        for fork in forks:
            fork.built = self.built
        return cast("list[Session[R_co]]", forks)

    def rewind(self, *, to: int | str, redeliver: bool = False) -> SessionView:
        """Back to a seq or a snapshot; see `Sessions.rewind`."""
        self.view = self.client.sessions.rewind(self.id, to=to, redeliver=redeliver)
        return self.view

    def retry(self, *, memory: str | int | None = None) -> SessionView:
        """Begin the next attempt now; see `Sessions.retry`."""
        self.view = self.client.sessions.retry(self.id, memory=memory)
        return self.view

    def budget(self, limits: Budget, *, add: Sequence[str] = ()) -> SessionView:
        """Other limits; see `Sessions.budget`."""
        self.view = self.client.sessions.budget(self.id, limits, add=add)
        return self.view

    def upgrade(
        self,
        to: int | Agent[..., Any] | Path | str | None = None,
        *,
        from_seq: int | None = None,
        files: Files = "keep",
    ) -> Upgraded:
        """Go on with another version of the agent; see `Sessions.upgrade`."""
        done = self.client.sessions.upgrade(self.id, to, from_seq=from_seq, files=files)
        self.view = done.session
        return done

    def snapshot(self) -> SnapshotInfo:
        return self.client.sessions.snapshot(self.id)

    def snapshots(self) -> list[SnapshotInfo]:
        return self.client.sessions.snapshots(self.id)

    def delete(self, *, force: bool = False) -> dict[str, Any]:
        return self.client.sessions.delete(self.id, force=force)
