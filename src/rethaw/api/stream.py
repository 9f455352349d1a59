"""Following a session: events as server-sent events, output as bytes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, cast

from rethaw.api.errors import dump
from rethaw.control.control import Control
from rethaw.log.store import Log
from rethaw.model.enums import EventType, State
from rethaw.model.errors import InvalidInput, NotFound
from rethaw.model.types import Event

_IDLE_S = 1.0  # how often a quiet session is looked at, in case its end was not seen
_PAGE = 500


def event_json(event: Event) -> dict[str, Any]:
    """An event as it travels: `body` in base64 (URL alphabet), null for none."""
    return {
        "session": event.session,
        "seq": event.seq,
        "line": event.line,
        "attempt": event.attempt,
        "type": event.type.value,
        "data": event.data,
        "body": None if event.body is None else base64.urlsafe_b64encode(event.body).decode(),
        "key": event.key,
        "at": event.at.isoformat(),
        "superseded": event.superseded,
    }


def types_of(text: str | None) -> list[EventType] | None:
    """Types from "a,b". Raises InvalidInput naming the one that is none."""
    if not text:
        return None
    try:
        return [EventType(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InvalidInput(f"types: {error}", remedy=f"use some of {', '.join(EventType)}") from error


def is_final(event: Event) -> bool:
    return event.type == EventType.SESSION_STATE and State(event.data["state"]).final


async def following(
    control: Control, log: Log, session: str, after: int, *, path_only: bool, until_final: bool, heartbeat_s: float
) -> AsyncGenerator[Event | None]:
    """Events from `after` on, and None when nothing came for `heartbeat_s`. Ends when the session is erased, and with
    `until_final` once it has ended and all of its log was given."""
    events = log.follow(session, after, path_only=path_only)
    coming: asyncio.Task[Event] | None = None
    quiet, over = 0.0, False
    try:
        while True:
            if coming is None:
                coming = asyncio.create_task(_next(events))
            pause = min(_IDLE_S, heartbeat_s) if not over else 0.05
            await asyncio.wait({coming}, timeout=pause)
            if coming.done():
                event, coming, quiet = coming.result(), None, 0.0
                yield event
                if event.type == EventType.SESSION_STATE:  # a rewind leaves an end behind
                    over = until_final and is_final(event)
                continue
            if over:
                return  # the end was seen, and nothing follows it
            quiet += pause
            if until_final:
                over = (await control.session(session)).state.final
            if quiet >= heartbeat_s:
                quiet = 0.0
                yield None
    except NotFound:
        return
    finally:
        if coming is not None:
            coming.cancel()
            with contextlib.suppress(BaseException):
                await coming
        await cast("Any", events).aclose()


async def _next(events: AsyncIterator[Event]) -> Event:
    return await anext(events)


async def sse(
    control: Control,
    log: Log,
    session: str,
    after: int,
    *,
    types: Sequence[EventType] | None,
    all_lines: bool,
    until_final: bool,
    heartbeat_s: float,
) -> AsyncIterator[bytes]:
    """The same as text/event-stream, with a comment as heartbeat."""
    yield b": following\n\n"
    source = following(
        control, log, session, after, path_only=not all_lines, until_final=until_final, heartbeat_s=heartbeat_s
    )
    async with contextlib.aclosing(source):
        async for event in source:
            if event is None:
                yield b": still here\n\n"
            elif types is None or event.type in types:
                yield b"id: %d\nevent: %b\ndata: %b\n\n" % (
                    event.seq, event.type.value.encode(), dump(event_json(event))
                )  # fmt: skip


class Output:
    """Joins output events. Offsets count within an attempt; what a reader has already is cut off."""

    def __init__(self, stream: str) -> None:
        self._streams = ("stdout", "stderr") if stream == "both" else (stream,)
        self._next: dict[tuple[int, str], int] = {}

    def take(self, event: Event) -> bytes:
        name = str(event.data.get("stream"))
        if event.type != EventType.OUTPUT or event.body is None or name not in self._streams:
            return b""
        start = int(event.data.get("offset", 0))
        known = self._next.get((event.attempt, name), 0)
        end = start + len(event.body)
        if end <= known:
            return b""
        self._next[event.attempt, name] = end
        return event.body[max(0, known - start) :]


async def output(
    control: Control, log: Log, session: str, stream: str, *, follow: bool, heartbeat_s: float
) -> AsyncIterator[bytes]:
    """The bytes that the program wrote, of the path; with `follow` until the session ends."""
    joined = Output(stream)
    if not follow:
        after = 0
        while events := await log.read(session, after, _PAGE, [EventType.OUTPUT]):
            after = events[-1].seq
            yield b"".join(joined.take(event) for event in events)
        return
    source = following(control, log, session, 0, path_only=True, until_final=True, heartbeat_s=heartbeat_s)
    async with contextlib.aclosing(source):
        async for event in source:
            if event is not None and (data := joined.take(event)):
                yield data
