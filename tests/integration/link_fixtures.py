"""A real guestd as a subprocess with a real Link, and a node whose answers tests choose."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import rethaw
from rethaw.node.link import Hello, Link, open_pipes
from rethaw.node.link_stream import Stream

LIBRARY = Path(rethaw.__file__).parent.parent
GUESTD = LIBRARY / "rethaw/guest/guestd.py"


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """Wait until `condition()` is true; its value."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not so within {timeout_s} s"
        await asyncio.sleep(0.005)
    return value


class Guest:
    """One guestd process and its Link. Handlers may be replaced; by default output is collected and acked, calls get
    `{"ok": {}}` (or what `answers[op]` makes of their body), exchanges are echoed as a chunked 200."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self.calls: list[tuple[str, str, Any]] = []  # op, id, body; every time a call is handed over
        self.answers: dict[str, Callable[[str, dict[str, Any]], Awaitable[Any]]] = {}
        self.exchange: Callable[[Stream], Awaitable[None]] = echo
        self.tunnel: Callable[[Any], Awaitable[None]] = refuse
        self.exit: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.hellos: list[Hello] = []
        self.left: list[tuple[str, int]] = []
        self.malformed: list[str] = []
        self.accepted = 0
        self.link: Link
        self.process: subprocess.Popen[bytes]

    async def boot(self, python: str = sys.executable, limit_s: float = 10.0) -> None:
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        self.process = subprocess.Popen(  # noqa: ASYNC220 - takes a millisecond
            [python, "-I", "-S", "-u", str(GUESTD)],
            stdin=down_read,
            stdout=up_write,
            stderr=(self.directory / "guestd.log").open("wb"),
            env={
                "RETHAW_RUN_DIR": str(self.directory),
                "RETHAW_PORT": "0",
                "RETHAW_NAMES_PORT": "0",
                "PATH": os.environ["PATH"],
            },
            cwd="/",
        )
        os.close(down_read)
        os.close(up_write)
        reader, writer = await open_pipes(up_read, down_write)
        self.link = Link(
            reader,
            writer,
            self.on_stream,
            on_malformed=self.malformed.append,
            on_hello=self.hellos.append,
            on_left=lambda exchange, taken: self.left.append((exchange, taken)),
        )
        await until(lambda: (self.directory / "port").exists() or self.process.poll() is not None, limit_s)
        assert self.process.poll() is None, self.log()

    async def start(
        self, *command: str, args: Any = None, env: dict[str, str] | None = None, cursor: int = 0, **more: Any
    ) -> Hello:
        config = {
            "command": list(command) or ["/bin/sleep", "1000"],
            "env": {"PATH": os.environ["PATH"], "RETHAW_APP": str(self.directory), **(env or {})},
            "workdir": str(self.directory),
            "session": "s_test",
            "attempt": 2,
            "generation": "g-0",
            "boot": {"args": args or {}, "cursor": cursor, "fresh": False},
        }
        return await self.link.start({**config, **more})

    async def start_python(self, code: str, **more: Any) -> Hello:
        return await self.start(sys.executable, "-c", code, **more)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return int((self.directory / "port").read_text())

    @property
    def socket(self) -> str:
        return str(self.directory / "context.sock")

    def log(self) -> str:
        return (self.directory / "guestd.log").read_text()

    async def thaw(self, generation: str | None = None) -> None:
        """One freeze without a capture."""
        await self.link.quiesce(10.0)
        await self.link.go(generation or self.hellos[-1].generation)

    # ---- handlers

    async def on_stream(self, stream: Any) -> None:
        if stream.kind == "exchange":
            await self.exchange(stream)
        elif stream.kind == "call":
            await self._call(stream)
        elif stream.kind == "tunnel":
            await self.tunnel(stream)
        else:
            await self._output(stream)

    async def _output(self, stream: Stream) -> None:
        log, position = self.output[stream.kind], stream.base
        await stream.ack(len(log))
        while (data := await stream.read()) is not None:
            skip = len(log) - position
            assert skip >= 0, f"{stream.kind}: a gap from {len(log)} to {position}"
            log += data[skip:]
            position += len(data)
            await stream.ack(len(log))

    async def _call(self, stream: Stream) -> None:
        op, call = str(stream.meta["op"]), str(stream.meta["id"])
        body = json.loads(await stream.read_all(1 << 24))
        self.calls.append((op, call, body))
        make = self.answers.get(op)
        answer = await make(call, body) if make else {}
        raw = answer if isinstance(answer, bytes) else json.dumps({"ok": answer}).encode()
        await stream.write(raw)
        await stream.end()
        if op == "exit" and not self.exit.done():
            self.exit.set_result(body)

    def ops(self, op: str) -> list[Any]:
        """Bodies of the calls of `op`, each id once."""
        return list({call: body for name, call, body in self.calls if name == op}.values())


async def echo(stream: Stream) -> None:
    if stream.exchange is None:
        body = await stream.read_all(1 << 27)
        await stream.accept(f"x_{stream.meta['guest_id']}")
        stream.meta["body"] = body  # kept by nobody: an echo lives within one thaw
        await stream.head(200, "OK", [("X-Echo", "yes")])
        await stream.write(body)
        await stream.end()
    else:
        await stream.reset("the echo was lost")


async def refuse(stream: Stream) -> None:
    await stream.head(403, "egress is closed", ())
    await asyncio.get_running_loop().create_future()


@asynccontextmanager
async def guest(python: str = sys.executable) -> AsyncIterator[Guest]:
    directory = Path(tempfile.mkdtemp(prefix="rethaw-guest-"))
    made = Guest(directory)
    try:
        await made.boot(python)
        yield made
        assert "Traceback" not in made.log(), made.log()
    finally:
        if hasattr(made, "link"):
            await made.link.close()
            await asyncio.to_thread(_end, made.process)
        shutil.rmtree(directory)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
