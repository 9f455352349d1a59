"""Retries and budgets on a whole server: programs that fail, sandboxes that die in between, a server that is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_fixtures import SLOWER, House, gapless, house

from rethaw.testing.provider import ProviderRequest, Reply

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(120 * SLOWER),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]


@pytest.fixture(scope="module")
def shared() -> Iterator[House]:
    with house(config={"prices": {"priced": {"input": 1.0, "output": 2.0}}}) as h:
        yield h


@pytest.fixture
def home(shared: House) -> House:
    shared.provider.reset()
    return shared


FAILS_TWICE = """
import rethaw, sys
def main(ctx):
    task = ctx.receive().payload
    print("attempt", ctx.attempt, task, flush=True)
    said = ask("%s attempt %d" % (task, ctx.attempt))
    if ctx.attempt == 1:
        ctx.send("one")
        raise ValueError("the first attempt fails")
    if ctx.attempt == 2:
        ctx.send("two")
        sys.exit(3)
    asked = [e for e in ctx.history() if e["type"] == "exchange.completed"]
    return {"said": said, "fresh": ctx.fresh, "asked": len(asked), "attempt": ctx.attempt}
"""


def test_two_failures_a_killed_server_and_a_crash(home: House) -> None:
    def answer(request: ProviderRequest) -> Reply:
        return Reply(f"re {request.last_text}", first_byte_s=1.0 if "attempt 2" in request.last_text else 0.0)

    home.provider.answer = answer
    retries = {"max": 3, "delay_s": 3.0, "factor": 1.0, "jitter": False}
    session = home.agent(FAILS_TWICE, retries=retries)
    session.send("retry-me")
    session.until_state("queued")
    home.server.kill9()  # in the backoff
    home.server.restart()
    session.until("the second call", lambda s: "retry-me attempt 2" in home.provider.texts)
    session.until("its snapshot", lambda s: any(e["attempt"] == 2 for e in s.events("snapshot.created")))
    session.crash()
    session.until("recovery", lambda s: s.view["crashes"] == 1)
    assert session.result() == {"said": "re retry-me attempt 3", "fresh": True, "asked": 3, "attempt": 3}
    texts = [t for t in home.provider.texts if t.startswith("retry-me")]
    assert texts == [f"retry-me attempt {n}" for n in (1, 2, 3)]
    assert session.outbox() == ["one", "two"]
    view = session.view
    assert [(a["attempt"], a["how"]) for a in view["attempts"]] == [
        (1, "exit code 1"), (2, "exit code 3"), (3, "exit code 0"),
    ]  # fmt: skip
    started = session.events("attempt.started")
    scheduled = session.events("retry.scheduled")
    assert len(scheduled) == 2 and started[1]["at"] >= scheduled[0]["data"]["at"]
    assert "the first attempt fails" in session.output("stderr")
    gapless(session.events(all_lines=True))


def test_an_agent_that_knows_better_and_what_people_see(home: House, tmp_path: Path) -> None:
    file = tmp_path / "knows.py"
    file.write_text("""
import rethaw
@rethaw.agent(retries=rethaw.Retries(max=1, delay="5m"), budget=rethaw.Budget(tokens=10, wall="1h"))
def knows(ctx: rethaw.Context, fatal: bool = True) -> None:
    raise rethaw.NoRetry("it cannot work", remedy="stop") if fatal else ValueError("once more")
""")
    done = home.server.cli("run", str(file), check=False)
    assert done.returncode == 1 and "trying again is of no use" in done.stderr, done
    session = home.server.cli("run", "-d", str(file), "--fatal", "false", "--budget-calls", "7").stdout.strip()
    shown = ""
    for _ in range(300):
        shown = home.server.cli("why", session).stdout
        if "attempt 2 begins at" in shown:
            break
    assert "queued (retry)" in shown and "attempt 2 of 2 begins at" in shown and f"rethaw retry {session}" in shown
    shown = home.server.cli("show", session).stdout
    assert "exit code 1" in shown and "0 of 10 tokens (0%)" in shown and "0 of 7 model calls (0%)" in shown
    assert "attempt 2" in home.server.cli("retry", session).stdout
    for _ in range(300):
        found = json.loads(home.server.cli("show", session, "--json").stdout)
        if found["state"] == "failed":
            break
    assert found["detail"] == "2 attempts failed, last: exit code 1"


LOOP = """
import os
def main(ctx, tag, model="test"):
    done = []
    for n in range(6):
        said = ask("%s %d" % (tag, n))
        done.append(said)
        with open("/tmp/work", "a") as f:
            f.write("%d\\n" % n)
    return {"done": done, "lines": open("/tmp/work").read().split(), "attempt": ctx.attempt}
"""


def test_a_budget_stops_a_tool_loop_and_a_larger_one_lets_it_go_on(home: House) -> None:
    session = home.agent(LOOP, {"tag": "loop"}, budget={"model_calls": 3})
    session.until_state("failed")
    view = session.view
    assert (view["reason"], view["detail"]) == ("budget_exceeded", "3 model calls are used up: 3 after model call 3")
    assert [t for t in home.provider.texts if t.startswith("loop")] == ["loop 0", "loop 1", "loop 2"]
    assert len(session.events("exchange.completed")) == 3  # the last answer is whole in the log
    assert [e["data"]["what"] for e in session.events("budget.exceeded")] == ["model_calls"]
    shown = home.server.cli("budget", session.id, "--calls", "+10").stdout
    assert "3 of 13 model calls" in shown
    result = session.result()
    assert result["done"] == [f"echo loop {n}" for n in range(6)] and result["attempt"] == 1
    assert sorted(set(result["lines"])) == [str(n) for n in range(6)]
    assert [t for t in home.provider.texts if t.startswith("loop")] == [f"loop {n}" for n in range(6)]
    gapless(session.events(all_lines=True))


def test_a_budget_is_given_to_one_that_runs_without(home: House) -> None:
    waits = LOOP.replace(
        "        done.append(said)\n", "        done.append(said)\n        if n == 1:\n            ctx.wait('go')\n"
    )
    session = home.agent(waits, {"tag": "free"})
    session.until("two calls and a wait", lambda s: s.events("wait.opened"))
    assert "2 of 4 model calls" in home.server.cli("budget", session.id, "--calls", "4", "--wall", "1h").stdout
    session.signal("go")
    session.until_state("failed")
    assert session.view["detail"] == "4 model calls are used up: 4 after model call 4"
    home.server.cli("budget", session.id, "--calls", "+1")
    session.until("the fifth", lambda s: s.view["state"] == "failed" and s.view["spent"]["model_calls"] == 5)
    home.server.kill9()  # who runs it next is told as well
    home.server.restart()
    home.server.cli("budget", session.id, "--calls", "+10")
    assert session.result()["done"] == [f"echo free {n}" for n in range(6)]
    assert len([t for t in home.provider.texts if t.startswith("free")]) == 6
    assert 0 < session.view["spent"]["wall_s"] < 300


@pytest.mark.long
def test_a_token_budget_over_a_crash(home: House) -> None:
    home.provider.answer = lambda r: Reply(f"re {r.last_text}", first_byte_s=0.3)
    session = home.agent(LOOP, {"tag": "crashed"}, budget={"tokens": 1, "model_calls": 50})
    session.until_state("failed")
    assert len([t for t in home.provider.texts if t.startswith("crashed")]) == 1
    session.post("budget", {"limits": {"tokens": 1_000_000}})
    session.until("two more", lambda s: len(s.events("exchange.completed")) == 3)
    session.crash()
    result = session.result()
    assert result["done"] == [f"re crashed {n}" for n in range(6)]
    assert session.view["spent"]["model_calls"] == 6
    assert len([t for t in home.provider.texts if t.startswith("crashed")]) == 6


def test_a_money_budget_and_a_model_without_a_price(home: House) -> None:
    session = home.agent("def main(ctx):\n    return ask('dear')\n", budget={"money": "1.00"})
    said = session.result()
    assert said.startswith("HTTP 400") and '[prices.\\"test\\"]' in said
    assert "dear" not in home.provider.texts


def test_time_that_it_runs(home: House) -> None:
    session = home.agent("def main(ctx):\n    time.sleep(60)\n", budget={"wall_s": 1.0})
    session.until_state("failed")
    assert session.view["reason"] == "budget_exceeded" and "of running are used up" in session.view["detail"]
    session.until("its sandbox is gone", lambda s: not s.house.server.sandboxes())


KEEPS = """
import hashlib, os, stat
def main(ctx):
    if ctx.attempt == 1:
        os.makedirs("/work/deep")
        with open("/work/deep/big", "wb") as f:
            f.write(bytes(range(256)) * 8000)
        os.chmod("/work/deep/big", 0o640)
        os.utime("/work/deep/big", (1_000_000, 1_000_000))
        os.symlink("big", "/work/deep/link")
        os.mkfifo("/work/deep/pipe")
        os.unlink("/etc/debian_version")
        with open("/etc/issue", "w") as f:
            f.write("changed")
        ctx.snapshot()
        open("/work/after", "w").close()
        raise ValueError("the first attempt fails")
    data = open("/work/deep/link", "rb").read()
    info = os.stat("/work/deep/big")
    return {
        "big": len(data), "same": data == bytes(range(256)) * 8000, "mode": stat.S_IMODE(info.st_mode),
        "mtime": info.st_mtime, "gone": os.path.exists("/etc/debian_version"), "issue": open("/etc/issue").read(),
        "names": sorted(os.listdir("/work") + os.listdir("/work/deep")), "fresh": ctx.fresh,
        "cwd": os.getcwd(), "env": os.environ.get("MINE"),
    }
"""


def test_a_retry_with_the_files_of_the_last_snapshot(home: House) -> None:
    retries = {"max": 1, "delay_s": 0.1, "files": "keep"}
    session = home.agent(KEEPS, retries=retries, env={"MINE": "x", "PYTHONPATH": "/nowhere"})
    assert session.result() == {
        "big": 2_048_000, "same": True, "mode": 0o640, "mtime": 1_000_000, "gone": False, "issue": "changed",
        "names": ["big", "deep", "link"], "fresh": True, "cwd": "/app", "env": "x",
    }  # fmt: skip
