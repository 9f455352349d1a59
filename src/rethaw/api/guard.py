"""What every request passes first: the token, the size limit, and the last catch of what nobody foresaw."""

from __future__ import annotations

import hmac
import logging
from urllib.parse import unquote

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from rethaw.api.errors import answer, unforeseen
from rethaw.model.errors import RethawError, TooLarge, Unauthorized
from rethaw.model.types import MESSAGE_LIMIT, MIB

log = logging.getLogger("rethaw.api")

BLOB_LIMIT = 512 * MIB
START_LIMIT = 16 * MIB
EXPORT_LIMIT = 64 * 1024 * MIB  # an exported snapshot; it goes to the disk as it comes
_PAYLOAD_LIMIT = 2 * MESSAGE_LIMIT  # the payload itself is measured exactly, later
_WHERE = "`sudo rethaw up --detach` on this server's machine writes it for you"  # also while it runs
_OPEN = ("/healthz", "/openapi.json")


def limit_of(path: str) -> int:
    """Bytes that a request's body may have."""
    if path == "/v1/blobs":
        return BLOB_LIMIT
    if path == "/v1/snapshots/import":
        return EXPORT_LIMIT
    return START_LIMIT if path == "/v1/sessions" else _PAYLOAD_LIMIT


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._socket(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = unquote(scope["path"])
        headers = {k.lower(): v for k, v in scope["headers"]}
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            self._authorize(path, headers.get(b"authorization"))
            await self._app(scope, self._limited(path, headers, receive), sending)
        except RethawError as error:
            if begun:
                log.warning("%s %s was cut off: %s", scope["method"], path, error)
                return
            extra = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else None
            await answer(error, extra)(scope, receive, send)
        except Exception as error:
            response = unforeseen(f"{scope['method']} {path}", error)
            if not begun:
                await response(scope, receive, send)

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {k.lower(): v for k, v in scope["headers"]}
        try:
            self._authorize(unquote(scope["path"]), headers.get(b"authorization"))
        except Unauthorized as error:
            await WebSocket(scope, receive, send).send_denial_response(answer(error, {"WWW-Authenticate": "Bearer"}))
            return
        await self._app(scope, receive, send)

    def _authorize(self, path: str, header: bytes | None) -> None:
        if path in _OPEN or path.startswith("/v1/callbacks/"):
            return
        if header is None:
            raise Unauthorized("the token is missing", remedy=f"send it as `Authorization: Bearer TOKEN`; {_WHERE}")
        scheme, _, given = header.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
            raise Unauthorized("the token is wrong", remedy=_WHERE)

    def _limited(self, path: str, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        limit, got = limit_of(path), 0
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            raise TooLarge(
                f"the body has {length.decode('latin-1')} bytes, at most {limit} are allowed",
                remedy="send a reference to it, or put it into a file",
                limit=limit,
            )

        async def receiving() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > limit:
                raise HTTPException(413, f"the body has more than {limit} bytes")
            return message

        return receiving
