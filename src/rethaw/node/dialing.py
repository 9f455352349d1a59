"""`model.dialing.Dialing` for the sessions that run on this node."""

from __future__ import annotations

import struct
from collections.abc import Callable

from rethaw.channel.records import EXIT, INPUT, INPUT_END, RECORD, SIZE, STDERR, STDOUT
from rethaw.model.dialing import Connection, ExecRequest
from rethaw.model.errors import ChannelBroken, Unavailable
from rethaw.model.looking import Shell
from rethaw.node.dials import Dial
from rethaw.node.life import Life

_STREAMS = {STDOUT: "stdout", STDERR: "stderr"}
_PIECE = 32768
_RECORD_LIMIT = 1 << 16  # a guest may lie
_LOST = 70  # the connection is gone, and what became of the program is not known (EX_SOFTWARE)


class NodeDialing:
    """`life_of` gives the running life of a session, or None."""

    def __init__(self, life_of: Callable[[str], Life | None]) -> None:
        self._life_of = life_of

    def _life(self, session: str) -> Life:
        life = self._life_of(session)
        if life is None or life.ended.done():
            raise Unavailable(f"session {session} has no running sandbox here", sent=False)
        return life

    async def port(self, session: str, port: int) -> Connection:
        return await self._life(session).dials.open("port", port=port)

    async def exec(self, session: str, request: ExecRequest) -> Shell:
        size = request.terminal
        env = dict(request.env)
        if size is not None:
            env.setdefault("TERM", size.kind)
        dial = await self._life(session).dials.open(
            "exec",
            command=list(request.command),
            env=env,
            workdir=request.workdir,
            terminal=None if size is None else [size.columns, size.rows],
            input=request.input or size is not None,
        )
        return Program(dial)


class Program:
    """A program in a running session: `model.looking.Shell`."""

    frozen = 0

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._data = bytearray()
        self._code: int | None = None
        self._why = ""

    async def read(self) -> tuple[str, bytes] | None:
        while self._code is None:
            found = self._record()
            if found is not None:
                kind, payload = found
                if kind == EXIT and len(payload) == 4:
                    self._code = int.from_bytes(payload, "big") & 0xFF
                    self._dial.end()
                    break
                if kind not in _STREAMS:
                    self._lost("the guest said what guestd would not say")
                    break
                return _STREAMS[kind], payload
            try:
                data = await self._dial.read()
            except ChannelBroken as error:
                self._lost(error.message)
                break
            if data is None:
                self._lost("its connection ended before it did")
                break
            self._data += data
        return None

    def _record(self) -> tuple[int, bytes] | None:
        if len(self._data) < RECORD.size:
            return None
        kind, length = RECORD.unpack_from(self._data)
        if length > _RECORD_LIMIT:
            return -1, b""
        if len(self._data) < RECORD.size + length:
            return None
        payload = bytes(self._data[RECORD.size : RECORD.size + length])
        del self._data[: RECORD.size + length]
        return kind, payload

    def _lost(self, why: str) -> None:
        self._code, self._why = _LOST, f"the connection to the program is gone: {why}"
        self._dial.close()

    async def write(self, data: bytes) -> None:
        try:
            for at in range(0, len(data), _PIECE):
                piece = data[at : at + _PIECE]
                await self._dial.write(RECORD.pack(INPUT, len(piece)) + piece)
        except ChannelBroken:
            return  # reading tells

    def end_input(self) -> None:
        self._put(RECORD.pack(INPUT_END, 0))

    def resize(self, columns: int, rows: int) -> None:
        self._put(RECORD.pack(SIZE, 4) + struct.pack(">HH", columns & 0xFFFF, rows & 0xFFFF))

    def _put(self, record: bytes) -> None:
        try:
            self._dial.put(record)
        except ChannelBroken:
            return

    async def wait(self) -> tuple[int, str]:
        while await self.read() is not None:
            pass
        return self._code or 0, self._why

    async def close(self) -> None:
        self._dial.close()
