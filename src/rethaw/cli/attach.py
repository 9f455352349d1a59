"""A session's output on this terminal, in one line through crashes: bytes that a new life writes again are not shown
again, and where it writes others, that is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from rethaw.cli import output
from rethaw.cli.render import happening

if TYPE_CHECKING:
    from rethaw.model.types import Event
    from rethaw.sdk.client import Client

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
    messages: dict[str, bytes] = {}
    last = after
    for event in connection.sessions.stream(session, after=after):
        last = event.seq
        kind = event.type.value
        if kind == "output":
            stream = str(event.data.get("stream"))
            if stream in streams and event.body:
                line.take(stream, int(event.data.get("offset", 0)), event.body, event.attempt)
        elif not quiet:
            _news(event, session, messages)
    return last


def _news(event: Event, session: str, messages: dict[str, bytes]) -> None:
    kind = event.type.value
    if kind == "message.sent":
        messages[str(event.data.get("message"))] = event.body or b"null"
    elif kind == "message.published":
        sent = messages.pop(str(event.data.get("message")), None)
        if sent is not None:
            output.note(f"message: {text_of(sent)}")
    else:
        said = happening(event, session)
        if said is not None:
            output.note(said)


def text_of(raw: bytes) -> str:
    """JSON text for a reader: a string as itself."""
    try:
        value: object = json.loads(raw)
    except ValueError:
        return output.plain(raw.decode(errors="replace"))
    return output.plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
