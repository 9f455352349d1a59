"""Waits for several things at once: which one counts, what becomes of the others, and crashes between."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from control_fixtures import (  # noqa: F401 - fixtures
    World,
    cluster_fixture,
    dsn_fixture,
    eventually,
    world_fixture,
)

from rethaw.model.enums import EventType, Reason, State
from rethaw.model.errors import Conflict, InvalidInput, NotFound
from rethaw.model.types import Fence, WaitPart, WaitSpec, WaitState

GO = WaitPart(kind="signal", name="go")
STOP = WaitPart(kind="signal", name="stop")
INBOX = WaitPart(kind="inbox")


def timer(seconds: float) -> WaitPart:
    return WaitPart(kind="timer", timeout_s=seconds)


async def open_(w: World, fence: Fence, *parts: WaitPart, ident: str = "1.9", **more: Any) -> WaitState:
    return await w.control.open_wait(fence, 1, WaitSpec(id=ident, kind="any", parts=parts, **more))


async def poll(w: World, fence: Fence, ident: str = "1.9", timeout_s: float = 5.0) -> WaitState:
    return await w.control.poll_wait(fence, 1, ident, timeout_s)


async def crash(w: World, session: str, fence: Fence) -> Fence:
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "killed")
    return (await w.back(session))[1]


async def test_the_first_that_comes_completes_it_and_the_others_stay(w: World) -> None:
    session, fence = await w.start()
    assert not (await open_(w, fence, GO, INBOX, STOP)).done
    waiting = asyncio.create_task(poll(w, fence))
    sent = await w.control.send(session, b'{"a": 1.10}')
    state = await waiting
    assert (state.part, state.number, state.item, state.payload) == (1, 1, sent.id, b'{"a": 1.10}')
    signal = await w.control.signal(session, "go", b"2")
    again = await open_(w, fence, GO, WaitPart(kind="inbox", after=1), ident="1.10")
    assert (again.part, again.item, again.payload) == (0, signal, b"2")
    assert not (await open_(w, fence, GO, ident="1.11")).done  # used once
    last = (await w.events(session, EventType.WAIT_COMPLETED))[-1]
    assert last.data == {
        "wait": "1.10", "kind": "any", "timed_out": False, "part": 0, "of": "signal", "name": "go", "item": signal,
    }  # fmt: skip


async def test_what_came_first_counts_not_what_is_named_first(w: World) -> None:
    session, fence = await w.start()
    await w.control.send(session, b"1")
    await w.control.signal(session, "go", b"2")
    assert (await open_(w, fence, GO, INBOX)).part == 1
    single = await w.control.open_wait(fence, 1, WaitSpec(id="1.2", kind="signal", name="go"))
    assert single.payload == b"2"  # the loser's signal was kept


async def test_one_signal_goes_to_one_of_two_waits(w: World) -> None:
    session, fence = await w.start()
    await open_(w, fence, GO, STOP, ident="1.1")
    await open_(w, fence, STOP, GO, ident="1.2")
    await w.control.signal(session, "go", b"1")
    states = [await poll(w, fence, i, 0) for i in ("1.1", "1.2")]
    assert [s.done for s in states] == [True, False]
    await w.control.signal(session, "go", b"2")
    assert (await poll(w, fence, "1.2")).payload == b"2"


async def test_timers_and_the_time_of_the_whole(w: World) -> None:
    _, fence = await w.start()
    state = await open_(w, fence, GO, timer(0.05), timer(5.0), timeout_s=60.0)
    loop = asyncio.create_task(w.loops.run())
    try:
        state = await poll(w, fence)
        assert (state.part, state.timed_out, state.payload) == (1, False, None)
        await open_(w, fence, GO, timer(60.0), ident="1.10", timeout_s=0.05)
        state = await poll(w, fence, "1.10")
        assert (state.part, state.timed_out) == (None, True)
    finally:
        loop.cancel()


async def test_an_address_that_was_given_out_works_before_and_after(w: World) -> None:
    session, fence = await w.start()
    url = (await w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="signal", name="go"))).url
    assert url is not None
    part = GO.model_copy(update={"wait": "1.1"})
    await open_(w, fence, INBOX, part)
    await w.control.send(session, b"1")
    assert (await poll(w, fence)).part == 0
    await open_(w, fence, part, WaitPart(kind="inbox", after=1), ident="1.10")
    await w.control.callback(url.rsplit("/", 1)[1], b"5")
    state = await poll(w, fence, "1.10")
    assert (state.part, state.payload) == (0, b"5")
    with pytest.raises(Conflict):
        await w.control.callback(url.rsplit("/", 1)[1], b"6")
    # one that came while nobody waited for it
    await w.control.open_wait(fence, 1, WaitSpec(id="1.20", kind="signal", name="go"))
    await w.control.signal(session, "go", b"7")
    assert (await open_(w, fence, GO.model_copy(update={"wait": "1.20"}), ident="1.21")).payload == b"7"


async def test_repeated_after_a_crash_it_keeps_its_deadlines_and_what_it_gave(w: World) -> None:
    session, fence = await w.start()
    await w.act(fence)
    await w.save(fence)
    first = await open_(w, fence, GO, STOP, timer(3600.0), timeout_s=7200.0)
    signal = await w.control.signal(session, "stop", b"1")
    assert (await poll(w, fence)).part == 1
    fence = await crash(w, session, fence)
    await w.control.signal(session, "go", b"2")
    again = await open_(w, fence, GO, STOP, timer(3600.0), timeout_s=7200.0)
    assert (again.done, again.part, again.item, again.deadline) == (True, 1, signal, first.deadline)
    fence = await crash(w, session, fence)
    # another wait of the new line takes it: then the first one gets the next
    taken = await w.control.open_wait(fence, 1, WaitSpec(id="1.5", kind="signal", name="stop"))
    assert taken.item == signal
    again = await open_(w, fence, GO, STOP, timer(3600.0), timeout_s=7200.0)
    assert (again.part, again.payload) == (0, b"2")


async def test_open_at_the_snapshot_it_is_open_again_and_completes_there(w: World) -> None:
    session, fence = await w.start()
    opened = await open_(w, fence, GO, INBOX, timer(600.0))
    await w.save(fence)
    for n in range(3):
        message = await w.control.send(session, b"%d" % n) if n == 0 else message  # noqa: F821
        assert (await poll(w, fence)).item == message.id
        fence = await crash(w, session, fence)
        state = await open_(w, fence, GO, INBOX, timer(600.0))
        assert (state.part, state.number, state.deadline) == (1, 1, opened.deadline)
    other = await open_(w, fence, GO, timer(60.0))  # with other arguments: another wait
    assert not other.done
    assert other.deadline is not None and opened.deadline is not None
    assert other.deadline < opened.deadline - timedelta(seconds=300)


async def test_it_wakes_a_suspended_session(w: World) -> None:
    session, fence = await w.start()
    await open_(w, fence, GO, INBOX)
    await w.sleep(fence, Reason.IDLE)
    assert (await w.control.session(session)).state == State.SUSPENDED
    await w.control.signal(session, "go", b"1")
    _, fence = await w.back(session)
    assert (await poll(w, fence)).part == 0


async def test_it_is_not_suspended_with_an_outcome_unheard(w: World) -> None:
    session, fence = await w.start()
    await open_(w, fence, GO, INBOX)
    await w.report(fence, State.SUSPENDING, reason=Reason.IDLE)
    await w.save(fence, why="suspend")
    await w.control.signal(session, "go", b"1")
    with pytest.raises(Conflict):
        await w.report(fence, State.SUSPENDED, reason=Reason.IDLE, waits=("1.9",))


async def test_a_fork_waits_for_the_same(w: World) -> None:
    session, fence = await w.start()
    await w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="signal", name="stop"))
    part = STOP.model_copy(update={"wait": "1.1"})
    opened = await open_(w, fence, GO, part, timer(600.0))
    info = await w.save(fence)
    (made,) = await w.control.fork(session, info.id)
    _, other = await w.back(made.id)
    state = await open_(w, other, GO, part, timer(600.0))
    assert (state.done, state.deadline) == (False, opened.deadline)
    await w.control.signal(made.id, "stop", b"1")
    assert (await poll(w, other)).part == 1
    assert not (await poll(w, fence, timeout_s=0)).done  # the parent has a life of its own


async def test_given_up_it_takes_nothing(w: World) -> None:
    session, fence = await w.start()
    await open_(w, fence, GO)
    await w.control.cancel_wait(fence, 1, "1.9")
    await w.control.signal(session, "go", b"1")
    assert (await open_(w, fence, GO, ident="1.10")).payload == b"1"


async def test_why_names_each_part(w: World) -> None:
    session, fence = await w.start()
    await open_(w, fence, GO, INBOX, timer(600.0), timeout_s=3600.0)
    told = (await w.control.why(session))["waiting_for"]
    assert [(one["kind"], one["name"]) for one in told] == [("signal", "go"), ("inbox", None), ("timer", None)]
    assert "rethaw signal" in told[0]["wakes_it"] and "time:" in told[0]["wakes_it"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "any"}, "0 things"),
        ({"kind": "any", "parts": (WaitPart(kind="signal"),)}, "names no signal"),
        ({"kind": "any", "parts": (WaitPart(kind="timer"),)}, "no time"),
        ({"kind": "all", "parts": (INBOX,)}, "children only"),
        ({"kind": "inbox", "parts": (INBOX,)}, "has parts"),
        ({"kind": "any", "parts": (timer(1e12),)}, "ten years"),
    ],
)
async def test_a_wait_that_makes_no_sense_is_refused(w: World, spec: dict[str, Any], words: str) -> None:
    _, fence = await w.start()
    with pytest.raises(InvalidInput, match=words):
        await w.control.open_wait(fence, 1, WaitSpec(id="1.9", **spec))
    with pytest.raises(NotFound, match="has no child"):
        await open_(w, fence, WaitPart(kind="child", name="s_other"))
