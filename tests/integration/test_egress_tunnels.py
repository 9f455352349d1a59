"""Tunnels from a real guestd through a real Link to servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import ssl
import struct
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import pytest
from egress_fixtures import certificate, echo, pattern, server, way_out
from link_fixtures import until

from rethaw.model.egress import Address, EgressSettings, address_of, rules_of
from rethaw.model.errors import QuiesceTimeout
from rethaw.node import egress as egress_module


def addresses(*texts: str) -> list[Address]:
    return [a for a in map(address_of, texts) if a is not None]


def resolver(*texts: str) -> Any:
    async def resolve(host: str) -> list[Address]:
        return addresses(*texts)

    return resolve


async def test_bytes_pass_both_ways_and_each_direction_ends_by_itself() -> None:
    async with server(echo) as port, way_out(["127.0.0.1:*"]) as out:
        reader, writer, status = await out.connect(f"127.0.0.1:{port}")
        assert status == "HTTP/1.1 200 Connection established"
        sent = pattern(3_000_000, 1)

        async def send() -> None:
            for at in range(0, len(sent), 50_000):
                writer.write(sent[at : at + 50_000])
                await writer.drain()
            writer.write_eof()

        task = asyncio.create_task(send())
        assert await asyncio.wait_for(reader.read(-1), 20) == sent
        await task
        writer.close()
        await until(lambda: out.sink.of("closed"))
        (opened,), (closed,) = out.sink.of("opened"), out.sink.of("closed")
        assert opened == {"host": "127.0.0.1", "port": port, "address": "127.0.0.1", "tunnel": "2.1"}
        assert (closed["sent"], closed["received"], closed["tunnel"]) == (len(sent), len(sent), "2.1")
        assert out.actives
        await until(lambda: not out.egress._tunnels)


@pytest.mark.parametrize("seed", [1, 2])
async def test_no_byte_is_lost_or_doubled_over_many_thaws(seed: int) -> None:
    dice = random.Random(seed)
    async with server(echo) as port, way_out(["127.0.0.1:*"]) as out:
        stop, thaws = asyncio.Event(), 0

        async def freeze() -> None:
            nonlocal thaws
            while not stop.is_set():
                with contextlib.suppress(QuiesceTimeout):
                    if dice.random() < 0.3:  # given up half-way
                        await out.guest.link.quiesce(dice.random() * 0.002)
                        await out.guest.link.go(out.guest.hellos[-1].generation)
                await out.guest.thaw()
                thaws += 1
                await asyncio.sleep(dice.random() * 0.01)

        async def talk(n: int) -> None:
            reader, writer, _ = await out.connect(f"127.0.0.1:{port}")
            sent = pattern([1, 1000, 400_000, 4_000_000][n % 4], n)

            async def send() -> None:
                at = 0
                while at < len(sent):
                    size = dice.randrange(1, 70_000)
                    writer.write(sent[at : at + size])
                    at += size
                    await writer.drain()
                    if dice.random() < 0.2:
                        await asyncio.sleep(dice.random() * 0.02)
                writer.write_eof()

            task = asyncio.create_task(send())
            got = bytearray()
            while data := await asyncio.wait_for(reader.read(dice.randrange(1, 100_000)), 30):
                got += data
                if dice.random() < 0.1:
                    await asyncio.sleep(dice.random() * 0.02)
            assert got == sent
            await task
            writer.close()

        freezer = asyncio.create_task(freeze())
        talks = 0
        while thaws < 60:
            await asyncio.gather(*(talk(n) for n in range(12)))
            talks += 12
        stop.set()
        await freezer
        await until(lambda: len(out.sink.of("closed")) == talks)
        assert {c.get("why") for c in out.sink.of("closed")} == {None}
        await out.guest.thaw()
        assert not out.egress._tunnels


async def test_what_was_under_way_when_a_freeze_was_given_up_comes_once() -> None:
    sent = pattern(1_000_000, 3)

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)

    async with server(tell) as port, way_out(["127.0.0.1:*"]) as out:
        pid = out.guest.process.pid
        os.kill(pid, signal.SIGSTOP)
        talks = [asyncio.create_task(out.connect(f"127.0.0.1:{port}")) for _ in range(8)]
        got = [bytearray() for _ in talks]

        async def listen(n: int) -> None:
            reader, writer, _ = await talks[n]
            while data := await reader.read(30_000):
                got[n] += data
            writer.close()

        listening = asyncio.gather(*(listen(n) for n in range(len(talks))))
        for _ in range(15):
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.01)
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.01)  # the pipe is full now, and the queue before it is not empty
            with pytest.raises(QuiesceTimeout):
                await out.guest.link.quiesce(0.02)
            os.kill(pid, signal.SIGCONT)
            await out.guest.thaw()
        await asyncio.wait_for(listening, 20)
        assert [bytes(g) for g in got] == [sent] * len(talks)


async def test_a_full_tunnel_holds_up_neither_others_nor_a_freeze() -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(bytes(100_000))
            await writer.drain()

    async with server(flood) as flooding, server(echo) as port, way_out(["127.0.0.1:*"]) as out:
        stuck = [await out.connect(f"127.0.0.1:{flooding}") for _ in range(20)]  # nobody reads these
        await asyncio.sleep(0.3)
        for _ in range(30):
            assert (await out.guest.link.quiesce(2.0)).took_s < 1
            await out.guest.link.go(out.guest.hellos[-1].generation)
        (tunnel, *_) = out.egress._tunnels.values()
        assert len(tunnel.kept) < 200_000
        reader, writer, _ = await out.connect(f"127.0.0.1:{port}")
        writer.write(b"hello")
        assert await asyncio.wait_for(reader.readexactly(5), 5) == b"hello"
        rss = [
            line for line in Path(f"/proc/{out.guest.process.pid}/status").read_text().splitlines() if "VmRSS" in line
        ]
        assert int(rss[0].split()[1]) < 20 * 1024  # what is stuck does not pile up with each freeze
        writer.close()
        for _, other, _ in stuck:
            other.transport.abort()
        await until(lambda: len(out.egress._tunnels) <= 1)


async def test_a_restored_guest_finds_its_connections_reset_and_connects_anew() -> None:
    async with server(echo) as port, way_out(["127.0.0.1:*"]) as out:
        reader, writer, _ = await out.connect(f"127.0.0.1:{port}")
        writer.write(b"before")
        assert await reader.readexactly(6) == b"before"
        await out.restore()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 5)
        assert [c["why"] for c in out.sink.of("closed")] == ["the sandbox is gone"]
        reader, writer, status = await out.connect(f"127.0.0.1:{port}")
        assert "200" in status
        writer.write(b"after")
        assert await reader.readexactly(5) == b"after"
        writer.close()


async def test_a_connection_that_the_other_side_breaks_is_broken_inside() -> None:
    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(2)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with server(rude) as port, way_out(["127.0.0.1:*"]) as out:
        reader, writer, _ = await out.connect(f"127.0.0.1:{port}")
        writer.write(b"hi, and more")
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 5)
        await until(lambda: out.sink.of("closed"))
        assert out.sink.of("closed")[0]["why"]


async def test_what_the_agent_closes_is_closed_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = asyncio.Event()

    async def watch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(-1)
        finally:
            gone.set()

    async with server(watch) as port, way_out(["127.0.0.1:*"]) as out:
        _, writer, _ = await out.connect(f"127.0.0.1:{port}")
        writer.transport.abort()
        await asyncio.wait_for(gone.wait(), 5)
        await until(lambda: out.sink.of("closed"))
        assert not out.egress._tunnels


async def test_a_tunnel_in_which_nothing_moves_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_module, "IDLE_S", 0.2)
    async with server(echo) as port, way_out(["127.0.0.1:*"]) as out:
        reader, _, _ = await out.connect(f"127.0.0.1:{port}")
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 5)
        assert "nothing moved" in out.sink.of("closed")[0]["why"]


async def test_so_many_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_module, "MOST", 3)
    async with server(echo) as port, way_out(["127.0.0.1:*"]) as out:
        opened = [await out.connect(f"127.0.0.1:{port}") for _ in range(4)]
        assert [s.split()[1] for _, _, s in opened] == ["200"] * 3 + ["503"]
        opened[0][1].close()
        await until(lambda: len(out.sink.of("closed")) == 1)
        assert "200" in (await out.connect(f"127.0.0.1:{port}"))[2]
        for _, writer, _ in opened:
            writer.close()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("allow", "target", "found", "rule"),
    [
        ([], "api.github.com:443", [], "api.github.com"),
        ([], "api.github.com:22", [], "api.github.com:22"),
        ([], "[2606:4700::1]:8080", [], "[2606:4700::1]:8080"),
        (["api.github.com"], "github.com:443", [], "github.com"),
        (["*.pypi.org"], "pypi.org:443", [], "pypi.org"),
        (["*"], "inside.example:443", ["10.1.2.3"], "10.1.2.3"),
        (["*"], "10.1.2.3:80", [], "10.1.2.3"),
        (["inside.example:*"], "inside.example:5432", ["127.0.0.1"], "127.0.0.1:5432"),
        (["inside.example"], "inside.example:80", ["169.254.169.254", "::1"], "169.254.169.254"),
        (["10.0.0.0/8"], "inside.example:80", ["10.0.0.1"], "inside.example"),
    ],
)
async def test_a_refusal_says_which_rule_to_add(allow: list[str], target: str, found: list[str], rule: str) -> None:
    async with way_out(allow, resolve=resolver(*found)) as out:
        reader, writer, status = await out.connect(target)
        remedy = f'add allow=["{rule}"] to the agent (or rethaw run --allow {rule})'
        assert status.startswith(f"HTTP/1.1 403 egress to {target} is not allowed")
        assert status.endswith(remedy)
        assert remedy in (await asyncio.wait_for(reader.read(), 5)).decode()
        writer.close()
        (refused,) = out.sink.of("refused")
        assert (f"{refused['host']}:{refused['port']}", refused["rule"]) == (
            target.replace("[", "").replace("]", ""),
            rule,
        )
        await until(lambda: not out.egress._tunnels)


async def test_a_rule_that_names_the_address_or_the_private_host_opens_it() -> None:
    async with server(echo, "127.0.0.3") as port:
        for allow, target in (
            (["127.0.0.3:*"], f"127.0.0.3:{port}"),
            (["*:*", "127.0.0.0/8:*"], f"inside.example:{port}"),
        ):
            async with way_out(allow, resolve=resolver("127.0.0.3")) as out:
                _, writer, status = await out.connect(target)
                assert "200" in status, status
                writer.close()


async def test_a_name_is_looked_up_once_and_only_when_a_rule_fits() -> None:
    asked: list[str] = []

    async def resolve(host: str) -> list[Address]:
        asked.append(host)
        return addresses("127.0.0.1" if len(asked) == 1 else "127.0.0.99")

    async with server(echo) as port, way_out(["a.example:*", "127.0.0.1:*"], resolve=resolve) as out:
        await out.connect(f"secret-word.example:{port}")
        assert asked == []
        _, writer, status = await out.connect(f"A.example.:{port}")
        assert ("200" in status, asked) == (True, ["a.example"])
        assert out.sink.of("opened")[0]["address"] == "127.0.0.1"
        writer.close()


async def test_the_node_has_the_last_word() -> None:
    settings = EgressSettings(deny=rules_of(["*.bad.example", "127.0.0.9"], what="deny", ports=None))
    async with way_out(["*:*", "127.0.0.0/8:*"], settings=settings, resolve=resolver("127.0.0.9")) as out:
        for target in ("x.bad.example:443", "127.0.0.9:80", "good.example:81"):
            _, writer, status = await out.connect(target)
            assert f"403 egress to {target} is denied on this node" in status
            writer.close()
    async with way_out(["*"], settings=EgressSettings(enabled=False)) as out:
        _, writer, status = await out.connect("good.example:443")
        assert "switched off on this node" in status
        assert out.sink.of("refused")[0]["rule"] is None
        writer.close()


async def test_what_is_not_there_is_a_502_with_the_reason() -> None:
    async def nowhere(host: str) -> list[Address]:
        return []

    async with server(echo) as port:
        free = port
    async with way_out(["127.0.0.1:*", "void.example"], resolve=nowhere) as out:
        _, writer, status = await out.connect(f"127.0.0.1:{free}")
        assert status == f"HTTP/1.1 502 127.0.0.1:{free} could not be connected to: Connection refused"
        writer.close()
        _, writer, status = await out.connect("void.example:443")
        assert "the name has no address" in status
        writer.close()
        assert [f["port"] for f in out.sink.of("failed")] == [free, 443]


async def test_the_same_refusal_is_one_event() -> None:
    async with way_out([]) as out:
        for _ in range(5):
            (await out.connect("a.example:443"))[1].close()
        (await out.connect("b.example:443"))[1].close()
        assert [r["host"] for r in out.sink.of("refused")] == ["a.example", "b.example"]
        await out.egress.close()
        assert out.sink.of("refused")[2:] == [
            {"host": "a.example", "port": 443, "why": "no rule allows it", "rule": "a.example", "repeats": 4}
        ]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("CONNECT nohost HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("CONNECT x:99999 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("CONNECT 0x7f000001:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("CONNECT 127.1:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("CONNECT fe80::1%eth0:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET https://x.example/ HTTP/1.1\r\nHost: x.example\r\n\r\n", 400),
        ("GET http://user:secret@x.example/ HTTP/1.1\r\nHost: x.example\r\n\r\n", 400),
        ("GET ftp HTTP/1.1\r\nHost: x.example\r\n\r\n", 400),
        ("GET http://127.0.0.1:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    ],
)
async def test_what_is_no_request_is_refused(request_: str, status: int) -> None:
    async with way_out(["*:*", "127.0.0.0/8:*"]) as out:
        reader, writer = await asyncio.open_connection("127.0.0.1", out.guest.port)
        writer.write(request_.replace("PORT", str(out.guest.port)).encode())
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 %d " % status)
        writer.close()
        assert not out.sink.of("opened")


async def test_a_guest_that_lies_is_refused() -> None:
    async with way_out(["*:*"]) as out:
        for meta in (
            {},
            {"host": "a\0b\ud800", "port": 80},
            {"host": 7, "port": 80},
            {"host": "a", "port": "80"},
            {"host": "a", "port": 0},
        ):
            stream = Lying(meta)
            task = asyncio.create_task(out.egress.handle(stream))  # pyright: ignore[reportArgumentType]
            await until(lambda s=stream: s.said)
            assert stream.said[0][:2] == ("head", 400)
            task.cancel()
        assert all(r["host"].isascii() and r["host"].isprintable() for r in out.sink.of("refused"))
        for held in ({"received": 5}, {"base": 5}, {"head_received": True}):
            stream = Lying({"host": "127.0.0.1", "port": 80}, **held)
            await out.egress.handle(stream)  # pyright: ignore[reportArgumentType]
            assert stream.said == [("reset", "it belongs to a former life of the session")]


class Lying:
    """A stream as no guestd opens one."""

    numbers = 1000

    def __init__(self, meta: dict[str, Any], **more: Any) -> None:
        Lying.numbers += 1
        self.id, self.kind, self.meta, self.hung_up = Lying.numbers, "tunnel", meta, False
        self.received, self.base, self.head_received = 0, 0, False
        self.__dict__ |= more
        self.said: list[tuple[object, ...]] = []

    async def head(self, status: int, reason: str, headers: object) -> None:
        self.said.append(("head", status, reason))

    async def reset(self, why: str) -> None:
        self.said.append(("reset", why))


# ---------------------------------------------------------------- absolute form


async def ask(port: int, request: str, body: bytes = b"") -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


async def test_a_request_in_absolute_form_becomes_an_ordinary_one() -> None:
    seen: list[bytes] = []

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readuntil(b"0\r\n\r\n") if b"chunked" in head else b""
        seen.append(head + body)
        writer.write(
            b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 Fine\r\nX-A: 1\r\nConnection: keep-alive, x-b\r\n"
        )
        writer.write(b"X-B: 2\r\nContent-Length: 5\r\n\r\nhello")

    async with server(origin) as port, way_out(["127.0.0.1:*"]) as out:
        answer = await ask(
            out.guest.port,
            f"POST http://127.0.0.1:{port}/a%20b?q=1 HTTP/1.1\nHost: elsewhere.example\nAuthorization: mine\n"
            "Proxy-Authorization: theirs\nProxy-Connection: keep-alive\nConnection: x-drop\nX-Drop: 1\nX-Keep: 2\n"
            "Transfer-Encoding: chunked",
            b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\nGET http://next.example/ HTTP/1.1\r\n\r\n",
        )
        assert answer == (
            b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 Fine\r\nX-A: 1\r\nContent-Length: 5\r\n"
            b"Connection: close\r\n\r\nhello"
        )
        head, _, body = seen[0].partition(b"\r\n\r\n")
        assert head.decode().split("\r\n") == [
            "POST /a%20b?q=1 HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Authorization: mine",
            "X-Keep: 2",
            "Transfer-Encoding: chunked",
            "Connection: close",
        ]
        assert body == b"5\r\nabcde\r\n0\r\n\r\n"


async def test_an_origin_that_says_nothing_is_a_502() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async with server(silent) as port, way_out(["127.0.0.1:*"]) as out:
        answer = await ask(out.guest.port, f"GET http://127.0.0.1:{port} HTTP/1.0")
        assert answer.startswith(f"HTTP/1.1 502 127.0.0.1:{port} closed the connection without an answer".encode())


async def test_what_is_for_the_gateway_stays_there() -> None:
    """A client that does not know NO_PROXY."""
    async with way_out([]) as out:
        port = out.guest.port
        answer = await ask(
            port,
            f"POST http://127.0.0.1:{port}/scripted/v1 HTTP/1.1\nHost: h\nConnection: close\nContent-Length: 2",
            b"hi",
        )
        assert answer.endswith(b"2\r\nhi\r\n0\r\n\r\n")
        assert not out.sink.events


async def test_tls_goes_through_untouched(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "tls.example")
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving.load_cert_chain(cert, key)
    trusting = ssl.create_default_context(cafile=cert)
    allow = ["tls.example:*", "127.0.0.1:*"]
    async with server(echo, tls=serving) as port, way_out(allow, resolve=resolver("127.0.0.1")) as out:
        reader, writer, _ = await out.connect(f"tls.example:{port}")
        await writer.start_tls(trusting, server_hostname="tls.example")
        writer.write(b"secret")
        await out.guest.thaw()
        assert await asyncio.wait_for(reader.readexactly(6), 5) == b"secret"
        writer.close()


async def test_real_clients_go_through(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "tls.example")
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving.load_cert_chain(cert, key)

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            text = head.split(b" ")[1]
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
            await writer.drain()

    async with (
        server(origin, "127.0.0.2") as plain,
        server(origin, "127.0.0.2", serving) as secure,
        way_out([f"127.0.0.2:{plain}", f"127.0.0.2:{secure}"]) as out,
    ):
        proxy = f"http://127.0.0.1:{out.guest.port}"
        trusting = ssl.create_default_context(cafile=cert)
        async with httpx2.AsyncClient(proxy=proxy, verify=trusting, trust_env=False) as client:
            for n in range(3):
                assert (await client.get(f"http://127.0.0.2:{plain}/{n}")).text == f"/{n}"
                assert (await client.get(f"https://127.0.0.2:{secure}/{n}")).text == f"/{n}"
            with pytest.raises(httpx2.ProxyError, match=r"--allow api\.example"):
                await client.get("https://api.example/")
            refused = await client.get("http://api.example/")
            assert refused.status_code == 403 and "--allow api.example" in refused.text
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.2:{plain}/a", proxy=proxy) as answer:
                assert await answer.text() == "/a"
            async with session.get(f"https://127.0.0.2:{secure}/a", proxy=proxy, ssl=trusting) as answer:
                assert await answer.text() == "/a"
