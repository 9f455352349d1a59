"""Server-sent events out of bytes, however they are cut. Only `\\n` and `\\r\\n` end a line: JSON may hold U+2028."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerEvent:
    """`id` is the last one seen on the stream, so it may be of an earlier event."""

    id: str
    event: str
    data: bytes


class Parser:
    """Feed bytes, get whole events."""

    def __init__(self) -> None:
        self._rest = b""
        self._id = ""
        self._event = ""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            found = self._line(line.removesuffix(b"\r"))
            if found is not None:
                yield found

    def _line(self, line: bytes) -> ServerEvent | None:
        if not line:
            done = ServerEvent(self._id, self._event or "message", b"\n".join(self._data)) if self._data else None
            self._event, self._data = "", []
            return done
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value.decode(errors="replace")
        elif name == b"id":
            self._id = value.decode(errors="replace")
        return None
