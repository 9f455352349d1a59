"""An HTTP proxy on loopback that stands before a service and breaks it on request, for tests.

    with FaultProxy(("127.0.0.1", 9000)) as proxy:
        proxy.fault = "cut"        # bodies end in the middle
        proxy.fault = None         # all is well again

Faults: `down` (connections are refused), `slow` (no answer before the fault is over), `cut` (the connection
ends in the middle of the request's body, or of the answer's if the request has none), `short` (a body and Content-Length of half the bytes), `500`, `503` (SlowDown), `403`
(InvalidAccessKeyId). `times` limits how many requests meet the fault.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import threading
from typing import Any

_WAIT_S = 60.0
_BODIES = {
    "500": (500, "InternalError", "We encountered an internal error."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "403": (403, "InvalidAccessKeyId", "The access key id you provided does not exist."),
}
FAULTS = ("down", "slow", "cut", "short", *_BODIES)


class FaultProxy:
    """Listens on a free port of 127.0.0.1 (`address`) and passes requests to `upstream`."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self.requests = 0  # that came, broken or not
        self._fault: str | None = None
        self._left: int | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.address = ("127.0.0.1", 0)
        self._listen()

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    @property
    def fault(self) -> str | None:
        return self._fault

    @fault.setter
    def fault(self, fault: str | None) -> None:
        self.set(fault)

    def set(self, fault: str | None, times: int | None = None) -> None:
        """Break the next `times` requests (None: all from now on)."""
        assert fault is None or fault in FAULTS, fault
        with self._lock:
            self._over.set()  # who waits in an old fault goes on
            self._over = threading.Event()
            self._fault, self._left = fault, times
        if fault == "down":
            self._hang_up()
        elif self._server is None:
            self._listen()

    def take(self) -> tuple[str | None, threading.Event]:
        """The fault that this request meets, and what says that it is over."""
        with self._lock:
            self.requests += 1
            fault = self._fault
            if fault is not None and self._left is not None:
                self._left -= 1
                if self._left <= 0:
                    self._fault = None
            return fault, self._over

    def _listen(self) -> None:
        self._server = _Server(self.address, self)
        self.address = ("127.0.0.1", self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def _hang_up(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.hang_up()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def close(self) -> None:
        self._over.set()
        self._hang_up()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], proxy: FaultProxy) -> None:
        self.proxy = proxy
        self._open: set[Any] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End the kept-alive connections too, or a client goes on over one of them."""
        for request in list(self._open):
            self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are this proxy's business; nothing to print."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _pass(self) -> None:
        fault, over = self.server.proxy.take()
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut" and (length or self.command == "HEAD"):
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if fault == "slow":
            over.wait(_WAIT_S)
            self.close_connection = True
            return
        if fault in _BODIES:
            status, code, text = _BODIES[fault]
            self._answer(status, [("Content-Type", "application/xml")], _xml(code, text))
            return
        upstream = http.client.HTTPConnection(*self.server.proxy.upstream, timeout=_WAIT_S)
        with contextlib.closing(upstream):
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "keep-alive"):
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            data = answer.read()
            headers = [
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "keep-alive")
            ]
            head_length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        if fault == "short" and data:
            self._answer(answer.status, headers, data[: len(data) // 2])
        elif fault == "cut":
            self._answer(answer.status, headers, data[: len(data) // 2], str(max(len(data), 1)))
            self.close_connection = True
        else:
            self._answer(answer.status, headers, data, head_length)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass


def _xml(code: str, text: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{text}</Message></Error>'.encode()
