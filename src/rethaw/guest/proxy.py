"""The way out: an HTTP proxy on guestd's port, whose connections go to the node as tunnels.

    CONNECT host:port            bytes both ways, as they are
    GET http://host/path         one request to the origin and its answer; hop-by-hop headers go, the connection ends

The node decides what may be reached. A tunnel lives through every freeze of the same life; a restored guest finds its
connections reset, since the other end is not part of any snapshot.
"""

from __future__ import annotations

from rethaw.channel import frames
from rethaw.channel.lean import socket
from rethaw.guest import http1
from rethaw.guest import loop as loops
from rethaw.guest.http1 import BadRequest, Body, Request
from rethaw.guest.relay import Relay
from rethaw.guest.wire import Wire
from rethaw.model.errors import ChannelBroken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Optional, Set, Tuple

TUNNELS = 256
BODY_LIMIT = 1 << 50
REASON_LIMIT = 500
_OWN = ("127.0.0.1", "localhost", "::1")


def destination(text: str, default: Optional[int] = None) -> Tuple[str, int]:
    """Host and port of `host[:port]`. Raises BadRequest."""
    host, bracket, rest = text.partition("]") if text.startswith("[") else ("", "", "")
    if bracket:
        host, colon, port = host[1:], rest[:1], rest[1:]
        fits = colon in ("", ":")
    else:
        host, colon, port = text.partition(":")
        fits = True
    number = int(port) if port.isascii() and port.isdigit() and len(port) < 6 else (None if colon else default)
    if not host or not fits or not host.isascii() or number is None or not 0 < number < 65536:
        raise BadRequest(f"{text[:200]!r} is not HOST:PORT")
    if any(c in host for c in "%@/?#"):
        raise BadRequest(f"{host[:200]!r} is not a host")
    return host.lower(), number


class Origin:
    """A request in absolute form, as the origin gets it and as its answer goes back."""

    def __init__(self, request: Request, authority: str, path: str) -> None:
        self._body = Body(request, BODY_LIMIT)
        self._chunked = request.chunked
        self._in = bytearray()
        self._answer: Optional[bytearray] = bytearray()
        named = {t.strip().lower() for n, v in request.headers if n.lower() == "connection" for t in v.split(",")}
        drop = (http1.HOP_BY_HOP | named | {"proxy-authorization", "host"}) - {"content-length", "content-type"}
        lines = [f"{request.method} {path} HTTP/1.{0 if request.http10 else 1}", f"Host: {authority}"]
        lines += [f"{n}: {v}" for n, v in request.headers if n.lower() not in drop]
        if request.chunked:
            lines.append("Transfer-Encoding: chunked")
        lines.append("Connection: close")
        self.head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"

    def upward(self, data: bytes) -> bytes:
        """What of the agent's bytes goes to the origin: those of the body, no further request. Raises BadRequest."""
        if self._body.done:
            return b""
        self._in += data
        out = self._body.take(self._in)
        if self._chunked:
            out = (b"%x\r\n%b\r\n" % (len(out), out) if out else b"") + (b"0\r\n\r\n" if self._body.done else b"")
        return out

    def downward(self, data: bytes) -> bytes:
        """What of the origin's bytes goes to the agent: the answer, which says that the connection ends with it."""
        if self._answer is None:
            return data
        self._answer += data
        out = b""
        while True:
            end = self._answer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._answer) > http1.HEAD_LIMIT or bytes(self._answer[:7]) != b"HTTP/1."[: len(self._answer)]:
                    return out + self.rest()  # not for us to understand
                return out
            head = bytes(self._answer[:end])
            del self._answer[: end + 4]
            if head[8:10] == b" 1":  # an interim answer, the real one follows
                out += head + b"\r\n\r\n"
                continue
            return out + _closing(head) + self.rest()

    def rest(self) -> bytes:
        """What was held back; from now on nothing is."""
        held = bytes(self._answer or b"")
        self._answer = None
        return held

    @property
    def silent(self) -> bool:
        """Whether nothing of an answer has come."""
        return self._answer is not None and not self._answer


def _closing(head: bytes) -> bytes:
    lines = head.split(b"\r\n")
    pairs = [(line.partition(b":")[0].strip().lower(), line) for line in lines[1:]]
    named = {t.strip().lower() for n, line in pairs if n == b"connection" for t in line.partition(b":")[2].split(b",")}
    drop = {b"connection", b"keep-alive", b"proxy-connection"} | (named - {b"content-length", b"transfer-encoding"})
    kept = [lines[0], *(line for n, line in pairs if n not in drop), b"Connection: close"]
    return b"\r\n".join(kept) + b"\r\n\r\n"


class Proxy:
    """All tunnels of a sandbox."""

    def __init__(self, loop: loops.Loop, wire: Wire, new_id: Callable[[], str]) -> None:
        self.loop = loop
        self.wire = wire
        self.port = 0  # guestd's own
        self._new_id = new_id
        self.tunnels: Set[Tunnel] = set()

    def take(self, request: Request) -> Optional[Tunnel]:
        """The tunnel that `request` asks for; None when it is for guestd itself. Raises BadRequest."""
        origin: Optional[Origin] = None
        if request.method == "CONNECT":
            host, port = destination(request.target)
        elif request.target.startswith("/") or request.target == "*":
            return None
        else:
            scheme, separator, rest = request.target.partition("://")
            if not separator or scheme.lower() != "http":
                raise BadRequest(f"{request.target[:200]!r} is no http:// address; use CONNECT for everything else")
            at = min(i for i in (rest.find("/"), rest.find("?"), len(rest)) if i >= 0)
            authority, path = rest[:at], rest[at:]
            path = path if path.startswith("/") else "/" + path
            host, port = destination(authority, 80)
            if host in _OWN and port == self.port:  # a client that does not know NO_PROXY
                request.target = path
                return None
            origin = Origin(request, authority, path)
        if len(self.tunnels) >= TUNNELS:
            raise BadRequest(f"{TUNNELS} connections to the outside are open, which is the limit", 503)
        tunnel = Tunnel(self, {"host": host, "port": port, "id": self._new_id()}, origin, request.expect)
        if len(frames.dumps(tunnel.describe())) > frames.MAX_PAYLOAD:
            raise BadRequest("the host's name is too long")
        return tunnel

    def restored(self) -> None:
        """A new life: what the tunnels led to belongs to the former one."""
        for tunnel in list(self.tunnels):
            tunnel.lost()


class Tunnel(Relay):
    """One connection of the agent to the outside."""

    kind = "tunnel"

    def __init__(self, proxy: Proxy, meta: Dict[str, Any], origin: Optional[Origin], expect: bool) -> None:
        super().__init__(proxy.loop, meta)
        self._proxy = proxy
        self._origin = origin
        self._expect = expect
        self._connected = False

    def begin(self, sock: socket.socket, early: bytes) -> None:
        """Serve the agent's connection, which is ours from now on. `early`: what came after the request's head."""
        self._take(sock)
        self._proxy.tunnels.add(self)
        if self._origin is not None:
            self.out.write(self._origin.head)
        self._proxy.wire.open(self)
        if early or self._origin is not None:
            self._upward(early)
        self._watch()

    # ---- the channel's side

    def describe(self) -> Dict[str, Any]:
        return {**super().describe(), "head_received": self._connected}

    def on_head(self, head: Dict[str, Any]) -> None:
        if self._connected:
            raise ChannelBroken(f"stream {self.id}: a second head")
        status = int(head.get("status", 502))
        if status != 200:
            self._refuse(status, str(head.get("reason", "")))
            return
        self._connected = True
        if self._origin is None:
            self._send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        elif self._expect:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_data(self, data: bytes) -> None:
        if not self._connected:
            raise ChannelBroken(f"stream {self.id}: data before the head")
        self._send(data if self._origin is None else self._origin.downward(data))

    def on_end(self) -> None:
        if not self._connected:
            raise ChannelBroken(f"stream {self.id}: end before the head")
        if self._origin is not None and not self._ended:
            if self._origin.silent:
                self._refuse(502, f"{self.meta['host']}:{self.meta['port']} closed the connection without an answer")
                return
            self._out += self._origin.rest()
        super().on_end()

    # ---- the agent's side

    def _upward(self, data: bytes) -> None:
        if self._origin is not None:
            try:
                data = self._origin.upward(data)
            except BadRequest as error:
                self._refuse(error.status, error.message)
                return
        if data:
            self.say(data)

    def _refuse(self, status: int, why: str) -> None:
        """Answer in the other side's place, unless something was answered already. Clients of CONNECT show the status
        line at most, so the reason stands there as well."""
        self.wire.reset(self, "refused")
        if self._ended or (self._connected and (self._origin is None or not self._origin.silent)):
            self._close(reset=True)
            return
        reason = "".join(c if " " <= c <= "~" else " " for c in why)[:REASON_LIMIT]
        text = f"rethaw: {why}\n".encode("utf-8", "replace")
        self._draining = True
        self._out += (
            f"HTTP/1.1 {status} {reason}\r\ncontent-type: text/plain; charset=utf-8\r\n"
            f"content-length: {len(text)}\r\nconnection: close\r\n\r\n".encode("ascii")
            + text
        )
        if self._eof:
            self._flush()
            self._close()
            return
        self._flush()
        self._watch()

    def _over(self) -> None:
        self._proxy.tunnels.discard(self)
