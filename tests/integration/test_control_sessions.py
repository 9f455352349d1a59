"""Sessions on a real PostgreSQL: start, state machine, fencing, suspend and resume, cancel, erase."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

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

from rethaw.control import transitions
from rethaw.control.policy import Policy
from rethaw.model.enums import Desired, Durability, EventType, Reason, State
from rethaw.model.errors import AmbiguousId, Conflict, Fenced, InvalidInput, KeyReused, NotFound, WaitTimeout
from rethaw.model.types import NewEvent, StateChange, WaitSpec

S = State


async def test_a_session_is_started_on_a_node(w: World) -> None:
    view, new = await w.control.create(AGENT, {"n": 1}, "k")
    assert new and view.state == S.STARTING and view.node == w.node.id and view.attempt == 1
    assignment = await w.node.one("start", view.id)
    assert assignment.generation == view.generation
    assert assignment.boot is not None and assignment.boot.args == {"n": 1}
    assert (assignment.boot.cursor, assignment.boot.fresh) == (0, False)
    view = await w.report(_fence(view.id, assignment.generation), S.RUNNING)
    assert view.state == S.RUNNING
    events = await w.events(view.id)
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    assert [e.type for e in events] == [
        EventType.SESSION_CREATED, EventType.SESSION_STATE, EventType.ATTEMPT_STARTED, EventType.SESSION_STATE,
    ]  # fmt: skip
    assert await w.states(view.id) == ["starting", "running"]
    assert await w.node.work() == []


async def test_without_a_node_it_is_queued_until_one_is_there(control_dsn: str) -> None:
    async with world(control_dsn) as w:
        await w.sql("UPDATE nodes SET lease_until = now() - interval '1 second'")
        view, _ = await w.control.create(AGENT, {})
        assert view.state == S.QUEUED and view.detail == "no node is alive"
        why = await w.control.why(view.id)
        assert [x["kind"] for x in why["waiting_for"]] == ["node"]
        await w.control.renew_lease(w.node.id, w.node.incarnation)
        await w.control.place_waiting()
        assert (await w.node.one("start", view.id)).session == view.id
        assert await w.states(view.id) == ["queued", "starting"]


async def test_a_session_too_large_for_every_node_is_refused(w: World) -> None:
    large = AGENT.model_copy(update={"memory_bytes": 1 << 40})
    said = "asks for 1048576 MiB of memory, which no node has: the largest takes 4096 MiB; give it less"
    with pytest.raises(InvalidInput, match=said):
        await w.control.create(large, {})
    assert (await w.control.list())[0] == []
    # One that is away may come back: it is waited for, and why says what for.
    await w.larger_node_away()
    view, _ = await w.control.create(large, {})
    assert view.state == S.QUEUED
    assert "the 1048576 MiB of memory it asks for, the largest has 4096" in (view.detail or "")
    microvm = large.model_copy(update={"engine": "qemu"})  # of which none is known: one may come
    assert (await w.control.create(microvm, {}))[0].state == S.QUEUED


async def test_starting_is_idempotent_by_key(w: World) -> None:
    first, new = await w.control.create(AGENT, {"a": 1, "b": 2}, "key")
    again, new_again = await w.control.create(AGENT, {"b": 2, "a": 1}, "key")
    assert new and not new_again and again.id == first.id
    with pytest.raises(KeyReused, match="key"):
        await w.control.create(AGENT, {"a": 2, "b": 2}, "key")
    with pytest.raises(KeyReused):
        await w.control.create(AGENT.model_copy(update={"pids": 5}), {"a": 1, "b": 2}, "key")
    other, _ = await w.control.create(AGENT, {"a": 1, "b": 2})
    assert other.id != first.id


async def test_one_key_started_at_once_many_times_is_one_session(w: World) -> None:
    made = await asyncio.gather(*(w.control.create(AGENT, {}, "same") for _ in range(8)))
    assert len({view.id for view, _ in made}) == 1
    assert sum(new for _, new in made) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"command": ()},
        {"entry": "a.py::f"},
        {"command": ("a\0b",)},
        {"memory_bytes": 0},
        {"memory_bytes": 1 << 20},
        {"durability": Durability.REPLICATED},
        {"name": "\ud800"},
        {"env": {"A": "\ud800"}},
        {"name": "x" * 201},
    ],
)
async def test_an_agent_that_cannot_be_is_refused(w: World, change: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        await w.control.create(AGENT.model_copy(update=change), {})


async def test_args_that_are_no_json_are_refused(w: World) -> None:
    for bad in ({"x": float("nan")}, {"x": "\ud800"}):
        with pytest.raises(InvalidInput, match="args"):
            await w.control.create(AGENT, bad)


async def test_every_move_of_a_node_is_in_the_table(w: World) -> None:
    """Whatever a node reports in whatever state: allowed as the table says, or Conflict naming both states."""
    for old, new in itertools.product(State, State):
        if old in (S.CREATED, S.QUEUED):
            continue
        session, fence = await w.start()
        await w.save(fence)
        await w.sql("UPDATE sessions SET state = %s WHERE id = %s", old.value, session)
        if new == S.SUSPENDED and old == S.SUSPENDING:
            await w.sql("UPDATE sessions SET desired = 'suspended' WHERE id = %s", session)
        repeat = old == new and old in (S.RUNNING, S.WAITING, S.SUSPENDING, S.SUSPENDED, *_finals())
        if transitions.allowed(old, new, reported=True) or repeat:
            assert (await w.report(fence, new)).state == new
        else:
            with pytest.raises(Conflict) as refused:
                await w.report(fence, new)
            assert old.value in str(refused.value) and new.value in str(refused.value)
            assert (await w.control.session(session)).state == old


def _finals() -> list[State]:
    return [s for s in State if s.final]


def test_the_only_ways_out_of_an_end_are_a_rewind_and_a_retry() -> None:
    for end in _finals():
        assert transitions.ALLOWED[end] == {S.RESUMING, S.QUEUED}
        assert not any(transitions.allowed(end, state, reported=True) for state in State)
    for state in State:
        if not state.final:
            assert any(transitions.allowed(state, end) for end in _finals()), state


async def test_every_move_appends_its_event_in_the_same_transaction(w: World) -> None:
    session, fence = await w.start()
    event = NewEvent(type=EventType.EMITTED, data={"name": "x"})
    await w.control.report(fence, StateChange(state=S.WAITING, reason=Reason.NONE, events=(event,)))
    before = await w.events(session)
    assert [e.type for e in before[-2:]] == [EventType.EMITTED, EventType.SESSION_STATE]
    bad = StateChange(state=S.STARTING, events=(event,))
    with pytest.raises(Conflict):
        await w.control.report(fence, bad)
    assert len(await w.events(session)) == len(before)


async def test_another_generation_is_fenced_everywhere(w: World) -> None:
    session, fence = await w.start()
    info = w.info(await w.control.session(session), 1)
    old = fence.model_copy(update={"generation": "11111111-1111-1111-1111-111111111111"})
    spec = WaitSpec(id="1.1", kind="timer", timeout_s=1)
    count = len(await w.events(session))
    for call in (
        lambda: w.report(old, S.WAITING),
        lambda: w.control.report_death(old, Reason.SANDBOX_DIED, "x"),
        lambda: w.control.report_unusable(old, "snap_x", "x"),
        lambda: w.control.wake(old, Reason.NONE),
        lambda: w.control.open_wait(old, 1, spec),
        lambda: w.control.poll_wait(old, 1, "1.1", 0),
        lambda: w.control.cancel_wait(old, 1, "1.1"),
        lambda: w.control.consume(old, 1, 1),
        lambda: w.control.set_degraded(old, True, "x", Durability.LOCAL),
        lambda: w.catalog.commit(old, info),
        lambda: w.catalog.mark_unusable(old, "snap_x", "x"),
    ):
        with pytest.raises(Fenced):
            await call()
    assert len(await w.events(session)) == count
    assert await w.catalog.list(session) == []


async def test_a_person_suspends_and_resumes(w: World) -> None:
    session, fence = await w.start()
    view = await w.control.suspend(session)
    assert view.desired == Desired.SUSPENDED and view.state == S.RUNNING
    await w.control.suspend(session)  # again: no second assignment
    assert (await w.node.one("suspend", session)).generation == fence.generation
    snapshot = await w.sleep(fence, Reason.REQUESTED)
    view = await w.control.session(session)
    assert (view.state, view.reason, view.node) == (S.SUSPENDED, Reason.REQUESTED, None)
    await w.control.send(session, b"1")
    assert (await w.control.session(session)).state == S.SUSPENDED
    view = await w.control.resume(session)
    assert view.state == S.RESUMING and view.generation != fence.generation and view.line == 1
    assignment, _ = await w.back(session)
    assert assignment.snapshot is not None and assignment.snapshot.id == snapshot.id
    with pytest.raises(Fenced):
        await w.act(fence)


async def test_resuming_while_it_suspends_wins(w: World) -> None:
    session, fence = await w.start()
    await w.control.suspend(session)
    await w.report(fence, S.SUSPENDING, reason=Reason.REQUESTED)
    await w.save(fence, why="suspend")
    await w.control.resume(session)
    with pytest.raises(Conflict, match="somebody wants it running"):
        await w.report(fence, S.SUSPENDED, reason=Reason.REQUESTED)
    assert (await w.report(fence, S.RUNNING)).state == S.RUNNING


async def test_it_is_not_suspended_without_a_snapshot_of_this_life(w: World) -> None:
    session, fence = await w.start()
    await w.report(fence, S.SUSPENDING, reason=Reason.IDLE)
    with pytest.raises(Conflict, match="no snapshot of this life"):
        await w.report(fence, S.SUSPENDED, reason=Reason.IDLE)
    await w.save(fence)
    assert (await w.report(fence, S.SUSPENDED, reason=Reason.IDLE)).state == S.SUSPENDED
    await w.control.resume(session)
    _, fence = await w.back(session)
    await w.report(fence, S.SUSPENDING, reason=Reason.IDLE)
    with pytest.raises(Conflict, match="no snapshot of this life"):
        await w.report(fence, S.SUSPENDED, reason=Reason.IDLE)


async def test_a_failed_suspension_can_be_asked_for_again(w: World) -> None:
    session, fence = await w.start()
    await w.control.suspend(session)
    await w.node.one("suspend", session)
    await w.report(fence, S.SUSPENDING, reason=Reason.REQUESTED)
    await w.report(fence, S.RUNNING)  # the disk was full
    assert (await w.control.session(session)).desired == Desired.RUNNING
    assert await w.node.work() == []
    await w.control.suspend(session)
    await w.node.one("suspend", session)


async def test_a_suspend_asked_for_while_policy_suspends_is_not_forgotten(w: World) -> None:
    session, fence = await w.start()
    await w.report(fence, S.SUSPENDING, reason=Reason.IDLE)
    await w.control.suspend(session)
    await w.report(fence, S.RUNNING)
    await w.node.one("suspend", session)


async def test_a_detail_may_hold_anything(w: World) -> None:
    session, fence = await w.start()
    await w.report(fence, S.FAILED, reason=Reason.EXITED, exit_code=1, detail="a\0b\ud800" + "x" * 10_000)
    detail = (await w.control.session(session)).detail
    assert detail is not None and detail.startswith("a\ufffdb?") and len(detail) == 4000


async def test_a_suspend_asked_for_while_it_starts_is_carried_out_once_it_runs(w: World) -> None:
    view, _ = await w.control.create(AGENT, {})
    start = await w.node.one("start", view.id)
    await w.control.suspend(view.id)
    assert await w.node.work() == []
    await w.report(_fence(view.id, start.generation), S.RUNNING)
    await w.node.one("suspend", view.id)


async def test_cancel_goes_through_the_node(w: World) -> None:
    session, fence = await w.start()
    view = await w.control.cancel(session)
    assert view.desired == Desired.CANCELLED and view.state == S.RUNNING
    await w.node.one("cancel", session)
    view = await w.report(fence, S.FAILED, reason=Reason.EXITED, exit_code=143)
    assert (view.state, view.exit_code) == (S.CANCELLED, 143)
    assert (await w.control.cancel(session)).state == S.CANCELLED
    with pytest.raises(Conflict, match="cancelled"):
        await w.control.resume(session)


async def test_cancel_now_kills(w: World) -> None:
    session, fence = await w.start()
    assert (await w.control.cancel(session, now=True)).state == S.CANCELLED
    assert (await w.node.one("kill", session)).generation == fence.generation
    with pytest.raises(Fenced):
        await w.act(fence)


async def test_a_cancelled_session_whose_sandbox_dies_is_cancelled(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    await w.control.cancel(session)
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "killed")
    assert (await w.control.session(session)).state == S.CANCELLED


async def test_a_cancelled_session_that_has_its_result_is_completed(w: World) -> None:
    session, fence = await w.start()
    await w.append(fence, EventType.SESSION_RESULT, b"42")
    await w.control.cancel(session)
    assert (await w.report(fence, S.COMPLETED, exit_code=0)).state == S.COMPLETED


async def test_cancel_without_a_sandbox_is_at_once(w: World) -> None:
    session, fence = await w.start()
    await w.sleep(fence, Reason.IDLE)
    assert (await w.control.cancel(session)).state == S.CANCELLED


async def test_exit_and_result(w: World) -> None:
    session, fence = await w.start()
    with pytest.raises(WaitTimeout):
        await w.control.result(session, 0.05)
    waiting = asyncio.create_task(w.control.result(session, 10))
    await w.append(fence, EventType.SESSION_RESULT, b'{"answer": 42}')
    await w.report(fence, S.COMPLETED, reason=Reason.EXITED, exit_code=0)
    view, result = await waiting
    assert (view.state, view.exit_code, result) == (S.COMPLETED, 0, b'{"answer": 42}')
    assert (await w.report(fence, S.COMPLETED, reason=Reason.EXITED, exit_code=0)).state == S.COMPLETED
    exits = await w.events(session, EventType.ATTEMPT_EXITED)
    assert [e.data["exit_code"] for e in exits] == [0]
    for call in (
        w.control.send(session, b"1"),
        w.control.signal(session, "s", b"1"),
        w.control.suspend(session),
        w.control.crash(session),
        w.catalog.commit(fence, w.info(view, 1)),
    ):
        with pytest.raises(Conflict):
            await call


async def test_prefixes(w: World) -> None:
    session, _ = await w.start()
    other, _ = await w.start()
    common = next(i for i, (a, b) in enumerate(zip(session, other, strict=True)) if a != b)
    assert await w.control.resolve(session) == session
    assert await w.control.resolve(session[: common + 1]) == session
    assert await w.control.resolve(session[2 : common + 1]) == session
    with pytest.raises(AmbiguousId, match=session):
        await w.control.resolve(session[:common])
    for nothing in ("s_zzz", "", "%", "s_%", "\0", "_"):
        with pytest.raises((NotFound, AmbiguousId)):
            await w.control.resolve(nothing)
    with pytest.raises(NotFound):
        await w.control.resolve("%")


async def test_list_pages(w: World) -> None:
    made = [(await w.start())[0] for _ in range(5)]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page, cursor = await w.control.list(limit=2, cursor=cursor)
        seen += [v.id for v in page]
        if cursor is None:
            break
    assert seen == made[::-1]
    assert (await w.control.list(state=S.FAILED))[0] == []
    assert len((await w.control.list(agent="tester"))[0]) == 5


async def test_erase(w: World) -> None:
    session, fence = await w.start()
    info = await w.save(fence)
    await w.control.send(session, b"1")
    with pytest.raises(Conflict, match="running"):
        await w.control.erase(session)
    stone = await w.control.erase(session, force=True)
    assert stone["session"] == session and stone["last_seq"] > 0
    with pytest.raises(NotFound):
        await w.control.session(session)
    # the node learns that the files may go, and the kill reached it although the session is gone
    assert [s.id for s in await w.catalog.superfluous(w.node.id)] == [info.id]
    assert [a.action for a in await w.node.work()] == ["kill"]
    await w.catalog.forget(info.id)
    assert await w.catalog.superfluous(w.node.id) == []
    for table in ("inbox", "session_specs", "waits", "signals"):
        assert (await w.sql(f"SELECT count(*) FROM {table}"))[0][0] == 0


async def test_degraded_is_logged_once_for_each_change(w: World) -> None:
    session, fence = await w.start()
    for degraded in (True, True, False, False):
        await w.control.set_degraded(fence, degraded, "disk full", Durability.LOCAL)
        assert (await w.control.session(session)).degraded == degraded
    kinds = [e.type for e in await w.events(session)][-2:]
    assert kinds == [EventType.DURABILITY_DEGRADED, EventType.DURABILITY_RESTORED]


async def test_a_snapshot_asked_for_is_waited_for(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    asked = asyncio.create_task(w.control.snapshot(session))
    await w.node.one("snapshot", session)
    assert not asked.done()
    info = await w.save(fence, why="requested")
    assert (await asyncio.wait_for(asked, 5)).id == info.id


async def test_stats_and_why(w: World) -> None:
    session, fence = await w.start()
    await w.append(fence, EventType.EXCHANGE_SERVED, exchange="x_1", offset=0, tokens=120)
    info = await w.save(fence)
    await w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="signal", name="ok", timeout_s=60))
    stats = await w.control.stats(session)
    assert (stats["served_from_log"], stats["tokens_not_paid_twice"], stats["snapshots"]) == (1, 120, 1)
    assert stats["stored_bytes"] == 5
    why = await w.control.why(session)
    assert why["waiting_for"][0]["kind"] == "signal" and "rethaw signal" in why["waiting_for"][0]["wakes_it"]
    assert why["last_snapshot"]["id"] == info.id and info.id in why["would_resume_at"]


@pytest.fixture
async def quick(control_dsn: str) -> AsyncIterator[World]:
    async with world(control_dsn, Policy(lease_s=0.6, poll_s=0.1, cancel_slack_s=0.1)) as made:
        yield made


async def test_max_duration(quick: World) -> None:
    w = quick
    agent = AGENT.model_copy(update={"max_duration_s": 0.3})
    view, _ = await w.control.create(agent, {})
    await w.node.one("start", view.id)
    loops = asyncio.create_task(w.loops.run())
    try:
        keep = asyncio.create_task(_renew(w))
        ended = await eventually(lambda: _in_state(w, view.id, S.FAILED))
        assert ended.reason == Reason.MAX_DURATION and "0.3 s" in (ended.detail or "")
        assert (await w.node.one("kill", view.id)).generation == view.generation
    finally:
        keep.cancel()
        loops.cancel()


async def test_a_cancel_that_its_node_does_not_finish(quick: World) -> None:
    w = quick
    agent = AGENT.model_copy(update={"grace_s": 0.1})
    session, _ = await w.start(agent)
    await w.control.cancel(session)
    await w.node.one("cancel", session)
    loops, keep = asyncio.create_task(w.loops.run()), asyncio.create_task(_renew(w))
    try:
        await eventually(lambda: _in_state(w, session, S.CANCELLED))
        await w.node.one("kill", session)
    finally:
        keep.cancel()
        loops.cancel()


async def _renew(w: World) -> None:
    while True:
        await w.control.renew_lease(w.node.id, w.node.incarnation)
        await asyncio.sleep(0.1)


async def _in_state(w: World, session: str, state: State):
    view = await w.control.session(session)
    return view if view.state == state else None


def _fence(session: str, generation: str):
    from rethaw.model.types import Fence

    return Fence(session=session, generation=generation)
