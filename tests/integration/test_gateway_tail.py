"""After a crash: the three steps of serving the tail."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from db_fixtures import Cluster, new_database, system_cluster
from gateway_fixtures import PostgresLog, Rig, make_rig

from rethaw.db.notify import NotifyHub
from rethaw.db.pool import Database
from rethaw.model.enums import EventType, ExchangeState
from rethaw.testing.provider import Reply, ScriptedProvider, echo

E = EventType
__all__ = ["Cluster", "new_database", "system_cluster"]


def chat(text: str, **more: Any) -> bytes:
    return json.dumps({"model": "m-1", "messages": [{"role": "user", "content": text}], **more}).encode()


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with ScriptedProvider(echo) as p:
        yield p


@pytest.fixture(params=["memory", "postgres"])
def dsn(request: pytest.FixtureRequest) -> str | None:
    if request.param == "memory":
        return None
    return request.getfixturevalue("new_database")(request.getfixturevalue("system_cluster"), "migrated")


@pytest.fixture
async def rig(provider: ScriptedProvider, dsn: str | None) -> AsyncIterator[Rig]:
    if dsn is None:
        async with a_rig(provider) as rig:
            yield rig
        return
    async with Database(dsn) as db, NotifyHub(db) as hub:
        log = await PostgresLog.begin(db, hub)
        async with a_rig(provider, log) as rig:
            yield rig
        log.sync.close()


@contextlib.asynccontextmanager
async def a_rig(provider: ScriptedProvider, log: Any = None) -> AsyncIterator[Rig]:
    rig = await make_rig(provider, log)
    await rig.log.snapshot("s0")
    yield rig
    await rig.gateway.close()


async def test_live_upstream_goes_on_when_the_sandbox_died(rig: Rig, provider: ScriptedProvider):
    provider.fail(Reply(text="y" * 300, chunk_s=0.01))
    call = rig.call(chat("hi", stream=True))
    rig.serve(call)
    await rig.until(lambda: len(call.data) > 500)
    (saved,) = await rig.snapshot("s1", call)
    assert len(saved.data) > 500
    await rig.until(lambda: len(call.data) > len(saved.data) + 300)
    await rig.restore("s1", saved)
    await rig.done(saved)
    assert saved.ended and saved.data == bytes(rig.log.rows[saved.exchange or ""].data)
    assert provider.count == 1 and rig.gate.asked == []
    await rig.session.flush()
    assert len(rig.log.of(E.EXCHANGE_SERVED)) == 1


async def test_recorded_answer_is_served_after_the_node_died(rig: Rig, provider: ScriptedProvider):
    provider.fail(Reply(first_byte_s=0.1, text="once"))
    call = rig.call(chat("hi"))
    rig.serve(call)
    await provider.wait_for_calls(1)
    (saved,) = await rig.snapshot("s1", call)
    await rig.done(call)
    for _ in range(2):  # crashes again and again
        await rig.restore("s1", again := saved.copy(), node_died=True)
        await rig.done(again)
        assert again.data == call.data and again.head == call.head and again.ended
        await rig.session.flush()
    assert provider.count == 1
    served = rig.log.of(E.EXCHANGE_SERVED)
    assert [e.data["offset"] for e in served] == [0, 0] and served[0].data["tokens"] > 0


async def test_open_call_of_a_dead_node_is_issued_again_when_nothing_was_held(rig: Rig, provider: ScriptedProvider):
    provider.fail(Reply(hang=True))
    call = rig.call(chat("hi"))
    rig.serve(call)
    await provider.wait_for_calls(1)
    (saved,) = await rig.snapshot("s1", call)
    await rig.restore("s1", saved, node_died=True)
    await rig.done(saved)
    assert saved.ended and saved.status == 200 and provider.count == 2
    assert rig.events(E.EXCHANGE_REISSUED, E.EXCHANGE_UPSTREAM) == [
        "exchange.upstream", "exchange.reissued", "exchange.upstream",
    ]  # fmt: skip
    assert rig.log.rows[saved.exchange or ""].x.epoch == 2


async def test_call_taken_over_while_the_guest_is_frozen_again_is_issued_once(
    rig: Rig, provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch
):
    """The handler is cancelled between owning the exchange and reading it."""
    provider.fail(Reply(hang=True))
    call = rig.call(chat("hi"))
    rig.serve(call)
    await provider.wait_for_calls(1)
    (saved,) = await rig.snapshot("s1", call)
    reading, go_on, real = asyncio.Event(), asyncio.Event(), rig.log.read_request

    async def slow(exchange: str) -> bytes:
        reading.set()
        await go_on.wait()
        return await real(exchange)

    monkeypatch.setattr(rig.log, "read_request", slow)
    await rig.restore("s1", saved.copy(), node_died=True)
    await asyncio.wait_for(reading.wait(), 10)
    await rig.restore("s1", saved)
    go_on.set()
    await rig.done(saved)
    assert saved.ended and saved.status == 200 and provider.count == 2
    assert len(rig.log.of(E.EXCHANGE_REISSUED)) == 1


async def test_partly_recorded_answer_that_no_guest_holds_is_issued_again(rig: Rig, provider: ScriptedProvider):
    provider.fail(Reply(text="z" * 300, chunk_s=0.02))
    call = rig.call(chat("hi", stream=True))
    rig.serve(call)
    await provider.wait_for_calls(1)
    (saved,) = await rig.snapshot("s1", call)
    saved.head, saved.data = None, b""
    await rig.until(lambda: len(rig.log.rows[call.exchange or ""].data) > 500)
    await rig.restore("s1", saved, node_died=True)
    await rig.done(saved)
    assert saved.ended and saved.data == bytes(rig.log.rows[saved.exchange or ""].data) and provider.count == 2


async def test_answer_held_in_part_is_torn_when_its_upstream_is_lost(rig: Rig, provider: ScriptedProvider):
    provider.fail(Reply(text="z" * 300, chunk_s=0.02))
    call = rig.call(chat("hi", stream=True))
    rig.serve(call)
    await rig.until(lambda: len(call.data) > 500)
    (saved,) = await rig.snapshot("s1", call)
    await rig.restore("s1", saved, node_died=True)
    await rig.done(saved)
    assert saved.broken and not saved.ended and provider.count == 1
    assert rig.events(E.EXCHANGE_TORN) == ["exchange.torn"]
    assert rig.log.rows[saved.exchange or ""].x.state is ExchangeState.TORN


async def test_whole_answer_whose_end_the_dead_node_could_not_write_is_served(rig: Rig, provider: ScriptedProvider):
    """It died between the last byte and the end: the agent may have acted on it."""
    for body in (chat("hi", stream=True), chat("hi")):
        call = rig.call(body)
        (saved,) = await rig.snapshot("s1", call)
        await rig.done(call)
        saved.exchange = call.exchange
        rig.log.close_not_written(call.exchange or "")
        rig.session.runs.clear()
        await rig.restore("s1", saved, node_died=True)
        await rig.done(saved)
        assert saved.ended and saved.data == call.data
    assert provider.count == 2


async def test_repeated_requests_are_served_once_each_in_any_order(rig: Rig, provider: ScriptedProvider):
    provider._script = lambda r: Reply(text=f"answer {r.n} to {r.last_text}", first_byte_s=0.02 * (9 - r.n))
    await rig.snapshot("s1")
    bodies = [chat(f"q{i % 4}") for i in range(8)]  # each question twice
    calls = [rig.call(b) for b in bodies]
    rig.serve(*calls)
    await rig.done(*calls)
    await rig.restore("s1", node_died=True)
    order = [5, 0, 7, 2, 1, 6, 4, 3]
    again = {i: rig.call(bodies[i]) for i in range(8)}  # same guest ids as before
    for i in order:
        rig.serve(again[i])
    await rig.done(*again.values())
    assert provider.count == 8 and all(again[i].data == calls[i].data for i in range(8))
    assert {e.data["how"] for e in rig.log.of(E.EXCHANGE_ADOPTED)} == {"tail"}
    assert len(rig.gate.asked) == 8  # the answers wait for a snapshot that has them
    await rig.session.flush()
    assert len(rig.log.of(E.EXCHANGE_SERVED)) == 8 and rig.events(E.SESSION_DIVERGED) == []
    extra = await rig.ask(bodies[0])
    assert extra.ended and provider.count == 9


async def test_open_call_of_the_tail_goes_on_in_this_process(rig: Rig, provider: ScriptedProvider):
    provider.fail(Reply(text="slow", first_byte_s=0.3))
    await rig.snapshot("s1")
    call = rig.call(chat("hi"))
    rig.serve(call)
    await provider.wait_for_calls(1)
    await rig.restore("s1")
    again = await rig.ask(chat("hi"))
    assert again.ended and again.exchange == call.exchange and provider.count == 1


@pytest.mark.parametrize("whole", [True, False])
async def test_client_that_gave_up_before_the_snapshot_and_asks_again_after_the_node_died(
    rig: Rig, provider: ScriptedProvider, whole: bool
):
    """The snapshot holds no client of the exchange, and the request is on the path: guestd knows that it is unanswered."""
    provider.fail(Reply(text="once") if whole else Reply(hang=True))
    call = rig.call(chat("hi"))
    rig.serve(call)
    await provider.wait_for_calls(1)
    await rig.until(lambda: call.exchange)
    exchange = call.exchange or ""
    await rig.hang_up(call)
    await rig.snapshot("s1")
    if whole:
        await rig.until(lambda: rig.log.of(E.EXCHANGE_COMPLETED))
    await rig.restore("s1", node_died=True, left={exchange: 0})
    again = await rig.ask(chat("hi"))
    assert again.exchange == exchange and again.ended and again.status == 200
    assert provider.count == (1 if whole else 2)
    assert len(rig.log.of(E.EXCHANGE_REISSUED)) == (0 if whole else 1)
    after = await rig.ask(chat("hi"))
    assert after.exchange != exchange


async def test_another_path_is_marked_and_orphans_what_no_agent_saw(rig: Rig, provider: ScriptedProvider):
    await rig.snapshot("s1")
    rig.gate.open.clear()
    rig.gate.asked.clear()
    call = rig.call(chat("old"))
    rig.serve(call)
    await rig.until(lambda: rig.log.of(E.EXCHANGE_COMPLETED))  # answered, not released
    await rig.restore("s1")
    one = await rig.ask(chat("new 1"))
    assert one.ended and rig.events(E.EXCHANGE_ORPHANED) == []
    await rig.ask(chat("new 2"))
    await rig.until(lambda: rig.log.of(E.EXCHANGE_ORPHANED))
    await rig.session.flush()
    diverged = rig.log.of(E.SESSION_DIVERGED)
    assert [e.data["exchange"] for e in diverged] == [one.exchange]
    assert rig.log.rows[call.exchange or ""].x.state is ExchangeState.ORPHANED


async def test_answer_that_an_agent_saw_is_never_orphaned(rig: Rig, provider: ScriptedProvider):
    await rig.snapshot("s1")
    seen = await rig.ask(chat("old"))
    await rig.session.flush()
    await rig.restore("s1")
    await rig.ask(chat("new 1"))
    await rig.ask(chat("new 2"))
    late = await rig.ask(chat("old"))
    assert late.exchange == seen.exchange and provider.count == 3
    await rig.session.attempt_ended()
    assert rig.events(E.EXCHANGE_ORPHANED) == []


async def test_end_of_the_attempt_orphans_the_rest(rig: Rig, provider: ScriptedProvider):
    provider.fail(Reply(hang=True))
    await rig.snapshot("s1")
    call = rig.call(chat("old"))
    rig.serve(call)
    await provider.wait_for_calls(1)
    await rig.restore("s1")
    await rig.session.attempt_ended()
    assert rig.events(E.EXCHANGE_ORPHANED) == ["exchange.orphaned"]
    await rig.until(lambda: provider.calls[0].client_gone)


async def test_request_durable_but_not_accepted_in_the_snapshot_is_found_by_its_guest_id(
    rig: Rig, provider: ScriptedProvider
):
    """The snapshot's seq covers the request, its memory does not know the exchange."""
    call = rig.call(chat("hi"))
    saved = call.copy()
    counter = rig.counter
    rig.serve(call)
    await rig.done(call)
    await rig.log.snapshot("s1")
    rig.counters = counter
    await rig.restore("s1", saved, node_died=True)
    await rig.done(saved)
    assert saved.ended and saved.exchange == call.exchange and provider.count == 1
    fresh = await rig.ask(chat("hi"))  # the next id of the guest is another request
    assert fresh.exchange != call.exchange and provider.count == 2


async def test_failed_without_answer_is_asked_anew_and_broken_one_breaks_again(rig: Rig, provider: ScriptedProvider):
    await rig.snapshot("s1")
    provider.fail(Reply(cut="rst"))
    first = await rig.ask(chat("a"))
    provider.fail(Reply(text="b" * 90, cut="close", cut_after=3))
    second = await rig.ask(chat("b", stream=True))
    assert first.broken and second.broken
    await rig.restore("s1")
    again = await rig.ask(chat("a"))
    assert again.ended and provider.count == 3
    torn = await rig.ask(chat("b", stream=True))
    assert torn.broken and torn.data == second.data and provider.count == 3


async def test_hold_survives_the_sandbox(provider: ScriptedProvider):
    rig = await make_rig(provider, hold_max_s=30.0)
    provider.fail(Reply.rate_limited(0.4))
    call = rig.call(chat("hi"))
    rig.serve(call)
    await rig.until(lambda: rig.hooks.holds)
    await rig.quiesce(call)
    assert rig.session.held()
    saved = call.copy()
    await rig.log.snapshot("s1")
    rig.counters = rig.counter
    await rig.session.detach()
    assert rig.session.held()
    hooks = rig.hooks
    await rig.until(lambda: hooks.answers)  # frozen: the answer wakes it
    await rig.restore("s1", saved)
    await rig.done(saved)
    assert saved.ended and saved.status == 200 and provider.count == 2
    await rig.gateway.close()
