"""Budgets: what counts, when a session is stopped, and how it goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from control_fixtures import (  # noqa: F401 - fixtures
    AGENT,
    World,
    cluster_fixture,
    dsn_fixture,
    eventually,
    world,
)

from rethaw.control import loads, spending
from rethaw.control.prices import Prices, prices_from
from rethaw.gateway.run import completed
from rethaw.model.enums import EventType, ExchangeState, Reason, State
from rethaw.model.errors import Fenced, InvalidInput
from rethaw.model.types import AgentSpec, BudgetSpec, CallAsked, Fence, RequestMeta, ResponseHead, RetrySpec, Usage

S = State
PRICES = prices_from(
    {"gpt-5*": {"input": 1, "output": "10.00"}, "gpt-5-mini": {"input": 0.25, "cached": 0.025, "output": 2}}, "t"
)


@pytest.fixture(name="w")
async def world_fixture(control_dsn: str) -> AsyncIterator[World]:
    async with world(control_dsn, prices=PRICES) as made:
        yield made


def agent(**budget: Any) -> AgentSpec:
    return AGENT.model_copy(update={"budget": BudgetSpec(**budget)})


class Calls:
    """Model calls of a session, as its gateway makes them."""

    def __init__(self, w: World, fence: Fence) -> None:
        self.w = w
        self.fence = fence
        self.count = 0

    def meta(self, model: str | None, number: int) -> RequestMeta:
        return RequestMeta(
            provider="openai", method="POST", path="/v1/chat/completions", digest=f"d{number}", model_call=True,
            model=model, guest_id=f"1.{number}",
        )  # fmt: skip

    async def admit(self, model: str | None = "gpt-5-mini", number: int | None = None) -> str | None:
        number = self.count + 1 if number is None else number
        call = CallAsked(guest_id=f"1.{number}", digest=f"d{number}", model=model)
        return await self.w.control.admit(self.fence, call)

    async def begin(self, model: str | None = "gpt-5-mini") -> Any:
        assert await self.admit(model) is None
        self.count += 1
        return await self.w.log.begin_exchange(self.fence, self.meta(model, self.count), b"{}", "o", upstream=True)

    async def answer(
        self, x: Any, input: int, output: int, cached: int | None = None, model: str = "gpt-5-mini"
    ) -> None:
        usage = Usage(model=model, input_tokens=input, cached_tokens=cached, output_tokens=output)
        await self.w.log.append_response(x.id, x.epoch, ResponseHead(status=200), [])
        event = completed(x.id, 200, 1, usage)
        await self.w.log.finish_exchange(x.id, x.epoch, ExchangeState.COMPLETE, usage, event)

    async def ask(self, input: int, output: int, **more: Any) -> Any:
        x = await self.begin()
        await self.answer(x, input, output, **more)
        return x


async def running(w: World, spec: AgentSpec) -> tuple[str, Calls]:
    session, fence = await w.start(spec)
    return session, Calls(w, fence)


async def test_a_session_is_stopped_at_the_call_after_its_budget(w: World) -> None:
    session, calls = await running(w, agent(tokens=1000))
    await calls.ask(300, 200)
    assert not await w.events(session, EventType.BUDGET_WARNING)
    await calls.ask(200, 100)
    await calls.ask(250, 50)
    (warned,) = await w.events(session, EventType.BUDGET_WARNING)  # told when the third was asked for
    assert warned.data == {"what": "tokens", "used": 800, "limit": 1000}
    await w.append(calls.fence, EventType.MESSAGE_SENT, b'"last"', message="m_1", key="send:1.1")
    with pytest.raises(Fenced, match="1,000 tokens are used up: 1,100 after model call 3"):
        await calls.admit()
    view = await w.control.session(session)
    assert (view.state, view.reason) == (S.FAILED, Reason.BUDGET_EXCEEDED)
    assert view.detail == "1,000 tokens are used up: 1,100 after model call 3"
    (exceeded,) = await w.events(session, EventType.BUDGET_EXCEEDED)
    assert exceeded.data == {"what": "tokens", "used": 1100, "limit": 1000, "calls": 3}
    assert [a.action for a in await w.node.work()] == ["kill"]
    assert [m.payload for m in await w.control.outbox(session)] == [b'"last"']
    with pytest.raises(Fenced):
        await calls.admit()


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"input_tokens": 100}, "100 input tokens are used up: 100"),
        ({"output_tokens": 50}, "50 output tokens are used up: 50"),
        ({"model_calls": 1}, "1 model calls are used up: 1"),
        ({"money": "0.0001"}, "a budget of 0.0001 is used up: 0.000125"),
    ],
)
async def test_each_measure(w: World, budget: dict[str, Any], said: str) -> None:
    session, calls = await running(w, agent(**budget))
    await calls.ask(100, 50)
    with pytest.raises(Fenced):
        await calls.admit()
    assert (await w.control.session(session)).detail == f"{said} after model call 1"


async def test_what_was_spent(w: World) -> None:
    session, calls = await running(w, agent(tokens=10**9))
    await calls.ask(1_000_000, 1_000_000, cached=400_000)
    await calls.ask(100, 0, model="gpt-5-2025-08-07")
    limits, spent = await w.control.limits(session)
    assert limits == BudgetSpec(tokens=10**9)
    assert (spent.tokens, spent.input_tokens, spent.cached_tokens, spent.output_tokens, spent.model_calls) == (
        2_000_100, 1_000_100, 400_000, 1_000_000, 2,
    )  # fmt: skip
    assert spent.money == "2.1601"  # 0.6 * 0.25 + 0.4 * 0.025 + 2, and 100 at 1 a million


async def test_calls_are_counted_over_crashes_and_rewinds_and_not_twice(w: World) -> None:
    session, calls = await running(w, agent(model_calls=3))
    await calls.ask(10, 10)
    info = await w.save(calls.fence)
    await calls.ask(10, 10)
    await w.control.report_death(calls.fence, Reason.SANDBOX_DIED, "it died")
    _, calls.fence = await w.back(session)
    # The second call is of a line that was left; it was paid all the same, and asking again finds it in the log.
    x = (await w.log.tail(calls.fence, info.id))[0]
    await w.log.adopt_exchange(calls.fence, x.id, "1.2", "tail")
    assert (await w.control.limits(session))[1].model_calls == 2
    third = await calls.begin()
    # The same request once more, which a restored guest may send: it is no new call.
    assert await calls.admit(number=calls.count) is None
    assert (await w.log.begin_exchange(calls.fence, calls.meta("gpt-5-mini", 3), b"{}", "o")).id == third.id
    await w.control.rewind(session, info.id)
    _, calls.fence = await w.back(session)
    with pytest.raises(Fenced, match="3 model calls are used up: 3"):
        await calls.admit(number=9)


async def test_a_call_that_was_sent_again_counts_twice(w: World) -> None:
    session, calls = await running(w, agent(model_calls=3))
    x = await calls.begin()
    await w.log.take_over(calls.fence, x.id, "another")
    assert (await w.control.limits(session))[1].model_calls == 2


async def test_a_fork_has_a_budget_of_its_own(w: World) -> None:
    session, calls = await running(w, agent(model_calls=1))
    await calls.ask(10, 10)
    info = await w.save(calls.fence)
    (fork,) = await w.control.fork(session, info.id)
    _, fence = await w.back(fork.id)
    mine = Calls(w, fence)
    mine.count = 1
    await mine.ask(10, 10)
    assert (await w.control.limits(fork.id))[1].model_calls == 1
    with pytest.raises(Fenced):
        await mine.admit()
    assert (await w.control.session(session)).state == S.RUNNING


async def test_a_model_without_a_price_is_refused_by_name(w: World) -> None:
    session, calls = await running(w, agent(money="5"))
    refused = await calls.admit("claude-9")
    assert refused is not None and '[prices."claude-9"]' in refused
    assert "names no model" in (await calls.admit(None) or "")
    await calls.ask(10, 10)
    x = await calls.begin()
    await calls.answer(x, 10, 10, model="other-name-of-it")  # the price of what was asked for
    assert await calls.admit() is None
    assert (await w.control.session(session)).state == S.RUNNING
    assert await (Calls(w, (await w.start(agent(tokens=5)))[1])).admit("claude-9") is None


async def test_answers_without_counts_are_told(w: World) -> None:
    session, calls = await running(w, agent(tokens=1000))
    x = await calls.begin()
    await w.log.append_response(x.id, x.epoch, ResponseHead(status=200), [])
    await w.log.finish_exchange(x.id, x.epoch, ExchangeState.COMPLETE, Usage(model="m"), completed(x.id, 200, 1, None))
    for _ in range(2):
        await calls.admit()
    (warned,) = await w.events(session, EventType.BUDGET_WARNING)
    assert (warned.data["what"], warned.data["used"]) == ("uncounted", 1)


async def test_a_larger_budget_lets_it_go_on_where_it_was(w: World) -> None:
    session, calls = await running(w, agent(tokens=100, model_calls=50))
    await w.act(calls.fence)
    x = await calls.begin()
    info = await w.save(calls.fence)
    await calls.answer(x, 90, 20)
    with pytest.raises(Fenced):
        await calls.admit()
    view = await w.control.budget(session, BudgetSpec(tokens=105))
    assert view.state == S.FAILED  # not enough
    assert [a.action for a in await w.node.work()] == ["kill"]
    view = await w.control.budget(session, BudgetSpec(tokens=100, model_calls=60), ["tokens"])
    assert view.state == S.RESUMING
    assert (await w.control.limits(session))[0] == BudgetSpec(tokens=205, model_calls=60)
    assignment, calls.fence = await w.back(session)
    assert assignment.snapshot is not None and assignment.snapshot.id == info.id
    # Open in the snapshot; its answer comes from the log.
    assert await w.log.stood(calls.fence, x.id) == ExchangeState.COMPLETE
    assert await calls.admit() is None


async def test_a_larger_budget_without_a_snapshot_is_a_new_attempt(w: World) -> None:
    session, calls = await running(w, agent(model_calls=0))
    with pytest.raises(Fenced):
        await calls.admit()
    await w.node.work()
    view = await w.control.budget(session, BudgetSpec(model_calls=2))
    assert (view.state, view.attempt) == (S.STARTING, 2)


async def test_budgets_that_do_not_fit(w: World) -> None:
    for wrong in ({"tokens": -1}, {"money": "lots"}, {"money": "nan"}, {"wall_s": -2.0}):
        with pytest.raises(InvalidInput, match=next(iter(wrong))):
            await w.control.create(agent(**wrong), {})
    session, _ = await w.start()
    with pytest.raises(InvalidInput, match="no limit of tokens to add to"):
        await w.control.budget(session, BudgetSpec(tokens=5), ["tokens"])
    session, _ = await w.start(agent(tokens=5))
    with pytest.raises(InvalidInput, match="no limit of money"):
        await w.control.budget(session, BudgetSpec(money="5"), ["money"])
    with pytest.raises(InvalidInput, match="'x' is no limit"):
        await w.control.budget(session, BudgetSpec(tokens=5), ["x"])


async def test_a_budget_for_a_session_that_began_without_one(w: World) -> None:
    session, calls = await running(w, AGENT)
    await calls.ask(300, 200)
    assert (await w.control.limits(session))[0] is None
    view = await w.control.budget(session, BudgetSpec(tokens=1000))
    assert view.state == S.RUNNING
    (told,) = await w.node.work()  # its node asks before each call from now on
    assert (told.action, told.agent.budget) == ("limits", BudgetSpec(tokens=1000))
    assert (await w.control.limits(session))[1].tokens == 500  # of before
    await calls.ask(300, 200)
    with pytest.raises(Fenced, match="1,000 tokens are used up: 1,000 after model call 2"):
        await calls.admit()
    # A later life is told as it begins.
    session, calls = await running(w, AGENT)
    await w.save(calls.fence)
    await w.control.budget(session, BudgetSpec(model_calls=7))
    await w.control.report_death(calls.fence, Reason.SANDBOX_DIED, "x")
    assignment, _ = await w.back(session)
    assert assignment.agent.budget == BudgetSpec(model_calls=7)
    # One told before its node says that it runs is not lost by that word.
    view, _ = await w.control.create(AGENT, {})
    assert (await w.control.session(view.id)).state == S.STARTING
    await w.control.budget(view.id, BudgetSpec(model_calls=7))
    assert view.generation is not None
    await w.report(Fence(session=view.id, generation=view.generation), S.RUNNING)
    assert "limits" in [a.action for a in await w.node.work() if a.session == view.id]


async def test_time_of_before_counts_for_a_later_budget(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    await w.sql("UPDATE sessions SET state_since = state_since - interval '100 seconds' WHERE id = %s", session)
    await w.report(fence, S.SUSPENDING)
    await w.report(fence, S.SUSPENDED, reason=Reason.IDLE)
    states = "session = %s AND type = 'session.state' AND data->>'state' = %s"
    for state, ago in (("running", 100), ("suspending", 40)):  # as if it had been so
        await w.sql("ALTER TABLE events DISABLE TRIGGER ALL")
        await w.sql(f"UPDATE events SET at = at - make_interval(secs => %s) WHERE {states}", float(ago), session, state)
        await w.sql("ALTER TABLE events ENABLE TRIGGER ALL")
    await w.control.budget(session, BudgetSpec(wall_s=1000.0))
    used = (await w.control.limits(session))[1].wall_s
    assert 99 < used < 110  # suspended it costs nothing
    _, fence = await w.control.resume(session), None
    _, fence = await w.back(session)
    assert 99 < (await w.control.limits(session))[1].wall_s < 115


async def test_sums_are_kept_and_are_those_of_the_log(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spending, "FOLD", 3)
    session, calls = await running(w, agent(tokens=10**9, money="1000"))
    late = [await calls.begin() for _ in range(2)]  # open for a long time
    tokens = 0
    for n in range(1, 11):
        await calls.ask(n, 2 * n, model=("gpt-5-mini", "gpt-5.1")[n % 2])
        tokens += 3 * n
        used = (await w.control.limits(session))[1]
        assert (used.tokens, used.model_calls) == (tokens, n + 2)
    ((upto, pending, sums),) = await w.sql("SELECT upto, pending, sums FROM spent_totals WHERE session = %s", session)
    assert set(pending) == {x.id for x in late} and {one["answered"] for one in sums} == {"gpt-5-mini", "gpt-5.1"}
    ((left,),) = await w.sql("SELECT count(*) FROM exchanges WHERE session = %s AND seq > %s", session, upto)
    assert left < 5  # all that is counted again
    torn, answered = late
    await w.log.finish_exchange(torn.id, torn.epoch, ExchangeState.TORN, None, completed(torn.id, 200, 1, Usage()))
    await calls.answer(answered, 1000, 0, model="gpt-5.1")
    used = (await w.control.limits(session))[1]
    assert (used.tokens, used.model_calls) == (tokens + 1000, 11)  # the torn one came to nothing
    for _ in range(4):
        await calls.ask(1, 1)
    used = (await w.control.limits(session))[1]
    await w.sql("DELETE FROM spent_totals")
    assert (await w.control.limits(session))[1].model_copy(update={"wall_s": 0}) == used.model_copy(
        update={"wall_s": 0}
    )
    # What an abandoned line spent was paid for.
    info = await w.save(calls.fence)
    for _ in range(4):
        await calls.ask(1, 1)
    await w.control.rewind(session, info.id)
    _, calls.fence = await w.back(session)
    await calls.ask(1, 1)
    after = (await w.control.limits(session))[1]
    assert (after.model_calls, after.tokens) == (used.model_calls + 5, used.tokens + 10)
    # What `top` shows is the same, whether much of it is in the sums, nothing, or as much as it adds up itself.
    monkeypatch.setattr(loads, "_MANY", 3)
    for forget in (False, True, False):
        if forget:
            await w.sql("DELETE FROM spent_totals")
        ((shown,), _) = await w.control.loads(10, False)
        assert (shown["model_calls"], shown["input_tokens"]) == (after.model_calls, after.input_tokens)
        assert shown["output_tokens"] == after.output_tokens and "new" not in shown
    assert await w.sql("SELECT 1 FROM spent_totals") != []
    # A fork begins at zero, and what is removed takes its sums along.
    (fork,) = await w.control.fork(session, info.id)
    assert (await w.control.limits(fork.id))[1].model_calls == 0
    await w.control.erase(fork.id, force=True)
    await w.control.erase(session, force=True)
    assert await w.sql("SELECT 1 FROM spent_totals") == []


async def test_a_session_that_is_being_cancelled_is_cancelled(w: World) -> None:
    session, calls = await running(w, agent(model_calls=0))
    await w.control.cancel(session)
    with pytest.raises(Fenced):
        await calls.admit()
    assert (await w.control.session(session)).state == S.CANCELLED


async def test_a_used_up_budget_is_not_tried_again(w: World) -> None:
    spec = agent(model_calls=0).model_copy(update={"retries": RetrySpec(max=5, delay_s=0)})
    session, calls = await running(w, spec)
    with pytest.raises(Fenced):
        await calls.admit()
    assert (await w.control.session(session)).state == S.FAILED


# ---------------------------------------------------------------- time


async def test_time_is_counted_while_it_runs_and_no_other(w: World) -> None:
    session, calls = await running(w, agent(wall_s=3600.0))
    assert await w.sql("SELECT wall_at > now() + interval '47 minutes' FROM sessions") == [(True,)]
    await w.sql("UPDATE sessions SET state_since = state_since - interval '100 s'")
    assert 100 <= (await w.control.limits(session))[1].wall_s < 110
    await w.sleep(calls.fence, Reason.IDLE)
    await w.sql("UPDATE sessions SET state_since = state_since - interval '5000 s'")
    assert 100 <= (await w.control.limits(session))[1].wall_s < 110
    assert await w.sql("SELECT wall_at FROM sessions") == [(None,)]
    await w.control.resume(session)
    await w.back(session)
    await w.sql("UPDATE sessions SET state_since = state_since - interval '50 s'")
    assert 150 <= (await w.control.limits(session))[1].wall_s < 160


async def test_time_stops_it_after_a_warning(w: World) -> None:
    session, _ = await running(w, agent(wall_s=0.5))

    async def over() -> bool:
        await w.loops.fire()
        return (await w.control.session(session)).state.final

    await eventually(over)
    view = await w.control.session(session)
    assert view.reason == Reason.BUDGET_EXCEEDED and "500ms of running are used up" in (view.detail or "")
    (warned,) = await w.events(session, EventType.BUDGET_WARNING)
    assert warned.data["what"] == "wall_s" and warned.data["used"] >= 0.4
    assert [a.action for a in await w.node.work()] == ["kill"]


async def test_time_in_which_the_server_was_away_does_not_count(w: World) -> None:
    session, _ = await running(w, agent(wall_s=3600.0))
    await w.sql("UPDATE sessions SET state_since = now() - interval '8 hours'")
    await w.sql("UPDATE nodes SET lease_until = now() - interval '7 hours 50 minutes'")
    await w.node.restart()
    assert 590 <= (await w.control.limits(session))[1].wall_s < 610
    await w.loops.fire()
    view = await w.control.session(session)
    assert view.state == S.RECOVERING
    await w.back(session, "start")
    await w.sql("UPDATE sessions SET state_since = state_since - interval '50 s'")
    assert 640 <= (await w.control.limits(session))[1].wall_s < 660


# ---------------------------------------------------------------- prices


def test_prices_by_name_and_pattern() -> None:
    for model, output in (("gpt-5-mini", "2"), ("gpt-5-mini-2025", "10"), ("gpt-5", "10")):
        price = PRICES.of(model)
        assert price is not None and str(price.output).startswith(output), model
    assert PRICES.of("gpt-4") is None and PRICES.of(None) is None and not Prices().table


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([], "not a table"),
        ({"m": 5}, "not a table"),
        ({"m": {"input": 1}}, "no output"),
        ({"m": {"input": 1, "output": -2}}, "not a price"),
        ({"m": {"input": "x", "output": 2}}, "not a price"),
        ({"m": {"input": 1, "output": 2, "in": 3}}, "unknown field 'in'"),
    ],
)
def test_prices_that_do_not_fit(table: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        prices_from(table, "rethaw.toml")
