"""Budgets: what a session has spent, counted from its log, and the end of one that has used up what it may spend.

Every call that the session itself sent to a provider counts, on whatever line and in whatever attempt: it was paid for.
An answer that was served from the log is the same call and counts once; what a fork's ancestors spent is theirs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rethaw.control import awake, forks, placement, retries, rows, sessions, spending, wakeups
from rethaw.control.endings import finish
from rethaw.control.policy import Policy
from rethaw.control.prices import Prices
from rethaw.control.rows import Conn, Row
from rethaw.log.encoding import exchange_key
from rethaw.model.durations import human
from rethaw.model.enums import Desired, EventType, Reason, State
from rethaw.model.errors import InvalidInput
from rethaw.model.types import BudgetSpec, CallAsked, Fence, NewEvent, Spent

WARN_AT = Decimal(str(awake.WARN_AT))
_COUNTED = ("tokens", "input_tokens", "output_tokens", "money", "model_calls")
_WORDS = {
    "tokens": "tokens",
    "input_tokens": "input tokens",
    "output_tokens": "output tokens",
    "model_calls": "model calls",
}


async def spent(conn: Conn, row: Row, prices: Prices, *, locked: bool = False) -> Spent:
    """By now. `money` is None without prices, or when a model has none; `unpriced` names that one."""
    total = {"input_tokens": 0, "cached_tokens": 0, "output_tokens": 0, "model_calls": 0, "uncounted": 0}
    money, unpriced = Decimal(0), None
    for used in await spending.used(conn, row, fold=locked):
        for name, column in zip(total, ("input", "cached", "output", "calls", "uncounted"), strict=True):
            total[name] += getattr(used, column)
        price = prices.of(used.answered) or prices.of(used.asked)
        if price is not None:
            money += price.of(used.input, used.cached, used.output)
        elif used.input or used.output:
            unpriced = used.answered or used.asked or "?"
    known = bool(prices.table) and unpriced is None
    return Spent(
        **total,
        tokens=total["input_tokens"] + total["output_tokens"],
        money=_plain(money) if known else None,
        wall_s=round(await awake.used_s(conn, row.id), 3),
        unpriced=unpriced,
    )


@dataclass(frozen=True)
class _Measure:
    """One limit and how much of it is used."""

    name: str
    used: Decimal
    limit: Decimal

    @property
    def over(self) -> bool:
        return self.used >= self.limit

    @property
    def words(self) -> str:
        """`200,000 tokens are used up: 201,113`."""
        if self.name == "wall_s":
            return f"{human(float(self.limit))} of running are used up: {human(float(self.used))}"
        if self.name == "money":
            return f"a budget of {_plain(self.limit)} is used up: {_plain(self.used)}"
        return f"{self.limit:,} {_WORDS[self.name]} are used up: {self.used:,}"

    @property
    def data(self) -> dict[str, Any]:
        def value(amount: Decimal) -> Any:
            return str(amount) if self.name == "money" else float(amount) if self.name == "wall_s" else int(amount)

        return {"what": self.name, "used": value(self.used), "limit": value(self.limit)}


def measures(limits: BudgetSpec, used: Spent) -> list[_Measure]:
    """Those that are limited, and known."""
    out: list[_Measure] = []
    for name in (*_COUNTED, "wall_s"):
        limit, amount = getattr(limits, name), getattr(used, name)
        if limit is not None and amount is not None:
            out.append(_Measure(name, Decimal(str(amount)), Decimal(str(limit))))
    return out


# ---------------------------------------------------------------- at a model call


async def admit(conn: Conn, fence: Fence, call: CallAsked, prices: Prices) -> tuple[Row, str | None]:
    """The session, and why the call may not be sent, if so. A session that has used up its budget is ended: the row says
    so. A call that the log has on this line already is no new one."""
    row = await rows.fenced(conn, fence)
    limits = row.limits
    if limits is None:
        return row, None
    key = exchange_key(call.guest_id, call.digest)
    if await rows.one(conn, "SELECT 1 AS ok FROM rethaw_find(%s, %s, %s)", (row.id, row.line, key)) is not None:
        return row, None
    used = await spent(conn, row, prices, locked=True)
    if limits.money is not None:
        if used.unpriced is not None:
            return row, _no_price(used.unpriced)
        if prices.of(call.model) is None:
            return row, _no_price(call.model)
    await _warn(conn, row, limits, used)
    over = next((m for m in measures(limits, used) if m.name in _COUNTED and m.over), None)
    if over is not None:
        row = await _end(conn, row, over, used)
    return row, None


def _no_price(model: str | None) -> str:
    if model is None:
        return "the request names no model, so what it costs is not known; a money budget needs that"
    return (
        f'model {model!r} has no price, which a money budget needs; add [prices."{model}"] with input and output '
        "(per million tokens) to rethaw.toml on the server and restart it"
    )


async def _end(conn: Conn, row: Row, over: _Measure, used: Spent) -> Row:
    after = f" after model call {used.model_calls:,}" if used.model_calls else ""
    event = NewEvent(type=EventType.BUDGET_EXCEEDED, data={**over.data, "calls": used.model_calls})
    if row.desired == Desired.CANCELLED:
        return await finish(conn, row, State.CANCELLED, reason=Reason.CANCELLED, detail=over.words, events=[event])
    return await finish(
        conn, row, State.FAILED, reason=Reason.BUDGET_EXCEEDED, detail=over.words + after, events=[event]
    )


async def _warn(conn: Conn, row: Row, limits: BudgetSpec, used: Spent) -> None:
    """Once for each limit, on a line."""
    events = [
        NewEvent(
            type=EventType.BUDGET_WARNING,
            data=measure.data,
            key=f"budget.warning:{row.id}:{measure.name}:{measure.limit}",
        )
        for measure in measures(limits, used)
        if measure.used >= measure.limit * WARN_AT
    ]
    if used.uncounted and any(getattr(limits, n) is not None for n in _COUNTED if n != "model_calls"):
        detail = "a model answered without token counts, so its answers cost nothing here"
        data = {"what": "uncounted", "used": used.uncounted, "detail": detail}
        events.append(NewEvent(type=EventType.BUDGET_WARNING, data=data, key=f"budget.warning:{row.id}:uncounted"))
    if events:
        await rows.append(conn, row.id, *events)


# ---------------------------------------------------------------- as time passes


async def look_at_wall(conn: Conn, session: str) -> None:
    """The time has come to look at how long it has run."""
    row = await rows.load(conn, session, lock=True)
    limits = row.limits
    if row.wall_at is None or row.state not in awake.AWAKE or limits is None or limits.wall_s is None:
        await rows.update(conn, row.id, wall_at=None)
        return
    measure = _Measure("wall_s", Decimal(str(round(await awake.used_s(conn, row.id), 3))), Decimal(str(limits.wall_s)))
    if measure.over:
        await _end(conn, row, measure, Spent())
        return
    await _warn(conn, row, BudgetSpec(wall_s=limits.wall_s), Spent(wall_s=float(measure.used)))
    at = await awake.look_at(conn, float(measure.used), limits.wall_s)
    await rows.update(conn, row.id, wall_at=at)


# ---------------------------------------------------------------- people


async def change(
    conn: Conn,
    session: str,
    given: BudgetSpec,
    add: Collection[str],
    generation: str,
    prices: Prices,
    policy: Policy,
) -> Row:
    """Give the session other limits: those of `given` in place of its own, or on top of them for those named in `add`.

    One that its budget has ended goes on from the end of its log, under `generation`, if that is enough now."""
    row = await rows.load(conn, session, lock=True)
    if row.generation == generation:
        return row  # the reply to the commit was lost
    sessions.check_budget(given)
    for name in add:
        if name not in BudgetSpec.model_fields:
            raise InvalidInput(f"{name!r} is no limit", remedy=f"use {', '.join(BudgetSpec.model_fields)}")
    former = row.limits
    made = _changed(row, former or BudgetSpec(), given, add)
    await rows.update(conn, row.id, budget=made.model_dump_json())
    if former is None:  # what it has run so far was not counted; its node did not ask before its calls
        await rows.update(conn, row.id, awake_s=await awake.told_by_log(conn, row.id))
        if row.state.on_node and row.node is not None:
            await placement.assign(conn, await rows.load(conn, row.id), "limits", reason=Reason.REQUESTED)
    event = NewEvent(type=EventType.BUDGET_CHANGED, data={"budget": made.model_dump(exclude_none=True)})
    await rows.append(conn, row.id, event)
    row = await rows.load(conn, row.id)
    if row.state in awake.AWAKE and made.wall_s is not None:
        at = await awake.look_at(conn, await awake.used_s(conn, row.id), made.wall_s)
        await rows.update(conn, row.id, wall_at=at)
        wakeups.note(wakeups.TIMER_CHANNEL, wakeups.ANY)
    if row.state != State.FAILED or row.reason != Reason.BUDGET_EXCEEDED:
        return row
    if any(measure.over for measure in measures(made, await spent(conn, row, prices, locked=True))):
        return row
    if await placement.usable(conn, row, limit=1):
        return await forks.rewind(conn, row.id, row.last_seq, generation, False, policy)
    return await retries.anew(conn, row, "its budget was raised", policy)


def _changed(row: Row, former: BudgetSpec, given: BudgetSpec, add: Collection[str]) -> BudgetSpec:
    values = former.model_dump()
    for name, value in given.model_dump(exclude_none=True).items():
        if name in add:
            if values[name] is None:
                raise InvalidInput(
                    f"session {row.id} has no limit of {name} to add to", remedy="write it without the +"
                )
            more = _plain(Decimal(values[name]) + Decimal(value)) if name == "money" else values[name] + value
            values[name] = more
        else:
            values[name] = value
    return BudgetSpec.model_validate(values)


def _plain(amount: Decimal) -> str:
    """At least two digits after the point, no exponent."""
    whole, _, part = format(amount.normalize(), "f").partition(".")
    return f"{whole}.{part.ljust(2, '0')}"
