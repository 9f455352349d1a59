"""Queues on a real PostgreSQL: limits, order, delays, ttl, tags, and finding sessions again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from control_fixtures import (  # noqa: F401 - fixtures
    AGENT,
    World,
    cluster_fixture,
    dsn_fixture,
    eventually,
    world,
    world_fixture,
)

from rethaw.control.finding import Filter
from rethaw.control.policy import Policy
from rethaw.model.enums import EventType, Reason, State
from rethaw.model.errors import Conflict, InvalidInput, NotFound
from rethaw.model.types import Fence, SessionView, StartOptions, WaitSpec

S = State


@pytest.fixture(name="quick")
async def quick_fixture(control_dsn: str) -> AsyncIterator[World]:
    """With control's loops running. A poll alone would be too late for what is asserted."""
    async with world(control_dsn, Policy(poll_s=20.0, lease_s=600.0)) as w:
        loops = asyncio.create_task(w.loops.run())
        yield w
        loops.cancel()
        await asyncio.gather(loops, return_exceptions=True)


async def start(w: World, queue: str = "q", key: str | None = None, **options: Any) -> SessionView:
    view, _ = await w.control.create(AGENT, {}, key, StartOptions(queue=queue, **options))
    return view


async def view(w: World, session: str) -> SessionView:
    return await w.control.session(session)


async def run(w: World, session: str) -> Fence:
    """It has been given to the node: run it."""
    now = await view(w, session)
    assert now.generation is not None and now.state in (S.STARTING, S.RESUMING, S.RECOVERING), now
    fence = Fence(session=session, generation=now.generation)
    await w.report(fence, S.RUNNING)
    return fence


async def end(w: World, session: str) -> None:
    now = await view(w, session)
    assert now.generation is not None
    await w.report(Fence(session=session, generation=now.generation), S.COMPLETED, exit_code=0)


async def until(w: World, session: str, *states: State) -> SessionView:
    async def look() -> SessionView | None:
        now = await view(w, session)
        return now if now.state in states else None

    return await eventually(look, 5)


async def test_a_limit_is_kept_and_the_next_follows_at_once(quick: World) -> None:
    w = quick
    await w.control.queues.change("q", {"limit": 2})
    one, two, three, four = [await start(w) for _ in range(4)]
    assert [v.state for v in (one, two, three, four)] == [S.STARTING, S.STARTING, S.QUEUED, S.QUEUED]
    assert three.detail == "queue q lets 2 run at once, now 2 do"
    why = await w.control.why(four.id)
    assert why["detail"] == "queue q lets 2 run at once, now 2 do; 1 wait before it"
    assert [(x["kind"], x["name"]) for x in why["waiting_for"]] == [("queue", "q")]
    assert (await start(w, "other")).state == S.STARTING and (await start(w, "default")).state == S.STARTING
    shown = await w.control.queues.get("q")
    assert (shown.running, shown.waiting, shown.next) == (2, 2, (three.id, four.id))

    await end(w, one.id)
    await until(w, three.id, S.STARTING)
    await w.control.cancel(two.id, now=True)
    await until(w, four.id, S.STARTING)
    assert (await w.control.queues.get("q")).waiting == 0


async def test_many_at_once_never_exceed_a_limit(w: World) -> None:
    """Starts, ends and several placing loops at the same time."""
    await w.control.queues.change("q", {"limit": 3, "key_limit": 2})
    most = 0

    async def look(stop: asyncio.Event) -> None:
        nonlocal most
        while not stop.is_set():
            found = await w.sql(
                """SELECT p.concurrency_key, count(*) FROM sessions s JOIN session_specs p ON p.session = s.id
                   WHERE s.node IS NOT NULL AND s.state = 'starting' GROUP BY 1"""
            )
            most = max(most, sum(n for _, n in found))
            assert sum(n for _, n in found) <= 3 and all(n <= 2 for _, n in found), found

    stop = asyncio.Event()
    looking = asyncio.create_task(look(stop))
    views = await asyncio.gather(*(start(w, concurrency_key="ab"[n % 2]) for n in range(16)))
    ended = 0
    while ended < 16:
        for v in views:
            now = await view(w, v.id)
            if now.state == S.STARTING:
                await asyncio.gather(end(w, v.id), *(w.control.place_waiting() for _ in range(3)))
                ended += 1
    stop.set()
    await looking
    assert most == 3


async def test_higher_priority_first_then_the_oldest(w: World) -> None:
    await w.control.queues.change("q", {"limit": 1})
    first = await start(w)
    plain, urgent, second, low = [await start(w, priority=p) for p in (0, 5, 0, -5)]
    order: list[str] = []
    running = first.id
    for _ in range(4):
        await end(w, running)
        await w.control.place_waiting()
        (running,) = [v.id for v in (plain, urgent, second, low) if (await view(w, v.id)).state == S.STARTING]
        order.append(running)
    assert order == [urgent.id, plain.id, second.id, low.id]


async def test_a_new_one_does_not_overtake_those_that_wait(w: World) -> None:
    """Nobody has placed the one that waits since the slot was free."""
    await w.control.queues.change("q", {"limit": 1})
    first, old = await start(w), await start(w)
    await end(w, first.id)
    new = await start(w)
    assert new.state == S.QUEUED and "not its turn" in (new.detail or "")
    assert (await start(w, priority=1)).state == S.STARTING
    assert (await view(w, old.id)).state == S.QUEUED


async def test_a_key_that_has_its_share_blocks_no_other(w: World) -> None:
    await w.control.queues.change("q", {"limit": 3, "key_limit": 1})
    a, a2, a3 = [await start(w, concurrency_key="a") for _ in range(3)]
    b, none, none2 = await start(w, concurrency_key="b"), await start(w), await start(w)
    assert [v.state for v in (a, a2, a3, b, none, none2)] == [
        S.STARTING, S.QUEUED, S.QUEUED, S.STARTING, S.STARTING, S.QUEUED,
    ]  # fmt: skip
    assert a2.detail == "queue q lets 1 run at once with key 'a', now 1 do"
    await end(w, a.id)
    await w.control.place_waiting()
    assert [(await view(w, v.id)).state for v in (a2, a3, none2)] == [S.STARTING, S.QUEUED, S.QUEUED]


async def test_what_no_node_could_take_blocks_nobody(w: World) -> None:
    await w.control.queues.change("q", {"limit": 1})
    first = await start(w)
    await w.larger_node_away()
    large, _ = await w.control.create(
        AGENT.model_copy(update={"memory_bytes": 1 << 40}), {}, None, StartOptions(queue="q", priority=9)
    )
    small = await start(w)
    assert (large.state, small.state) == (S.QUEUED, S.QUEUED)
    await end(w, first.id)
    await w.control.place_waiting()
    assert (await view(w, small.id)).state == S.STARTING
    await end(w, small.id)
    assert "memory" in (await w.control.why(large.id))["waiting_for"][0]["wakes_it"]


async def test_a_paused_queue_starts_nothing(quick: World) -> None:
    w = quick
    await w.control.queues.change("default", {"paused": True})
    one = await start(w, "default")
    assert one.state == S.QUEUED and one.detail == "queue default is paused"
    assert (await w.control.why(one.id))["waiting_for"][0]["wakes_it"] == "rethaw queue resume default"
    await w.control.queues.change("default", {"paused": False})
    await until(w, one.id, S.STARTING)


async def test_limits_are_changed_shown_and_forgotten(w: World) -> None:
    queues = w.control.queues
    assert [q.name for q in await queues.every()] == ["default"]
    with pytest.raises(NotFound, match="no queue 'q'"):
        await queues.get("q")
    made = await queues.change("q", {"limit": 1, "key_limit": 2})
    assert (made.limit, made.key_limit, made.suspended, made.paused) == (1, 2, "count", False)
    assert (await queues.change("q", {"limit": None})).key_limit == 2
    for wrong in ({"limit": 0}, {"key_limit": -1}, {"limit": 10**7}):
        with pytest.raises(InvalidInput, match=str(*wrong.values())):
            await queues.change("q", wrong)
    one = await start(w)
    with pytest.raises(Conflict, match="1 unfinished sessions are in queue q"):
        await queues.remove("q")
    await end(w, one.id)
    assert (await queues.remove("q")).name == "q"
    assert [q.name for q in await queues.every()] == ["default"]
    for bad in ("a b", "", "a/b", "-a", "x" * 101):
        with pytest.raises(InvalidInput, match="queue's name"):
            await start(w, bad)


async def test_a_lower_limit_ends_nobody(w: World) -> None:
    views = [await start(w) for _ in range(3)]
    await w.control.queues.change("q", {"limit": 1})
    fourth = await start(w)
    for n, one in enumerate(views):
        assert (await view(w, fourth.id)).state == S.QUEUED, n
        await end(w, one.id)
        await w.control.place_waiting()
    assert (await view(w, fourth.id)).state == S.STARTING


# ---------------------------------------------------------------- suspended ones


async def suspended(w: World) -> SessionView:
    """In queue q, asleep until signal go."""
    one = await start(w)
    fence = await run(w, one.id)
    await w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="signal", name="go"))
    await w.sleep(fence, Reason.IDLE)
    return await view(w, one.id)


async def test_suspended_ones_keep_their_slots(w: World) -> None:
    await w.control.queues.change("q", {"limit": 1})
    one = await suspended(w)
    two = await start(w)
    assert two.state == S.QUEUED
    await w.control.signal(one.id, "go", b"1")
    assert (await view(w, one.id)).state == S.RESUMING
    await w.control.queues.change("q", {"suspended": "free"})
    await w.control.place_waiting()
    assert (await view(w, two.id)).state == S.QUEUED, "it is awake"


async def test_where_suspended_ones_are_free_they_wait_to_go_on(quick: World) -> None:
    w = quick
    await w.control.queues.change("q", {"limit": 1, "suspended": "free"})
    one = await suspended(w)
    two = await start(w)
    assert two.state == S.STARTING
    third = await start(w, priority=-1)
    await w.control.signal(one.id, "go", b"1")
    now = await view(w, one.id)
    assert now.state == S.RESUMING and now.node is None
    why = await w.control.why(one.id)
    assert why["detail"] == "queue q lets 1 run at once, now 1 do; 0 wait before it"
    await end(w, two.id)

    async def placed() -> bool:
        return (await view(w, one.id)).node is not None

    await eventually(placed, 5)
    assert (await view(w, third.id)).state == S.QUEUED
    fence = await run(w, one.id)
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "it fell")
    now = await view(w, one.id)
    assert now.state == S.RECOVERING and now.node is not None, "a crash takes no slot away"
    await run(w, one.id)
    await end(w, one.id)
    await until(w, third.id, S.STARTING)


async def test_how_suspended_ones_count_can_change(w: World) -> None:
    await w.control.queues.change("q", {"limit": 1})
    one = await suspended(w)
    two = await start(w)
    await w.control.queues.change("q", {"suspended": "free"})
    await w.control.place_waiting()
    assert (await view(w, two.id)).state == S.STARTING
    await end(w, two.id)
    await w.control.queues.change("q", {"suspended": "count"})
    assert (await start(w)).state == S.QUEUED
    await w.control.erase(one.id)
    await w.control.place_waiting()
    assert (await w.control.queues.get("q")).running == 1


async def test_a_stop_of_the_server_takes_no_slot_away(w: World) -> None:
    await w.control.queues.change("q", {"limit": 1, "suspended": "free"})
    one = await start(w)
    fence = await run(w, one.id)
    await w.sleep(fence, Reason.NODE_STOPPED)
    urgent = await start(w, priority=9)
    assert urgent.state == S.QUEUED
    await w.node.restart()
    assert (await view(w, one.id)).state == S.RESUMING and (await view(w, urgent.id)).state == S.QUEUED


async def test_a_session_that_was_rewound_waits_for_a_slot(w: World) -> None:
    await w.control.queues.change("q", {"limit": 1})
    one = await start(w)
    fence = await run(w, one.id)
    await w.act(fence)
    info = await w.save(fence)
    await end(w, one.id)
    two = await start(w)
    await w.control.rewind(one.id, info.id)
    now = await view(w, one.id)
    assert now.state == S.RESUMING and now.node is None
    await end(w, two.id)
    await w.control.place_waiting()
    assert (await view(w, one.id)).node is not None


async def test_forks_are_in_their_parents_queue(w: World) -> None:
    await w.control.queues.change("q", {"limit": 2})
    one = await start(w, priority=3, concurrency_key="k", tags=("t", "schedule:s"))
    fence = await run(w, one.id)
    await w.act(fence)
    info = await w.save(fence)
    forks = await w.control.fork(one.id, info.id, 3)
    assert [(f.queue, f.priority, f.concurrency_key, f.tags) for f in forks] == [("q", 3, "k", ("t",))] * 3
    waiting = [f.id for f in forks if f.node is None]
    assert len(waiting) == 2
    await w.control.cancel(waiting[0])
    await end(w, one.id)
    await w.control.place_waiting()
    assert (await view(w, waiting[1])).node is not None


# ---------------------------------------------------------------- templates


async def template(w: World, **agent: Any) -> None:
    """One named warm, ready."""
    made = await w.control.warm.create("warm", AGENT.model_copy(update=agent), {})
    fence = await run(w, made.session)
    await w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="signal", name="rethaw.start"))
    await w.control.suspend(made.session)
    info = await w.sleep(fence, Reason.REQUESTED)
    await w.control.warm.ready(made, info.id, "call")


async def test_a_start_from_a_template_waits_in_its_queue(quick: World) -> None:
    w = quick
    await w.control.queues.change("default", {"limit": 1})
    busy = await start(w, "default")
    await template(w)  # which no limit counts
    assert [q.running for q in await w.control.queues.every()] == [1]
    one, _ = await w.control.warm.start("warm", b"{}", None)
    assert one.state == S.QUEUED and one.detail == "queue default lets 1 run at once, now 1 do"
    other, _ = await w.control.warm.start("warm", b"{}", None, StartOptions(queue="q", tags=("t",)))
    assert other.state == S.RESUMING and other.node is not None and (other.queue, other.tags) == ("q", ("t",))
    later, _ = await w.control.warm.start("warm", b"{}", None, StartOptions(queue="q", delay_s=0.3))
    assert later.state == S.QUEUED and "it starts at" in (later.detail or "")
    await end(w, busy.id)
    now = await until(w, one.id, S.RESUMING)
    assert now.node is not None
    await until(w, later.id, S.RESUMING)
    gone, _ = await w.control.warm.start("warm", b"{}", None, StartOptions(ttl_s=0.1))
    assert (await until(w, gone.id, S.FAILED)).reason == Reason.EXPIRED


async def test_a_queued_start_from_a_template_can_be_cancelled(w: World) -> None:
    await template(w)
    one, _ = await w.control.warm.start("warm", b"{}", None, StartOptions(delay_s=60))
    with pytest.raises(Conflict):
        await w.control.fork(one.id)
    assert (await w.control.cancel(one.id)).state == S.CANCELLED


# ---------------------------------------------------------------- delays and ttl


async def test_a_delay(quick: World) -> None:
    w = quick
    one = await start(w, delay_s=0.4, ttl_s=10)
    assert one.state == S.QUEUED and one.not_before is not None and "it starts at" in (one.detail or "")
    assert one.not_before - one.created_at > timedelta(seconds=0.3)
    assert (await w.control.why(one.id))["waiting_for"][0]["kind"] == "timer"
    await w.control.place_waiting()
    assert (await view(w, one.id)).state == S.QUEUED
    assert (await w.control.queues.get("q")).delayed == 1
    now = await until(w, one.id, S.STARTING)
    assert now.expires_at is None


async def test_a_ttl_ends_what_has_not_started(quick: World) -> None:
    w = quick
    await w.control.queues.change("q", {"limit": 1})
    one = await start(w, ttl_s=0.3)
    two = await start(w, ttl_s=0.3)
    gone = await until(w, two.id, S.FAILED)
    assert gone.reason == Reason.EXPIRED
    assert gone.detail == "it could not start within its ttl: queue q lets 1 run at once, now 1 do; 0 wait before it"
    assert (await view(w, one.id)).state == S.STARTING
    assert (await w.events(two.id, EventType.SESSION_STATE))[-1].data["reason"] == "expired"


async def test_a_queued_session_can_be_cancelled(w: World) -> None:
    one = await start(w, delay_s=60, ttl_s=1)
    assert one.expires_at is not None
    gone = await w.control.cancel(one.id)
    assert gone.state == S.CANCELLED and gone.expires_at is None, "else it would be due for ever"
    assert (await w.control.queues.every())[0].delayed == 0


async def test_waiting_is_no_part_of_the_longest_duration(quick: World) -> None:
    w = quick
    agent = AGENT.model_copy(update={"max_duration_s": 0.3})
    one, _ = await w.control.create(agent, {}, None, StartOptions(delay_s=0.6))
    await until(w, one.id, S.STARTING)
    ended = await until(w, one.id, S.FAILED)
    assert ended.reason == Reason.MAX_DURATION


async def test_options_that_do_not_fit(w: World) -> None:
    for wrong, said in (
        ({"delay_s": -1}, "a delay of -1 s"),
        ({"delay_s": 1e9}, "a delay of"),
        ({"ttl_s": 0}, "a ttl of 0 s"),
        ({"priority": 10**9}, "priority 1000000000"),
        ({"tags": ("a b",)}, "'a b' cannot be a tag"),
        ({"tags": tuple(str(n) for n in range(51))}, "51 tags"),
        ({"concurrency_key": ""}, "'' cannot be a concurrency key"),
    ):
        with pytest.raises(InvalidInput) as caught:
            await start(w, **wrong)
        assert said in str(caught.value)


async def test_a_key_gives_the_first_start_whatever_the_options(w: World) -> None:
    one = await start(w, key="k", priority=1)
    again = await start(w, key="k", priority=2, delay_s=5)
    assert again.id == one.id and again.priority == 1


# ---------------------------------------------------------------- finding them


async def test_finding_sessions(w: World) -> None:
    one, _ = await w.control.create(AGENT, {"topic": "Wärmepumpen 100%"}, "ticket-42", StartOptions(tags=("a", "b")))
    two, _ = await w.control.create(AGENT.model_copy(update={"name": "Other"}), {}, None, StartOptions(tags=("b",)))
    three = await start(w, "q")
    await w.control.cancel(three.id, now=True)

    async def ids(**wanted: Any) -> set[str]:
        return {v.id for v in (await w.control.find(Filter(**wanted)))[0]}

    assert await ids() == {one.id, two.id, three.id}
    assert await ids(tags=("b",)) == {one.id, two.id} and await ids(tags=("a", "b")) == {one.id}
    assert await ids(queue="q") == {three.id}
    assert await ids(states=(S.CANCELLED, S.FAILED)) == {three.id}
    assert await ids(states=(S.STARTING,), agent="Other") == {two.id}
    for text in ("wärme", "WÄRME", "100%", "TICKET", "tester", "topic"):
        assert one.id in await ids(search=text), text
    assert (
        await ids(search="other") == {two.id} and await ids(search="_") == set() and await ids(search="b") >= {two.id}
    )
    assert await ids(after=three.created_at) == {three.id} and three.id not in await ids(before=three.created_at)
    with pytest.raises(InvalidInput):
        await ids(search="\0")
    page, cursor = await w.control.find(Filter(tags=("b",)), 1)
    rest, end_ = await w.control.find(Filter(tags=("b",)), 1, cursor)
    assert [v.id for v in page + rest] == [two.id, one.id] and end_ is None
