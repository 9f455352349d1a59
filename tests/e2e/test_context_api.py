"""Context as an agent sees it, from blocking code and from asyncio, and how a session ends: results, exit codes, cancel,
deadlines, output."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest
from e2e_agents import Agents
from e2e_fixtures import House, Session, body, gapless, house

from rethaw.model.errors import Conflict, InvalidInput
from rethaw.testing import processes

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
agents = Agents()
both = pytest.mark.parametrize("style", ["blocking", "asyncio"])


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as h:
        yield h


def post(url: str, data: bytes) -> tuple[int, dict[str, Any]]:
    at = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=30)
    try:
        connection.request("POST", at.path, data, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def printed(session: Session, name: str) -> str:
    """The value that the agent printed as "NAME=VALUE"."""
    session.until_output(f"{name}=")
    session.until("the line's end", lambda s: re.search(rf"{name}=.*\n", s.output()))
    found = re.search(rf"{name}=(.*)\n", session.output())
    assert found
    return found[1]


def ended(session: Session, timeout_s: float = 60.0) -> dict[str, Any]:
    session.until_state("completed", "failed", "cancelled", timeout_s=timeout_s)
    return session.view


def output(session: Session, stream: str) -> bytes:
    """The stream's bytes by offset, which have to fit together."""
    out = b""
    for event in session.events("output"):
        if event["data"]["stream"] == stream:
            assert event["data"]["offset"] == len(out)
            out += body(event)
    return out


# ---------------------------------------------------------------- who it is


ABOUT = agents.add("""
async def main(ctx, task, depth=3):
    first = ctx.generation
    return {"session": ctx.session, "attempt": ctx.attempt, "args": ctx.args, "fresh": ctx.fresh,
            "generation": first, "task": task, "depth": depth, "env": os.environ["RETHAW_SESSION"]}
""")


@both
def test_a_session_knows_itself(home: House, style: str) -> None:
    session = agents.start(home, ABOUT, {"task": "look", "depth": [1, None, "ü"]}, style=style)
    found = session.result()
    generation = found.pop("generation")
    args = {"task": "look", "depth": [1, None, "ü"]}
    expected = {"session": session.id, "env": session.id, "attempt": 1, "args": args, "fresh": False, **args}
    assert found == expected
    assert re.fullmatch(r"[0-9a-f-]{36}", generation)


RESTORED = agents.add("""
async def main(ctx):
    seen = []
    ctx.on_restore(seen.append)
    before = ctx.generation
    await ctx.snapshot()
    print("saved", flush=True)
    await ctx.wait("go")
    return {"before": before, "seen": seen, "after": ctx.generation, "attempt": ctx.attempt}
""")


@both
def test_on_restore_is_called_with_the_new_generation_after_a_crash(home: House, style: str) -> None:
    session = agents.start(home, RESTORED, style=style)
    session.until_output("saved")
    session.until("a save", lambda s: s.events("snapshot.created"))
    session.crash()
    session.until("recovery", lambda s: s.events("snapshot.restored"))
    session.signal("go")
    found = session.result()
    assert found["seen"] == [found["after"]]
    assert found["after"] != found["before"]
    assert found["attempt"] == 1
    (restored,) = session.events("snapshot.restored")
    assert restored["data"]["generation"] == found["after"]


# ---------------------------------------------------------------- messages


INBOX = agents.add("""
async def main(ctx):
    try:
        await ctx.receive(timeout=0.3)
        return "no timeout"
    except rethaw.WaitTimeout as error:
        assert isinstance(error, TimeoutError)
        print("timeout", flush=True)
    got = []
    async for message in ctx.messages(idle="1s" if got else "20s"):
        got.append([message.number, message.payload])
        await ctx.send({"echo": message.payload})
        if message.payload == "last":
            break
    return got
""")


@both
def test_messages_come_in_order_and_waiting_for_one_times_out(home: House, style: str) -> None:
    session = agents.start(home, INBOX, style=style)
    session.until_output("timeout")
    payloads: list[Any] = ["first", {"n": [1, 2]}, None, "last"]
    for payload in payloads:
        session.send(payload)
    assert session.result() == [[n + 1, p] for n, p in enumerate(payloads)]
    assert session.outbox() == [{"echo": p} for p in payloads]
    gapless(session.events(all_lines=True))


IDLE_INBOX = agents.add("""
async def main(ctx):
    got = []
    async for message in ctx.messages(idle=1):
        got.append(message.payload)
    return got
""")


def test_a_message_sent_twice_under_one_key_comes_once(home: House) -> None:
    session = agents.start(home, IDLE_INBOX)
    first = session.post("messages", {"payload": "a", "idempotency_key": "k"})
    again = session.post("messages", {"payload": "a", "idempotency_key": "k"})
    assert first["id"] == again["id"]
    with pytest.raises(Conflict):
        session.post("messages", {"payload": "b", "idempotency_key": "k"})
    assert session.result() == ["a"]


ODD = (
    rb'"a\u0000b"',
    rb'"\ud800 alone"',
    '"ünïcode 🧊"'.encode(),
    b'{"b": 1.10, "a": 12345678901234567890123456789, "b": 2}',
    b"[1e400, -0.0, 1E5]",
)


RAW = agents.add("""
async def main(ctx):
    got = []
    async for message in ctx.messages(idle="20s"):
        got.append(message.raw.decode())
        if message.payload == "end":
            break
        if message.number in (1, 2, 3):
            await ctx.send(message.payload)
    return got
""")


@both
def test_payloads_are_kept_byte_for_byte(home: House, style: str) -> None:
    session = agents.start(home, RAW, style=style)
    for raw in ODD:
        home.server.request("POST", f"/v1/sessions/{session.id}/messages", b'{"payload":' + raw + b"}")
    session.send("end")
    assert [text.encode() for text in session.result()] == [*ODD, b'"end"']
    sent = home.server.request("GET", f"/v1/sessions/{session.id}/outbox?after=0")["messages"]
    assert [json.loads(base64.urlsafe_b64decode(m["payload"])) for m in sent] == [json.loads(raw) for raw in ODD[:3]]
    kept = home.server.request("GET", f"/v1/sessions/{session.id}/messages")["messages"]
    assert [base64.urlsafe_b64decode(m["payload"]) for m in kept] == [*ODD, b'"end"']


# ---------------------------------------------------------------- signals


CALLBACK = agents.add("""
async def main(ctx):
    signal = await ctx.signal("approval")
    assert not signal.complete
    print("url=" + signal.url, flush=True)
    done = await ctx.wait(signal)
    return {"payload": done.payload, "complete": done.complete, "name": done.name}
""")


@both
def test_a_callback_address_completes_its_wait_once(home: House, style: str) -> None:
    session = agents.start(home, CALLBACK, style=style, idle_suspend_s=0.5)
    url = printed(session, "url")
    session.until_state("suspended")
    status, answer = post(url, b'{"ok": "\\u0000"}')
    assert status == 200, answer
    assert session.result() == {"payload": {"ok": "\0"}, "complete": True, "name": "approval"}
    status, answer = post(url, b"1")
    assert status == 409, answer
    assert answer["error"]["code"] == "conflict"
    assert post(url.rsplit("/", 1)[0] + "/c_forged", b"1")[0] in (401, 403, 404)


EARLY = agents.add("""
async def main(ctx):
    print("up", flush=True)
    await ctx.wait("start")
    first = await ctx.wait("early")
    try:
        await ctx.wait("early", timeout=0.5)
        return "a second one"
    except rethaw.WaitTimeout:
        return first.payload
""")


@both
def test_a_signal_that_comes_first_is_kept(home: House, style: str) -> None:
    session = agents.start(home, EARLY, style=style)
    session.until_output("up")
    one = session.post("signals/early", {"payload": "e", "idempotency_key": "k"})
    two = session.post("signals/early", {"payload": "e", "idempotency_key": "k"})
    assert one == two
    session.signal("start")
    assert session.result() == "e"


# ---------------------------------------------------------------- time, events, snapshots


TIME = agents.add("""
async def main(ctx):
    await ctx.emit("began", step=1, text="ü\\0")
    began = time.time()
    await ctx.sleep(1.5)
    slept = time.time() - began
    snapshot = await ctx.snapshot()
    history = await ctx.history()
    seqs = [e["seq"] for e in history]
    assert seqs == sorted(set(seqs)), seqs
    mine = [json.loads(e["body"]) for e in history if e["type"] == "emitted" and e["data"]["name"] == "began"]
    return {"slept": slept, "snapshot": snapshot, "emitted": mine, "types": sorted({e["type"] for e in history})}
""")


@both
def test_sleep_emit_history_and_snapshot(home: House, style: str) -> None:
    session = agents.start(home, TIME, style=style)
    found = session.result()
    assert 1.4 < found["slept"] < 10
    assert found["emitted"] == [{"step": 1, "text": "ü\0"}]
    assert {"session.created", "attempt.started", "emitted", "snapshot.created"} <= set(found["types"])
    snapshots = home.server.request("GET", f"/v1/sessions/{session.id}/snapshots")["snapshots"]
    assert found["snapshot"] in [s["id"] for s in snapshots]


LONG = agents.add("""
def main(ctx):
    for n in range(600):
        ctx.emit("n", n=n)
    history = ctx.history()
    return [json.loads(e["body"])["n"] for e in history if e["type"] == "emitted"] == list(range(600))
""")


def test_history_of_a_long_session_comes_whole(home: House) -> None:
    assert agents.start(home, LONG).result() is True


REFUSED = agents.add("""
def main(ctx):
    said = []
    def refused(call):
        try:
            call()
            said.append("accepted")
        except rethaw.RethawError as error:
            said.append([type(error).__name__, str(error)])
    refused(lambda: ctx.send(float("nan")))
    refused(lambda: ctx.send({1, 2}))
    refused(lambda: ctx.send("x" * (2 << 20)))
    refused(lambda: ctx.receive(timeout="soon"))
    refused(lambda: ctx.sleep(-1))
    refused(lambda: ctx.wait(""))
    refused(lambda: ctx.wait("x" * 100_000, timeout=0.2))
    refused(lambda: ctx.wait("nul\\0", timeout=0.2))
    refused(lambda: ctx.receive(timeout=0.1))
    ctx.send("well")
    return said
""")


def test_what_context_refuses_names_the_value_and_leaves_the_session_as_it_was(home: House) -> None:
    session = agents.start(home, REFUSED)
    said = session.result()
    names = [s if isinstance(s, str) else s[0] for s in said]
    assert names[:6] == ["InvalidInput", "InvalidInput", "TooLarge", "InvalidInput", "InvalidInput", "InvalidInput"]
    assert "2097154" in said[2][1]
    assert "'soon'" in said[3][1]
    assert "-1" in said[4][1]
    assert names[6] == "InvalidInput"
    assert names[7] in ("InvalidInput", "WaitTimeout")
    assert names[8] == "WaitTimeout"
    assert session.outbox() == ["well"]


YIELDS = agents.add("""
def main(ctx):
    yield {"before": 1}
    got = ctx.wait("go").payload
    yield {"after": got}
    return "ended"
""")
YIELDS_ASYNC = agents.add("""
async def main(ctx):
    yield {"before": 1}
    got = (await ctx.wait("go")).payload
    yield {"after": got}
""")


@pytest.mark.parametrize(("code", "result"), [(YIELDS, "ended"), (YIELDS_ASYNC, None)], ids=["plain", "async"])
def test_what_a_generator_yields_goes_out_once_also_across_a_crash(home: House, code: str, result: object) -> None:
    session = agents.start(home, code)
    session.until("the wait", lambda s: s.events("wait.opened"))
    session.post("snapshots")
    session.crash()
    session.signal("go", 5)
    assert session.result() == result
    assert session.outbox() == [{"before": 1}, {"after": 5}]


SHARED = agents.add("""
def main(ctx):
    def sender(n):
        for k in range(10):
            ctx.send([n, k])
    threads = [threading.Thread(target=sender, args=(n,)) for n in range(6)]
    [t.start() for t in threads]
    pids = []
    for n in (6, 7):
        pid = os.fork()
        if pid == 0:
            sender(n)
            os._exit(0)
        pids.append(pid)
    [t.join() for t in threads]
    return [os.waitpid(p, 0)[1] for p in pids]
""")


def test_many_threads_and_processes_share_a_context(home: House) -> None:
    session = agents.start(home, SHARED)
    assert session.result() == [0, 0]
    got = session.outbox()
    assert len(got) == 80
    for n in range(8):
        assert [k for who, k in got if who == n] == list(range(10))


GIVE_UP = agents.add("""
async def main(ctx):
    waits = [asyncio.create_task(ctx.wait(name)) for name in ("a", "b")]
    await asyncio.sleep(0.5)
    waits[0].cancel()
    print("cancelled", flush=True)
    done = await waits[1]
    return done.payload
""")


def test_cancelling_a_task_cancels_its_wait_and_no_other(home: House) -> None:
    session = agents.start(home, GIVE_UP, style="asyncio")
    session.until_output("cancelled")
    session.signal("b", "bee")
    assert session.result() == "bee"


# ---------------------------------------------------------------- ends


NOTHING = agents.add("async def main(ctx):\n    pass\n")
NO_JSON = agents.add("async def main(ctx):\n    return {1, 2}\n")
RAISES = agents.add("async def main(ctx):\n    raise ValueError('no good')\n")


@both
def test_returning_nothing_completes_and_what_is_no_json_or_raises_fails(home: House, style: str) -> None:
    nothing, no_json, raises = (agents.start(home, one, style=style) for one in (NOTHING, NO_JSON, RAISES))
    assert nothing.result() is None
    assert nothing.view["exit_code"] == 0
    for session, said in ((no_json, "the agent's result is not JSON"), (raises, "ValueError: no good")):
        view = ended(session)
        assert (view["state"], view["reason"], view["exit_code"]) == ("failed", "exited", 1)
        assert said in session.output("stderr")


def test_exit_codes(home: House) -> None:
    cases = [
        ("exit 0", "completed", 0),
        ("exit 7", "failed", 7),
        ("kill -9 $$", "failed", 137),
        ("kill -TERM $$", "failed", 143),
        ("sleep 1000 & exit 3", "failed", 3),
    ]
    started = [home.start({"name": "sh", "command": ["sh", "-c", command]}) for command, _, _ in cases]
    for session, (command, state, code) in zip(started, cases, strict=True):
        view = ended(session)
        assert (view["state"], view["exit_code"]) == (state, code), command
    shown = json.loads(home.server.cli("show", started[1].id, "--json").stdout)
    assert (shown["state"], shown["exit_code"]) == ("failed", 7)


def test_run_ends_with_the_exit_code_of_its_program(home: House) -> None:
    done = home.server.cli("run", "--image", "base", "--", "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert done.returncode == 7
    assert done.stdout == "out\n"
    assert "err\n" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- cancel


POLITE = agents.add("""
def main(ctx):
    def stop(number, frame):
        print("handler ran", flush=True)
        sys.exit(3)
    signal.signal(signal.SIGTERM, stop)
    print("up", flush=True)
    while True:
        time.sleep(0.1)
""")
STUBBORN = agents.add("""
def main(ctx):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("up", flush=True)
    while True:
        time.sleep(0.1)
""")
FOREVER = agents.add('def main(ctx):\n    ctx.wait("never")\n')


def test_cancel_lets_the_sigterm_handler_run(home: House) -> None:
    session = agents.start(home, POLITE)
    session.until_output("up")
    session.post("cancel")
    view = ended(session)
    assert (view["state"], view["reason"], view["exit_code"]) == ("cancelled", "cancelled", 3)
    assert "handler ran" in session.output()


def test_cancel_kills_after_the_grace_period_what_ignores_sigterm(home: House) -> None:
    session = agents.start(home, STUBBORN, grace_s=1.0)
    session.until_output("up")
    before = {box.id for box in home.server.sandboxes()}
    began = time.monotonic()
    session.post("cancel")
    view = ended(session)
    processes.wait_until(lambda: before > {box.id for box in home.server.sandboxes()}, 20, "its sandbox to be gone")
    assert 0.9 < time.monotonic() - began < 10
    assert (view["state"], view["reason"], view["exit_code"]) == ("cancelled", "cancelled", 137)


def test_cancel_now_waits_for_nobody(home: House) -> None:
    session = agents.start(home, STUBBORN, grace_s=60.0)
    session.until_output("up")
    session.post("cancel", {"now": True})
    view = ended(session, timeout_s=10)
    assert (view["state"], view["reason"]) == ("cancelled", "cancelled")


def test_a_waiting_and_a_suspended_session_can_be_cancelled(home: House) -> None:
    waiting = agents.start(home, FOREVER)
    waiting.until_state("waiting")
    asleep = agents.start(home, FOREVER, idle_suspend_s=0.2)
    asleep.until_state("suspended")
    for session in (waiting, asleep):
        session.post("cancel")
        view = ended(session)
        assert (view["state"], view["reason"]) == ("cancelled", "cancelled")
    with pytest.raises(Conflict):
        asleep.post("suspend")


def test_max_duration_ends_what_ignores_sigterm_and_what_sleeps_as_well(home: House) -> None:
    polite = agents.start(home, POLITE, max_duration_s=2.0)
    stubborn = agents.start(home, STUBBORN, max_duration_s=2.0, grace_s=1.0)
    asleep = agents.start(home, FOREVER, idle_suspend_s=0.2, max_duration_s=4.0)
    for session, limit in ((polite, "2"), (stubborn, "2"), (asleep, "4")):
        view = ended(session)
        assert (view["state"], view["reason"]) == ("failed", "max_duration"), view
        assert limit in (view["detail"] or "")


# ---------------------------------------------------------------- output


BINARY = agents.add("""
def main(ctx):
    data = bytes(range(256)) * 40
    sys.stdout.buffer.write(data); sys.stdout.flush()
    sys.stderr.buffer.write(data[::-1]); sys.stderr.flush()
""")


def test_binary_output_is_kept_exactly(home: House) -> None:
    session = agents.start(home, BINARY)
    session.result()
    data = bytes(range(256)) * 40
    assert output(session, "stdout") == data
    assert output(session, "stderr") == data[::-1]
    assert home.server.request("GET", f"/v1/sessions/{session.id}/logs", raw=True) == data
    assert home.server.request("GET", f"/v1/sessions/{session.id}/logs?stream=stderr", raw=True) == data[::-1]
    with pytest.raises(InvalidInput):
        home.server.request("GET", f"/v1/sessions/{session.id}/logs?stream=nosuch", raw=True)


FLOOD = agents.add("""
import random
def main(ctx):
    source = random.Random(7)
    for n in range(80):
        sys.stdout.buffer.write(source.randbytes(1 << 16))
        if n == 40:
            sys.stdout.flush()
            ctx.snapshot()
            print("", end="", file=sys.stderr)
            ctx.emit("half")
            ctx.wait("on")
    sys.stdout.flush()
""")


def test_five_megabytes_of_output_come_whole_also_across_a_crash(home: House) -> None:
    session = agents.start(home, FLOOD)
    session.until("half", lambda s: s.events("emitted"))
    session.until_state("waiting")
    session.crash()
    session.until("recovery", lambda s: s.events("snapshot.restored"))
    session.signal("on")
    session.result()
    data = output(session, "stdout")
    assert len(data) == 80 << 16
    source = random.Random(7)
    expected = b"".join(source.randbytes(1 << 16) for _ in range(80))
    assert hashlib.sha256(data).digest() == hashlib.sha256(expected).digest()


def test_logs_prints_both_streams_each_where_it_belongs(home: House) -> None:
    session = home.start({"name": "sh", "command": ["sh", "-c", "echo one; echo two >&2; echo three"]})
    assert ended(session)["state"] == "completed"
    done = home.server.cli("logs", session.id)
    assert (done.stdout, done.stderr) == ("one\nthree\n", "two\n")
    done = home.server.cli("logs", "-f", session.id, "--stream", "stderr")
    assert (done.stdout, done.stderr) == ("", "two\n")


RELAXED = """
def main(ctx):
    ctx.snapshot()
    ctx.send("one")
    ctx.send("two")
    ctx.wait("go")
"""


def test_a_relaxed_agents_messages_wait_for_no_snapshot(home: House) -> None:
    """And one that a crash makes it send again is seen once."""
    session = home.agent(RELAXED, durability="relaxed")
    session.until("both messages", lambda s: s.outbox() == ["one", "two"])
    sent, published = session.events("message.sent"), session.events("message.published")
    between = [e["type"] for e in session.events() if sent[0]["seq"] < e["seq"] < published[0]["seq"]]
    assert "snapshot.created" not in between
    session.post("crash", {"what": "sandbox"})
    session.until("the crash", lambda s: s.view["crashes"] == 1)
    session.until_state("waiting", "suspended")
    assert session.outbox() == ["one", "two"]
    session.signal("go")
    session.until_state("completed")
    assert session.outbox() == ["one", "two"]
