"""Time stands still for a frozen agent (promise 9): clients with a timeout, frozen for longer than it in the middle of a
model call, get their answer and ask once; timers fire by running time; the wall clock is right at once."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_agents import Agents
from e2e_fixtures import House, Session, body, gapless, house

from rethaw.testing import processes
from rethaw.testing.provider import ProviderRequest, Reply

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
agents = Agents()
PIP = {"pip": ["openai"]}
APT = {"apt": ["nodejs"]}
NODE_MODULES = Path(__file__).parents[1] / "node" / "node_modules"


@pytest.fixture(scope="module")
def shared() -> Iterator[House]:
    with house() as h:
        yield h


@pytest.fixture
def home(shared: House) -> House:
    shared.provider.reset()
    if not shared.server.running:
        shared.server.restart()
    return shared


def calls(home: House, tag: str) -> int:
    return sum(tag in text for text in home.provider.texts)


# ---------------------------------------------------------------- clients


ASYNC_OPENAI = agents.add("""
async def main(ctx, tag, timeout):
    from openai import AsyncOpenAI
    client = AsyncOpenAI(timeout=timeout, max_retries=2)
    answer = await client.chat.completions.create(model="test", messages=[{"role": "user", "content": tag}])
    return answer.choices[0].message.content
""")
ASYNC_OPENAI_STREAM = agents.add("""
async def main(ctx, tag, timeout):
    from openai import AsyncOpenAI
    client = AsyncOpenAI(timeout=timeout, max_retries=2)
    stream = await client.chat.completions.create(
        model="test", messages=[{"role": "user", "content": tag}], stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
""")
WAIT_FOR = agents.add("""
async def main(ctx, tag, timeout):
    return await asyncio.wait_for(asyncio.to_thread(ask, tag, 1000), timeout)
""")
BLOCKING = agents.add("""
def main(ctx, tag, timeout):
    return ask(tag, timeout)
""")
SYNC_OPENAI = agents.add("""
def main(ctx, tag, timeout):
    from openai import OpenAI
    client = OpenAI(timeout=timeout, max_retries=2)
    answer = client.chat.completions.create(model="test", messages=[{"role": "user", "content": tag}])
    return answer.choices[0].message.content
""")

NODE_COMMON = """
const [,, tag, timeout] = process.argv;
const base = process.env.OPENAI_BASE_URL;
const body = JSON.stringify({model: "test", messages: [{role: "user", content: tag}]});
const done = text => { console.log("answer=" + text); };
const failed = error => { console.log("error=" + error); process.exit(1); };
"""
NODE: dict[str, str] = {
    "http": """
const http = require("http");
const request = http.request(base + "/chat/completions", {method: "POST", timeout: Number(timeout) * 1000,
    headers: {"content-type": "application/json", "content-length": Buffer.byteLength(body)}}, response => {
    let text = ""; response.on("data", d => text += d);
    response.on("end", () => done(JSON.parse(text).choices[0].message.content));
});
request.on("timeout", () => request.destroy(new Error("timeout")));
request.on("error", failed);
request.end(body);
""",
    "fetch": """
fetch(base + "/chat/completions", {method: "POST", body, headers: {"content-type": "application/json"},
    signal: AbortSignal.timeout(Number(timeout) * 1000)})
    .then(r => r.json()).then(j => done(j.choices[0].message.content)).catch(failed);
""",
    "openai": """
const OpenAI = require("openai").default;
const client = new OpenAI({timeout: Number(timeout) * 1000, maxRetries: 2});
client.chat.completions.create({model: "test", messages: [{role: "user", content: tag}]})
    .then(r => done(r.choices[0].message.content)).catch(failed);
""",
}


def node_archive(name: str) -> bytes:
    """A script, and for the openai client its package as npm installed it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        script = (NODE_COMMON + NODE[name]).encode()
        info = tarfile.TarInfo("client.js")
        info.size = len(script)
        tar.addfile(info, io.BytesIO(script))
        if name == "openai":
            tar.add(NODE_MODULES / "openai", "node_modules/openai", filter=_no_sources)
    return out.getvalue()


def _no_sources(info: Any) -> Any:
    return None if info.name.endswith((".ts", ".mts", ".map", ".mjs")) or "/src/" in info.name else info


class Gates:
    """A provider that answers "early" calls when that gate is open, "late" ones when theirs is."""

    def __init__(self, home: House) -> None:
        self._open = {"early": threading.Event(), "late": threading.Event()}
        home.provider.answer = self._answer  # type: ignore[assignment]

    def open(self, name: str) -> None:
        self._open[name].set()

    async def _answer(self, request: ProviderRequest) -> Reply:
        for name, gate in self._open.items():
            while name in request.last_text and not gate.is_set():  # noqa: ASYNC110 - opened by another thread
                await asyncio.sleep(0.02)
        return Reply(f"re {request.last_text}")


def begin(home: House, client: str, tag: str, timeout_s: float) -> Session:
    """A session whose client has asked, with a timeout of `timeout_s`, and stands frozen in the middle of its call."""
    if client.startswith("node "):
        name = client.removeprefix("node ")
        digest = home.server.request("POST", "/v1/blobs", node_archive(name))["digest"]
        command = ["node", "/app/client.js", tag, str(timeout_s)]
        agent = {"name": "node", "command": command, "code": digest, "image": APT, "idle_suspend_s": None}
        session = home.start(agent)
    else:
        name, style = {
            "AsyncOpenAI": (ASYNC_OPENAI, "asyncio"),
            "AsyncOpenAI stream": (ASYNC_OPENAI_STREAM, "asyncio"),
            "asyncio.wait_for": (WAIT_FOR, "asyncio"),
            "OpenAI": (SYNC_OPENAI, "blocking"),
            "http.client": (BLOCKING, "blocking"),
        }[client]
        args = {"tag": tag, "timeout": timeout_s}
        session = agents.start(home, name, args, style=style, image=PIP, idle_suspend_s=None)
    session.until("the call", lambda s: calls(home, tag) == 1, timeout_s=180)
    session.post("suspend")
    session.until_state("suspended")
    return session


def result_of(session: Session, client: str) -> Any:
    session.until_state("completed", "failed")
    if not client.startswith("node "):
        return session.result()
    said = session.output().strip()
    assert said.startswith("answer="), (said, session.output("stderr"))
    return said.removeprefix("answer=")


def frozen_in_a_call(home: House, clients: list[str], timeout_s: float, frozen_s: float) -> None:
    """Every other client's answer comes while it is frozen, the others' after they are back."""
    gates = Gates(home)
    sessions: list[tuple[Session, str, str]] = []
    for n, client in enumerate(clients):
        tag = f"{'late' if n % 2 else 'early'} {client} {timeout_s:g}"
        sessions.append((begin(home, client, tag, timeout_s), client, tag))
    newest = time.monotonic()
    gates.open("early")
    time.sleep(max(0.0, newest + frozen_s - time.monotonic()))  # the time that must not pass for the clients
    for session, _, _ in sessions:
        session.post("resume")
        session.until_state("running", "waiting", "completed", "failed")
    gates.open("late")
    for session, client, tag in sessions:
        assert result_of(session, client) == f"re {tag}", client
        assert calls(home, tag) == 1, client
        assert not session.events("exchange.reissued", all_lines=True)
        gapless(session.events(all_lines=True))


def with_openai_for_node(clients: list[str]) -> list[str]:
    """With those that need what npm installs; `make setup` does that."""
    return clients if (NODE_MODULES / "openai").is_dir() else [c for c in clients if c != "node openai"]


def test_clients_frozen_for_longer_than_their_timeout(home: House) -> None:
    clients = ["AsyncOpenAI", "AsyncOpenAI", "asyncio.wait_for", "node http", "node openai"]
    frozen_in_a_call(home, with_openai_for_node(clients), 5.0, 8.0)


@pytest.mark.long
def test_every_client_with_15_s_frozen_for_60_s(home: House) -> None:
    clients = ["AsyncOpenAI", "AsyncOpenAI", "AsyncOpenAI stream", "AsyncOpenAI stream", "asyncio.wait_for"]
    clients += ["asyncio.wait_for", "OpenAI", "http.client", "node http", "node http", "node fetch", "node fetch"]
    clients += ["node openai", "node openai"]
    # Each client's name appears once for an early and once for a late answer.
    frozen_in_a_call(home, with_openai_for_node(clients), 15.0, 60.0)


# ---------------------------------------------------------------- timers and clocks


TIMERS = agents.add("""
async def main(ctx, seconds):
    import queue, select, subprocess, threading
    began, wall = time.monotonic(), time.time()
    took = {}
    pipe, _ = os.pipe()
    def timed(name, function):
        function()
        took[name] = time.monotonic() - began
    def timeout():
        try:
            queue.Queue().get(timeout=seconds)
        except queue.Empty:
            pass
    ways = {
        "time.sleep": lambda: time.sleep(seconds),
        "select": lambda: select.select([], [], [], seconds),
        "Event.wait": lambda: threading.Event().wait(seconds),
        "queue": timeout,
        "sleep(1)": lambda: subprocess.run(["sleep", str(seconds)]),
        "timeout(1)": lambda: subprocess.run(["timeout", str(seconds), "cat"], stdin=pipe),
    }
    threads = [threading.Thread(target=timed, args=pair) for pair in ways.items()]
    [t.start() for t in threads]
    print("began", flush=True)
    await asyncio.sleep(seconds)
    took["asyncio.sleep"] = time.monotonic() - began
    now = time.time()
    print("now=%r" % now, flush=True)
    for thread in threads:
        await asyncio.to_thread(thread.join)
    return {"took": took, "wall": time.time() - wall}
""")


def timers(home: House, timer_s: float, frozen_s: float) -> None:
    session = agents.start(home, TIMERS, {"seconds": timer_s}, style="asyncio", idle_suspend_s=None)
    session.until_output("began")
    session.post("suspend")
    session.until_state("suspended")
    began = time.monotonic()
    time.sleep(frozen_s)  # the time that must not pass for the timers
    session.post("resume")
    session.until_output("now=")
    frozen = time.monotonic() - began
    (event,) = [e for e in session.events("output") if b"now=" in body(e)]
    seen = float(body(event).decode().split("now=")[1].split()[0])
    assert abs(seen - time.time()) < 5.0
    found = session.result()
    assert len(found["took"]) == 7
    for name, took in found["took"].items():
        assert timer_s - 0.01 <= took < timer_s + 1.5, (name, found)
    assert found["wall"] >= timer_s + frozen_s
    assert found["wall"] < timer_s + frozen + 3


def test_timers_fire_by_running_time(home: House) -> None:
    timers(home, 4.0, 6.0)


@pytest.mark.long
def test_a_5_s_timer_frozen_for_10_s_fires_after_5_s_of_running_time(home: House) -> None:
    timers(home, 5.0, 10.0)


WALL = agents.add("""
def main(ctx):
    import subprocess
    before = time.monotonic()
    ctx.wait("go")
    first = time.time()
    date = float(subprocess.run(["date", "+%s.%N"], capture_output=True, text=True).stdout)
    return {"first": first, "date": date, "waited": time.monotonic() - before}
""")


def test_the_wall_clock_is_right_at_once(home: House) -> None:
    session = agents.start(home, WALL, idle_suspend_s=0.2)
    session.until_state("suspended")
    time.sleep(4)  # time that the wall clock has to catch up with
    before = time.time()
    session.signal("go")
    found = session.result()
    after = time.time()
    assert before - 0.2 <= found["first"] <= after + 0.2
    assert before - 0.2 <= found["date"] <= after + 0.2
    assert found["waited"] < 4


# ---------------------------------------------------------------- a provider that says "later"


RATE_LIMITED = agents.add("""
def main(ctx, tag):
    base = urllib.parse.urlsplit(os.environ["OPENAI_BASE_URL"])
    began = time.monotonic()
    c = http.client.HTTPConnection(base.hostname, base.port, timeout=5)
    text = json.dumps({"model": "test", "messages": [{"role": "user", "content": tag}]})
    c.request("POST", base.path + "/chat/completions", text, {"content-type": "application/json"})
    r = c.getresponse()
    return {"status": r.status, "headers": [h for h in r.getheaders()], "body": r.read().decode("latin-1"),
            "ran": time.monotonic() - began}
""")


def test_a_provider_that_says_later_freezes_the_agent_until_it_answers(home: House) -> None:
    tag = "held"
    home.provider.inner.fail(Reply.rate_limited(7.0), when=lambda r: tag in r.last_text)
    session = agents.start(home, RATE_LIMITED, {"tag": tag})
    session.until("the hold", lambda s: s.events("exchange.held"))
    began = time.monotonic()
    session.until_state("suspended")
    assert time.monotonic() - began < 6.5  # promised: within 5 s
    assert session.view["reason"] == "provider_hold"
    assert "provider" in home.server.cli("why", session.id).stdout
    found = session.result()
    assert found["status"] == 200
    assert tag in found["body"]
    assert found["ran"] < 6.5  # its 5 s of patience were not used up: it ran for less than the provider took
    assert calls(home, tag) == 2  # the refused one, and the one that was answered
    (held,) = session.events("exchange.held")
    assert held["data"]["status"] == 429
    assert len(session.events("snapshot.restored")) == 1


def test_a_short_hold_does_not_freeze(home: House) -> None:
    tag = "short-hold"
    home.provider.inner.fail(Reply.rate_limited(0.5), when=lambda r: tag in r.last_text)
    session = agents.start(home, RATE_LIMITED, {"tag": tag})
    assert session.result()["status"] == 200
    assert calls(home, tag) == 2
    assert not session.events("snapshot.restored")


@pytest.mark.parametrize(("hold_max_s", "retry_after"), [(0.0, 6.0), (5.0, 60.0)])
def test_past_hold_max_the_providers_bytes_pass_through(home: House, hold_max_s: float, retry_after: float) -> None:
    tag = f"passed-{retry_after:g}"
    said = Reply.rate_limited(retry_after, message="Slow down, ünïcode \0!", headers={"x-odd": "as it is"})
    home.provider.inner.fail(said, when=lambda r: tag in r.last_text)
    session = agents.start(home, RATE_LIMITED, {"tag": tag}, hold_max_s=hold_max_s)
    found = session.result()
    assert found["status"] == 429
    headers = {name.lower(): value for name, value in found["headers"]}
    assert float(headers["retry-after"]) == retry_after
    assert headers["x-odd"] == "as it is"
    (exchange,) = home.server.request("GET", f"/v1/sessions/{session.id}/exchanges")["exchanges"]
    recorded = home.server.request("GET", f"/v1/exchanges/{exchange['id']}/response", raw=True)
    assert found["body"].encode("latin-1") == recorded
    assert "Slow down" in found["body"]
    assert calls(home, tag) == 1


@pytest.mark.parametrize("how", ["kill", pytest.param("stop", marks=pytest.mark.long)])
def test_the_server_goes_away_while_a_provider_is_held(home: House, how: str) -> None:
    """Nobody but the gateway's process knows of the hold: the next one must wake the session."""
    tag = f"held-{how}"
    home.provider.inner.fail(Reply.rate_limited(8.0), when=lambda r: tag in r.last_text)
    session = agents.start(home, RATE_LIMITED, {"tag": tag})
    session.until_state("suspended")
    assert session.view["reason"] == "provider_hold"
    if how == "kill":
        home.server.kill9()
    else:
        assert home.server.stop() == 0
    home.server.restart()
    found = session.result(timeout_s=40)
    assert found["status"] == 200
    reissued = len(session.events("exchange.reissued", all_lines=True))
    assert 2 <= calls(home, tag) <= 2 + reissued


def test_a_person_may_suspend_and_cancel_what_a_provider_holds(home: House) -> None:
    tag = "held-cancel"
    home.provider.inner.fail(Reply.rate_limited(30.0), when=lambda r: tag in r.last_text)
    session = agents.start(home, RATE_LIMITED, {"tag": tag})
    session.until_state("suspended")
    session.post("cancel")
    session.until_state("cancelled")
    processes.wait_until(lambda: not home.server.sandboxes(), 20, "its sandbox to be gone")
