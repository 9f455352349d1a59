"""wait_any, children and forks against a real guestd: what goes to the node and what comes of the answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from link_fixtures import Guest, guest, until

import rethaw
from rethaw.guest.acontext import AsyncContext
from rethaw.guest.context import Context
from rethaw.model.errors import ChildFailed, InvalidInput, WaitTimeout


@pytest.fixture
async def g() -> AsyncIterator[Guest]:
    async with guest() as made:
        await made.start("sleep", "1000", args={}, cursor=2)
        yield made


def answering(g: Guest, op: str, *answers: dict[str, Any]) -> None:
    """The node's answers to `op`, the last one again and again."""
    left = list(answers)

    async def answer(call: str, body: dict[str, Any]) -> Any:
        return left.pop(0) if len(left) > 1 else left[0]

    g.answers[op] = answer


@rethaw.agent
def worker(ctx: Context, topic: str, depth: int = 1) -> dict[str, int]:
    return {topic: depth}


async def test_each_kind_of_thing_comes_back_as_itself(g: Guest) -> None:
    answering(g, "signal_url", {"url": "https://h/x"})
    answering(
        g,
        "wait_any",
        {"part": 0, "id": "sig_1", "payload": {"n": 1}},
        {"part": 1, "number": 3, "id": "m_3", "payload": "hi"},
        {"part": 2},
        {"part": 3, "outcome": {"state": "completed"}, "payload": 7},
        {"timeout": True},
    )
    context = AsyncContext(g.socket)
    timer, child = context.timer("1h"), context.child("s_kid")

    async def once() -> Any:
        return await context.wait_any(context.signal("go"), context.inbox, timer, child, timeout="1d")

    signal, message = await once(), await once()
    assert isinstance(signal, rethaw.Signal) and isinstance(message, rethaw.Message)
    assert (signal.name, signal.payload, signal.id, signal.complete) == ("go", {"n": 1}, "sig_1", True)
    assert (message.payload, message.number) == ("hi", 3)
    assert await once() is timer
    assert not child.done
    assert await once() is child
    assert child.done and await child.result() == 7
    with pytest.raises(WaitTimeout, match="nothing that was waited for came within 1d"):
        await once()
    urls, waits = g.ops("signal_url"), g.ops("wait_any")
    # the address of a signal that came has had its use, that of another one stays
    assert waits[0]["parts"] == [
        {"kind": "signal", "name": "go", "wait": urls[0]["wait"]}, {"kind": "inbox", "after": 2},
        {"kind": "timer", "seconds": 3600.0}, {"kind": "child", "name": "s_kid"},
    ]  # fmt: skip
    assert waits[0]["timeout_s"] == 86400.0
    assert urls[1]["wait"] != urls[0]["wait"]
    assert len({u["wait"] for u in urls[1:]}) == 1
    assert waits[2]["parts"][1] == {"kind": "inbox", "after": 3}  # the message won: the cursor moved, and only then
    await until(lambda: g.ops("consumed") == [{"number": 3}])


async def test_a_message_that_another_took_is_waited_past(g: Guest) -> None:
    async def receive(call: str, body: dict[str, Any]) -> Any:
        return {"number": 3, "id": "m_3", "payload": "taken"}

    gate = asyncio.Event()

    async def wait_any(call: str, body: dict[str, Any]) -> Any:
        if body["parts"][0]["after"] == 2:
            await gate.wait()
            return {"part": 0, "number": 3, "id": "m_3", "payload": "taken"}
        return {"part": 0, "number": 4, "id": "m_4", "payload": "mine"}

    g.answers |= {"receive": receive, "wait_any": wait_any}
    context = AsyncContext(g.socket)
    waiting = asyncio.create_task(context.wait_any(context.inbox, context.timer("1h"), timeout="2h"))
    await until(lambda: g.ops("wait_any"))
    assert (await context.receive()).payload == "taken"
    gate.set()
    came = await waiting
    assert isinstance(came, rethaw.Message) and came.payload == "mine"
    first, second = g.ops("wait_any")
    assert first["wait"] != second["wait"]
    assert second["parts"][1]["seconds"] < 3600 and second["timeout_s"] < 7200
    await until(lambda: g.ops("consumed") == [{"number": 3}, {"number": 4}])


async def test_many_at_once_from_tasks_and_over_thaws(g: Guest) -> None:
    gate = asyncio.Event()

    async def wait_any(call: str, body: dict[str, Any]) -> Any:
        await gate.wait()
        return {"part": 1, "id": "sig", "payload": body["parts"][1]["name"]}

    g.answers["wait_any"] = wait_any
    context = AsyncContext(g.socket)
    tasks = [asyncio.create_task(context.wait_any(context.inbox, f"s{n}")) for n in range(20)]
    await until(lambda: len(g.ops("wait_any")) == 20)
    for n in range(3):
        await g.thaw(f"g-{n}")
    gate.set()
    came = [await task for task in tasks]
    assert [c.payload for c in came if isinstance(c, rethaw.Signal)] == [f"s{n}" for n in range(20)]
    assert len({b["wait"] for b in g.ops("wait_any")}) == 20


async def test_children(g: Guest) -> None:
    answering(g, "spawn", {"child": "s_1"}, {"child": "s_2"})
    answering(g, "child_send", {})
    answering(g, "child_cancel", {})

    async def wait_any(call: str, body: dict[str, Any]) -> Any:
        if body["all"]:
            return {"outcome": None}
        if body["parts"][0]["name"] == "s_1":
            return {"part": 0, "outcome": {"state": "completed", "reason": "exited"}, "payload": {"sum": 3}}
        outcome = {"state": "failed", "reason": "exited", "detail": "exit code 3"}
        return {"part": 0, "outcome": outcome, "payload": None}

    g.answers["wait_any"] = wait_any

    def work() -> list[Any]:
        context = Context(g.socket)
        one = context.spawn(worker, "tea", depth=2)
        two = context.spawn("deployed", n=1)
        one.send({"go": True})
        two.cancel()
        with pytest.raises(ChildFailed, match="child s_2 failed: exit code 3") as failed:
            two.result(timeout="1h")
        assert (failed.value.details["reason"], failed.value.details["child"]) == ("exited", "s_2")
        assert isinstance(failed.value, rethaw.SessionFailed)
        return context.wait_all(one, two, timeout="1h")

    value, error = await asyncio.to_thread(work)
    assert value == {"sum": 3}
    assert isinstance(error, ChildFailed)
    spawned = [b["payload"] for b in g.ops("spawn")]
    assert spawned == [
        {"agent": "worker", "args": {"topic": "tea", "depth": 2}}, {"agent": "deployed", "args": {"n": 1}},
    ]  # fmt: skip
    assert g.ops("child_send") == [{"child": "s_1", "payload": {"go": True}}]
    assert g.ops("child_cancel") == [{"child": "s_2"}]


async def test_the_ends_of_all_come_in_one_answer(g: Guest) -> None:
    ends = [{"state": "completed"}, {"state": "cancelled", "reason": "cancelled"}]
    answering(g, "wait_any", {"outcome": {"children": ends}, "payload": [{"n": 1}, None]})
    context = AsyncContext(g.socket)
    one, two = context.child("s_1"), context.child("s_2")
    value, error = await context.wait_all(one, two)
    assert value == {"n": 1} and "child s_2 was cancelled" in str(error)
    assert (await context.wait_all(one, two))[0] == value  # known by now
    assert len(g.calls) == 1
    answering(g, "wait_any", {"timeout": True})
    with pytest.raises(WaitTimeout, match="not all children ended within 1s"):
        await context.wait_all(context.child("s_3"), timeout="1s")


async def test_a_fork_is_told_which_it_is(g: Guest) -> None:
    answering(
        g,
        "fork",
        {"session": "s_new", "parent": "s_test", "forked": False},
        {"session": "s_new", "parent": "s_test", "forked": True},
    )
    context = AsyncContext(g.socket)
    first, second = await context.fork(), await context.fork()
    assert (first.session, first.parent, first.forked) == ("s_new", "s_test", False)
    assert second.forked


async def test_deadline_and_history_in_a_form(g: Guest) -> None:
    answering(g, "deadline", {"deadline": None}, {"deadline": "2030-01-02T03:04:05.678900+00:00"})
    context = Context(g.socket)
    assert await asyncio.to_thread(lambda: (context.deadline, context.remaining is not None)) == (None, True)
    at = await asyncio.to_thread(lambda: context.deadline)
    assert at is not None and at.isoformat() == "2030-01-02T03:04:05.678900+00:00"

    async def history(call: str, body: dict[str, Any]) -> Any:
        assert body["form"] == "anthropic" and body["exchange"] == (None if body["after"] == 0 else "x_1")
        page = [{"role": "user", "n": body["after"] + 1}]
        return {"messages": page, "system": "Be brief.", "exchange": "x_1", "more": body["after"] < 2}

    g.answers["history"] = history
    found = await AsyncContext(g.socket).history("anthropic")
    assert found == [{"role": "user", "n": n} for n in (1, 2, 3)]
    assert found.system == "Be brief."
    assert json.loads(json.dumps(found)) == found


async def test_what_cannot_be_asked(g: Guest) -> None:
    context = Context(g.socket)
    for things, words in (
        ((), "nothing to wait for"), ((3,), "3 cannot be waited for"), (("",), "not a signal's name"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=words):
            context.wait_any(*things)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="children only"):
        context.wait_all(context.inbox)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"missing a required argument: 'topic'.*it takes \(topic"):
        context.spawn(worker)  # type: ignore[call-arg]
    with pytest.raises(InvalidInput, match="is no agent"):
        context.spawn(len, "x")  # type: ignore[call-overload]
    with pytest.raises(InvalidInput, match="given by name"):
        context.spawn("name", 3)  # type: ignore[call-overload]
    with pytest.raises(InvalidInput, match="'xml' is no form"):
        context.history("xml")  # type: ignore[call-overload]
    assert g.calls == []
