"""One WebSocket to a guest's port, message by message."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.types import Receive, Scope, Send
from websockets.client import ClientProtocol
from websockets.datastructures import Headers
from websockets.exceptions import InvalidStatus, InvalidURI, ProtocolError
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri

from rethaw.api import inside, proxied
from rethaw.api.proxied import BadAnswer
from rethaw.api.rooms import Rooms
from rethaw.model.dialing import Connection
from rethaw.model.errors import ChannelBroken, InvalidInput

if TYPE_CHECKING:
    from rethaw.api.doors import Door

LIMIT = 16 << 20  # bytes of one message of the guest
_OURS = ("sec-websocket-key", "sec-websocket-version", "sec-websocket-extensions", "sec-websocket-protocol")
_AWAY = 1001
_BROKEN = 1011
_NO_STATUS = (1005, 1006)


async def serve(rooms: Rooms, door: Door, scope: Scope, receive: Receive, send: Send) -> None:
    """Raises RethawError before it was accepted."""
    connection = await inside.to_port(rooms, door.session, door.port)
    try:
        await receive()  # websocket.connect
        guest = _protocol(door, scope)
        try:
            early = await _shake(guest, connection, door, send)
        except ChannelBroken as error:
            raise BadAnswer(f"port {door.port} closed the connection: {error.message}") from error
        if early is None:
            return
        up = asyncio.ensure_future(_up(guest, connection, receive))
        down = asyncio.ensure_future(_down(guest, connection, send, early))
        try:
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            if up.done() and not down.done():
                await asyncio.wait({down}, timeout=1.0)  # the guest's own close
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
    finally:
        connection.close()


def _protocol(door: Door, scope: Scope) -> ClientProtocol:
    try:
        uri = parse_uri(f"ws://localhost:{door.port}{door.target}")
    except (InvalidURI, ValueError) as error:
        raise InvalidInput(f"{door.target[:200]!r} is no address of a WebSocket") from error
    subprotocols = list(scope.get("subprotocols") or []) or None
    return ClientProtocol(uri, subprotocols=subprotocols, max_size=LIMIT)


async def _shake(guest: ClientProtocol, connection: Connection, door: Door, send: Send) -> list[Frame] | None:
    """Open it on both sides; the frames that came with the answer. None: the guest refused, and the client knows."""
    request = guest.connect()
    request.headers = _headers(request.headers, door)
    guest.send_request(request)
    await _flush(guest, connection)
    early: list[Frame] = []
    response: Response | None = None
    while response is None:
        data = await connection.read()
        if data is None:
            guest.receive_eof()
        else:
            guest.receive_data(data)
        for event in guest.events_received():
            if isinstance(event, Response):
                response = event
            elif isinstance(event, Frame):
                early.append(event)
        if response is None and guest.handshake_exc is not None:
            failed = guest.handshake_exc
            if isinstance(failed, InvalidStatus):
                response = failed.response
                break
            raise BadAnswer(f"port {door.port} does not speak WebSocket: {failed}")
    headers = proxied.from_guest(door, list(response.headers.raw_items()))
    if guest.handshake_exc is not None or guest.state is not State.OPEN:
        kept = [(n, v) for n, v in headers if n.lower() != "content-length"]
        status = response.status_code if response.status_code != 101 else 502
        await send({"type": "websocket.http.response.start", "status": status, "headers": proxied.encoded(kept)})
        await send({"type": "websocket.http.response.body", "body": bytes(response.body or b"")})
        return None
    kept = [(n, v) for n, v in headers if not n.lower().startswith("sec-websocket-") and n.lower() != "date"]
    await send({"type": "websocket.accept", "subprotocol": guest.subprotocol, "headers": proxied.encoded(kept)})
    return early


def _headers(made: Headers, door: Door) -> Headers:
    """Those of the handshake, and the client's own."""
    out = Headers((n, v) for n, v in made.raw_items() if n.lower() not in ("host", "user-agent"))
    for name, value in proxied.to_guest(door):
        if name.lower() not in _OURS:
            out[name] = value
    return out


async def _flush(guest: ClientProtocol, connection: Connection) -> None:
    for data in guest.data_to_send():
        if data:
            await connection.write(data)
        else:
            connection.end()


async def _up(guest: ClientProtocol, connection: Connection, receive: Receive) -> None:
    while True:
        message = await receive()
        try:
            if message["type"] == "websocket.disconnect":
                code = message.get("code") or _AWAY
                guest.send_close(_AWAY if code in _NO_STATUS else code, (message.get("reason") or "")[:100])
            elif (data := message.get("bytes")) is not None:
                guest.send_binary(data)
            else:
                guest.send_text((message.get("text") or "").encode())
        except ProtocolError:  # the guest has closed it
            return
        await _flush(guest, connection)
        if message["type"] == "websocket.disconnect":
            return


async def _down(guest: ClientProtocol, connection: Connection, send: Send, early: list[Frame]) -> None:
    parts: list[bytes] = []
    size = 0
    kind = Opcode.BINARY
    events = list(early)
    while True:
        for frame in events:
            if frame.opcode is Opcode.CLOSE:
                await _flush(guest, connection)
                received = guest.close_rcvd
                code = received.code if received is not None and received.code not in _NO_STATUS else 1000
                reason = received.reason if received is not None else ""
                await send({"type": "websocket.close", "code": code, "reason": reason})
                return
            if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
                kind, parts, size = frame.opcode, [], 0
            elif frame.opcode is not Opcode.CONT:
                continue
            parts.append(bytes(frame.data))
            size += len(frame.data)
            if frame.fin:
                whole = b"".join(parts)
                parts = []
                if kind is Opcode.TEXT:
                    await send({"type": "websocket.send", "text": whole.decode("utf-8", "replace")})
                else:
                    await send({"type": "websocket.send", "bytes": whole})
        try:
            data = await connection.read()
        except ChannelBroken as error:
            await send({"type": "websocket.close", "code": _BROKEN, "reason": error.message[:100]})
            return
        if data is None:
            guest.receive_eof()
        else:
            guest.receive_data(data)
        events = [event for event in guest.events_received() if isinstance(event, Frame)]
        await _flush(guest, connection)
        if not events and (guest.parser_exc is not None or data is None):
            await send({"type": "websocket.close", "code": _BROKEN, "reason": "the connection inside broke"})
            return
