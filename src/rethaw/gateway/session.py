"""One session's exchanges, across all of its sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TypeVar

from rethaw.gateway.contracts import GatewayHooks, ReleaseGate
from rethaw.gateway.intake import Intake
from rethaw.gateway.local import refusal
from rethaw.gateway.notes import Notes
from rethaw.gateway.request import Request, parse
from rethaw.gateway.run import Broken, Client, Reader, Run
from rethaw.gateway.shared import Shared
from rethaw.gateway.tail import Tail
from rethaw.model import faults
from rethaw.model.enums import Durability, EventType, ExchangeState
from rethaw.model.errors import (
    ChannelBroken,
    Fenced,
    InvalidInput,
    NotFound,
    QuiesceTimeout,
    RethawError,
    TooLarge,
    Unavailable,
)
from rethaw.model.ports import GuestStream
from rethaw.model.types import EXCHANGE_LIMIT, AgentSpec, Exchange, Fence, NewEvent

log = logging.getLogger("rethaw.gateway")

_FENCE_WAIT_S = (
    60.0  # a recovery gives the session a new generation; its attach comes soon, or the session is elsewhere
)
_LEFT_MOST = 256  # more than guestd remembers; a guest may lie
_T = TypeVar("_T")


@dataclass(eq=False)
class Left:
    """An exchange without a run whose client went away before it had the answer: an equal request adopts it."""

    taken: int  # bytes of the answer that the client had read
    at: float  # loop time
    exchange: Exchange | None = None  # once looked at
    over: bool = False  # there is nothing to adopt


@dataclass(eq=False)
class Life:
    """What belongs to one boot or restore."""

    fence: Fence
    attempt: int
    gate: ReleaseGate
    hooks: GatewayHooks
    branch: int = 0  # exchanges at or before this seq, and those of other sessions, are of the past
    tail: Tail = field(default_factory=Tail)
    restored: bool = False  # from a snapshot
    mine: set[str] = field(default_factory=set[str])  # exchanges that entered guest memory in this life
    gated: set[str] = field(default_factory=set[str])  # those that wait for the gate
    intakes: dict[tuple[str, str], asyncio.Task[Run]] = field(default_factory=dict[tuple[str, str], asyncio.Task[Run]])
    forsaken: dict[asyncio.Task[Run], str] = field(
        default_factory=dict[asyncio.Task[Run], str]
    )  # intakes: their digest
    left: dict[str, Left] = field(default_factory=dict[str, "Left"])  # by exchange
    served: dict[str, str] = field(default_factory=dict[str, str])  # the last exchanges delivered: their digest
    delivered_live: bool = False  # the agent has a whole answer that its former line never had
    line: int | None = None
    over: bool = False  # the process tree exited


class SessionGateway:
    """Lives as long as the node knows the session; survives its sandboxes.

    Order of calls in each life: `attach`, `restored` (the snapshot, or None for a boot), then after every go():
    `hello`, and `handle` for each exchange stream. `settled` around each quiesce..go, `flush` before a snapshot
    commits, `detach` when the sandbox is gone.
    """

    def __init__(self, shared: Shared, session_id: str, agent: AgentSpec, on_close: Callable[[str], object]) -> None:
        self.id = session_id
        self.agent = agent
        self.runs: dict[str, Run] = {}
        self.notes = Notes(shared.log, shared.batcher)
        self._shared = shared
        self._on_close = on_close
        self._life: Life | None = None
        self._attached = asyncio.Event()  # replaced at each attach: somebody waits for a newer fence
        self._calm = asyncio.Event()
        self._calm.set()
        self._entering = 0  # requests between durable and accepted
        self._entered = asyncio.Event()
        self._intake = Intake(shared, self)
        self._over = False

    # ------------------------------------------------------------ lives

    @property
    def life(self) -> Life:
        assert self._life is not None, "attach() comes first"
        return self._life

    def attach(
        self, fence: Fence, attempt: int, gate: ReleaseGate, hooks: GatewayHooks, *, branch: int | None = None
    ) -> None:
        """A new life (boot or restore). Its `handle` calls use this fence, gate and hooks. `branch`: of a fork, or after a
        rewind, the seq up to which the log is of the past."""
        for run in list(self.runs.values()):
            if branch is not None and run.seq <= branch:
                del self.runs[run.id]  # the line that asked was left: what still comes goes into the log only
        for run in self.runs.values():
            run.live = False
            if run.client in (Client.WAITING, Client.PARKED, Client.EXPECTED):
                run.client = Client.FROZEN
        self._life = Life(fence, attempt, gate, hooks, branch or 0)
        attached, self._attached = self._attached, asyncio.Event()
        attached.set()

    async def restored(self, snapshot: str | None) -> None:
        """Load the tail of the log after `snapshot` (None: the attempt starts from nothing). Before go()."""
        life = self.life
        life.restored = snapshot is not None
        exchanges = await self._shared.log.tail(life.fence, snapshot)
        released: set[str] = set()
        own = [x.seq for x in exchanges if not self._intake.is_past(life, x)]
        if own:
            released = await self._intake.released(min(own))
        released.update(
            x.id for x in exchanges if self._intake.is_past(life, x)
        )  # of a past that is not ours to give up
        if exchanges:
            log.info("session %s: %d exchanges after snapshot %s", self.id, len(exchanges), snapshot)
        life.tail = Tail(exchanges, released)

    def hello(self, exchanges: Collection[str], left: Mapping[str, int]) -> None:
        """The exchange ids that the newest hello names, before its streams are handled: an exchange missing there
        has lost its client. `left`: those that lost it of late, and how much of the answer that one had read."""
        tail = self.life.tail
        for run in list(self.runs.values()):
            if run.id in exchanges:
                run.client = Client.EXPECTED
            elif run.client in (Client.PARKED, Client.EXPECTED, Client.FROZEN) and run.id not in tail:
                self._hung_up(run, left.get(run.id, 0))
        for exchange, taken in left.items():
            if exchange not in exchanges and exchange not in tail:
                self.left(exchange, taken)

    def left(self, exchange: str, taken: int) -> None:
        """The client went away before it had the whole answer, which was on its way to it, and had read `taken` bytes."""
        run = self.runs.get(exchange)
        if run is None:
            left = self.life.left
            if exchange not in left:
                _remember(left, exchange, Left(taken, asyncio.get_running_loop().time()))
        elif run.client is Client.SERVED and not run.whole_at(taken):
            self._hung_up(run, taken)

    async def detach(self) -> None:
        """The sandbox is gone or frozen. Upstream reading goes on."""
        now = asyncio.get_running_loop().time()
        for run in self.runs.values() if not self.life.over else ():
            # what ended a moment ago ended with the sandbox, not because its client had enough
            if run.client is not Client.SERVED and (run.client is not Client.GONE or now - run.left_at < 1.0):
                run.client = Client.FROZEN
        try:
            await self.notes.flush()
        except RethawError as error:
            log.info("session %s: %s", self.id, error)

    async def attempt_ended(self) -> None:
        """The process tree exited: what is left of the tail is orphaned, and nobody waits for anything any more."""
        self.life.over = True
        await self._intake.orphan(self.life)
        for run in list(self.runs.values()):
            if run.client is not Client.SERVED:
                self._hung_up(run)

    async def close(self) -> None:
        """The session is over: upstream is cancelled after the adopt window, in the background."""
        self._over = True
        self._on_close(self.id)
        with contextlib.suppress(RethawError):
            await self.notes.flush()
        for run in list(self.runs.values()):
            self._hung_up(run)

    # ------------------------------------------------------------ what the node asks

    def open(self) -> list[str]:
        """Exchanges whose answer is still awaited: not delivered whole, their client still there."""
        return [r.id for r in self.runs.values() if r.client not in (Client.GONE, Client.SERVED)]

    def held(self) -> bool:
        """Whether something is open and all of it waits for a provider that said "later"."""
        waiting = self.open()
        return bool(waiting) and all(self.runs[x].held for x in waiting)

    async def flush(self) -> None:
        """Return once every response byte received so far, and every event noted so far, is durable in the log."""
        await self.notes.flush()
        for run in list(self.runs.values()):
            try:
                await run.flush()
            except (Fenced, NotFound) as error:
                log.info("exchange %s: %s", run.id, error)  # nobody gets more of it from here

    def settled(self, timeout_s: float = 2.0) -> AbstractAsyncContextManager[None]:
        """`async with gateway.settled(): quiesce, capture, go, read seq`. Inside, no exchange is between durable and
        accepted into guest memory, so every exchange at or before the snapshot's `seq` is in the snapshot; new
        requests wait. Raises QuiesceTimeout when a request does not become durable in time."""
        return self._settled(timeout_s)

    @contextlib.asynccontextmanager
    async def _settled(self, timeout_s: float) -> AsyncGenerator[None, None]:
        self._calm.clear()
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    while self._entering:
                        self._entered.clear()
                        await self._entered.wait()
            except TimeoutError:
                raise QuiesceTimeout(
                    f"session {self.id}: a request did not become durable within {timeout_s:g} s",
                    remedy="the database is slow or away; it is tried again",
                ) from None
            yield
        finally:
            self._calm.set()

    # ------------------------------------------------------------ streams

    async def handle(self, stream: GuestStream) -> None:
        """Serve one exchange stream until its answer is delivered whole. Cancelled at each quiesce (and when the agent
        hangs up); called again with the stream's new object after go(). Raises Fenced when this life is not the
        session's any more: the node then kills the sandbox."""
        life = self.life
        run: Run | None = None
        try:
            run = await self._run_of(life, stream)
            if run is not None:
                await self._deliver(life, stream, run)
        except asyncio.CancelledError:
            if run is None and stream.hung_up:
                if stream.exchange is not None:
                    self._left_before_served(stream.exchange, stream.taken)
                else:
                    self._intake.forsaken(life, str(stream.meta.get("guest_id")), self._hung_up)
            raise
        except Broken as broken:
            await stream.reset(str(broken))
        except (ChannelBroken, Fenced, Unavailable):
            raise
        except RethawError as error:
            log.warning("session %s: exchange %s: %s", self.id, run.id if run else "(new)", error)
            await stream.reset(str(error))

    def _left_before_served(self, exchange: str, taken: int) -> None:
        """The agent hung up between hello and the first step of serving it."""
        run = self.runs.get(exchange)
        if run is not None and run.client is Client.EXPECTED:
            self._hung_up(run, taken)

    async def _run_of(self, life: Life, stream: GuestStream) -> Run | None:
        """The run that answers `stream`; None when the stream was answered here."""
        if stream.exchange is not None:
            run = await self._intake.reattach(life, stream)
            if run is None:
                return await self._replace(life, stream, stream.exchange)
            if run.id in life.mine and run.id not in life.gated:
                self._ask_gate(life, run)  # cancelled between accept and this, earlier
            return run
        try:
            request = parse(stream.meta)
            body = await stream.read_all(EXCHANGE_LIMIT)
        except (InvalidInput, TooLarge) as error:
            log.warning("session %s: request refused: %s", self.id, error)
            head, data = refusal(error, anthropic=stream.meta.get("provider") == "anthropic")
            await stream.head(head.status, head.reason, head.headers)
            await stream.write(data)
            await stream.end()
            return None
        return await self._enter(life, stream, request, body)

    async def _replace(self, life: Life, stream: GuestStream, exchange: str) -> Run:
        """The guest waits for an exchange that was open where its past ends: it gets one of its own. Needs no snapshot:
        the one that the guest came from asks for it again."""
        await stream.read_all(EXCHANGE_LIMIT)  # the end of a body that is not kept any more
        while not self._calm.is_set():
            await self._calm.wait()
        self._entering += 1
        try:
            run = await self._intake.replacement(life, exchange)
            await stream.accept(run.id)
            return run
        finally:
            self._entering -= 1
            self._entered.set()

    async def _enter(self, life: Life, stream: GuestStream, request: Request, body: bytes) -> Run:
        """Make the request durable, or find the exchange that it repeats, and tell the guest."""
        while not self._calm.is_set():
            await self._calm.wait()
        self._entering += 1
        try:
            run = await self._intake.run_for(life, request, body)
            await stream.accept(run.id)
            faults.point("gateway.accepted")
            life.mine.add(run.id)
            self._intake.accepted(life, run, request)
            self._ask_gate(life, run)
            return run
        finally:
            self._entering -= 1
            self._entered.set()

    def _ask_gate(self, life: Life, run: Run) -> None:
        if run.meta.model_call and self.agent.durability is not Durability.RELAXED:
            life.gated.add(run.id)
            life.gate.requested(run.id)

    async def _deliver(self, life: Life, stream: GuestStream, run: Run) -> None:
        token = run.serving = object()
        run.client = Client.WAITING
        served = False
        try:
            served = await self._answer(life, stream, run)
        except Broken:
            served = True
            raise
        finally:
            if run.serving is token:
                if served:
                    run.client = Client.SERVED
                    self.runs.pop(run.id, None)
                    _remember(life.served, run.id, run.meta.digest)
                elif stream.hung_up:
                    self._hung_up(run, stream.taken)
                else:
                    run.client = Client.PARKED

    async def _answer(self, life: Life, stream: GuestStream, run: Run) -> bool:
        """True once the answer is delivered whole. Raises Broken at the end of one that is not whole."""
        await run.until_answered()
        if run.id in life.gated:
            await life.gate.released(run.id)
        faults.point("gateway.release")
        if run.head is None:
            raise Broken(run.error or "no answer")
        if run.meta.model_call and not stream.head_received:
            self.note(life, EventType.EXCHANGE_RELEASED, {"exchange": run.id}, key=f"released:{run.id}")
        start, reader = stream.received, Reader(stream.received, stream.offer)
        if not stream.head_received:
            await stream.head(run.head.status, run.head.reason, run.head.headers)
        while data := await run.read(reader):
            await stream.write(data)
            reader.offset += len(data)
        await self._note_served(life, run, start)
        await stream.end()
        if run.live and run.state is ExchangeState.COMPLETE and run.meta.model_call:
            life.delivered_live = True
        return True

    async def _note_served(self, life: Life, run: Run, offset: int) -> None:
        """An answer that was asked for before a crash and delivered after it: the agent did not pay for it again."""
        if not run.meta.model_call or run.live or offset >= run.total > 0:
            return
        if not run.adopted:
            if not life.restored:
                return
            if life.line is None:
                life.line = await self._intake.current_line()
            if life.line == run.line:
                return
        usage = run.usage
        tokens = (usage.input_tokens or 0) + (usage.output_tokens or 0) if usage else None
        data = {"exchange": run.id, "offset": offset, "tokens": tokens}
        data |= {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens} if usage else {}
        self.note(life, EventType.EXCHANGE_SERVED, data, key=f"served:{run.id}")

    def known(self, exchange: str) -> Run | None:
        """The run of `exchange` in this process, unless it came to nothing here."""
        run = self.runs.get(exchange)
        return None if run is None or run.lost else run

    def note(self, life: Life, kind: EventType, data: Mapping[str, object], key: str) -> None:
        self.notes.add(life.fence, NewEvent(type=kind, data=dict(data), key=key))

    # ------------------------------------------------------------ for pumps

    async def record(self, events: Sequence[NewEvent]) -> None:
        """Make events durable under the fence of the present life, also while no sandbox exists. Raises Fenced when no
        newer life comes, FINAL errors."""
        await self.fenced(lambda fence: self._shared.log.append(fence, events))

    async def fenced(self, write: Callable[[Fence], Awaitable[_T]]) -> _T:
        """`write` under the present fence, again under the next one when a recovery comes in between, and for as long
        as the log does not answer."""
        pause = 0.2
        while True:
            fence, newer = self.life.fence, self._attached
            try:
                return await write(fence)
            except Fenced:
                if self._over:
                    raise
                if fence == self.life.fence:
                    try:
                        await asyncio.wait_for(newer.wait(), _FENCE_WAIT_S)
                    except TimeoutError:
                        raise Fenced(f"session {self.id} is not this node's any more") from None
            except Unavailable as error:
                log.warning("session %s: the log is away, waiting: %s", self.id, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 5.0)

    def hooks(self) -> GatewayHooks:
        return self.life.hooks

    # ------------------------------------------------------------ hang-ups

    def _hung_up(self, run: Run, taken: int = 0) -> None:
        """Its client is gone. Unless it had read the whole answer, an equal request may still adopt it, for the adopt
        window."""
        if run.client is Client.GONE:
            return
        loop = asyncio.get_running_loop()
        run.client = Client.SERVED if run.whole_at(taken) else Client.GONE
        run.left_at = loop.time()
        loop.call_later(self._shared.adopt_window_s, self._expire, run, run.left_at)

    def _expire(self, run: Run, left_at: float) -> None:
        over = run.client in (Client.GONE, Client.SERVED)
        if over and run.left_at == left_at and self.runs.get(run.id) is run:
            del self.runs[run.id]
            self._shared.abandon(run, "its client hung up and did not ask again")


def _remember(where: dict[str, _T], exchange: str, what: _T) -> None:
    where[exchange] = what
    if len(where) > _LEFT_MOST:
        del where[next(iter(where))]
