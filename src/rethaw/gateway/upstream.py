"""HTTP to a provider: bytes and headers as they are, in both directions."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, AsyncIterator

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from rethaw.gateway.providers import Provider
from rethaw.gateway.request import HOP_BY_HOP
from rethaw.model.types import RequestMeta, ResponseHead

_CONNECT_S = 30.0
_SLICE = 256 << 10  # of a large request body, so that one upload does not hold the event loop
_HEAD_LIMIT = 64 << 10
# Left out of an answer: the guest's own HTTP server frames it anew. Content-Length stays, it is the answer's.
_DROPPED = HOP_BY_HOP - {"content-length"}
_AUTO = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")

NOT_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL)
BROKEN = (aiohttp.ClientError, OSError, asyncio.TimeoutError)


class Answer:
    """A response whose head is here."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        headers: list[tuple[str, str]] = []
        for name, value in response.raw_headers:
            text = name.decode("latin-1")
            if text.lower() not in _DROPPED:
                headers.append((text, value.decode("latin-1")))
        self.head = ResponseHead(status=response.status, reason=response.reason or "", headers=tuple(headers))

    async def read(self) -> bytes:
        """The next bytes as soon as they come, b"" at the end. Raises one of BROKEN when the connection is lost, after
        everything that came before was given."""
        content = self._response.content
        try:
            return await content.readany()
        except BROKEN:
            # aiohttp puts an error before the bytes that it has already received
            left: object = getattr(content, "_buffer", None)
            take = getattr(content, "_read_nowait_chunk", None)
            if left and callable(take):
                data: object = take(-1)
                if isinstance(data, bytes) and data:
                    return data
            raise

    async def peek(self, limit: int, timeout_s: float) -> list[bytes]:
        """Up to about `limit` bytes of a body that is expected to be short."""
        parts: list[bytes] = []
        with contextlib.suppress(*BROKEN):
            async with asyncio.timeout(timeout_s):
                while sum(map(len, parts)) < limit:
                    data = await self.read()
                    if not data:
                        break
                    parts.append(data)
        return parts


class Upstream:
    """The connections of one node to all providers. No cookies, no redirects, no proxy from the environment."""

    def __init__(self) -> None:
        self._http: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=60, keepalive_timeout=15, socket_factory=_socket)
        self._http = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=None),
            auto_decompress=False,
            trust_env=False,
            read_bufsize=256 << 10,
            max_line_size=_HEAD_LIMIT,
            max_field_size=_HEAD_LIMIT,
        )

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()

    @contextlib.asynccontextmanager
    async def send(self, provider: Provider, meta: RequestMeta, body: bytes) -> AsyncGenerator[Answer, None]:
        """Send a request; the answer once its head is here. Raises one of NOT_SENT or BROKEN."""
        assert self._http is not None, "start() comes first"
        headers = CIMultiDict[str]()
        pairs = [(n, v) for n, v in meta.headers if n.lower() != (provider.auth_header or "").lower()]
        if provider.auth_header is not None and provider.auth_value is not None:
            pairs.append((provider.auth_header, provider.auth_value))
        for name, value in pairs:
            headers.add(name, _utf8(value))
        if body or meta.method in ("POST", "PUT", "PATCH"):
            headers.add("Content-Length", str(len(body)))
        async with self._http.request(
            meta.method,
            URL(provider.url(meta.path, meta.query), encoded=True),
            headers=headers,
            data=(_slices(body) if len(body) > _SLICE else body) or None,
            allow_redirects=False,
            skip_auto_headers=_AUTO,
            proxy=provider.proxy,
        ) as response:
            yield Answer(response)


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    view = memoryview(body)
    for start in range(0, len(body), _SLICE):
        yield bytes(view[start : start + _SLICE])


def _utf8(value: str) -> str:
    """aiohttp writes headers as UTF-8; ours are Latin-1, so that every byte can be told."""
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return value


def _socket(info: tuple[int | socket.AddressFamily, int | socket.SocketKind, int, str, object]) -> socket.socket:
    """With keep-alive probes: an answer may take half an hour, a dead peer must be noticed all the same."""
    family, kind, proto, _, _ = info
    sock = socket.socket(family, kind, proto)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 8)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return sock
