"""HTTP/1.1 requests as bytes: heads and bodies, no sockets. Strict where two readers could disagree."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, Optional, Tuple

    Headers = List[Tuple[str, str]]

HEAD_LIMIT = 32768
HEADERS_LIMIT = 256
LINE_LIMIT = 1024  # chunk size lines
TRAILER_LIMIT = 8192

HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect")
)
SECRETS = frozenset(("authorization", "proxy-authorization", "x-api-key", "api-key", "x-goog-api-key"))

# Allowed bytes. No regular expressions: this module is loaded by PID 1 of every sandbox.
_HEX = b"0123456789abcdefABCDEF"
_TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TARGET = bytes(c for c in range(0x21, 0x100) if c != 0x7F)
_VALUE = b"\t " + _TARGET


class BadRequest(Exception):
    """What the agent sent is not a request we serve. One line, with the status that fits."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class Request:
    """The head of a request."""

    __slots__ = ("chunked", "close", "expect", "headers", "http10", "length", "method", "target")

    def __init__(self, method: str, target: str, http10: bool, headers: Headers) -> None:
        self.method = method
        self.target = target
        self.http10 = http10
        self.headers = headers
        self.length = 0
        self.chunked = False
        self.expect = False
        self.close = http10

    def forwarded(self) -> Headers:
        """The headers that go to the node: no hop-by-hop ones and no credentials, the others in order."""
        named = {t for n, v in self.headers if n.lower() == "connection" for t in _tokens(v)}
        drop = (HOP_BY_HOP | SECRETS | named) - {"content-length", "content-type", "host"}
        return [(n, v) for n, v in self.headers if n.lower() not in drop]


def take_head(buffer: bytearray) -> Optional[Request]:
    """Cut the next request's head from `buffer`; None until it is whole. Raises BadRequest."""
    while buffer.startswith(b"\r\n"):  # RFC 9112 2.2: a server should ignore an empty line before the request line
        del buffer[:2]
    if buffer.startswith(b"\n"):
        raise BadRequest("malformed request: it begins with a bare line feed")
    if buffer.startswith(b"PRI * HTTP/2"):
        raise BadRequest("HTTP/2 is not spoken here; use HTTP/1.1", 505)
    end = buffer.find(b"\r\n\r\n", 0, HEAD_LIMIT + 4)
    if end < 0:
        if len(buffer) > HEAD_LIMIT:
            raise BadRequest(f"the request's head is over {HEAD_LIMIT} bytes", 431)
        return None
    if end > HEAD_LIMIT:
        raise BadRequest(f"the request's head is over {HEAD_LIMIT} bytes", 431)
    lines = bytes(buffer[:end]).split(b"\r\n")
    del buffer[: end + 4]
    request = _request_line(lines[0])
    if len(lines) - 1 > HEADERS_LIMIT:
        raise BadRequest(f"the request has {len(lines) - 1} headers, at most {HEADERS_LIMIT} are allowed", 431)
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon or not _only(name, _TOKEN):
            raise BadRequest(f"malformed header line {_show(line)}")
        value = value.strip(b" \t")
        if value.translate(None, _VALUE):
            raise BadRequest(f"header {_show(name)} has a control character in its value")
        request.headers.append((name.decode("ascii"), value.decode("latin-1")))
    _framing(request)
    return request


def _request_line(line: bytes) -> Request:
    parts = line.split(b" ")
    if len(parts) != 3 or not _only(parts[0], _TOKEN) or not _only(parts[1], _TARGET):
        raise BadRequest(f"malformed request line {_show(line)}")
    if parts[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise BadRequest(f"{_show(parts[2])} is not spoken here; use HTTP/1.1", 505)
    return Request(parts[0].decode("ascii"), parts[1].decode("latin-1"), parts[2] == b"HTTP/1.0", [])


def _framing(request: Request) -> None:
    lengths = {
        t for n, v in request.headers if n.lower() == "content-length" for t in (x.strip() for x in v.split(","))
    }
    codings = [v.lower().strip() for n, v in request.headers if n.lower() == "transfer-encoding"]
    hosts = sum(1 for n, _ in request.headers if n.lower() == "host")
    if hosts > 1 or (hosts == 0 and not request.http10):
        raise BadRequest(f"the request has {hosts} Host headers, one is expected")
    if codings:
        if lengths:
            raise BadRequest("the request has both Content-Length and Transfer-Encoding")
        if codings != ["chunked"] or request.http10:
            raise BadRequest(f"transfer encoding {', '.join(codings)!r} is not understood; use chunked", 501)
        request.chunked = True
    elif lengths:
        length = lengths.pop()
        if lengths or not (length.isascii() and length.isdigit()) or len(length) > 15:
            raise BadRequest(f"Content-Length {length!r} is not one number")
        request.length = int(length)
    for name, value in request.headers:
        lower = name.lower()
        if lower == "connection":
            tokens = _tokens(value)
            request.close = "close" in tokens or (request.http10 and "keep-alive" not in tokens)
        elif lower == "expect":
            if value.lower() != "100-continue":
                raise BadRequest(f"expectation {value!r} cannot be met", 417)
            request.expect = not request.http10
        elif lower == "upgrade" and "websocket" in value.lower():
            raise BadRequest("WebSocket connections are not served here", 501)


class Body:
    """Takes a request's body out of the bytes that follow its head."""

    def __init__(self, request: Request, limit: int) -> None:
        self._chunked = request.chunked
        self._left = request.length
        self._limit = limit
        self._state = "size" if request.chunked else "data"
        self._trailer = 0
        self.size = 0
        self.done = not request.chunked and request.length == 0
        if request.length > limit:
            raise BadRequest(f"the body has {request.length} bytes, at most {limit} are allowed", 413)

    def take(self, buffer: bytearray) -> bytes:
        """Cut what is there of the body from `buffer`; `done` says whether that was all. Raises BadRequest."""
        out: List[bytes] = []
        while not self.done and buffer:
            if self._state == "data":
                part = bytes(buffer[: self._left])
                del buffer[: self._left]
                self._left -= len(part)
                self.size += len(part)
                if self.size > self._limit:
                    raise BadRequest(f"the body is over {self._limit} bytes", 413)
                out.append(part)
                if self._left == 0:
                    self._state = "after"
                    self.done = not self._chunked
            elif not self._line(buffer):
                break
        return b"".join(out)

    def _line(self, buffer: bytearray) -> bool:
        """A line of the chunked coding."""
        end = buffer.find(b"\r\n", 0, LINE_LIMIT)
        if end < 0:
            if len(buffer) >= LINE_LIMIT:
                raise BadRequest("malformed chunked body: a line is too long")
            return False
        line = bytes(buffer[:end])
        del buffer[: end + 2]
        if self._state == "size":
            size = line.partition(b";")[0].rstrip(b" \t")
            if len(size) > 15 or not _only(size, _HEX):
                raise BadRequest(f"malformed chunked body: {_show(line)} is not a chunk size")
            self._left = int(size, 16)
            self._state = "data" if self._left else "trailer"
        elif self._state == "after":
            if line:
                raise BadRequest("malformed chunked body: a chunk is longer than its size")
            self._state = "size"
        elif line:
            self._trailer += len(line)
            if self._trailer > TRAILER_LIMIT:
                raise BadRequest("malformed chunked body: its trailer is too long")
        else:
            self.done = True
        return True


def _only(data: bytes, allowed: bytes) -> bool:
    return bool(data) and not data.translate(None, allowed)


def _tokens(value: str) -> List[str]:
    return [t.strip().lower() for t in value.split(",") if t.strip()]


def _show(data: bytes) -> str:
    text = data[:80].decode("latin-1")
    return repr(text) + ("..." if len(data) > 80 else "")
