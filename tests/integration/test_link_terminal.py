"""What is typed, under a real guestd: a terminal or a pipe as the program's stdin, over freezes."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import pytest
from link_fixtures import Guest, guest, until

from rethaw.node.link_stream import Stream


class Typist:
    """Types into a guest's stdin stream, over freezes. `sent`: how much the guest has been given."""

    def __init__(self, g: Guest) -> None:
        self.data = bytearray()
        self.ended = False
        self.opened = 0
        self._more = asyncio.Event()
        self._plain = g.on_stream
        g.link._on_stream = self.on_stream

    def type(self, data: bytes) -> None:
        self.data += data
        self._more.set()

    def end(self) -> None:
        self.ended = True
        self._more.set()

    async def on_stream(self, stream: Any) -> None:
        if stream.kind != "stdin":
            await self._plain(stream)
            return
        assert isinstance(stream, Stream)
        self.opened += 1
        while True:
            self._more.clear()
            if stream.received < len(self.data):
                await stream.write(bytes(self.data[stream.received :]))
            elif self.ended:
                if not stream.meta["ended"]:
                    await stream.end()
                return
            else:
                await self._more.wait()


def stdout(g: Guest) -> str:
    return g.output["stdout"].decode()


async def test_a_pipe_is_given_whole_and_ends() -> None:
    async with guest() as g:
        typist = Typist(g)
        await g.start("cat", stdin=True)
        data = os.urandom(1 << 20)
        typist.type(data)
        typist.end()
        assert await asyncio.wait_for(g.exit, 20) == {"code": 0, "signal": None}
        assert g.output["stdout"] == data


async def test_a_pipe_goes_on_over_freezes_that_come_at_any_moment() -> None:
    async with guest() as g:
        typist = Typist(g)
        await g.start_python(
            "import sys,time\nfor line in sys.stdin: sys.stdout.write(line); sys.stdout.flush(); time.sleep(0.0005)",
            stdin=True,
        )
        text = "".join(f"line {n}\n" for n in range(3000))
        for part in range(10):
            typist.type(text[part * len(text) // 10 : (part + 1) * len(text) // 10].encode())
            await g.thaw(f"g-{part}")
        typist.end()
        assert (await asyncio.wait_for(g.exit, 30))["code"] == 0
        assert stdout(g) == text
        assert typist.opened >= 10


async def test_input_for_a_program_that_reads_none_holds_up_nothing() -> None:
    async with guest() as g:
        typist = Typist(g)
        await g.start("sh", "-c", "read first; echo $first; sleep 0.3; exec 0<&-; echo closed; sleep 1000", stdin=True)
        typist.type(b"one\n" + b"x" * (1 << 20))
        await until(lambda: "one" in stdout(g))
        assert await g.link.ping() < 1.0
        await until(lambda: "closed" in stdout(g))
        await g.thaw("g-1")
        assert await g.link.ping() < 1.0


async def test_without_either_stdin_is_empty() -> None:
    async with guest() as g:
        await g.start("cat")
        assert (await asyncio.wait_for(g.exit, 10))["code"] == 0


WORLD = """
import os, sys
fds = [os.isatty(n) for n in (0, 1, 2)]
print(fds, os.ttyname(0) == os.ttyname(2), os.tcgetpgrp(0) == os.getpgrp(), os.getsid(0) == os.getpid(),
      tuple(os.get_terminal_size()), os.open("/dev/tty", os.O_RDWR) > 2, len(os.listdir("/proc/self/fd")))
"""


async def test_the_terminal_is_the_programs_own() -> None:
    async with guest() as g:
        hello = await g.start_python(WORLD, terminal={"rows": 30, "cols": 100})
        assert (await asyncio.wait_for(g.exit, 10))["code"] == 0
        assert stdout(g) == "[True, True, True] True True True (100, 30) True 5\r\n"
        assert hello.size is not None and (hello.size.rows, hello.size.cols, hello.size.offset) == (30, 100, 0)


async def test_a_terminal_over_freezes() -> None:
    async with guest() as g:
        typist = Typist(g)
        resized: list[Any] = []
        g.link._on_resized = resized.append
        await g.start("sh", "-i", terminal={"rows": 24, "cols": 80}, env={"PS1": "$ ", "ENV": ""})
        await until(lambda: stdout(g).endswith("$ "))
        typist.type(b"x=before; sh -c 'echo asleep; exec sleep 1000'\n")
        await until(lambda: "\r\nasleep\r\n" in stdout(g))
        await g.thaw("g-1")
        typist.type(b"\x03")  # the sleep, not the shell
        await until(lambda: "^C" in stdout(g) and stdout(g).endswith("$ "))
        await g.thaw("g-2")
        typist.type(b"echo $x-after; trap 'echo new size' WINCH; stty size\n")
        await until(lambda: "before-after\r\n24 80\r\n$ " in stdout(g))
        await g.link.resize(50, 132)
        await until(lambda: resized)
        assert (resized[0].rows, resized[0].cols) == (50, 132)
        assert resized[0].offset <= len(g.output["stdout"])
        typist.type(b"stty size\n")
        await until(lambda: "new size\r\n" in stdout(g) and "50 132\r\n" in stdout(g))
        await g.thaw("g-3")
        size = g.hellos[-1].size
        assert size is not None and (size.rows, size.cols, size.offset) == (50, 132, resized[0].offset)
        typist.type(b"exit 3\n")
        assert (await asyncio.wait_for(g.exit, 10))["code"] == 3


RAW = """
import os, sys, tty, hashlib
tty.setraw(0)
print("ready", flush=True)
want, got = int(sys.argv[1]), b""
while len(got) < want:
    got += os.read(0, 65536)
print(hashlib.sha256(got).hexdigest())
"""


@pytest.mark.parametrize("raw", [True, False])
async def test_a_large_paste_loses_nothing_and_blocks_nothing(raw: bool) -> None:
    async with guest() as g:
        typist = Typist(g)
        lines = b"".join(b"%07d %s\n" % (n, b"x" * 91) for n in range(10486))
        data = os.urandom(len(lines)) if raw else lines
        if raw:
            code = [sys.executable, "-c", RAW, str(len(data))]
        else:
            code = ["sh", "-c", "stty -echo; echo ready; cat > pasted"]
        await g.start(*code, terminal={"rows": 24, "cols": 80})
        await until(lambda: "ready" in stdout(g))
        typist.type(data)
        assert await g.link.ping() < 1.0
        await g.thaw("g-1")
        if raw:
            import hashlib

            assert (await asyncio.wait_for(g.exit, 60))["code"] == 0
            assert hashlib.sha256(data).hexdigest() in stdout(g)
        else:
            typist.type(b"\x04")
            assert (await asyncio.wait_for(g.exit, 60))["code"] == 0
            assert (g.directory / "pasted").read_bytes() == data


async def test_the_last_output_of_a_terminal_is_not_lost() -> None:
    async with guest() as g:
        await g.start("sh", "-c", "seq 20000; (sleep 0.1; exec sleep 60) & exit 4", terminal={"rows": 24, "cols": 80})
        assert (await asyncio.wait_for(g.exit, 20))["code"] == 4
        assert stdout(g) == "".join(f"{n}\r\n" for n in range(1, 20001))


async def test_a_command_that_cannot_run_in_a_terminal() -> None:
    async with guest() as g:
        await g.start("/no/such/program", terminal={"rows": 24, "cols": 80})
        assert (await asyncio.wait_for(g.exit, 10))["reason"] == "command_not_found"
