"""`session` once more with await."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from rethaw.model.durations import Duration
from rethaw.sdk import calls
from rethaw.sdk.inside import AsyncInside

if TYPE_CHECKING:
    from pathlib import Path

    from rethaw.model.enums import State
    from rethaw.model.types import Event, SessionView, SnapshotInfo
    from rethaw.model.versions import Files, Upgraded
    from rethaw.sdk.aclient import AsyncClient
    from rethaw.sdk.agents import Agent
    from rethaw.sdk.limits import Budget
    from rethaw.sdk.types import Detail, Message, Why

R_co = TypeVar("R_co", covariant=True)


class AsyncSession(AsyncInside, Generic[R_co]):
    """One session. `R` is the type of its result. `view` is as of the last `refresh` (or call that returned one)."""

    def __init__(self, client: AsyncClient, id: str, view: SessionView) -> None:
        self.client = client
        self.id = id
        self.view = view
        self.built: Callable[[Any], R_co] | None = None  # makes the agent's type of the result's JSON

    def __repr__(self) -> str:
        return f"<AsyncSession {self.id} of {self.view.agent.name}: {self.view.state.value}>"

    @property
    def state(self) -> State:
        """As of the last refresh."""
        return self.view.state

    async def refresh(self) -> SessionView:
        self.view = await self.client.run(calls.get(self.id))
        return self.view

    async def result(self, timeout: Duration | None = None) -> R_co:
        """What the agent returned, once it did. Raises WaitTimeout, and SessionFailed when it ended otherwise."""
        result = await self.client.sessions.result(self.id, timeout=timeout)
        return cast("R_co", result) if self.built is None else self.built(result)

    async def send(self, payload: Any, *, idempotency_key: str | None = None) -> Message:
        return await self.client.sessions.send(self.id, payload, idempotency_key=idempotency_key)

    async def signal(self, name: str, payload: Any = None, *, idempotency_key: str | None = None) -> str:
        return await self.client.sessions.signal(self.id, name, payload, idempotency_key=idempotency_key)

    async def outbox(self, *, after: int = 0, wait: Duration | None = None) -> list[Message]:
        return await self.client.sessions.outbox(self.id, after=after, wait=wait)

    async def events(
        self, *, after: int = 0, follow: bool = False, types: Sequence[str] = (), all_lines: bool = False
    ) -> AsyncIterator[Event]:
        """The log after seq `after`, page by page; with `follow` until the session's last event."""
        if follow:
            async for event in self.client.sessions.stream(self.id, after=after, types=types, all_lines=all_lines):
                yield event
            return
        while page := await self.client.sessions.events(self.id, after=after, types=types, all_lines=all_lines):
            for event in page:
                yield event
            after = page[-1].seq

    def stream(self, *, after: int = 0, types: Sequence[str] = (), all_lines: bool = False) -> AsyncIterator[Event]:
        """Events after seq `after` as they come, each once, until the session's last one; see `Session.stream`."""
        return self.client.sessions.stream(self.id, after=after, types=types, all_lines=all_lines)

    async def logs(self, *, stream: Literal["stdout", "stderr", "both"] = "stdout") -> bytes:
        return await self.client.sessions.logs(self.id, stream=stream)

    async def detail(self) -> Detail:
        return await self.client.sessions.detail(self.id)

    async def why(self) -> Why:
        return await self.client.sessions.why(self.id)

    async def suspend(self) -> SessionView:
        self.view = await self.client.sessions.suspend(self.id)
        return self.view

    async def resume(self) -> SessionView:
        self.view = await self.client.sessions.resume(self.id)
        return self.view

    async def cancel(self, *, now: bool = False) -> SessionView:
        self.view = await self.client.sessions.cancel(self.id, now=now)
        return self.view

    async def crash(self, what: Literal["sandbox", "node", "db"] = "sandbox") -> SessionView:
        self.view = await self.client.sessions.crash(self.id, what)
        return self.view

    async def fork(
        self, *, at: int | str | None = None, n: int = 1, redeliver: bool = False
    ) -> list[AsyncSession[R_co]]:
        """New sessions from here, or from `at`; see `Sessions.fork`."""
        forks = await self.client.sessions.fork(self.id, at=at, n=n, redeliver=redeliver)
        for fork in forks:
            fork.built = self.built
        return cast("list[AsyncSession[R_co]]", forks)

    async def rewind(self, *, to: int | str, redeliver: bool = False) -> SessionView:
        """Back to a seq or a snapshot; see `Sessions.rewind`."""
        self.view = await self.client.sessions.rewind(self.id, to=to, redeliver=redeliver)
        return self.view

    async def retry(self, *, memory: str | int | None = None) -> SessionView:
        """Begin the next attempt now; see `Sessions.retry`."""
        self.view = await self.client.sessions.retry(self.id, memory=memory)
        return self.view

    async def budget(self, limits: Budget, *, add: Sequence[str] = ()) -> SessionView:
        """Other limits; see `Sessions.budget`."""
        self.view = await self.client.sessions.budget(self.id, limits, add=add)
        return self.view

    async def upgrade(
        self,
        to: int | Agent[..., Any] | Path | str | None = None,
        *,
        from_seq: int | None = None,
        files: Files = "keep",
    ) -> Upgraded:
        """Go on with another version of the agent; see `AsyncSessions.upgrade`."""
        done = await self.client.sessions.upgrade(self.id, to, from_seq=from_seq, files=files)
        self.view = done.session
        return done

    async def snapshot(self) -> SnapshotInfo:
        return await self.client.sessions.snapshot(self.id)

    async def snapshots(self) -> list[SnapshotInfo]:
        return await self.client.sessions.snapshots(self.id)

    async def delete(self, *, force: bool = False) -> dict[str, Any]:
        return await self.client.sessions.delete(self.id, force=force)
