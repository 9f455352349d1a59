"""The real guestd (as a process), Link and Gateway between clients and a scripted provider, and what went over each wire."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway_fixtures import Gate, Hooks, MemoryLog

from rethaw.gateway import Gateway, Providers, SessionGateway
from rethaw.model.types import AgentSpec
from rethaw.node.link import Link, open_pipes

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Message:
    """One HTTP message as it was on the wire. `body` without the framing of the hop."""

    start: str
    headers: list[tuple[str, str]]
    body: bytes
    whole: bool


@dataclass
class Recorder:
    """A TCP proxy that remembers every byte."""

    target: tuple[str, int]
    host: str = "127.0.0.1"
    port: int = 0
    up: list[bytearray] = field(default_factory=list)
    down: list[bytearray] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Recorder]:
        server = await asyncio.start_server(self._serve, self.host, 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    def clear(self) -> None:
        """Forget what went by. Connections go on."""
        for seen in (*self.up, *self.down):
            seen.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, away = await asyncio.open_connection(*self.target)
        up, down = bytearray(), bytearray()
        self.up.append(up)
        self.down.append(down)

        async def copy(a: asyncio.StreamReader, b: asyncio.StreamWriter, seen: bytearray) -> None:
            try:
                while data := await a.read(65536):
                    seen.extend(data)
                    b.write(data)
                    await b.drain()
            except OSError:
                b.transport.abort()
            finally:
                with contextlib.suppress(OSError, RuntimeError):
                    b.close()

        await asyncio.gather(copy(reader, away, up), copy(there, writer, down), return_exceptions=True)

    def requests(self) -> list[Message]:
        return [m for raw in self.up for m in parse(bytes(raw))]

    def responses(self) -> list[Message]:
        return [m for raw in self.down for m in parse(bytes(raw))]


def parse(raw: bytes) -> list[Message]:
    """The HTTP/1.1 messages in `raw`, one after another."""
    out: list[Message] = []
    while raw:
        head, mark, raw = raw.partition(b"\r\n\r\n")
        if not mark:
            break
        lines = head.decode("latin-1").split("\r\n")
        headers = [(n, v.strip()) for n, _, v in (line.partition(":") for line in lines[1:])]
        low = {n.lower(): v for n, v in headers}
        body, whole = bytearray(), True
        if "chunked" in low.get("transfer-encoding", ""):
            while True:
                size, mark, rest = raw.partition(b"\r\n")
                if not mark:
                    whole = False
                    break
                n = int(size, 16)
                body += rest[:n]
                if len(rest) < n + 2:
                    whole, raw = False, b""
                    break
                raw = rest[n + 2 :]
                if n == 0:
                    break
        elif "content-length" in low:
            n = int(low["content-length"])
            body += raw[:n]
            whole = len(raw) >= n
            raw = raw[n:]
        out.append(Message(lines[0], headers, bytes(body), whole))
    return out


@dataclass
class GuestRig:
    """`url`: where an agent in the sandbox would find the providers."""

    url: str
    log: MemoryLog
    gateway: Gateway
    session: SessionGateway
    link: Link
    gate: Gate
    hooks: Hooks

    async def freeze_and_go(self) -> None:
        """As a save does it, without the capture."""
        await self.session.flush()
        async with self.session.settled():
            await self.link.quiesce()
            await self.session.flush()
            await self.link.go(self.log.generation)


@contextlib.asynccontextmanager
async def guest_rig(providers: Providers, log: Any = None, **agent: Any) -> AsyncIterator[GuestRig]:
    """guestd on this machine's loopback, on a free port, with nothing but a sleeping agent."""
    log = log or MemoryLog()
    spec = AgentSpec(name="golden", **{"hold_max_s": 0.0, **agent})
    gateway = Gateway(log, providers, "node-1", batch_ms=10)
    await gateway.start()
    session = gateway.session(log.session, spec)
    gate, hooks = Gate(), Hooks()
    session.attach(log.fence, 1, gate, hooks)
    await session.restored(None)
    with tempfile.TemporaryDirectory(prefix="rethaw-guestd-") as run:
        env = {
            "PATH": os.environ["PATH"],
            "RETHAW_PORT": "0",
            "RETHAW_NAMES_PORT": "0",
            "RETHAW_RUN_DIR": run,
            "PYTHONPATH": str(ROOT / "src"),
        }
        in_read, in_write = os.pipe()
        out_read, out_write = os.pipe()
        guestd = await asyncio.create_subprocess_exec(
            sys.executable, "-u", "-m", "rethaw.guest.guestd", stdin=in_read, stdout=out_write, env=env
        )
        os.close(in_read)
        os.close(out_write)
        reader, writer = await open_pipes(out_read, in_write)

        async def on_stream(stream: Any) -> None:
            if stream.kind == "exchange":
                await session.handle(stream)
            else:
                await asyncio.Event().wait()

        link = Link(
            reader,
            writer,
            on_stream,
            on_hello=lambda hello: session.hello(hello.exchanges, hello.left),
            on_left=session.left,
        )
        try:
            await link.start(
                {
                    "command": ["sleep", "1000"], "env": {}, "workdir": "/", "session": log.session, "attempt": 1,
                    "generation": log.generation, "boot": {"args": {}, "cursor": 0, "fresh": False},
                    "providers": gateway.provider_names,
                }
            )  # fmt: skip
            port = int((Path(run) / "port").read_text())
            yield GuestRig(f"http://127.0.0.1:{port}", log, gateway, session, link, gate, hooks)
        finally:
            await link.close()
            await asyncio.wait_for(guestd.wait(), 10)
            await gateway.close()
