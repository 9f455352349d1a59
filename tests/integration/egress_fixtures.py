"""Egress of a real guestd over a real Link: what the node does about tunnels, with a log in memory and servers on
loopback."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from link_fixtures import Guest, guest

from rethaw.model.egress import EgressSettings
from rethaw.model.types import Fence, NewEvent
from rethaw.node.egress import Egress

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Sink:
    """A log that only takes."""

    def __init__(self) -> None:
        self.events: list[NewEvent] = []

    async def append(self, fence: Fence, events: Sequence[NewEvent]) -> list[Any]:
        await asyncio.sleep(0)
        self.events += events
        return []

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [e.data for e in self.events if e.type.value == f"egress.{kind}"]


class Out:
    """A guest whose tunnels an Egress serves. `restore` begins a new life, with an Egress of its own."""

    def __init__(self, g: Guest, allow: Sequence[str], **more: Any) -> None:
        self.guest = g
        self.sink = Sink()
        self.actives = 0
        self._make = lambda: Egress(
            self.sink,  # pyright: ignore[reportArgumentType]
            Fence(session="s_test", generation="g"),
            allow,
            more.get("settings") or EgressSettings(),
            self,
            more.get("resolve"),
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self.egress = self._make()
        g.tunnel = lambda stream: self.egress.handle(stream)  # noqa: PLW0108 - replaced later
        former = g.link._on_hello

        def hello(said: Any) -> None:
            self.egress.hello(said.tunnels)
            assert former is not None
            former(said)

        g.link._on_hello = hello

    def active(self) -> None:
        self.actives += 1

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def restore(self) -> None:
        await self.guest.link.quiesce(10.0)
        await self.egress.close()
        self.egress = self._make()
        await self.guest.link.go(f"{self.guest.hellos[-1].generation}+")

    async def connect(self, target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, str]:
        """CONNECT, and the status line that comes back."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.guest.port)
        writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        status = (await asyncio.wait_for(reader.readuntil(b"\r\n"), 15)).decode().strip()
        if status.startswith("HTTP/1.1 200"):
            assert await reader.readuntil(b"\r\n") == b"\r\n"
        return reader, writer, status


@asynccontextmanager
async def way_out(allow: Sequence[str], **more: Any) -> AsyncIterator[Out]:
    async with guest() as g:
        out = Out(g, allow, **more)
        await g.start("sleep", "1000", providers=["scripted"])
        try:
            yield out
        finally:
            await g.link.close()
            await out.egress.close()


@asynccontextmanager
async def server(serve: Serve, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Its port."""
    tasks: set[asyncio.Task[Any]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    listening = await asyncio.start_server(handle, host, 0, ssl=tls)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Gives everything back; ends when the other side has ended."""
    while data := await reader.read(40_000):
        writer.write(data)
        await writer.drain()


def certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """A self-signed one for `name`: certificate and key."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:127.0.0.2"]
    subprocess.run([*command, *names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


def pattern(size: int, seed: int) -> bytes:
    """Bytes that show a shift, a gap and a repetition."""
    out = bytearray()
    n = 0
    while len(out) < size:
        out += hashlib.sha256(f"{seed}.{n}".encode()).digest()
        n += 1
    return bytes(out[:size])
