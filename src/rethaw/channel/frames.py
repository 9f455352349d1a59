"""The channel's wire format.

    byte 0      magic 0xA5
    byte 1      kind
    bytes 2-5   stream, 0 for CONTROL and PART only
    bytes 6-9   payload length, at most 65,536
    bytes 10-17 offset: of the payload's first byte (DATA), of the end (END), new limit (CREDIT), durable up to (ACK),
                taken of the answer (RESET by the guest)
    then        payload

All numbers are big-endian. Anything else is malformed and ends the channel: a decoder that has raised once raises
the same again for ever. A decoder keeps at most one frame's worth of bytes beyond what it was fed.
"""

from __future__ import annotations

import struct

from rethaw.channel import lean
from rethaw.channel.lean import cast
from rethaw.model.errors import ChannelBroken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional

MAGIC = 0xA5
MAX_PAYLOAD = 65536
CONTROL_LIMIT = 8 << 20  # one control message, all its parts together
MAX_STREAM = (1 << 32) - 1

CONTROL = 1  # JSON object, the last or only part of it
PART = 2  # a part of a control message, more follow
OPEN = 3  # guest -> node: JSON {kind, meta, exchange, head_received, received, base}
DATA = 4
END = 5  # no more DATA in this direction
HEAD = 6  # node -> guest: JSON {status, reason, headers}
CREDIT = 7  # the other side may send up to `offset`
ACK = 8  # node -> guest: bytes before `offset` are durable
ACCEPT = 9  # node -> guest: the request is durable; payload is the exchange id
RESET = 10  # the stream is over; payload says why
NAMES = ("", "control", "part", "open", "data", "end", "head", "credit", "ack", "accept", "reset")

_HEADER = struct.Struct(">BBIIQ")
HEADER_SIZE = _HEADER.size
_EMPTY = (END, CREDIT, ACK)


class Frame:
    """One frame. `offset` is 0 where the kind has none."""

    __slots__ = ("kind", "offset", "payload", "stream")

    def __init__(self, kind: int, stream: int, offset: int, payload: bytes) -> None:
        self.kind = kind
        self.stream = stream
        self.offset = offset
        self.payload = payload

    def __repr__(self) -> str:
        return f"Frame({NAMES[self.kind]}, stream={self.stream}, offset={self.offset}, {len(self.payload)} bytes)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frame) and (self.kind, self.stream, self.offset, self.payload) == (
            other.kind, other.stream, other.offset, other.payload,
        )  # fmt: skip

    __hash__ = None  # type: ignore[assignment]


def encode(kind: int, stream: int = 0, offset: int = 0, payload: bytes = b"") -> bytes:
    """The bytes of one frame. Raises ChannelBroken for a payload over MAX_PAYLOAD: the caller has to split it."""
    if len(payload) > MAX_PAYLOAD:
        raise ChannelBroken(f"a {NAMES[kind]} frame of {len(payload)} bytes is over {MAX_PAYLOAD}")
    return _HEADER.pack(MAGIC, kind, stream, len(payload), offset) + payload


def encode_json(kind: int, stream: int, value: Dict[str, Any]) -> bytes:
    """A frame whose payload is `value` as JSON. Raises ChannelBroken when that is over MAX_PAYLOAD."""
    return encode(kind, stream, 0, dumps(value))


def encode_control(message: Dict[str, Any]) -> bytes:
    """One control message as a CONTROL frame, with PART frames before it when it is long."""
    data = dumps(message)
    if len(data) > CONTROL_LIMIT:
        raise ChannelBroken(f"a control message of {len(data)} bytes is over {CONTROL_LIMIT}")
    out: List[bytes] = []
    while len(data) > MAX_PAYLOAD:
        out.append(encode(PART, 0, 0, data[:MAX_PAYLOAD]))
        data = data[MAX_PAYLOAD:]
    out.append(encode(CONTROL, 0, 0, data))
    return b"".join(out)


def dumps(value: Any) -> bytes:
    """Compact JSON, ASCII only, so lone surrogates travel as escapes."""
    return lean.dumps(value)


def loads(payload: bytes, what: str) -> Dict[str, Any]:
    """The JSON object in `payload`. Raises ChannelBroken naming `what`."""
    try:
        value = lean.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ChannelBroken(f"malformed {what}: {error}") from None
    if not isinstance(value, dict):
        raise ChannelBroken(f"malformed {what}: a JSON object is expected, got {type(value).__name__}")
    return cast("Dict[str, Any]", value)


class Decoder:
    """Bytes in, frames out, whatever way the bytes are split."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0
        self._broken: Optional[str] = None

    def feed(self, data: bytes) -> None:
        if self._at:
            del self._buffer[: self._at]
            self._at = 0
        self._buffer += data

    def next(self) -> Optional[Frame]:
        """The next whole frame, None until more is fed. Raises ChannelBroken saying what is malformed."""
        if self._broken is not None:
            raise ChannelBroken(self._broken)
        have = len(self._buffer) - self._at
        if have < HEADER_SIZE:
            return None
        magic, kind, stream, length, offset = _HEADER.unpack_from(self._buffer, self._at)
        if magic != MAGIC:
            self._fail(f"malformed frame: first byte is 0x{magic:02x}, not 0x{MAGIC:02x}")
        if not CONTROL <= kind <= RESET:
            self._fail(f"malformed frame: unknown kind {kind}")
        if length > MAX_PAYLOAD:
            self._fail(f"malformed {NAMES[kind]} frame: {length} bytes is over {MAX_PAYLOAD}")
        if (stream == 0) != (kind in (CONTROL, PART)):
            self._fail(f"malformed {NAMES[kind]} frame: stream {stream} does not fit its kind")
        if length and kind in _EMPTY:
            self._fail(f"malformed {NAMES[kind]} frame: it carries {length} bytes, none are expected")
        if not length and kind == DATA:
            self._fail("malformed data frame: it is empty")
        if have < HEADER_SIZE + length:
            return None
        start = self._at + HEADER_SIZE
        self._at = start + length
        return Frame(kind, stream, offset, bytes(self._buffer[start : self._at]))

    def rest(self) -> bytes:
        """Take the bytes that are not parsed yet."""
        data = bytes(self._buffer[self._at :])
        self._buffer.clear()
        self._at = 0
        return data

    def _fail(self, why: str) -> None:
        self._broken = why
        self._buffer.clear()
        self._at = 0
        raise ChannelBroken(why)


class ControlReader:
    """Puts the parts of control messages together."""

    def __init__(self) -> None:
        self._parts = bytearray()

    def add(self, frame: Frame) -> Optional[Dict[str, Any]]:
        """The whole message once its last part is here. Raises ChannelBroken when it is too long or no JSON object
        with a string `type`."""
        if len(self._parts) + len(frame.payload) > CONTROL_LIMIT:
            raise ChannelBroken(f"malformed control message: over {CONTROL_LIMIT} bytes")
        if frame.kind == PART:
            self._parts += frame.payload
            return None
        data = bytes(self._parts) + frame.payload
        self._parts.clear()
        message = loads(data, "control message")
        if not isinstance(message.get("type"), str):
            raise ChannelBroken("malformed control message: it has no type")
        return message
