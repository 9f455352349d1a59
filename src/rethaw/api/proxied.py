"""One HTTP request to a guest's port and its answer, streaming both ways.

Towards the guest: Host and Origin are those that it knows (localhost:PORT), X-Forwarded-* say the rest; hop-by-hop headers,
the API's token and the link's cookie stay here. From the guest: redirects and cookies are put below the prefix, and headers
that would speak for the whole origin are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import h11
from starlette.types import Receive, Scope, Send

from rethaw.api import inside
from rethaw.api.links import QUERY
from rethaw.api.rooms import Rooms
from rethaw.model.dialing import Connection
from rethaw.model.errors import ChannelBroken, InvalidInput, RethawError

if TYPE_CHECKING:
    from rethaw.api.doors import Door

HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te", "trailer",
     "transfer-encoding", "upgrade"}
)  # fmt: skip
# Each speaks for the origin, which is the server's and not the guest's.
ORIGIN_WIDE = frozenset(
    {"alt-svc", "clear-site-data", "nel", "report-to", "reporting-endpoints", "service-worker-allowed",
     "strict-transport-security", "public-key-pins", "origin-agent-cluster"}
)  # fmt: skip
_HEAD_LIMIT = 256 << 10


class BadAnswer(RethawError):
    """What the program answered is no HTTP."""

    code, status, exit_code = "bad_answer", 502, 1


async def serve(rooms: Rooms, door: Door, scope: Scope, receive: Receive, send: Send) -> None:
    """Raises RethawError before anything was sent, or in the middle of an answer that breaks."""
    connection = await inside.to_port(rooms, door.session, door.port)
    try:
        guest = h11.Connection(our_role=h11.CLIENT, max_incomplete_event_size=_HEAD_LIMIT)
        names = {k.lower() for k, _ in door.headers}
        framing: list[tuple[str, str]] = []
        if "content-length" not in names and "transfer-encoding" in names:
            framing.append(("Transfer-Encoding", "chunked"))
        try:
            request = h11.Request(
                method=scope["method"],
                target=door.target.encode("latin-1"),
                headers=[*to_guest(door), *framing, ("Connection", "close")],
            )
            head = guest.send(request)
        except h11.LocalProtocolError as error:
            raise InvalidInput(f"this request cannot be passed on: {error}", remedy="send plain HTTP/1.1") from error
        await connection.write(head or b"")
        up = asyncio.ensure_future(_up(guest, connection, receive))
        down = asyncio.ensure_future(_down(guest, connection, door, send))
        try:
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            if up.done() and not down.done() and up.exception() is not None:
                # It takes no more of the request; it may have answered before that.
                await asyncio.wait({down}, timeout=1.0)
            if down.done():
                down.result()
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
    except ChannelBroken as error:
        raise BadAnswer(f"the connection to port {door.port} broke: {error.message}") from error
    finally:
        connection.close()


async def _up(guest: h11.Connection, connection: Connection, receive: Receive) -> None:
    """The request's body, and then until the client leaves."""
    whole = False
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        if whole:
            continue
        if body := message.get("body", b""):
            await connection.write(guest.send(h11.Data(data=body)) or b"")
        if not message.get("more_body", False):
            whole = True
            with contextlib.suppress(h11.LocalProtocolError):  # shorter than it said: the client has left
                await connection.write(guest.send(h11.EndOfMessage()) or b"")


async def _down(guest: h11.Connection, connection: Connection, door: Door, send: Send) -> None:
    begun = False
    while True:
        try:
            event = guest.next_event()
        except h11.RemoteProtocolError as error:
            raise BadAnswer(f"port {door.port} does not answer in HTTP: {error}") from error
        if event is h11.NEED_DATA:
            data = await connection.read()
            guest.receive_data(data or b"")
        elif isinstance(event, h11.Response):
            headers = from_guest(
                door, [(n.decode("latin-1"), v.decode("latin-1")) for n, v in event.headers.raw_items()]
            )
            await send({"type": "http.response.start", "status": event.status_code, "headers": encoded(headers)})
            begun = True
        elif isinstance(event, h11.Data):
            await send({"type": "http.response.body", "body": bytes(event.data), "more_body": True})
        elif isinstance(event, h11.EndOfMessage):
            await send({"type": "http.response.body", "body": b""})
            return
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            why = "broke off its answer" if begun else "closed the connection without an answer"
            raise BadAnswer(f"port {door.port} {why}")


def encoded(headers: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]


# ---------------------------------------------------------------- headers


def to_guest(door: Door) -> list[tuple[str, str]]:
    """The client's headers as the guest gets them, but for framing."""
    named = {t.strip().lower() for n, v in door.headers if n.lower() == "connection" for t in v.split(",")}
    was = {n.lower(): v for n, v in door.headers}
    local = f"http://localhost:{door.port}"
    out: list[tuple[str, str]] = [("Host", f"localhost:{door.port}")]
    for name, value in door.headers:
        lower = name.lower()
        if lower in HOP or (lower in named and lower != "content-length") or lower in ("host", "expect"):
            continue
        if lower in ("x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-prefix", "forwarded"):
            continue
        if lower == "origin" and value in door.own:
            out.append((name, local))
        else:
            out.append((name, _referer(door, value, local) if lower == "referer" else value))
    before = was.get("x-forwarded-for")
    out += [
        ("X-Forwarded-For", f"{before}, {door.client}" if before else door.client),
        ("X-Forwarded-Host", was.get("x-forwarded-host") or was.get("host", "")),
        ("X-Forwarded-Proto", door.scheme),
        ("X-Forwarded-Prefix", was.get("x-forwarded-prefix", "").rstrip("/") + door.prefix),
    ]
    return out


def _referer(door: Door, value: str, local: str) -> str:
    for own in door.own:
        if value.startswith(own + door.prefix + "/"):
            return local + value[len(own) + len(door.prefix) :]
        if value.startswith(own + "/"):
            return local + "/"
    return value


def from_guest(door: Door, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The guest's headers as the client gets them."""
    named = {t.strip().lower() for n, v in headers if n.lower() == "connection" for t in v.split(",")}
    out: list[tuple[str, str]] = []
    for name, value in headers:
        lower = name.lower()
        if lower in HOP or lower in ORIGIN_WIDE or (lower in named and lower != "content-length"):
            continue
        said: str | None = value
        if lower in ("location", "content-location"):
            said = below(door, value)
        elif lower == "set-cookie":
            said = cookie(door, value)
        if said is not None:
            out.append((name, said))
    if not any(n.lower() == "referrer-policy" for n, _ in out):
        out.append(("Referrer-Policy", "same-origin"))
    if door.set_cookie is not None:
        out.append(("Set-Cookie", door.set_cookie))
    return out


def below(door: Door, address: str) -> str:
    """An address that a guest gives, as it is outside."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return address
    if parts.scheme or parts.netloc:
        ours = {f"{host}:{door.port}" for host in ("localhost", "127.0.0.1", "[::1]", "0.0.0.0")}
        ours |= {own.partition("://")[2] for own in door.own}
        if parts.scheme not in ("", "http", "https") or parts.netloc.lower() not in ours:
            return address
        address = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        address += f"#{parts.fragment}" if parts.fragment else ""
    if not address.startswith("/") or address.startswith(door.prefix + "/"):
        return address
    return door.prefix + address


def cookie(door: Door, value: str) -> str | None:
    """A Set-Cookie of the guest, for its own path only; None for one that it may not set."""
    first, *attributes = value.split(";")
    if first.partition("=")[0].strip() == QUERY:
        return None
    kept, path = [first], ""
    for attribute in attributes:
        name, _, content = attribute.strip().partition("=")
        if name.lower() == "path":
            path = content.strip()
        elif name.lower() != "domain":
            kept.append(attribute)
    if not path.startswith("/"):
        path = "/"
    if not (path + "/").startswith(door.prefix + "/"):
        path = door.prefix + path
    return ";".join([*kept, f" Path={path}"])
