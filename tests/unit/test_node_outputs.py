"""What becomes of output that was read and shown, and not stored yet, when its guest falls quiet."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from rethaw.model.errors import Fenced
from rethaw.model.types import Event, Fence, NewEvent
from rethaw.node.outputs import Outputs


class Sink:
    """Keeps what is appended. `fenced`: it is another life's by now."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, bytes | None]] = []
        self.fenced = False

    async def append(self, fence: Fence, events: Sequence[NewEvent]) -> list[Event]:
        await asyncio.sleep(0.005)
        if self.fenced:
            raise Fenced("over")
        self.kept += [(event.data["offset"], event.body) for event in events]
        return [cast("Event", event) for event in events]


class Stream:
    """Gives what it has and then waits."""

    kind, base, hung_up = "stdout", 0, False

    def __init__(self, *data: bytes) -> None:
        self.over = False
        self.acked = 0
        self.waiting = asyncio.Event()
        self._data = list(data)

    async def read(self) -> bytes | None:
        if self._data:
            return self._data.pop(0)
        self.waiting.set()
        await asyncio.get_running_loop().create_future()
        return None

    async def ack(self, offset: int) -> None:
        self.acked = offset


async def cancelled(sink: Sink, stream: Stream, offsets: dict[str, int]) -> dict[str, int]:
    outputs = Outputs(cast("Any", sink), Fence(session="s", generation="g"), 1, offsets, lambda: None)
    task = asyncio.create_task(outputs.handle(cast("Any", stream)))
    await stream.waiting.wait()  # within the lull that a line is given to be completed
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return outputs.offsets


async def test_output_shown_just_before_a_freeze_is_in_the_log() -> None:
    """A screen without a newline at its end was seen, the session suspended at once, and who attached then saw the one before."""
    sink, stream = Sink(), Stream(b"full ", b"screen")
    assert await cancelled(sink, stream, {}) == {"stdout": 11}
    assert sink.kept == [(0, b"full screen")]
    assert stream.acked == 0  # the guest says it again after the thaw, and it is known


async def test_what_the_log_has_is_not_stored_again() -> None:
    sink = Sink()
    assert await cancelled(sink, Stream(b"full ", b"screen"), {"stdout": 5}) == {"stdout": 11}
    assert sink.kept == [(5, b"screen")]
    assert await cancelled(sink, Stream(b"full ", b"screen"), {"stdout": 11}) == {"stdout": 11}
    assert len(sink.kept) == 1


async def test_a_sandbox_that_is_gone_and_a_life_that_is_over_are_not_waited_for() -> None:
    sink, stream = Sink(), Stream(b"x")
    stream.over = True
    assert await cancelled(sink, stream, {}) == {} and not sink.kept
    sink.fenced = True
    assert await cancelled(sink, Stream(b"x"), {}) == {} and not sink.kept
