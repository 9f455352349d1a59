"""Terminals, and piped stdins, of the main programs on this node: what is typed, on its way to the guest, and what is
written, as it comes. Both outlive lives: a seat is taken at a session, whatever becomes of its sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from rethaw.model.enums import EventType
from rethaw.model.errors import ChannelBroken, Unavailable
from rethaw.model.ports import GuestStream, LogSink
from rethaw.model.terminal import Came, Left, Live, Missed, Shown
from rethaw.model.types import AgentSpec, Fence, NewEvent
from rethaw.node.link import Link
from rethaw.node.link_said import Resized

log = logging.getLogger("rethaw.node")
_WAITING = 256 << 10  # typed bytes that wait for the guest before nobody may type more
_UNSEEN = 4 << 20  # bytes of output that wait for a slow reader before it is left to the log
_PIECE = 32 << 10


class Terminals:
    """All of one node, by session."""

    def __init__(self) -> None:
        self._known: dict[str, Keyboard] = {}

    def seat(self, session: str) -> NodeSeat:
        """See `model.terminal.Terminals`."""
        return NodeSeat(self.of(session))

    def of(self, session: str) -> Keyboard:
        if session not in self._known:
            self._known[session] = Keyboard(lambda: self._forget(session))
        return self._known[session]

    def _forget(self, session: str) -> None:
        self._known.pop(session, None)


class Keyboard:
    """What is typed for one session until its guest has it, and who looks at it."""

    def __init__(self, unused: Callable[[], None]) -> None:
        self._unused = unused
        self._waiting = bytearray()
        self._base = 0  # offset of its first byte in what the guest counts
        self._sent = 0  # offset up to which a guest was given it
        self._heard = 0  # offset up to which the program had time for it
        self._ends_at: int | None = None
        self._more = asyncio.Event()
        self._room = asyncio.Event()
        self.size: tuple[int, int] | None = None  # of who looks at it
        self.life: Life | None = None
        self.seats: set[NodeSeat] = set()

    @property
    def typed(self) -> bool:
        """Whether something waits for the guest."""
        return self._base + len(self._waiting) > max(self._base, self._heard)

    def heard(self) -> None:
        """What was given was given long ago: the guest, which confirms nothing but many bytes, has it, and so has its program."""
        self._heard = self._sent

    def tell(self, live: Live) -> None:
        for seat in self.seats:
            seat.put(live)

    def came(self, life: Life) -> None:
        self.life = life

    def left(self, life: Life) -> None:
        if self.life is life:
            self.life = None
            self.tell(Left(self.typed))
            self.unused()

    def unused(self) -> None:
        if not self.seats and self.life is None and not self._waiting:
            self._unused()

    async def type(self, data: bytes) -> None:
        while len(self._waiting) >= _WAITING:
            self._room.clear()
            await self._room.wait()
        self._waiting += data
        self._noticed()

    async def give(self, offset: int, data: bytes) -> None:
        while len(self._waiting) >= _WAITING:
            self._room.clear()
            await self._room.wait()
        known = self._base + len(self._waiting)
        if self.life is not None and self.life.taken is not None and offset <= known < offset + len(data):
            self._waiting += data[known - offset :]
            self._noticed()

    def end(self, offset: int) -> None:
        self._ends_at = offset
        self._noticed()

    def _noticed(self) -> None:
        self._more.set()
        if self.life is not None:
            self.life.active()

    def resize(self, rows: int, cols: int) -> None:
        self.size = (rows, cols)
        if self.life is not None:
            self.life.resize()

    # ------------------------------------------------------------ to the guest

    def opened(self, taken: int, *, first: bool, piped: bool) -> None:
        """The guest has had `taken` bytes. `first`: of a new life. Keys that a former life was given and this one has not
        are lost with it: what they were meant for may not be there any more. Of a pipe everything is given again, by
        who has it."""
        if first:
            self._heard = 0
        if first and piped:
            self._waiting.clear()
        elif first:
            del self._waiting[: max(0, self._sent - self._base)]
        elif taken >= self._base:
            self._forget(taken)
        if first or taken >= self._base:
            self._base = self._sent = taken
        self._room.set()

    async def serve(self, stream: GuestStream) -> None:
        """Until the stream is over, or the guest falls quiet (then this is cancelled)."""
        while True:
            self._more.clear()
            self._forget(stream.confirmed)
            at = stream.received - self._base
            if at < len(self._waiting):
                try:
                    await stream.write(bytes(self._waiting[at : at + _PIECE]))
                finally:
                    self._sent = max(self._sent, stream.received)
            elif self._ends_at is not None and stream.received >= self._ends_at:
                await stream.end()
                return
            else:
                await self._more.wait()

    def gone(self) -> None:
        """The program has closed its stdin."""
        self._forget(self._base + len(self._waiting))

    def _forget(self, offset: int) -> None:
        size = min(offset - self._base, len(self._waiting))
        if size > 0:
            del self._waiting[:size]
            self._base += size
        if len(self._waiting) < _WAITING:
            self._room.set()


class Life:
    """The terminal of one life of a session."""

    def __init__(
        self,
        keyboard: Keyboard,
        sink: LogSink,
        fence: Fence,
        agent: AgentSpec,
        line: int,
        attempt: int,
        active: Callable[[], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._keyboard = keyboard
        self._sink = sink
        self._fence = fence
        self._terminal = agent.terminal is not None
        self._line = line
        self._attempt = attempt
        self._spawn = spawn
        self.active = active
        self._link: Link | None = None
        self._size: Resized | None = None
        self._asked: tuple[int, int] | None = None
        self._shown: dict[str, int] = {}
        self.taken: int | None = None  # of its stdin; None: not known yet
        self.last = time.monotonic()  # that something was written or typed
        keyboard.came(self)

    def joined(self, link: Link) -> None:
        self._link = link

    @property
    def typed(self) -> bool:
        return self._keyboard.typed

    def heard(self) -> None:
        self._keyboard.heard()

    def show(self, stream: str, offset: int, data: bytes) -> None:
        """Bytes that the program wrote; those that a thaw brings again are left out."""
        known = self._shown.get(stream, offset)
        if offset + len(data) > known >= offset:
            self._keyboard.tell(Shown(self._line, self._attempt, stream, known, data[known - offset :]))
        self._shown[stream] = max(known, offset + len(data))

    async def serve(self, stream: GuestStream) -> None:
        first = self.taken is None
        self.taken = stream.received
        if stream.meta.get("ended"):
            self._keyboard.gone()
            return
        self._keyboard.opened(stream.received, first=first, piped=not self._terminal)
        if first:
            self._keyboard.tell(self.began(stream.received))
        await self._keyboard.serve(stream)

    def began(self, taken: int) -> Came:
        return Came(self._line, self._attempt, taken)

    def resize(self) -> None:
        """Tell the guest of a size that it has not."""
        wanted = self._keyboard.size
        if wanted is None or self._link is None or self._size is None or wanted == self._asked:
            return
        if wanted == (self._size.rows, self._size.cols) and self._asked is None:
            return
        self._asked = wanted
        self._spawn(self._resize(self._link, *wanted))

    async def _resize(self, link: Link, rows: int, cols: int) -> None:
        with contextlib.suppress(ChannelBroken):  # the sandbox is on its way out
            await link.resize(rows, cols)

    def resized(self, size: Resized | None) -> None:
        """The guest has said it."""
        if size is None:
            return
        first, self._size = self._size is None, size
        self._spawn(self._log(size))
        if first:
            self.resize()

    async def _log(self, size: Resized) -> None:
        data = {"rows": size.rows, "cols": size.cols, "offset": size.offset}
        key = f"terminal:{self._attempt}:{size.offset}:{size.rows}x{size.cols}"
        try:
            await self._sink.append(self._fence, [NewEvent(type=EventType.TERMINAL_RESIZED, data=data, key=key)])
        except Unavailable as error:
            log.warning("session %s: the size of its terminal is not in the log: %s", self._fence.session, error)

    def close(self) -> None:
        self._keyboard.left(self)


class NodeSeat:
    """See `model.terminal.Seat`."""

    def __init__(self, keyboard: Keyboard) -> None:
        self._keyboard = keyboard
        self._coming: deque[Live] = deque()
        self._size = 0
        self._more = asyncio.Event()
        keyboard.seats.add(self)
        life = keyboard.life
        if life is not None and life.taken is not None:
            self.put(life.began(life.taken))

    def put(self, live: Live) -> None:
        if isinstance(live, Shown):
            self._size += len(live.data)
            if self._size > _UNSEEN:
                kept: list[Live] = [one for one in self._coming if not isinstance(one, Shown | Missed)]
                self._coming, self._size = deque([*kept, Missed()]), 0
                self._more.set()
                return
        self._coming.append(live)
        self._more.set()

    async def next(self) -> Live:
        while not self._coming:
            self._more.clear()
            await self._more.wait()
        live = self._coming.popleft()
        if isinstance(live, Shown):
            self._size = max(0, self._size - len(live.data))
        return live

    @property
    def awake(self) -> bool:
        return self._keyboard.life is not None

    async def type(self, data: bytes) -> None:
        await self._keyboard.type(data)

    async def give(self, offset: int, data: bytes) -> None:
        await self._keyboard.give(offset, data)

    def end(self, offset: int) -> None:
        self._keyboard.end(offset)

    def resize(self, rows: int, cols: int) -> None:
        self._keyboard.resize(rows, cols)

    def close(self) -> None:
        self._keyboard.seats.discard(self)
        if not self._keyboard.seats:
            self._keyboard.size = None
        self._keyboard.unused()
