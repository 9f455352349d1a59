"""The loopback server of a real guestd: raw sockets for the edges, real clients for the rest."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import select
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import openai
import pytest
from link_fixtures import Guest, echo, guest, until

from rethaw.node.link_stream import Stream


@pytest.fixture
async def g() -> AsyncIterator[Guest]:
    async with guest() as made:
        await made.start("sleep", "1000", providers=["scripted", "openai"])
        yield made


async def raw(g: Guest, data: bytes, *, half_close: bool = False, limit_s: float = 5) -> bytes:
    """Everything that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", g.port)
    writer.write(data)
    if half_close:
        writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), limit_s)
    finally:
        writer.close()


def say(head: str, body: bytes = b"") -> bytes:
    return head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body


# ---------------------------------------------------------------- what the node is told


async def test_an_exchange_says_what_was_asked(g: Guest) -> None:
    metas: list[dict[str, object]] = []

    async def serve(stream: Stream) -> None:
        metas.append(stream.meta)
        await echo(stream)

    g.exchange = serve
    head = "POST /scripted/v1/a%20b?x=1&y=%2F HTTP/1.1\nHost: h:1\nX-B: 1\nx-a: 2\nAuthorization: secret\nX-B: 3\n"
    answer = await raw(g, say(head + "Connection: close\nContent-Length: 2", b"hi"))
    assert metas == [
        {
            "provider": "scripted",
            "method": "POST",
            "path": "/v1/a%20b",
            "query": "x=1&y=%2F",
            "headers": [["Host", "h:1"], ["X-B", "1"], ["x-a", "2"], ["X-B", "3"], ["Content-Length", "2"]],
            "guest_id": "2.1",
            "body": b"hi",
        }
    ]
    assert answer == (
        b"HTTP/1.1 200 OK\r\nX-Echo: yes\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
    )


async def test_heads_pass_through_exactly(g: Guest) -> None:
    async def serve(stream: Stream) -> None:
        await stream.read_all(100)
        await stream.accept("x_1")
        headers = [
            ("Date", "Mon, 01 Jan"),
            ("x-Request-ID", "é"),
            ("content-encoding", "gzip"),
            ("X-A", ""),
            ("X-A", "b"),
        ]
        await stream.head(
            429, "Too Many Tea", [*headers, ("Connection", "X-Hop"), ("X-Hop", "1"), ("Content-Length", "3")]
        )
        await stream.write(b"\x00\r\n")
        await stream.end()

    g.exchange = serve
    answer = await raw(g, say("GET /scripted/x HTTP/1.1\nHost: h\nConnection: close"))
    assert answer == (
        "HTTP/1.1 429 Too Many Tea\r\nDate: Mon, 01 Jan\r\nx-Request-ID: é\r\ncontent-encoding: gzip\r\nX-A: \r\n"
        "X-A: b\r\nContent-Length: 3\r\nconnection: close\r\n\r\n\x00\r\n"
    ).encode("latin-1")


# ---------------------------------------------------------------- framing


@pytest.mark.parametrize("size", [0, 1, 1000, 65536, 200_000, 3_000_000])
async def test_bodies_are_byte_exact_both_ways(g: Guest, size: int) -> None:
    body = os.urandom(size)
    async with httpx2.AsyncClient(timeout=30) as client:
        answer = await client.post(f"{g.url}/scripted/x", content=body)
        assert answer.content == body
        assert answer.headers["x-echo"] == "yes"

        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, size, 40_000):
                yield body[at : at + 40_000]

        answer = await client.post(f"{g.url}/scripted/x", content=pieces())
        assert answer.content == body
    async with aiohttp.ClientSession() as session, session.post(f"{g.url}/scripted/x", data=body) as reply:
        assert await reply.read() == body


async def test_requests_one_after_another_on_one_connection(g: Guest) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", g.port)
    for n in range(20):
        body = b"x" * n
        writer.write(say(f"POST /scripted/x HTTP/1.1\nHost: h\nContent-Length: {n}", body))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        if n:
            assert await reader.readuntil(b"\r\n") == b"%x\r\n" % n
            assert await reader.readexactly(n + 2) == body + b"\r\n"
        assert await reader.readexactly(5) == b"0\r\n\r\n"
    writer.close()


async def test_pipelined_requests_are_answered_in_order(g: Guest) -> None:
    requests = [say(f"POST /scripted/{n} HTTP/1.1\nHost: h\nContent-Length: 1", b"%d" % n) for n in range(5)]
    last = say(
        "POST /scripted/5 HTTP/1.1\nHost: h\nConnection: close\nTransfer-Encoding: chunked", b"1\r\n5\r\n0\r\n\r\n"
    )
    answer = await raw(g, b"".join(requests) + last)
    assert [part[:1] for part in answer.split(b"\r\n\r\n1\r\n")[1:]] == [b"0", b"1", b"2", b"3", b"4", b"5"]


async def test_http10(g: Guest) -> None:
    answer = await raw(g, b"POST /scripted/x HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi")
    assert answer == b"HTTP/1.1 200 OK\r\nX-Echo: yes\r\nconnection: close\r\n\r\nhi"


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
async def test_answers_without_a_body(g: Guest, method: str, status: int) -> None:
    async def serve(stream: Stream) -> None:
        await stream.read_all(10)
        await stream.accept("x")
        await stream.head(status, "", [("content-length", "5")] if method == "HEAD" else [])
        await stream.end()

    g.exchange = serve
    answer = await raw(g, say(f"{method} /scripted/x HTTP/1.1\nHost: h\nConnection: close"))
    length = b"content-length: 5\r\n" if method == "HEAD" else b""
    assert answer == b"HTTP/1.1 %d \r\n%bconnection: close\r\n\r\n" % (status, length)


async def test_expect_100_continue(g: Guest) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", g.port)
    writer.write(say("POST /scripted/x HTTP/1.1\nHost: h\nContent-Length: 2\nExpect: 100-continue\nConnection: close"))
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"hi")
    assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()


async def test_h2c_upgrade_is_not_taken_up(g: Guest) -> None:
    head = "GET /scripted/x HTTP/1.1\nHost: h\nConnection: Upgrade, HTTP2-Settings, close\nUpgrade: h2c\nHTTP2-Settings: AA"
    assert (await raw(g, say(head))).startswith(b"HTTP/1.1 200 OK\r\n")


async def test_an_answer_before_the_request_is_whole(g: Guest) -> None:
    """The agent still sends while the answer comes (413 of a provider): the rest is read and thrown away."""

    async def serve(stream: Stream) -> None:
        await stream.head(413, "No", [("content-length", "2")])
        await stream.write(b"no")
        await stream.end()

    g.exchange = serve
    reader, writer = await asyncio.open_connection("127.0.0.1", g.port)
    writer.write(say("POST /scripted/x HTTP/1.1\nHost: h\nContent-Length: 500000", b"x" * 1000))
    assert (await asyncio.wait_for(reader.readuntil(b"no"), 5)).startswith(b"HTTP/1.1 413 No")
    writer.write(b"x" * 499_000)
    g.exchange = echo
    writer.write(say("POST /scripted/x HTTP/1.1\nHost: h\nConnection: close\nContent-Length: 2", b"hi"))
    assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"\r\n\r\n2\r\nhi\r\n0\r\n\r\n")
    writer.close()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("request_", "status", "text"),
    [
        ("CONNECT api.openai.com:443 HTTP/1.1\nHost: api.openai.com", 403, "egress is closed"),
        ("GET http://example.org/ HTTP/1.1\nHost: example.org", 403, "egress is closed"),
        ("GET / HTTP/1.1\nHost: h", 404, "nothing is served at /"),
        ("GET /scripted HTTP/1.1\nHost: h", 404, "nothing is served at /scripted"),
        ("GET /nosuch/v1 HTTP/1.1\nHost: h", 404, "no provider is called 'nosuch'; configured: openai, scripted"),
        ("OPTIONS * HTTP/1.1\nHost: h", 404, "OPTIONS"),
        ("POST /scripted/x HTTP/1.1\nHost: h\nContent-Length: 99999999", 413, "at most 67108864"),
        ("POST /scripted/x HTTP/1.1\nHost: h\nContent-Length: x", 400, "is not one number"),
        ("PRI * HTTP/2.0", 505, "HTTP/2 is not spoken here"),
        ("GET /scripted/x HTTP/1.1\nHost: h\nx: " + "y" * 40000, 431, "over 32768"),
        ("hello", 400, "malformed request line 'hello'"),
    ],
)
async def test_refusals_are_one_clear_line(g: Guest, request_: str, status: int, text: str) -> None:
    answer = await raw(g, say(request_), half_close=True)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in head
    assert text in body.decode()
    assert body.count(b"\n") == 1
    assert body.endswith(b"\n")
    assert g.link._streams.keys() <= {1, 2}


async def test_a_broken_chunked_body_ends_its_exchange(g: Guest) -> None:
    begun, ended = asyncio.Event(), list[bool]()

    async def serve(stream: Stream) -> None:
        begun.set()
        try:
            await stream.read_all(1000)
        finally:
            ended.append(stream.hung_up)

    g.exchange = serve
    reader, writer = await asyncio.open_connection("127.0.0.1", g.port)
    writer.write(say("POST /scripted/x HTTP/1.1\nHost: h\nTransfer-Encoding: chunked", b"3\r\nabc\r\n"))
    await asyncio.wait_for(begun.wait(), 5)
    writer.write(b"zz\r\n")
    assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 400 Bad Request")
    await until(lambda: ended == [True])
    writer.close()


# ---------------------------------------------------------------- hanging up, breaking off, holding up


async def test_an_agent_that_hangs_up_cancels_its_handler(g: Guest) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def serve(stream: Stream) -> None:
        await stream.read_all(1000)
        await stream.accept("x_1")
        begun.set()
        try:
            await asyncio.sleep(100)
        finally:
            assert stream.hung_up
            ended.set()

    g.exchange = serve
    _, writer = await asyncio.open_connection("127.0.0.1", g.port)
    writer.write(say("GET /scripted/x HTTP/1.1\nHost: h"))
    await asyncio.wait_for(begun.wait(), 5)
    writer.close()
    await asyncio.wait_for(ended.wait(), 5)
    quiet = await g.link.quiesce()
    assert quiet.exchanges == {}
    await g.link.go("g-1")


def in_time_wait(port: int) -> int:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = [(int(local[-4:], 16), int(remote[-4:], 16)) for _, local, remote, state, *_ in rows if state == "06"]
    return sum(port in pair for pair in ends)


async def test_connections_that_the_agent_closed_stay_no_minute_in_time_wait(g: Guest) -> None:
    """Each was 6 KB of gVisor's state, so saves and restores took longer with every call of the last minute."""
    g.exchange = echo
    for _ in range(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", g.port)
        writer.write(say("POST /scripted/x HTTP/1.1\nHost: h\nContent-Length: 2", b"hi"))
        await asyncio.wait_for(reader.readuntil(b"hi\r\n0\r\n\r\n"), 5)
        writer.close()
        await writer.wait_closed()
    await until(lambda: in_time_wait(g.port) == 0)


async def test_an_answer_can_be_read_after_the_agent_has_ended_its_side(g: Guest) -> None:
    g.exchange = echo
    client = socket.create_connection(("127.0.0.1", g.port))
    client.sendall(say("POST /scripted/x HTTP/1.1\nHost: h\nContent-Length: 2", b"hi"))
    await asyncio.to_thread(select.select, [client], [], [], 5)
    await until(lambda: client.recv(4096, socket.MSG_PEEK).endswith(b"0\r\n\r\n"))
    client.shutdown(socket.SHUT_WR)
    ended = select.poll()
    ended.register(client, select.POLLHUP)
    assert await asyncio.to_thread(ended.poll, 5000), "the other side does not close"
    assert client.recv(4096).endswith(b"hi\r\n0\r\n\r\n")
    client.close()


async def test_an_agent_that_left_while_its_answer_was_under_way_is_told(g: Guest) -> None:
    """The node has ended the stream, the agent has not seen a byte: its next request is not for another answer."""

    async def late(stream: Stream) -> None:
        await stream.read_all(1000)
        await stream.accept("x_1")
        client.close()
        await stream.head(200, "OK", [])
        await stream.write(b"the answer")
        await stream.end()

    g.exchange = late
    client = socket.create_connection(("127.0.0.1", g.port))
    client.sendall(say("GET /scripted/x HTTP/1.1\nHost: h"))
    await until(lambda: g.left == [("x_1", 0)])
    assert (await g.link.quiesce()).exchanges == {}
    await g.link.go("g-1")
    assert g.hellos[-1].left == {"x_1": 0}  # once more: what is said while a freeze begins is lost

    async def serve(stream: Stream) -> None:
        await stream.read_all(1000)
        await stream.accept("x_1")  # adopted
        await stream.head(200, "OK", [])
        await stream.end()

    g.exchange = serve
    await raw(g, say("GET /scripted/x HTTP/1.1\nHost: h\nConnection: close"))
    await g.thaw()
    assert g.hellos[-1].left == {}


async def test_an_agent_that_leaves_its_whole_answer_unread_is_told(g: Guest) -> None:
    """It gave up between the moment when the kernel took the answer for it and the moment when it would have read it."""

    async def serve(stream: Stream) -> None:
        await stream.read_all(1000)
        await stream.accept("x_1")
        await stream.head(200, "OK", [("content-length", "10")])
        await stream.write(b"the answer")
        await stream.end()

    g.exchange = serve
    client = socket.create_connection(("127.0.0.1", g.port))
    client.sendall(say("GET /scripted/x HTTP/1.1\nHost: h"))
    await until(lambda: select.select([client], [], [], 0)[0])
    await g.thaw()
    assert g.hellos[-1].left == {}
    client.close()
    await until(lambda: g.left == [("x_1", 0)])


async def test_an_agent_that_closes_after_the_last_event_has_had_it_all(g: Guest) -> None:
    """The connection's end may come much later; some clients do not wait for it."""
    taken: list[int] = []

    async def serve(stream: Stream) -> None:
        await stream.read_all(1000)
        await stream.accept("x_1")
        await stream.head(200, "OK", [("content-type", "text/event-stream")])
        await stream.write(b"data: [DONE]\n\n")
        try:
            await asyncio.sleep(100)
        finally:
            taken.append(stream.taken)

    g.exchange = serve
    reader, writer = await asyncio.open_connection("127.0.0.1", g.port)
    writer.write(say("GET /scripted/x HTTP/1.1\nHost: h"))
    await asyncio.wait_for(reader.readuntil(b"[DONE]\n\n\r\n"), 5)
    writer.close()
    await until(lambda: taken == [14])
    await g.thaw()
    assert g.hellos[-1].left == {"x_1": 14} and g.left == [("x_1", 14)]


async def test_an_answer_is_open_until_the_agents_socket_has_taken_it(g: Guest) -> None:
    """The node has ended it; the rest is in guest memory, and lost when the agent leaves."""
    body, ended = bytes(8_000_000), list[Stream]()  # more than any kernel takes for a reader that does not read

    async def serve(stream: Stream) -> None:
        if stream.exchange is None:
            await stream.read_all(1000)
            await stream.accept("x_1")
            await stream.head(200, "OK", [])
        await stream.write(body[stream.received :])
        await stream.end()
        ended.append(stream)

    g.exchange = serve
    client = socket.create_connection(("127.0.0.1", g.port))
    client.sendall(say("GET /scripted/x HTTP/1.1\nHost: h"))
    async with asyncio.timeout(20):
        while not ended:
            await g.thaw()  # each opens the window anew
            await g.link.ping()
    assert (await g.link.quiesce()).exchanges == {"x_1": (True, len(body))}
    await g.link.go("g-1")
    await until(lambda: len(ended) == 2)
    client.close()
    await until(lambda: g.left == [("x_1", 0)])
    await g.thaw()
    assert g.hellos[-1].exchanges == ()


async def test_hanging_up_while_frozen_is_noticed_after_the_thaw(g: Guest) -> None:
    streams: list[Stream] = []

    async def serve(stream: Stream) -> None:
        streams.append(stream)
        await asyncio.sleep(100)

    g.exchange = serve
    _, writer = await asyncio.open_connection("127.0.0.1", g.port)
    writer.write(say("GET /scripted/x HTTP/1.1\nHost: h"))
    await until(lambda: streams)
    await g.link.quiesce()
    writer.close()
    await g.link.go("g-1")
    await until(lambda: len(streams) == 2 and streams[1].hung_up)  # its handler was called, and could see it


async def test_a_reset_is_seen_as_a_broken_connection(g: Guest) -> None:
    async def serve(stream: Stream) -> None:
        await stream.read_all(1000)
        await stream.head(200, "OK", [])
        await stream.write(b"half")
        await stream.reset("upstream broke")

    g.exchange = serve
    async with httpx2.AsyncClient() as client:
        with pytest.raises(httpx2.TransportError):
            await client.post(f"{g.url}/scripted/x", content=b"q")


@pytest.mark.parametrize(("length", "body"), [("9", b"short"), ("3", b"too long")])
async def test_a_body_unlike_its_content_length_breaks_the_connection(g: Guest, length: str, body: bytes) -> None:
    async def serve(stream: Stream) -> None:
        await stream.read_all(1000)
        await stream.head(200, "OK", [("content-length", length)])
        await stream.write(body)
        await stream.end()

    g.exchange = serve
    async with httpx2.AsyncClient() as client:
        with pytest.raises(httpx2.TransportError):
            await client.post(f"{g.url}/scripted/x", content=b"q")
    g.exchange = echo
    async with httpx2.AsyncClient() as client:
        assert (await client.post(f"{g.url}/scripted/x", content=b"q")).content == b"q"


async def stand_still(stream: Stream) -> int:
    """Until no more bytes go out; how many did."""
    last = -1
    while last != stream.received:
        last = stream.received
        await asyncio.sleep(0.2)
    return last


async def test_a_client_that_does_not_read_holds_up_only_itself(g: Guest) -> None:
    stuck: list[Stream] = []

    async def serve(stream: Stream) -> None:
        if stream.meta["path"] != "/stuck":
            return await echo(stream)
        await stream.read_all(1000)
        await stream.head(200, "OK", [])
        stuck.append(stream)
        while True:
            await stream.write(b"x" * 65536)

    g.exchange = serve
    slow = socket.create_connection(("127.0.0.1", g.port))
    slow.sendall(say("GET /scripted/stuck HTTP/1.1\nHost: h"))
    await until(lambda: stuck)
    last = await stand_still(stuck[0])
    body = os.urandom(2_000_000)
    async with httpx2.AsyncClient(timeout=30) as client:
        assert (await client.post(f"{g.url}/scripted/x", content=body)).content == body
    assert await g.link.ping() < 1
    assert stuck[0].received == last
    await g.thaw()  # and it can be frozen like that
    slow.close()


async def test_a_slow_reader_of_a_large_answer_is_frozen_and_goes_on(g: Guest) -> None:
    """What the reader had not taken before the freeze is not granted a second time after it."""
    body, streams = os.urandom(8_000_000), list[Stream]()

    async def serve(stream: Stream) -> None:
        if stream.exchange is None:
            await stream.read_all(1000)
            await stream.accept("x_1")
        streams.append(stream)
        if not stream.head_received:
            await stream.head(200, "OK", [("content-length", str(len(body)))])
        await stream.write(body[stream.received :])
        await stream.end()

    g.exchange = serve
    reader, writer = await asyncio.open_connection("127.0.0.1", g.port, limit=4096)
    writer.write(say("GET /scripted/x HTTP/1.1\nHost: h\nConnection: close"))
    for thaws in range(3):
        await until(lambda thaws=thaws: len(streams) > thaws)
        assert await stand_still(streams[-1]) < len(body)
        await g.thaw()
    answer = await asyncio.wait_for(reader.read(), 20)
    assert answer.endswith(body[-1000:]) and len(answer.partition(b"\r\n\r\n")[2]) == len(body)
    writer.close()


async def test_an_upload_that_nobody_takes_holds_up_only_itself(g: Guest) -> None:
    taken: list[Stream] = []
    release = asyncio.Event()

    async def serve(stream: Stream) -> None:
        if stream.meta["path"] == "/stuck":
            taken.append(stream)
            await release.wait()
        await echo(stream)

    g.exchange = serve
    body = os.urandom(8_000_000)
    async with httpx2.AsyncClient(timeout=30) as client:
        upload = asyncio.create_task(client.post(f"{g.url}/scripted/stuck", content=body))
        await until(lambda: taken)
        for n in range(20):
            assert (await client.post(f"{g.url}/scripted/x", content=b"%d" % n)).content == b"%d" % n
        assert await g.link.ping() < 1
        assert not upload.done()
        release.set()
        assert (await upload).content == body


async def test_many_at_once(g: Guest) -> None:
    async def one(client: Any, n: int) -> None:
        body = hashlib.sha256(b"%d" % n).digest() * (1 + n * 37 % 3000)
        assert (await client.post(f"{g.url}/scripted/{n}", content=body)).content == body

    limits = httpx2.Limits(max_connections=200)
    async with httpx2.AsyncClient(timeout=60, limits=limits) as client:
        await asyncio.gather(*(one(client, n) for n in range(300)))


async def test_more_connections_than_are_served_at_once_wait_their_turn(g: Guest) -> None:
    idle = [socket.create_connection(("127.0.0.1", g.port)) for _ in range(520)]
    waiting = asyncio.create_task(raw(g, say("GET /scripted/x HTTP/1.1\nHost: h\nConnection: close")))
    assert await g.link.ping() < 1
    for connection in idle:
        connection.close()
    assert (await waiting).startswith(b"HTTP/1.1 200 OK")


async def test_chunks_arrive_as_they_are_written(g: Guest) -> None:
    """Not batched: each piece is there before the next is sent (measured: 0.2 ms each)."""
    seen = asyncio.Queue[None]()
    times: list[float] = []

    async def serve(stream: Stream) -> None:
        await stream.read_all(1000)
        await stream.head(200, "OK", [("content-type", "text/event-stream")])
        for n in range(50):
            times.append(time.monotonic())
            await stream.write(b"data: %d\n\n" % n)
            await asyncio.wait_for(seen.get(), 5)
            times[-1] = time.monotonic() - times[-1]
        await stream.end()

    g.exchange = serve
    got: list[bytes] = []
    async with httpx2.AsyncClient() as client, client.stream("GET", f"{g.url}/scripted/x") as answer:
        async for piece in answer.aiter_raw():
            got.append(piece)
            seen.put_nowait(None)
    assert got == [b"data: %d\n\n" % n for n in range(50)]
    print(f"median {sorted(times)[25] * 1000:.2f} ms")


async def test_the_openai_client_streams_over_three_thaws(g: Guest) -> None:
    """A real client in the middle of an answer notices nothing."""
    words = [f"word{n} " for n in range(60)]
    chunks = [
        b"data: "
        + json.dumps({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m",
                      "choices": [{"index": 0, "delta": {"content": w}, "finish_reason": None}]}).encode()
        + b"\n\n"
        for w in words
    ]  # fmt: skip
    whole = b"".join(chunks) + b"data: [DONE]\n\n"

    async def serve(stream: Stream) -> None:
        if stream.exchange is None:
            assert json.loads(await stream.read_all(10_000))["stream"] is True
            await stream.accept("x_1")
            assert "authorization" not in {n.lower() for n, _ in stream.meta["headers"]}  # type: ignore[attr-defined]
        if not stream.head_received:
            await stream.head(200, "OK", [("content-type", "text/event-stream")])
        while stream.received < len(whole):
            await stream.write(whole[stream.received : stream.received + 97])
            await asyncio.sleep(0.001)
        await stream.end()

    g.exchange = serve
    async with openai.AsyncOpenAI(base_url=f"{g.url}/openai/v1", api_key="rethaw", max_retries=0) as client:
        got: list[str] = []
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        async for chunk in stream:
            got.append(chunk.choices[0].delta.content or "")
            if len(got) in (5, 20, 40):
                await g.thaw(f"g-{len(got)}")
    assert got == words
