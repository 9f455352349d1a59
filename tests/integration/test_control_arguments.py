"""Arguments are checked where a session is started, by what its agent's version says of them."""

from __future__ import annotations

from typing import Any

import pytest
from control_fixtures import AGENT, World, cluster_fixture, dsn_fixture, world_fixture  # noqa: F401 - fixtures

from rethaw.model import signatures
from rethaw.model.enums import State
from rethaw.model.errors import InvalidInput, KeyReused
from rethaw.model.queue_types import ScheduleSpec
from rethaw.model.types import AgentSpec, Signature
from rethaw.model.versions import digest


def _takes(ctx: Any, goal: str, depth: int = 3) -> None: ...


def _new(ctx: Any, goal: str, depth: int, where: str) -> None: ...


SIGNED = AGENT.model_copy(update={"signature": signatures.of(_takes)})
USAGE = "it takes goal: str, depth: int = 3"


async def test_a_start_names_the_argument_that_does_not_fit(w: World) -> None:
    with pytest.raises(InvalidInput, match=f"agent tester needs argument 'goal'; {USAGE}"):
        await w.control.create(SIGNED, {})
    with pytest.raises(InvalidInput, match="agent tester: argument depth = '3' does not fit: it is no int"):
        await w.control.create(SIGNED, {"goal": "x", "depth": "3"})
    assert await w.control.versions.every() == []  # nothing was begun
    auto = SIGNED.model_copy(update={"template": "auto", "entry": "a.py::a", "code": "0" * 64, "command": ()})
    with pytest.raises(InvalidInput, match=USAGE):
        await w.control.warm.start_auto(auto, {"gaol": 1}, None)
    view, new = await w.control.create(SIGNED, {"goal": "x"}, "key")
    assert new and view.agent == AGENT and view.version_digest == digest(AGENT)  # what runs is as ever
    again, new = await w.control.create(AGENT, {"goal": "x"}, "key")  # from an SDK that writes no signatures
    assert (again.id, new) == (view.id, False)
    with pytest.raises(KeyReused):
        await w.control.create(SIGNED, {"goal": "y"}, "key")


async def test_a_version_keeps_it_and_one_of_before_gets_it(w: World) -> None:
    session, _ = await w.start(anything=1)  # of a version without one
    assert (await w.control.versions.show("tester")).versions[0].spec.signature is None
    made, new = await w.control.versions.deploy(SIGNED)
    assert (made.version, new, made.digest, made.spec) == (1, True, digest(AGENT), SIGNED)
    assert (await w.control.versions.deploy(AGENT))[
        0
    ].spec.signature == SIGNED.signature  # and no older SDK takes it away
    assert (await w.control.session(session)).version == 1
    command = AgentSpec(name="plain", command=("/bin/true",))
    assert (await w.control.create(command, {"any": ["thing"]}))[1]


async def test_a_schedule_says_it_when_it_is_made(w: World) -> None:
    with pytest.raises(InvalidInput, match="needs argument 'goal'"):
        await w.control.schedules.create("daily", ScheduleSpec(agent=SIGNED, cron="@daily"))
    spec = ScheduleSpec(agent=AGENT, args={"goal": "x"}, cron="@daily")
    made = await w.control.schedules.create("daily", spec)
    signed = spec.model_copy(update={"agent": SIGNED})
    assert await w.control.schedules.create("daily", signed) == made  # the same again
    fired = await w.control.schedules.trigger("daily")
    assert (await w.control.session(fired.id)).agent == AGENT


async def test_a_parent_hears_it_at_its_spawn(w: World) -> None:
    boss = SIGNED.model_copy(update={"name": "boss", "agents": {"tester": SIGNED}})
    _, fence = await w.start(boss, goal="x")
    with pytest.raises(InvalidInput, match="agent tester: argument goal = 1 does not fit"):
        await w.control.spawn(fence, 1, "1.1", "tester", {"goal": 1})
    with pytest.raises(InvalidInput, match="agent boss needs argument 'goal'"):
        await w.control.spawn(fence, 1, "1.2", "boss", {})  # itself, by what its version says
    await w.control.versions.deploy(SIGNED.model_copy(update={"name": "other"}))
    with pytest.raises(InvalidInput, match="agent other has no argument 'depht'"):
        await w.control.spawn(fence, 1, "1.3", "other", {"goal": "x", "depht": 1})
    child = await w.control.spawn(fence, 1, "1.4", "tester", {"goal": "x", "depth": 1})
    await w.save(fence)
    await w.loops.fire()
    assert (await w.control.session(child)).agent.name == "tester"


async def test_an_upgrade_to_what_takes_other_arguments_is_refused(w: World) -> None:
    session, _ = await w.start(SIGNED, goal="x", depth=1)
    new = SIGNED.model_copy(update={"command": ("/bin/false",), "signature": signatures.of(_new)})
    with pytest.raises(InvalidInput, match="agent tester needs argument 'where'"):
        await w.control.versions.upgrade(session, new)
    assert (await w.control.session(session)).attempt == 1
    fits = new.model_copy(update={"signature": SIGNED.signature})
    assert (await w.control.versions.upgrade(session, fits, files="fresh")).changed
    assignment, _ = await w.back(session, "start")
    assert assignment.agent.signature is None


async def test_a_template_is_begun_without_arguments(w: World) -> None:
    auto = SIGNED.model_copy(update={"template": "auto", "entry": "a.py::a", "code": "0" * 64, "command": ()})
    made = await w.control.warm.create("auto.tester.1", auto, {})
    assert (await w.control.session(made.session)).state in (State.QUEUED, State.STARTING)


async def test_a_signature_that_cannot_be_read_is_refused(w: World) -> None:
    strange: dict[str, Any] = {"properties": {"a": {"type": "what"}}, "required": (), "additionalProperties": False}
    for arguments in (dict[str, Any](), strange):
        with pytest.raises(InvalidInput, match="signature of agent tester cannot be read"):
            await w.control.versions.deploy(AGENT.model_copy(update={"signature": Signature(arguments=arguments)}))
    assert SIGNED.signature is not None
    much = Signature(arguments={**SIGNED.signature.arguments, "description": "y" * 70_000})
    with pytest.raises(InvalidInput, match="longer than 64 KiB"):
        await w.control.versions.deploy(AGENT.model_copy(update={"signature": much}))
