"""The way out of a build sandbox on a node that has a proxy of its own to go through."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from rethaw.images import proxy

LOGIN = b"Basic " + base64.b64encode(b"ann:s3 cret")


class Upstream:
    """A proxy as companies have it: it answers for every host itself, and keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.status = b"200 Connection established"
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.asked.append(head)
            if head.startswith(b"CONNECT "):
                writer.write(b"HTTP/1.1 " + self.status + b"\r\nVia: here\r\n\r\n")
                if self.status.startswith(b"2"):
                    writer.write(b"hello " + await reader.readexactly(4))
            else:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nsite")
            await writer.drain()
        writer.close()


@pytest.fixture
async def upstream(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Upstream]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    made = Upstream()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("HTTPS_PROXY", f"http://ann:s3%20cret@127.0.0.1:{made.port}")
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{made.port}")  # without a scheme, in small letters
    try:
        yield made
    finally:
        server.close()


async def ask(tmp_path: Path, said: bytes, more: bytes = b"", *allowed: str) -> bytes:
    """What the sandbox gets; `more` is said after a 200."""
    async with proxy.serving(tmp_path / "sock", allowed), asyncio.timeout(20):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "sock")
        writer.write(said)
        if more:
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
            writer.write(more)
        try:
            return await reader.read()
        finally:
            writer.close()


async def test_tunnels_go_through_the_nodes_own_proxy(tmp_path: Path, upstream: Upstream) -> None:
    """With its login, which the sandbox does not see, and for a name that only that proxy knows."""
    got = await ask(tmp_path, b"CONNECT pypi.invalid:443 HTTP/1.1\r\nProxy-Authorization: mine\r\n\r\n", b"tls?")
    assert got == b"hello tls?"
    assert upstream.asked == [
        b"CONNECT pypi.invalid:443 HTTP/1.1\r\nHost: pypi.invalid:443\r\nProxy-Authorization: " + LOGIN + b"\r\n\r\n"
    ]


async def test_plain_requests_go_through_it_in_absolute_form(tmp_path: Path, upstream: Upstream) -> None:
    said = b"GET http://deb.invalid:8080/a?b HTTP/1.1\r\nHost: deb.invalid:8080\r\nProxy-Connection: x\r\n\r\n"
    assert (await ask(tmp_path, said)).endswith(b"\r\n\r\nsite")
    assert upstream.asked == [
        b"GET http://deb.invalid:8080/a?b HTTP/1.1\r\nHost: deb.invalid:8080\r\nConnection: close\r\n\r\n"
    ]


async def test_neighbours_stay_out_of_reach_through_it(tmp_path: Path, upstream: Upstream) -> None:
    got = await ask(tmp_path, b"CONNECT 10.0.0.7:443 HTTP/1.1\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 403") and b"10.0.0.7, which is not public" in got
    assert not upstream.asked
    assert await ask(tmp_path, b"CONNECT 10.0.0.7:443 HTTP/1.1\r\n\r\n", b"tls?", "10.0.0.7") == b"hello tls?"


async def test_what_no_proxy_names_is_reached_without_it(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,.invalid")
    site = f"http://127.0.0.1:{upstream.port}/x"
    got = await ask(tmp_path, f"GET {site} HTTP/1.1\r\n\r\n".encode(), b"", "127.0.0.1")
    assert got.endswith(b"site") and upstream.asked == [b"GET /x HTTP/1.1\r\nConnection: close\r\n\r\n"]
    got = await ask(tmp_path, b"CONNECT pypi.invalid:443 HTTP/1.1\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 403") and len(upstream.asked) == 1


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        (None, b"407 Proxy Authentication Required", b"refuses pypi.invalid:443: 407 Proxy Authentication Required"),
        (None, b"nonsense", b"refuses pypi.invalid:443: nonsense"),
        ("http://127.0.0.1:9", b"", b"the node's proxy 127.0.0.1:9 is not there"),
        ("socks5://127.0.0.1:9", b"", b"HTTPS_PROXY is no http:// address"),
    ],
)
async def test_a_proxy_that_does_not_help_is_named(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, given: str | None, status: bytes, said: bytes
) -> None:
    upstream.status = status
    if given is not None:
        monkeypatch.setenv("HTTPS_PROXY", given)
    got = await ask(tmp_path, b"CONNECT pypi.invalid:443 HTTP/1.1\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 403") and said in got.partition(b"\r\n")[0]
    assert b"s3" not in got
