"""Context and AsyncContext against a real guestd; the agent's code runs here, in the test's own process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from link_fixtures import Guest, guest, until

from rethaw.channel.payload import embed
from rethaw.guest.acontext import AsyncContext
from rethaw.guest.context import Context
from rethaw.model.errors import Conflict, InvalidInput, TooLarge, Unavailable, WaitTimeout


class Inbox:
    """The node's side of receive: messages by number."""

    def __init__(self, g: Guest) -> None:
        self.messages: list[bytes] = []
        self.changed = asyncio.Condition()
        g.answers["receive"] = self.receive

    async def put(self, *payloads: Any) -> None:
        async with self.changed:
            self.messages += [p if isinstance(p, bytes) else json.dumps(p).encode() for p in payloads]
            self.changed.notify_all()

    async def receive(self, call: str, body: dict[str, Any]) -> Any:
        number = body["after"] + 1
        try:
            async with self.changed:
                await asyncio.wait_for(self.changed.wait_for(lambda: len(self.messages) >= number), body["timeout_s"])
        except TimeoutError:
            return {"timeout": True}
        return b'{"ok":' + embed({"number": number, "id": f"m_{number}"}, self.messages[number - 1]) + b"}"


@pytest.fixture
async def g() -> AsyncIterator[Guest]:
    async with guest() as made:
        made.inbox = Inbox(made)  # type: ignore[attr-defined]
        await made.start("sleep", "1000", args={"topic": "tea"}, cursor=2)
        yield made


@pytest.fixture
def inbox(g: Guest) -> Inbox:
    return g.inbox  # type: ignore[attr-defined,no-any-return]


async def test_who_this_is(g: Guest) -> None:
    context, other = Context(g.socket), AsyncContext(g.socket)

    def look(c: Any) -> tuple[Any, ...]:
        return c.session, c.attempt, c.args, c.fresh, c.generation

    expected = ("s_test", 2, {"topic": "tea"}, False, "g-0")
    assert await asyncio.to_thread(look, context) == expected
    assert await asyncio.to_thread(look, other) == expected
    await g.thaw("g-7")
    assert context.generation == other.generation == "g-7"
    assert g.calls == []  # guestd answers these itself


async def test_receive_moves_the_cursor_and_tells_it(g: Guest, inbox: Inbox) -> None:
    context = AsyncContext(g.socket)
    await inbox.put("old", "older", {"a": 1}, b'"\\ud800\\u0000" ')
    first = await context.receive()
    assert (first.payload, first.number, first.id) == ({"a": 1}, 3, "m_3")  # the boot's cursor is 2
    second = await context.receive(timeout="1s")
    assert second.payload == "\ud800\0"
    assert second.raw == b'"\\ud800\\u0000"'  # the text as it was sent
    await until(lambda: g.ops("consumed") == [{"number": 3}, {"number": 4}])
    assert [b["after"] for b in g.ops("receive")] == [2, 3]
    with pytest.raises(WaitTimeout, match="no message came within 30ms"):
        await context.receive(timeout="30ms")
    assert (await g.link.quiesce()).cursor == 4
    await g.link.go("g-1")


async def test_parallel_receives_get_each_message_once(g: Guest, inbox: Inbox) -> None:
    context = AsyncContext(g.socket)
    waiting = [asyncio.create_task(context.receive(timeout="20s")) for _ in range(5)]
    await until(lambda: len(g.ops("receive")) == 5)
    await inbox.put(*range(12))
    got = [(await task).payload for task in waiting]
    got += [(await context.receive()).payload for _ in range(5)]
    assert sorted(got) == list(range(2, 12))
    await until(lambda: [b["number"] for b in g.ops("consumed")] == list(range(3, 13)))


async def test_messages_end_when_idle(g: Guest, inbox: Inbox) -> None:
    await inbox.put(0, 0, "a", "b")
    assert [m.payload async for m in AsyncContext(g.socket).messages(idle="50ms")] == ["a", "b"]
    await inbox.put("c")
    got = await asyncio.to_thread(lambda: [m.payload for m in Context(g.socket).messages(idle="50ms")])
    assert got == ["c"]


async def test_a_receive_that_is_given_up_consumes_nothing(g: Guest, inbox: Inbox) -> None:
    context = AsyncContext(g.socket)
    task = asyncio.create_task(context.receive())
    await until(lambda: g.ops("receive"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not [s for s in g.link._streams.values() if s.kind == "call"])
    await inbox.put(0, 0, "kept")
    assert (await context.receive()).payload == "kept"


async def test_a_wait_goes_on_over_thaws_with_its_first_id(g: Guest, inbox: Inbox) -> None:
    task = asyncio.create_task(AsyncContext(g.socket).receive(timeout=60))
    await until(lambda: g.calls)
    for n in range(5):
        await g.thaw(f"g-{n}")
    await inbox.put(0, 0, "at last")
    assert (await task).payload == "at last"
    receives = [(call, body) for op, call, body in g.calls if op == "receive"]
    assert len(receives) == 6
    assert len({call for call, _ in receives}) == 1
    assert receives[0][1] == receives[-1][1] == {"timeout_s": 60.0, "wait": receives[0][0], "after": 2}


async def test_a_signal_and_its_address(g: Guest) -> None:
    async def url(call: str, body: dict[str, Any]) -> Any:
        return {"url": f"https://h/v1/callbacks/{body['wait']}"}

    async def wait(call: str, body: dict[str, Any]) -> Any:
        if body["timeout_s"] == 0:
            return {"timeout": True}
        return {"id": "sig_1", "name": body["name"], "payload": {"n": 1}, "raw": '{"n":  1}'}

    g.answers |= {"signal_url": url, "wait": wait}
    context = AsyncContext(g.socket)
    signal = await context.signal("approved")
    assert signal.url is not None
    assert not signal.complete
    done = await context.wait(signal, timeout="3d")
    assert (done.name, done.payload, done.raw, done.id, done.complete) == (
        "approved",
        {"n": 1},
        b'{"n":  1}',
        "sig_1",
        True,
    )
    opened, waited = g.ops("signal_url")[0], g.ops("wait")[0]
    assert waited["wait"] == opened["wait"]  # the same wait
    assert waited["timeout_s"] == 3 * 86400
    other = await asyncio.to_thread(Context(g.socket).wait, "approved")  # a new one
    assert other.payload == {"n": 1}
    assert g.ops("wait")[1]["wait"] != opened["wait"]
    with pytest.raises(WaitTimeout, match="signal 'late' did not come within 0"):
        await context.wait("late", timeout=0)


async def test_send_emit_sleep_snapshot_history_result(g: Guest) -> None:
    async def snapshot(call: str, body: dict[str, Any]) -> Any:
        return {"snapshot": "snap_1"}

    async def history(call: str, body: dict[str, Any]) -> Any:
        return {"events": [{"seq": body["after"] + 1}], "more": body["after"] < 3}

    g.answers |= {"snapshot": snapshot, "history": history}

    def agent() -> None:
        context = Context(g.socket)
        context.send({"text": "é\ud800"})
        context.emit("tick", n=1, nested=[{"a": None}])
        context.sleep("1h30m")
        assert context.snapshot() == "snap_1"
        assert [e["seq"] for e in context.history()] == [1, 2, 3, 4]
        context.result({"ok": True})

    await asyncio.to_thread(agent)
    said = [(op, body) for op, _, body in g.calls if op not in ("history", "snapshot")]
    assert said[0] == ("send", {"payload": {"text": "é\ud800"}})
    assert said[1] == ("emit", {"name": "tick", "data": {"n": 1, "nested": [{"a": None}]}})
    assert said[2][1]["seconds"] == 5400
    assert said[3] == ("result", {"value": {"ok": True}})
    assert [call for _, call, _ in g.calls] == [f"2.{n}" for n in range(1, len(g.calls) + 1)]


async def test_errors_come_back_as_they_are(g: Guest) -> None:
    async def fail(call: str, body: dict[str, Any]) -> Any:
        return b'{"error":{"code":"conflict","message":"it is so","remedy":"do that","details":{"session":"s_1"}}}'

    g.answers["send"] = fail
    with pytest.raises(Conflict) as caught:
        await AsyncContext(g.socket).send(1)
    assert str(caught.value) == "it is so; do that"
    assert caught.value.details == {"session": "s_1"}


@pytest.mark.parametrize("payload", [{1, 2}, float("nan"), object(), b"x", {("a",): 1}])
async def test_a_payload_that_is_not_json(g: Guest, payload: Any) -> None:
    with pytest.raises(InvalidInput, match="payload is not JSON"):
        await AsyncContext(g.socket).send(payload)
    assert g.calls == []


async def test_a_payload_that_is_too_large(g: Guest) -> None:
    with pytest.raises(TooLarge, match="1048579 bytes of JSON, at most 1048576"):
        await asyncio.to_thread(Context(g.socket).send, "x" * 1048577)
    await AsyncContext(g.socket).send("x" * 1048574)
    assert len(g.ops("send")[0]["payload"]) == 1048574


@pytest.mark.parametrize("timeout", ["soon", -1, float("inf")])
async def test_a_timeout_that_is_none(g: Guest, timeout: Any) -> None:
    with pytest.raises(InvalidInput, match="is not a duration"):
        await AsyncContext(g.socket).receive(timeout=timeout)


async def test_threads_and_forks_with_a_call_open_each(g: Guest) -> None:
    release = asyncio.Event()

    async def slow(call: str, body: dict[str, Any]) -> Any:
        await release.wait()
        return {"snapshot": call}

    g.answers["snapshot"] = slow
    context = Context(g.socket)
    got: list[str] = []
    threads = [threading.Thread(target=lambda: got.append(context.snapshot())) for _ in range(30)]
    for thread in threads:
        thread.start()
    await until(lambda: len(g.ops("snapshot")) == 30)
    await asyncio.to_thread(context.send, "meanwhile")
    await g.thaw("g-1")
    release.set()
    await asyncio.to_thread(lambda: [t.join() for t in threads])
    assert len(set(got)) == 30


FORK = """
import os
from rethaw.guest.context import Context
c = Context()
c.emit("before", who="parent")
children = []
for n in range(4):
    pid = os.fork()
    if pid == 0:
        for i in range(20): c.emit("from", who=f"{n}.{i}")
        os._exit(0)
    children.append(pid)
for i in range(20): c.emit("from", who=f"parent.{i}")
for pid in children: assert os.waitpid(pid, 0)[1] == 0
"""


async def test_a_context_survives_fork() -> None:
    async with guest() as g:
        await g.start_python(FORK)
        assert (await asyncio.wait_for(g.exit, 20))["code"] == 0, g.output["stderr"]
        assert len(g.ops("emit")) == 101


FORK_AMONG_THREADS = """
import os, threading, time
from rethaw.guest import context
class Slowly:
    def __getattr__(self, name):
        return getattr(os, name)
    def getpid(self):  # where the connections are taken and given back
        time.sleep(0.0005)
        return os.getpid()
context.os = Slowly()
c = context.Context()
stop = threading.Event()
def busy():
    while not stop.is_set():
        c.emit("busy")
threads = [threading.Thread(target=busy) for _ in range(6)]
for thread in threads: thread.start()
for n in range(40):
    pid = os.fork()
    if pid == 0:
        c.emit("forked", number=n)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads: thread.join()
"""


async def test_a_context_survives_fork_while_other_threads_use_it() -> None:
    """A lock that one of them held just then stayed held in the child for ever."""
    async with guest() as g:
        await g.start_python(FORK_AMONG_THREADS)
        assert (await asyncio.wait_for(g.exit, 60))["code"] == 0, g.output["stderr"]


async def test_on_restore_in_threads_and_tasks(g: Guest) -> None:
    seen: list[tuple[str, str]] = []
    context, other = Context(g.socket), AsyncContext(g.socket)

    @context.on_restore
    def _sync(generation: str) -> None:
        seen.append(("sync", generation))
        raise ValueError("must not end the others")

    @other.on_restore
    async def _async(generation: str) -> None:
        await asyncio.sleep(0)
        seen.append(("async", generation))

    await g.link.ping()
    await asyncio.sleep(0.05)  # the task has subscribed
    await g.thaw("g-0")  # the same life goes on: nothing to tell
    await g.thaw("g-1")
    await g.thaw("g-1")
    await g.thaw("g-2")
    await until(lambda: len(seen) == 4)
    assert sorted(seen) == [("async", "g-1"), ("async", "g-2"), ("sync", "g-1"), ("sync", "g-2")]


async def test_a_restore_before_the_subscription_arrives_is_told(g: Guest) -> None:
    reader, writer = await asyncio.open_unix_connection(g.socket)
    body = b'{"generation":"g-before"}'
    writer.write(b'{"op":"subscribe","ref":1,"len":%d}\n%b' % (len(body), body))
    assert json.loads(await reader.readline()) == {"ref": 1, "len": 9}
    assert await reader.readexactly(9) == b'{"ok":{}}'
    header = json.loads(await reader.readline())
    assert (header["event"], await reader.readexactly(header["len"])) == ("restore", b'{"generation":"g-0"}')
    writer.close()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"hello\n", "malformed header line b'hello'"),
        (b'{"op":"send","ref":1}\n', "malformed header line"),
        (b'{"op":"send","ref":1,"len":-1}\n', "malformed header line"),
        (b'{"op":"send","ref":1,"len":99999999}\n', "is over 16777216"),
        (b"x" * 5000, "a header line is over 4096 bytes"),
        (b'{"op":"exit","ref":1,"len":2}\n{}', "no operation is called 'exit'"),
        (b'{"op":"consumed","ref":1,"len":2}\n{}', "no operation is called 'consumed'"),
        (b'{"op":"receive","ref":1,"len":2}\n[]', "malformed arguments of receive"),
        (b'{"op":"wait","ref":1,"len":1}\n{', "malformed arguments of wait"),
    ],
)
async def test_nonsense_on_the_socket(g: Guest, said: bytes, why: str) -> None:
    reader, writer = await asyncio.open_unix_connection(g.socket)
    writer.write(said)
    header = json.loads(await asyncio.wait_for(reader.readline(), 5))
    answer = json.loads(await reader.readexactly(header["len"]))
    assert answer["error"]["code"] == "invalid_input"
    assert why in answer["error"]["message"]
    writer.close()
    await AsyncContext(g.socket).emit("still there")


async def test_without_guestd() -> None:
    with pytest.raises(Unavailable, match=r"nothing answers at /no/such\.sock; a Context works inside"):
        await AsyncContext("/no/such.sock").send(1)
    with pytest.raises(Unavailable, match="nothing answers"):
        await asyncio.to_thread(Context("/no/such.sock").send, 1)


async def test_guestd_going_away_is_an_error_not_a_hang(g: Guest) -> None:
    task = asyncio.create_task(AsyncContext(g.socket).receive())
    await until(lambda: g.ops("receive"))
    await g.link.close()
    with pytest.raises(Unavailable, match="guestd"):
        await asyncio.wait_for(task, 5)


async def test_a_dropped_exit_is_told_again_after_the_next_thaw() -> None:
    times = 0
    async with guest() as g:
        first = g.on_stream

        async def flaky(stream: Any) -> None:
            nonlocal times
            if stream.kind == "call":
                times += 1
                if times == 1:
                    raise RuntimeError("the handler failed")
            await first(stream)

        g.link._on_stream = flaky
        await g.start("true")
        await until(lambda: times == 1)
        await g.link.ping()
        await g.thaw("g-1")
        assert await asyncio.wait_for(g.exit, 5) == {"code": 0, "signal": None}
