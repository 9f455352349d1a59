"""Ports of this machine that lead to ports of a session."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from rethaw.model.errors import Conflict, RethawError
from rethaw.sdk import calls
from rethaw.sdk.sockets import address_of
from rethaw.sdk.transport import CONNECT_S, Target

_PIECE = 1 << 16
_AWAKE_S = 150.0  # a session that is thawed first


class Forward:
    """Listens on `host:local_port` (0: a free one) while it is open; each connection goes to `port` of the session's sandbox,
    as it is. What cannot be connected is reset, and `on_trouble` is told why, once until a connection works again.

        async with Forward(client.target, session.id, 3000) as forward:
            print(forward.local_port)
    """

    def __init__(
        self,
        target: Target,
        session: str,
        port: int,
        local_port: int | None = None,
        *,
        host: str = "127.0.0.1",
        on_trouble: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.port = port
        self.local_port = port if local_port is None else local_port
        self._target = target
        self._session = session
        self._host = host
        self._on_trouble = on_trouble
        self._told = ""
        self._server: asyncio.Server
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Forward:
        """Raises Conflict when the local port is taken."""
        try:
            self._server = await asyncio.start_server(self._taken, self._host, self.local_port)
        except OSError as error:
            raise Conflict(
                f"cannot listen on {self._host}:{self.local_port}: {error.strerror or error}",
                remedy=f"choose another one: {self.port}:LOCALPORT, 0 takes a free one",
            ) from error
        self.local_port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        whole = False
        try:
            whole = await self._serve(reader, writer)
        except RethawError as error:
            self._tell(str(error))
        except (OSError, ConnectionClosed):
            pass  # one of both sides is gone
        except asyncio.CancelledError:
            return  # asyncio would complain of it
        finally:
            self._tasks.discard(task)
            if not whole:
                _reset(writer)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether both directions came to their end."""
        address, settings = address_of(self._target, calls.path("sessions", self._session, "ports", str(self.port)))
        try:
            connecting = connect(address, open_timeout=CONNECT_S + _AWAKE_S, max_size=None, **settings)
            async with connecting as inside:
                self._told = ""
                return await _join(reader, writer, inside, self._error)
        except InvalidStatus as error:
            raise self._error(error.response.status_code, bytes(error.response.body or b"")) from error
        except (InvalidHandshake, TimeoutError, ConnectionRefusedError) as error:
            raise self._target.nobody(str(error)) from error

    def _error(self, status: int, body: bytes) -> RethawError:
        return calls.error_of(status, body, url=self._target.url, token_source=self._target.source)

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._on_trouble(text)


async def _join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    inside: ClientConnection,
    error_of: Callable[[int, bytes], RethawError],
) -> bool:
    up, down = asyncio.create_task(_up(reader, inside)), asyncio.create_task(_down(writer, inside, error_of))
    try:
        await asyncio.wait({up, down}, return_when=asyncio.FIRST_EXCEPTION)
        for task in (down, up):
            if task.done():
                task.result()
        return True
    finally:
        for task in (up, down):
            task.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


async def _up(reader: asyncio.StreamReader, inside: ClientConnection) -> None:
    while data := await reader.read(_PIECE):
        await inside.send(data)
    await inside.send('{"type":"end"}')


async def _down(
    writer: asyncio.StreamWriter, inside: ClientConnection, error_of: Callable[[int, bytes], RethawError]
) -> None:
    while True:
        message = await inside.recv()
        if isinstance(message, bytes):
            writer.write(message)
            await writer.drain()
            continue
        said: dict[str, Any] = json.loads(message)
        if said.get("type") == "error":
            raise error_of(500, message.encode())
        if said.get("type") == "end":
            with contextlib.suppress(OSError, RuntimeError):
                writer.write_eof()
            return


def _reset(writer: asyncio.StreamWriter) -> None:
    """Its client must not take what it got for the whole."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
