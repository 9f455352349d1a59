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
