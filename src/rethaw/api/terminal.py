"""The terminal of a session's main program, over a WebSocket that outlives the lives of the session.

The client begins with {"rows", "cols", "type"} as text: the size of its terminal, or nulls, and whether it may type. Then
binary messages are what is typed; for a program with a piped stdin each begins with 8 bytes, the offset of its first byte.
As text: {"type": "resize", "rows", "cols"} and, of a pipe, {"type": "end", "offset"}.

The server says {"type": "screen", ...}, after which everything that was shown before is void, then what the program wrote
as binary messages (a byte for the stream, 1 stdout or 2 stderr, 8 bytes of offset, the bytes) and {"type": "size", "rows",
"cols"} where its terminal changed, up to {"type": "shown"}; then what it writes, as it comes, before it is in the log. A
crash that takes some of it back begins with another "screen". {"type": "state", "state", "reason"}: the session's.
{"type": "input", "at"}: a life has begun whose program was given so much of its stdin. The last words are {"type": "exit",
"state", "code", "reason", "detail"} or {"type": "error", "error": {...}}.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, TypeVar

from fastapi import APIRouter, WebSocket
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.websockets import WebSocketDisconnect

from rethaw.api import models, programs, stream
from rethaw.api.errors import answer, body, unforeseen
from rethaw.api.rooms import Rooms
from rethaw.model.enums import Desired, EventType, Reason, State
from rethaw.model.errors import AmbiguousId, Conflict, Fenced, InvalidInput, NotFound, RethawError, Unavailable
from rethaw.model.terminal import Came, Left, Missed, Seat, Shown
from rethaw.model.types import Event, SessionView

KEPT = 256 << 10  # bytes of output that a screen is drawn from
_STEP = 256  # events that are looked at for them, at first
_STREAMS = {"stdout": 1, "stderr": 2}
_POSITION = 8
_WAKE_S = 0.5
T = TypeVar("T", bound=BaseModel)


class Look(BaseModel):
    """What a client begins with."""

    model_config = ConfigDict(extra="forbid")
    rows: int | None = Field(default=None, ge=1, le=10_000)
    cols: int | None = Field(default=None, ge=1, le=10_000)
    type: bool = True


class Resize(BaseModel):
    rows: int = Field(ge=1, le=10_000)
    cols: int = Field(ge=1, le=10_000)


def router(rooms: Rooms) -> APIRouter:
    api = APIRouter(prefix="/v1", responses=models.ERRORS, tags=["sessions"])

    @api.websocket("/sessions/{session}/terminal")
    async def terminal(socket: WebSocket, session: str) -> None:
        await _attend(rooms, socket, session)

    _ = terminal
    return api


async def _attend(rooms: Rooms, socket: WebSocket, session: str) -> None:
    try:
        ident = await rooms.control.resolve(session)
        if rooms.terminals is None:
            raise Unavailable("this server runs no sandboxes", remedy="ask the node that the session is on")
    except (NotFound, AmbiguousId, Unavailable) as error:
        await socket.send_denial_response(answer(error))
        return
    await socket.accept()
    seat = rooms.terminals.seat(ident)
    try:
        look = _read(Look, await socket.receive_text())
        agent = (await rooms.control.session(ident)).agent
        view = View(rooms, socket, ident, seat, terminal=agent.terminal is not None)
        if look.rows is not None and look.cols is not None:
            seat.resize(look.rows, look.cols)
        await _both(view.down(), view.up(typing=look.type))
    except WebSocketDisconnect:
        pass
    except RethawError as error:
        await programs.say_error(socket, body(error.code, error.message, error.remedy, error.details))
    except Exception as error:
        await programs.say_error(socket, json.loads(bytes(unforeseen("a terminal", error).body)))
    finally:
        seat.close()


async def _both(*sides: Any) -> None:
    """Until one of them is over."""
    tasks = [asyncio.ensure_future(side) for side in sides]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, WebSocketDisconnect):
            raise result


class View:
    """One client's connection."""

    def __init__(self, rooms: Rooms, socket: WebSocket, session: str, seat: Seat, *, terminal: bool) -> None:
        self._rooms = rooms
        self._socket = socket
        self._session = session
        self._seat = seat
        self._terminal = terminal
        self._line = 0
        self._attempt = 0
        self._next: dict[str, int] = {}
        self._waking: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ to the client

    async def down(self) -> None:
        while not await self._live(await self._screen()):
            pass
        view = await self._rooms.control.session(self._session)
        end = {"state": view.state, "code": view.exit_code, "reason": view.reason, "detail": view.detail}
        await self._socket.send_json({"type": "exit", **end})
        await self._socket.close()

    async def _screen(self) -> int:
        """All that a screen is drawn from; the seq after which news follow."""
        control, log = self._rooms.control, self._rooms.log
        while True:
            after = await log.last_seq(self._session)
            view = await control.session(self._session)
            outputs, sizes = await self._tail(view, after)
            if (await control.session(self._session)).line == view.line:
                break
        self._line, self._attempt = view.line, view.attempt
        start = outputs[0][0] if outputs else 0
        self._next = {"stdout": start}
        first = [size for size in sizes if size[0] <= start]
        spec = view.agent.terminal
        rows, cols = first[-1][1:] if first else (spec.rows, spec.cols) if spec is not None else (None, None)
        await self._socket.send_json({
            "type": "screen", "session": view.id, "terminal": self._terminal, "state": view.state, "reason": view.reason,
            "line": view.line, "attempt": view.attempt, "rows": rows, "cols": cols,
        })  # fmt: skip
        changes = [size for size in sizes if size[0] > start]
        for offset, data in outputs:
            at = offset
            while changes and changes[0][0] <= offset + len(data):
                where, rows, cols = changes.pop(0)
                await self._take("stdout", at, data[at - offset : where - offset])
                at = max(at, where)
                await self._socket.send_json({"type": "size", "rows": rows, "cols": cols})
            await self._take("stdout", at, data[at - offset :])
        for _, rows, cols in changes:
            await self._socket.send_json({"type": "size", "rows": rows, "cols": cols})
        await self._socket.send_json({"type": "shown"})
        return after

    async def _tail(self, view: SessionView, upto: int) -> tuple[list[tuple[int, bytes]], list[tuple[int, int, int]]]:
        """The last KEPT bytes of output, or a little more, and every size that the terminal had, by offset."""
        if view.agent.terminal is None:
            return [], []
        log, step = self._rooms.log, _STEP
        while True:
            after = max(0, upto - step)
            found = await log.read(self._session, after, step + _STEP, [EventType.OUTPUT])
            mine = [event for event in found if event.attempt == view.attempt and event.body]
            if not after or sum(len(event.body or b"") for event in mine) >= KEPT or len(mine) < len(found):
                break
            step *= 4
        resized = await log.read(self._session, 0, 100_000, [EventType.TERMINAL_RESIZED])
        kept: list[tuple[int, bytes]] = []
        size = 0
        for event in reversed(mine):
            kept.append((int(event.data["offset"]), event.body or b""))
            size += len(event.body or b"")
            if size >= KEPT:
                break
        sizes = [
            (int(event.data["offset"]), int(event.data["rows"]), int(event.data["cols"]))
            for event in resized
            if event.attempt == view.attempt
        ]
        return kept[::-1], sorted(sizes, key=lambda one: one[0])

    async def _live(self, after: int) -> bool:
        """What happens from now on. Whether the session has ended; else a screen has to be drawn."""
        rooms = self._rooms
        events = stream.following(
            rooms.control, rooms.log, self._session, after, path_only=True, until_final=True,
            heartbeat_s=rooms.heartbeat_s,
        )  # fmt: skip
        async with contextlib.aclosing(events):
            logged: asyncio.Task[Event | None] | None = None
            seen: asyncio.Task[Any] | None = None
            try:
                while True:
                    logged = logged or asyncio.ensure_future(_next(events))
                    seen = seen or asyncio.ensure_future(self._seat.next())
                    await asyncio.wait({logged, seen}, return_when=asyncio.FIRST_COMPLETED)
                    if seen.done():
                        live, seen = seen.result(), None
                        if not await self._seen(live):
                            return False
                    if logged.done():
                        try:
                            event, logged = logged.result(), None
                        except StopAsyncIteration:
                            return True
                        if event is not None and not await self._logged(event):
                            return False
            finally:
                tasks = [task for task in (logged, seen) if task is not None]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _seen(self, live: Shown | Came | Left | Missed) -> bool:
        """False: the screen has to be drawn again."""
        if isinstance(live, Shown):
            if (live.line, live.attempt) == (self._line, self._attempt):
                await self._take(live.stream, live.offset, live.data)
        elif isinstance(live, Came):
            await self._socket.send_json({"type": "input", "at": live.taken})
        elif isinstance(live, Left) and live.typed:
            self._wake(Reason.IDLE)
        return not isinstance(live, Missed)

    async def _logged(self, event: Event) -> bool:
        if event.type == EventType.LINE_OPENED or event.attempt != self._attempt:
            view = await self._rooms.control.session(self._session)
            if (view.line, view.attempt) != (self._line, self._attempt):
                return False
        if event.type == EventType.OUTPUT:
            await self._take(str(event.data.get("stream")), int(event.data.get("offset", 0)), event.body or b"")
        elif event.type == EventType.SESSION_STATE:
            said = {"state": event.data.get("state"), "reason": event.data.get("reason")}
            await self._socket.send_json({"type": "state", **said})
        return True

    async def _take(self, name: str, offset: int, data: bytes) -> None:
        """Bytes from the log or from the node, whichever is first; what follows a gap comes again from the log."""
        known = self._next.get(name, 0)
        if offset <= known < offset + len(data):
            head = bytes([_STREAMS.get(name, 1)]) + known.to_bytes(_POSITION, "big")
            self._next[name] = offset + len(data)
            await self._socket.send_bytes(head + data[known - offset :])

    # ------------------------------------------------------------ from the client

    async def up(self, *, typing: bool) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if (data := message.get("bytes")) is not None:
                if typing:
                    await self._typed(data)
                continue
            text = message.get("text") or ""
            if '"end"' in text and typing:
                self._seat.end(_offset(text))
            else:
                size = _read(Resize, text, drop="type")
                self._seat.resize(size.rows, size.cols)

    async def _typed(self, data: bytes) -> None:
        """Given to the program, which is woken for it."""
        if self._terminal:
            giving = asyncio.ensure_future(self._seat.type(data))
        else:
            at = int.from_bytes(data[:_POSITION], "big")
            giving = asyncio.ensure_future(self._seat.give(at, data[_POSITION:]))
        try:
            while not (await asyncio.wait({giving}, timeout=_WAKE_S))[0]:
                self._wake_if_asleep()  # it was suspended while this waits for room
            giving.result()
        finally:
            giving.cancel()
        self._wake_if_asleep()

    def _wake_if_asleep(self) -> None:
        if not self._seat.awake:
            self._wake()

    def _wake(self, only: Reason | None = None) -> None:
        """A suspended session goes on; one that is awake, or on its way, is left alone."""
        if self._waking is None or self._waking.done():
            self._waking = asyncio.ensure_future(self._resume(only))

    async def _resume(self, only: Reason | None) -> None:
        control = self._rooms.control
        with contextlib.suppress(Conflict, NotFound, Fenced, Unavailable):
            view = await control.session(self._session)
            if view.state == State.SUSPENDED and (only is None or view.desired == Desired.RUNNING):
                await control.resume(self._session)


async def _next(events: Any) -> Event | None:
    return await anext(events)


def _read(kind: type[T], text: str, drop: str = "") -> T:
    try:
        if not drop:
            return kind.model_validate_json(text)
        said: Any = json.loads(text)
        return kind.model_validate({name: value for name, value in said.items() if name != drop})
    except (ValidationError, ValueError, AttributeError) as error:
        raise InvalidInput(f"{text[:80]!r} is no message of a terminal", remedy="see docs/terminals.md") from error


def _offset(text: str) -> int:
    try:
        return int(json.loads(text)["offset"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{text[:80]!r} is no message of a terminal", remedy="see docs/terminals.md") from error
