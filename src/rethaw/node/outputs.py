"""stdout and stderr of an agent on their way into the log, by absolute offset."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

from rethaw.model.enums import EventType
from rethaw.model.errors import RethawError
from rethaw.model.ports import GuestStream, LogSink
from rethaw.model.types import Event, Fence, NewEvent

log = logging.getLogger("rethaw.node")
_PIECE = 256 * 1024
_LULL_S = 0.01


class Outputs:
    """Keeps how much of each output stream is durable. `offsets` at a capture belong to the snapshot: after a restore
    the guest sends again from its last ack, and what is in the log already is skipped."""

    def __init__(
        self,
        sink: LogSink,
        fence: Fence,
        attempt: int,
        offsets: Mapping[str, int],
        active: Callable[[], None],
        shown: Callable[[str, int, bytes], None] | None = None,
    ) -> None:
        self._sink = sink
        self._fence = fence
        self._attempt = attempt
        self._active = active
        self._shown = shown  # to those who look on, before it is in the log
        self._ended: dict[str, asyncio.Event] = {}
        self.offsets: dict[str, int] = dict(offsets)

    async def handle(self, stream: GuestStream) -> None:
        """Serve one output stream until it ends or the guest falls quiet (then this is cancelled)."""
        name = stream.kind
        ended = self._ended.setdefault(name, asyncio.Event())
        position = stream.base
        if (shown := self._shown) is not None:
            stream.tap(lambda offset, data: shown(name, offset, data))
        await stream.ack(self.offsets.get(name, 0))
        reading: asyncio.Task[bytes | None] | None = None
        try:
            data: bytes | None = b""
            while data is not None:
                reading = reading or asyncio.ensure_future(stream.read())
                data, reading = await reading, None
                piece = bytearray(data or b"")
                try:
                    while data is not None and not piece.endswith(b"\n") and len(piece) < _PIECE:
                        # A line often comes as several writes: what follows at once belongs to the same event.
                        reading = asyncio.ensure_future(stream.read())
                        await asyncio.wait({reading}, timeout=_LULL_S)
                        if not reading.done():
                            break
                        data, reading = reading.result(), None
                        piece += data or b""
                except asyncio.CancelledError:
                    if not stream.over:  # a freeze: who looks on has seen it, who comes meanwhile is to see it too
                        with contextlib.suppress(RethawError):
                            await self._keep(name, position, bytes(piece))
                    raise
                self._active()
                await self._keep(name, position, bytes(piece))
                position += len(piece)
                await stream.ack(self.offsets.get(name, 0))
        finally:
            if reading is not None:
                reading.cancel()
        ended.set()

    async def _keep(self, name: str, position: int, piece: bytes) -> None:
        """Append what the log does not have yet of `piece`, which begins at `position`."""
        skip = max(0, self.offsets.get(name, 0) - position)
        while skip < len(piece):
            skip += await self._store(name, piece[skip:])

    async def _store(self, name: str, data: bytes) -> int:
        """Append `data`; how many bytes of it the log has now. An append that was made before and never heard of may
        have held fewer, or more: the log's first event of this offset is what counts."""
        offset = self.offsets.get(name, 0)
        event = NewEvent(
            type=EventType.OUTPUT,
            data={"stream": name, "offset": offset},
            body=data,
            key=f"{name}:{self._attempt}:{offset}",
        )
        append = asyncio.ensure_future(self._sink.append(self._fence, [event]))
        try:
            await asyncio.shield(append)
        except asyncio.CancelledError:
            # The append may commit all the same: what the log holds must be known before the guest is captured.
            await asyncio.wait({append})
            if append.exception() is None:
                self.offsets[name] = offset + _held(append.result())
            raise
        held = _held(append.result())
        self.offsets[name] = offset + held
        return held

    async def drained(self, timeout_s: float) -> None:
        """Until every stream seen so far has ended, at most `timeout_s`."""
        waits = [asyncio.ensure_future(e.wait()) for e in self._ended.values()]
        if waits:
            _, late = await asyncio.wait(waits, timeout=timeout_s)
            for task in late:
                task.cancel()


def _held(events: list[Event]) -> int:
    return len(events[0].body or b"")
