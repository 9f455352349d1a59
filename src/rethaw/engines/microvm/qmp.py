"""QEMU's control socket: one command at a time, answers bounded and checked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any, cast

from rethaw.model.errors import EngineError

MAX_LINE = 256 << 10


class Qmp:
    """A session with one QEMU, which is not trusted to answer well or at all."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ours: socket.socket) -> None:
        self._reader, self._writer, self._ours = reader, writer, ours
        self._turn = asyncio.Lock()

    @classmethod
    async def connect(cls, ours: socket.socket, timeout_s: float) -> Qmp:
        """Once QEMU has said hello. Raises EngineError after `timeout_s`."""
        session = cls(*await asyncio.open_connection(sock=ours, limit=MAX_LINE), ours)
        try:
            if "QMP" not in await session._line(timeout_s):
                raise EngineError("QEMU's control socket does not speak QMP")
            await session.run("qmp_capabilities", timeout_s=timeout_s)
        except BaseException:
            session.close()
            raise
        return session

    async def _line(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = await asyncio.wait_for(self._reader.readline(), timeout_s)
            if not line:
                raise EngineError("QEMU is gone")
            said: object = json.loads(line)
        except TimeoutError:
            raise EngineError(f"QEMU did not answer within {timeout_s:g} s") from None
        except ConnectionError as error:
            raise EngineError("QEMU is gone") from error
        except (ValueError, OSError) as error:
            raise EngineError(f"QEMU's control socket said nothing sensible: {str(error)[:200]}") from error
        if not isinstance(said, dict):
            raise EngineError("QEMU's control socket said something that is no object")
        return cast("dict[str, Any]", said)

    async def run(self, command: str, timeout_s: float = 30.0, **arguments: Any) -> Any:
        """What QEMU returns. Raises EngineError with QEMU's own words when it refuses."""
        async with self._turn:
            request: dict[str, Any] = {"execute": command}
            if arguments:
                request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
            try:
                self._writer.write(json.dumps(request).encode() + b"\n")
                await self._writer.drain()
            except OSError as error:
                raise EngineError(f"QEMU is gone: {error}") from None
            return await self._answer(command, timeout_s)

    async def give(self, fd: int, timeout_s: float = 30.0) -> int:
        """The number of the descriptor `fd` in QEMU, which has it too from now on. Raises EngineError."""
        async with self._turn:
            try:
                socket.send_fds(self._ours, [b'{"execute": "add-fd"}\n'], [fd])  # nothing else waits to be written
            except OSError as error:
                raise EngineError(f"QEMU is gone: {error}") from None
            said: object = await self._answer("add-fd", timeout_s)
        text = str(said)[:200]
        number = cast("dict[str, object]", said).get("fd") if isinstance(said, dict) else None
        if not isinstance(number, int):
            raise EngineError(f"QEMU does not say which descriptor it got: {text}")
        return number

    async def _answer(self, command: str, timeout_s: float) -> Any:
        while True:
            said = await self._line(timeout_s)
            if "return" in said:
                return said["return"]
            if "error" in said:
                raise EngineError(f"QEMU refuses {command}: {str(said['error'])[:300]}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()
