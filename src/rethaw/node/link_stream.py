"""One guest stream as the node sees it: implements `rethaw.model.ports.GuestStream`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

from rethaw.channel import frames
from rethaw.channel.mux import WINDOW, Mux, Receiver, Sender
from rethaw.model.errors import ChannelBroken, Conflict, TooLarge

OUTPUTS = ("stdout", "stderr")
RELAYS = ("tunnel", "dial")  # bytes both ways, kept on both sides until the other has them
KINDS = ("exchange", "call", "stdin", *RELAYS, *OUTPUTS)


class Stream:
    """See `GuestStream`. Lives from one hello to the next quiesce; afterwards its calls raise ChannelBroken.

    `hung_up`: the agent closed its end (its handler has been cancelled), `over`: nothing more can be said on it."""

    def __init__(self, id: int, about: dict[str, Any], mux: Mux, flush: Callable[[], None]) -> None:
        self.id = id
        self.kind: str = about["kind"]
        self.meta: dict[str, object] = about["meta"]
        self.exchange: str | None = about["exchange"]
        self.received: int = about["received"]
        self.head_received: bool = about["head_received"]
        self.base: int = about["base"]
        self.hung_up = False
        self.taken = 0
        self.over = False
        self._mux = mux
        self._flush = flush
        self._in = Receiver(id, self.base)
        self._out = Sender(id, self.received)
        self._out.limit -= about["held"]
        self._data: deque[bytes] = deque()
        self._why: str | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._acked = self.base
        self._ack_wanted = self.base
        self._tap: Callable[[int, bytes], None] | None = None

    @classmethod
    def opened(cls, frame: frames.Frame, mux: Mux, flush: Callable[[], None]) -> Stream:
        """Of an OPEN frame. Raises ChannelBroken when it is not what guestd would say."""
        raw = frames.loads(frame.payload, "open")
        about: dict[str, Any] = {
            "kind": raw.get("kind"),
            "meta": raw.get("meta", {}),
            "exchange": raw.get("exchange"),
            "received": raw.get("received", 0),
            "head_received": raw.get("head_received", False),
            "base": raw.get("base", 0),
            "held": raw.get("held", 0),
        }
        numbers = (about["received"], about["base"], about["held"])
        fits = (
            about["kind"] in KINDS
            and isinstance(about["meta"], dict)
            and isinstance(about["exchange"], str | None)
            and isinstance(about["head_received"], bool)
            and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
            and about["held"] <= min(WINDOW, about["received"])
        )
        if not fits:
            raise ChannelBroken(f"malformed open of stream {frame.stream}: {str(raw)[:200]}")
        return cls(frame.stream, about, mux, flush)

    def __repr__(self) -> str:
        return f"Stream({self.id}, {self.kind}, {self.meta if self.kind == 'call' else self.exchange})"

    # ------------------------------------------------------------ from the guest

    async def read(self) -> bytes | None:
        while not self._data:
            self._alive()
            if self._in.ended:
                self._ack()
                return None
            await self._change()
        self._alive()
        data = self._data.popleft()
        credit = self._in.consume(len(data))
        if credit is not None:
            self._send(credit)
        self._ack()
        return data

    async def read_all(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while (data := await self.read()) is not None:
            size += len(data)
            if size > limit:
                raise TooLarge(f"the body of {self!r} is over {limit} bytes", remedy="send less at once")
            parts.append(data)
        return b"".join(parts)

    def incoming(self, frame: frames.Frame) -> None:
        """A frame of the guest for this stream. Raises ChannelBroken for one that guestd would not send."""
        if frame.kind == frames.DATA:
            self._in.data(frame.offset, len(frame.payload))
            self._data.append(frame.payload)
            if self._tap is not None:
                self._tap(frame.offset, frame.payload)
        elif frame.kind == frames.END:
            self._in.end(frame.offset)
        elif frame.kind == frames.CREDIT:
            self._out.credit(frame.offset)
            self._mux.wake(self._out)
        else:
            raise ChannelBroken(f"malformed frame: a guest does not send {frames.NAMES[frame.kind]}")
        self._notify()

    def tap(self, shown: Callable[[int, bytes], None]) -> None:
        at = self._in.offset - sum(len(data) for data in self._data)
        for data in self._data:
            shown(at, data)
            at += len(data)
        self._tap = shown

    def hang_up(self, why: str, taken: int) -> None:
        """The agent closed its end."""
        self.hung_up = True
        self.taken = taken
        self.kill(why)

    def kill(self, why: str) -> None:
        """Nothing more comes or goes."""
        self._why = why
        self.over = True
        self._mux.drop(self._out)
        self._data.clear()
        self._notify()

    # ------------------------------------------------------------ to the guest

    @property
    def confirmed(self) -> int:
        return self._out.limit - WINDOW

    async def accept(self, exchange: str) -> None:
        """Raises Conflict when the request was not read to its end before: the guest drops its copy."""
        self._alive()
        if self._data or not self._in.ended:
            raise Conflict(f"{self!r}: accepted before its request was read to the end", remedy="call read_all first")
        self.exchange = exchange
        self._send(frames.encode(frames.ACCEPT, self.id, 0, exchange.encode()))

    async def ack(self, offset: int) -> None:
        """An offset beyond what was read so far is remembered and said as reading gets there."""
        self._alive()
        self._ack_wanted = max(self._ack_wanted, offset)
        self._ack()

    def _ack(self) -> None:
        relay = self.kind in RELAYS
        if not relay and (self.kind not in OUTPUTS or self.over):
            return
        offset = min(self._ack_wanted, self._in.offset - sum(len(d) for d in self._data))
        if not relay:
            self.over = self._in.ended and offset == self._in.offset
        if offset > self._acked or (self.over and not relay):
            self._acked = offset
            self._send(frames.encode(frames.ACK, self.id, offset))

    async def head(self, status: int, reason: str, headers: Sequence[tuple[str, str]]) -> None:
        """Raises TooLarge when it does not fit a frame (64 KiB as JSON)."""
        self._writable()
        if self.head_received:
            raise Conflict(f"{self!r}: the guest has a response head already", remedy="look at head_received")
        payload = frames.dumps({"status": status, "reason": reason, "headers": [list(h) for h in headers]})
        if len(payload) > frames.MAX_PAYLOAD:
            raise TooLarge(f"a response head of {len(payload)} bytes is over {frames.MAX_PAYLOAD}")
        self.head_received = True
        self._send(frames.encode(frames.HEAD, self.id, 0, payload))

    async def write(self, data: bytes) -> None:
        self._writable()
        view = memoryview(data)
        while view:
            if self._out.room <= 0:
                await self._change()
                self._writable()
                continue
            part = view[: self._out.room]
            self._out.write(bytes(part))
            self.received += len(part)
            view = view[len(part) :]
            self._mux.wake(self._out)
            self._flush()

    def offer(self, data: bytes) -> bool:
        if self._why is not None or self.over or self._out.room < len(data):
            return False
        self._out.write(data)
        self.received += len(data)
        self._mux.wake(self._out)
        self._flush()
        return True

    async def end(self) -> None:
        self._writable()
        self._out.finish()
        self._mux.wake(self._out)
        self.over = True
        self._flush()

    async def reset(self, why: str) -> None:
        self._alive()
        if not self.over:
            self.over = True
            self._mux.drop(self._out)
            self._send(frames.encode(frames.RESET, self.id, 0, why.encode()[:1024]))

    # ------------------------------------------------------------

    def _alive(self) -> None:
        if self._why is not None:
            raise ChannelBroken(f"{self!r}: {self._why}")

    def _writable(self) -> None:
        self._alive()
        if self.over:
            raise Conflict(f"{self!r}: it has ended already")

    def _send(self, frame: bytes) -> None:
        self._mux.send(frame)
        self._flush()

    async def _change(self) -> None:
        waiter = cast("asyncio.Future[None]", asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _notify(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()
