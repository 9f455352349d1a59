"""`runsc exec`: a program in a running sandbox, over pipes or a pseudo-terminal of the host.

The guest's end of the terminal is the host's own: its line discipline makes Ctrl-C a signal to `runsc exec`, which hands
it to the foreground process of the guest, and a change of size likewise.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import termios
from collections.abc import Sequence

from rethaw.engines.base import Terminal
from rethaw.engines.gvisor.runsc import ENV

_READ = 1 << 15
_LINGER_S = 0.2  # after the program's end: its last bytes are in the pipe; a child may hold the pipe open for ever
_MAX_SIZE = 0xFFFF


class GvisorExec:
    """See `engines.base.Exec`."""

    def __init__(self, process: asyncio.subprocess.Process, terminal: int | None) -> None:
        self._process = process
        self._terminal = terminal
        self._writer: asyncio.StreamWriter | None = None
        self._transports: list[asyncio.BaseTransport] = []
        self._output: asyncio.Queue[tuple[str, bytes] | None] = asyncio.Queue(maxsize=4)
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, argv: Sequence[str], terminal: Terminal | None) -> GvisorExec:
        """Run a `runsc exec` command line."""
        theirs: list[int] = []
        ours: list[int] = []
        try:
            if terminal is None:
                for ours_at, theirs_at in ((1, 0), (0, 1), (0, 1)):
                    pair = os.pipe2(os.O_CLOEXEC)
                    ours.append(pair[ours_at])
                    theirs.append(pair[theirs_at])
                process = await asyncio.create_subprocess_exec(
                    *argv, stdin=theirs[0], stdout=theirs[1], stderr=theirs[2], env=ENV
                )
            else:
                master, slave = os.openpty()
                ours, theirs = [master, os.dup(master)], [slave]
                _set_size(master, terminal.columns, terminal.rows)
                # With the terminal as its controlling one, runsc gets the signals that are typed.
                process = await asyncio.create_subprocess_exec(
                    "setsid", "--ctty", *argv, stdin=slave, stdout=slave, stderr=slave, env=ENV
                )
            made = cls(process, None if terminal is None else ours[1])
        except BaseException:
            for fd in ours:
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        await made._connect(ours, terminal is not None)
        return made

    async def _connect(self, fds: list[int], terminal: bool) -> None:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.connect_write_pipe(
            lambda: asyncio.streams.FlowControlMixin(loop=loop), os.fdopen(fds[0], "wb", buffering=0)
        )
        self._writer = asyncio.StreamWriter(transport, protocol, None, loop)
        self._transports.append(transport)
        names = [("stdout", os.dup(fds[1]))] if terminal else [("stdout", fds[1]), ("stderr", fds[2])]
        pumps: list[asyncio.Task[None]] = []
        for name, fd in names:
            reader = asyncio.StreamReader(limit=_READ, loop=loop)
            # `reader` as a default: each protocol has its own.
            reading, _ = await loop.connect_read_pipe(
                lambda reader=reader: asyncio.StreamReaderProtocol(reader, loop=loop),
                os.fdopen(fd, "rb", buffering=0),
            )
            self._transports.append(reading)
            pumps.append(asyncio.ensure_future(self._pump(name, reader)))
        self._tasks = [*pumps, asyncio.ensure_future(self._ending(pumps))]

    async def _pump(self, name: str, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal any more
            while data := await reader.read(_READ):
                await self._output.put((name, data))

    async def _ending(self, pumps: list[asyncio.Task[None]]) -> None:
        """The end of the output: all of it was read, or its program is gone and whoever else holds it is silent."""
        await self._process.wait()
        busy = True
        while busy:
            _, left = await asyncio.wait(pumps, timeout=_LINGER_S)
            busy = bool(left) and self._output.qsize() > 0
        for pump in pumps:
            pump.cancel()
        await self._output.put(None)

    async def read(self) -> tuple[str, bytes] | None:
        found = await self._output.get()
        if found is None:
            self._output.put_nowait(None)  # so it stays
        return found

    async def write(self, data: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            with contextlib.suppress(OSError):
                self._writer.write(data)
                await self._writer.drain()

    def end_input(self) -> None:
        if self._writer is not None and self._terminal is None:
            self._writer.close()

    def resize(self, columns: int, rows: int) -> None:
        if self._terminal is not None:
            with contextlib.suppress(OSError):
                _set_size(self._terminal, columns, rows)

    async def wait(self) -> int:
        code = await self._process.wait()
        return code if code >= 0 else 128 - code

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        for transport in self._transports:
            transport.close()
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while not self._output.empty():
            self._output.get_nowait()
        self._output.put_nowait(None)
        await self._process.wait()


def _set_size(fd: int, columns: int, rows: int) -> None:
    columns, rows = (max(1, min(_MAX_SIZE, n)) for n in (columns, rows))
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
