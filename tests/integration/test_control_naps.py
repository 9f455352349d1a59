"""Sessions that policy suspends for a time, as control has them."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

import pytest
from control_fixtures import (  # noqa: F401 - fixtures
    AGENT,
    World,
    cluster_fixture,
    dsn_fixture,
    eventually,
    world_fixture,
)

from rethaw.model.enums import Reason, State
from rethaw.model.errors import Conflict, InvalidInput
from rethaw.model.types import Fence
from rethaw.model.versions import digest

S = State
LONG = AGENT.model_copy(update={"nap_s": 3600.0})
SHORT = AGENT.model_copy(update={"nap_s": 1.0})


async def until(w: World, session: str) -> datetime | None:
    ((found,),) = await w.sql("SELECT nap_until FROM sessions WHERE id = %s", session)
    return found


async def due(w: World, session: str) -> None:
    await w.sql("UPDATE sessions SET nap_until = now() - interval '1 second' WHERE id = %s", session)


def test_no_digest_changes_for_agents_without_naps() -> None:
    assert "nap_s" not in AGENT.model_dump(mode="json")
    assert digest(AGENT) == digest(AGENT.model_copy(update={"nap_s": None})) != digest(LONG)


@pytest.mark.parametrize("change", [{"nap_s": 0.5}, {"nap_s": float("inf")}, {"idle_suspend_s": None}])
async def test_a_nap_that_does_not_fit_is_refused(w: World, change: dict[str, float | None]) -> None:
    with pytest.raises(InvalidInput, match="nap_s"):
        await w.control.create(LONG.model_copy(update=change), {}, None)


async def test_time_wakes_it_again_and_again(w: World) -> None:
    session, fence = await w.start(SHORT)
    loops = asyncio.create_task(w.loops.run())
    try:
        await w.hub.listening.wait()
        for _ in range(3):
            began = time.monotonic()
            await w.sleep(fence, Reason.NAP)
            restore = await w.node.one("restore", session)
            assert 0.9 < time.monotonic() - began < 4  # by its own deadline, not by the poll
            fence = Fence(session=session, generation=restore.generation)
            await w.report(fence, S.RUNNING)
            assert await until(w, session) is None
    finally:
        loops.cancel()


async def test_a_message_wakes_it(w: World) -> None:
    session, fence = await w.start(LONG)
    await w.sleep(fence, Reason.NAP)
    at = await until(w, session)
    assert at is not None and 3500 < (at - datetime.now(UTC)).total_seconds() < 3601
    why = await w.control.why(session)
    (told,) = why["waiting_for"]
    assert told["kind"] == "nap" and at.isoformat(timespec="seconds") in told["wakes_it"]
    assert "rethaw send" in told["wakes_it"] and told["deadline"] == at.isoformat()
    await w.control.send(session, b"1")
    assert (await w.control.session(session)).state == S.RESUMING and await until(w, session) is None
    await w.back(session)
    await w.control.send(session, b"2")  # nothing to wake
    assert (await w.control.session(session)).state == S.RUNNING


async def test_a_message_while_it_is_being_suspended_is_not_slept_through(w: World) -> None:
    session, fence = await w.start(LONG)
    await w.report(fence, S.SUSPENDING, reason=Reason.NAP)
    await w.save(fence, why="suspend")
    await w.control.send(session, b"1")
    with pytest.raises(Conflict, match="has come"):
        await w.report(fence, S.SUSPENDED, reason=Reason.NAP)


async def test_a_message_wakes_nothing_that_waits_for_another_reason(w: World) -> None:
    session, fence = await w.start(LONG)
    await w.sleep(fence, Reason.IDLE)
    assert await until(w, session) is None
    await w.control.send(session, b"1")
    assert (await w.control.session(session)).state == S.SUSPENDED


async def test_time_and_messages_leave_alone_what_a_person_suspended(w: World) -> None:
    session, fence = await w.start(LONG)
    await w.sleep(fence, Reason.NAP)
    assert (await w.control.suspend(session)).reason == Reason.REQUESTED
    assert await until(w, session) is None
    await due(w, session)
    await w.loops.fire()
    await w.control.send(session, b"1")
    assert (await w.control.session(session)).state == S.SUSPENDED
    assert await until(w, session) is None  # or it would be looked at for ever
    await w.control.resume(session)
    _, fence = await w.back(session)
    await w.control.suspend(session)  # this time while it is being suspended for a nap
    await w.sleep(fence, Reason.NAP)
    view = await w.control.session(session)
    assert (view.state, view.reason, await until(w, session)) == (S.SUSPENDED, Reason.REQUESTED, None)


async def test_somebody_resumes_cancels_and_removes_it(w: World) -> None:
    session, fence = await w.start(LONG)
    await w.sleep(fence, Reason.NAP)
    await w.control.resume(session)
    _, fence = await w.back(session)
    await w.sleep(fence, Reason.NAP)
    await w.control.cancel(session)
    await due(w, session)
    await w.loops.fire()
    assert (await w.control.session(session)).state == S.CANCELLED and await until(w, session) is None
    await w.control.erase(session)


async def test_several_are_woken_at_once(w: World) -> None:
    sessions: list[str] = []
    for _ in range(3):
        session, fence = await w.start(LONG)
        await w.sleep(fence, Reason.NAP)
        await due(w, session)
        sessions.append(session)
    await w.loops.fire()

    async def woken() -> bool:
        return all([(await w.control.session(one)).state == S.RESUMING for one in sessions])

    await eventually(woken)
