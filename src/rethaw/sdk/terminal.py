"""The terminal of a session's main program. `rethaw.api.terminal` says what travels on its connection."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

from websockets.exceptions import ConnectionClosed

from rethaw.model.errors import RethawError, Unavailable, by_code
from rethaw.sdk import calls
from rethaw.sdk.sockets import dial
from rethaw.sdk.transport import Target

_STREAMS = {1: "stdout", 2: "stderr"}
_POSITION = 8


@dataclass(frozen=True)
class Written:
    """Bytes that the program wrote, from byte `offset` of the stream on."""

    stream: str
    offset: int
    data: bytes


@dataclass(frozen=True)
class Said:
    """Anything else: `kind` is "screen", "size", "shown", "state", "input" or "exit", `fields` what belongs to it."""

    kind: str
    fields: dict[str, Any]


class Terminal:
    """One connection. Reading in one thread and writing in another is fine.

    Raises NotFound, AmbiguousId, Unavailable and so on when it cannot be opened.
    """

    def __init__(self, target: Target, session: str, size: tuple[int, int] | None, *, typing: bool = True) -> None:
        self._target = target
        self._socket = dial(target, calls.path("sessions", session, "terminal"))
        rows, cols = size or (None, None)
        self._send(json.dumps({"rows": rows, "cols": cols, "type": typing}))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def read(self) -> Written | Said:
        """What comes next; the last is "exit". Raises Unavailable when the server is gone, and what it says went wrong."""
        try:
            message = self._socket.recv()
        except ConnectionClosed as e:
            raise Unavailable(f"the connection to {self._target.url} broke", remedy="try again") from e
        if isinstance(message, bytes):
            at = int.from_bytes(message[1 : 1 + _POSITION], "big")
            return Written(_STREAMS.get(message[0], "stdout"), at, message[1 + _POSITION :])
        said: dict[str, Any] = json.loads(message)
        if said.get("type") == "error":
            error = cast("dict[str, Any]", said["error"])
            kind = by_code(str(error.get("code")))
            raise cast("RethawError", kind(str(error.get("message")), remedy=error.get("remedy")))
        return Said(str(said.pop("type", "")), said)

    def type(self, data: bytes) -> None:
        """Keys for its terminal."""
        self._send(data)

    def give(self, offset: int, data: bytes) -> None:
        """The part of a piped stdin that begins at `offset`."""
        self._send(offset.to_bytes(_POSITION, "big") + data)

    def end(self, offset: int) -> None:
        """A piped stdin ends there."""
        self._send(json.dumps({"type": "end", "offset": offset}))

    def resize(self, rows: int, cols: int) -> None:
        self._send(json.dumps({"type": "resize", "rows": rows, "cols": cols}))

    def close(self) -> None:
        with contextlib.suppress(ConnectionClosed, OSError):
            self._socket.close()

    def _send(self, message: bytes | str) -> None:
        with contextlib.suppress(ConnectionClosed):
            self._socket.send(message)
