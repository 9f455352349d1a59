"""A program over a WebSocket, of a throwaway restore or of a running session.

The client says a request as text. The server says {"type": "ready", ...} and then what the program writes, as binary
messages whose first byte is 1 (stdout) or 2 (stderr); the client sends binary messages for its input, and as text {"type":
"resize", "columns", "rows"} or {"type": "end"}. The server's last words are {"type": "exit", "code", "why"} or {"type":
"error", "error": {...}}. Whoever hangs up ends it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi import WebSocket
from pydantic import BaseModel, ValidationError
from starlette.websockets import WebSocketDisconnect, WebSocketState

from rethaw.api.errors import body, unforeseen
from rethaw.model.errors import InvalidInput, RethawError
from rethaw.model.looking import Shell

M = TypeVar("M", bound=BaseModel)
_CHANNELS = {"stdout": b"\1", "stderr": b"\2"}


async def serve(
    socket: WebSocket, start: Callable[[], Awaitable[Shell]], about: Callable[[Shell], Mapping[str, Any]]
) -> None:
    """Of an accepted connection: `start` reads the request and runs the program; `about` is what `ready` says."""
    shell: Shell | None = None
    try:
        opening = asyncio.ensure_future(start())
        try:
            opened = await asyncio.shield(opening)
            shell = opened
        except asyncio.CancelledError:
            opening.add_done_callback(_abandon)
            raise
        await socket.send_json({"type": "ready", **about(opened)})
        await _talk(socket, opened)
    except WebSocketDisconnect:
        pass
    except RethawError as error:
        await say_error(socket, body(error.code, error.message, error.remedy, error.details))
    except Exception as error:
        response = unforeseen("a program", error)
        await say_error(socket, json.loads(bytes(response.body)))
    finally:
        if shell is not None:
            await asyncio.shield(shell.close())


def _abandon(opening: asyncio.Task[Shell]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        _closing.add(task := asyncio.ensure_future(opening.result().close()))
        task.add_done_callback(_closing.discard)


_closing: set[asyncio.Task[None]] = set()


async def request(socket: WebSocket, model: type[M], where: str) -> M:
    """What the client asks for. Raises InvalidInput naming what does not fit; `where` is described."""
    text = await socket.receive_text()
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "the request"
        raise InvalidInput(f"{place}: {problem['msg']}", remedy=f"see {where}") from error


async def _talk(socket: WebSocket, shell: Shell) -> None:
    """Until the program has ended or the client has left."""
    down = asyncio.ensure_future(_down(socket, shell))
    up = asyncio.ensure_future(_up(socket, shell))
    try:
        await asyncio.wait({down, up}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (down, up):
            task.cancel()
        results = await asyncio.gather(down, up, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, WebSocketDisconnect):
            raise result


async def _down(socket: WebSocket, shell: Shell) -> None:
    while (got := await shell.read()) is not None:
        await socket.send_bytes(_CHANNELS[got[0]] + got[1])
    code, why = await shell.wait()
    await socket.send_json({"type": "exit", "code": code, "why": why})
    await socket.close()


async def _up(socket: WebSocket, shell: Shell) -> None:
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        if (data := message.get("bytes")) is not None:
            await shell.write(data)
            continue
        try:
            said: dict[str, Any] = json.loads(message.get("text") or "")
            if said["type"] == "resize":
                shell.resize(int(said["columns"]), int(said["rows"]))
            elif said["type"] == "end":
                shell.end_input()
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{str(message.get('text'))[:80]!r} is no message of a shell") from error


async def say_error(socket: WebSocket, error: dict[str, Any]) -> None:
    """The last words on an accepted connection, if anybody still listens."""
    if socket.client_state is WebSocketState.CONNECTED and socket.application_state is WebSocketState.CONNECTED:
        try:
            await socket.send_json({"type": "error", **error})
            await socket.close()
        except (RuntimeError, WebSocketDisconnect):
            return
