"""Sessions that agents spawn, and forks that they make of themselves, as control keeps them: once, whatever dies when."""

from __future__ import annotations

import json
from typing import Any

import pytest
from control_fixtures import (  # noqa: F401 - fixtures
    AGENT,
    World,
    cluster_fixture,
    dsn_fixture,
    world_fixture,
)

from rethaw.model.enums import Desired, EventType, Reason, State
from rethaw.model.errors import Conflict, InvalidInput, NotFound
from rethaw.model.types import AgentSpec, Fence, RetrySpec, WaitPart, WaitSpec, WaitState

S = State
WORKER = AGENT.model_copy(update={"name": "worker"})
BOSS = AGENT.model_copy(update={"name": "boss", "agents": {"worker": WORKER}})


async def spawn(w: World, fence: Fence, call: str = "1.1", agent: str = "worker", **args: Any) -> str:
    return await w.control.spawn(fence, 1, call, agent, args)


async def await_(w: World, fence: Fence, *children: str, ident: str = "1.9", kind: Any = "any") -> WaitState:
    parts = tuple(WaitPart(kind="child", name=child) for child in children)
    return await w.control.open_wait(fence, 1, WaitSpec(id=ident, kind=kind, parts=parts))


async def exists(w: World, session: str) -> bool:
    try:
        await w.control.session(session)
    except NotFound:
        return False
    return True


async def begin(w: World, child: str) -> Fence:
    """Run the child, which has just been created."""
    assignment = await w.node.one("start", child)
    fence = Fence(session=child, generation=assignment.generation)
    await w.report(fence, S.RUNNING)
    return fence


async def born(w: World, fence: Fence, call: str = "1.1", **args: Any) -> tuple[str, Fence]:
    """A child of the fence's session, running."""
    child = await spawn(w, fence, call, **args)
    await w.save(fence)
    await w.loops.fire()
    return child, await begin(w, child)


async def complete(w: World, fence: Fence, result: bytes = b"1") -> None:
    await w.append(fence, EventType.SESSION_RESULT, result)
    await w.report(fence, S.COMPLETED, reason=Reason.EXITED, exit_code=0)


async def crash(w: World, session: str, fence: Fence) -> Fence:
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "killed")
    return (await w.back(session))[1]


async def test_a_child_is_created_once_a_snapshot_holds_it(w: World) -> None:
    session, fence = await w.start(BOSS)
    child = await spawn(w, fence, n=1)
    assert await spawn(w, fence, n=1) == child  # repeated after a lost answer
    await w.loops.fire()
    assert not await exists(w, child)
    await w.save(fence)
    for _ in range(3):
        await w.loops.fire()
    view = await w.control.session(child)
    assert (view.parent, view.agent.name, view.state) == (session, "worker", S.STARTING)
    assert set(view.agent.agents) == {"boss"}  # it may spawn what its parent may
    (event,) = await w.events(session, EventType.CHILD_SPAWNED)
    assert event.data == {"child": child, "agent": "worker"}
    assert (await w.node.one("start", child)).boot.args == {"n": 1}  # type: ignore[union-attr]


async def test_the_same_call_on_another_line_is_the_same_child(w: World) -> None:
    session, fence = await w.start(BOSS)
    await w.act(fence)
    first = await w.save(fence)
    child, _ = await born(w, fence, n=1)
    await w.control.rewind(session, first.id)  # a life that knows nothing of it
    _, fence = await w.back(session)
    assert await w.events(session, EventType.CHILD_SPAWNED) == []
    assert await spawn(w, fence, n=1) == child
    assert await spawn(w, fence, "1.2", n=1) != child
    await w.save(fence)
    await w.loops.fire()
    assert len([v for v in (await w.control.list())[0] if v.parent == session]) == 2


async def test_what_a_crash_took_back_is_never_created(w: World) -> None:
    session, fence = await w.start(BOSS)
    await w.act(fence)
    await w.save(fence)
    lost = await spawn(w, fence, n=1)
    fence = await crash(w, session, fence)
    other = await spawn(w, fence, n=2)  # the agent went another way
    await w.save(fence)
    await w.loops.fire()
    assert not await exists(w, lost)
    assert await exists(w, other)


async def test_its_end_completes_the_wait_and_wakes_the_parent(w: World) -> None:
    session, fence = await w.start(BOSS)
    child = await spawn(w, fence)
    assert not (await await_(w, fence, child)).done  # it does not exist yet
    await w.save(fence)
    await w.loops.fire()
    other = await begin(w, child)
    await w.sleep(fence, Reason.IDLE)
    await complete(w, other, b'{"sum": 1.10}')
    assert (await w.control.session(session)).state == S.SUSPENDED
    await w.loops.fire()
    _, fence = await w.back(session)
    state = await w.control.poll_wait(fence, 1, "1.9", 0)
    assert (state.part, state.item, state.payload) == (0, child, b'{"sum": 1.10}')
    assert state.outcome == {"state": "completed", "reason": "exited", "detail": None}
    # found again when it is over already, also after a crash
    fence = await crash(w, session, fence)
    for ident in ("1.9", "1.10"):
        assert (await await_(w, fence, child, ident=ident)).payload == b'{"sum": 1.10}'


async def test_a_failed_one_says_why(w: World) -> None:
    _, fence = await w.start(BOSS)
    child, other = await born(w, fence)
    await w.append(other, EventType.SESSION_RESULT, b"1")
    await w.report(other, S.FAILED, reason=Reason.EXITED, exit_code=3, detail="exit code 3")
    await w.loops.fire()
    state = await await_(w, fence, child)
    assert state.outcome == {"state": "failed", "reason": "exited", "detail": "exit code 3"}
    assert state.payload is None


async def test_waiting_for_all(w: World) -> None:
    _, fence = await w.start(BOSS)
    one, first = await born(w, fence, "1.1")
    two, second = await born(w, fence, "1.2")
    assert not (await await_(w, fence, one, two, kind="all")).done
    await complete(w, second)
    await w.loops.fire()
    assert not (await w.control.poll_wait(fence, 1, "1.9", 0)).done
    told = (await w.control.why(fence.session))["waiting_for"]
    assert [(t["kind"], t["name"], t["wakes_it"]) for t in told] == [("child", one, f"the end of its child {one}")]
    await w.report(first, S.FAILED, reason=Reason.EXITED, exit_code=3)
    await w.loops.fire()
    state = await w.control.poll_wait(fence, 1, "1.9", 0)
    assert state.done and state.payload == b"[null,1]" and state.outcome is not None
    assert [one["state"] for one in state.outcome["children"]] == ["failed", "completed"]


async def test_children_of_a_session_that_fails_are_cancelled(w: World) -> None:
    session, fence = await w.start(BOSS)
    running, _ = await born(w, fence, "1.1")
    done, other = await born(w, fence, "1.2")
    await complete(w, other)
    late = await spawn(w, fence, "1.3")
    await w.control.cancel(session, now=True)
    for _ in range(2):
        await w.loops.fire()
    assert (await w.control.session(running)).desired == "cancelled"
    assert (await w.control.session(done)).state == S.COMPLETED
    assert not await exists(w, late)
    assert (await w.sql("SELECT outcome FROM children WHERE child = %s", late))[0][0].count("cancelled") == 3


async def test_children_of_a_session_that_completes_go_on(w: World) -> None:
    session, fence = await w.start(BOSS)
    running, other = await born(w, fence, "1.1")
    late = await spawn(w, fence, "1.2")  # and the agent returns at once
    await complete(w, fence)
    await w.loops.fire()
    assert (await w.control.session(running)).state == S.RUNNING
    assert (await w.control.session(late)).parent == session
    await complete(w, other)
    await w.loops.fire()
    assert await w.sql("SELECT count(*) FROM sessions WHERE untold") == [(0,)]


async def test_messages_and_cancelling_count_once_a_snapshot_holds_them(w: World) -> None:
    session, fence = await w.start(BOSS)
    child, _ = await born(w, fence)
    first = await w.save(fence)
    for _ in range(2):
        await w.control.tell_child(fence, 1, "1.5", child, "message", b'"hi"')
    await w.loops.fire()
    assert await w.control.inbox(child) == []
    await w.save(fence)
    await w.loops.fire()
    assert [m.payload for m in await w.control.inbox(child)] == [b'"hi"']
    await w.control.rewind(session, first.id)
    _, fence = await w.back(session)
    await w.control.tell_child(fence, 1, "1.5", child, "message", b'"hi"')
    await w.control.tell_child(fence, 1, "1.6", child, "cancel", None)
    await w.save(fence)
    await w.loops.fire()
    assert len(await w.control.inbox(child)) == 1
    assert (await w.control.session(child)).desired == "cancelled"


async def test_erasing_either_side_leaves_the_other(w: World) -> None:
    session, fence = await w.start(BOSS)
    child, other = await born(w, fence)
    gone, _ = await born(w, fence, "1.2")
    await w.control.erase(gone, force=True)
    await w.loops.fire()
    state = await await_(w, fence, gone)
    assert state.outcome == {"state": "cancelled", "reason": "cancelled", "detail": "it was removed"}
    await w.control.erase(session, force=True)
    await w.loops.fire()
    assert (await w.control.session(child)).state == S.RUNNING
    await complete(w, other)
    await w.loops.fire()
    assert (await w.control.session(child)).parent == session
    assert await w.sql("SELECT count(*) FROM sessions WHERE untold") == [(0,)]


async def test_what_cannot_be_spawned(w: World) -> None:
    _, fence = await w.start(BOSS)
    with pytest.raises(NotFound, match="there is no agent 'nobody'"):
        await spawn(w, fence, agent="nobody")
    with pytest.raises(NotFound, match="has no child 's_x'"):
        await w.control.tell_child(fence, 1, "1.5", "s_x", "cancel", None)
    with pytest.raises(Conflict, match="attempt 2"):
        await w.control.spawn(fence, 2, "2.1", "worker", {})
    small = BOSS.model_copy(update={"agents": {"worker": WORKER.model_copy(update={"memory_bytes": 1})}})
    _, fence = await w.start(small)
    with pytest.raises(InvalidInput, match="too small"):
        await spawn(w, fence)


async def test_one_that_cannot_be_created_any_more_has_failed(w: World) -> None:
    _, fence = await w.start(BOSS)
    child = await spawn(w, fence)
    await await_(w, fence, child)
    await w.save(fence)
    await w.sql("UPDATE children SET spec = replace(spec, '67108864', '1')")
    await w.loops.fire()
    state = await w.control.poll_wait(fence, 1, "1.9", 0)
    assert state.outcome is not None and state.outcome["state"] == "failed" and "too small" in state.outcome["detail"]


@pytest.mark.parametrize("keep", [False, True])
async def test_children_of_an_attempt_that_failed(w: World, keep: bool) -> None:
    boss = BOSS.model_copy(update={"retries": RetrySpec(delay_s=0, children="keep" if keep else "cancel")})
    session, fence = await w.start(boss)
    running, _ = await born(w, fence, n=1)
    late = await spawn(w, fence, "1.2", n=2)  # its parent fails before anything of it is there
    view = await w.report(fence, S.FAILED, reason=Reason.EXITED, exit_code=1)
    assert (view.state, view.attempt) == (S.QUEUED, 2)
    await w.loops.fire()
    await w.loops.fire()
    if keep:
        assert await exists(w, late) and not (await w.control.session(running)).state.final
    else:
        assert not await exists(w, late) and (await w.control.session(running)).desired == Desired.CANCELLED
    (assignment,) = [a for a in await w.node.work(2) if a.session == session and a.action == "start"]
    again = Fence(session=session, generation=assignment.generation)
    await w.report(again, S.RUNNING)
    other = await w.control.spawn(again, 2, "2.1", "worker", {"n": 1})
    assert other != running
    await w.save(again)
    await w.loops.fire()
    assert not (await w.control.session(other)).state.final  # the new attempt's own
    parts = tuple(WaitPart(kind="child", name=child) for child in (running, late))
    await w.control.open_wait(again, 2, WaitSpec(id="2.2", kind="any", parts=parts))
    await w.loops.fire()
    state = await w.control.poll_wait(again, 2, "2.2", 0)
    assert state.done is not keep
    if not keep:
        assert state.outcome is not None and state.outcome["state"] == "cancelled"


async def test_a_fresh_boot_after_a_crash_loop_begins_without_children_of_before(w: World) -> None:
    session, fence = await w.start(BOSS)
    child, _ = await born(w, fence)
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "x")
    for _ in range(20):
        (assignment,) = [a for a in await w.node.work(2) if a.session == session]
        if assignment.snapshot is None:
            break
        fence = Fence(session=session, generation=assignment.generation)
        await w.report(fence, S.RUNNING)
        await w.loops.fire()
        assert (await w.control.session(child)).desired == Desired.RUNNING  # a restored parent still has it
        await w.control.report_death(fence, Reason.SANDBOX_DIED, "x")
    assert (await w.control.session(session)).attempt == 2
    await w.loops.fire()
    assert (await w.control.session(child)).desired == Desired.CANCELLED


async def test_an_agent_spawns_itself(w: World) -> None:
    _, fence = await w.start(BOSS)
    child = await spawn(w, fence, agent="boss")
    await w.save(fence)
    await w.loops.fire()
    assert set((await w.control.session(child)).agent.agents) == {"worker"}


async def test_a_fork_waits_for_a_child_of_before(w: World) -> None:
    session, fence = await w.start(BOSS)
    child, other = await born(w, fence)
    await await_(w, fence, child)
    info = await w.save(fence)
    (made,) = await w.control.fork(session, info.id)
    _, forked = await w.back(made.id)
    await await_(w, forked, child)
    await complete(w, other, b"7")
    await w.loops.fire()
    for one in (fence, forked):
        assert (await w.control.poll_wait(one, 1, "1.9", 0)).payload == b"7"
    assert await spawn(w, forked, "1.2") != await spawn(w, fence, "1.2")  # from there on each has its own


async def test_the_spec_of_an_agent_without_others_is_as_before() -> None:
    assert "agents" not in json.loads(AGENT.model_dump_json())
    assert AgentSpec.model_validate_json(BOSS.model_dump_json()) == BOSS


# ---------------------------------------------------------------- ctx.fork


async def test_a_fork_by_a_call_is_made_once_and_both_are_told(w: World) -> None:
    session, fence = await w.start(BOSS)
    await w.act(fence)
    assert await w.control.forked(fence, 1, "1.5") is None
    info = await w.save(fence)
    made = await w.control.fork_self(fence, 1, "1.5", info.id)
    assert (made.parent, made.forked) == (session, False)
    for _ in range(2):
        assert await w.control.fork_self(fence, 1, "1.5", info.id) == made
    _, other = await w.back(made.session)
    told = await w.control.forked(other, 1, "1.5")
    assert told is not None and (told.session, told.parent, told.forked) == (made.session, session, True)
    assert await w.control.forked(other, 1, "1.6") is None
    # three generations of both: nothing else is made
    for _ in range(3):
        for one in (fence, other):
            await w.act(one)
        fence = await crash(w, session, fence)
        assert await w.control.forked(fence, 1, "1.5") == made
        other = await crash(w, made.session, other)
        again = await w.control.forked(other, 1, "1.5")
        assert again == told
    # the fork's own next fork
    second = await w.save(other)
    grandchild = await w.control.fork_self(other, 1, "1.6", second.id)
    assert (grandchild.parent, grandchild.forked) == (made.session, False)
    _, third = await w.back(grandchild.session)
    third_told = await w.control.forked(third, 1, "1.6")
    assert third_told is not None and third_told.forked
    assert len((await w.control.list())[0]) == 3


async def test_a_fork_on_a_line_that_was_left_does_not_count(w: World) -> None:
    session, fence = await w.start(BOSS)
    await w.act(fence)
    before = await w.save(fence)
    await w.append(fence, EventType.EMITTED, b"1", name="x")
    info = await w.save(fence)
    made = await w.control.fork_self(fence, 1, "1.5", info.id)
    await w.control.rewind(session, before.id)
    _, fence = await w.back(session)
    assert await w.control.forked(fence, 1, "1.5") is None
    assert (await w.control.fork_self(fence, 1, "1.5", before.id)).session != made.session
