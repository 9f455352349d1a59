"""Freezing and thawing a real guestd over and over: nothing is lost, nothing comes twice."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from link_fixtures import Guest, guest, until

from rethaw.channel import frames
from rethaw.model.errors import ChannelBroken, Conflict, QuiesceTimeout, Unavailable
from rethaw.node.link import Hello, Link, open_pipes
from rethaw.node.link_stream import Stream


def expand(body: bytes) -> bytes:
    """The answer to a request: a deterministic stream of up to 300 KB."""
    seed = hashlib.sha256(body).digest()
    return random.Random(seed).randbytes(int.from_bytes(seed[:3], "big") % 300_000)


class Model:
    """A provider with a memory, as gateway and log have one: what was accepted is answered from where the guest is."""

    def __init__(self, seed: int) -> None:
        self.bodies: dict[str, bytes] = {}
        self.served = 0
        self.random = random.Random(seed)

    async def serve(self, stream: Stream) -> None:
        if stream.exchange is None:
            body = await stream.read_all(1 << 24)
            name = f"x_{stream.meta['guest_id']}"
            assert self.bodies.setdefault(name, body) == body
            await self.pause()
            await stream.accept(name)
        assert stream.exchange is not None
        answer = expand(self.bodies[stream.exchange])
        if not stream.head_received:
            length = [("content-length", str(len(answer)))] if len(answer) % 2 else []
            await stream.head(200, "OK", length)
        while stream.received < len(answer):
            await stream.write(answer[stream.received : stream.received + self.random.randrange(1, 60_000)])
            await self.pause()
        await stream.end()
        self.served += 1

    async def pause(self) -> None:
        if self.random.random() < 0.3:
            await asyncio.sleep(self.random.random() * 0.004)


AGENT = """
import hashlib, http.client, os, random, sys, threading
from rethaw.guest.context import Context
port, seed = int(sys.argv[1]), int(sys.argv[2])
running = lambda: not os.path.exists('stop')
def expand(body):
    seed = hashlib.sha256(body).digest()
    return random.Random(seed).randbytes(int.from_bytes(seed[:3], "big") % 300_000)
bad = []
def client(n):
    r = random.Random(seed * 100 + n)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    i = 0
    while running():
        body = r.randbytes(r.choice((10, 1000, 70_000, 250_000)))
        connection.request("POST", "/scripted/v1/x", body)
        answer = connection.getresponse()
        if answer.read() != expand(body):
            bad.append(n)
        os.write(1, (f"{n}:{i}:" + "o" * r.randrange(2000) + "\\n").encode())
        i += 1
def caller(n):
    c = Context()
    i = 0
    while running():
        c.emit("tick", n=n, i=i)
        i += 1
threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
threads += [threading.Thread(target=caller, args=(n,)) for n in range(3)]
for t in threads: t.start()
for t in threads: t.join()
print("bad", bad, flush=True)
"""


@pytest.mark.parametrize("seed", [1, 2])
async def test_hundreds_of_thaws_under_load(seed: int) -> None:
    """Requests and answers byte-exact, output without a gap (the fixture checks), no call lost or made twice."""
    model = Model(seed)
    async with guest() as g:
        g.exchange = model.serve
        await g.start(sys.executable, "-c", AGENT, str(g.port), str(seed))
        for n in range(300):
            await g.thaw(f"g-{n // 10}")
            await asyncio.sleep(model.random.random() * 0.01)
            assert not g.link.closed.done(), g.link.closed.result()
        (g.directory / "stop").touch()
        assert await asyncio.wait_for(g.exit, 20) == {"code": 0, "signal": None}
        lines = g.output["stdout"].decode().splitlines()
        assert lines[-1] == "bad []"
        _gapless([(int(n), int(i)) for n, i, _ in (line.split(":") for line in lines[:-1])], 6)
        _gapless([(b["data"]["n"], b["data"]["i"]) for b in g.ops("emit")], 3)
        assert len(model.bodies) == len(lines) - 1


def _gapless(pairs: list[tuple[int, int]], clients: int) -> None:
    """Each client counted from 0 without a gap or repetition, and got somewhere."""
    for client in range(clients):
        counts = [i for n, i in pairs if n == client]
        assert sorted(counts) == list(range(len(counts)))
        assert len(counts) > 3


async def test_output_offsets_are_exact_over_100_thaws() -> None:
    async with guest() as g:
        await g.start_python("for i in range(120_000): print(i)")
        for _ in range(100):
            if not g.exit.done():
                await g.thaw()
        await asyncio.wait_for(g.exit, 20)
        assert g.output["stdout"] == "".join(f"{i}\n" for i in range(120_000)).encode()


async def test_what_was_said_before_the_freeze_is_in_guest_memory() -> None:
    """accept, head and data that were written before quiesce are named by `quiet` and by the next hello."""
    seen: list[tuple[str | None, bool, int]] = []
    wrote = asyncio.Event()

    async def serve(stream: Stream) -> None:
        seen.append((stream.exchange, stream.head_received, stream.received))
        if stream.exchange is None:
            await stream.read_all(1000)
            await stream.accept("x_1")
            await stream.head(200, "OK", [])
            await stream.write(b"hello")
            wrote.set()
        else:
            await stream.write(b" world")
            await stream.end()
            return
        await asyncio.Event().wait()

    async with guest() as g:
        g.exchange = serve
        await g.start("curl", "-s", "-d", "q", f"{g.url}/scripted/x")
        await wrote.wait()
        quiet = await g.link.quiesce()
        assert quiet.exchanges == {"x_1": (True, 5)}
        hello = await g.link.go("g-1")
        assert hello.exchanges == ("x_1",)
        await asyncio.wait_for(g.exit, 10)
        assert g.output["stdout"] == b"hello world"
        assert seen == [(None, False, 0), ("x_1", True, 5)]


async def test_a_cancelled_handler_may_still_say_what_it_did() -> None:
    """An append that ends during the cancellation: its ack reaches the guest before it falls quiet."""
    bases: list[int] = []

    async with guest() as g:

        async def slow(stream: Stream) -> None:
            if stream.kind != "stdout":
                return await Guest.on_stream(g, stream)
            bases.append(stream.base)
            data = await stream.read()
            try:
                await asyncio.sleep(100)
            finally:
                await asyncio.sleep(0.02)
                await stream.ack(stream.base + len(data or b""))

        g.link._on_stream = slow  # type: ignore[assignment]
        await g.start("sh", "-c", "echo hello; exec sleep 1000")
        await until(lambda: bases)
        await asyncio.sleep(0.05)
        await g.thaw()
        await until(lambda: len(bases) == 2)
        assert bases == [0, 6]


async def test_garbage_before_the_marker() -> None:
    """Whatever an older life left in the pipe, split anywhere, with pieces of the marker in it."""
    rng = random.Random(5)
    async with guest() as g:
        await g.start("sh", "-c", "while :; do echo x; done")
        for n in range(40):
            await g.link.quiesce()
            marker = g.link._marker
            garbage = rng.choice(
                [
                    b"",
                    rng.randbytes(rng.randrange(100_000)),
                    marker[:-1] * 3,
                    marker[: rng.randrange(32)] + frames.encode_control({"type": "go", "generation": "wrong"}),
                    frames.encode(frames.RESET, 1, 0, b"stale"),
                    frames.encode(frames.DATA, 1, 0, b"half")[:9],
                ]
            )
            if (garbage + marker).find(marker) < len(garbage):
                garbage = b""  # one marker in 256 ends as it begins: three of them without their ends hold a whole one
            for at in range(0, len(garbage), 5000):
                g.link._writer.write(garbage[at : at + 5000])
                await g.link._writer.drain()
            hello = await g.link.go(f"g-{n}")
            assert hello.generation == f"g-{n}"
            assert (g.directory / "generation").read_text() == f"g-{n}\n"
            assert await g.link.ping() < 5


async def test_a_marker_in_small_pieces() -> None:
    async with guest() as g:
        await g.start("sleep", "1000")
        await g.link.quiesce()
        marker, g.link._marker = g.link._marker, b""
        for byte in os.urandom(100) + marker[:20] + marker:
            g.link._writer.write(bytes([byte]))
            await asyncio.sleep(0.0005)
        assert (await g.link.go("g-1")).generation == "g-1"


async def test_a_quiet_guest_stays_quiet() -> None:
    """No go: not a byte comes, whatever the agent, its clients and the pipe's other end do."""
    async with guest() as g:
        await g.start("sh", "-c", "while :; do echo x; done")
        await until(lambda: len(g.output["stdout"]) > 100_000)
        await g.link.quiesce()
        got: list[frames.Frame] = []
        g.link._dispatch = got.append  # type: ignore[method-assign,assignment]
        g.link._writer.write(frames.encode_control({"type": "ping", "n": 1}))
        _, writer = await asyncio.open_connection("127.0.0.1", g.port)
        writer.write(b"GET /scripted/x HTTP/1.1\r\nHost: h\r\n\r\n")
        await asyncio.sleep(0.5)
        assert got == []
        del g.link._dispatch
        await g.link.go("g-1")
        before = len(g.output["stdout"])
        await until(lambda: len(g.output["stdout"]) > before)
        writer.close()


async def test_resume_on_a_new_link_with_the_marker_of_the_snapshot() -> None:
    """What a restore does, with the same process in place of a restored one."""
    async with guest() as g:
        os.mkfifo(g.directory / "gate")
        await g.start("sh", "-c", "echo one; read x < gate; echo two")
        await until(lambda: g.output["stdout"] == b"one\n")
        quiet = await g.link.quiesce()
        reader, writer = g.link._reader, g.link._writer
        g.link._read_task.cancel()
        g.link._pump_task.cancel()
        await asyncio.gather(g.link._read_task, g.link._pump_task, return_exceptions=True)
        g.link = Link(reader, writer, g.on_stream, g.malformed.append, g.hellos.append)
        hello = await g.link.resume(quiet.marker, "g-restored")
        assert (hello.generation, hello.streams, hello.exited) == ("g-restored", 2, False)
        await asyncio.to_thread((g.directory / "gate").write_text, "\n")
        await asyncio.wait_for(g.exit, 10)
        assert g.output["stdout"] == b"one\ntwo\n"


async def test_a_stopped_guest_times_out_and_runs_on() -> None:
    async with guest() as g:
        await g.start("sh", "-c", "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo $i; sleep 0.005; done")
        await until(lambda: g.output["stdout"])
        g.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(QuiesceTimeout, match=r"did not answer within 0\.3 s"):
            await g.link.quiesce(0.3)
        assert time.monotonic() - began < 2
        with pytest.raises(QuiesceTimeout, match="has not come back"):
            await g.link.quiesce(0.1)
        g.process.send_signal(signal.SIGCONT)
        assert await g.link.ping(5) < 5
        assert len(g.hellos) == 2
        assert g.hellos[1].generation == "g-0"
        await g.thaw("g-1")
        await asyncio.wait_for(g.exit, 20)
        assert g.output["stdout"] == "".join(f"{i}\n" for i in range(1, 301)).encode()


async def test_a_handler_that_is_slow_to_end_times_out_and_never_meets_its_successor() -> None:
    running = 0
    most = 0
    entered = 0

    async with guest() as g:

        async def stubborn(stream: Any) -> None:
            nonlocal running, most, entered
            running += 1
            entered += 1
            most = max(most, running)
            try:
                await asyncio.sleep(100)
            finally:
                await asyncio.sleep(0.5)
                running -= 1

        g.link._on_stream = stubborn
        await g.start("sleep", "1000")
        await until(lambda: entered == 2)
        with pytest.raises(QuiesceTimeout, match="could not be reached"):
            await g.link.quiesce(0.1)
        await until(lambda: entered == 4)
        assert most == 2


async def test_a_cancelled_quiesce_lets_the_guest_run_on() -> None:
    async with guest() as g:
        await g.start("sleep", "1000")
        g.process.send_signal(signal.SIGSTOP)
        task = asyncio.create_task(g.link.quiesce(30))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        g.process.send_signal(signal.SIGCONT)
        assert await g.link.ping() < 5
        await g.thaw()


async def test_ping_waits_for_a_frozen_guest_untimed() -> None:
    async with guest() as g:
        await g.start("sleep", "1000")
        await g.link.quiesce()
        ping = asyncio.create_task(g.link.ping(0.05))
        await asyncio.sleep(0.3)
        assert not ping.done()
        await g.link.go("g-1")
        assert await ping < 0.05
        g.process.send_signal(signal.SIGSTOP)
        with pytest.raises(Unavailable, match="did not answer a ping"):
            await g.link.ping(0.1)
        g.process.send_signal(signal.SIGCONT)


async def test_states_are_checked() -> None:
    async with guest() as g:
        with pytest.raises(Conflict, match="new, not running"):
            await g.link.quiesce()
        await g.start("sleep", "1000")
        with pytest.raises(Conflict, match="running, not quiet"):
            await g.link.go("g-1")
        await g.link.quiesce()
        with pytest.raises(Conflict, match="quiet, not running"):
            await g.link.quiesce()
        await g.link.go("g-1")


async def test_former_streams_are_dead() -> None:
    streams: list[Stream] = []
    async with guest() as g:

        async def keep(stream: Stream) -> None:
            streams.append(stream)
            await asyncio.Event().wait()

        g.exchange = keep
        await g.start("curl", "-s", "-d", "q", f"{g.url}/scripted/x")
        await until(lambda: streams)
        await g.thaw()
        for use in (streams[0].read(), streams[0].write(b"x"), streams[0].head(200, "", []), streams[0].end()):
            with pytest.raises(ChannelBroken, match="being frozen"):
                await use
        await until(lambda: len(streams) == 2)
        await streams[1].reset("enough")
        assert (await asyncio.wait_for(g.exit, 10))["code"] in (52, 56)  # curl: empty reply, or connection reset


# ---------------------------------------------------------------- malformed, both ways

HELLO = {"type": "hello", "generation": "g", "streams": [], "pid": 1, "exited": False}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"Traceback (most recent call last):\n", "first byte is 0x54"),
        (frames.encode(frames.DATA, 9, 0, b"x"), "no stream 9"),
        (frames.encode(frames.OPEN, 1, 0, b"{"), "malformed open"),
        (frames.encode(frames.OPEN, 1, 0, b'{"kind":"shell"}'), "malformed open of stream 1"),
        (frames.encode(frames.OPEN, 1, 0, b'{"kind":"call","received":-1}'), "malformed open of stream 1"),
        (frames.encode(frames.OPEN, 1, 0, b'{"kind":"call","meta":[]}'), "malformed open of stream 1"),
        (frames.encode_json(frames.OPEN, 1, {"kind": "call"}) * 2, "was open before"),
        (frames.encode_json(frames.OPEN, 1, {"kind": "call"}) + frames.encode(frames.HEAD, 1, 0, b"{}"), "does not send head"),
        (frames.encode_json(frames.OPEN, 1, {"kind": "call"}) + frames.encode(frames.DATA, 1, 5, b"x"), "expected 0"),
        (frames.encode_json(frames.OPEN, 1, {"kind": "call"}) + frames.encode(frames.CREDIT, 1, 1 << 40), "credit up to"),
        (frames.encode_json(frames.OPEN, 1, {"kind": "call"}) + b"".join(frames.encode(frames.DATA, 1, i << 16, b"x" * 65536) for i in range(9)), "allowed up to"),
        (b"".join(frames.encode_json(frames.OPEN, i, {"kind": "call"}) for i in range(1, 2051)), "more than 2048 streams"),
        (frames.encode_control({"type": "start"}), "does not send 'start'"),
        (frames.encode_control({"type": "hello", "generation": "other", "streams": []}), "malformed hello"),
        (frames.encode_control({**HELLO, "streams": ["x"]}), "malformed hello"),
        (frames.encode_control({"type": "left", "exchange": 5, "taken": 0}), "exchanges that were left"),
        (frames.encode_control({"type": "left", "exchange": "x", "taken": -1}), "exchanges that were left"),
    ],
)  # fmt: skip
async def test_a_guest_that_lies_ends_its_own_channel_only(said: bytes, why: str) -> None:
    down_read, down_write = os.pipe()
    up_read, up_write = os.pipe()
    reader, writer = await open_pipes(up_read, down_write)
    malformed: list[str] = []

    async def never(stream: Any) -> None:
        await asyncio.Event().wait()

    link = Link(reader, writer, never, malformed.append)
    try:
        start = asyncio.create_task(link.start({"generation": "g"}))
        await asyncio.sleep(0)
        good = frames.encode_control(HELLO)
        await asyncio.to_thread(_write_all, up_write, good + said)
        assert why in str(await asyncio.wait_for(asyncio.shield(link.closed), 5))
        assert len(malformed) == 1
        assert isinstance((await asyncio.gather(start, return_exceptions=True))[0], Hello | ChannelBroken)
        with pytest.raises(ChannelBroken):
            await link.ping()
    finally:
        await link.close()
        for fd in (down_read, up_write):
            os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(fd, data) :]
    except BrokenPipeError:
        pass


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"\x00" * 20, "first byte is 0x00"),
        (frames.encode(frames.DATA, 99, 0, b"x"), "no stream 99 yet"),
        (frames.encode(frames.HEAD, 1, 0, b"{}"), "a stdout stream has no head"),
        (frames.encode(frames.OPEN, 1, 0, b"{}"), "does not send open"),
        (frames.encode(frames.ACK, 1, 1 << 30), "acknowledged, only"),
        (frames.encode_control({"type": "dance"}), "'dance' is not expected"),
        (frames.encode_control({"type": "start"}), "'start' is not expected"),
        (frames.encode_control({"type": "quiesce", "marker": "00"}), "the marker is '00'"),
        (frames.encode_control({"type": "signal", "sig": "x"}), "malformed message"),
        (frames.encode_control({"type": "quiesce", "marker": "ab" * 16}) + b"\xab" * 16 + b"\x00" * 18, "first byte is 0x00"),
        (frames.encode_control({"type": "quiesce", "marker": "ab" * 16}) + b"\xab" * 16 + frames.encode(frames.ACK, 1, 0), "is not go"),
        (frames.encode_control({"type": "quiesce", "marker": "ab" * 16}) + b"\xab" * 16 + frames.encode_control({"type": "go"}), "the generation is None"),
    ],
)  # fmt: skip
async def test_a_node_that_talks_nonsense_ends_guestd_with_one_line(said: bytes, why: str) -> None:
    async with guest() as g:
        hello = await g.start("sleep", "1000")
        g.link._writer.write(said)
        assert await asyncio.to_thread(g.process.wait, 5) == 70
        assert why in g.log()
        assert g.log().count("\n") == 1
        await until(lambda: not Path(f"/proc/{hello.pid}/exe").exists())
