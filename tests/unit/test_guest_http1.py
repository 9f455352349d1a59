"""Requests as bytes: what is accepted, what is refused and with which line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rethaw.guest.http1 import BadRequest, Body, Request, take_head

HEAD = b"POST /openai/v1/x?a=1 HTTP/1.1\r\nHost: h\r\n"


def _head(data: bytes) -> Request:
    request = take_head(bytearray(data))
    assert request is not None
    return request


def test_a_plain_head() -> None:
    buffer = bytearray(HEAD + b"Content-Length: 3\r\nX-A:  b \r\n\r\nabcGET")
    request = take_head(buffer)
    assert request is not None
    assert (request.method, request.target, request.length) == ("POST", "/openai/v1/x?a=1", 3)
    assert request.headers[2] == ("X-A", "b")
    body = Body(request, 100)
    assert body.take(buffer) == b"abc"
    assert body.done
    assert buffer == b"GET"


@given(st.lists(st.integers(0, 200), max_size=10))
def test_a_chunked_body_however_it_is_split(cuts: list[int]) -> None:
    data = b"4;x=1\r\nWiki\r\n5 \r\npedia\r\nE\r\n in\r\n\r\nchunks.\r\n0\r\nTrailer: 1\r\n\r\n"
    at = sorted({c % (len(data) + 1) for c in cuts})
    body, out, buffer = Body(_head(HEAD + b"Transfer-Encoding: chunked\r\n\r\n"), 1000), b"", bytearray()
    for a, b in zip([0, *at], [*at, len(data)], strict=True):
        buffer += data[a:b]
        out += body.take(buffer)
    assert body.done
    assert out == b"Wikipedia in\r\n\r\nchunks."


@pytest.mark.parametrize(
    ("data", "status", "line"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/2 is not spoken"),
        (b"GET / HTTP/2.0\r\n\r\n", 505, "is not spoken here"),
        (b"GET /\r\n\r\n", 400, "malformed request line"),
        (b"G T / HTTP/1.1\r\n\r\n", 400, "malformed request line"),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400, "malformed request line"),
        (HEAD + b"bad header\r\n\r\n", 400, "malformed header line"),
        (HEAD + b" folded: 1\r\n\r\n", 400, "malformed header line"),
        (HEAD + b"a : 1\r\n\r\n", 400, "malformed header line"),
        (HEAD + b"a: \x00\r\n\r\n", 400, "control character"),
        (HEAD + b"a: b\nc: d\r\n\r\n", 400, "control character"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "0 Host headers"),
        (HEAD + b"Host: other\r\n\r\n", 400, "2 Host headers"),
        (HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "both Content-Length"),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "is not one number"),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, "is not one number"),
        (HEAD + b"Content-Length: 1_0\r\n\r\n", 400, "is not one number"),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501, "is not understood"),
        (HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 501, "is not understood"),
        (HEAD + b"Upgrade: websocket\r\n\r\n", 501, "WebSocket"),
        (HEAD + b"Expect: tea\r\n\r\n", 417, "cannot be met"),
        (HEAD + b"x: " + b"y" * 40000 + b"\r\n\r\n", 431, "over 32768 bytes"),
        (b"x" * 40000, 431, "over 32768 bytes"),
        (HEAD + b"".join(b"h%d: 1\r\n" % i for i in range(300)) + b"\r\n", 431, "301 headers"),
    ],
)
def test_what_is_refused(data: bytes, status: int, line: str) -> None:
    with pytest.raises(BadRequest, match=line) as caught:
        take_head(bytearray(data))
    assert caught.value.status == status
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"zz\r\n", "is not a chunk size"),
        (b"-1\r\n", "is not a chunk size"),
        (b"\r\n", "is not a chunk size"),
        (b"1\r\nab\r\n", "longer than its size"),
        (b"f" * 2000, "too long"),
        (b"0\r\n" + b"".join(b"a: %s\r\n" % (b"b" * 900) for _ in range(20)), "trailer is too long"),
        (b"10000000\r\n" + b"x" * 2000, "over 1000 bytes"),
    ],
)
def test_chunked_bodies_that_are_refused(data: bytes, line: str) -> None:
    body = Body(_head(HEAD + b"Transfer-Encoding: chunked\r\n\r\n"), 1000)
    with pytest.raises(BadRequest, match=line):
        body.take(bytearray(data))


def test_a_body_over_the_limit_is_refused_by_its_length() -> None:
    with pytest.raises(BadRequest, match="1001 bytes") as caught:
        Body(_head(HEAD + b"Content-Length: 1001\r\n\r\n"), 1000)
    assert caught.value.status == 413


def test_forwarded_headers_lose_credentials_and_hop_by_hop_only() -> None:
    request = _head(
        HEAD
        + b"Authorization: Bearer x\r\nX-Api-Key: y\r\napi-key: z\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\n"
        + b"TE: trailers\r\nUpgrade: h2c\r\nExpect: 100-continue\r\nB: 1\r\na: 2\r\nB: 3\r\nContent-Length: 0\r\n\r\n"
    )
    assert request.forwarded() == [("Host", "h"), ("B", "1"), ("a", "2"), ("B", "3"), ("Content-Length", "0")]
    assert request.expect


@pytest.mark.parametrize(
    ("version", "connection", "close"),
    [
        (b"1.1", b"", False),
        (b"1.1", b"Connection: close\r\n", True),
        (b"1.0", b"", True),
        (b"1.0", b"Connection: Keep-Alive\r\n", False),
    ],
)
def test_keep_alive(version: bytes, connection: bytes, close: bool) -> None:
    assert _head(b"GET /a/b HTTP/" + version + b"\r\nHost: h\r\n" + connection + b"\r\n").close is close


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    buffer = bytearray(data)
    try:
        request = take_head(buffer)
        if request is not None:
            Body(request, 1000).take(buffer)
    except BadRequest as error:
        assert 400 <= error.status <= 505
