"""Versions of agents and upgrades by control: the registry, what the new attempt is given, the way back, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from control_fixtures import (  # noqa: F401 - fixtures
    AGENT,
    World,
    cluster_fixture,
    dsn_fixture,
    eventually,
    world_fixture,
)

from rethaw.model.enums import EventType, Reason, State
from rethaw.model.errors import Conflict, InvalidInput, KeyReused, NotFound
from rethaw.model.types import AgentSpec, Assignment, Fence, RetrySpec, StartOptions, WaitSpec
from rethaw.model.versions import Upgraded, digest

S = State
PINNED = "3d78fed2f59704c2d38bf5734ea65229608594db767d598c9ebf8a07f7bb3d58"
OLD = AGENT
NEW = AGENT.model_copy(update={"command": ("/bin/false",), "memory_bytes": 96 << 20})


async def upgraded(
    w: World, session: str, agent: AgentSpec | None = NEW, **more: Any
) -> tuple[Upgraded, Assignment, Fence]:
    """Upgrade one that needs no snapshot for it, and let the new attempt run."""
    done = await w.control.versions.upgrade(session, agent, **more)
    assignment, fence = await w.back(session, "start")
    return done, assignment, fence


def test_a_digest_is_of_what_the_author_wrote() -> None:
    assert digest(OLD) == digest(OLD.model_copy()) != digest(NEW)
    assert digest(OLD.model_copy(update={"env": {"RETHAW_TEMPLATE": "warm"}})) == digest(OLD)
    auto = OLD.model_copy(update={"template": "auto"})
    made = OLD.model_copy(update={"env": {"RETHAW_TEMPLATE": "auto.tester.0"}})
    assert digest(made) == digest(auto) != digest(OLD)
    # Only what differs from a default counts, or each new field of a later version would make a new version of everything.
    assert digest(AgentSpec(name="x", command=("y",))) == PINNED


async def test_versions_are_counted_and_deployed(w: World) -> None:
    with pytest.raises(NotFound, match="no agent 'tester'"):
        await w.control.versions.get("tester")
    session, _ = await w.start()
    assert (await w.control.session(session)).version == 1
    with pytest.raises(NotFound, match="never deployed"):
        await w.control.versions.get("tester")  # a run moves nothing
    made, new = await w.control.versions.deploy(NEW)
    assert (made.version, new, made.current, made.pinned) == (2, True, True, False)
    again, new = await w.control.versions.deploy(NEW)
    assert (again.version, new) == (2, False)
    assert (await w.control.versions.deploy(OLD))[
        0
    ].version == 1  # deployed anew: it is what starts by name from now on
    assert (await w.control.versions.get("tester")).spec == OLD
    assert (await w.control.versions.get("tester", 2)).spec == NEW
    with pytest.raises(NotFound, match="no version 3, only 1 to 2"):
        await w.control.versions.get("tester", 3)
    assert (await w.control.versions.pin("tester", 2)).pinned
    await w.control.versions.deploy(OLD)
    assert (await w.control.versions.get("tester")).version == 2  # pinned
    assert (await w.control.versions.pin("tester", None)).version == 1
    shown = await w.control.versions.show("tester")
    assert [(v.version, v.sessions) for v in shown.versions] == [(2, 0), (1, 1)]
    assert [(r.session, r.version) for r in shown.sessions] == [(session, 1)]
    (row,) = await w.control.versions.every()
    assert (row.agent, row.version, row.sessions) == ("tester", 1, 1)
    for name in ("nobody", "tester'"):
        with pytest.raises(NotFound, match="no agent"):
            await w.control.versions.show(name)


async def test_how_it_is_started_is_what_was_deployed_last(w: World) -> None:
    await w.control.versions.deploy(OLD, StartOptions(queue="slow", priority=3, tags=("a",)))
    assert (await w.control.versions.get("tester")).starting == StartOptions(queue="slow", priority=3, tags=("a",))
    version, new = await w.control.versions.deploy(OLD)
    assert (version.version, new, version.starting) == (1, False, StartOptions())


async def test_the_new_version_has_the_context_of_the_old_one(w: World) -> None:
    session, fence = await w.start(topic="x")
    await w.control.send(session, b'"one"')
    await w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="inbox", after=0))
    await w.control.consume(fence, 1, 1)
    await w.append(fence, EventType.MESSAGE_SENT, b'"answer"', message="m_1", key="send:1.2")
    await w.control.open_wait(fence, 1, WaitSpec(id="1.3", kind="inbox", after=1))
    await w.control.send(session, b'"two"')
    await w.control.consume(fence, 1, 2)  # its turn is cut off
    await w.control.signal(session, "unused", b"3")
    kept = await w.act(fence)
    done, assignment, new = await upgraded(w, session, files="fresh")
    assert (done.from_version, done.to_version, done.changed, done.files) == (1, 2, True, None)
    assert (assignment.agent, assignment.attempt, assignment.files) == (NEW, 2, None)
    assert assignment.boot is not None
    assert (assignment.boot.args, assignment.boot.fresh, assignment.boot.cursor) == ({"topic": "x"}, True, 1)
    view = await w.control.session(session)
    assert (view.version, view.version_digest, view.agent) == (2, digest(NEW), NEW)
    with pytest.raises(Exception, match="generation"):
        await w.act(fence)
    state = await w.control.open_wait(new, 2, WaitSpec(id="2.1", kind="inbox", after=1))
    assert state.payload == b'"two"'
    assert (await w.control.open_wait(new, 2, WaitSpec(id="2.2", kind="signal", name="unused"))).payload == b"3"
    assert [m.payload for m in await w.control.outbox(session)] == [b'"answer"']
    path = await w.log.read(session)
    assert kept.seq in [e.seq for e in path]
    (told,) = [e for e in path if e.type == EventType.SESSION_UPGRADED]
    assert told.data == {"from_version": 1, "to_version": 2, "at": done.at} and told.attempt == 2
    assert (await w.log.verify(session)).ok


async def test_of_one_that_runs_a_snapshot_is_taken_for_its_files(w: World) -> None:
    import asyncio

    session, fence = await w.start()
    await w.act(fence)
    asked = asyncio.ensure_future(w.control.versions.upgrade(session, NEW))
    await w.node.one("snapshot", session)
    info = await w.save(fence, why="requested")
    late = await w.append(fence, EventType.MESSAGE_SENT, b"1", message="m_late", key="send:1.1")
    done = await asked
    assert done.files == info.id
    assignment, new = await w.back(session, "start")
    assert assignment.files is not None and assignment.files.id == info.id
    # What came between the two was of neither, unless the snapshot was the later one.
    if done.at == info.seq:
        assert late.seq not in [e.seq for e in await w.log.read(session)]
    # It is kept while the session may need it, and given again after a crash before the new attempt's first snapshot.
    await w.control.report_death(new, Reason.SANDBOX_DIED, "x")
    assignment, new = await w.back(session, "start")
    assert assignment.files is not None and assignment.files.id == info.id and assignment.agent == NEW
    await w.sql("UPDATE snapshots SET created_at = now() - interval '40 hours'")
    assert info.id not in {s.id for s in await w.catalog.superfluous(w.node.id)}
    with pytest.raises(Conflict, match="still needs"):
        await w.catalog.forget(info.id)
    # From its own snapshot on it recovers as any other.
    own = await w.save(new)
    await w.control.report_death(new, Reason.SANDBOX_DIED, "x")
    assignment, _ = await w.back(session)
    assert assignment.snapshot is not None and assignment.snapshot.id == own.id
    assert (assignment.agent, assignment.attempt) == (NEW, 2)
    events = [e.type for e in await w.log.read(session)]
    assert events.count(EventType.SESSION_UPGRADED) == 1


async def test_files_that_cannot_be_read_are_taken_from_the_parent(w: World) -> None:
    session, fence = await w.start()
    first = await w.save(fence)
    await w.act(fence)
    second = await w.save(fence, parent=first.id)
    await w.sleep(fence, Reason.IDLE)
    (last,) = (await w.catalog.list(session))[-1:]
    await w.sql("UPDATE snapshots SET parent = %s WHERE id = %s", second.id, last.id)
    done = await w.control.versions.upgrade(session, NEW)
    for expected, following in ((last.id, second.id), (second.id, first.id), (first.id, None)):
        assignment, new = await w.back(session, "start")
        assert assignment.files is not None and assignment.files.id == expected, done
        await w.control.report_unusable(new, expected, "pages: hash differs")
        assert (await w.sql("SELECT files_from FROM sessions"))[0][0] == following
    assignment, _ = await w.back(session, "start")
    assert assignment.files is None and assignment.attempt == 2
    lost = [e.data["snapshot"] for e in await w.events(session, EventType.SNAPSHOT_UNUSABLE)]
    assert set(lost) == {first.id, second.id, last.id}
    assert (await w.log.verify(session)).ok


async def test_one_that_waits_for_a_retry_begins_at_once_with_the_new_version(w: World) -> None:
    patient = OLD.model_copy(update={"retries": RetrySpec(max=3, delay_s=3600.0)})
    session, fence = await w.start(patient)
    await w.report(fence, S.FAILED, reason=Reason.EXITED, exit_code=1)
    view = await w.control.session(session)
    assert (view.state, view.attempt) == (S.QUEUED, 2)
    done = await w.control.versions.upgrade(session, NEW)
    assignment = await w.node.one("start", session)
    assert (assignment.agent, assignment.attempt, done.changed) == (NEW, 2, True)
    assert await w.control.agent_of(session, 1) == patient and await w.control.agent_of(session, 2) == NEW


async def test_an_old_callback_address_completes_the_wait_of_that_name(w: World) -> None:
    session, fence = await w.start()
    old = await w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="signal", name="approval"))
    await w.sleep(fence, Reason.IDLE)
    _, assignment, new = await upgraded(w, session)
    assert assignment.files is not None
    spec = WaitSpec(id="2.1", kind="signal", name="approval")
    fresh = await w.control.open_wait(new, 2, spec)
    assert not fresh.done and old.url is not None and fresh.url != old.url
    await w.sleep(new, Reason.IDLE)
    token = old.url.rpartition("/")[2]
    await w.control.callback(token, b'{"ok": true}')
    _, new = await w.back(session)
    assert (await w.control.open_wait(new, 2, spec)).payload == b'{"ok": true}'
    with pytest.raises(Conflict, match="used already"):
        await w.control.callback(token, b"2")


@pytest.mark.parametrize("end", [S.COMPLETED, S.FAILED, S.CANCELLED])
async def test_an_ended_session_is_revived(w: World, end: State) -> None:
    session, fence = await w.start()
    info = await w.save(fence)
    last = await w.act(fence)
    await w.report(fence, end, reason=Reason.EXITED, exit_code=1)
    with pytest.raises(Conflict, match="runs version 1 already"):
        await w.control.versions.upgrade(session, OLD)
    done, assignment, new = await upgraded(w, session)
    assert (assignment.attempt, done.files) == (2, info.id)
    assert last.seq in [e.seq for e in await w.log.read(session)]
    await w.report(new, S.COMPLETED, reason=Reason.EXITED, exit_code=0)
    view = await w.control.session(session)
    assert (view.state, view.exit_code, view.attempt) == (S.COMPLETED, 0, 2)


async def test_after_a_crash_loop_what_nobody_saw_is_left(w: World) -> None:
    session, fence = await w.start()
    info = await w.save(fence)
    await w.append(fence, EventType.MESSAGE_SENT, b"1", message="m_1", key="send:1.1")
    await w.control.report_death(fence, Reason.OUT_OF_MEMORY, "x")
    while (await w.control.session(session)).state != S.FAILED:
        assignment = (await w.node.work(5.0))[-1]
        fence = Fence(session=session, generation=assignment.generation)
        await w.report(fence, S.RUNNING)
        await w.control.report_death(fence, Reason.OUT_OF_MEMORY, "x")
    await w.node.work()
    done, _, _ = await upgraded(w, session)
    assert (done.at, done.files) == (info.seq, info.id)
    assert await w.control.outbox(session) == []


async def test_from_before_the_damage(w: World) -> None:
    session, fence = await w.start()
    await w.control.send(session, b"1")
    info = await w.save(fence)
    good = await w.act(fence)
    damage = await w.act(fence)
    await w.control.send(session, b"2")
    await w.save(fence)
    done, assignment, new = await upgraded(w, session, at=good.seq)
    assert (done.at, done.files) == (good.seq, info.id)
    path = [e.seq for e in await w.log.read(session)]
    assert good.seq in path and damage.seq not in path
    every = {e.seq: e for e in await w.log.read(session, all_lines=True)}
    assert every[damage.seq].superseded
    assert assignment.boot is not None and assignment.boot.cursor == 0
    assert [m.payload for m in await w.control.inbox(session)] == [b"1"]  # the later one came to the damaged line
    assert (await w.control.open_wait(new, 2, WaitSpec(id="2.1", kind="inbox", after=0))).payload == b"1"
    # The same version can be begun anew from there, too.
    done, assignment, _ = await upgraded(w, session, at=good.seq)
    assert (done.from_version, done.to_version, done.changed, assignment.attempt) == (2, 2, True, 3)
    for at in (0, 9999):
        with pytest.raises(InvalidInput, match=f"no event {at}"):
            await w.control.versions.upgrade(session, NEW, at=at)
    assert (await w.log.verify(session)).ok


async def test_going_back_takes_the_version_whose_memory_it_is(w: World) -> None:
    session, fence = await w.start()
    before = await w.save(fence)
    _, _, fence = await upgraded(w, session, files="fresh")
    after = await w.save(fence)
    tip = await w.act(fence)
    # A fork from before the upgrade runs the old code, one from after it the new.
    (old,) = await w.control.fork(session, before.id)
    assignment, _ = await w.back(old.id)
    assert (assignment.agent, old.version, old.attempt) == (OLD, 1, 1)
    (new,) = await w.control.fork(session, after.id)
    assignment, new_fork = await w.back(new.id)
    assert (assignment.agent, new.version, new.attempt) == (NEW, 2, 2)
    assert (await w.sql("SELECT memory_bytes FROM sessions WHERE id = %s", old.id))[0][0] == OLD.memory_bytes
    # The fork of after knows of before as well.
    await w.control.rewind(new.id, before.id)
    assignment, new_fork = await w.back(new.id)
    assert assignment.agent == OLD
    await w.control.report_death(new_fork, Reason.SANDBOX_DIED, "x")
    assignment, _ = await w.back(new.id)
    assert assignment.agent == OLD and assignment.snapshot is not None
    # So does the session itself; there and back, and a fresh boot in between is of the version that it came from.
    await w.control.rewind(session, before.id)
    assignment, fence = await w.back(session)
    assert (assignment.agent, (await w.control.session(session)).version) == (OLD, 1)
    await w.sql("UPDATE snapshots SET unusable = 'x' WHERE id = %s", before.id)
    await w.report(fence, S.SUSPENDING, reason=Reason.IDLE)
    await w.sql("UPDATE sessions SET state = 'suspended' WHERE id = %s", session)
    await w.control.resume(session)
    assignment, fence = await w.back(session, "start")
    assert (assignment.agent, assignment.attempt) == (OLD, 3)
    third = await w.save(fence)
    await w.control.rewind(session, tip.seq)
    assignment, fence = await w.back(session)
    assert assignment.agent == NEW and assignment.snapshot is not None and assignment.snapshot.id == after.id
    await w.control.rewind(session, third.id)
    assignment, _ = await w.back(session)
    assert assignment.agent == OLD
    for snapshot, agent in ((before, OLD), (after, NEW), (third, OLD)):
        assert await w.control.agent_of(session, snapshot.attempt) == agent
        assert (await w.control.described(snapshot))["agent"] == agent.model_dump(mode="json")
    for one in (session, old.id, new.id):
        assert (await w.log.verify(one)).ok


async def test_a_downgrade_is_the_same(w: World) -> None:
    session, _ = await w.start()
    await w.control.versions.deploy(NEW)
    done, assignment, _ = await upgraded(w, session, None, files="fresh")
    assert (done.to_version, assignment.agent) == (2, NEW)
    done, assignment, _ = await upgraded(w, session, None, version=1, files="fresh")
    assert (done.from_version, done.to_version, assignment.agent, assignment.attempt) == (2, 1, OLD, 3)
    done = await w.control.versions.upgrade(session, None, 1)
    assert not done.changed and await w.node.work() == []


async def test_its_key_still_means_it(w: World) -> None:
    session, _ = await w.start(key="k", topic=1)
    await w.control.versions.upgrade(session, NEW, files="fresh")
    for agent in (OLD, NEW):
        view, new = await w.control.create(agent, {"topic": 1}, "k")
        assert (view.id, new) == (session, False)
    with pytest.raises(KeyReused):
        await w.control.create(NEW, {"topic": 2}, "k")


async def test_one_that_a_person_suspended_stays_so(w: World) -> None:
    session, fence = await w.start()
    await w.control.suspend(session)
    await w.node.one("suspend", session)
    await w.sleep(fence, Reason.REQUESTED)
    _, _, new = await upgraded(w, session)
    await w.node.one("suspend", session)
    await w.sleep(new, Reason.REQUESTED)
    view = await w.control.session(session)
    assert (view.state, view.version) == (S.SUSPENDED, 2)


async def test_one_that_has_not_begun_begins_with_the_new_version(w: World) -> None:
    await w.larger_node_away()
    big = OLD.model_copy(update={"memory_bytes": 1 << 50})
    view, _ = await w.control.create(big, {}, None)
    assert view.state == S.QUEUED
    with pytest.raises(Conflict, match="nothing to go back to"):
        await w.control.versions.upgrade(view.id, NEW, at=1)
    done = await w.control.versions.upgrade(view.id, NEW)
    assignment = await w.node.one("start", view.id)
    assert (assignment.agent, assignment.attempt, done.changed) == (NEW, 1, True)
    assert assignment.boot is not None and not assignment.boot.fresh


async def test_what_is_refused(w: World) -> None:
    session, _ = await w.start()
    other = NEW.model_copy(update={"name": "other"})
    with pytest.raises(InvalidInput, match=r"of agent tester, not of other.*name=\"tester\""):
        await w.control.versions.upgrade(session, other)
    with pytest.raises(NotFound, match="never deployed"):
        await w.control.versions.upgrade(session)
    with pytest.raises(NotFound, match="no version 7"):
        await w.control.versions.upgrade(session, None, 7)
    with pytest.raises(NotFound, match="s_nobody"):
        await w.control.versions.upgrade("s_nobody", NEW)
    await w.control.cancel(session)
    with pytest.raises(Conflict, match="being cancelled"):
        await w.control.versions.upgrade(session, NEW)
    template = await w.control.warm.create("warm", OLD, {})
    with pytest.raises(Conflict, match="template rm"):
        await w.control.versions.upgrade(template.session, NEW)


async def test_one_that_began_from_a_template_finds_its_arguments_again(w: World) -> None:
    template = await w.control.warm.create("warm", OLD, {})
    _, fence = await w.back(template.session, "start")
    await w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="signal", name="rethaw.start"))
    info = await w.save(fence)
    await w.control.warm.ready(template, info.id, "call")
    view, _ = await w.control.warm.start("warm", b'{"topic": 1}', None)
    await w.back(view.id)
    assert view.version == 1
    _, assignment, _ = await upgraded(w, view.id, files="fresh")
    assert assignment.agent == NEW.model_copy(update={"env": {"RETHAW_TEMPLATE": "warm"}})
    assert (await w.control.session(view.id)).version == 2
    assert not (await w.control.versions.upgrade(view.id, NEW)).changed


async def test_the_result_of_a_former_version_is_not_the_new_ones(w: World) -> None:
    session, fence = await w.start()
    await w.append(fence, EventType.SESSION_RESULT, b'"old"', key="result:1.1")
    await w.report(fence, S.COMPLETED, reason=Reason.EXITED, exit_code=0)
    assert (await w.control.result(session))[1] == b'"old"'
    _, _, new = await upgraded(w, session)
    await w.report(new, S.FAILED, reason=Reason.EXITED, exit_code=1)
    assert (await w.control.result(session))[1] is None
