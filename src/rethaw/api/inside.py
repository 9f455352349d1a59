"""Routes into running sessions: a TCP connection to a port, a program beside the agent, signed links.

A connection to a port is a WebSocket whose binary messages are its bytes; {"type": "end"} as text says that one direction
has ended. The server's last words may be {"type": "error", "error": {...}}: it was reset.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeVar

from fastapi import APIRouter, WebSocket
from pydantic import BaseModel
from starlette.websockets import WebSocketDisconnect

from rethaw.api import models, programs
from rethaw.api.errors import answer, body
from rethaw.api.rooms import Rooms
from rethaw.model.dialing import Connection, Dialing, ExecRequest
from rethaw.model.errors import ChannelBroken, InvalidInput, RethawError, Unavailable
from rethaw.model.looking import Shell

T = TypeVar("T")
AWAKE_S = 120.0  # for a session that is thawed first, or starts


class LinkBody(BaseModel):
    port: int
    expires_s: float = 3600.0


class Link(BaseModel):
    """`url` works for everybody until `expires_at`."""

    url: str
    expires_at: datetime


def router(rooms: Rooms) -> APIRouter:
    api = APIRouter(prefix="/v1/sessions", responses=models.ERRORS, tags=["sessions"])

    @api.post("/{session}/links")
    async def link(session: str, body: LinkBody) -> Link:
        """An address of a port for whoever has it, until it expires."""
        ident = await rooms.control.resolve(session)
        if rooms.links is None:
            raise Unavailable("this server makes no links")
        url, until = rooms.links.make(ident, port_of(str(body.port)), body.expires_s)
        return Link(url=url, expires_at=until)

    @api.websocket("/{session}/ports/{port}")
    async def port(socket: WebSocket, session: str, port: str) -> None:
        try:
            number = port_of(port)
            connection = await to_port(rooms, await rooms.control.resolve(session), number)
        except RethawError as error:
            await socket.send_denial_response(answer(error))
            return
        try:
            await socket.accept()
            await _join(socket, connection)
        except (WebSocketDisconnect, RuntimeError):
            return
        finally:
            connection.close()

    @api.websocket("/{session}/exec")
    async def exec_(socket: WebSocket, session: str) -> None:
        try:
            ident = await rooms.control.resolve(session)
            dialing_of(rooms)
        except RethawError as error:
            await socket.send_denial_response(answer(error))
            return
        await socket.accept()

        async def start() -> Shell:
            request = await programs.request(socket, ExecRequest, "docs/ports.md")
            check_exec(request)
            return await connect(rooms, ident, lambda dialing: dialing.exec(ident, request), once=True)

        await programs.serve(socket, start, lambda shell: {"session": ident})

    _ = (link, port, exec_)
    return api


def port_of(text: str) -> int:
    """Raises InvalidInput."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536):
        raise InvalidInput(f"{text[:80]!r} is not a port", remedy="use 1 to 65535")
    return int(text)


def check_exec(request: ExecRequest) -> None:
    if not request.command or not request.command[0]:
        raise InvalidInput("the command is empty", remedy="name a program")
    words = (*request.command, *request.env, *request.env.values(), request.workdir or "")
    if any("\0" in word for word in words) or any("=" in name or not name for name in request.env):
        raise InvalidInput("the command or its environment has a NUL character or a name with =", remedy="leave it out")
    if sum(len(word.encode("utf-8", "replace")) for word in words) > 1 << 20:
        raise InvalidInput("the command and its environment are over 1 MiB", remedy="use a file or the input")


def dialing_of(rooms: Rooms) -> Dialing:
    if rooms.dialing is None:
        raise Unavailable("this server runs no sandboxes", remedy="ask the node that runs the session")
    return rooms.dialing


async def to_port(rooms: Rooms, session: str, port: int) -> Connection:
    """A connection to a port of `session`, which is woken if policy put it to sleep."""
    return await connect(rooms, session, lambda dialing: dialing.port(session, port))


async def connect(rooms: Rooms, session: str, make: Callable[[Dialing], Awaitable[T]], *, once: bool = False) -> T:
    """What `make` gives once the session runs. `once`: not tried again when it may have been done already. Raises
    SessionEnded, Conflict for what a person suspended, Unavailable."""
    dialing = dialing_of(rooms)
    loop = asyncio.get_running_loop()
    end, pause = loop.time() + AWAKE_S, 0.02
    while True:
        await rooms.control.awake(session, max(0.0, end - loop.time()))
        try:
            return await make(dialing)
        except Unavailable as error:
            # It ends or is put to sleep this very moment: what comes of that is seen at the next look.
            sent = error.details.get("sent")
            if sent is None or (sent and once) or loop.time() + pause > end:
                raise
        await asyncio.sleep(pause)
        pause = min(pause * 2, 1.0)


async def _join(socket: WebSocket, connection: Connection) -> None:
    """Until both directions have ended, or one side is gone."""
    ended = asyncio.Event()
    down, up = asyncio.ensure_future(_down(socket, connection)), asyncio.ensure_future(_up(socket, connection, ended))
    both = asyncio.ensure_future(_both(down, ended))
    try:
        await asyncio.wait({both, up}, return_when=asyncio.FIRST_COMPLETED)
        for task in (both, up):
            if task.done():
                task.result()
        await socket.close()
    except (ChannelBroken, InvalidInput) as error:
        await socket.send_json({"type": "error", **body(error.code, error.message, error.remedy)})
        await socket.close(1011)
    finally:
        for task in (both, down, up):
            task.cancel()
        await asyncio.gather(both, down, up, return_exceptions=True)


async def _both(down: asyncio.Future[None], ended: asyncio.Event) -> None:
    await down
    await ended.wait()


async def _down(socket: WebSocket, connection: Connection) -> None:
    while (data := await connection.read()) is not None:
        await socket.send_bytes(data)
    await socket.send_json({"type": "end"})


async def _up(socket: WebSocket, connection: Connection, end: asyncio.Event) -> None:
    """Until the client is gone."""
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect
        if (data := message.get("bytes")) is not None:
            await connection.write(data)
            continue
        try:
            ended = json.loads(message.get("text") or "")["type"] == "end"
        except (ValueError, KeyError, TypeError):
            ended = False
        if not ended:
            raise InvalidInput(f"{str(message.get('text'))[:80]!r} is no message of a connection")
        connection.end()
        end.set()
