"""One exchange's answer in this process: from upstream (or the log) into memory and the log, from there to readers.

Owned by the gateway, not by a stream: it goes on whatever happens to the sandbox.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from rethaw.gateway.batch import Batcher
from rethaw.gateway.usage import Decoder, header, is_event_stream, terminal_at, usage_of
from rethaw.model import faults
from rethaw.model.enums import EventType, ExchangeState
from rethaw.model.errors import Conflict, Fenced, InvalidInput, NotFound, RethawError, TooLarge
from rethaw.model.ports import LogSink
from rethaw.model.types import EXCHANGE_LIMIT, MIB, Chunk, Exchange, NewEvent, ResponseHead, Usage

log = logging.getLogger("rethaw.gateway")

WINDOW = 4 * MIB  # of an answer kept in memory; what is older is read from the log again
BACKLOG = 8 * MIB  # not yet durable: beyond it upstream is not read further
SLICE = 256 << 10  # most bytes that a reader is given at once
_LINE = 128  # longest beginning of an SSE line that is looked at again with the next bytes


class Client(StrEnum):
    """Who waits for the answer."""

    WAITING = "waiting"  # a stream is being served
    PARKED = "parked"  # its stream went away: by a quiesce (then hello tells), or because the client hung up
    EXPECTED = "expected"  # named by hello, about to be served again
    FROZEN = "frozen"  # the sandbox is gone or frozen
    GONE = "gone"  # hung up: an equal request adopts it
    SERVED = "served"  # it has the whole, or as much as there will be


@dataclass(eq=False)
class Reader:
    """Has the answer up to `offset`. `offer` takes what comes next at once, or says False."""

    offset: int
    offer: Callable[[bytes], bool]


class Broken(Exception):
    """The answer ends here, as it did upstream."""


FINAL = (Fenced, NotFound, Conflict, InvalidInput, TooLarge)  # errors of the log that trying again does not mend


class Run:
    """`head`, `total` and `durable` (bytes) only grow. `state` is OPEN until the log has closed the exchange."""

    def __init__(self, sink: LogSink, batcher: Batcher, exchange: Exchange) -> None:
        self.id = exchange.id
        self.meta = exchange.meta
        self.epoch = exchange.epoch
        self.attempt = exchange.attempt
        self.line = exchange.line
        self.seq = exchange.seq
        self.session = exchange.session
        self.state = exchange.state
        self.usage: Usage | None = exchange.usage
        self.head: ResponseHead | None = None
        self.total = 0
        self.durable = 0
        self.error: str | None = None  # why no more will come
        self.broken = False  # upstream broke, or the exchange was lost: readers get Broken after the last byte
        self.lost = False  # not this process's any more: the log knows better
        self.sent = False  # the request may have reached the provider
        self.tries = 0
        self.held = False
        self.client = Client.FROZEN
        self.left_at = 0.0  # loop time when `client` stopped waiting
        self.serving: object | None = None  # the stream being served: a newer one takes its place
        self.adopted = False  # asked for again after a crash
        self.live = False  # begun by a request of the present life, not taken from the tail
        self.task: asyncio.Task[None] | None = None
        self._sink = sink
        self._batcher = batcher
        self._body = bytearray()
        self._base = 0  # offset of _body[0]
        self._pending: list[Chunk] = []
        self._backlog = 0
        self._head_durable = False
        self._hold_at: int | None = None  # bytes from here on wait until all that came is durable
        self._expected: int | None = None
        self._last_came = False  # the part after which a client needs no more
        self._sse: Decoder | None = None  # of an event stream, to see its last event
        self._line_start = b""
        self._lock = asyncio.Lock()
        self._waiters: list[asyncio.Future[None]] = []
        self._reader: Reader | None = None  # waits for more
        self._urgent: asyncio.Task[None] | None = None
        self._head_at = 0.0
        self._begun = time.monotonic()

    @classmethod
    def recorded(cls, sink: LogSink, batcher: Batcher, exchange: Exchange) -> Run:
        """One that the log has closed: nothing in memory, all from the log."""
        run = cls(sink, batcher, exchange)
        run.head = exchange.head
        run.total = run.durable = run._base = exchange.received
        run._head_durable = exchange.head is not None
        if exchange.state is not ExchangeState.COMPLETE:
            run.broken = True
            run.error = f"the recorded answer is {exchange.state.value}"
        return run

    # ------------------------------------------------------------ what comes in

    def feed_head(self, head: ResponseHead) -> None:
        self.head = head
        self._head_at = time.monotonic()
        if is_event_stream(head.headers):
            try:
                self._sse = Decoder(header(head.headers, "content-encoding"))
            except ValueError:
                self._hold_at = 0  # its last event cannot be seen: nothing goes out before it is durable
        length = header(head.headers, "content-length")
        self._expected = int(length) if length is not None and length.isdigit() and self.meta.method != "HEAD" else None
        self._batcher.mark(self)
        self._notify()

    async def feed(self, data: bytes) -> None:
        """Bytes that came. Waits when too many of them are not durable yet. Raises TooLarge, Fenced."""
        if self.total + len(data) > EXCHANGE_LIMIT:
            raise TooLarge(f"the answer is larger than {EXCHANGE_LIMIT} bytes", remedy="ask for less at once")
        at_us = int((time.monotonic() - self._head_at) * 1e6)
        self._pending.append(Chunk(offset=self.total, data=data, at_us=at_us))
        self._backlog += len(data)
        if self._hold_at is None:
            self._hold_at = self._final_part(data)
        self._body += data
        self.total += len(data)
        self._batcher.mark(self)
        if self._hold_at is not None and (self._urgent is None or self._urgent.done()):
            self._urgent = asyncio.create_task(self._hurry())
        if not self._handed_on(data):
            self._notify()
        if self._backlog > BACKLOG:
            await self._flush_patiently()

    def _handed_on(self, data: bytes) -> bool:
        """Whether the one who waits has taken `data`, which just came, without being woken up: a turn of the event loop
        less for each piece of every stream."""
        reader = self._reader
        if reader is None or self._hold_at is not None or reader.offset + len(data) != self.total:
            return False
        if len(self._waiters) != 1 or not reader.offer(data):
            return False
        reader.offset = self.total
        return True

    def _final_part(self, data: bytes) -> int | None:
        """Where the last part of the answer begins, if `data` has it: a client acts on it before the connection ends,
        so it must be durable first."""
        if self._expected is not None:
            self._last_came = self.total + len(data) >= self._expected
            return self.total if self._last_came else None
        if self._sse is None:
            return None
        try:
            plain = self._sse.feed(data)
        except ValueError:
            return self.total
        text = self._line_start + plain
        at = terminal_at(text)
        if at >= 0:
            self._last_came = True
            return self.total + max(0, at - len(self._line_start)) if plain is data else self.total
        self._line_start = text[text.rfind(b"\n") + 1 :][:_LINE]
        return None

    # ------------------------------------------------------------ into the log

    async def flush(self) -> None:
        """All received so far is durable. Raises Unavailable (then nothing is lost), Fenced (another owner has it)."""
        async with self._lock:
            if self.state is not ExchangeState.OPEN or self.head is None:
                return
            count, upto = len(self._pending), self.total
            if not count and self._head_durable:
                return
            faults.point("gateway.response.batch")
            head = None if self._head_durable else self.head
            try:
                await self._sink.append_response(self.id, self.epoch, head, self._pending[:count])
            except FINAL as error:
                self.lose(f"the log refused its answer: {error}")
                raise
            del self._pending[:count]
            self._head_durable = True
            self._backlog -= upto - self.durable
            self.durable = upto
            surplus = min(self.durable - self._base, len(self._body) - WINDOW)
            if surplus > 0:
                del self._body[:surplus]
                self._base += surplus
        self._notify()

    async def _flush_patiently(self) -> None:
        pause = 0.1
        while True:
            try:
                return await self.flush()
            except FINAL:
                raise
            except RethawError as error:
                log.warning("exchange %s: the log does not take its answer, waiting: %s", self.id, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 5.0)

    async def _hurry(self) -> None:
        try:
            while self.durable < self.total and self.state is ExchangeState.OPEN:
                await self._flush_patiently()
        except FINAL:
            pass

    async def finish(self, state: ExchangeState, error: str | None = None) -> None:
        """Upstream ended: close the exchange in the log, then let readers see its end. Raises Fenced."""
        self.error = error
        await self._flush_patiently()
        whole = bytes(self._body) if self._base == 0 else None
        if self.head is not None and self.meta.model_call:
            self.usage = usage_of(self.head.headers, whole if whole is not None else await self._read_all())
        faults.point("gateway.finish.before")
        await self._close(state)
        self.broken = state is not ExchangeState.COMPLETE
        self.state = state
        self._notify()

    async def _close(self, state: ExchangeState) -> None:
        event = self._event(state)
        pause = 0.1
        while True:
            try:
                await self._sink.finish_exchange(self.id, self.epoch, state, self.usage, event)
                return
            except FINAL as error:
                self.lose(f"the log refused its end: {error}")
                raise
            except RethawError as error:
                log.warning("exchange %s: could not be closed in the log, trying again: %s", self.id, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 5.0)

    def _event(self, state: ExchangeState) -> NewEvent:
        now = time.monotonic()
        times = {
            "first_byte_ms": round((self._head_at - self._begun) * 1000, 1) if self._head_at else None,
            "duration_ms": round((now - self._begun) * 1000, 1),
        }
        if state is ExchangeState.COMPLETE:
            assert self.head is not None
            return completed(self.id, self.head.status, self.total, self.usage, tries=self.tries, **times)
        data = {"exchange": self.id, "error": self.error, "possibly_paid": self.sent, "response_bytes": self.total}
        data |= {"status": self.head.status if self.head else None, "tries": self.tries, **times}
        return NewEvent(type=EventType.EXCHANGE_FAILED, data=data, key=f"closed:{self.id}:{self.epoch}")

    def lose(self, why: str) -> None:
        """The exchange is not this process's any more; readers end."""
        self.broken = self.lost = True
        self.error = why
        if self.state is ExchangeState.OPEN:
            self.state = ExchangeState.FAILED
        self._notify()

    # ------------------------------------------------------------ to readers

    @property
    def done(self) -> bool:
        return self.state is not ExchangeState.OPEN

    @property
    def answered(self) -> bool:
        """Whether a first byte, or the news that none will come, is here."""
        return self.head is not None or self.done

    def whole_at(self, offset: int) -> bool:
        """Whether an agent that has read `offset` bytes has seen the whole answer. Its connection may end later: many a
        client closes its own after the last event."""
        return (self._last_came or self.done) and not self.broken and offset >= self.total > 0

    def _releasable(self) -> int:
        if self.done or self._hold_at is None or self.durable >= self.total:
            return self.total
        return self._hold_at

    async def until_answered(self) -> None:
        while not self.answered:
            await self._change()

    async def read(self, reader: Reader) -> bytes:
        """Bytes from `reader.offset` on as soon as they may go out and were not offered; b"" at the end of a whole
        answer, which is durable then. Raises Broken at the end of any other."""
        while True:
            offset = reader.offset
            ready = self._releasable()
            if offset < ready:
                return await self._slice(offset, min(ready, offset + SLICE))
            if self.done:
                if self.broken or offset > self.total:
                    raise Broken(self.error or f"the agent claims {offset} bytes of an answer of {self.total}")
                return b""
            self._reader = reader
            try:
                await self._change()
            finally:
                self._reader = None

    async def _slice(self, start: int, end: int) -> bytes:
        if start >= self._base:
            return bytes(memoryview(self._body)[start - self._base : end - self._base])
        chunks = await self._sink.read_response(self.id, start, min(end, self._base) - start)
        out = bytearray()
        for chunk in chunks:
            skip = start + len(out) - chunk.offset
            out += chunk.data[skip:] if skip > 0 else chunk.data
        if not out:
            raise Broken(f"the log has no bytes of {self.id} from {start} on")
        return bytes(out[: end - start])

    async def _read_all(self) -> bytes:
        out = bytearray()
        while len(out) < self.total:
            out += await self._slice(len(out), self.total)
        return bytes(out)

    async def _change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _notify(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()


def completed(exchange: str, status: int, size: int, usage: Usage | None, **more: object) -> NewEvent:
    """The event that closes a whole exchange. Tokens as the provider reported them, None where it reported nothing."""
    counts = (usage or Usage()).model_dump()
    data = {"exchange": exchange, "status": status, "response_bytes": size, **counts, **more}
    return NewEvent(type=EventType.EXCHANGE_COMPLETED, data=data, key=f"closed:{exchange}")
