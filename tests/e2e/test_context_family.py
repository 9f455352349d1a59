"""wait_any, children, forks and the conversation in real sandboxes, over crashes in the middle of each."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_agents import Agents
from e2e_fixtures import ASK, SLOWER, House, Session, house

from rethaw.model.errors import Conflict
from rethaw.sdk import Client
from rethaw.sdk.agents import find
from rethaw.testing.chaos.run import code_archive
from rethaw.testing.provider import ProviderRequest, Reply

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180 * SLOWER),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
agents = Agents()
both = pytest.mark.parametrize("style", ["blocking", "asyncio"])

WORKER = """
def worker(ctx, n, wait=None):
    print("working", n, ctx.attempt, flush=True)
    heard = ctx.wait(wait).payload if wait else None
    if n < 0:
        sys.exit(3)
    return {"n": n, "heard": heard, "parent": None}
"""
agents._parts.append(WORKER)  # pyright: ignore[reportPrivateUsage]


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as h:
        yield h


def family(home: House, name: str, args: dict[str, Any] | None = None, **more: Any) -> Session:
    """A session of `name` that may spawn workers."""
    code = "\n".join([ASK, *agents._parts]).encode()  # pyright: ignore[reportPrivateUsage]
    digest = home.server.request("POST", "/v1/blobs", code_archive(agent=code))["digest"]
    worker = {"name": "worker", "entry": "agent.py::worker", "code": digest}
    return agents.start(home, name, args, agents={"worker": worker}, **more)


def crash(session: Session) -> None:
    """Kill the sandbox and wait until the session runs again."""
    before = session.view["crashes"]
    session.crash()
    session.until("the crash", lambda s: s.view["crashes"] > before)
    session.until_state("running", "waiting", "suspending", "suspended")


def children(home: House, session: Session) -> list[dict[str, Any]]:
    found = home.server.request("GET", "/v1/sessions?limit=1000")["sessions"]
    return sorted((v for v in found if v["parent"] == session.id), key=lambda v: v["id"])


def at(home: House, view: dict[str, Any]) -> Session:
    return Session(home, view)


# ---------------------------------------------------------------- wait_any


ANY = agents.add("""
async def main(ctx):
    got, timer = [], ctx.timer("1h")
    address = await ctx.signal("go")
    await ctx.snapshot()
    while len(got) < 4:
        print("waiting", len(got), flush=True)
        came = await ctx.wait_any(address, ctx.inbox, timer, timeout="2h")
        got.append([type(came).__name__, came.payload])
        if type(came).__name__ == "Signal":
            address = await ctx.signal("go")
    try:
        await ctx.wait_any(ctx.inbox, "other", timeout=0.1)
    except rethaw.WaitTimeout:
        got.append("late")
    assert await ctx.wait_any(ctx.inbox, short := ctx.timer(0.1)) is short
    return [got, (await ctx.wait("go")).payload]
""")


@both
def test_waiting_for_any_across_three_crashes(home: House, style: str) -> None:
    session = agents.start(home, ANY, style=style)
    session.until_output("waiting 0")
    crash(session)
    session.send("m1")
    session.until_output("waiting 1")
    crash(session)  # what it got after the snapshot it gets again
    session.signal("go", 1)
    session.until_output("waiting 2")
    crash(session)
    session.send("m2")
    session.send("m3")
    session.until("four", lambda s: len(s.events("wait.completed")) >= 4)
    session.signal("go", 2)
    got, last = session.result()
    assert got == [["Message", "m1"], ["Signal", 1], ["Message", "m2"], ["Message", "m3"], "late"]
    assert last == 2
    deadlines = {e["data"]["wait"] for e in session.events("wait.opened") if e["data"]["kind"] == "any"}
    assert len(deadlines) == 6


PARALLEL = agents.add("""
def main(ctx):
    import threading
    got = []
    def wait(n):
        came = ctx.wait_any(ctx.inbox, ctx.signal("s%d" % n), ctx.timer("1h"))
        got.append([type(came).__name__, came.payload])
    threads = [threading.Thread(target=wait, args=(n,)) for n in range(6)]
    for t in threads: t.start()
    print("all wait", flush=True)
    for t in threads: t.join()
    return sorted(got)
""")


def test_many_waits_from_threads_while_it_sleeps(home: House) -> None:
    session = agents.start(home, PARALLEL, idle_suspend_s=0.2)
    session.until_output("all wait")
    session.until_state("suspended")
    why = home.server.request("GET", f"/v1/sessions/{session.id}/why")["waiting_for"]
    assert sorted({one["kind"] for one in why}) == ["inbox", "signal", "timer"]
    for n in range(3):
        session.send(n)
    session.until("three", lambda s: len(s.events("message.consumed")) == 3)
    for n in range(6):
        with contextlib.suppress(Conflict):  # three of them are one too many, and it may have ended by then
            session.signal(f"s{n}", f"s{n}")
    got = session.result()
    assert got[:3] == [["Message", n] for n in range(3)]
    assert [kind for kind, _ in got[3:]] == ["Signal"] * 3


# ---------------------------------------------------------------- children


BOSS = agents.add("""
async def main(ctx, crash_before=False):
    one = await ctx.spawn("worker", n=1)
    two = await ctx.spawn("worker", n=2, wait="go")
    bad = await ctx.spawn("worker", n=-1)
    print("spawned", one.id, two.id, bad.id, flush=True)
    first = await ctx.wait_any(one, two, timeout="1h")
    print("first", first.id == one.id, flush=True)
    await two.send("unheard")
    values = await ctx.wait_all(one, two, bad, timeout="1h")
    try:
        await bad.result()
    except rethaw.ChildFailed as error:
        values.append(str(error))
    return [v if not isinstance(v, Exception) else v.details["reason"] for v in values]
""")


def test_children_of_a_session_that_crashes_and_sleeps(home: House) -> None:
    session = family(home, BOSS, style="asyncio", idle_suspend_s=0.5)
    session.until_output("first True")
    for _ in range(3):
        crash(session)
    kids = children(home, session)
    assert len(kids) == 3
    two = at(home, kids[1])
    two.until_output("working 2")
    crash(two)
    session.until_state("suspended")
    two.signal("go", "now")
    values = session.result()
    assert values[:3] == [
        {"n": 1, "heard": None, "parent": None}, {"n": 2, "heard": "now", "parent": None}, "exited",
    ]  # fmt: skip
    assert f"child {kids[2]['id']} failed" in values[3]
    assert [k["id"] for k in children(home, session)] == [k["id"] for k in kids]
    spawned = session.events("child.spawned")
    assert [e["data"]["child"] for e in spawned] == [k["id"] for k in kids]
    messages = home.server.request("GET", f"/v1/sessions/{two.id}/events?after=0&limit=1000")["events"]
    assert len([e for e in messages if e["type"] == "message.received"]) == 1


RETRIED = agents.add("""
def main(ctx, keep):
    before = [e["data"]["child"] for e in ctx.history() if e["type"] == "child.spawned"]
    if keep and before:
        child = ctx.child(before[0])
    else:
        child = ctx.spawn("worker", n=ctx.attempt, wait="go")
    ctx.send(child.id)
    print("attempt", ctx.attempt, "of", len(before), flush=True)
    ctx.snapshot()
    if ctx.attempt < 3:
        ctx.wait("fail")
        raise ValueError("attempt %d fails" % ctx.attempt)
    return child.result(timeout="1h")
""")


@pytest.mark.parametrize("keep", [False, True], ids=["cancelled", "kept"])
def test_children_of_attempts_that_failed(home: House, keep: bool) -> None:
    retries = {"max": 2, "delay_s": 0.1, "children": "keep" if keep else "cancel"}
    session = family(home, RETRIED, {"keep": keep}, retries=retries, idle_suspend_s=0.5)
    for attempt in (1, 2):
        session.until_output(f"attempt {attempt} of {attempt - 1 if not keep else min(1, attempt - 1)}")
        crash(session)  # a crash within an attempt is no failure: its child is still its own
        session.until("its child", lambda s, n=attempt: len(children(home, s)) == (1 if keep else n))
        session.signal("fail")
    session.until_output("attempt 3 of")
    session.until("its child", lambda s: len(children(home, s)) == (1 if keep else 3))
    kids = [at(home, view) for view in children(home, session)]
    kids[-1].signal("go", "yes")
    assert session.result() == {"n": 1 if keep else 3, "heard": "yes", "parent": None}
    assert [kid.view["state"] for kid in kids] == ["cancelled"] * (len(kids) - 1) + ["completed"]
    assert session.outbox() == ([kids[0].id] * 3 if keep else [kid.id for kid in kids])


SPAWN_CRASH = agents.add("""
def main(ctx):
    ctx.snapshot()
    print("ready", flush=True)
    while ctx.receive().payload != "go":
        pass
    child = ctx.spawn("worker", n=5)
    print("spawned", flush=True)
    return child.result(timeout="1m")["n"]
""")


def test_killed_around_a_spawn_there_is_one_child(home: House) -> None:
    session = family(home, SPAWN_CRASH, style="blocking")
    for n in range(3):
        session.until("ready", lambda s: s.view["state"] in ("running", "waiting"))
        session.send("go" if n == 0 else "again")
        session.until("spawned", lambda s: s.events("child.spawned"))
        session.crash()
        session.until("recovery", lambda s, n=n: s.view["crashes"] > n)
        if session.view["state"] == "completed":
            break
    assert session.result() == 5
    assert len(children(home, session)) == 1


LEFT = agents.add("""
def main(ctx):
    child = ctx.spawn("worker", n=1, wait="never")
    ctx.wait("go")
    sys.exit(4)
""")


def test_children_of_a_session_that_fails_are_cancelled(home: House) -> None:
    session = family(home, LEFT, style="blocking")
    session.until("a child", lambda s: children(home, s))
    (kid,) = children(home, session)
    at(home, kid).until_output("working 1")
    session.signal("go")
    session.until_state("failed")
    at(home, kid).until_state("cancelled")


FILES = {
    "boss_sdk.py": """
import rethaw
from workers_sdk import summarize

@rethaw.agent
async def boss(ctx: rethaw.AsyncContext, urls: list[str], deep: bool = False) -> list[str]:
    if deep:
        child = await ctx.spawn(boss, urls)  # itself
        return await child.result()
    children = [await ctx.spawn(summarize, url) for url in urls]
    return [await child.result() for child in children]
""",
    "workers_sdk.py": """
import rethaw

@rethaw.agent(name="summary", memory="128MiB")
def summarize(ctx: rethaw.Context, url: str) -> str:
    return url.upper()
""",
}


def test_agents_of_two_files_sent_by_the_sdk(home: House, tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    boss = find(tmp_path / "boss_sdk.py")
    with Client(home.server.url, home.server.token) as client:
        session = boss.start_on(client, ["a", "b"], deep=True)
        assert session.result(timeout="2m") == ["A", "B"]
        (middle,) = children(home, at(home, {"id": session.id}))
        assert middle["agent"]["name"] == "boss"
        kids = children(home, at(home, middle))
        assert [(k["agent"]["name"], k["agent"]["memory_bytes"]) for k in kids] == [("summary", 128 << 20)] * 2
    shown = home.server.cli("show", kids[0]["id"]).stdout
    assert f"parent      {middle['id']}" in shown
    assert "PARENT" in home.server.cli("ls").stdout


# ---------------------------------------------------------------- forks


FORK = agents.add("""
async def main(ctx):
    import random
    text = "before"
    fork = await ctx.fork()
    print("forked" if fork.forked else "parent", random.random(), flush=True)
    told = (await ctx.receive(timeout="1m")).payload
    return [fork.forked, fork.session, fork.parent, ctx.session, text, told]
""")


def test_a_fork_returns_in_both_and_is_made_once(home: House) -> None:
    session = agents.start(home, FORK, style="asyncio")
    session.until("a fork", lambda s: s.events("session.forked"))
    made = at(home, {"id": session.events("session.forked")[0]["data"]["fork"]})
    session.until_output("parent")
    made.until_output("forked")
    for _ in range(3):  # the snapshot has the call open: both ask again
        crash(session)
        crash(made)
        session.until_output("parent")
        made.until_output("forked")
    assert len(session.events("session.forked")) == 1
    session.send("p")
    made.send("f")
    assert session.result() == [False, made.id, session.id, session.id, "before", "p"]
    assert made.result() == [True, made.id, session.id, made.id, "before", "f"]
    assert session.output().split()[1] != made.output().split()[1]


# ---------------------------------------------------------------- history, deadline


HISTORY = agents.add("""
import http.client, json, urllib.parse
def chat(base, path, body):
    at = urllib.parse.urlsplit(os.environ[base])
    connection = http.client.HTTPConnection(at.hostname, at.port, timeout=60)
    connection.request("POST", at.path + path, json.dumps(body), {"content-type": "application/json"})
    return connection.getresponse().read()

def main(ctx):
    if not ctx.history("openai"):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
        said = json.loads(chat("OPENAI_BASE_URL", "/chat/completions", {"model": "m", "messages": messages}))
        messages += [said["choices"][0]["message"], {"role": "user", "content": "two"}]
        chat("OPENAI_BASE_URL", "/chat/completions", {"model": "m", "messages": messages, "stream": True})
    found = ctx.history("anthropic")
    print("asked", flush=True)
    ctx.wait("go")
    body = {"model": "m", "max_tokens": 9, "system": found.system, "messages": found + [{"role": "user", "content": "three"}]}
    chat("ANTHROPIC_BASE_URL", "/v1/messages", body)
    return {"openai": ctx.history(form="openai"), "responses": ctx.history("responses"), "system": found.system,
            "deadline": str(ctx.deadline), "left": ctx.remaining.total_seconds(), "events": len(ctx.history())}
""")


def test_the_conversation_goes_on_in_another_form(home: House) -> None:
    def answer(request: ProviderRequest) -> Reply:
        return Reply(f"reply to {request.last_text} {request.system}")

    home.provider.answer = answer
    session = agents.start(home, HISTORY, style="blocking", max_duration_s=3600.0)
    session.until_output("asked")
    crash(session)
    session.signal("go")
    found = session.result()
    home.provider.reset()
    said = [(m["role"], m["content"]) for m in found["openai"]]
    expected = [
        ("user", "one"),
        ("assistant", "reply to one Be brief."),
        ("user", "two"),
        ("assistant", "reply to two Be brief."),
    ]
    assert said[:5] == [("system", "Be brief."), *expected]
    assert [(m["role"], m["content"]) for m in found["responses"]][:4] == expected
    assert found["system"] == "Be brief."
    assert 3400 < found["left"] < 3600
    assert found["deadline"].endswith("+00:00")
    assert json.dumps(found)


# ---------------------------------------------------------------- the server dies


FAULTS = ("control.child.ended", "control.fork_self.before", "control.fork_self.made")
ALL = agents.add("""
def main(ctx):
    ctx.snapshot()
    print("begun", flush=True)
    ctx.wait("go")
    child = ctx.spawn("worker", n=7, wait="end")
    value = child.result(timeout="5m")["n"]
    fork = ctx.fork()
    print("past", flush=True)
    ctx.wait("end")
    return [value, fork.forked]
""")


@pytest.mark.long
def test_a_server_that_is_killed_at_each_step_makes_one_child_and_one_fork(home: House) -> None:
    session = family(home, ALL, style="blocking")
    session.until_output("begun")
    session.signal("go")
    session.until("the child", lambda s: children(home, s))
    home.server.kill9()
    for n in range(len(FAULTS)):
        home.server.restart(faults=",".join(f"{name}:1=kill" for name in FAULTS[n:]))
        if n == 0:
            at(home, children(home, session)[0]).signal("end")
        process = home.server.process
        assert process is not None
        assert process.wait(60) == -signal.SIGKILL, (FAULTS[n], home.server.log_tail())
    home.server.restart()
    session.until_output("past")
    (forked,) = session.events("session.forked")
    made = at(home, {"id": forked["data"]["fork"]})
    made.until_output("past")
    for one in (session, made):
        one.signal("end")
    assert (session.result(), made.result()) == ([7, False], [7, True])
    assert len(children(home, session)) == 1
