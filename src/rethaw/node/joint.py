"""The node's end of a stream that carries bytes both ways, joined to something that reads and writes.

It outlives the freezes of its life: its stream is handed over anew after each of them, and what the guest had not
received is still here; what it had not heard to be taken it sends again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Protocol

from rethaw.model.ports import GuestStream

PIECE = 32768


class Source(Protocol):
    async def read(self, n: int = -1, /) -> bytes: ...


class Sink(Protocol):
    def write(self, data: bytes, /) -> None: ...

    async def drain(self) -> None: ...

    def write_eof(self) -> None: ...


class Joint:
    """Where the two directions stand. `writer`: None once it is closed."""

    def __init__(self) -> None:
        self.began = self.moved = time.monotonic()
        self.taken = 0  # bytes of the guest that went on
        self.base = 0  # offset of the first byte of `kept`
        self.kept = bytearray()  # bytes for the guest that it may not have
        self.ended = False  # the other side has said all it will
        self.guest_ended = False

    @property
    def received(self) -> int:
        return self.base + len(self.kept)

    def forget(self, offset: int) -> None:
        """The guest has everything before `offset`."""
        if offset > self.base:
            del self.kept[: offset - self.base]
            self.base = offset

    def misfit(self, stream: GuestStream) -> str | None:
        """Why the guest's word about the stream cannot be true, or None."""
        if not self.base <= stream.received <= self.received:
            return f"the guest has {stream.received} bytes, which it was not sent"
        if stream.base > self.taken:
            return f"the guest kept nothing before {stream.base}, which was not taken"
        return None


async def pump(
    joint: Joint,
    stream: GuestStream,
    reader: Source,
    writer: Callable[[], Sink | None],
    moved: Callable[[], None],
    *,
    name: str,
    idle_s: float | None = None,
    half_s: float | None = None,
) -> None:
    """Both directions until both have ended. Raises OSError when the other side broke the connection, or nothing moves for
    `idle_s` (once one end has said all it will: `half_s`)."""
    joint.forget(stream.received)
    up = asyncio.create_task(_up(joint, stream, writer, moved, name))
    down = asyncio.create_task(_down(joint, stream, reader, moved))
    try:
        while going := {task for task in (up, down) if not task.done()}:
            limit = idle_s if len(going) == 2 else half_s
            left = None if limit is None else joint.moved + limit - time.monotonic()
            if limit is not None and left is not None and left <= 0:
                raise TimeoutError(f"nothing moved for {limit:.0f} s")
            await asyncio.wait(going, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for task in going:
                if task.done():
                    task.result()
    finally:
        up.cancel()
        down.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


async def _up(
    joint: Joint, stream: GuestStream, writer: Callable[[], Sink | None], moved: Callable[[], None], name: str
) -> None:
    position = stream.base
    while (data := await stream.read()) is not None:
        fresh = data[max(0, joint.taken - position) :]
        position += len(data)
        sink = writer()
        if fresh and sink is not None:
            # No await between here and there: what was taken is with the sink, whenever this is cancelled.
            sink.write(fresh)
            joint.taken += len(fresh)
            moved()
            # The other direction tells of a connection that broke; what it still has comes first.
            with contextlib.suppress(OSError):
                await sink.drain()
        await stream.ack(joint.taken)
    if not joint.guest_ended:
        joint.guest_ended = True
        sink = writer()
        if sink is not None:
            with contextlib.suppress(OSError, RuntimeError):
                sink.write_eof()
    await stream.accept(name)


async def _down(joint: Joint, stream: GuestStream, reader: Source, moved: Callable[[], None]) -> None:
    while True:
        if stream.received < joint.received:
            await stream.write(bytes(joint.kept[stream.received - joint.base :]))
        joint.forget(stream.confirmed)
        if joint.ended:
            await stream.end()
            return
        # No await between here and there: what was read is kept, whenever this is cancelled.
        data = await reader.read(PIECE)
        joint.kept += data
        joint.ended = not data
        moved()
