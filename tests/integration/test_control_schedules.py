"""Schedules on a real PostgreSQL: each time once, what was missed, what overlaps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
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
from rethaw.control.templates import auto_name
from rethaw.model import faults
from rethaw.model.enums import Durability, Reason, State
from rethaw.model.errors import Conflict, InvalidInput, NotFound, RethawError
from rethaw.model.queue_types import Schedule, ScheduleSpec
from rethaw.model.types import Fence, SessionView, StartOptions, WaitSpec

S = State


async def make(w: World, name: str = "daily", **spec: Any) -> Schedule:
    given = {"agent": AGENT, "cron": "0 9 * * *", **spec}
    return await w.control.schedules.create(name, ScheduleSpec(**given))


async def hourly(w: World, *, missed: int = 0, name: str = "daily", **spec: Any) -> datetime:
    """Every hour; the last time was ten minutes ago, and `missed` others before it. The first that is due."""
    await make(w, name, **{"cron": None, "every_s": 3600.0, **spec})
    now = datetime.now(UTC)
    first = now - timedelta(hours=missed, minutes=10)
    await w.sql(
        "UPDATE schedules SET anchor = %s, next_at = %s WHERE name = %s", first - timedelta(hours=1), first, name
    )
    return first


async def started(w: World, name: str = "daily") -> list[SessionView]:
    """Oldest first."""
    return (await w.control.find(Filter(tags=(f"schedule:{name}",))))[0][::-1]


async def became(w: World, name: str = "daily") -> list[str]:
    return [f.what for f in (await w.control.schedules.get(name)).firings][::-1]


async def end(w: World, session: str) -> None:
    now = await w.control.session(session)
    assert now.generation is not None
    await w.report(Fence(session=session, generation=now.generation), S.COMPLETED, exit_code=0)


@pytest.fixture(name="fault")
def fault_fixture() -> Iterator[None]:
    yield
    faults.configure("")


async def test_a_time_starts_a_session_once(w: World) -> None:
    due = await hourly(w, args={"n": 1}, options=StartOptions(queue="q", priority=2, tags=("mine",)))
    assert await asyncio.gather(*(w.control.schedules.fire() for _ in range(5))) != []
    assert not await w.control.schedules.fire()
    (one,) = await started(w)
    assert one.state == S.STARTING and (one.queue, one.priority, one.tags) == ("q", 2, ("mine", "schedule:daily"))
    assert one.key == f"schedule:daily:{due.isoformat()}"
    assignment = await w.node.one("start", one.id)
    assert assignment.boot is not None and assignment.boot.args == {"n": 1}
    now = await w.control.schedules.get("daily")
    assert now.next_at == due + timedelta(hours=1)
    assert [(f.what, f.session, f.due) for f in now.firings] == [("started", one.id, due)]


@pytest.mark.usefixtures("fault")
async def test_what_breaks_off_before_its_commit_has_not_happened(w: World) -> None:
    await hourly(w)
    faults.configure("control.schedule.before_commit=raise")
    with pytest.raises(RethawError, match="fault point"):
        await w.control.schedules.fire()
    assert await started(w) == [] and await became(w) == []
    faults.configure("control.schedule.after_commit=raise")
    with pytest.raises(RethawError, match="fault point"):
        await w.control.schedules.fire()
    faults.configure("")
    assert not await w.control.schedules.fire()
    assert len(await started(w)) == 1


@pytest.mark.parametrize(
    ("catch_up", "sessions", "what"),
    [
        ("latest", 1, ["missed", "started"]),
        ("none", 0, ["missed"]),
        ("all", 4, ["started"] * 4),
    ],
)
async def test_times_that_passed_while_no_server_ran(w: World, catch_up: str, sessions: int, what: list[str]) -> None:
    first = await hourly(w, missed=3, catch_up=catch_up)
    for _ in range(6):
        await w.control.schedules.fire()
    views = await started(w)
    assert len(views) == sessions and await became(w) == what
    last = first + timedelta(hours=3)
    if views:
        assert views[-1].key == f"schedule:daily:{last.isoformat()}"
    assert (await w.control.schedules.get("daily")).next_at == last + timedelta(hours=1)


async def test_none_still_starts_what_is_hardly_late(w: World) -> None:
    await make(w, cron=None, every_s=3600.0, catch_up="none")
    now = datetime.now(UTC) - timedelta(seconds=5)
    await w.sql("UPDATE schedules SET anchor = %s, next_at = %s", now - timedelta(hours=1), now)
    await w.control.schedules.fire()
    assert await became(w) == ["started"]


async def test_a_time_is_skipped_while_a_session_goes_on(w: World) -> None:
    await hourly(w, missed=2, catch_up="all", overlap="skip")
    await w.control.schedules.fire()
    await w.control.schedules.fire()
    (one,) = await started(w)
    assert await became(w) == ["started", "skipped"]
    assert (await w.control.schedules.get("daily")).firings[0].detail == f"session {one.id} goes on"
    await end(w, one.id)
    await w.control.schedules.fire()
    assert await became(w) == ["started", "skipped", "started"]


async def test_a_paused_one_starts_nothing_and_catches_up_nothing(w: World) -> None:
    await hourly(w, missed=2)
    assert (await w.control.schedules.pause("daily", True)).paused
    assert not await w.control.schedules.fire()
    now = await w.control.schedules.pause("daily", False)
    assert not now.paused and now.next_at > datetime.now(UTC)
    assert not await w.control.schedules.fire() and await started(w) == []


async def test_a_person_may_start_one_at_any_time(w: World) -> None:
    await make(w, overlap="skip", options=StartOptions(queue="q"))
    await w.control.schedules.pause("daily", True)
    one, two = await w.control.schedules.trigger("daily"), await w.control.schedules.trigger("daily")
    assert one.id != two.id and one.queue == "q" and one.tags == ("schedule:daily",)
    assert await became(w) == ["triggered"] * 2
    gone = await w.control.schedules.remove("daily")
    assert gone.name == "daily" and (await w.control.session(one.id)).state == S.STARTING
    for asked in (w.control.schedules.get, w.control.schedules.trigger, w.control.schedules.remove):
        with pytest.raises(NotFound, match="no schedule 'daily'"):
            await asked("daily")


async def test_the_same_again_another_and_a_replacement(w: World) -> None:
    one = await make(w)
    assert await make(w) == one
    with pytest.raises(Conflict, match="schedule daily exists"):
        await make(w, args={"n": 2})
    replaced = await w.control.schedules.create(
        "daily", ScheduleSpec(agent=AGENT, cron="0 9 * * *", args={"n": 2}), replace=True
    )
    assert replaced.args == {"n": 2} and replaced.next_at == one.next_at
    other = await w.control.schedules.create("daily", ScheduleSpec(agent=AGENT, every_s=60.0), replace=True)
    assert other.cron is None and other.next_at - datetime.now(UTC) < timedelta(seconds=61)
    assert [s.name for s in await w.control.schedules.every()] == ["daily"]


async def test_what_cannot_be_started_is_said_and_the_next_time_comes(w: World) -> None:
    w.control.policy = Policy(object_store=True)
    agent = AGENT.model_copy(update={"durability": Durability.REPLICATED})
    due = await hourly(w, agent=agent)
    w.control.policy = Policy()
    await w.control.schedules.fire()
    now = await w.control.schedules.get("daily")
    assert now.next_at == due + timedelta(hours=1)
    assert now.firings[0].what == "failed" and "object store" in (now.firings[0].detail or "")


async def test_one_that_breaks_keeps_no_other_from_its_time(w: World) -> None:
    await hourly(w, name="broken")
    await hourly(w, name="whole")
    await w.sql("UPDATE schedules SET agent = '{' WHERE name = 'broken'")
    with pytest.raises(ValueError, match="AgentSpec"):
        await w.control.schedules.fire()
    assert len(await started(w, "whole")) == 1


async def test_sessions_begin_in_the_agents_own_template(w: World) -> None:
    agent = AGENT.model_copy(
        update={"command": (), "entry": "agent.py::main", "code": "0" * 64, "template": "auto"}
    )  # fmt: skip
    made = await w.control.warm.create(auto_name(agent), agent, {})
    assignment = await w.node.one("start", made.session)
    fence = Fence(session=made.session, generation=assignment.generation)
    await w.report(fence, S.RUNNING)
    await w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="signal", name="rethaw.start"))
    await w.control.suspend(made.session)
    info = await w.sleep(fence, Reason.REQUESTED)
    await w.control.warm.ready(made, info.id, "call")
    due = await hourly(w, agent=agent, args={"n": 4})
    await w.control.schedules.fire()
    (one,) = await started(w)
    assert one.forked_from == made.session and one.key == f"schedule:daily:{due.isoformat()}"
    await w.control.place_waiting()
    assert (await w.control.session(one.id)).node is not None


async def test_the_loops_fire_in_time(control_dsn: str) -> None:
    async with world(control_dsn, Policy(poll_s=20.0, lease_s=600.0)) as w:
        loops = asyncio.create_task(w.loops.run())
        await asyncio.sleep(0)
        await make(w, cron=None, every_s=1.0)

        async def two() -> bool:
            return len(await started(w)) >= 2

        await eventually(two, 8)
        loops.cancel()
        await asyncio.gather(loops, return_exceptions=True)
        firings = (await w.control.schedules.get("daily")).firings
        late = [await w.sql("SELECT at - due FROM firings ORDER BY due LIMIT 2")][0]
        assert all(found < timedelta(seconds=0.9) for (found,) in late), firings


async def test_old_times_are_forgotten_but_those_of_sessions_that_go_on(w: World) -> None:
    await hourly(w, missed=130, catch_up="all", overlap="allow")
    await w.control.schedules.fire()
    (oldest,) = await started(w)
    for _ in range(5):
        await w.control.schedules.fire()
    for view in (await started(w))[1:]:
        await w.control.cancel(view.id, now=True)
    await w.sql("UPDATE schedules SET catch_up = 'all', overlap = 'skip'")
    for _ in range(100):
        await w.control.schedules.fire()
    kept = await w.sql("SELECT session FROM firings ORDER BY due")
    assert len(kept) == 101 and kept[0][0] == oldest.id


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"cron": "0 9 * *"}, "cron '0 9 * *'"),
        ({"tz": "Mars/Olympus"}, "time zone 'Mars/Olympus'"),
        ({"cron": None}, "either cron or every"),
        ({"options": StartOptions(queue="a b")}, "'a b' cannot be a queue's name"),
        ({"options": StartOptions(tags=tuple(str(n) for n in range(50)))}, "51 tags"),
        ({"agent": AGENT.model_copy(update={"command": ()})}, "nothing to run"),
        ({"name": "a b"}, "'a b' cannot be a schedule's name"),
    ],
)
async def test_what_does_not_fit_is_named(w: World, spec: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        await make(w, **spec)
    assert said in str(caught.value)


async def test_their_keys_are_nobody_elses(w: World) -> None:
    with pytest.raises(InvalidInput, match="keys that begin with 'schedule:'"):
        await w.control.create(AGENT, {}, "schedule:daily:2026-01-01T09:00:00+00:00")
