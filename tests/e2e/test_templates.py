"""Templates: a warm agent, and sessions that begin where it stands."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_cli import refused
from e2e_fixtures import House, Session, house

from rethaw.testing.processes import wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]

AGENT = """
import random, time
import rethaw

@rethaw.agent
def warm(ctx):
    end = time.monotonic() + 3
    while time.monotonic() < end:  # what a real one would import
        pass
    born = time.monotonic()
    args = ctx.ready()
    return {"args": args, "session": ctx.session, "random": random.random(), "born": born}

@rethaw.agent(idle_suspend=None)
def lasting(ctx):
    time.sleep(2)
    args = ctx.ready()
    print("told", args["n"], flush=True)
    ctx.wait("end")
    return args

@rethaw.agent
def ends(ctx):
    return 1
"""


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as h:
        yield h


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("agents")
    (root / "agent.py").write_text(AGENT)
    return root


def start(home: House, name: str, *more: str) -> Session:
    return Session(home, json.loads(home.server.cli("template", "start", name, *more, "--json").stdout))


def test_sessions_begin_where_the_template_stands(home: House, code: Path) -> None:
    made = json.loads(home.server.cli("template", "create", "writer", "agent.py::warm", "--json", cwd=code).stdout)
    assert (made["name"], made["ready_by"]) == ("writer", "call")
    again = json.loads(home.server.cli("template", "create", "writer", "agent.py::warm", "--json", cwd=code).stdout)
    assert again == made
    refused(home.server.cli("template", "create", "writer", "agent.py::ends", cwd=code, check=False), 5, "template rm")

    one = start(home, "writer", '{"topic": "snapshots"}', "--key", "first")
    assert start(home, "writer", '{"topic": "snapshots"}', "--key", "first").id == one.id
    refused(home.server.cli("template", "start", "writer", "{}", "--key", "first", check=False), 5, "first")
    other = start(home, "writer")
    results = [session.result() for session in (one, other)]
    assert [r["args"] for r in results] == [{"topic": "snapshots"}, {}]
    assert [r["session"] for r in results] == [one.id, other.id]
    assert results[0]["born"] == results[1]["born"], "neither was warmed again"
    assert results[0]["random"] != results[1]["random"]
    cold = home.agent(
        AGENT.replace("@rethaw.agent\\ndef warm(ctx)", "def main(ctx)").replace("def warm(ctx)", "def main(ctx)")
    )
    assert cold.result()["args"] == {}, "without a template ready() returns at once"

    assert "writer" in home.server.cli("template", "ls").stdout
    home.server.restart()
    assert start(home, "writer", '{"n": 3}').result()["args"] == {"n": 3}
    home.server.cli("template", "rm", "writer")
    refused(home.server.cli("template", "start", "writer", check=False), 4, "no template 'writer'")
    assert one.view["state"] == "completed"


def test_arguments_outlive_every_snapshot(home: House, code: Path) -> None:
    """With no snapshot left to restore the session boots fresh, and finds what it was started with in its log."""
    home.server.cli("template", "create", "lasting", "agent.py::lasting", "--by", "call", cwd=code)
    session = start(home, "lasting", '{"n": 7}')
    session.until_output("told 7\n")
    for file in (home.server.data_dir / "snapshots").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    home.server.kill9()
    home.server.start()
    session.until("a fresh boot", lambda s: len(s.events("attempt.started", all_lines=True)) > 1)
    session.until("its arguments again", lambda s: s.output().count("told 7\n") >= 1 and s.view["state"] == "waiting")
    session.signal("end")
    assert session.result() == {"n": 7}
    home.server.cli("template", "rm", "lasting")


def test_a_command_is_warm_when_it_says_so_or_is_quiet(home: House) -> None:
    line = "i=0; echo warming; echo rethaw-ready; while :; do i=$((i+1)); done"
    made = json.loads(
        home.server.cli("template", "create", "busy", "--image", "base", "--json", "--", "sh", "-c", line).stdout
    )
    assert made["ready_by"] == "line"
    quiet = "echo begun; exec sleep 100000"
    began = time.monotonic()
    made = json.loads(
        home.server.cli("template", "create", "quiet", "--image", "base", "--json", "--", "sh", "-c", quiet).stdout
    )
    assert made["ready_by"] == "quiet" and time.monotonic() - began < 60
    session = start(home, "quiet")
    session.until_state("running")
    session.post("cancel", {"now": True})
    for name in ("busy", "quiet"):
        home.server.cli("template", "rm", name)
    assert json.loads(home.server.cli("template", "ls", "--json").stdout) == []


def test_what_is_never_warm_is_said(home: House, code: Path) -> None:
    loop = ("--image", "base", "--within", "3s", "--", "sh", "-c", "while :; do :; done")
    refused(home.server.cli("template", "create", "loop", *loop, check=False), 7, "not ready within 3 s")
    refused(home.server.cli("template", "start", "loop", check=False), 5, "not ready yet")
    home.server.cli("template", "rm", "loop")
    done = home.server.cli("template", "create", "over", "agent.py::ends", cwd=code, check=False)
    refused(done, 5, "ended (completed) before it was ready")
    refused(home.server.cli("template", "create", "a b", "agent.py::ends", cwd=code, check=False), 2, "'a b'")
    refused(home.server.cli("template", "create", "x", check=False), 2, "what to run is not named")
    refused(home.server.cli("template", "start", "x", "[1]", check=False), 2, "no JSON object")
    refused(home.server.cli("template", "rm", "x", check=False), 4, "no template 'x'")


AUTO = """
import time
import rethaw

began = time.monotonic()
while time.monotonic() < began + 1:  # what a real one would import
    pass
born = time.time_ns()

@rethaw.agent(template="auto")
def quick(ctx, n, text="none"):
    return {"args": [n, text], "ctx": ctx.args, "ready": ctx.ready(), "born": born, "session": ctx.session}

@rethaw.agent(template="auto")
async def slow(ctx, n):
    signal = await ctx.wait("go")
    return {"n": n, "again": (await ctx.ready())["n"], "go": signal.payload, "born": born}
"""


def test_a_template_is_made_by_itself_at_the_first_start(home: House, tmp_path: Path) -> None:
    def names() -> list[str]:
        return [t["name"] for t in json.loads(home.server.cli("template", "ls", "--json").stdout) if t["snapshot"]]

    def run(*more: str) -> Session:
        return Session(home, {"id": home.server.cli("run", "-d", *more, cwd=tmp_path).stdout.strip()})

    (tmp_path / "agent.py").write_text(AUTO)
    cold = run("agent.py::quick", "--n", "1", "--key", "cold-one")
    assert cold.result()["args"] == [1, "none"]
    wait_until(names, 60, "the template")
    (name,) = names()
    assert name.startswith("auto.quick.")

    two, three = run("agent.py::quick", "--n", "2", "--text", "b"), run("agent.py::quick", "--n", "3", "--key", "third")
    results = [two.result(), three.result()]
    assert [r["args"] for r in results] == [[2, "b"], [3, "none"]]
    assert [r["ready"] for r in results] == [r["ctx"] for r in results] == [{"n": 2, "text": "b"}, {"n": 3}]
    assert [r["session"] for r in results] == [two.id, three.id]
    assert results[0]["born"] == results[1]["born"] != cold.result()["born"], (
        "the file was imported once, in the template"
    )

    # Keys mean the same, whichever way the session began.
    assert run("agent.py::quick", "--n", "1", "--key", "cold-one").id == cold.id
    assert run("agent.py::quick", "--n", "3", "--key", "third").id == three.id
    for key in ("cold-one", "third"):
        refused(
            home.server.cli("run", "-d", "--key", key, "agent.py::quick", "--n", "9", cwd=tmp_path, check=False), 5, key
        )

    # Another version of the agent has another template, and the former goes.
    (tmp_path / "agent.py").write_text(AUTO.replace('"none"', '"some"'))
    assert run("agent.py::quick", "--n", "4").result()["args"] == [4, "some"]
    wait_until(lambda: len(found := names()) == 1 and found != [name], 60, "the newer template")
    assert run("agent.py::quick", "--n", "5").result()["args"] == [5, "some"]
    refused(
        home.server.cli("template", "create", "auto.mine", "agent.py::quick", cwd=tmp_path, check=False), 2, "auto.mine"
    )


def test_an_async_agent_from_its_template_outlives_kills(home: House, tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(AUTO)
    first = home.server.cli("run", "-d", "agent.py::slow", "--n", "1", cwd=tmp_path).stdout.strip()
    wait_until(
        lambda: [
            t for t in json.loads(home.server.cli("template", "ls", "--json").stdout)
            if t["name"].startswith("auto.slow.") and t["snapshot"]
        ],
        60,
        "the template",
    )  # fmt: skip
    session = Session(
        home, {"id": home.server.cli("run", "-d", "agent.py::slow", "--n", "2", cwd=tmp_path).stdout.strip()}
    )
    for _ in range(3):
        session.until_state("waiting", "suspended")
        session.post("snapshots", {})
        home.server.kill9()
        home.server.start()
    session.signal("go", 7)
    assert {k: v for k, v in session.result().items() if k != "born"} == {"n": 2, "again": 2, "go": 7}
    home.server.cli("cancel", "--now", first, check=False)


def test_no_template_is_made_of_what_cannot_be_warmed(home: House, tmp_path: Path) -> None:
    fails = 'import pathlib, rethaw\nif pathlib.Path("/.rethaw").exists():\n    raise RuntimeError("not here")\n'
    (tmp_path / "agent.py").write_text(fails + '@rethaw.agent(template="auto")\ndef bad(ctx):\n    return 1\n')
    done = home.server.cli("run", "agent.py::bad", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "not here" in done.stderr
    wait_until(lambda: "no template of agent bad" in home.server.log_tail(), 60, "the server's word")
    wait_until(lambda: "auto.bad" not in home.server.cli("template", "ls").stdout, 30, "nothing to be left of it")
    refused(
        home.server.cli("run", "--image", "base", "--template", "auto", "--", "true", check=False), 2, "is a command"
    )
    refused(home.server.cli("run", "--template", "warm", "agent.py::bad", cwd=tmp_path, check=False), 2, "'warm'")
