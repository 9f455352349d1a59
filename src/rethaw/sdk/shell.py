"""Programs elsewhere over a WebSocket: in a throwaway restore, or in a running session. `programs` in the API says what
travels on it."""

from __future__ import annotations

import contextlib
import json
from types import TracebackType
from typing import Any, cast

from websockets.exceptions import ConnectionClosed

from rethaw.model.dialing import ExecRequest
from rethaw.model.errors import RethawError, Unavailable
from rethaw.model.looking import ShellRequest
from rethaw.sdk import calls
from rethaw.sdk.sockets import dial
from rethaw.sdk.transport import Target

_STREAMS = {1: "stdout", 2: "stderr"}
_RESTORE_S = 120.0  # a restore or a thaw, before the program runs
_PIECE = 1 << 18
LOST = 70  # exit code of a program whose connection is gone


class Program:
    """Reading in one thread and writing in another is fine. Closing it ends the program.

    Raises what the server says when it could not be started: NotFound, Unavailable and so on.
    """

    def __init__(self, target: Target, path: str, request: str, lost: str) -> None:
        self.exit_code: int | None = None
        self.why = ""  # it ended, when not by itself
        self._lost = lost
        self._target, self._socket = target, dial(target, path)
        try:
            self._socket.send(request)
            self._ready = self._text(self._socket.recv(timeout=_RESTORE_S))
        except (ConnectionClosed, TimeoutError) as e:
            self.close()
            raise self._broken() from e
        except RethawError:
            self.close()
            raise
        self.session = str(self._ready.get("session"))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def read(self) -> tuple[str, bytes] | None:
        """The next bytes that it wrote, with "stdout" or "stderr"; None at its end, when `exit_code` is there.

        Raises Unavailable when the server is gone, and what the server says went wrong."""
        while True:
            try:
                message = self._socket.recv()
            except ConnectionClosed as e:
                if self.exit_code is not None:
                    return None
                raise self._broken() from e
            if isinstance(message, bytes):
                return _STREAMS.get(message[0], "stdout"), message[1:]
            said = self._text(message)
            if said.get("type") == "exit":
                self.exit_code, self.why = int(said["code"]), str(said.get("why") or "")
                return None

    def write(self, data: bytes) -> None:
        """To its standard input; nothing happens once it has ended."""
        for at in range(0, len(data), _PIECE):
            self._send(data[at : at + _PIECE])

    def resize(self, columns: int, rows: int) -> None:
        self._send(json.dumps({"type": "resize", "columns": columns, "rows": rows}))

    def end_input(self) -> None:
        """Its standard input has ended (a terminal's has Ctrl-D for that)."""
        self._send(json.dumps({"type": "end"}))

    def close(self) -> None:
        with contextlib.suppress(ConnectionClosed, OSError):
            self._socket.close()

    def _send(self, message: bytes | str) -> None:
        with contextlib.suppress(ConnectionClosed):
            self._socket.send(message)

    def _text(self, message: str | bytes) -> dict[str, Any]:
        said = cast("dict[str, Any]", json.loads(message))
        if said.get("type") == "error":
            raise calls.error_of(500, json.dumps(said).encode(), url=self._target.url, token_source=self._target.source)
        return said

    def _broken(self) -> Unavailable:
        return Unavailable(f"the connection to {self._target.url} broke, {self._lost}", sent=True)


class Shell(Program):
    """In a throwaway restore of a snapshot, which is destroyed with it. Raises SnapshotUnusable as well."""

    def __init__(self, target: Target, snapshot: str, request: ShellRequest) -> None:
        lost = "and the throwaway sandbox is gone with it; open another one"
        super().__init__(target, calls.path("snapshots", snapshot, "shell"), request.model_dump_json(), lost)
        self.snapshot = str(self._ready.get("snapshot"))
        self.frozen = int(self._ready.get("frozen", 0))

    def __enter__(self) -> Shell:
        return self


class Exec(Program):
    """In a running session, beside its agent. Raises SessionEnded, and Conflict for a session that a person suspended."""

    def __init__(self, target: Target, session: str, request: ExecRequest) -> None:
        lost = "and what became of the program is not known"
        super().__init__(target, calls.path("sessions", session, "exec"), request.model_dump_json(), lost)

    def __enter__(self) -> Exec:
        return self
