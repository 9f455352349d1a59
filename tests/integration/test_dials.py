"""Connections and programs that the node asks a real guestd for, over a real Link."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from egress_fixtures import echo, pattern, server
from link_fixtures import Guest, guest, until

from rethaw.model.dialing import PYTHON
from rethaw.model.errors import ChannelBroken, Conflict, InvalidInput, NotFound, PortClosed, QuiesceTimeout, Unavailable
from rethaw.node import dials as dials_module
from rethaw.node.dialing import Program
from rethaw.node.dials import Dial, Dials


class Inside:
    """A guest and the Dials of its life. `restore` begins a new life."""

    def __init__(self, g: Guest) -> None:
        self.guest = g
        self.actives = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.dials = Dials(g.link.dial, self)
        plain, former = g.on_stream, g.link._on_hello

        async def on_stream(stream: Any) -> None:
            await (self.dials.handle(stream) if stream.kind == "dial" else plain(stream))

        def hello(said: Any) -> None:
            self.dials.hello(said.dials, said.can_dial)
            assert former is not None
            former(said)

        g.link._on_stream, g.link._on_hello = on_stream, hello

    def active(self) -> None:
        self.actives += 1

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def restore(self) -> None:
        await self.guest.link.quiesce(10.0)
        self.dials.close("the sandbox is gone")
        self.dials = Dials(self.guest.link.dial, self)
        await self.guest.link.go(f"{self.guest.hellos[-1].generation}+")

    async def run(self, *command: str, **more: Any) -> Program:
        return Program(await self.dials.open("exec", command=list(command), **more))

    async def freezing(self, dice: random.Random) -> None:
        while True:
            with contextlib.suppress(QuiesceTimeout):
                if dice.random() < 0.3:  # given up half-way
                    await self.guest.link.quiesce(dice.random() * 0.002)
                    await self.guest.link.go(self.guest.hellos[-1].generation)
            await self.guest.thaw()
            await asyncio.sleep(dice.random() * 0.01)

    @asynccontextmanager
    async def frozen_often(self, seed: int) -> AsyncIterator[None]:
        task = asyncio.create_task(self.freezing(random.Random(seed)))
        before = len(self.guest.hellos)
        try:
            yield
            await until(lambda: len(self.guest.hellos) - before >= 20)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def inside() -> AsyncIterator[Inside]:
    async with guest() as g:
        made = Inside(g)
        await g.start("sleep", "1000", env={"GREETING": "hello"})
        try:
            yield made
        finally:
            await g.link.close()
            made.dials.close("over")


async def everything(dial: Dial) -> bytes:
    out = b""
    while (data := await asyncio.wait_for(dial.read(), 30)) is not None:
        out += data
    return out


async def output(program: Program) -> tuple[bytes, bytes, int]:
    out = {"stdout": b"", "stderr": b""}
    while (got := await asyncio.wait_for(program.read(), 30)) is not None:
        out[got[0]] += got[1]
    return out["stdout"], out["stderr"], (await program.wait())[0]


async def talk(dial: Dial, sent: bytes, dice: random.Random) -> bytes:
    async def send() -> None:
        at = 0
        while at < len(sent):
            size = dice.randrange(1, 70_000)
            await dial.write(sent[at : at + size])
            at += size
        dial.end()

    task = asyncio.create_task(send())
    got = await everything(dial)
    await task
    return got


# ---------------------------------------------------------------- ports


async def test_bytes_pass_both_ways_and_each_direction_ends_by_itself() -> None:
    async with server(echo) as port, inside() as box:
        dial = await box.dials.open("port", port=port)
        sent = pattern(2_000_000, 1)
        assert await talk(dial, sent, random.Random(1)) == sent
        await until(lambda: not box.dials._dials)
        assert box.actives and box.dials.served


@pytest.mark.parametrize("seed", [1, 2])
async def test_no_byte_is_lost_or_doubled_over_many_saves(seed: int) -> None:
    dice = random.Random(seed)

    async def one(n: int) -> None:
        sent = pattern([1, 1000, 400_000, 3_000_000][n % 4], n)
        assert await talk(await box.dials.open("port", port=port), sent, dice) == sent

    async with server(echo) as port, inside() as box:
        async with box.frozen_often(seed):
            for _ in range(2):
                await asyncio.gather(*(one(n) for n in range(8)))
        await box.guest.thaw()
        await until(lambda: not box.dials._dials)


async def test_an_ipv6_server_is_found_and_a_closed_port_is_told() -> None:
    async with server(echo, "::1") as port, inside() as box:
        assert await talk(await box.dials.open("port", port=port), b"six", random.Random(1)) == b"six"
        with pytest.raises(
            PortClosed, match=f"nothing listens on port {port + 1 if port < 65535 else 1} in the sandbox"
        ):
            await box.dials.open("port", port=port + 1 if port < 65535 else 1)
        await until(lambda: not box.dials._dials and not box.guest.link._streams.keys() - {1, 2})


async def test_what_a_program_said_before_it_broke_the_connection_arrives() -> None:
    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"too large")
        await writer.drain()
        await asyncio.sleep(0.05)
        import socket
        import struct

        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with server(rude) as port, inside() as box:
        dial = await box.dials.open("port", port=port)
        await dial.write(b"x" * 100)
        assert await dial.read() == b"too large"
        with pytest.raises(ChannelBroken, match="closed the connection"):
            await asyncio.wait_for(dial.read(), 10)


async def test_a_client_that_leaves_resets_the_connection_inside() -> None:
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            ended.set_result(f"end after {await reader.read()!r}")
        except ConnectionResetError:
            ended.set_result("reset")

    async with server(wait) as port, inside() as box:
        dial = await box.dials.open("port", port=port)
        await box.guest.link.quiesce(10.0)
        dial.close()  # while it is frozen: told at the thaw
        await box.guest.link.go("g-0")
        assert await asyncio.wait_for(ended, 10) == "reset"
        await until(lambda: not box.dials._dials)


async def test_a_new_life_resets_both_sides_and_takes_new_connections() -> None:
    ended: list[str] = []

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(100):
                writer.write(data)
            ended.append("end")
        except ConnectionResetError:
            ended.append("reset")

    async with server(wait) as port, inside() as box:
        for generation in range(3):
            dial = await box.dials.open("port", port=port)
            await dial.write(b"there")
            assert await dial.read() == b"there"
            await box.restore()
            with pytest.raises(ChannelBroken, match="the sandbox is gone"):
                await dial.read()
            await until(lambda n=generation: ended == ["reset"] * (n + 1))


async def test_a_dial_is_not_said_to_a_quiet_guest_and_is_done_once_after_it() -> None:
    async with server(echo) as port, inside() as box:
        await box.guest.link.quiesce(10.0)
        opening = asyncio.create_task(box.dials.open("port", port=port))
        await asyncio.sleep(0)
        assert not opening.done() and box.dials.idle_since(0.0) is None
        await box.guest.link.go("g-0")
        assert await talk(await asyncio.wait_for(opening, 10), b"x", random.Random(1)) == b"x"


async def test_a_silent_connection_does_not_keep_awake_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async with server(echo) as port, inside() as box:
        assert box.dials.idle_since(5.0) == 5.0
        dial = await box.dials.open("port", port=port)
        ahead = box.dials.idle_since(5.0)
        assert ahead is not None and ahead == box.dials.moved + dials_module.QUIET_S
        dial.close()
        await until(lambda: box.dials.idle_since(5.0) == 5.0)


async def test_limits_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    async with server(echo) as port, inside() as box:
        held = [await box.dials.open("port", port=port) for _ in range(dials_module.MOST)]
        with pytest.raises(Unavailable, match="256 connections into the session are open"):
            await box.dials.open("port", port=port)
        monkeypatch.setattr(dials_module, "MOST", 1000)
        with pytest.raises(Unavailable, match="which is the limit"):  # the guest's own
            await box.dials.open("port", port=port)
        held[0].close()
        await until(lambda: len(box.dials._dials) == 255)
        assert await talk(await box.dials.open("port", port=port), b"x", random.Random(1)) == b"x"


async def test_a_guest_that_lies_is_not_believed() -> None:
    async with inside() as box:
        box.dials.hello((), can_dial=False)
        with pytest.raises(Conflict, match="frozen by an older Rethaw"):
            await box.dials.open("port", port=1)
        said: list[str] = []

        class Lying:
            id, meta, hung_up, base, received = 900, {"id": "d_nobody"}, False, 0, 0

            async def reset(self, why: str) -> None:
                said.append(why)

        await box.dials.handle(Lying())  # pyright: ignore[reportArgumentType]
        assert said == ["nobody asked for it"]
        dial = Dial({"id": "d_1", "kind": "port"})
        box.dials._dials["d_1"] = dial
        Lying.meta, Lying.received = {"id": "d_1"}, 7
        await box.dials.handle(Lying())  # pyright: ignore[reportArgumentType]
        assert said[1] == "the guest has 7 bytes, which it was not sent"
        with pytest.raises(ChannelBroken, match="which it was not sent"):
            await dial.read()


# ---------------------------------------------------------------- programs


async def test_streams_apart_exit_code_environment_and_directory() -> None:
    async with inside() as box:
        code = "echo $GREETING $MORE; pwd; echo wrong >&2; read line; echo got $line; exit 7"
        program = await box.run("sh", "-c", code, env={"MORE": "there"}, input=True)
        await program.write(b"some input\n")
        out, err, status = await output(program)
        assert out.decode() == f"hello there\n{box.guest.directory}\ngot some input\n"
        assert (err, status) == (b"wrong\n", 7)
        assert await output(await box.run("cat")) == (b"", b"", 0)  # no input
        assert (await output(await box.run("sh", "-c", "kill -9 $$")))[2] == 137
        assert (await output(await box.run(PYTHON, "-c", "import sys; print(sys.version)", workdir="/")))[0]
        await until(lambda: not box.dials._dials and not box.guest.link._streams.keys() - {1, 2})
        with pytest.raises(NotFound, match="command 'nosuch'"):
            await box.run("nosuch")
        with pytest.raises(InvalidInput, match="working directory '/nosuch'"):
            await box.run("true", workdir="/nosuch")


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_program_goes_on_through_saves_byte_exact(seed: int) -> None:
    async with inside() as box:
        sent = pattern(3_000_000, seed)
        async with box.frozen_often(seed):
            program = await box.run("sh", "-c", "tee /dev/stderr; exit 3", input=True)

            async def feed() -> None:
                await program.write(sent)
                program.end_input()

            task = asyncio.create_task(feed())
            assert await output(program) == (sent, sent, 3)
            await task


async def test_a_program_that_is_not_read_waits_and_keeps_nothing_else_waiting() -> None:
    async with inside() as box:
        flood = await box.run("sh", "-c", "yes | head -c 5000000; exit 4")
        assert await output(await box.run("echo", "beside")) == (b"beside\n", b"", 0)
        out, _, status = await output(flood)
        assert (len(out), status) == (5_000_000, 4)


async def test_a_terminal_has_a_size_and_ctrl_c() -> None:
    async with inside() as box:
        program = await box.run("sh", "-c", "stty size; trap 'echo caught; stty size; exit 5' INT; echo ready; while :; do sleep 0.1; done", terminal=[100, 30])  # fmt: skip
        seen = b""
        while b"ready" not in seen:
            got = await asyncio.wait_for(program.read(), 10)
            assert got is not None and got[0] == "stdout"
            seen += got[1]
        assert b"30 100" in seen
        program.resize(70, 20)
        await program.write(b"\x03")
        out, err, status = await output(program)
        assert b"caught" in out and b"20 70" in out and (err, status) == (b"", 5)


async def test_who_leaves_hangs_up_and_what_a_restore_cuts_off_goes_on() -> None:
    async with inside() as box:
        directory = box.guest.directory
        code = "trap 'echo hup > %s; exit' HUP; echo ready; for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.1; echo $i; done; echo done > %s"  # fmt: skip
        left, kept, read = (directory / name for name in ("left", "kept", "read"))
        one = await box.run("sh", "-c", code % (left, left))
        assert await one.read() == ("stdout", b"ready\n")
        await one.close()
        await until(lambda: left.exists() and left.read_text() == "hup\n")
        two = await box.run("sh", "-c", code % (kept, kept))
        three = await box.run(
            "sh", "-c", code % (read, read), input=True
        )  # its input is cut off: it must not take it for whole
        assert await two.read() == await three.read() == ("stdout", b"ready\n")
        await box.restore()
        assert (await output(two))[2] == 70 and "the sandbox is gone" in (await two.wait())[1]
        await until(lambda: kept.exists() and kept.read_text() == "done\n")
        await until(lambda: read.exists() and read.read_text() == "hup\n")
        assert await output(await box.run("echo", "new")) == (b"new\n", b"", 0)


async def test_a_program_beside_it_does_not_hold_up_the_exit_of_the_agent() -> None:
    async with guest() as g:
        box = Inside(g)
        await g.start(sys.executable, "-c", "import sys; sys.stdin.read()")
        program = await box.run("sleep", "1000")
        await asyncio.wait_for(g.exit, 10)
        assert g.exit.result()["code"] == 0
        await program.close()
        box.dials.close("over")
