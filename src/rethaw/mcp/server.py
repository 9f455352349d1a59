"""The MCP server, and its two ways to the outside: stdin and stdout, or streamable HTTP behind a token."""

from __future__ import annotations

import asyncio
import hmac
import signal
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError
from mcp.server.transport_security import TransportSecuritySettings
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rethaw import __version__
from rethaw.mcp import shapes
from rethaw.mcp.connection import Connection
from rethaw.mcp.tools import Tools
from rethaw.model.errors import InvalidInput, NotFound, RethawError, Unauthorized

if TYPE_CHECKING:
    from rethaw.mcp.local import AgentsDir

PATH = "/mcp"
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_EVENTS = 200
_WHERE = "`sudo rethaw up --detach` on the Rethaw server's machine writes it for you"
_INSTRUCTIONS = """\
Rethaw runs AI agents as durable sessions: their context and their whole sandbox survive crashes, and they may wait for days at
no cost. Start one, then follow it with session_watch (pass `next` as `after`, and wait_s), session_outbox and session_result.
session_why tells what a session waits for; session_signal or session_send gives it that. session_fork tries something from
where a session stands, or stood, without touching it."""


def build(connection: Connection, agents: AgentsDir | None = None) -> MCPServer[Any]:
    """All tools and resources."""
    server: MCPServer[Any] = MCPServer(
        "rethaw", title="Rethaw", version=__version__, instructions=_INSTRUCTIONS, log_level="WARNING"
    )
    Tools(connection, agents).register(server)

    async def session(id: str) -> str:
        """A session's state and numbers."""
        try:
            async with connection.client() as client:
                detail = await client.sessions.detail(id)
        except RethawError as error:
            raise _resource_error(error) from error
        found = shapes.SessionDetail(session=shapes.SessionInfo.of(detail.view), stats=detail.stats)
        return found.model_dump_json(indent=1)

    async def events(id: str) -> str:
        """The newest events of a session, one JSON object a line."""
        try:
            async with connection.client() as client:
                last = (await client.sessions.get(id)).view.last_seq
                found = await client.sessions.events(id, after=max(0, last - _EVENTS))
        except RethawError as error:
            raise _resource_error(error) from error
        return "".join(shapes.EventInfo.of(event).model_dump_json() + "\n" for event in found)

    server.resource("rethaw://sessions/{id}", name="session", mime_type="application/json")(session)
    server.resource("rethaw://sessions/{id}/events", name="events", mime_type="application/x-ndjson")(events)
    return server


def _resource_error(error: RethawError) -> ResourceError:
    return (ResourceNotFoundError if isinstance(error, NotFound) else ResourceError)(str(error))


async def serve_stdio(agents: AgentsDir | None) -> None:
    """Until stdin ends."""
    connection = Connection()
    try:
        await build(connection, agents).run_stdio_async()
    finally:
        await connection.close()


# ---------------------------------------------------------------- HTTP


class Door:
    """ASGI middleware: no request passes without the token that the Rethaw server asks for."""

    def __init__(self, app: ASGIApp, token: Callable[[], str | None]) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._authorize({k.lower(): v for k, v in scope["headers"]}.get(b"authorization"))
            except RethawError as error:
                said: dict[str, Any] = {"code": error.code, "message": error.message, "remedy": error.remedy}
                headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else None
                await JSONResponse({"error": said}, error.status, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _authorize(self, header: bytes | None) -> None:
        if header is None:
            raise Unauthorized("the token is missing", remedy=f"send it as `Authorization: Bearer TOKEN`; {_WHERE}")
        scheme, _, given = header.partition(b" ")
        token = self._token()
        if not token or scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), token.encode()):
            raise Unauthorized("the token is wrong", remedy=_WHERE)


def security(host: str, port: int, allowed: Sequence[str]) -> TransportSecuritySettings:
    """Which Host and Origin headers are let in: the address itself, loopback's names if it is one, and `allowed`."""
    shown = f"[{host}]" if ":" in host else host
    hosts = [f"{name}:{port}" for name in (_LOOPBACK if shown in _LOOPBACK else (shown,))]
    for name in allowed:
        if not name or "/" in name or name != name.strip():
            raise InvalidInput(f"{name!r} is not a host", remedy="write it like mcp.example.org or 10.0.0.5:7421")
        hosts.append(name)
    origins = [f"{scheme}://{name}" for name in hosts for scheme in ("http", "https")]
    return TransportSecuritySettings(allowed_hosts=hosts, allowed_origins=origins)


def listen(address: str) -> socket.socket:
    """A socket at HOST:PORT. Raises InvalidInput when that is no address, or is taken."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise InvalidInput(f"{address!r} is not an address", remedy="write it like 127.0.0.1:7421")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family)
    except OSError as error:
        raise InvalidInput(
            f"{address} cannot be listened on: {error.strerror or error}", remedy="name another address"
        ) from error


async def serve_http(
    sock: socket.socket, agents: AgentsDir | None, allowed: Sequence[str], ready: Callable[[str], None]
) -> None:
    """Until SIGTERM or Ctrl-C. Raises Unauthorized when there is no token to demand."""
    connection = Connection()
    if not connection.token:
        raise Unauthorized(
            "there is no token to ask MCP clients for",
            remedy="start the server with `sudo rethaw up`, or set RETHAW_TOKEN and RETHAW_URL",
        )
    host, port = sock.getsockname()[:2]
    inner = build(connection, agents).streamable_http_app(
        streamable_http_path=PATH, stateless_http=True, transport_security=security(host, port, allowed)
    )
    config = uvicorn.Config(
        Door(inner, lambda: connection.token),
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    shown = f"[{host}]" if ":" in host else host
    ready(f"http://{shown}:{port}{PATH}")
    try:
        # Server.serve would end this process by the signal that it was sent.
        await server._serve(sockets=[sock])  # pyright: ignore[reportPrivateUsage]
    finally:
        await connection.close()
