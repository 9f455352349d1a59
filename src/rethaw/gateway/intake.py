"""From a stream to the run that answers it: re-attached by id, found in the tail, adopted, or begun (DESIGN §5)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from rethaw.gateway import revive
from rethaw.gateway.local import refusal
from rethaw.gateway.pump import Pump
from rethaw.gateway.request import Request
from rethaw.gateway.run import FINAL, Broken, Client, Run
from rethaw.gateway.shared import Shared
from rethaw.model import faults
from rethaw.model.enums import EventType, ExchangeState
from rethaw.model.errors import Conflict, NotFound, ProviderError, RethawError
from rethaw.model.ports import GuestStream
from rethaw.model.types import CallAsked, Exchange, RequestMeta, ResponseHead

if TYPE_CHECKING:
    from rethaw.gateway.session import Life, SessionGateway

log = logging.getLogger("rethaw.gateway")

_SCAN_S = 5.0


class Intake:
    def __init__(self, shared: Shared, session: SessionGateway) -> None:
        self._shared = shared
        self._log = shared.log
        self._session = session
        self._admitting = asyncio.Lock()
        self._reviving: dict[str, asyncio.Task[Run]] = {}

    # ------------------------------------------------------------ step 1: by id

    async def reattach(self, life: Life, stream: GuestStream) -> Run | None:
        """The run of an exchange that guest memory names; None when it was open where the past ends and is to be asked
        anew. Raises Broken when there is nothing to go on with."""
        exchange = stream.exchange
        assert exchange is not None
        faults.point("gateway.tail.reattach")
        life.tail.drop(exchange)
        run = self._session.known(exchange)
        if run is not None:
            return run
        try:
            x = await self._log.exchange(exchange)
        except NotFound as error:
            raise Broken(str(error)) from None
        if self.is_past(life, x):
            return await self._of_the_past(life, x, stream.received, stream.head_received)
        return await self._from_log(x, stream.received, stream.head_received)

    def is_past(self, life: Life, x: Exchange) -> bool:
        """Whether a fork or a rewind lies between the exchange and the present."""
        return x.session != self._session.id or x.seq <= life.branch

    async def _of_the_past(self, life: Life, x: Exchange, held: int = 0, head_held: bool = False) -> Run | None:
        """What was answered before the session was forked or rewound is given from the log. None: it was open then."""
        try:
            state = await self._log.stood(life.fence, x.id)
        except NotFound:
            raise Broken(f"exchange {x.id} is not this session's") from None  # the guest lies
        if state is None:
            return await self._from_log(x, held, head_held)
        if state in (ExchangeState.COMPLETE, ExchangeState.FAILED):
            recorded = x.model_copy(update={"state": state})
            run = self._session.runs[x.id] = Run.recorded(self._log, self._shared.batcher, recorded)
            return run
        if state is not ExchangeState.OPEN:
            raise Broken(f"exchange {x.id} was {state.value}")
        if held or head_held:
            event = revive.torn(x, held, key=f"torn:{x.id}:{life.fence.session}:{life.branch}")
            await self._log.append(life.fence, [event])
            raise Broken("this answer was not whole when the session was forked or rewound")
        return None

    async def replacement(self, life: Life, exchange: str) -> Run:
        """The session's own run for a request of the past. Once: asked again after a crash, it is found in the tail."""
        x = await self._log.exchange(exchange)
        body = await self._log.read_request(exchange)
        meta = x.meta.model_copy(update={"guest_id": f"{x.meta.guest_id}@{exchange}"})
        return await self._once(life, meta, lambda: self._replace(life, meta, body))

    async def _replace(self, life: Life, meta: RequestMeta, body: bytes) -> Run:
        return await self._adopt(life, meta, life.tail.take_own(meta)) or await self._begin(life, meta, body, None)

    async def _from_log(self, x: Exchange, held: int = 0, head_held: bool = False) -> Run:
        """A run for an exchange that this process does not have. `held`: answer bytes that the guest has.

        Once begun it goes on when its caller is cancelled (by a freeze): half-way, this process owns an exchange that
        it does not read, and the next caller would issue it once more."""
        task = self._reviving.get(x.id)
        if task is None:
            task = self._reviving[x.id] = asyncio.create_task(self._revive(x, held, head_held))
            task.add_done_callback(_seen)
            task.add_done_callback(lambda _: self._reviving.pop(x.id, None))
        return await asyncio.shield(task)

    async def _revive(self, x: Exchange, held: int, head_held: bool) -> Run:
        known = self._session.known(x.id)
        if known is not None:
            return known
        sink, batcher, runs = self._log, self._shared.batcher, self._session.runs
        if x.state is ExchangeState.OPEN:
            x = await revive.closed_if_whole(sink, x) or x
        if x.state in (ExchangeState.COMPLETE, ExchangeState.FAILED):
            run = runs[x.id] = Run.recorded(sink, batcher, x)
            return run
        if x.state is not ExchangeState.OPEN:
            raise Broken(f"exchange {x.id} is {x.state.value}")
        owner, former = self._shared.owner, x
        event = None if held or head_held else revive.reissued(x)
        try:
            x = await self._session.fenced(lambda fence: sink.take_over(fence, former.id, owner, event))
        except Conflict as error:  # it was closed a moment ago
            raise Broken(str(error)) from None
        if event is None:
            await sink.finish_exchange(x.id, x.epoch, ExchangeState.TORN, None, revive.torn(former, held))
            raise Broken("upstream was lost in the middle of this answer")
        body = await sink.read_request(x.id)
        run = runs[x.id] = Run(sink, batcher, x)
        self._start(run, body)
        return run

    # ------------------------------------------------------------ a request

    async def run_for(self, life: Life, request: Request, body: bytes) -> Run:
        """The run that answers a request which guest memory has no exchange for. Goes on when the caller is cancelled:
        the guest then sends the request again, under the same id."""
        if len(body) > 1 << 20:
            digest = await asyncio.to_thread(request.digest, body)
        else:
            digest = request.digest(body)
        meta, provider_error = self._meta(request, digest, body)
        return await self._once(life, meta, lambda: self._find_or_begin(life, meta, body, provider_error))

    async def _once(self, life: Life, meta: RequestMeta, work: Callable[[], Coroutine[Any, Any, Run]]) -> Run:
        """What `work` gives; goes on, and is not begun again, when the caller is cancelled."""
        key = (meta.guest_id, meta.digest)
        task = life.intakes.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = life.intakes[key] = asyncio.create_task(work())
            task.add_done_callback(_seen)
        return await asyncio.shield(task)

    def accepted(self, life: Life, run: Run, request: Request) -> None:
        life.intakes.pop((request.guest_id, run.meta.digest), None)

    def forsaken(self, life: Life, guest_id: str, hung_up: Callable[[Run], None]) -> None:
        """The agent hung up while its request became durable: `hung_up` once it is."""

        def done(task: asyncio.Task[Run]) -> None:
            del life.forsaken[task]
            if not task.cancelled() and task.exception() is None:
                hung_up(task.result())

        for key in [k for k in life.intakes if k[0] == guest_id]:
            task = life.intakes.pop(key)
            life.forsaken[task] = key[1]
            task.add_done_callback(done)

    async def _find_or_begin(
        self, life: Life, meta: RequestMeta, body: bytes, provider_error: ProviderError | None
    ) -> Run:
        run = (
            await self._hung_up(life, meta)
            or await self._left(life, meta)
            or await self._adopt(life, meta, life.tail.take(meta))
        )
        if run is not None:
            return run
        return await self._begin(life, meta, body, provider_error)

    async def _begin(self, life: Life, meta: RequestMeta, body: bytes, provider_error: ProviderError | None) -> Run:
        books = self._shared.books
        if books is None or self._session.agent.budget is None or not meta.model_call:
            return await self._admitted(life, meta, body, provider_error)
        async with self._admitting:  # one at a time: each counts those before it
            call = CallAsked(guest_id=meta.guest_id, digest=meta.digest, model=meta.model)
            refused = await books.admit(life.fence, call)
            if refused is not None:
                meta = meta.model_copy(update={"model_call": False})  # it is not sent, so it waits for no snapshot
                provider_error = ProviderError(refused, missing="price")
            return await self._admitted(life, meta, body, provider_error)

    async def _admitted(self, life: Life, meta: RequestMeta, body: bytes, provider_error: ProviderError | None) -> Run:
        """`provider_error`: the request is recorded, and answered with that here."""
        sink, owner = self._log, self._shared.owner
        faults.point("gateway.request.before_durable")
        x = await sink.begin_exchange(life.fence, meta, body, owner, upstream=provider_error is None)
        faults.point("gateway.request.durable")
        if x.state is not ExchangeState.OPEN or x.owner != owner or x.head is not None or self._session.known(x.id):
            # The path has this very call: the snapshot was taken between making it durable and telling the guest.
            run = self._session.known(x.id)
            if run is None and self.is_past(life, x):
                run = await self._of_the_past(life, x) or await self.replacement(life, x.id)
            run = run or await self._from_log(x)
            run.adopted = True
            return run
        run = self._session.runs[x.id] = Run(sink, self._shared.batcher, x)
        run.live = True
        if provider_error is not None:
            log.warning("session %s: %s", self._session.id, provider_error)
            head, data = refusal(provider_error, anthropic=_anthropic(self._shared, meta))
            run.task = self._shared.spawn(_refuse(run, head, data))
        else:
            self._start(run, body, first_logged=True)
        if meta.model_call and life.tail:
            self._off_the_line(life, run)
        return run

    def _meta(self, request: Request, digest: str, body: bytes) -> tuple[RequestMeta, ProviderError | None]:
        try:
            provider = self._shared.providers.get(request.provider)
        except ProviderError as error:
            return request.meta(body, digest, model_call=False), error
        return request.meta(body, digest, model_call=provider.is_model_call(request.method, request.path)), None

    def _start(self, run: Run, body: bytes, *, first_logged: bool = False) -> None:
        """Begin to read the answer."""
        try:
            provider = self._shared.providers.get(run.meta.provider)
        except ProviderError as error:  # its key is gone since
            head, data = refusal(error, anthropic=_anthropic(self._shared, run.meta))
            run.task = self._shared.spawn(_refuse(run, head, data))
            return
        session = self._session
        pump = Pump(
            run=run,
            provider=provider,
            upstream=self._shared.upstream,
            body=body,
            hold_max_s=session.agent.hold_max_s,
            record=session.record,
            hooks=session.hooks,
            first_logged=first_logged,
        )
        run.task = self._shared.spawn(pump.go())

    # ------------------------------------------------------------ requests that repeat another

    async def _hung_up(self, life: Life, meta: RequestMeta) -> Run | None:
        """A client timed out and asks again: it gets the answer that is under way."""
        if not meta.model_call:
            return None
        while (run := self._gone(life, meta)) is None:
            # A client that timed out before its request was durable: the call has begun, or is about to.
            forsaken = [task for task, digest in life.forsaken.items() if digest == meta.digest]
            if not forsaken:
                return None
            await asyncio.wait(forsaken)
        before, run.client = run.client, Client.WAITING
        try:
            await self._adopted(life, run.id, meta, "hangup")
        except BaseException:
            run.client = before
            raise
        return run

    def _gone(self, life: Life, meta: RequestMeta) -> Run | None:
        fits = [
            r
            for r in self._session.runs.values()
            if r.client is Client.GONE and r.attempt == life.attempt and r.meta.digest == meta.digest and _usable(r)
            and r.id not in life.tail
        ]  # fmt: skip
        return min(fits, key=lambda r: r.left_at, default=None)

    async def _left(self, life: Life, meta: RequestMeta) -> Run | None:
        """The same for an answer that has no run any more: it was given to the end, but its client had left before; or
        the process that had it is gone."""
        if not meta.model_call:
            return None
        oldest = asyncio.get_running_loop().time() - self._shared.adopt_window_s
        for exchange, left in list(life.left.items()):
            if left.at < oldest:
                life.left.pop(exchange, None)
                continue
            if life.served.get(exchange, meta.digest) != meta.digest:
                continue  # no need to ask the log, for which this call would wait
            if left.exchange is None and not left.over:
                try:
                    left.exchange = await self._log.exchange(exchange)
                except NotFound:
                    left.over = True
            x = left.exchange
            if x is None or x.meta.digest != meta.digest or left.over:
                continue
            elif not self._unseen(life, x, left.taken):
                left.over = True
            elif life.left.pop(exchange, None) is not None:
                try:
                    x = await self._adopted(life, exchange, meta, "hangup")
                    return self._session.known(exchange) or await self._from_log(x)
                except Broken:
                    return None  # gone in between: ask anew
                except BaseException:
                    life.left[exchange] = left
                    raise
        return None

    def _unseen(self, life: Life, x: Exchange, taken: int) -> bool:
        """Whether `x` is this attempt's and has, or may have, an answer of which its client had not read everything."""
        if x.session != self._session.id or x.attempt != life.attempt:
            return False
        if x.state is ExchangeState.COMPLETE:
            return x.head is not None and x.head.status < 400 and not 0 < x.received <= taken
        return x.state is ExchangeState.OPEN

    async def _adopted(self, life: Life, exchange: str, meta: RequestMeta, how: str) -> Exchange:
        """The log shall say first what was released to the former client, if anything was."""
        await self._session.notes.flush()
        return await self._log.adopt_exchange(life.fence, exchange, meta.guest_id, how)

    async def _adopt(self, life: Life, meta: RequestMeta, x: Exchange | None) -> Run | None:
        """Step 2: the answer to this request is in the log, or on its way there, as `x` that the tail gave."""
        if x is None:
            return None
        faults.point("gateway.tail.adopt")
        try:
            adopted = await self._adopted(life, x.id, meta, "tail")
            past = self.is_past(life, x)  # then it is as it stood at that time, whatever became of it
            run = self._session.known(x.id) or await self._from_log(x if past else adopted)
        except Broken:
            return None  # gone in between: ask anew
        except BaseException:
            life.tail.put_back(x)
            raise
        run.adopted = True
        return run

    # ------------------------------------------------------------ step 3: another path

    def _off_the_line(self, life: Life, run: Run) -> None:
        """A call that the tail does not answer, while it still has answers."""
        if not life.tail.diverged:
            life.tail.diverged = True
            key = f"diverged:{life.fence.generation}"
            self._session.note(life, EventType.SESSION_DIVERGED, {"exchange": run.id}, key=key)
        if life.delivered_live:
            # The agent has acted upon an answer that the old line never had: it does not come back for the rest.
            self._shared.spawn(self.orphan(life))

    async def orphan(self, life: Life) -> None:
        """Give up what is left of the tail and was not seen by any agent."""
        for exchange in life.tail.orphans():
            run = self._session.runs.pop(exchange, None)
            if run is not None:
                if run.task is not None:
                    run.task.cancel()
                    await asyncio.gather(run.task, return_exceptions=True)
                run.lose("orphaned")
            try:
                await self._log.orphan_exchange(life.fence, exchange)
            except FINAL as error:
                log.info("exchange %s: not orphaned: %s", exchange, error)

    async def released(self, first: int) -> set[str]:
        """Ids of exchanges with `seq` >= `first` whose answer went out, on any line."""
        out: set[str] = set()
        last = await self._log.last_seq(self._session.id)
        events = self._log.follow(self._session.id, first - 1, path_only=False)
        try:
            async with asyncio.timeout(_SCAN_S):
                async for event in events:
                    if event.type is EventType.EXCHANGE_RELEASED:
                        out.add(str(event.data.get("exchange")))
                    if event.seq >= last:
                        break
        except TimeoutError:
            log.warning("session %s: the log from %d to %d took too long to read", self._session.id, first, last)
        except RethawError as error:
            log.warning("session %s: %s", self._session.id, error)
        finally:
            close = getattr(events, "aclose", None)
            if close is not None:
                with contextlib.suppress(Exception):
                    await close()
        return out

    async def current_line(self) -> int | None:
        session = self._session.id
        events = await self._log.read(session, max(0, await self._log.last_seq(session) - 16))
        return max((e.line for e in events), default=None)


def _usable(run: Run) -> bool:
    """Whether its answer is, or may become, one that a client would not ask again for."""
    if run.broken:
        return False
    return run.head is None or run.head.status < 400


def _anthropic(shared: Shared, meta: RequestMeta) -> bool:
    known = shared.providers.format_of(meta.provider)
    return known == "anthropic" if known else meta.path.endswith("/messages")


def _seen(task: asyncio.Task[Run]) -> None:
    """Its caller may be gone: the error is not news then, the guest asks again."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("intake: %r", error)


async def _refuse(run: Run, head: ResponseHead, data: bytes) -> None:
    try:
        run.feed_head(head)
        await run.feed(data)
        await run.finish(ExchangeState.COMPLETE)
    except FINAL as error:
        run.lose(str(error))
