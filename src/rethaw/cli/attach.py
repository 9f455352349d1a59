"""A session's output on this terminal, in one line through crashes: bytes that a new life writes again are not shown
again, and where it writes others, that is said."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from rethaw.cli import output
from rethaw.cli.render import happening

if TYPE_CHECKING:
    from rethaw.model.types import Event
    from rethaw.sdk.client import Client

_SLOW_START_S = 3.0  # longer than any start from an image that is there
_KEPT = 1 << 20  # bytes of each stream that can be compared after a crash


class OneLine:
    """Takes output events in log order, writes what is new."""

    def __init__(self, write: Callable[[bytes, bool], None], say: Callable[[str], None]) -> None:
        self._write = write
        self._say = say
        self._shown: dict[str, int] = {}  # stream -> offset after the last byte shown
        self._kept: dict[str, bytes] = {}  # stream -> the bytes before that offset
        self._attempt = 0

    def take(self, stream: str, offset: int, data: bytes, attempt: int) -> None:
        """Bytes from `offset` on of `stream`. A new attempt counts from 0 again."""
        if attempt != self._attempt:
            self._attempt, self._shown, self._kept = attempt, {}, {}
        shown, kept = self._shown.get(stream, offset), self._kept.get(stream, b"")
        if offset < shown:
            start = len(kept) - (shown - offset)
            again = kept[start:] if start >= 0 else b""
            if start >= 0 and data[: len(again)] == again[: len(data)]:
                if len(data) <= len(again):
                    # All of it is on the screen already; a later chunk may still differ.
                    return
                data, offset = data[len(again) :], shown
            else:
                self._say(f"the {stream} above from here on was taken back by the crash:")
                kept = kept[: max(0, start)]
        self._write(data, stream == "stderr")
        self._shown[stream] = offset + len(data)
        self._kept[stream] = (kept + data)[-_KEPT:]


def follow(
    connection: Client, session: str, *, quiet: bool = False, streams: tuple[str, ...] = ("stdout", "stderr"),
    all_to_stderr: bool = False, after: int = 0,
) -> int:  # fmt: skip
    """Show the session's output until its last event; the seq of that. `quiet`: no news beside the output."""
    line = OneLine(lambda data, err: output.raw(data, stderr=err or all_to_stderr), output.note)
    news = News(session)
    last = after
    try:
        for event in connection.sessions.stream(session, after=after):
            last = event.seq
            if event.type.value == "output":
                stream = str(event.data.get("stream"))
                if stream in streams and event.body:
                    line.take(stream, int(event.data.get("offset", 0)), event.body, event.attempt)
            elif not quiet:
                news.take(event)
    finally:
        news.close()
    return last


class News:
    """What happens to a session, told once each."""

    def __init__(self, session: str) -> None:
        self._session = session
        self._messages: dict[str, bytes] = {}
        self._waits: set[object] = set()
        self._slow: threading.Timer | None = None

    def take(self, event: Event) -> None:
        self.close()
        kind, data = event.type.value, event.data
        if kind == "message.sent":
            self._messages[str(data.get("message"))] = event.body or b"null"
        elif kind == "message.published":
            sent = self._messages.pop(str(data.get("message")), None)
            if sent is not None:
                output.note(f"message: {text_of(sent)}")
        elif kind == "session.state" and data.get("state") == "starting":
            self._slow = threading.Timer(_SLOW_START_S, output.note, ("an image is built first, which takes a minute",))
            self._slow.daemon = True
            self._slow.start()
        elif kind == "wait.opened" and (data.get("wait") in self._waits):
            return  # opened once more after a restore
        else:
            self._waits.add(data.get("wait"))
            said = happening(event, self._session)
            if said is not None:
                output.note(said)

    def close(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None


def text_of(raw: bytes) -> str:
    """JSON text for a reader: a string as itself."""
    try:
        value: object = json.loads(raw)
    except ValueError:
        return output.plain(raw.decode(errors="replace"))
    return output.plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
