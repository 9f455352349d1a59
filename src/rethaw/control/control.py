"""The control plane in this process: `model.ports.ControlPlane` for nodes, and what the API asks on people's behalf.

Each operation is one transaction that locks the session's row, checks, moves and logs; modules beside this one hold
what happens inside of it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Literal, TypeVar

from rethaw.control import (
    budgets,
    children,
    finding,
    forks,
    imports,
    inbox,
    leases,
    loads,
    outbox,
    placement,
    queues,
    recovery,
    reports,
    retries,
    rousing,
    rows,
    schedules,
    self_forks,
    sessions,
    specs,
    spending,
    stats,
    versions,
    waits,
    warm,
)
from rethaw.control.policy import Policy
from rethaw.control.prices import Prices
from rethaw.control.rows import Conn, Row
from rethaw.control.waits import Addresses
from rethaw.control.wakeups import NODE_CHANNEL, OUTBOX_CHANNEL, SESSION_CHANNEL, Transactions
from rethaw.db.notify import NotifyHub
from rethaw.db.pool import Database
from rethaw.log.store import Log
from rethaw.model import faults
from rethaw.model.enums import Durability, EventType, Reason, State
from rethaw.model.errors import Conflict, Fenced, InvalidInput, NotFound, Unavailable, WaitTimeout
from rethaw.model.ids import is_whole, new_generation, new_id
from rethaw.model.types import (
    AgentFork,
    AgentSpec,
    Assignment,
    Attempt,
    BudgetSpec,
    CallAsked,
    Event,
    Fence,
    Lease,
    Message,
    NewEvent,
    NodeInfo,
    SessionView,
    SnapshotInfo,
    Spent,
    StartOptions,
    StateChange,
    WaitSpec,
    WaitState,
)

T = TypeVar("T")
_SNAPSHOT_WAIT_S = 55.0
_ADDED_UP = 8  # sessions, at each look at all of them


class Control:
    """`public_url`: base of callback addresses. `secret`: makes them; without one they change with each start."""

    def __init__(
        self,
        db: Database,
        log: Log,
        hub: NotifyHub,
        *,
        public_url: str = "http://127.0.0.1:7420",
        secret: bytes | None = None,
        policy: Policy | None = None,
        prices: Prices | None = None,
    ) -> None:
        self.policy = policy or Policy()
        self.prices = prices or Prices()
        self.transactions = Transactions(db, hub)
        self.queues = queues.Queues(self.transactions)
        self.schedules = schedules.Schedules(self.transactions, lambda: self.policy)
        self.versions = versions.Versions(self.transactions, lambda: self.policy, self.snapshot)
        self.warm = warm.Warm(self.transactions, lambda: self.policy)
        self.hub = hub
        self._log = log
        self._addresses = Addresses(public_url, secret or os.urandom(32))

    async def _run(self, fn: Callable[[Conn], Awaitable[T]]) -> T:
        return await self.transactions.run(fn)

    async def _fenced(self, fence: Fence, fn: Callable[[Conn, Row], Awaitable[T]]) -> T:
        async def inside(conn: Conn) -> T:
            return await fn(conn, await rows.fenced(conn, fence))

        return await self._run(inside)

    # ------------------------------------------------------------ nodes (model.ports.ControlPlane)

    async def register_node(self, info: NodeInfo) -> Lease:
        """A new incarnation: what the former one ran is recovering from now on."""
        lease = await self._run(lambda conn: leases.register(conn, info, self.policy))
        faults.point("control.register.between")
        await self.recover_lost(info.id, expired=False)
        await self.place_waiting()
        return lease

    async def renew_lease(self, node: str, incarnation: str) -> Lease:
        return await self._run(lambda conn: leases.renew(conn, node, incarnation, self.policy))

    async def assignments(self, node: str, incarnation: str, after: int, timeout_s: float) -> list[Assignment]:
        """What is to be done with a revision > `after`; waits up to `timeout_s` for the first."""

        async def look() -> list[Assignment] | None:
            return await self._run(lambda conn: leases.assignments(conn, node, incarnation, after)) or None

        return await self._until(NODE_CHANNEL, node, look, timeout_s) or []

    async def session(self, session: str) -> SessionView:
        return rows.view(await self._run(lambda conn: rows.load(conn, session)))

    async def report(self, fence: Fence, change: StateChange) -> SessionView:
        async def fn(conn: Conn, row: Row) -> SessionView:
            row = await reports.report(conn, row, change, self.policy)
            faults.point("control.report.before_commit")
            return rows.view(row)

        view = await self._fenced(fence, fn)
        faults.point("control.report.after_commit")
        return view

    async def report_death(self, fence: Fence, reason: Reason, detail: str) -> None:
        async def fn(conn: Conn, row: Row) -> None:
            await recovery.crashed(conn, row, reason, detail, self.policy)
            faults.point("control.death.before_commit")

        await self._fenced(fence, fn)
        faults.point("control.death.after_commit")

    async def report_unusable(self, fence: Fence, snapshot: str, detail: str) -> None:
        async def fn(conn: Conn, row: Row) -> None:
            await recovery.unusable(conn, row, snapshot, detail, self.policy)

        await self._fenced(fence, fn)

    async def wake(self, fence: Fence, reason: Reason) -> None:
        async def fn(conn: Conn, row: Row) -> None:
            await reports.wake(conn, row, self.policy)

        await self._fenced(fence, fn)

    async def open_wait(self, fence: Fence, attempt: int, spec: WaitSpec) -> WaitState:
        async def fn(conn: Conn, row: Row) -> WaitState:
            return await waits.open_wait(conn, row, attempt, spec, self._addresses)

        faults.point("control.wait.before")
        state = await self._fenced(fence, fn)
        faults.point("control.wait.after")
        return state

    async def poll_wait(self, fence: Fence, attempt: int, wait: str, timeout_s: float) -> WaitState:
        """The wait's state once done, or after `timeout_s`. Raises Conflict when it was cancelled."""

        async def fn(conn: Conn) -> WaitState:
            return await waits.look(conn, fence, attempt, wait, self._addresses)

        async def look() -> WaitState | None:
            # Everything that happens to the session comes by here, and next to nothing of it is what is waited for.
            state = await self.transactions.once(fn)
            return state if state.done else None

        state = await self._until(SESSION_CHANNEL, fence.session, look, timeout_s) or await self.transactions.once(fn)
        if state.done:  # the guest does not wait for a commit to hear of it
            self.transactions.aside(lambda conn: waits.given(conn, fence, attempt, wait))
        return state

    async def cancel_wait(self, fence: Fence, attempt: int, wait: str) -> None:
        await self._fenced(fence, lambda conn, row: waits.cancel(conn, row, attempt, wait))

    async def spawn(self, fence: Fence, attempt: int, call: str, agent: str, args: dict[str, Any]) -> str:
        return await self._fenced(
            fence, lambda conn, row: children.spawn(conn, row, attempt, call, agent, args, self.policy)
        )

    async def tell_child(
        self,
        fence: Fence,
        attempt: int,
        call: str,
        child: str,
        act: Literal["message", "cancel"],
        payload: bytes | None,
    ) -> None:
        await self._fenced(fence, lambda conn, row: children.tell(conn, row, attempt, call, child, act, payload))

    async def forked(self, fence: Fence, attempt: int, call: str) -> AgentFork | None:
        return await self._fenced(fence, lambda conn, row: self_forks.known(conn, row, attempt, call))

    async def fork_self(self, fence: Fence, attempt: int, call: str, snapshot: str) -> AgentFork:
        ident, generation = new_id("s"), new_generation()
        faults.point("control.fork_self.before")
        made = await self._fenced(
            fence, lambda conn, row: self_forks.fork(conn, row, attempt, call, snapshot, ident, generation)
        )
        faults.point("control.fork_self.made")
        if made.session == ident:
            await self._run(lambda conn: sessions.place(conn, ident, self.policy))
        return made

    async def consume(self, fence: Fence, attempt: int, number: int) -> None:
        await self.transactions.once(lambda conn: inbox.consume(conn, fence, attempt, number))
        self.hub.publish(SESSION_CHANNEL, fence.session)

    async def admit(self, fence: Fence, call: CallAsked) -> str | None:
        row, refused = await self._run(lambda conn: budgets.admit(conn, fence, call, self.prices))
        if row.state.final:
            raise Fenced(f"session {row.id} has ended: {row.detail}", remedy="stop its sandbox", session=row.id)
        return refused

    async def publish(self, fence: Fence, sent: NewEvent) -> Event:
        async def fn(conn: Conn, row: Row) -> Event:
            (event,) = await rows.append(conn, row.id, sent)
            await outbox.publish(conn, row, event.seq)
            return event

        return await self._fenced(fence, fn)

    async def set_degraded(self, fence: Fence, degraded: bool, detail: str, durability: Durability) -> None:
        await self._fenced(fence, lambda conn, row: reports.set_degraded(conn, row, degraded, detail, durability))

    # ------------------------------------------------------------ people

    async def create(
        self, agent: AgentSpec, args: dict[str, Any], key: str | None = None, options: StartOptions | None = None
    ) -> tuple[SessionView, bool]:
        """Start a session, and whether it is new. A known `key` gives the existing one, or KeyReused."""
        schedules.check_key(key)
        session = new_id("s")
        row, new = await self._run(lambda conn: sessions.create(conn, session, agent, args, key, self.policy, options))
        return rows.view(row), new

    async def resolve(self, text: str) -> str:
        """The session that `text` (an id or a unique prefix) means. Raises NotFound, AmbiguousId."""
        return await self._run(lambda conn: sessions.resolve(conn, text))

    async def named(self, text: str) -> str:
        """As `resolve`, but what has the form of an id is not looked up: for what raises NotFound by itself."""
        return text if is_whole(text, "s") else await self.resolve(text)

    async def resolve_snapshot(self, text: str) -> str:
        return await self._run(lambda conn: sessions.resolve(conn, text, table="snapshots", prefix="snap_"))

    async def resolve_exchange(self, text: str) -> str:
        return await self._run(lambda conn: sessions.resolve(conn, text, table="exchanges", prefix="x_"))

    async def list(
        self, state: State | None = None, agent: str | None = None, limit: int = 100, cursor: str | None = None
    ) -> tuple[list[SessionView], str | None]:
        """Sessions, newest first, and the cursor of the next page."""
        wanted = finding.Filter(states=() if state is None else (state,), agent=agent)
        return await self.find(wanted, limit, cursor)

    async def find(
        self, wanted: finding.Filter, limit: int = 100, cursor: str | None = None
    ) -> tuple[list[SessionView], str | None]:
        """Sessions that `wanted` fits, newest first, and the cursor of the next page."""
        found, following = await self._run(lambda conn: finding.find(conn, wanted, limit, cursor))
        return [rows.view(row) for row in found], following

    async def suspend(self, session: str) -> SessionView:
        return rows.view(await self._run(lambda conn: sessions.suspend(conn, session)))

    async def resume(self, session: str) -> SessionView:
        return rows.view(await self._run(lambda conn: sessions.resume(conn, session, self.policy)))

    async def awake(self, session: str, timeout_s: float) -> SessionView:
        """The session once it runs, for somebody who connects to it: what policy suspended is woken. Raises SessionEnded,
        Conflict for what a person suspended, Unavailable after the time."""

        async def look() -> Row | None:
            row = await self._run(lambda conn: rousing.rouse(conn, session, self.policy))
            return row if row.state in rousing.RUNS else None

        row = await self._until(SESSION_CHANNEL, session, look, timeout_s)
        if row is None:
            now = await self.session(session)
            raise Unavailable(
                f"session {session} is {now.state.value} and has not run for {timeout_s:.0f} s: {now.detail}"
            )
        return rows.view(row)

    async def cancel(self, session: str, *, now: bool = False) -> SessionView:
        return rows.view(await self._run(lambda conn: sessions.cancel(conn, session, now, self.policy)))

    async def crash(self, session: str) -> SessionView:
        return rows.view(await self._run(lambda conn: sessions.crash(conn, session)))

    async def snapshot(self, session: str) -> SnapshotInfo:
        """Take one now. Of a suspended session it is the one it sleeps in. Raises WaitTimeout, Conflict."""
        row, asked = await self._run(lambda conn: sessions.ask_snapshot(conn, session))

        async def look() -> SnapshotInfo | None:
            return await self._run(fn)

        async def fn(conn: Conn) -> SnapshotInfo | None:
            found = await rows.one(
                conn,
                """SELECT n.* FROM sessions s JOIN snapshots n
                     ON (n.session = s.id AND n.created_at > %s) OR (s.state = 'suspended' AND n.id = s.snapshot)
                   WHERE s.id = %s ORDER BY n.seq DESC LIMIT 1""",
                (asked, session),
            )
            if found is None and (now := await rows.load(conn, session)).state.final:
                raise Conflict(f"session {session} is {now.state.value}: no snapshot was taken")
            return None if found is None else placement.snapshot_info(found)

        taken = await self._until(SESSION_CHANNEL, row.id, look, _SNAPSHOT_WAIT_S)
        if taken is None:
            raise WaitTimeout(f"no snapshot of {session} came within {_SNAPSHOT_WAIT_S:g} s", remedy="see its events")
        return taken

    async def fork(
        self, session: str, at: int | str | None = None, n: int = 1, *, redeliver: bool = False
    ) -> list[SessionView]:
        """`n` new sessions from where `session` was at `at`: a SEQ, a snapshot, or None for its newest snapshot; of a
        running session one is taken. `redeliver`: messages and signals that came after that are delivered again."""
        if not 1 <= n <= forks.MOST:
            raise InvalidInput(f"{n} forks cannot be made", remedy=f"use 1 to {forks.MOST}")
        if at is None and (await self.session(session)).state.on_node:
            at = (await self.snapshot(session)).id
        ids = {new_id("s"): new_generation() for _ in range(n)}
        made = await self._run(lambda conn: forks.fork(conn, session, at, ids, redeliver))
        for row in made:
            if row.state == State.RESUMING:
                await self._run(lambda conn, s=row.id: sessions.place(conn, s, self.policy))
        return [await self.session(row.id) for row in made]

    async def rewind(self, session: str, to: int | str, *, redeliver: bool = False) -> SessionView:
        """Take the session back to `to` (a SEQ or a snapshot). `redeliver`: as with `fork`."""
        generation = new_generation()
        return rows.view(
            await self._run(lambda conn: forks.rewind(conn, session, to, generation, redeliver, self.policy))
        )

    async def retry(self, session: str, memory_bytes: int | None = None) -> SessionView:
        """Begin the next attempt now, of a session that failed, was cancelled or waits for the time of a retry."""
        return rows.view(await self._run(lambda conn: retries.by_hand(conn, session, self.policy, memory_bytes)))

    async def budget(self, session: str, given: BudgetSpec, add: Collection[str] = ()) -> SessionView:
        """Give the session other limits (those in `add`: so much more); one that its budget has ended goes on."""
        generation = new_generation()
        return rows.view(
            await self._run(
                lambda conn: budgets.change(conn, session, given, add, generation, self.prices, self.policy)
            )
        )

    async def limits(self, session: str) -> tuple[BudgetSpec | None, Spent]:
        """What the session may spend and what it has spent."""

        async def fn(conn: Conn) -> tuple[BudgetSpec | None, Spent]:
            row = await rows.load(conn, session)
            spent = await budgets.spent(conn, row, self.prices)
            return row.limits, spent if row.limits is not None else spent.model_copy(update={"wall_s": 0.0})

        return await self._run(fn)

    async def attempts(self, session: str) -> list[Attempt]:
        """Each life of its process tree, and how it ended."""
        return await self._run(lambda conn: stats.attempts(conn, session))

    async def agent_of(self, session: str, attempt: int) -> AgentSpec:
        """What that attempt of the session runs or ran."""
        return (await self._run(lambda conn: specs.of_attempt(conn, session, attempt)))[0]

    async def described(self, info: SnapshotInfo) -> dict[str, Any]:
        """What an exported snapshot says of its session."""
        return await self._run(lambda conn: imports.described(conn, info))

    async def take_in(
        self, agent: AgentSpec, args: dict[str, Any], info: SnapshotInfo, node: str, origin: str
    ) -> SessionView:
        """A new session, suspended at a snapshot of another installation whose files are on `node`."""
        session = new_id("s")
        row = await self._run(lambda conn: imports.take_in(conn, session, agent, args, info, node, origin, self.policy))
        return rows.view(row)

    async def erase(self, session: str, *, force: bool = False) -> dict[str, Any]:
        """Delete the session whole. Returns its tombstone {session, created_at, last_seq, erased_at}."""
        if not force:
            return await self._run(lambda conn: sessions.erase(conn, session, False))
        return await self._run(lambda conn: sessions.erase(conn, session, True))

    async def send(self, session: str, payload: bytes, idempotency_key: str | None = None) -> Message:
        """A message for the inbox; `payload` is JSON text."""
        message = new_id("m")
        return await self._run(lambda conn: inbox.send(conn, session, message, payload, idempotency_key, self.policy))

    async def inbox(self, session: str, after: int = 0, limit: int = 1000) -> list[Message]:
        return await self._run(lambda conn: inbox.read(conn, session, after, limit))

    async def outbox(self, session: str, after: int = 0, wait_s: float = 0.0, limit: int = 1000) -> list[Message]:
        """Published messages after number `after`; waits up to `wait_s` for the first, unless none will come."""

        async def look() -> list[Message] | None:
            over, found = await self.transactions.once(lambda conn: outbox.look(conn, session, after, limit))
            return found if found or over else None

        return await self._until(OUTBOX_CHANNEL, session, look, wait_s) or []

    async def signal(self, session: str, name: str, payload: bytes, idempotency_key: str | None = None) -> str:
        """A signal by name; `payload` is JSON text. Returns its id."""
        signal = new_id("sig")
        return await self._run(
            lambda conn: inbox.signal(conn, session, signal, name, payload, idempotency_key, self.policy)
        )

    async def callback(self, token: str, payload: bytes) -> str:
        """Complete the wait whose callback address holds `token`. Once."""
        signal = new_id("sig")
        return await self._run(lambda conn: inbox.callback(conn, token, signal, payload, self.policy))

    async def result(self, session: str, wait_s: float = 0.0) -> tuple[SessionView, bytes | None]:
        """The final state and the JSON text that the agent returned. Raises WaitTimeout while it goes on."""

        async def look() -> SessionView | None:
            view = await self.session(session)
            return view if view.state.final else None

        view = await self._until(SESSION_CHANNEL, session, look, wait_s)
        if view is None:
            now = await self.session(session)
            raise WaitTimeout(
                f"session {session} is {now.state.value}, it has no result yet", remedy="wait longer", state=now.state
            )
        events = await self._log.read(session, types=[EventType.SESSION_RESULT], limit=1000)
        events = [event for event in events if event.attempt == view.attempt]  # a former version's is not this one's
        return view, events[-1].body if events else None

    async def stats(self, session: str) -> dict[str, int]:
        """What `show` ends with: counts of the log over all lines, and of the snapshots."""
        counted = await self._log.stats(session)
        return {**counted, **await self._run(lambda conn: stats.stored(conn, session))}

    async def why(self, session: str) -> dict[str, Any]:
        return await self._run(lambda conn: stats.why(conn, session))

    async def loads(self, limit: int, ended: bool) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """See `loads.read`."""
        found, states, many = await self._run(lambda conn: loads.read(conn, limit, ended))
        for session in many[:_ADDED_UP]:
            with contextlib.suppress(NotFound):  # erased meanwhile
                await self._run(lambda conn, s=session: spending.add_up(conn, s))
        return found, states

    async def nodes(self) -> list[dict[str, Any]]:
        return await self._run(leases.nodes)

    # ------------------------------------------------------------ loops

    async def recover_lost(self, node: str | None = None, *, expired: bool) -> None:
        """Recover every session whose node's life is over."""
        for session in await self._run(lambda conn: leases.lost(conn, node, expired=expired)):
            await self._run(lambda conn, s=session: leases.recover_lost(conn, s, self.policy, expired=expired))

    async def place_waiting(self) -> None:
        """Give sessions that wait for a node to one, as far as there is room."""
        too_much: int | None = None  # memory that no node has left
        for session, memory in await self._run(leases.waiting_for_node):
            if too_much is None or memory < too_much:
                with contextlib.suppress(NotFound):  # erased meanwhile
                    if not await self._run(lambda conn, s=session: sessions.place(conn, s, self.policy)):
                        too_much = memory

    # ------------------------------------------------------------ waiting

    async def _until(
        self, channel: str, key: str, look: Callable[[], Awaitable[T | None]], timeout_s: float
    ) -> T | None:
        """What `look` finds, looking again after each notification and at least every `poll_s`; None after the time."""
        if not 0 <= timeout_s <= 86_400:
            raise InvalidInput(f"{timeout_s!r} s is no time to wait", remedy="use 0 to 86400 seconds")
        until = time.monotonic() + timeout_s
        with self.hub.subscribe(channel, key) as subscription:
            while (found := await look()) is None:
                left = until - time.monotonic()
                if left <= 0:
                    return None
                await subscription.wait(min(left, self.policy.poll_s))
            return found


__all__ = ["Control"]
