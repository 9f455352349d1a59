"""What goes over the channel next, and how much of each stream may.

Every stream has at most WINDOW bytes in flight in each direction: the receiver grants more (CREDIT) as its reader
takes bytes, so a stream that nobody reads holds up only itself, and neither end ever has to stop reading the channel.
Everything that is not DATA or END goes first; data frames take turns between streams.
"""

from __future__ import annotations

from rethaw.channel.frames import CREDIT, DATA, END, encode
from rethaw.channel.lean import deque
from rethaw.model.errors import ChannelBroken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Deque, List, Optional

WINDOW = 65536
CHUNK = 32768  # largest DATA frame we send: two of them fit a 64 KiB pipe


class Sender:
    """One stream's outgoing bytes, from `base` on. With `keep` they stay until `forget`, so they can be sent again."""

    __slots__ = ("_end_sent", "base", "buffer", "finished", "keep", "limit", "queued", "sent", "stream")

    def __init__(self, stream: int, base: int = 0, keep: bool = False) -> None:
        self.stream = stream
        self.base = base
        self.sent = base
        self.limit = base + WINDOW
        self.buffer = bytearray()
        self.finished = False
        self.keep = keep
        self.queued = False
        self._end_sent = False

    @property
    def end(self) -> int:
        """Offset after the last byte written so far."""
        return self.base + len(self.buffer)

    @property
    def room(self) -> int:
        """Bytes that may be written now and will go out without further credit."""
        return self.limit - self.end

    @property
    def done(self) -> bool:
        """Whether everything, the END frame too, has been handed to the channel."""
        return self._end_sent

    def write(self, data: bytes) -> None:
        self.buffer += data

    def finish(self) -> None:
        self.finished = True

    def forget(self, offset: int) -> None:
        """Bytes before `offset` are safe elsewhere. Raises ChannelBroken when they were never sent."""
        if offset > self.sent:
            raise ChannelBroken(f"stream {self.stream}: {offset} acknowledged, only {self.sent} sent")
        if offset > self.base:
            del self.buffer[: offset - self.base]
            self.base = offset

    def rewind(self) -> None:
        """Send again all that is kept, with a fresh window."""
        self.sent = self.base
        self.limit = self.base + WINDOW
        self._end_sent = False
        self.queued = False

    def credit(self, limit: int) -> None:
        """Raises ChannelBroken for a limit that no receiver of ours could grant."""
        if limit > self.sent + WINDOW:
            raise ChannelBroken(f"stream {self.stream}: credit up to {limit}, but only {self.sent} sent")
        self.limit = max(self.limit, limit)

    @property
    def ready(self) -> bool:
        if self.sent < self.end:
            return self.sent < self.limit
        return self.finished and not self._end_sent

    def frame(self) -> bytes:
        """The next frame; only when `ready`."""
        if self.sent < self.end:
            start = self.sent - self.base
            size = min(CHUNK, self.limit - self.sent, self.end - self.sent)
            out = encode(DATA, self.stream, self.sent, bytes(self.buffer[start : start + size]))
            self.sent += size
            if not self.keep:
                self.forget(self.sent)
            return out
        self._end_sent = True
        return encode(END, self.stream, self.end)


class Receiver:
    """One stream's incoming bytes: order, window and credit. `held`: bytes before `base` that the reader has not taken yet,
    for a window that goes on."""

    __slots__ = ("_consumed", "ended", "limit", "offset", "stream")

    def __init__(self, stream: int, base: int = 0, held: int = 0) -> None:
        self.stream = stream
        self.offset = base
        self.limit = base - held + WINDOW
        self.ended = False
        self._consumed = base - held

    @property
    def held(self) -> int:
        """Bytes that the reader has not taken yet."""
        return self.offset - self._consumed

    def data(self, offset: int, size: int) -> None:
        """`size` bytes came for `offset`. Raises ChannelBroken for a gap, a repetition, or more than was allowed."""
        if self.ended:
            raise ChannelBroken(f"stream {self.stream}: data after its end")
        if offset != self.offset:
            raise ChannelBroken(f"stream {self.stream}: data for offset {offset}, expected {self.offset}")
        if offset + size > self.limit:
            raise ChannelBroken(f"stream {self.stream}: data up to {offset + size}, allowed up to {self.limit}")
        self.offset += size

    def end(self, offset: int) -> None:
        if self.ended or offset != self.offset:
            raise ChannelBroken(f"stream {self.stream}: end at {offset}, expected at {self.offset}")
        self.ended = True

    def consume(self, size: int) -> Optional[bytes]:
        """The reader took `size` bytes: a CREDIT frame when it is time for one."""
        self._consumed += size
        if self.ended or self._consumed + WINDOW - self.limit < WINDOW // 2:
            return None
        self.limit = self._consumed + WINDOW
        return encode(CREDIT, self.stream, self.limit)


class Mux:
    """The queue of one end."""

    def __init__(self) -> None:
        self._first: Deque[bytes] = deque()
        self._ready: Deque[Sender] = deque()

    def send(self, frame: bytes) -> None:
        """Queue a frame that is not DATA or END: before all of those, after others of its kind."""
        self._first.append(frame)

    def wake(self, sender: Sender) -> None:
        """`sender` may have something to send."""
        if not sender.queued and sender.ready:
            sender.queued = True
            self._ready.append(sender)

    def drop(self, sender: Sender) -> None:
        if sender.queued:
            sender.queued = False
            self._ready.remove(sender)

    @property
    def pending(self) -> bool:
        return bool(self._first or self._ready)

    def take(self, room: int = WINDOW) -> bytes:
        """Whole frames to write next, about `room` bytes (at least one frame, at most one more than fits)."""
        out: List[bytes] = []
        size = 0
        while self._first and size < room:
            frame = self._first.popleft()
            out.append(frame)
            size += len(frame)
        while self._ready and size < room:
            sender = self._ready.popleft()
            sender.queued = False
            if sender.ready:
                frame = sender.frame()
                out.append(frame)
                size += len(frame)
                self.wake(sender)
        return b"".join(out)

    def clear(self) -> None:
        """Forget what is queued. What is kept by senders stays with them."""
        self._first.clear()
        for sender in self._ready:
            sender.queued = False
        self._ready.clear()
