"""Forks and rewinds by control: the shared log, waits, messages, snapshots, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from control_fixtures import (  # noqa: F401 - fixtures
    World,
    cluster_fixture,
    dsn_fixture,
    world_fixture,
)

from rethaw.model.enums import EventType, Reason, State
from rethaw.model.errors import Conflict, InvalidInput, NotFound
from rethaw.model.types import Fence, SessionView, WaitSpec

S = State


async def seqs(w: World, session: str, **more: Any) -> list[int]:
    return [e.seq for e in await w.log.read(session, **more)]


async def test_a_fork_reads_its_parents_log_up_to_there(w: World) -> None:
    session, fence = await w.start()
    kept = await w.act(fence)
    info = await w.save(fence)
    later = await w.act(fence)
    await w.save(fence)
    (view,) = await w.control.fork(session, info.id)
    assert (view.forked_from, view.forked_seq, view.attempt, view.line) == (session, info.seq, 1, 2)
    assert view.state == S.RESUMING and view.snapshot == info.id and view.generation != fence.generation
    assignment = await w.node.one("restore", view.id)
    assert assignment.snapshot is not None and assignment.snapshot.id == info.id
    assert (assignment.branch, assignment.line) == (info.seq, 2)
    fork = Fence(session=view.id, generation=assignment.generation)
    await w.report(fork, S.RUNNING)
    own = await w.act(fork)
    events = await w.log.read(view.id)
    assert [e.seq for e in events] == list(range(1, own.seq + 1))
    assert {e.session for e in events if e.seq <= info.seq} == {session}
    assert {e.session for e in events if e.seq > info.seq} == {view.id}
    assert kept.seq in [e.seq for e in events] and own.seq > info.seq
    assert next(e for e in events if e.seq == later.seq).session == view.id  # not the parent's event of that number
    created, opened, state = events[info.seq : info.seq + 3]
    assert created.data == {"agent": "tester", "forked_from": session, "seq": info.seq, "snapshot": info.id}
    assert (opened.type, opened.data["why"], opened.data["branch_seq"]) == (EventType.LINE_OPENED, "fork", info.seq)
    assert (state.data["state"], state.data["reason"]) == ("resuming", "forked")
    (told,) = await w.events(session, EventType.SESSION_FORKED)
    assert told.data == {"fork": view.id, "seq": info.seq, "snapshot": info.id}
    assert (await w.log.verify(view.id)).ok and (await w.log.verify(session)).ok


async def test_at_a_position_the_newest_snapshot_before_it_is_restored(w: World) -> None:
    session, fence = await w.start()
    info = await w.save(fence)
    tail = await w.act(fence)
    await w.act(fence)
    await w.save(fence)
    (view,) = await w.control.fork(session, tail.seq)
    assert view.snapshot == info.id and view.forked_seq == tail.seq
    events = {e.seq: e for e in await w.log.read(view.id, all_lines=True)}
    assert sorted(events) == list(range(1, view.last_seq + 1))
    assert events[tail.seq].superseded and events[tail.seq].session == session
    assert tail.seq not in await seqs(w, view.id)


async def test_a_fork_of_one_that_sleeps_sleeps(w: World) -> None:
    session, fence = await w.start()
    spec = WaitSpec(id="1.1", kind="signal", name="go", timeout_s=3600)
    first = await w.control.open_wait(fence, 1, spec)
    await w.sleep(fence, Reason.IDLE)
    views = await w.control.fork(session, n=3)
    assert [v.state for v in views] == [S.SUSPENDED] * 3 and len({v.generation for v in views}) == 3
    assert await w.node.work() == []
    for number, view in enumerate(views):
        assert (await w.control.why(view.id))["waiting_for"][0]["kind"] == "signal"
        await w.control.signal(view.id, "go", str(number).encode())
    found = {a.session: a for a in await w.node.work(5.0)}
    assert {a.action for a in found.values()} == {"restore"}
    for number, view in enumerate(views):
        fork = Fence(session=view.id, generation=found[view.id].generation)
        await w.report(fork, S.RUNNING)
        state = await w.control.open_wait(fork, 1, spec)
        assert state.done and state.payload == str(number).encode()
        assert state.deadline == first.deadline and state.url != first.url
    assert (await w.control.session(session)).state == S.SUSPENDED
    assert not [e for e in await w.events(session) if e.type == EventType.SIGNAL_RECEIVED]


async def fork_runs(w: World, session: str, at: int | str | None = None, **more: Any) -> tuple[SessionView, Fence]:
    (view,) = await w.control.fork(session, at, **more)
    _, fence = await w.back(view.id)
    return view, fence


async def test_messages_before_are_delivered_and_later_ones_only_if_wanted(w: World) -> None:
    session, fence = await w.start()
    await w.control.send(session, b"1")
    await w.control.consume(fence, 1, 1)
    info = await w.save(fence)
    second = await w.control.send(session, b"2")
    at = (await w.control.session(session)).last_seq
    await w.control.send(session, b"3")
    await w.control.signal(session, "go", b"4")
    _, fork = await fork_runs(w, session, at)
    inbox = WaitSpec(id="1.1", kind="inbox", after=1)
    state = await w.control.open_wait(fork, 1, inbox)
    assert (state.done, state.number, state.payload, state.item) == (True, 2, b"2", second.id)
    state = await w.control.open_wait(fork, 1, WaitSpec(id="1.2", kind="inbox", after=2))
    assert not state.done
    assert [m.payload for m in await w.control.inbox(fork.session)] == [b"1", b"2"]
    new = await w.control.send(fork.session, b"own")
    assert new.number == 3
    assert (await w.control.poll_wait(fork, 1, "1.2", 0)).payload == b"own"
    assert not (await w.control.open_wait(fork, 1, WaitSpec(id="1.3", kind="signal", name="go"))).done
    _, fork = await fork_runs(w, session, info.id, redeliver=True)
    assert [m.payload for m in await w.control.inbox(fork.session)] == [b"1", b"2", b"3"]
    assert (await w.control.open_wait(fork, 1, WaitSpec(id="1.3", kind="signal", name="go"))).payload == b"4"
    again = [e.data.get("repeats") for e in await w.events(fork.session, EventType.MESSAGE_RECEIVED)]
    assert again[0] is None and again[1] == second.id


async def test_waits_of_a_fork_are_its_own(w: World) -> None:
    session, fence = await w.start()
    timer = WaitSpec(id="1.1", kind="timer", timeout_s=0.0)
    await w.control.open_wait(fence, 1, timer)
    signal = WaitSpec(id="1.2", kind="signal", name="go")
    await w.control.open_wait(fence, 1, signal)
    info = await w.save(fence)
    await w.control.signal(session, "go", b"1")
    assert (await w.control.poll_wait(fence, 1, "1.2", 0)).done
    view, fork = await fork_runs(w, session, info.id)
    # What was over before is known, whoever asks again; what was open is open.
    done = await w.control.open_wait(fork, 1, timer)
    assert done.done and done.timed_out
    assert not (await w.control.open_wait(fork, 1, signal)).done
    await w.control.signal(view.id, "go", b"2")
    assert (await w.control.poll_wait(fork, 1, "1.2", 0)).payload == b"2"
    assert (await w.control.poll_wait(fence, 1, "1.2", 0)).payload == b"1"


async def test_signals_used_before_are_not_given_again(w: World) -> None:
    session, fence = await w.start()
    await w.control.signal(session, "go", b"1")
    assert (await w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="signal", name="go"))).payload == b"1"
    await w.control.signal(session, "go", b"2")
    await w.save(fence)
    (info,) = (await w.catalog.list(session))[-1:]
    _, fork = await fork_runs(w, session, info.id)
    assert (await w.control.open_wait(fork, 1, WaitSpec(id="1.2", kind="signal", name="go"))).payload == b"2"
    # The parent still has its own.
    assert (await w.control.open_wait(fence, 1, WaitSpec(id="1.2", kind="signal", name="go"))).payload == b"2"


async def test_outbox_starts_with_what_was_published(w: World) -> None:
    session, fence = await w.start()
    await w.append(fence, EventType.MESSAGE_SENT, b'"one"', message="m_one", key="send:1.1")
    info = await w.save(fence)
    await w.append(fence, EventType.MESSAGE_SENT, b'"two"', message="m_two", key="send:1.2")
    await w.save(fence)
    view, fork = await fork_runs(w, session, info.id)
    assert [m.payload for m in await w.control.outbox(view.id)] == [b'"one"']
    repeated = await w.append(fork, EventType.MESSAGE_SENT, b'"one"', message="m_x", key="send:1.1")
    assert repeated.data["message"] == "m_one" and repeated.seq <= info.seq  # a call that was under way
    await w.append(fork, EventType.MESSAGE_SENT, b'"other"', message="m_other", key="send:1.2")
    own = await w.save(fork)
    found = await w.control.outbox(view.id)
    assert [(m.number, m.payload) for m in found] == [(1, b'"one"'), (2, b'"other"')]
    assert [m.payload for m in await w.control.outbox(view.id, after=1)] == [b'"other"']
    assert [m.payload for m in await w.control.outbox(session)] == [b'"one"', b'"two"']
    grandchild, _ = await fork_runs(w, view.id, own.id)
    assert [m.payload for m in await w.control.outbox(grandchild.id)] == [b'"one"', b'"other"']


async def test_a_fork_that_dies_before_its_first_snapshot_comes_back_from_its_parents(w: World) -> None:
    session, fence = await w.start()
    await w.save(fence)
    info = await w.save(fence)
    view, fork = await fork_runs(w, session, info.id)
    lost = await w.act(fork)
    await w.control.report_death(fork, Reason.SANDBOX_DIED, "x")
    assignment, fork = await w.back(view.id)
    assert assignment.snapshot is not None and assignment.snapshot.id == info.id and assignment.line == 3
    assert lost.seq not in await seqs(w, view.id) and lost.seq in await seqs(w, view.id, all_lines=True)
    own = await w.save(fork)
    assert own.line == 3
    await w.control.report_death(fork, Reason.SANDBOX_DIED, "x")
    assignment, fork = await w.back(view.id)
    assert assignment.snapshot is not None and assignment.snapshot.id == own.id
    await w.control.report_unusable(fork, own.id, "gone")  # running already: only marked
    await w.control.report_death(fork, Reason.SANDBOX_DIED, "x")
    assignment, _ = await w.back(view.id)
    assert assignment.snapshot is not None and assignment.snapshot.id == info.id
    assert (await w.log.verify(view.id)).ok


async def test_three_generations(w: World) -> None:
    session, fence = await w.start()
    first = await w.save(fence)
    a, fork_a = await fork_runs(w, session, first.id)
    await w.act(fork_a)
    second = await w.save(fork_a)
    b, fork_b = await fork_runs(w, a.id, second.id)
    await w.act(fork_b)
    c, fork_c = await fork_runs(w, b.id, first.id)  # of its grandparent's
    assert (c.forked_from, c.snapshot, c.forked_seq) == (b.id, first.id, first.seq)
    last = await w.act(fork_c)
    events = await w.log.read(c.id, all_lines=True)
    assert [e.seq for e in events] == list(range(1, last.seq + 1))
    assert {e.session for e in events} == {session, c.id}
    events = await w.log.read(b.id)
    assert {e.session for e in events} == {session, a.id, b.id}
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    for one in (session, a.id, b.id, c.id):
        assert (await w.log.verify(one)).ok, one


async def test_a_parent_stays_while_it_has_forks(w: World) -> None:
    session, fence = await w.start()
    info = await w.save(fence)
    views = await w.control.fork(session, info.id, 2)
    for force in (False, True):
        with pytest.raises(Conflict, match=views[0].id) as refused:
            await w.control.erase(session, force=force)
        assert "rethaw rm" in str(refused.value)
    assert (await w.control.session(session)).state == S.RUNNING
    for view in views:
        await w.control.erase(view.id, force=True)
    await w.control.erase(session, force=True)


async def test_snapshots_that_a_fork_needs_are_kept(w: World) -> None:
    session, fence = await w.start()
    info = await w.save(fence)
    for _ in range(6):
        await w.act(fence)
        await w.save(fence)
    view, fork = await fork_runs(w, session, info.id)
    await w.sql("UPDATE snapshots SET created_at = now() - interval '40 hours'")
    await w.sql("UPDATE snapshots SET created_at = created_at + interval '1 second' WHERE id = %s", info.id)
    gone = {s.id for s in await w.catalog.superfluous(w.node.id)}
    assert info.id not in gone and gone
    await w.report(fork, S.COMPLETED, exit_code=0)
    gone = {s.id for s in await w.catalog.superfluous(w.node.id)}
    assert info.id in gone
    assert (await w.control.session(view.id)).state == S.COMPLETED


@pytest.mark.parametrize("end", [S.COMPLETED, S.FAILED, S.CANCELLED, S.RUNNING, S.WAITING, S.SUSPENDED])
async def test_a_rewind_from_any_state(w: World, end: State) -> None:
    session, fence = await w.start()
    await w.act(fence)
    info = await w.save(fence)
    left = await w.act(fence)
    await w.save(fence)
    if end == S.SUSPENDED:
        await w.control.suspend(session)
        await w.node.one("suspend", session)
        await w.sleep(fence, Reason.REQUESTED)
    elif end != S.RUNNING:
        await w.report(fence, end)
    view = await w.control.rewind(session, info.id)
    assert (view.state, view.reason, view.line, view.snapshot) == (S.RESUMING, Reason.REWOUND, 2, info.id)
    assignment, new = await w.back(session)
    assert assignment.snapshot is not None and assignment.snapshot.id == info.id
    assert assignment.branch is not None and assignment.branch >= left.seq
    await w.act(new)
    events = {e.seq: e for e in await w.log.read(session, all_lines=True)}
    assert sorted(events) == list(range(1, len(events) + 1))
    assert events[left.seq].superseded
    opened = next(e for e in events.values() if e.type == EventType.LINE_OPENED)
    assert (opened.data["why"], opened.data["branch_seq"], opened.data["seq"]) == ("rewind", info.seq, info.seq)
    if end in (S.RUNNING, S.WAITING):
        with pytest.raises(Exception, match="generation"):
            await w.act(fence)
    await w.report(new, S.COMPLETED, exit_code=0)
    assert (await w.log.verify(session)).ok


async def test_after_a_rewind_later_messages_and_signals_are_gone_unless_wanted(w: World) -> None:
    session, fence = await w.start()
    await w.control.send(session, b"1")
    info = await w.save(fence)
    at = (await w.control.session(session)).last_seq
    await w.control.send(session, b"2")
    await w.control.signal(session, "go", b"3")
    wait = WaitSpec(id="1.1", kind="signal", name="go")
    assert (await w.control.open_wait(fence, 1, wait)).done
    await w.control.rewind(session, at)
    _, fence = await w.back(session)
    assert (await w.control.open_wait(fence, 1, WaitSpec(id="1.2", kind="inbox", after=0))).payload == b"1"
    assert not (await w.control.open_wait(fence, 1, WaitSpec(id="1.3", kind="inbox", after=1))).done
    assert not (await w.control.open_wait(fence, 1, wait)).done
    new = await w.control.send(session, b"new")
    state = await w.control.poll_wait(fence, 1, "1.3", 0)
    assert (state.payload, state.number) == (b"new", new.number)
    # A crash afterwards does not bring them back.
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "x")
    _, fence = await w.back(session)
    assert not (await w.control.open_wait(fence, 1, wait)).done
    assert (await w.control.open_wait(fence, 1, WaitSpec(id="1.3", kind="inbox", after=1))).payload == b"new"
    await w.control.rewind(session, info.id, redeliver=True)
    _, fence = await w.back(session)
    assert [m.payload for m in await w.control.inbox(session)] == [b"1", b"new"]


async def test_a_rewind_of_a_fork_to_before_its_beginning(w: World) -> None:
    session, fence = await w.start()
    first = await w.save(fence)
    await w.act(fence)
    second = await w.save(fence)
    view, fork = await fork_runs(w, session, second.id)
    own = await w.act(fork)
    await w.save(fork)
    await w.control.rewind(view.id, first.id)
    assignment, fork = await w.back(view.id)
    assert assignment.snapshot is not None and assignment.snapshot.id == first.id
    last = await w.act(fork)
    assert own.seq not in await seqs(w, view.id) and last.seq in await seqs(w, view.id)
    every = await seqs(w, view.id, all_lines=True)
    assert every == list(range(1, last.seq + 1))
    await w.control.report_death(fork, Reason.SANDBOX_DIED, "x")
    assignment, _ = await w.back(view.id)
    assert assignment.snapshot is not None and assignment.snapshot.id == first.id
    assert (await w.log.verify(view.id)).ok


async def test_forking_the_line_that_a_rewind_left(w: World) -> None:
    session, fence = await w.start()
    info = await w.save(fence)
    old = await w.act(fence)
    last = await w.act(fence)
    await w.save(fence)
    await w.control.rewind(session, info.id)
    _, fence = await w.back(session)
    await w.act(fence)
    view, _ = await fork_runs(w, session, old.seq)
    assert view.snapshot == info.id and view.line == 2
    view, _ = await fork_runs(w, session, last.seq)  # where the second snapshot is
    assert old.seq in await seqs(w, view.id)


async def test_what_cannot_be_forked_or_rewound(w: World) -> None:
    session, fence = await w.start()
    with pytest.raises(Conflict, match="no snapshot"):
        await w.control.fork(session, 1)
    await w.act(fence)
    info = await w.save(fence)
    other, other_fence = await w.start()
    foreign = await w.save(other_fence)
    last = (await w.control.session(session)).last_seq
    cases: list[tuple[Any, type[Exception], str]] = [
        (0, InvalidInput, f"no event 0 .*1 to {last}"),
        (last + 1, InvalidInput, f"no event {last + 1} .*1 to {last}"),
        ("-5", InvalidInput, "no event -5"),
        (1, InvalidInput, f"event 1 .*{info.seq}"),
        ("snap_nothing", NotFound, "snap_nothing"),
        ("", NotFound, "''"),
        (foreign.id, InvalidInput, f"{foreign.id} belongs to session {other}, not to {session}"),
    ]
    for at, kind, said in cases:
        with pytest.raises(kind, match=said):
            await w.control.fork(session, at)
        with pytest.raises(kind, match=said):
            await w.control.rewind(session, at)
    for n in (0, -1, 1001):
        with pytest.raises(InvalidInput, match=f"{n} forks"):
            await w.control.fork(session, n=n)
    with pytest.raises(NotFound):
        await w.control.fork("s_nobody", info.id)
    with pytest.raises(NotFound):
        await w.control.rewind("s_nobody", info.id)
    await w.catalog.mark_unusable(fence, info.id, "damaged")
    with pytest.raises(Exception, match="damaged"):
        await w.control.fork(session, info.id)


async def test_a_later_fork_of_a_parent_that_went_on_has_lines_of_its_own(w: World) -> None:
    """Lines of a parent opened after the fork have the numbers of the fork's own."""
    session, fence = await w.start()
    info = await w.save(fence)
    view, fork = await fork_runs(w, session, info.id)
    mine = await w.act(fork)
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "x")
    _, fence = await w.back(session)
    theirs = [await w.act(fence) for _ in range(4)]
    assert {e.line for e in theirs} == {2} == {mine.line}
    await w.control.open_wait(fence, 1, WaitSpec(id="1.9", kind="timer", timeout_s=100.0))
    await w.save(fence)
    assert not {e.seq for e in theirs} & {e.seq for e in await w.log.read(view.id) if e.session == session}
    state = await w.control.open_wait(fork, 1, WaitSpec(id="1.9", kind="timer", timeout_s=50.0))
    assert state.deadline is not None
    assert (await w.events(view.id, EventType.WAIT_OPENED))[-1].session == view.id
    await w.control.report_death(fork, Reason.SANDBOX_DIED, "x")
    assignment, _ = await w.back(view.id)
    assert assignment.snapshot is not None and assignment.snapshot.id == info.id


async def test_a_hundred_forks_take_few_statements(w: World) -> None:
    session, fence = await w.start()
    for i in range(20):
        await w.control.open_wait(fence, 1, WaitSpec(id=f"1.{i}", kind="signal", name=f"n{i}"))
    await w.sleep(fence, Reason.IDLE)
    views = await w.control.fork(session, n=100)
    assert len({v.id for v in views}) == 100
    assert len(await w.events(session, EventType.SESSION_FORKED)) == 100
    counts = await w.sql("SELECT count(*) FROM waits WHERE state = 'open'")
    assert counts[0][0] == 2020


async def test_a_snapshot_that_is_given_up_is_no_longer_gone_back_to(w: World) -> None:
    session, fence = await w.start()
    info = await w.save(fence)
    for _ in range(4):
        await w.act(fence)
        await w.save(fence)
    await w.sql("UPDATE snapshots SET created_at = now() - interval '40 hours' WHERE id = %s", info.id)
    await w.sql("UPDATE snapshots SET stored_bytes = 1::bigint << 50 WHERE id = %s", info.id)
    assert [s.id for s in await w.catalog.superfluous(w.node.id)] == [info.id]
    with pytest.raises(NotFound, match=info.id):
        await w.control.fork(session, info.id)
    with pytest.raises(InvalidInput, match="first one"):
        await w.control.rewind(session, info.seq)
    assert [s.id for s in await w.catalog.superfluous(w.node.id)] == [info.id]  # the node has not said that it is gone
    await w.catalog.forget(info.id)


async def test_a_snapshot_that_fails_a_fork_is_still_its_parents(w: World) -> None:
    session, fence = await w.start()
    older = await w.save(fence)
    await w.act(fence)
    info = await w.save(fence)
    (view,) = await w.control.fork(session, info.id)
    restore = await w.node.one("restore", view.id)
    fork = Fence(session=view.id, generation=restore.generation)
    await w.control.report_unusable(fork, info.id, "no memory just now")
    assignment, fork = await w.back(view.id)
    assert assignment.snapshot is not None and assignment.snapshot.id == older.id
    (told, again) = [e for e in await w.log.read(view.id) if e.type == EventType.SNAPSHOT_UNUSABLE]
    assert told.data["snapshot"] == again.data["snapshot"] == info.id
    await w.control.report_death(fork, Reason.SANDBOX_DIED, "x")
    restore = await w.node.one("restore", view.id)
    assert restore.snapshot is not None and restore.snapshot.id == older.id
    fork = Fence(session=view.id, generation=restore.generation)
    await w.control.report_unusable(fork, older.id, "that neither")
    boot = await w.node.one("start", view.id)
    assert (boot.attempt, boot.boot and boot.boot.fresh) == (2, True)
    fork = Fence(session=view.id, generation=boot.generation)
    await w.report(fork, S.RUNNING)
    assert [e.seq for e in await w.log.read(view.id)][: older.seq] == list(range(1, older.seq + 1))
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "x")
    assignment, _ = await w.back(session)
    assert assignment.snapshot is not None and assignment.snapshot.id == info.id


async def test_a_sleeping_fork_shows_the_snapshot_that_it_sleeps_in(w: World) -> None:
    session, fence = await w.start()
    first = await w.save(fence)
    await w.act(fence)
    info = await w.sleep(fence, Reason.IDLE)
    (view,) = await w.control.fork(session)
    assert (await w.control.snapshot(view.id)).id == info.id
    assert [s.id for s in await w.catalog.list(view.id)] == [first.id, info.id]
    (early,) = await w.control.fork(session, first.id)
    assert [s.id for s in await w.catalog.list(early.id)] == [first.id]
    (child,) = await w.control.fork(view.id)
    assert (child.state, child.snapshot, child.forked_from) == (S.SUSPENDED, info.id, view.id)


async def test_a_rewind_to_an_older_attempt(w: World) -> None:
    session, fence = await w.start()
    first = await w.save(fence)
    await w.sql("UPDATE snapshots SET unusable = 'for now'")
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "x")
    assignment, fence = await w.back(session, "start")
    while assignment.attempt == 1:  # boots of the first attempt, until the rule gives it up or makes it anew
        await w.control.suspend(session)
        await w.node.one("suspend", session)
        await w.sleep(fence, Reason.REQUESTED)
        await w.sql("UPDATE snapshots SET unusable = 'for now'")
        view = await w.control.resume(session)
        assert view.attempt == 2
        assignment, fence = await w.back(session, "start")
    second = await w.save(fence)
    await w.sql("UPDATE snapshots SET unusable = NULL")
    await w.control.rewind(session, first.id)
    assignment, fence = await w.back(session)
    assert (assignment.attempt, assignment.snapshot and assignment.snapshot.id) == (1, first.id)
    await w.act(fence)
    await w.sql("UPDATE snapshots SET unusable = 'again'")
    await w.control.suspend(session)
    await w.node.one("suspend", session)
    await w.sleep(fence, Reason.REQUESTED)
    await w.sql("UPDATE snapshots SET unusable = 'again'")
    assert (await w.control.resume(session)).attempt == 3  # the second one's ids are not used again
    await w.back(session, "start")
    await w.sql("UPDATE snapshots SET unusable = NULL")
    (view,) = await w.control.fork(session, second.id)
    assert (view.attempt, view.snapshot) == (2, second.id)
    assert (await w.log.verify(session)).ok
