"""Programs beside the guest's own: the host's end of `beside`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import Sequence

from rethaw.engines.base import Terminal
from rethaw.engines.microvm import beside
from rethaw.model.errors import EngineError

_WINDOW = 64 << 10  # bytes of input that the program has not taken yet
_QUEUE = 16  # pieces of output that nobody has read
_GONE = 255


class Execs:
    """All programs of one sandbox, on one port. A program whose output nobody reads holds up the others."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._programs: dict[int, QemuExec] = {}
        self._last = 0
        self._task = asyncio.ensure_future(self._listen())

    async def start(
        self, argv: Sequence[str], cwd: str, env: Sequence[tuple[str, str]], terminal: Terminal | None
    ) -> QemuExec:
        """Raises EngineError when the sandbox is gone, or the command line is too long."""
        about: dict[str, object] = {"argv": list(argv), "cwd": cwd, "env": list(env)}
        if terminal is not None:
            about["terminal"] = {"columns": terminal.columns, "rows": terminal.rows, "kind": terminal.kind}
        content = json.dumps(about).encode()
        if len(content) > beside.MOST:
            raise EngineError(f"a command line of {len(content)} bytes is over {beside.MOST}")
        if self._task.done():
            raise EngineError("the sandbox is gone")
        self._last += 1
        program = self._programs[self._last] = QemuExec(self, self._last, terminal is not None)
        await self.say(self._last, beside.START, content)
        return program

    async def say(self, number: int, kind: int, content: bytes = b"") -> None:
        with contextlib.suppress(OSError):
            self._writer.write(beside.HEAD.pack(number, kind, len(content)) + content)
            await self._writer.drain()

    def say_soon(self, number: int, kind: int, content: bytes = b"") -> None:
        with contextlib.suppress(OSError):
            self._writer.write(beside.HEAD.pack(number, kind, len(content)) + content)

    def forget(self, number: int) -> None:
        self._programs.pop(number, None)

    async def _listen(self) -> None:
        try:
            while True:
                number, kind, length = beside.HEAD.unpack(await self._reader.readexactly(beside.HEAD.size))
                if length > beside.MOST:
                    return  # no guest of ours says that
                content = await self._reader.readexactly(length)
                program = self._programs.get(number)
                if program is not None:
                    await program.heard(kind, content)
                if kind == beside.EXITED:
                    self.forget(number)
        except (OSError, EOFError, struct.error):
            pass
        finally:
            for program in list(self._programs.values()):
                program.gone()
            self._programs.clear()

    def close(self) -> None:
        self._task.cancel()
        self._writer.close()


class QemuExec:
    """See `engines.base.Exec`."""

    def __init__(self, owner: Execs, number: int, terminal: bool) -> None:
        self._owner, self._number, self._terminal = owner, number, terminal
        self._output: asyncio.Queue[tuple[str, bytes] | None] = asyncio.Queue(maxsize=_QUEUE)
        self._code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._open = _WINDOW
        self._room = asyncio.Event()
        self._closed = False
        self._ended_input = False

    async def heard(self, kind: int, content: bytes) -> None:
        if kind in (beside.OUTPUT, beside.ERROR) and not self._closed:
            await self._output.put(("stdout" if kind == beside.OUTPUT else "stderr", content))
        elif kind == beside.TAKEN and len(content) == 4:
            self._open += int.from_bytes(content, "little")
            self._room.set()
        elif kind == beside.EXITED and len(content) == 4:
            self._end(int.from_bytes(content, "little", signed=True))
            if not self._closed:
                await self._output.put(None)

    def gone(self) -> None:
        """The sandbox is."""
        self._end(_GONE)
        if self._output.full():
            self._output.get_nowait()
        self._output.put_nowait(None)

    def _end(self, code: int) -> None:
        if not self._code.done():
            self._code.set_result(code)
        self._room.set()

    async def read(self) -> tuple[str, bytes] | None:
        found = await self._output.get()
        if found is None:
            self._output.put_nowait(None)  # so it stays
        return found

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._code.done() and not self._closed:
            if self._open <= 0:
                self._room.clear()
                await self._room.wait()
                continue
            part = view[: min(self._open, beside.PIECE)]
            view = view[len(part) :]
            self._open -= len(part)
            await self._owner.say(self._number, beside.INPUT, bytes(part))

    def end_input(self) -> None:
        if not self._terminal and not self._ended_input:
            self._ended_input = True
            self._owner.say_soon(self._number, beside.END)

    def resize(self, columns: int, rows: int) -> None:
        size = {"columns": max(1, min(0xFFFF, columns)), "rows": max(1, min(0xFFFF, rows))}
        self._owner.say_soon(self._number, beside.SIZE, json.dumps(size).encode())

    async def wait(self) -> int:
        return await asyncio.shield(self._code)

    async def close(self) -> None:
        self._closed = True
        self._owner.say_soon(self._number, beside.KILL)
        while not self._output.empty():
            self._output.get_nowait()
        self._output.put_nowait(None)
