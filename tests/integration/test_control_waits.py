"""Inbox, signals, timers, callbacks and their races with suspension and crashes."""

from __future__ import annotations

import asyncio
import hashlib
import time

import pytest
from control_fixtures import (  # noqa: F401 - fixtures
    World,
    cluster_fixture,
    dsn_fixture,
    world_fixture,
)

from rethaw.model.enums import EventType, Reason, State
from rethaw.model.errors import Conflict, InvalidInput, KeyReused, NotFound, TooLarge
from rethaw.model.types import MESSAGE_LIMIT, Fence, WaitSpec, WaitState

S = State


def signal_wait(ident: str = "1.1", name: str = "go", timeout_s: float | None = None) -> WaitSpec:
    return WaitSpec(id=ident, kind="signal", name=name, timeout_s=timeout_s)


def inbox_wait(ident: str = "1.1", after: int = 0, timeout_s: float | None = None) -> WaitSpec:
    return WaitSpec(id=ident, kind="inbox", after=after, timeout_s=timeout_s)


def timer(ident: str = "1.1", seconds: float = 0.2) -> WaitSpec:
    return WaitSpec(id=ident, kind="timer", timeout_s=seconds)


async def open_(w: World, fence: Fence, spec: WaitSpec) -> WaitState:
    return await w.control.open_wait(fence, 1, spec)


async def poll(w: World, fence: Fence, ident: str = "1.1", timeout_s: float = 5.0) -> WaitState:
    return await w.control.poll_wait(fence, 1, ident, timeout_s)


async def crash(w: World, session: str, fence: Fence) -> Fence:
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "killed")
    return (await w.back(session))[1]


# ---------------------------------------------------------------- inbox


async def test_a_message_is_there_before_and_after_its_wait(w: World) -> None:
    session, fence = await w.start()
    first = await w.control.send(session, b'{"x": "\\u0000\\ud800"}')
    state = await open_(w, fence, inbox_wait())
    assert (state.done, state.number, state.item) == (True, 1, first.id)
    assert state.payload == b'{"x": "\\u0000\\ud800"}'
    assert not (await open_(w, fence, inbox_wait("1.2", after=1))).done
    waiting = asyncio.create_task(poll(w, fence, "1.2"))
    second = await w.control.send(session, b"2")
    assert (await waiting).item == second.id
    kinds = [e.type for e in await w.events(session)]
    assert kinds.count(EventType.WAIT_OPENED) == kinds.count(EventType.WAIT_COMPLETED) == 2


async def test_a_poll_hears_at_once(w: World) -> None:
    session, fence = await w.start()
    await open_(w, fence, inbox_wait())
    await w.hub.listening.wait()
    waiting = asyncio.create_task(poll(w, fence))
    await asyncio.sleep(0.1)  # let it look once; what follows does not depend on it
    started = time.monotonic()
    await w.control.send(session, b"1")
    await waiting
    assert time.monotonic() - started < 0.5


async def test_messages_are_idempotent_by_key(w: World) -> None:
    session, _ = await w.start()
    first = await w.control.send(session, b"1", "k")
    again = await w.control.send(session, b"1", "k")
    assert (again.id, again.number) == (first.id, first.number)
    with pytest.raises(KeyReused):
        await w.control.send(session, b"2", "k")
    await asyncio.gather(*(w.control.send(session, b"x") for _ in range(5)))
    assert [m.number for m in await w.control.inbox(session)] == [1, 2, 3, 4, 5, 6]
    assert [m.number for m in await w.control.inbox(session, after=4)] == [5, 6]


async def test_a_message_over_the_limit_is_refused(w: World) -> None:
    session, _ = await w.start()
    with pytest.raises(TooLarge, match=str(MESSAGE_LIMIT)):
        await w.control.send(session, b"1" * (MESSAGE_LIMIT + 1))
    await w.control.send(session, b"1" * MESSAGE_LIMIT)


async def test_the_cursor_rolls_back_with_the_guest(w: World) -> None:
    session, fence = await w.start()
    for payload in (b"1", b"2"):
        await w.control.send(session, payload)
    await w.control.consume(fence, 1, 1)
    await w.control.consume(fence, 1, 1)  # repeated
    assert len(await w.events(session, EventType.MESSAGE_CONSUMED)) == 1
    await w.save(fence)
    await w.control.consume(fence, 1, 2)
    assert len(await w.events(session, EventType.MESSAGE_CONSUMED)) == 2
    fence = await crash(w, session, fence)
    assert [e.data["number"] for e in await w.events(session, EventType.MESSAGE_CONSUMED)] == [1]
    assert (await open_(w, fence, inbox_wait(after=1))).number == 2
    await w.control.consume(fence, 1, 2)
    assert [e.data["number"] for e in await w.events(session, EventType.MESSAGE_CONSUMED)] == [1, 2]


# ---------------------------------------------------------------- signals


async def test_a_signal_before_its_wait_is_kept_and_used_once(w: World) -> None:
    session, fence = await w.start()
    first = await w.control.signal(session, "go", b"1")
    second = await w.control.signal(session, "go", b"2")
    await w.control.signal(session, "other", b"3")
    a, b = await open_(w, fence, signal_wait("1.1")), await open_(w, fence, signal_wait("1.2"))
    assert (a.item, a.payload, b.item, b.payload) == (first, b"1", second, b"2")
    assert not (await open_(w, fence, signal_wait("1.3"))).done


async def test_one_signal_for_two_waits_at_once_goes_to_one(w: World) -> None:
    session, fence = await w.start()
    await asyncio.gather(open_(w, fence, signal_wait("1.1")), open_(w, fence, signal_wait("1.2")))
    await asyncio.gather(*(w.control.signal(session, "go", b"1", "same") for _ in range(4)))
    states = [await poll(w, fence, i, 0) for i in ("1.1", "1.2")]
    assert sorted(s.done for s in states) == [False, True]


async def test_signals_are_idempotent_by_key(w: World) -> None:
    session, _ = await w.start()
    first = await w.control.signal(session, "go", b"1", "k")
    assert await w.control.signal(session, "go", b"1", "k") == first
    with pytest.raises(KeyReused):
        await w.control.signal(session, "go", b"2", "k")
    with pytest.raises(KeyReused):
        await w.control.signal(session, "stop", b"1", "k")
    with pytest.raises(InvalidInput):
        await w.control.signal(session, "", b"1")


async def test_after_a_crash_the_same_wait_gets_the_same_signal(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    first = await w.control.signal(session, "go", b"1")
    await w.control.signal(session, "go", b"2")
    assert (await open_(w, fence, signal_wait("1.7"))).item == first
    fence = await crash(w, session, fence)
    assert (await open_(w, fence, signal_wait("1.7"))).item == first
    assert len(await w.events(session, EventType.WAIT_COMPLETED)) == 1  # on the path


async def test_a_signal_used_on_a_left_line_is_available_again(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    first = await w.control.signal(session, "go", b"1")
    assert (await open_(w, fence, signal_wait("1.7"))).item == first
    fence = await crash(w, session, fence)
    assert (await open_(w, fence, signal_wait("1.8"))).item == first
    # the line gave it away: the former wait, when it comes after all, has to wait for another
    assert not (await open_(w, fence, signal_wait("1.7"))).done


async def test_a_signal_used_before_the_snapshot_stays_used(w: World) -> None:
    session, fence = await w.start()
    first = await w.control.signal(session, "go", b"1")
    assert (await open_(w, fence, signal_wait("1.1"))).item == first
    await w.save(fence)
    fence = await crash(w, session, fence)
    again = await open_(w, fence, signal_wait("1.1"))
    assert (again.item, again.payload) == (first, b"1")
    assert not (await open_(w, fence, signal_wait("1.2"))).done


async def test_a_wait_open_at_the_snapshot_and_completed_after_it_is_completed_again(w: World) -> None:
    session, fence = await w.start()
    await open_(w, fence, signal_wait("1.1"))
    await w.save(fence)
    first = await w.control.signal(session, "go", b"1")
    assert (await poll(w, fence)).item == first
    fence = await crash(w, session, fence)
    assert (await open_(w, fence, signal_wait("1.1"))).item == first
    assert len(await w.events(session, EventType.WAIT_OPENED)) == 1
    assert len(await w.events(session, EventType.WAIT_COMPLETED)) == 1


# ---------------------------------------------------------------- timers and deadlines


async def test_a_repeated_wait_keeps_its_first_deadline(w: World) -> None:
    _, fence = await w.start()
    first = await open_(w, fence, timer(seconds=60))
    again = await open_(w, fence, timer(seconds=60))
    assert again.deadline == first.deadline and not again.done


async def test_a_different_wait_with_the_same_id_cancels_the_old_one(w: World) -> None:
    session, fence = await w.start()
    first = await open_(w, fence, timer(seconds=60))
    other = await open_(w, fence, timer(seconds=120))
    assert other.deadline is not None and first.deadline is not None and other.deadline > first.deadline
    kinds = [e.type for e in await w.events(session) if e.type.value.startswith("wait.")]
    assert kinds == [EventType.WAIT_OPENED, EventType.WAIT_CANCELLED, EventType.WAIT_OPENED]


async def test_after_a_crash_a_repeated_timer_keeps_its_first_deadline(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    first = await open_(w, fence, timer(seconds=60))
    fence = await crash(w, session, fence)
    assert (await open_(w, fence, timer(seconds=60))).deadline == first.deadline
    assert len(await w.events(session, EventType.WAIT_OPENED)) == 1


async def test_timers_fire_while_everything_else_is_idle(w: World) -> None:
    session, fence = await w.start()
    loops = asyncio.create_task(w.loops.run())
    try:
        await open_(w, fence, timer(seconds=0.3))
        await w.sleep(fence, Reason.IDLE)
        started = time.monotonic()
        restore = await w.node.one("restore", session)
        assert time.monotonic() - started < 2
        fence = Fence(session=session, generation=restore.generation)
        await w.report(fence, S.RUNNING)
        state = await poll(w, fence)
        assert state.done and state.timed_out
    finally:
        loops.cancel()


async def test_a_short_timer_is_not_rounded_up_to_the_poll(w: World) -> None:
    _, fence = await w.start()
    loops = asyncio.create_task(w.loops.run())
    try:
        await w.hub.listening.wait()
        took: list[float] = []
        for n in range(5):
            started = time.monotonic()
            await open_(w, fence, timer(f"1.{n}", seconds=0.05))
            assert (await poll(w, fence, f"1.{n}")).timed_out
            took.append(time.monotonic() - started)
        assert sorted(took)[2] < 0.5
    finally:
        loops.cancel()


async def test_a_wait_with_an_impossible_name_is_refused(w: World) -> None:
    _, fence = await w.start()
    for bad in ("a\0", "\ud800", "x" * 300):
        with pytest.raises(InvalidInput):
            await open_(w, fence, signal_wait(name=bad))
    for seconds in (float("nan"), -1.0, 1e12):
        with pytest.raises(InvalidInput):
            await open_(w, fence, timer(seconds=seconds))


async def test_a_receive_times_out(w: World) -> None:
    _, fence = await w.start()
    loops = asyncio.create_task(w.loops.run())
    try:
        await open_(w, fence, inbox_wait(timeout_s=0.1))
        state = await poll(w, fence)
        assert state.done and state.timed_out and state.payload is None
    finally:
        loops.cancel()


async def test_a_timer_of_a_left_line_does_not_fire(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    await open_(w, fence, timer(seconds=0.05))
    fence = await crash(w, session, fence)
    await w.save(fence)
    await w.sleep(fence, Reason.IDLE)
    await asyncio.sleep(0.1)  # its time passes
    await w.loops.fire()
    assert (await w.control.session(session)).state == S.SUSPENDED


async def test_a_cancelled_wait(w: World) -> None:
    session, fence = await w.start()
    await open_(w, fence, signal_wait())
    await w.control.cancel_wait(fence, 1, "1.1")
    await w.control.cancel_wait(fence, 1, "1.1")
    await w.control.cancel_wait(fence, 1, "1.99")
    with pytest.raises(Conflict, match="cancelled"):
        await poll(w, fence)
    await w.control.signal(session, "go", b"1")
    assert (await open_(w, fence, signal_wait("1.2"))).done  # the cancelled one has not taken it
    with pytest.raises(NotFound):
        await poll(w, fence, "1.77")
    with pytest.raises(InvalidInput):
        await open_(w, fence, WaitSpec(id="1.5", kind="timer"))
    with pytest.raises(Conflict, match="attempt 7"):
        await w.control.open_wait(fence, 7, signal_wait())


# ---------------------------------------------------------------- suspension


@pytest.mark.parametrize("reason", [Reason.IDLE, Reason.PROVIDER_HOLD])
async def test_what_it_waits_for_resumes_a_session_that_policy_suspended(w: World, reason: Reason) -> None:
    session, fence = await w.start()
    await open_(w, fence, inbox_wait())
    snapshot = await w.sleep(fence, reason)
    await w.control.signal(session, "unrelated", b"1")
    assert (await w.control.session(session)).state == S.SUSPENDED
    await w.control.send(session, b"1")
    view = await w.control.session(session)
    assert view.state == S.RESUMING and view.line == 1 and view.generation != fence.generation
    assignment, fence = await w.back(session)
    assert assignment.snapshot is not None and assignment.snapshot.id == snapshot.id
    assert (await open_(w, fence, inbox_wait())).number == 1


async def test_suspension_is_refused_when_the_wait_was_completed_meanwhile(w: World) -> None:
    session, fence = await w.start()
    await open_(w, fence, inbox_wait())
    await w.report(fence, S.SUSPENDING, reason=Reason.IDLE)
    await w.save(fence, why="suspend")
    await w.control.send(session, b"1")
    with pytest.raises(Conflict, match="has come"):
        await w.report(fence, S.SUSPENDED, reason=Reason.IDLE)
    await w.report(fence, S.RUNNING)
    assert (await poll(w, fence)).number == 1


async def test_suspension_is_refused_when_the_wait_was_completed_just_before(w: World) -> None:
    session, fence = await w.start()
    await open_(w, fence, inbox_wait())
    await open_(w, fence, inbox_wait("1.2", after=1))
    await w.control.send(session, b"1")
    await w.report(fence, S.SUSPENDING, reason=Reason.IDLE)  # the node has not asked for the outcome yet
    await w.save(fence, why="suspend")
    with pytest.raises(Conflict, match=r"1\.1"):
        await w.report(fence, S.SUSPENDED, reason=Reason.IDLE)
    await w.report(fence, S.RUNNING)
    assert (await poll(w, fence)).done  # told, but perhaps not written to the guest when it was frozen
    await w.report(fence, S.SUSPENDING, reason=Reason.IDLE)
    await w.save(fence, why="suspend")
    with pytest.raises(Conflict, match=r"1\.1"):
        await w.report(fence, S.SUSPENDED, reason=Reason.IDLE)
    # a node that knows which calls its guest still waits for is taken at its word
    with pytest.raises(Conflict, match=r"1\.1"):
        await w.report(fence, S.SUSPENDED, reason=Reason.IDLE, waits=("1.1", "1.2"))
    assert (await w.report(fence, S.SUSPENDED, reason=Reason.IDLE, waits=("1.2",))).state == S.SUSPENDED


async def test_message_and_suspension_at_once_never_sleep_through_it(w: World) -> None:
    """Whatever comes first: either the node is refused, or the session is resumed."""
    for _ in range(15):
        session, fence = await w.start()
        await open_(w, fence, inbox_wait())
        await w.report(fence, S.SUSPENDING, reason=Reason.IDLE)
        await w.save(fence, why="suspend")

        async def freeze(fence: Fence = fence) -> bool:
            try:
                await w.report(fence, S.SUSPENDED, reason=Reason.IDLE)
                return True
            except Conflict:
                return False

        slept, _ = await asyncio.gather(freeze(), w.control.send(session, b"1"))
        state = (await w.control.session(session)).state
        assert state == (S.RESUMING if slept else S.SUSPENDING)
        await w.node.work()


async def test_wake_by_the_node(w: World) -> None:
    session, fence = await w.start()
    await w.control.wake(fence, Reason.PROVIDER_HOLD)  # running: nothing to do
    await w.report(fence, S.SUSPENDING, reason=Reason.PROVIDER_HOLD)
    await w.save(fence)
    await w.control.wake(fence, Reason.PROVIDER_HOLD)
    with pytest.raises(Conflict, match="has come"):
        await w.report(fence, S.SUSPENDED, reason=Reason.PROVIDER_HOLD)
    await w.report(fence, S.RUNNING)
    await w.sleep(fence, Reason.PROVIDER_HOLD)
    await w.control.wake(fence, Reason.PROVIDER_HOLD)
    assert (await w.control.session(session)).state == S.RESUMING


async def test_wake_leaves_alone_what_a_person_suspended(w: World) -> None:
    session, fence = await w.start()
    await w.control.suspend(session)
    await w.sleep(fence, Reason.REQUESTED)
    await w.control.wake(fence, Reason.PROVIDER_HOLD)
    assert (await w.control.session(session)).state == S.SUSPENDED


async def test_a_person_makes_a_policy_suspension_theirs(w: World) -> None:
    session, fence = await w.start()
    await open_(w, fence, inbox_wait())
    await w.sleep(fence, Reason.IDLE)
    assert (await w.control.suspend(session)).reason == Reason.REQUESTED
    await w.control.send(session, b"1")
    assert (await w.control.session(session)).state == S.SUSPENDED
    await w.control.resume(session)
    _, fence = await w.back(session)
    assert (await open_(w, fence, inbox_wait())).number == 1


async def test_a_session_suspended_by_its_stopping_server_goes_on_when_it_is_back(w: World) -> None:
    session, fence = await w.start()
    await w.sleep(fence, Reason.NODE_STOPPED)
    await w.node.restart()
    await w.back(session)


# ---------------------------------------------------------------- callbacks


async def test_a_callback_address_works_once(w: World) -> None:
    session, fence = await w.start()
    state = await open_(w, fence, signal_wait())
    assert state.url is not None and state.url.startswith("http://rethaw.test/v1/callbacks/")
    assert (await open_(w, fence, signal_wait())).url == state.url
    token = state.url.rsplit("/", 1)[1]
    assert len(token) == 64
    stored = [r[0] for r in await w.sql("SELECT hash FROM callbacks")]
    assert stored == [hashlib.sha256(token.encode()).hexdigest()]
    await open_(w, fence, signal_wait("1.2"))
    await w.control.callback(token, b'{"ok":true}')
    done = await poll(w, fence)
    assert done.done and done.payload == b'{"ok":true}' and done.name == "go"
    assert not (await poll(w, fence, "1.2", 0)).done
    with pytest.raises(Conflict, match="used already"):
        await w.control.callback(token, b"2")
    with pytest.raises(NotFound):
        await w.control.callback("0" * 64, b"2")
    assert len(await w.events(session, EventType.SIGNAL_RECEIVED)) == 1


async def test_a_callback_used_at_once_twice_counts_once(w: World) -> None:
    _, fence = await w.start()
    token = str((await open_(w, fence, signal_wait())).url).rsplit("/", 1)[1]
    outcomes = await asyncio.gather(*(w.control.callback(token, b"1") for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(o, str) for o in outcomes) == 1
    assert all(isinstance(o, (str, Conflict)) for o in outcomes)


async def test_a_callback_survives_the_crash_that_rolled_its_wait_back(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    token = str((await open_(w, fence, signal_wait("1.4"))).url).rsplit("/", 1)[1]
    await w.control.callback(token, b"1")
    fence = await crash(w, session, fence)
    assert (await open_(w, fence, signal_wait("1.4"))).payload == b"1"


async def test_a_callback_for_a_wait_that_a_crash_took_back_is_kept_for_it(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    token = str((await open_(w, fence, signal_wait("1.4"))).url).rsplit("/", 1)[1]
    fence = await crash(w, session, fence)
    await w.control.callback(token, b"1")
    assert not (await open_(w, fence, signal_wait("1.5"))).done
    assert (await open_(w, fence, signal_wait("1.4"))).payload == b"1"


async def test_an_address_made_before_the_wait_is_the_waits(w: World) -> None:
    _, fence = await w.start()
    token = str((await open_(w, fence, signal_wait(timeout_s=None))).url).rsplit("/", 1)[1]
    await w.control.callback(token, b"1")
    assert (await open_(w, fence, signal_wait(timeout_s=60))).payload == b"1"


async def test_an_answered_wait_is_not_to_be_answered_by_callback(w: World) -> None:
    session, fence = await w.start()
    token = str((await open_(w, fence, signal_wait())).url).rsplit("/", 1)[1]
    await w.control.signal(session, "go", b"1")
    with pytest.raises(Conflict, match="nothing waits"):
        await w.control.callback(token, b"2")
