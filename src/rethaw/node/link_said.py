"""What guestd says in its control messages, as the node believes it: validated, since a guest may lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from rethaw.channel import frames
from rethaw.model.errors import ChannelBroken

MAX_STREAMS = 2048  # open at once; guestd stops at half of it
MAX_LEFT = 256  # guestd remembers a quarter of it


@dataclass(frozen=True)
class QuietState:
    """What a quiet guest holds. `marker` (hex) goes into the snapshot: the resync marker of its restores."""

    marker: str
    exchanges: dict[str, tuple[bool, int]]  # accepted ones: whether the head is there, response bytes there
    cursor: int  # inbox messages up to this number are consumed
    exited: bool  # whether the agent's main process has ended
    took_s: float


@dataclass(frozen=True)
class Resized:
    """A terminal's size from byte `offset` of its output on."""

    rows: int
    cols: int
    offset: int


@dataclass(frozen=True)
class Hello:
    """What guestd said after start, go or resume. `exchanges`: accepted exchanges whose client still waits. `left`: those
    whose client went away of late, and how many bytes of the answer it had read. `calls`: ids of Context calls that
    have no answer yet."""

    generation: str
    exchanges: tuple[str, ...]
    left: Mapping[str, int]
    calls: tuple[str, ...]
    streams: int
    pid: int
    exited: bool
    tunnels: tuple[int, ...] = ()  # streams
    dials: tuple[int, ...] = ()  # streams
    can_dial: bool = False  # False: a guestd that was frozen before there was that
    size: Resized | None = None  # of its terminal, if it has one


def quiet_state(message: dict[str, Any], marker: bytes, took_s: float) -> QuietState:
    exchanges: dict[str, tuple[bool, int]] = {}
    try:
        for exchange, head, received in message["exchanges"]:
            exchanges[str(exchange)] = (bool(head), int(received))
        cursor = int(message["cursor"])
    except (KeyError, TypeError, ValueError):
        raise ChannelBroken(f"malformed quiet: {str(message)[:200]}") from None
    return QuietState(marker.hex(), exchanges, cursor, message.get("exited") is True, took_s)


def streams_of(hello: dict[str, Any]) -> set[int]:
    """Ids of the streams that a hello announces."""
    streams: object = hello.get("streams")
    listed = cast("list[object]", streams if isinstance(streams, list) else [None])
    if len(listed) > MAX_STREAMS or not all(type(s) is int and 0 < s <= frames.MAX_STREAM for s in listed):
        raise ChannelBroken(f"malformed hello: {len(listed)} streams, {str(listed)[:100]}")
    return {cast(int, s) for s in listed}


def resized(message: dict[str, Any]) -> Resized | None:
    """The terminal's size in a `hello` or `resized`. None where there is no terminal."""
    size: object = message.get("size")
    if size is None:
        return None
    listed = cast("list[int]", size if isinstance(size, list) else [])
    if len(listed) != 3 or not all(type(n) is int and 0 <= n < 1 << 62 for n in listed):
        raise ChannelBroken(f"malformed size of a terminal: {str(listed)[:100]}")
    rows, cols, offset = listed
    return Resized(min(rows, 65535), min(cols, 65535), offset)


def left_one(message: dict[str, Any]) -> tuple[str, int]:
    """Exchange id and bytes of a `left`."""
    ((exchange, taken),) = _left([[message.get("exchange"), message.get("taken")]]).items()
    return exchange, taken


def left_of(hello: dict[str, Any]) -> dict[str, int]:
    """Exchange ids and bytes. None for a guestd that was frozen before it said that."""
    return _left(hello.get("left", []))


def _left(listed: object) -> dict[str, int]:
    out: dict[str, int] = {}
    try:
        for exchange, taken in cast("list[tuple[object, object]]", listed):
            if not isinstance(exchange, str) or type(taken) is not int or taken < 0 or len(out) == MAX_LEFT:
                raise ValueError
            out[exchange] = taken
    except (TypeError, ValueError):
        raise ChannelBroken(f"malformed message of exchanges that were left: {str(listed)[:100]}") from None
    return out
