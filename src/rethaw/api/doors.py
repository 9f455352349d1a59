"""`/sessions/ID/ports/PORT/...`: what a program in a sandbox serves on a port, over HTTP and WebSocket.

Who may come in: the API's token, which the guest never sees, or a signed link, which becomes a cookie for that path alone
(HttpOnly, so no script reads it; it opens nothing but that port). What the guest answers comes from the server's own
origin, so whatever of it would reach beyond its path is taken out: see `proxied`.
"""

from __future__ import annotations

import hmac
import logging
import re
from dataclasses import dataclass, field
from urllib.parse import quote

from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from rethaw.api import inside, proxied, proxied_socket
from rethaw.api.errors import unforeseen
from rethaw.api.links import QUERY, Links
from rethaw.api.rooms import Rooms
from rethaw.model.errors import Forbidden, RethawError, Unauthorized, Unavailable

log = logging.getLogger("rethaw.api")
_PATH = re.compile(rb"/sessions/([A-Za-z0-9_]{1,100})/ports/([1-9][0-9]{0,5})(/.*)?", re.DOTALL)
_STATUS = {"unavailable": 503, "wait_timeout": 504}


@dataclass
class Door:
    """One request that may come in. `prefix`: the part of the path that is ours, `target`: what the guest is asked for."""

    session: str
    port: int
    prefix: str
    target: str
    headers: list[tuple[str, str]]  # as the client sent them, without what was for us
    scheme: str
    client: str
    set_cookie: str | None = None
    own: tuple[str, ...] = field(default=())  # this server's origins, as the client knows them


class Doors:
    """ASGI middleware in front of everything else."""

    def __init__(self, app: ASGIApp, rooms: Rooms, token: str) -> None:
        self._app = app
        self._rooms = rooms
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
        found = _PATH.fullmatch(raw.partition(b"?")[0])
        if found is None:
            await self._app(scope, receive, send)
            return
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            text, number, rest = (part.decode("latin-1") for part in (found[1], found[2], found[3] or b""))
            door = await self._let_in(scope, text, inside.port_of(number), rest)
            if isinstance(door, Response):
                await _say(door, scope, receive, sending)
            elif scope["type"] == "http":
                await proxied.serve(self._rooms, door, scope, receive, sending)
            else:
                await proxied_socket.serve(self._rooms, door, scope, receive, sending)
        except RethawError as error:
            if begun:
                log.info("%s: cut off: %s", raw.decode("latin-1")[:200], error)
                return
            status = _STATUS.get(error.code, error.status)
            extra = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else {}
            answer = PlainTextResponse(f"rethaw: {error}\n", status, {**extra, "Cache-Control": "no-store"})
            await _say(answer, scope, receive, sending)
        except Exception as error:
            response = unforeseen(f"{scope['type']} {raw.decode('latin-1')[:200]}", error)
            if not begun:
                await _say(response, scope, receive, sending)

    async def _let_in(self, scope: Scope, text: str, port: int, rest: str) -> Door | Response:
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
        query, given = _without(scope["query_string"].decode("latin-1"))
        kept, cookies = _without_cookie(headers)
        prefix = f"/sessions/{text}/ports/{port}"
        links = self._rooms.links
        set_cookie: str | None = None
        authorization = next((v for k, v in headers if k.lower() == "authorization"), None)
        if authorization is not None and self._is_token(authorization):
            kept = [(k, v) for k, v in kept if k.lower() != "authorization"]
        elif links is None:
            raise Unavailable("this server makes no links")
        elif given is not None:
            left = links.left_s(text, port, given)
            secure = "; Secure" if self._secure(scope, headers) else ""
            set_cookie = f"{QUERY}={given}; Path={prefix}/; Max-Age={left}; HttpOnly; SameSite=Lax{secure}"
            if scope["type"] == "http" and scope["method"] == "GET" and _is_visit(headers):
                # The address that scripts and other sites see is without the signature.
                answer = RedirectResponse(prefix + (rest or "/") + query, 303)
                answer.headers["set-cookie"] = set_cookie
                answer.headers["cache-control"] = "no-store"
                answer.headers["referrer-policy"] = "no-referrer"
                return answer
        elif cookies:
            self._any(links, text, port, cookies)
        else:
            raise Forbidden(
                f"port {port} of session {text} is not open to you",
                remedy=f"rethaw link {text} {port} makes a link, or send the API's token as `Authorization: Bearer TOKEN`",
            )
        if not rest:
            return RedirectResponse(prefix + "/" + query, 307)
        host = next((v for k, v in headers if k.lower() == "host"), "")
        client = scope.get("client")
        return Door(
            session=await self._rooms.control.resolve(text),
            port=port,
            prefix=prefix,
            target=rest + query,
            headers=kept,
            scheme="https" if self._secure(scope, headers) else "http",
            client=client[0] if client else "",
            set_cookie=set_cookie,
            own=(f"http://{host}", f"https://{host}"),
        )

    @staticmethod
    def _any(links: Links, session: str, port: int, cookies: list[str]) -> None:
        """Scripts of other guests may have set cookies of this name for our path: those count for nothing."""
        for n, one in enumerate(cookies):
            try:
                links.left_s(session, port, one)
                return
            except Forbidden:
                if n == len(cookies) - 1:
                    raise

    def _is_token(self, header: str) -> bool:
        scheme, _, given = header.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token)

    @staticmethod
    def _secure(scope: Scope, headers: list[tuple[str, str]]) -> bool:
        forwarded = next((v for k, v in headers if k.lower() == "x-forwarded-proto"), None)
        scheme = forwarded.partition(",")[0].strip() if forwarded else scope.get("scheme", "http")
        return scheme in ("https", "wss")


def _without(query: str) -> tuple[str, str | None]:
    """The query (with its "?") byte for byte but for our parameter, and that."""
    given: str | None = None
    kept: list[str] = []
    for part in query.split("&") if query else []:
        name, _, value = part.partition("=")
        if name == QUERY:
            given = value
        else:
            kept.append(part)
    return ("?" + "&".join(kept) if kept else ""), given


def _without_cookie(headers: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[str]]:
    """The headers without our cookie, and what was given for it."""
    kept: list[tuple[str, str]] = []
    found: list[str] = []
    for name, value in headers:
        if name.lower() != "cookie":
            kept.append((name, value))
            continue
        parts: list[str] = []
        for part in value.split(";"):
            key, _, content = part.strip().partition("=")
            if key == QUERY:
                found.append(content)
            elif part.strip():
                parts.append(part.strip())
        if parts:
            kept.append((name, "; ".join(parts)))
    return kept, found


def _is_visit(headers: list[tuple[str, str]]) -> bool:
    """A browser that goes to an address, not a program that fetches one."""
    named = {k.lower(): v for k, v in headers}
    mode = named.get("sec-fetch-mode")
    return mode == "navigate" if mode is not None else "text/html" in named.get("accept", "")


async def _say(answer: Response, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(answer)
    else:
        await answer(scope, receive, send)


__all__ = ["Door", "Doors"]
