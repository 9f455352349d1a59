"""Agents without a sandbox: contexts in memory, `agent.local`, and what each kind of function is called like."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Generator
from typing import Any

import pytest

import rethaw
from rethaw import AsyncContext, AsyncLocalContext, Context, InvalidInput, LocalContext, Unavailable, WaitTimeout


@rethaw.agent
def counter(ctx: Context, start: int = 0) -> dict[str, Any]:
    total = start
    for message in ctx.messages(idle="7d"):
        total += int(message.payload)
        ctx.send(f"now {total}")
    ctx.emit("counted", total=total)
    ctx.sleep("1h")
    return {"total": total, "approved": ctx.wait("approval").payload}


def test_a_function_runs_with_what_it_was_given() -> None:
    ctx = LocalContext(inbox=[1, "2", 40], signals={"approval": {"ok": True}})
    assert counter(ctx, start=2) == {"total": 45, "approved": {"ok": True}}
    assert ctx.outbox == ["now 3", "now 5", "now 45"]
    assert ctx.slept == [3600.0]
    assert [event["type"] for event in ctx.history()] == [
        *(["message.received", "message.sent"] * 3), "counted", "signal.received",
    ]  # fmt: skip
    assert ctx.history()[6]["data"] == {"total": 45} and ctx.history()[0]["body"] == "1"
    assert (ctx.session, ctx.attempt, ctx.generation, ctx.fresh, ctx.args) == ("s_local", 1, "local", False, {})
    assert ctx.snapshot() == "snap_local" and ctx.ready() == {}
    assert ctx.on_restore(print) is print


def test_what_was_not_given_is_not_waited_for() -> None:
    ctx = LocalContext(signals={"go": None})
    with pytest.raises(WaitTimeout, match="no message came within 3d"):
        ctx.receive(timeout="3d")
    with pytest.raises(WaitTimeout, match="signal 'other' did not come within 1h"):
        ctx.wait("other", timeout="1h")
    with pytest.raises(Unavailable, match=r"inbox is empty.*inbox="):
        ctx.receive()
    with pytest.raises(Unavailable, match=r"signal 'other'.*signals=\{'other'"):
        ctx.wait("other")
    assert ctx.wait(ctx.signal("go")).payload is None
    with pytest.raises(Unavailable, match="signal 'go'"):
        ctx.wait("go")


def test_payloads_are_json_as_in_a_sandbox() -> None:
    with pytest.raises(InvalidInput, match="an inbox message is not JSON"):
        LocalContext(inbox=[object()])
    with pytest.raises(InvalidInput, match="signal 'x' is not JSON"):
        LocalContext(signals={"x": float("nan")})
    ctx = LocalContext()
    with pytest.raises(InvalidInput, match="the payload is not JSON"):
        ctx.send({1, 2})
    sent = [1]
    ctx.send(sent)
    sent.append(2)
    assert ctx.outbox == [[1]]


@rethaw.agent
def steps(ctx: Context, n: int) -> Generator[Any, None, str]:
    for number in range(n):
        yield {"step": number}
    return "done"


@rethaw.agent
async def asked(ctx: AsyncContext, name: str) -> str:
    await ctx.send(f"hello {name}")
    return name.upper()


@rethaw.agent
async def told(ctx: AsyncContext, n: int) -> AsyncIterator[int]:
    for number in range(n):
        yield number


def unfit(ctx: Context) -> object:
    return object()


def test_each_kind_of_function_runs_locally() -> None:
    assert counter.local.__doc__ is not None
    assert steps.local(3) == "done"
    assert asked.local("ann") == "ANN"
    assert told.local(n=2) is None
    ctx = LocalContext()
    assert ctx.run(steps, n=2) == "done"
    assert ctx.run(told, n=2) is None
    assert ctx.run(asked, name="bob") == "BOB"
    assert ctx.outbox == [{"step": 0}, {"step": 1}, 0, 1, "hello bob"]
    with pytest.raises(InvalidInput, match="missing a required argument: 'n'"):
        steps.local()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with pytest.raises(InvalidInput, match="result is not JSON"):
        ctx.run(unfit)


async def test_an_async_context_can_be_awaited_in_a_test() -> None:
    ctx = AsyncLocalContext(inbox=["a"], signals={"go": 1}, args={"x": 2})
    assert ctx.args == {"x": 2}
    assert [message.payload async for message in ctx.messages(idle="1s")] == ["a"]
    assert (await ctx.wait("go")).payload == 1
    await ctx.send("b")
    await ctx.sleep(5)
    assert ctx.outbox == ["b"] and ctx.slept == [5.0]
    assert [event["type"] for event in await ctx.history()] == ["message.received", "signal.received", "message.sent"]


def test_it_needs_only_the_standard_library() -> None:
    code = """
import sys
before = set(sys.modules)
from rethaw.guest.local import LocalContext
LocalContext(inbox=[1]).run(lambda ctx: ctx.receive().payload)
third = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names) - {"rethaw"}
print(sorted(third))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


# ---------------------------------------------------------------- several things at once, children, forks


@rethaw.agent
def double(ctx: Context, n: int) -> int:
    if n < 0:
        raise ValueError("too small")
    return 2 * n


@rethaw.agent
async def boss(ctx: AsyncContext, numbers: list[int]) -> Any:
    children = [await ctx.spawn(double, n) for n in numbers]
    await children[0].send("hello")
    await children[1].cancel()
    return [repr(one) if isinstance(one, Exception) else one for one in await ctx.wait_all(*children, timeout="1h")]


def test_children_return_what_was_given_for_them() -> None:
    ctx = LocalContext(children={"double": double})
    assert ctx.run(boss, numbers=[1, -1, 5])[::2] == [2, 10]
    assert ctx.spawned[0] == {
        "id": "s_child_1",
        "agent": "double",
        "args": {"n": 1},
        "sent": ["hello"],
        "cancelled": [],
    }
    assert ctx.spawned[1]["cancelled"] == [True]
    ctx = LocalContext(children={"double": lambda n: n + 1, "far": {"a": 1}, "bad": OSError("gone")})
    assert ctx.spawn(double, n=4).result() == 5
    assert ctx.spawn("far").result(timeout="1s") == {"a": 1}
    with pytest.raises(rethaw.ChildFailed, match="child s_child_3 failed: OSError: gone"):
        ctx.spawn("bad").result()
    with pytest.raises(Unavailable, match=r"pass children=\{'other'"):
        ctx.spawn("other")
    with pytest.raises(rethaw.NotFound, match="no child 's_9'"):
        ctx.child("s_9").result()


def test_the_first_thing_that_was_given_comes_first() -> None:
    ctx = LocalContext(inbox=["m"], signals={"go": 1}, children={"double": 7})
    child = ctx.spawn(double, n=1)

    def once() -> Any:
        return ctx.wait_any(ctx.signal("go"), ctx.inbox, ctx.timer("1h"), timeout="2h")

    assert [once().payload, once().payload] == [1, "m"]
    assert isinstance(once(), rethaw.Timer) and ctx.slept == [3600.0]
    assert ctx.wait_any(ctx.inbox, child) is child and child.result() == 7
    with pytest.raises(WaitTimeout):
        ctx.wait_any(ctx.inbox, ctx.timer("3h"), timeout="2h")
    with pytest.raises(Unavailable, match="nothing that is waited for"):
        ctx.wait_any(ctx.inbox)


def test_forks_deadlines_and_messages() -> None:
    assert not LocalContext().fork().forked
    assert LocalContext(forked=True).fork().forked
    ctx = LocalContext(messages=[{"role": "user", "content": "hi"}])
    assert ctx.history("openai") == [{"role": "user", "content": "hi"}]
    assert (ctx.deadline, ctx.remaining) == (None, None)
