"""Retries: what follows a program that failed, whatever happens in between."""

from __future__ import annotations

import asyncio
import random
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

from rethaw.control import retries
from rethaw.model.enums import Desired, EventType, Reason, State
from rethaw.model.errors import Conflict, Fenced, InvalidInput
from rethaw.model.types import AgentSpec, Assignment, Fence, NewEvent, RetrySpec, SessionView, WaitSpec

S = State


def agent(max: int = 3, delay_s: float = 0.0, **more: Any) -> AgentSpec:
    spec = RetrySpec(max=max, delay_s=delay_s, jitter=False, **more)
    return AGENT.model_copy(update={"retries": spec})


async def fail(w: World, fence: Fence, code: int = 1) -> SessionView:
    attempt = (await w.control.session(fence.session)).attempt
    exited = NewEvent(type=EventType.ATTEMPT_EXITED, data={"exit_code": code, "signal": None}, key=f"exited:{attempt}")
    return await w.report(fence, S.FAILED, reason=Reason.EXITED, exit_code=code, events=(exited,))


async def again(w: World, session: str) -> tuple[Assignment, Fence]:
    """The next attempt, once its time has come."""

    async def due() -> Assignment | None:
        await w.loops.fire()
        return next((a for a in await w.node.work(0.05) if a.session == session and a.action == "start"), None)

    assignment = await eventually(due)
    fence = Fence(session=session, generation=assignment.generation)
    await w.report(fence, S.RUNNING)
    return assignment, fence


async def test_a_failure_is_followed_by_new_attempts_and_at_last_by_the_end(w: World) -> None:
    session, fence = await w.start(agent(max=2))
    for number in (2, 3):
        done = await w.act(fence)
        view = await fail(w, fence)
        assert (view.state, view.reason, view.attempt, view.exit_code) == (S.QUEUED, Reason.RETRY, number, None)
        assert f"attempt {number} of 3 begins at" in (view.detail or "")
        assert f"attempt {number - 1} ended with exit code 1" in (view.detail or "")
        with pytest.raises(Fenced):
            await w.act(fence)
        assignment, fence = await again(w, session)
        assert assignment.attempt == number and assignment.snapshot is None
        assert assignment.boot is not None and assignment.boot.fresh
        assert done.seq in [e.seq for e in await w.events(session)]  # its context
    view = await fail(w, fence, 7)
    assert (view.state, view.reason, view.exit_code) == (S.FAILED, Reason.EXITED, 7)
    assert view.detail == "3 attempts failed, last: exit code 7"
    shown = await w.control.attempts(session)
    assert [(a.attempt, a.how) for a in shown] == [(1, "exit code 1"), (2, "exit code 1"), (3, "exit code 7")]
    assert all(a.started_at and a.ended_at for a in shown)
    scheduled = await w.events(session, EventType.RETRY_SCHEDULED)
    assert [(e.data["attempt"], e.data["of"]) for e in scheduled] == [(2, 3), (3, 3)]


async def test_without_retries_and_after_success_it_ends(w: World) -> None:
    session, fence = await w.start()
    assert (await fail(w, fence)).state == S.FAILED
    session, fence = await w.start(agent())
    view = await w.report(fence, S.COMPLETED, reason=Reason.EXITED, exit_code=0)
    assert (view.state, view.attempt) == (S.COMPLETED, 1)
    for reason in (Reason.COMMAND_NOT_FOUND, Reason.BOOT_FAILED):
        session, fence = await w.start(agent())
        assert (await w.report(fence, S.FAILED, reason=reason, exit_code=127)).state == S.FAILED, session


async def test_the_time_of_an_attempt_is_waited_for_and_survives_everything(w: World) -> None:
    session, fence = await w.start(agent(delay_s=0.8))
    view = await fail(w, fence)
    assert view.retry_at is not None
    await w.control.place_waiting()
    await w.node.restart()  # a server that was killed and is back
    await w.loops.fire()
    assert not [a for a in await w.node.work() if a.session == session]
    why = await w.control.why(session)
    (wait,) = why["waiting_for"]
    assert wait["kind"] == "retry" and "attempt 2 begins at" in wait["wakes_it"]
    loops = asyncio.create_task(w.loops.run())
    try:
        assignment = await eventually(_start(w, session))
    finally:
        loops.cancel()
    assert assignment.attempt == 2
    now = (await w.sql("SELECT clock_timestamp()"))[0][0]
    assert now >= view.retry_at
    assert (await w.control.session(session)).retry_at is None


def _start(w: World, session: str) -> Any:
    async def look() -> Assignment | None:
        return next((a for a in await w.node.work(0.05) if a.session == session and a.action == "start"), None)

    return look


async def test_delays_grow_up_to_the_longest() -> None:
    spec = RetrySpec(delay_s=1, factor=3, max_delay_s=10, jitter=False)
    assert [retries.delay_s(spec, n) for n in (1, 2, 3, 4, 1000)] == [1, 3, 9, 10, 10]
    random.seed(1)
    some = [retries.delay_s(spec.model_copy(update={"jitter": True}), 2) for _ in range(200)]
    assert 2.25 <= min(some) < 2.6 and 3.4 < max(some) <= 3.75


async def test_what_is_not_tried_again(w: World) -> None:
    session, fence = await w.start(agent(not_on=(2,)))
    view = await fail(w, fence, 2)
    assert (view.state, view.detail) == (S.FAILED, "exit code 2 is not tried again")
    session, fence = await w.start(agent())
    await w.append(fence, EventType.EMITTED, b"{}", name=retries.NO_RETRY)
    view = await fail(w, fence)
    assert view.state == S.FAILED and "trying again is of no use" in (view.detail or ""), session


async def test_an_event_of_a_former_attempt_does_not_end_the_retries(w: World) -> None:
    session, fence = await w.start(agent())
    await fail(w, fence)
    _, fence = await again(w, session)
    await w.append(fence, EventType.EMITTED, b"{}", name="other")
    assert (await fail(w, fence)).attempt == 3


async def test_a_report_that_is_repeated_makes_one_attempt(w: World) -> None:
    session, fence = await w.start(agent())
    await fail(w, fence)
    with pytest.raises(Fenced):  # the reply was lost, and it is said once more
        await fail(w, fence)
    assert (await again(w, session))[0].attempt == 2


async def test_the_message_whose_turn_did_not_finish_is_given_again(w: World) -> None:
    session, fence = await w.start(agent(max=5))
    for text in (b"1", b"2", b"3"):
        await w.control.send(session, text)

    async def receive(fence: Fence, attempt: int, call: str, after: int) -> int:
        state = await w.control.open_wait(fence, attempt, WaitSpec(id=call, kind="inbox", after=after))
        assert state.done and state.number is not None
        await w.control.consume(fence, attempt, state.number)
        return state.number

    assert await receive(fence, 1, "1.1", 0) == 1
    assert await receive(fence, 1, "1.2", 1) == 2  # so the turn of 1 is over
    await fail(w, fence)
    assignment, fence = await again(w, session)
    assert assignment.boot is not None and assignment.boot.cursor == 1
    # The same when the attempt dies before it has a snapshot.
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "it died")
    assignment, fence = await w.back(session, "start")
    assert (assignment.attempt, assignment.boot and assignment.boot.cursor) == (2, 1)
    assert await receive(fence, 2, "2.1", 1) == 2
    assert await receive(fence, 2, "2.2", 2) == 3
    waiting = await w.control.open_wait(fence, 2, WaitSpec(id="2.3", kind="inbox", after=3))
    assert not waiting.done
    await fail(w, fence)  # it had asked for more: nothing is given again
    assignment, fence = await again(w, session)
    assert assignment.boot is not None and assignment.boot.cursor == 3


async def test_what_a_failed_attempt_sent_is_published_once(w: World) -> None:
    session, fence = await w.start(agent())
    await w.append(fence, EventType.MESSAGE_SENT, b'"a"', message="m_a", key="send:1.1")
    await fail(w, fence)
    assert [m.payload for m in await w.control.outbox(session)] == [b'"a"']
    _, fence = await again(w, session)
    await w.append(fence, EventType.MESSAGE_SENT, b'"b"', message="m_b", key="send:2.1")
    await w.save(fence)
    await w.report(fence, S.COMPLETED, reason=Reason.EXITED, exit_code=0)
    assert [m.payload for m in await w.control.outbox(session)] == [b'"a"', b'"b"']


async def test_open_waits_of_a_failed_attempt_are_over(w: World) -> None:
    session, fence = await w.start(agent())
    await w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="timer", timeout_s=0.05))
    await fail(w, fence)
    await asyncio.sleep(0.1)
    await w.loops.fire()
    assert not await w.events(session, EventType.WAIT_COMPLETED)


async def test_cancel_and_the_longest_duration_end_a_session_that_waits_for_its_attempt(w: World) -> None:
    session, fence = await w.start(agent(delay_s=60))
    await fail(w, fence)
    view = await w.control.cancel(session)
    assert (view.state, view.retry_at) == (S.CANCELLED, None)
    session, fence = await w.start(agent(delay_s=60).model_copy(update={"max_duration_s": 0.1}))
    await fail(w, fence)

    async def over() -> bool:
        await w.loops.fire()
        return (await w.control.session(session)).reason == Reason.MAX_DURATION

    await eventually(over)


async def test_a_cancelled_agent_that_fails_is_cancelled(w: World) -> None:
    session, fence = await w.start(agent())
    await w.control.cancel(session)
    assert (await fail(w, fence, 143)).state == S.CANCELLED


async def test_a_person_who_suspends_it_is_heard_by_the_next_attempt(w: World) -> None:
    session, fence = await w.start(agent())
    await w.control.suspend(session)
    await w.node.one("suspend", session)
    view = await fail(w, fence)
    assert (view.state, view.desired) == (S.QUEUED, Desired.SUSPENDED)
    await again(w, session)
    assert (await w.node.one("suspend", session)).attempt == 2


async def test_a_retry_by_hand(w: World) -> None:
    session, fence = await w.start(agent(max=0))
    await w.act(fence)
    with pytest.raises(Conflict, match="running"):
        await w.control.retry(session)
    await fail(w, fence)
    view = await w.control.retry(session)
    assert (view.state, view.attempt) == (S.STARTING, 2)
    assignment, fence = await w.back(session, "start")
    assert assignment.attempt == 2
    # One that waits for its time begins now.
    session, fence = await w.start(agent(delay_s=300))
    await fail(w, fence)
    assert (await w.control.retry(session)).state == S.STARTING


async def test_a_retry_by_hand_after_a_crash_loop_begins_at_the_newest_snapshot(w: World) -> None:
    session, fence = await w.start(agent())
    kept = await w.act(fence)
    await w.control.send(session, b"1")
    await w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="inbox", after=0))
    await w.control.consume(fence, 1, 1)
    await w.save(fence)
    lost = await w.act(fence)
    await w.control.report_death(fence, Reason.COMMAND_NOT_FOUND, "gone")
    assert (await w.control.session(session)).state == S.FAILED
    await w.control.retry(session)
    for _ in range(2):
        assignment, fence = await w.back(session, "start")
        assert (assignment.attempt, assignment.boot and assignment.boot.cursor) == (2, 0)
        seqs = [e.seq for e in await w.events(session)]
        assert kept.seq in seqs and lost.seq not in seqs
        await w.control.report_death(fence, Reason.SANDBOX_DIED, "it died")


async def loop(w: World, session: str, fence: Fence, reason: Reason = Reason.SANDBOX_DIED) -> SessionView:
    """Every life of the current attempt, and what recovery makes of it, dies at once."""
    await w.control.report_death(fence, reason, "again")
    while (await w.control.session(session)).state == S.RECOVERING:
        (assignment,) = [a for a in await w.node.work(2) if a.session == session]
        fence = Fence(session=session, generation=assignment.generation)
        await w.report(fence, S.RUNNING)
        await w.control.report_death(fence, reason, "again")
    return await w.control.session(session)


async def test_a_crash_loop_is_followed_by_a_new_attempt(w: World) -> None:
    session, fence = await w.start(agent(max=2, delay_s=0.2))
    kept = await w.act(fence)
    await w.control.send(session, b"1")
    await w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="inbox", after=0))
    await w.control.consume(fence, 1, 1)
    await w.save(fence)
    await w.append(fence, EventType.MESSAGE_SENT, b'"seen by nobody"', message="m_1", key="send:1.2")
    view = await loop(w, session, fence)
    attempts = {1}
    for failures in (1, 2):
        assert (view.state, view.reason) == (S.QUEUED, Reason.RETRY)
        assert "ended with crash loop" in (view.detail or "")
        assert await w.node.work() == []  # it waits for its time
        assignment, fence = await again(w, session)
        assert assignment.attempt not in attempts and assignment.snapshot is None
        attempts.add(assignment.attempt)
        assert assignment.boot is not None and (assignment.boot.fresh, assignment.boot.cursor) == (True, 0)
        assert kept.seq in [e.seq for e in await w.events(session)]
        assert await w.control.outbox(session) == []
        assert (await w.control.session(session)).crashes > failures
        view = await loop(w, session, fence)
    assert (view.state, view.reason) == (S.FAILED, Reason.CRASH_LOOP)
    assert (view.detail or "").startswith("3 attempts failed, last: it died again and again at its start")
    how = [a.how for a in await w.control.attempts(session)]
    assert how[-1] == "crash loop" and set(how) == {"crash loop", "given up (crash loop)"}


async def test_what_retries_are_not_for_ends_it(w: World) -> None:
    session, fence = await w.start(agent())
    view = await loop(w, session, fence, Reason.OUT_OF_MEMORY)  # not by default
    assert (view.state, view.reason) == (S.FAILED, Reason.OUT_OF_MEMORY)
    assert "give it more memory" in (view.detail or "")
    session, fence = await w.start(agent(on=("out_of_memory",)))
    assert (await loop(w, session, fence, Reason.OUT_OF_MEMORY)).state == S.QUEUED
    session, fence = await w.start(agent(on=("out_of_memory",)))
    view = await fail(w, fence, 3)
    assert (view.state, view.detail) == (S.FAILED, "exit code 3 (exit is not among what its retries are for)")
    session, fence = await w.start(agent(max=1))
    await w.append(fence, EventType.EMITTED, name=retries.NO_RETRY)
    await w.save(fence)
    assert (await loop(w, session, fence)).state == S.QUEUED  # the boot after it is an attempt that did not say so


async def test_a_retry_with_more_memory(w: World) -> None:
    session, fence = await w.start(agent(on=(), delay_s=300))
    await loop(w, session, fence, Reason.OUT_OF_MEMORY)
    for wrong, said in ((1 << 20, "too small"), (1 << 40, "which no node has")):
        with pytest.raises(InvalidInput, match=said):
            await w.control.retry(session, wrong)
    view = await w.control.retry(session, 128 << 20)
    assert (view.state, view.agent.memory_bytes, view.version) == (S.STARTING, 128 << 20, 2)
    assignment, fence = await w.back(session, "start")
    assert assignment.agent.memory_bytes == 128 << 20
    # Also of one that waits for its time: nothing of that attempt has run.
    session, fence = await w.start(agent(delay_s=300))
    await fail(w, fence)
    view = await w.control.retry(session, 96 << 20)
    assert (view.state, view.attempt, view.agent.memory_bytes) == (S.STARTING, 2, 96 << 20)
    assert (await w.control.agent_of(session, 1)).memory_bytes == AGENT.memory_bytes
    assert (await w.control.agent_of(session, 2)).memory_bytes == 96 << 20
    running, _ = await w.start()
    with pytest.raises(Conflict, match="only one that failed"):
        await w.control.retry(running, 96 << 20)
    assert (await w.control.session(running)).agent.memory_bytes == AGENT.memory_bytes


async def test_a_rewind_leads_out_of_a_backoff(w: World) -> None:
    session, fence = await w.start(agent(delay_s=300))
    info = await w.save(fence)
    await fail(w, fence)
    view = await w.control.rewind(session, info.id)
    assert (view.attempt, view.retry_at) == (1, None)
    assignment, fence = await w.back(session)
    assert assignment.snapshot is not None and assignment.snapshot.id == info.id
    assert (await fail(w, fence)).attempt == 3


async def test_crashes_within_an_attempt_are_not_failures(w: World) -> None:
    session, fence = await w.start(agent(max=1))
    await fail(w, fence)
    _, fence = await again(w, session)
    info = await w.save(fence)
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "it died")
    assignment, fence = await w.back(session)
    assert assignment.attempt == 2 and assignment.snapshot is not None and assignment.snapshot.id == info.id
    view = await fail(w, fence)
    assert (view.state, view.detail) == (S.FAILED, "2 attempts failed, last: exit code 1")


async def test_a_fork_has_retries_of_its_own(w: World) -> None:
    session, fence = await w.start(agent(max=1))
    await fail(w, fence)
    _, fence = await again(w, session)
    info = await w.save(fence)
    (fork,) = await w.control.fork(session, info.id)
    _, mine = await w.back(fork.id)
    view = await fail(w, mine)
    assert (view.state, view.attempt) == (S.QUEUED, 3)


@pytest.mark.parametrize(
    "wrong", [{"max": -1}, {"max": 10_000}, {"delay_s": -1.0}, {"factor": 0.5}, {"max_delay_s": float("inf")}]
)
async def test_what_does_not_fit_is_refused(w: World, wrong: dict[str, Any]) -> None:
    spec = AGENT.model_copy(update={"retries": RetrySpec(**wrong)})
    with pytest.raises(InvalidInput, match="retries"):
        await w.control.create(spec, {})


async def test_files_of_the_last_snapshot_are_kept_for_the_next_attempt(w: World) -> None:
    spec = agent(max=5, files="keep").model_copy(update={"keep_all_s": 0.0, "keep_bytes": 0})
    session, fence = await w.start(spec)
    assert (await fail(w, fence)).snapshot is None
    assignment, fence = await again(w, session)
    assert assignment.files is None  # there was no snapshot yet
    await w.save(fence)
    info = await w.save(fence)
    await fail(w, fence)
    assert info.id not in {s.id for s in await w.catalog.superfluous(w.node.id)}
    with pytest.raises(Conflict, match="still needs"):
        await w.catalog.forget(info.id)
    assignment, fence = await again(w, session)
    assert assignment.files is not None and assignment.files.id == info.id and assignment.snapshot is None
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "it died")
    assignment, fence = await w.back(session, "start")  # it had none of its own: it begins with them once more
    assert assignment.files is not None and assignment.files.id == info.id
    await fail(w, fence)
    assignment, fence = await again(w, session)
    assert assignment.files is not None and assignment.files.id == info.id
    mine = await w.save(fence)
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "it died")
    assignment, fence = await w.back(session)
    assert assignment.snapshot is not None and assignment.snapshot.id == mine.id
    await w.catalog.mark_unusable(fence, mine.id, "damaged")
    await fail(w, fence)
    assignment, fence = await again(w, session)
    assert assignment.files is not None and assignment.files.id == info.id


async def test_files_are_fresh_by_default(w: World) -> None:
    session, fence = await w.start(agent())
    await w.save(fence)
    await fail(w, fence)
    assert (await again(w, session))[0].files is None
