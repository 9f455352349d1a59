"""Gets one exchange's answer from its provider: tries, holds while the provider says "later", passes on what comes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from rethaw.gateway import hold
from rethaw.gateway.contracts import GatewayHooks
from rethaw.gateway.providers import Provider
from rethaw.gateway.run import FINAL, Run
from rethaw.gateway.upstream import BROKEN, NOT_SENT, Answer, Upstream
from rethaw.model import faults
from rethaw.model.enums import EventType, ExchangeState
from rethaw.model.errors import TooLarge
from rethaw.model.types import NewEvent

log = logging.getLogger("rethaw.gateway")

_PEEK_S = 5.0


@dataclass
class _Later:
    """Why there is no answer yet."""

    error: str
    pause: float
    status: int | None = None
    retry_after: float | None = None
    possibly_paid: bool = False
    answer: Answer | None = None  # what the provider said, to be passed on if it cannot be held
    peeked: Sequence[bytes] = ()


@dataclass
class Pump:
    """`record` makes events durable; `hooks` gives whoever is to be told at the moment."""

    run: Run
    provider: Provider
    upstream: Upstream
    body: bytes
    hold_max_s: float
    record: Callable[[Sequence[NewEvent]], Awaitable[object]]
    hooks: Callable[[], GatewayHooks]
    first_logged: bool = False  # the first try's event is durable already
    _told: bool = False

    async def go(self) -> None:
        """Ends with the exchange closed in the log, or given up (see `Run.lose`)."""
        run = self.run
        try:
            await self._tries()
        except FINAL as error:
            log.info("exchange %s: %s", run.id, error)
            run.lose(str(error))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("exchange %s failed inside the gateway", run.id)
            try:
                await run.finish(ExchangeState.FAILED, f"internal error: {error}")
            except FINAL as final:
                run.lose(str(final))
        finally:
            self._tell()

    async def _tries(self) -> None:
        run, deadline = self.run, None
        while True:
            run.tries += 1
            if run.tries > 1 or not self.first_logged:
                await self.record([self._event(EventType.EXCHANGE_UPSTREAM, {"try": run.tries})])
            faults.point("gateway.upstream.before")
            later = await self._try(deadline)
            if later is None:
                return
            if not self.holds or later.pause > self._left(deadline):
                await run.finish(ExchangeState.FAILED, later.error)
                return
            deadline = time.monotonic() + self.hold_max_s if deadline is None else deadline
            run.held = True
            until = time.time() + later.pause + hold.jitter(later.pause)
            data = {"status": later.status, "error": later.error, "retry_after_s": later.retry_after}
            data |= {"try": run.tries, "until": round(until, 3), "possibly_paid": later.possibly_paid}
            await self.record([self._event(EventType.EXCHANGE_HELD, data)])
            self.hooks().held(run.id, until)
            await asyncio.sleep(until - time.time())

    def _left(self, deadline: float | None) -> float:
        return self.hold_max_s if deadline is None else deadline - time.monotonic()

    @property
    def holds(self) -> bool:
        return self.hold_max_s > 0 and self.run.meta.model_call

    async def _try(self, deadline: float | None) -> _Later | None:
        """None once the exchange is closed."""
        run = self.run
        sent, run.sent = run.sent, True  # until we know better: a cancelled try may have been sent
        try:
            async with self.upstream.send(self.provider, run.meta, self.body) as answer:
                later = await self._later(answer, deadline)
                if later is not None and later.answer is None:
                    return later
                await self._pass_on(answer, later.peeked if later else ())
                return None
        except NOT_SENT as error:
            if run.head is not None:
                raise
            run.sent = sent
            return _Later(f"{self.provider.name} cannot be reached: {error}", hold.pause(run.tries, None))
        except BROKEN as error:
            if run.head is not None:
                raise
            text = f"{self.provider.name} closed the connection before it answered: {error or type(error).__name__}"
            return _Later(text, hold.pause(run.tries, None), possibly_paid=True)

    async def _later(self, answer: Answer, deadline: float | None) -> _Later | None:
        """Whether this answer is held back; with `answer` set, it was looked at but is to be passed on."""
        head = answer.head
        if not self.holds or not hold.says_later(head.status, head.headers):
            return None
        asked = hold.retry_after(head.headers)
        pause = hold.pause(self.run.tries, asked)
        if pause > self._left(deadline):
            return None
        peeked = await answer.peek(hold.PEEK, _PEEK_S)
        later = _Later(f"{self.provider.name} answered {head.status}", pause, head.status, asked, peeked=peeked)
        if head.status == 429 and hold.hopeless(head.headers, b"".join(peeked)):
            later.answer = answer
        return later

    async def _pass_on(self, answer: Answer, first: Sequence[bytes]) -> None:
        run = self.run
        run.feed_head(answer.head)
        faults.point("gateway.upstream.first_byte")
        self._tell()
        try:
            for data in first:
                await run.feed(data)
            while data := await answer.read():
                await run.feed(data)
        except BROKEN as error:
            await run.finish(ExchangeState.FAILED, f"{self.provider.name} broke off: {error or type(error).__name__}")
        except TooLarge as error:
            await run.finish(ExchangeState.FAILED, str(error))
        else:
            await run.finish(ExchangeState.COMPLETE)

    def _tell(self) -> None:
        """Once: an answer, or the news that there will be none."""
        self.run.held = False
        if self.run.answered and not self._told:
            self._told = True
            self.hooks().answered(self.run.id)

    def _event(self, kind: EventType, data: Mapping[str, object]) -> NewEvent:
        run = self.run
        key = f"{kind.value}:{run.id}:{run.epoch}:{run.tries}"
        return NewEvent(type=kind, data={"exchange": run.id, "epoch": run.epoch, **data}, key=key)
