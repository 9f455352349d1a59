"""Crashes, the crash-loop rule, unusable snapshots, lost nodes and leases, outbox publication, retention."""

from __future__ import annotations

import asyncio
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

from rethaw.control.policy import Policy
from rethaw.control.snapshots import Catalog
from rethaw.model import faults
from rethaw.model.enums import Desired, EventType, Reason, State
from rethaw.model.errors import Conflict, Fenced, InvalidInput, NotFound, RethawError
from rethaw.model.types import Fence, NewEvent, SnapshotInfo, WaitSpec

S = State


async def die(w: World, fence: Fence, reason: Reason = Reason.SANDBOX_DIED) -> None:
    await w.control.report_death(fence, reason, "it died")


async def test_a_crash_opens_a_new_line_from_the_newest_snapshot(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    kept = await w.act(fence)
    info = await w.save(fence)
    lost = await w.act(fence)
    await die(w, fence)
    view = await w.control.session(session)
    assert (view.state, view.reason, view.line, view.attempt, view.crashes) == (
        S.RECOVERING, Reason.SANDBOX_DIED, 2, 1, 1,
    )  # fmt: skip
    assignment, new = await w.back(session)
    assert assignment.snapshot is not None and assignment.snapshot.id == info.id and assignment.line == 2
    events = await w.events(session)
    seqs = [e.seq for e in events]
    assert kept.seq in seqs and lost.seq not in seqs
    opened = next(e for e in events if e.type == EventType.LINE_OPENED)
    assert (opened.data["parent"], opened.data["branch_seq"], opened.data["snapshot"]) == (1, info.seq, info.id)
    crashed = next(e for e in events if e.type == EventType.SESSION_CRASHED)
    assert (crashed.data["reason"], crashed.data["generation"]) == ("sandbox_died", fence.generation)
    assert not [e for e in events if e.type == EventType.ATTEMPT_STARTED and e.line == 2]
    every = await w.log.read(session, all_lines=True)
    assert [e.seq for e in every] == list(range(1, len(every) + 1))
    for call in (w.act(fence), die(w, fence), w.catalog.commit(fence, info.model_copy(update={"id": "snap_late"}))):
        with pytest.raises(Fenced):
            await call
    await w.act(new)


@pytest.mark.parametrize("state", [S.RUNNING, S.WAITING, S.SUSPENDING])
async def test_death_in_each_state(w: World, state: State) -> None:
    session, fence = await w.start()
    info = await w.save(fence)
    await w.report(fence, state)
    await die(w, fence)
    assert (await w.back(session))[0].snapshot == info


async def test_death_while_suspending_after_the_snapshot_was_committed(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    await w.act(fence)
    await w.report(fence, S.SUSPENDING, reason=Reason.IDLE)
    last = await w.save(fence, why="suspend")
    await die(w, fence)
    assignment, _ = await w.back(session)
    assert assignment.snapshot is not None and assignment.snapshot.id == last.id
    assert (await w.control.session(session)).desired == Desired.RUNNING


async def test_death_while_a_person_suspends_it_ends_suspended(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    await w.control.suspend(session)
    await w.node.one("suspend", session)
    await w.report(fence, S.SUSPENDING, reason=Reason.REQUESTED)
    await die(w, fence)
    restore = await w.node.one("restore", session)
    fence = Fence(session=session, generation=restore.generation)
    await w.report(fence, S.RUNNING)
    assert (await w.node.one("suspend", session)).generation == fence.generation
    await w.sleep(fence, Reason.REQUESTED)


async def test_a_death_after_the_suspension_changes_nothing(w: World) -> None:
    session, fence = await w.start()
    await w.sleep(fence, Reason.IDLE)
    await die(w, fence)
    view = await w.control.session(session)
    assert (view.state, view.crashes, view.line) == (S.SUSPENDED, 0, 1)


async def test_death_while_starting_boots_again(w: World) -> None:
    view, _ = await w.control.create(AGENT, {"a": 1})
    start = await w.node.one("start", view.id)
    await w.control.send(view.id, b"1")
    await die(w, Fence(session=view.id, generation=start.generation))
    again = await w.node.one("start", view.id)
    assert again.boot is not None and again.boot.args == {"a": 1}
    assert (again.attempt, again.line, again.boot.cursor, again.boot.fresh) == (1, 2, 0, True)
    fence = Fence(session=view.id, generation=again.generation)
    await w.report(fence, S.RUNNING)
    events = await w.events(view.id)
    assert [e.data["attempt"] for e in events if e.type == EventType.ATTEMPT_STARTED] == [1]
    assert [e.type for e in events].count(EventType.MESSAGE_RECEIVED) == 1


@pytest.mark.parametrize("reason", [Reason.COMMAND_NOT_FOUND, Reason.IMAGE_FAILED])
async def test_what_cannot_start_fails_at_once(w: World, reason: Reason) -> None:
    view, _ = await w.control.create(AGENT, {})
    start = await w.node.one("start", view.id)
    fence = Fence(session=view.id, generation=start.generation)
    await w.control.report_death(fence, reason, "/bin/nothing is not in the image")
    view = await w.control.session(view.id)
    assert (view.state, view.reason) == (S.FAILED, reason)
    assert view.detail == "/bin/nothing is not in the image"


async def test_what_does_not_boot_fails_after_three_times(w: World) -> None:
    view, _ = await w.control.create(AGENT, {})
    for _ in range(3):
        start = await w.node.one("start", view.id)
        fence = Fence(session=view.id, generation=start.generation)
        await w.control.report_death(fence, Reason.BOOT_FAILED, "16 MiB is too little")
    view = await w.control.session(view.id)
    assert (view.state, view.reason, view.detail) == (S.FAILED, Reason.BOOT_FAILED, "16 MiB is too little")
    assert await w.node.work() == []


# ---------------------------------------------------------------- crash loops


async def lives(w: World, session: str, reason: Reason, limit: int = 40) -> list[str]:
    """What is assigned while every life dies at once: snapshot ids, or "boot"."""
    out: list[str] = []
    while (await w.control.session(session)).state == S.RECOVERING:
        assert len(out) < limit
        (assignment,) = await w.node.work(2)
        out.append(assignment.snapshot.id if assignment.snapshot else f"boot {assignment.attempt}")
        fence = Fence(session=session, generation=assignment.generation)
        await w.report(fence, S.RUNNING)
        await w.control.report_death(fence, reason, "again")
    return out


async def test_three_deaths_then_the_parent_then_a_boot_then_failed(w: World) -> None:
    session, fence = await w.start()
    await w.act(fence)
    first = await w.save(fence)
    await w.act(fence)
    newest = await w.save(fence)
    await w.control.consume(fence, 1, 1)
    await die(w, fence)
    got = await lives(w, session, Reason.SANDBOX_DIED)
    assert got == [newest.id] * 3 + [first.id] * 3 + ["boot 2"] * 3
    view = await w.control.session(session)
    assert (view.state, view.reason) == (S.FAILED, Reason.CRASH_LOOP)
    assert view.crashes == 10
    # the boot had the whole durable context, up to the newest snapshot
    line = [e for e in await w.events(session, EventType.LINE_OPENED) if e.data["why"] == "crash_loop"][-1]
    assert (line.data["parent"], line.data["branch_seq"]) == (newest.line, newest.seq)


async def test_always_out_of_memory_names_the_limit(w: World) -> None:
    session, fence = await w.start()
    await w.act(fence)
    await w.save(fence)
    await die(w, fence, Reason.OUT_OF_MEMORY)
    await lives(w, session, Reason.OUT_OF_MEMORY)
    view = await w.control.session(session)
    assert (view.state, view.reason) == (S.FAILED, Reason.OUT_OF_MEMORY)
    assert "64 MiB" in (view.detail or "")


async def test_an_agent_that_works_and_then_always_runs_out_of_memory_is_given_up(w: World) -> None:
    """It makes its calls and takes its snapshots anew after each step back, and dies at the same place."""
    session, fence = await w.start()
    steps = 4

    async def live(fence: Fence, done: int) -> None:
        for n in range(done, steps):
            await w.append(fence, EventType.EMITTED, name=f"n{n}")
            await w.save(fence, output={"n": n + 1})
        await die(w, fence, Reason.OUT_OF_MEMORY)

    await live(fence, 0)
    for _ in range(60):
        if (await w.control.session(session)).state != S.RECOVERING:
            break
        (assignment,) = await w.node.work(2)
        fence = Fence(session=session, generation=assignment.generation)
        await w.report(fence, S.RUNNING)
        await live(fence, assignment.snapshot.output["n"] if assignment.snapshot else 0)
    view = await w.control.session(session)
    assert (view.state, view.reason) == (S.FAILED, Reason.OUT_OF_MEMORY)


async def test_an_agent_that_gets_further_between_crashes_is_never_given_up(w: World) -> None:
    session, fence = await w.start()
    for _ in range(15):
        await w.act(fence)
        await w.save(fence)
        await die(w, fence)
        _, fence = await w.back(session)
    view = await w.control.session(session)
    assert (view.state, view.crashes) == (S.RUNNING, 15)


async def test_crashes_that_a_person_asked_for_do_not_count(w: World) -> None:
    session, fence = await w.start()
    info = await w.save(fence)
    for _ in range(6):
        await w.control.crash(session)
        await w.node.one("crash", session)
        await die(w, fence)
        assignment, fence = await w.back(session)
        assert assignment.snapshot is not None and assignment.snapshot.id == info.id


# ---------------------------------------------------------------- unusable snapshots


async def test_an_unusable_snapshot_falls_back_to_its_parent_then_to_a_boot(w: World) -> None:
    session, fence = await w.start()
    for payload in (b"1", b"2"):
        await w.control.send(session, payload)
    await w.control.consume(fence, 1, 1)
    parent = await w.save(fence)
    await w.act(fence)
    newest = await w.save(fence)
    await w.sleep(fence, Reason.IDLE)
    last = (await w.catalog.list(session))[-1]
    await w.control.resume(session)
    tried: list[str] = []
    for snapshot in (last, newest, parent):
        assignment = await w.node.one("restore", session)
        assert assignment.snapshot is not None
        tried.append(assignment.snapshot.id)
        fence = Fence(session=session, generation=assignment.generation)
        await w.control.report_unusable(fence, snapshot.id, "pages: hash differs")
    assert tried == [last.id, newest.id, parent.id]
    boot = await w.node.one("start", session)
    assert boot.boot is not None and (boot.attempt, boot.boot.fresh, boot.boot.cursor) == (2, True, 1)
    view = await w.control.session(session)
    assert (view.state, view.reason, view.snapshot) == (S.RECOVERING, Reason.SNAPSHOT_UNUSABLE, None)
    assert view.crashes == 0 and "hash differs" in (view.detail or "")
    assert [s.unusable for s in await w.catalog.list(session)] == ["pages: hash differs"] * 3
    await w.report(Fence(session=session, generation=boot.generation), S.RUNNING)
    # the new attempt sees what the last snapshot contained
    assert EventType.EMITTED in [e.type for e in await w.events(session)]


async def test_marking_unusable_while_it_runs(w: World) -> None:
    session, fence = await w.start()
    parent, newest = await w.save(fence), await w.save(fence)
    for _ in range(2):
        await w.catalog.mark_unusable(fence, newest.id, "bad")
    assert (await w.control.session(session)).snapshot == parent.id
    assert len(await w.events(session, EventType.SNAPSHOT_UNUSABLE)) == 1
    await die(w, fence)
    assert (await w.back(session))[0].snapshot == parent


# ---------------------------------------------------------------- nodes and leases


async def test_a_new_incarnation_recovers_what_the_former_one_ran(w: World) -> None:
    session, fence = await w.start()
    info = await w.save(fence)
    asleep, other = await w.start()
    await w.sleep(other, Reason.IDLE)
    former = w.node.incarnation
    await w.node.restart()
    view = await w.control.session(session)
    assert (view.state, view.reason) == (S.RECOVERING, Reason.NODE_LOST)
    assignment, _ = await w.back(session)
    assert assignment.snapshot is not None and assignment.snapshot.id == info.id
    assert (await w.control.session(asleep)).state == S.SUSPENDED
    for call in (
        w.control.renew_lease(w.node.id, former),
        w.control.assignments(w.node.id, former, 0, 0),
        w.report(fence, S.WAITING),
    ):
        with pytest.raises(Fenced):
            await call


async def test_registering_again_with_the_same_incarnation_changes_nothing(w: World) -> None:
    session, fence = await w.start()
    await w.node.register()
    await w.act(fence)
    assert (await w.control.session(session)).crashes == 0


async def test_a_node_that_dies_between_registering_and_recovering(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    faults.configure("control.register.between=raise")
    try:
        with pytest.raises(RethawError):
            await w.node.restart()
    finally:
        faults.configure("")
    await w.loops.reap()  # nothing of the new incarnation runs it: no lease has to run out
    assert (await w.control.session(session)).state == S.RECOVERING


async def test_a_lease_that_runs_out(control_dsn: str) -> None:
    async with world(control_dsn, Policy(lease_s=0.5, poll_s=0.05)) as w:
        session, fence = await w.start()
        info = await w.save(fence)
        loops = asyncio.create_task(w.loops.run())
        try:
            await eventually(lambda: state_is(w, session, S.RECOVERING))
            view = await w.control.session(session)
            assert view.node is None  # its snapshot is on that node only
            with pytest.raises(Fenced):
                await w.act(fence)
            await w.control.renew_lease(w.node.id, w.node.incarnation)
            assignment = await w.node.one("restore", session)
            assert assignment.snapshot is not None and assignment.snapshot.id == info.id
        finally:
            loops.cancel()


async def test_a_renewed_lease_does_not_run_out(control_dsn: str) -> None:
    async with world(control_dsn, Policy(lease_s=0.6, poll_s=0.05)) as w:
        session, fence = await w.start()
        loops = asyncio.create_task(w.loops.run())
        try:
            for _ in range(15):
                await asyncio.sleep(0.1)
                await w.control.renew_lease(w.node.id, w.node.incarnation)
            await w.act(fence)
            assert (await w.control.session(session)).crashes == 0
        finally:
            loops.cancel()


async def test_after_an_outage_reapers_wait_one_full_lease(control_dsn: str) -> None:
    async with world(control_dsn, Policy(lease_s=0.6, poll_s=0.05)) as w:
        session, _ = await w.start()
        loops = w.loops
        loops._reap_from = 0
        await w.sql("UPDATE nodes SET lease_until = now() - interval '1 hour'")
        loops._last_seen -= 60
        await loops.reap()
        assert (await w.control.session(session)).state == S.RUNNING
        for _ in range(14):
            await asyncio.sleep(0.05)
            await loops.reap()
        assert (await w.control.session(session)).state == S.RECOVERING


async def test_a_starting_reaper_waits_one_full_lease(control_dsn: str) -> None:
    async with world(control_dsn, Policy(lease_s=30)) as w:
        session, _ = await w.start()
        await w.sql("UPDATE nodes SET lease_until = now() - interval '1 hour'")
        await w.loops.reap()
        assert (await w.control.session(session)).state == S.RUNNING


async def test_assignments_wait_and_are_repeated_until_taken(w: World) -> None:
    waiting = asyncio.create_task(w.control.assignments(w.node.id, w.node.incarnation, 0, 10))
    await asyncio.sleep(0)
    view, _ = await w.control.create(AGENT, {})
    first = await asyncio.wait_for(waiting, 5)
    assert [a.session for a in first] == [view.id]
    assert await w.control.assignments(w.node.id, w.node.incarnation, 0, 0) == first
    assert await w.control.assignments(w.node.id, w.node.incarnation, first[0].revision, 0) == []
    await w.report(Fence(session=view.id, generation=first[0].generation), S.RUNNING)
    assert await w.control.assignments(w.node.id, w.node.incarnation, 0, 0) == []


async def test_room_is_counted(control_dsn: str) -> None:
    async with world(control_dsn, Policy(overcommit=1.0)) as w:
        w.node.memory_bytes = 128 << 20
        await w.node.register()
        made = [(await w.control.create(AGENT, {}))[0] for _ in range(3)]
        assert [v.state for v in made] == [S.STARTING, S.STARTING, S.QUEUED]
        await w.control.cancel(made[0].id, now=True)
        await w.control.place_waiting()
        assert (await w.control.session(made[2].id)).state == S.STARTING


# ---------------------------------------------------------------- outbox


async def send(w: World, fence: Fence, n: int, payload: bytes | None = None) -> None:
    await w.append(
        fence, EventType.MESSAGE_SENT, payload or b"%d" % n, message=f"m_{fence.generation[:4]}_{n}", key=f"send:1.{n}"
    )


async def outbox(w: World, session: str) -> list[tuple[int, bytes]]:
    return [(m.number, m.payload) for m in await w.control.outbox(session)]


async def test_a_message_is_published_once_a_snapshot_holds_it(w: World) -> None:
    session, fence = await w.start()
    await send(w, fence, 1)
    seq = (await w.control.session(session)).last_seq
    await send(w, fence, 2)
    assert await outbox(w, session) == []
    await w.save(fence, seq=seq)
    assert await outbox(w, session) == [(1, b"1")]
    await w.save(fence)
    assert await outbox(w, session) == [(1, b"1"), (2, b"2")]
    published = await w.events(session, EventType.MESSAGE_PUBLISHED)
    assert [e.data["number"] for e in published] == [1, 2]


async def test_what_a_crash_took_back_is_never_published(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    await send(w, fence, 1, b'"lost"')
    await die(w, fence)
    _, fence = await w.back(session)
    await send(w, fence, 1, b'"other"')
    await w.save(fence)
    assert await outbox(w, session) == [(1, b'"other"')]


async def test_a_published_message_that_is_sent_again_is_not_published_again(w: World) -> None:
    """The snapshot that held it cannot be restored, its parent makes the agent send it once more."""
    session, fence = await w.start()
    await w.save(fence)
    await send(w, fence, 1)
    last = await w.save(fence)
    await w.catalog.mark_unusable(fence, last.id, "bad")
    await die(w, fence)
    _, fence = await w.back(session)
    await send(w, fence, 1)
    await send(w, fence, 2)
    await w.save(fence)
    assert await outbox(w, session) == [(1, b"1"), (2, b"2")]


async def test_the_end_publishes_the_rest(w: World) -> None:
    session, fence = await w.start()
    await send(w, fence, 1)
    await w.report(fence, S.COMPLETED, exit_code=0)
    assert await outbox(w, session) == [(1, b"1")]
    assert await w.control.outbox(session, after=1, wait_s=30) == []  # nothing more will come: no waiting


async def test_a_crash_loop_does_not_publish_the_rest(w: World) -> None:
    session, fence = await w.start()
    for _ in range(3):
        await die(w, fence)
        if (await w.control.session(session)).state == S.RECOVERING:
            _, fence = await w.back(session, "start")
            await w.append(fence, EventType.MESSAGE_SENT, b"1", message="m_1")
            await w.sql("UPDATE sessions SET loop_deaths = 2, life_progress = 99 WHERE id = %s", session)
    assert (await w.control.session(session)).state == S.FAILED
    assert await outbox(w, session) == []


# ---------------------------------------------------------------- the catalog


async def test_commit_is_idempotent_and_checked(w: World) -> None:
    session, fence = await w.start()
    view = await w.control.session(session)
    info = w.info(view, view.last_seq)
    first = await w.catalog.commit(fence, info)
    assert first.created_at is not None
    assert await w.catalog.commit(fence, info) == first
    assert await w.catalog.get(info.id) == first
    assert len(await w.events(session, EventType.SNAPSHOT_CREATED)) == 1
    for change in ({"seq": 999}, {"seq": 0}, {"line": 7}, {"attempt": 9}, {"session": "s_other"}):
        with pytest.raises(InvalidInput):
            await w.catalog.commit(fence, info.model_copy(update={"id": "snap_x", **change}))
    with pytest.raises(NotFound):
        await w.catalog.get("snap_none")


async def test_a_failed_commit_leaves_nothing(w: World) -> None:
    session, fence = await w.start()
    await send(w, fence, 1)
    before = (await w.control.session(session)).last_seq
    faults.configure("catalog.commit.inside=raise")
    try:
        with pytest.raises(RethawError):
            await w.save(fence)
    finally:
        faults.configure("")
    view = await w.control.session(session)
    assert (view.last_seq, view.snapshot) == (before, None)
    assert await w.catalog.list(session) == [] and await outbox(w, session) == []


async def test_retention_is_the_agents_policy(control_dsn: str) -> None:
    async with world(control_dsn) as w:
        catalog = Catalog(w.db, w.hub)
        session, fence = await w.start(AGENT.model_copy(update={"keep_bytes": 60, "keep_all_s": 3600.0}))
        made: list[SnapshotInfo] = [await w.save(fence, stored_bytes=10) for _ in range(10)]
        pinned = await catalog.pin(made[0].id, True)
        assert pinned.pinned
        gone = {s.id for s in await catalog.superfluous(w.node.id)}
        assert gone == {s.id for s in made[1:4]}  # the newest six fit into the budget
        await w.sql("UPDATE snapshots SET stored_bytes = 1000")
        gone = {s.id for s in await catalog.superfluous(w.node.id)}
        assert gone == {s.id for s in made[1:7]}  # over the budget: what recovery may ask for stays
        with pytest.raises(NotFound):
            await catalog.pin(made[1].id, True)  # its files are on their way out
        await catalog.pin(made[0].id, False)
        gone = {s.id for s in await catalog.superfluous(w.node.id)}
        assert gone == {s.id for s in made[:7]}
        for snapshot in gone:
            await catalog.forget(snapshot)
        with pytest.raises(Conflict):
            await catalog.forget(made[-1].id)
        await die(w, fence)
        assert (await w.back(session))[0].snapshot is not None
        assert await catalog.superfluous("n_other") == []


async def test_old_snapshots_are_kept_one_an_hour(w: World) -> None:
    _, fence = await w.start()
    made = [await w.save(fence) for _ in range(8)]
    for n, info in enumerate(made[:5]):
        at = f"2026-01-01 {10 if n < 3 else 12}:{n}0+00"
        await w.sql("UPDATE snapshots SET created_at = %s WHERE id = %s", at, info.id)
    gone = {s.id for s in await w.catalog.superfluous(w.node.id)}
    assert gone == {made[0].id, made[1].id, made[3].id}


# ---------------------------------------------------------------- fault points


@pytest.mark.parametrize("point", ["control.report.before_commit", "control.death.before_commit"])
async def test_nothing_is_half_done(w: World, point: str) -> None:
    session, fence = await w.start()
    await w.save(fence)
    before = await w.control.session(session)
    faults.configure(f"{point}=raise")
    try:
        with pytest.raises(RethawError):
            await (w.report(fence, S.WAITING) if "report" in point else die(w, fence))
    finally:
        faults.configure("")
    assert await w.control.session(session) == before


async def test_a_lost_reply_to_a_report_is_repeated_harmlessly(w: World) -> None:
    session, fence = await w.start()
    faults.configure("control.report.after_commit=raise")
    try:
        with pytest.raises(RethawError):
            await w.report(fence, S.WAITING)
    finally:
        faults.configure("")
    assert (await w.report(fence, S.WAITING)).state == S.WAITING
    assert await w.states(session) == ["starting", "running", "waiting"]


async def test_a_fresh_boot_does_not_hear_the_waits_of_the_former_attempt(w: World) -> None:
    session, fence = await w.start()
    spec = WaitSpec(id="1.1", kind="signal", name="go")
    url = str((await w.control.open_wait(fence, 1, spec)).url)
    info = await w.save(fence)
    await w.catalog.mark_unusable(fence, info.id, "bad")
    await w.sleep(fence, Reason.IDLE)
    await w.sql("UPDATE snapshots SET unusable = 'bad' WHERE session = %s", session)
    await w.control.resume(session)
    boot = await w.node.one("start", session)
    assert boot.attempt == 2
    fence = Fence(session=session, generation=boot.generation)
    await w.report(fence, S.RUNNING)
    # an address that the former attempt gave out still reaches the session: by its name
    await w.control.callback(url.rsplit("/", 1)[1], b"1")
    state = await w.control.open_wait(fence, 2, spec.model_copy(update={"id": "2.1"}))
    assert state.payload == b"1"


async def state_is(w: World, session: str, state: State) -> Any:
    return (await w.control.session(session)).state == state


async def test_what_is_published_without_a_snapshot_is_published_once(w: World) -> None:
    """Durability "relaxed": the agent that comes back sends it again, by the same call."""

    def sent(n: int) -> NewEvent:
        data = {"message": f"m_{fence.generation[:4]}_{n}"}
        return NewEvent(type=EventType.MESSAGE_SENT, data=data, body=b"%d" % n, key=f"send:1.{n}")

    session, fence = await w.start()
    await w.save(fence)
    event = await w.control.publish(fence, sent(1))
    assert (await w.control.publish(fence, sent(1))).seq == event.seq
    assert await outbox(w, session) == [(1, b"1")]
    await die(w, fence)
    with pytest.raises(Fenced):
        await w.control.publish(fence, sent(2))
    _, fence = await w.back(session)
    for _ in range(2):
        await w.control.publish(fence, sent(1))
        await w.control.publish(fence, sent(2))
    await w.save(fence)
    assert await outbox(w, session) == [(1, b"1"), (2, b"2")]
