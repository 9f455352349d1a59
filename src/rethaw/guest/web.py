"""Model traffic: an HTTP/1.1 server on loopback whose requests go to the node as exchanges.

    http://127.0.0.1:8484/<provider>/<rest>?<query>

The agent's connections end here, inside the snapshot, so a freeze never breaks them. Bodies pass through byte-exact
both ways; only the framing of the hop is ours.
"""

from __future__ import annotations

import errno
import struct
import time

from rethaw.channel import frames, lean
from rethaw.channel.lean import cast, socket
from rethaw.channel.mux import WINDOW
from rethaw.guest import http1
from rethaw.guest import loop as loops
from rethaw.guest.http1 import BadRequest, Body, Request
from rethaw.guest.proxy import Proxy
from rethaw.guest.wire import Stream, Wire, note
from rethaw.model.errors import ChannelBroken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Set, Tuple

BODY_LIMIT = 64 << 20  # EXCHANGE_LIMIT of rethaw.model.types, which the guest cannot import
UPLOAD_AHEAD = 256 << 10  # request bytes read before the node took them
CONNECTIONS = 512
LEFT_S, LEFT_MOST = 120.0, 64  # how long, and how many of them, exchanges are remembered whose agent left
READ_SIZE = 65536
_REASONS = {
    400: "Bad Request", 403: "Forbidden", 404: "Not Found", 413: "Content Too Large", 417: "Expectation Failed",
    431: "Request Header Fields Too Large", 501: "Not Implemented", 503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}  # fmt: skip
_HOP = http1.HOP_BY_HOP - {"expect"}


class Exchange(Stream):
    """One request and its response."""

    kind = "exchange"

    def __init__(self, connection: Connection, meta: Dict[str, Any]) -> None:
        super().__init__()
        self.connection = connection
        self.meta = meta
        self.exchange: Optional[str] = None
        self.head_received = False
        self.given = 0  # bytes of the answer's body written to the connection
        self.ended = False  # the whole answer is here; over once the agent's socket has taken it

    def describe(self) -> Dict[str, Any]:
        return {
            "kind": self.kind,
            "meta": self.meta,
            "exchange": self.exchange,
            "head_received": self.head_received,
            "received": self.inp.offset,
            "base": self.out.base,
        }

    def on_accept(self, exchange: str) -> None:
        self.exchange = exchange
        self.connection.server.left.pop(exchange, None)
        self._drop_body()

    def _drop_body(self) -> None:
        if self.exchange is not None and self.out.done:
            self.out.forget(self.out.end)

    def resync(self) -> None:
        self._drop_body()
        super().resync()
        self.connection.regrant()

    def on_head(self, head: Dict[str, Any]) -> None:
        if self.head_received:
            raise ChannelBroken(f"stream {self.id}: a second head")
        self.head_received = True
        self.connection.respond_head(head)

    def on_data(self, data: bytes) -> None:
        if not self.head_received:
            raise ChannelBroken(f"stream {self.id}: data before the head")
        self.connection.respond_data(data)

    def on_end(self) -> None:
        if not self.head_received:
            raise ChannelBroken(f"stream {self.id}: end before the head")
        if not self.ended:  # else the node says it again after a thaw
            self.ended = True
            self.connection.respond_end()

    def on_reset(self, why: str) -> None:
        if not self.ended:
            self.connection.abort()


class Server:
    """Listens, and opens an exchange for each request."""

    def __init__(self, loop: loops.Loop, wire: Wire, port: int, new_id: Callable[[], str]) -> None:
        self.loop = loop
        self.wire = wire
        self.new_id = new_id
        self.providers: Optional[Set[str]] = None
        self.connections: Set[Connection] = set()
        self.left: Dict[str, Tuple[int, float]] = {}
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._socket.listen(512)
        self._socket.setblocking(False)
        self.address: Tuple[str, int] = self._socket.getsockname()
        self.proxy = Proxy(loop, wire, new_id)
        self.proxy.port = self.address[1]
        self.listen()

    def listen(self) -> None:
        self.loop.watch(self._socket.fileno(), loops.READ, self._accept)

    def _accept(self, events: int) -> None:
        while len(self.connections) < CONNECTIONS:
            try:
                connection = lean.accept(self._socket)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.ECONNABORTED, errno.EMFILE, errno.ENFILE):
                    note(f"accept: {error}")
                return
            self.connections.add(Connection(self, connection))
        self.loop.mute(self._socket.fileno())  # the backlog holds the rest until a connection closes

    def closed(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if len(self.connections) == CONNECTIONS - 1:
            self.listen()

    def progress(self) -> None:
        """The channel moved on: uploads may."""
        for connection in list(self.connections):
            if connection.held:
                connection.pump()

    def leave(self, exchange: Exchange, taken: int) -> None:
        """The agent left before its answer was over. `taken`: bytes of the body that it surely read. The node may have
        ended the stream meanwhile, so it is told of the exchange; hellos say it once more, since what is said as a
        freeze begins is lost."""
        self.wire.reset(exchange, "the agent hung up", taken)
        name = exchange.exchange
        if name is not None:
            self.wire.control({"type": "left", "exchange": name, "taken": taken})
            self.left[name] = (taken, time.monotonic())
            if len(self.left) > LEFT_MOST:
                del self.left[next(iter(self.left))]

    def recently_left(self) -> List[List[Any]]:
        """[exchange, taken] for the hello."""
        now = time.monotonic()
        for exchange in [x for x, (_, at) in self.left.items() if now - at > LEFT_S]:
            del self.left[exchange]
        return [[exchange, taken] for exchange, (taken, _) in self.left.items()]

    def route(self, request: Request) -> Dict[str, Any]:
        """The exchange's meta. Raises BadRequest for what is not served."""
        if request.target == "*":
            raise BadRequest("OPTIONS * is not served here", 404)
        path, _, query = request.target.partition("?")
        provider, slash, rest = path[1:].partition("/")
        if not provider or not slash:
            raise BadRequest(f"nothing is served at {path[:200]}; use /<provider>/<path>, such as /openai/v1", 404)
        if self.providers is not None and provider not in self.providers:
            known = ", ".join(sorted(self.providers)) or "none"
            raise BadRequest(f"no provider is called {provider[:80]!r}; configured: {known}", 404)
        return {
            "provider": provider,
            "method": request.method,
            "path": "/" + rest,
            "query": query,
            "headers": request.forwarded(),
            "guest_id": self.new_id(),
        }


class Connection:
    """One connection of the agent: requests one after another."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.server = server
        self._socket = sock
        self._fd = sock.fileno()
        self._in = bytearray()
        self._out = bytearray()
        self._request: Optional[Request] = None
        self._body: Optional[Body] = None
        self._exchange: Optional[Exchange] = None
        self._data_at = 0  # wire.reads when the answer's newest bytes came
        # The exchange answered last, if leaving something of it unread means not to have read its last byte. (When the
        # end of a chunked body comes later than that byte, it may be all that a client leaves unread.)
        self._all_or_not: Optional[Exchange] = None
        self._responding = False  # a request is here and its response is not complete
        self._chunked = False
        self._left: Optional[int] = None  # response body bytes still to come by Content-Length
        self._no_body = False
        self._close_after = False
        self._draining = False  # an error was answered: what still comes is discarded until the agent closes
        self._owed = 0  # response bytes not yet granted anew
        self.held = False  # the upload waits for the channel
        self._open = True
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._watch()

    # ---- from the agent

    def _watch(self) -> None:
        if not self._open:
            return
        mask = loops.RDHUP if self._responding else 0
        if not self.held and len(self._in) < READ_SIZE:
            mask |= loops.READ
        if self._out:
            mask |= loops.WRITE
        self.server.loop.watch(self._fd, mask, self._event)

    def _event(self, events: int) -> None:
        if events & loops.WRITE:
            self._flush()
        if self._open and events & (loops.READ | loops.RDHUP | loops.GONE):
            self._receive()
        self._watch()

    def _receive(self) -> None:
        try:
            data = self._socket.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            self._hang_up(unread=True)
            return
        if not data:
            self._hang_up()
        elif not self._draining:
            self._in += data
            self.pump()

    def pump(self) -> None:
        """Make of the received bytes what can be made of them now."""
        try:
            while self._open and not self._draining and self._step():
                pass
        except BadRequest as error:
            self._refuse(error)
        self._watch()

    def _step(self) -> bool:
        if self._body is not None:
            return self._take_body(self._body)
        if self._responding or self._request is not None:
            return False
        request = http1.take_head(self._in)
        if request is None:
            return False
        self._begin(request)
        return True

    def _begin(self, request: Request) -> None:
        tunnel = self.server.proxy.take(request)
        if tunnel is not None:
            early = bytes(self._in)
            self._leave()
            tunnel.begin(self._socket, early)
            return
        meta = self.server.route(request)
        body = Body(request, BODY_LIMIT)
        exchange = Exchange(self, meta)
        if len(frames.dumps(exchange.describe())) > frames.MAX_PAYLOAD:
            raise BadRequest("the request's head is too long", 431)
        self._request, self._body, self._exchange, self._all_or_not = request, body, exchange, None
        self._responding = True
        self._close_after = request.close
        self.server.wire.open(exchange)
        if request.expect and not body.done and not self._in:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _take_body(self, body: Body) -> bool:
        exchange = self._exchange
        if exchange is not None and exchange.ended:
            exchange = None
        out = None if exchange is None else exchange.out
        self.held = out is not None and not body.done and out.end - out.sent > UPLOAD_AHEAD
        if self.held:
            return False
        data = body.take(self._in)
        if data and exchange is not None:
            exchange.say(data)
        if not body.done:
            return bool(data) and bool(self._in)
        self._body = None
        if exchange is not None:
            exchange.finish()
        if not self._responding:
            self._next()
        return True

    def _hang_up(self, unread: bool = False) -> None:
        """`unread`: the agent closed its end by a reset, as it happens when it had not read everything."""
        exchange = self._exchange
        if exchange is None and unread:
            exchange = self._all_or_not
        if exchange is not None:
            self.server.leave(exchange, 0 if unread else max(0, exchange.given - len(self._out)))
        elif not self._out:
            self._reset()
            return
        self._close()

    def _agent_left(self) -> bool:
        """Looked at before bytes of an answer are written: the kernel takes them for an agent that is gone, too."""
        if self._open and loops.ready(self._fd, loops.RDHUP):
            try:
                while self._socket.recv(READ_SIZE):
                    pass  # more requests, whose answers nobody would read
                self._hang_up()
            except BlockingIOError:
                pass
            except OSError:
                self._hang_up(unread=True)
        return not self._open

    def _refuse(self, error: BadRequest) -> None:
        if self._exchange is not None and self._exchange.ended:
            self.server.wire.forget(self._exchange)
            self._exchange = None
        if self._exchange is not None:
            started = self._exchange.head_received
            self.server.wire.reset(self._exchange, error.message)
            self._exchange = None
            if started:
                self.abort()
                return
        text = f"rethaw: {error.message}\n".encode("utf-8", "replace")
        self._draining = True
        self._responding = False
        self._body = None
        self._in.clear()
        self._send(
            f"HTTP/1.1 {error.status} {_REASONS[error.status]}\r\ncontent-type: text/plain; charset=utf-8\r\n"
            f"content-length: {len(text)}\r\nconnection: close\r\n\r\n".encode("ascii")
            + text
        )
        self._close_after = True
        self._finish_if_flushed()

    # ---- to the agent

    def respond_head(self, head: Dict[str, Any]) -> None:
        if self._agent_left():
            return
        request = self._request
        assert request is not None
        status = int(head.get("status", 502))
        reason = str(head.get("reason", ""))
        pairs = [(str(n), str(v)) for n, v in head.get("headers", [])]
        named = {t.strip().lower() for n, v in pairs if n.lower() == "connection" for t in v.split(",")}
        kept = [(n, v) for n, v in pairs if n.lower() not in _HOP and n.lower() not in named]
        length = next((v for n, v in kept if n.lower() == "content-length"), None)
        self._no_body = request.method == "HEAD" or status in (204, 304)
        self._left = int(length) if length is not None and length.isdigit() and not self._no_body else None
        self._chunked = self._left is None and not self._no_body and not request.http10
        if self._left is None and not self._no_body and request.http10:
            self._close_after = True
        lines = [f"HTTP/1.1 {status} {reason}"]
        lines += [f"{n}: {v}" for n, v in kept]
        if self._chunked:
            lines.append("transfer-encoding: chunked")
        if self._close_after:
            lines.append("connection: close")
        elif request.http10:
            lines.append("connection: keep-alive")
        text = "\r\n".join(line.replace("\r", " ").replace("\n", " ") for line in lines)
        self._send(text.encode("latin-1", "replace") + b"\r\n\r\n")
        self._watch()

    def respond_data(self, data: bytes) -> None:
        if self._agent_left():
            return
        cast(Exchange, self._exchange).given += len(data)
        self._data_at = self.server.wire.reads
        self._owed += len(data)
        if self._left is not None:
            if len(data) > self._left:  # more than promised would be read as the next response
                self.server.wire.reset(cast(Exchange, self._exchange), "the body is longer than its Content-Length")
                self.abort()
                return
            self._left -= len(data)
        if not self._no_body:
            self._send(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        self._grant()
        self._watch()

    def respond_end(self) -> None:
        if self._left:
            self.server.wire.forget(cast(Exchange, self._exchange))
            self.abort()  # shorter than promised: the agent has to see that
            return
        if not self._chunked or self._data_at == self.server.wire.reads:
            self._all_or_not = self._exchange
        if self._chunked:
            self._send(b"0\r\n\r\n")
        self._answered_if_flushed()

    def _answered_if_flushed(self) -> None:
        """Once the agent's socket has taken the whole answer."""
        exchange = self._exchange
        if exchange is None or not exchange.ended or self._out:
            return
        self._exchange = None
        self._owed = 0
        self.server.wire.forget(exchange)
        self._responding = False
        self._finish_if_flushed()
        if self._open and self._body is None:
            self._next()
            self.pump()
        self._watch()

    def _next(self) -> None:
        """Ready for the next request."""
        self._request = None
        if self._close_after:
            self._draining = True
            self._in.clear()
            self._finish_if_flushed()

    def abort(self) -> None:
        """Break the connection so that the agent cannot take what it got for the whole."""
        if self._open:
            self._exchange = None
            self._reset()

    def _reset(self) -> None:
        """Close by a reset. Where the agent has everything and closed its end, that spares it a minute in TIME_WAIT: in
        gVisor such a connection is 6 KB of the kernel's state, which every save writes and every restore reads again."""
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            self._close()

    def _send(self, data: bytes) -> None:
        if not self._open:
            return
        self._out += data
        self._flush()

    def _flush(self) -> None:
        while self._open and self._out:
            try:
                done = self._socket.send(self._out)
            except BlockingIOError:
                break
            except OSError:
                self._hang_up(unread=True)
                return
            del self._out[:done]
        self._grant()
        self._answered_if_flushed()
        self._finish_if_flushed()

    def _grant(self) -> None:
        exchange = self._exchange
        if exchange is None or len(self._out) > WINDOW // 2:
            return
        size = max(0, self._owed - len(self._out))
        if size:
            self._owed -= size
            exchange.took(size)

    def regrant(self) -> None:
        """The window begins anew: what came before a thaw is granted already."""
        self._owed = 0

    def _finish_if_flushed(self) -> None:
        """Half-close once an answer after which the connection ends is out; the agent then closes its side."""
        if self._open and self._close_after and not self._responding and not self._out and self._body is None:
            self._draining = True
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError:
                self._close()

    def _close(self) -> None:
        if self._open:
            self._leave()
            self._socket.close()

    def _leave(self) -> None:
        """No more of this server's business."""
        self._open = False
        self.held = False
        self._exchange = None
        self.server.loop.mute(self._fd)
        self.server.closed(self)
