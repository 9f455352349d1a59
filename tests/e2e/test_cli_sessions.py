"""The command line against a real server: what its user does, in the order of the quickstart."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_fixtures import ENGINE

from rethaw.testing.server import RunningServer

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
QUICKSTART = Path(__file__).resolve().parents[2] / "docs/quickstart.md"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer() as running:
        yield running


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's own Python files."""
    root = tmp_path_factory.mktemp("agents")
    for code in re.findall(r"^```python\n(# (\w+\.py)\n.*?)^```$", QUICKSTART.read_text(), re.DOTALL | re.MULTILINE):
        (root / code[1]).write_text(code[0])
    (root / "odd.py").write_text(
        "import rethaw, sys\n@rethaw.agent\ndef add(ctx, a: int, b: int = 1, words: list[str] = []) -> dict:\n"
        "    print('adding', flush=True); print('careful', file=sys.stderr, flush=True)\n"
        "    return {'sum': a + b, 'words': words}\n"
        "@rethaw.agent\ndef fails(ctx) -> None:\n    raise SystemExit(3)\n"
        "@rethaw.agent(name='asker')\ndef ask(ctx) -> str:\n    return ctx.wait('approval', timeout='1h').payload['say']\n"
    )
    return root


def said(server: RunningServer, *args: str, cwd: Path | None = None) -> Any:
    """One JSON value that a command prints."""
    return json.loads(server.cli(*args, "--json", cwd=cwd).stdout)


def state(server: RunningServer, session: str) -> str:
    return str(said(server, "show", session)["state"])


def until_state(server: RunningServer, session: str, *wanted: str, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while (now := state(server, session)) not in wanted:
        assert time.monotonic() < end, f"{now} instead of {wanted}"
        time.sleep(0.1)


def test_a_command_is_watched_and_its_exit_code_is_ours(server: RunningServer) -> None:
    done = server.cli("run", "--image", "base", "--", "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert done.returncode == 7 and done.stdout == "out\n"
    assert "err\n" in done.stderr and "exit code 7" in done.stderr
    done = server.cli(
        "run", "--image", "base", "-e", "WORD=hello", "--workdir", "/tmp", "--", "sh", "-c", "echo $WORD; pwd"
    )
    assert done.stdout == "hello\n/tmp\n"


def test_arguments_are_typed_and_the_result_is_printed(server: RunningServer, agents: Path) -> None:
    line = ("run", "odd.py::add", "--a", "40", "--b=2", "--words", "x", "--words", "y")
    done = server.cli(*line, cwd=agents)
    assert done.stdout.startswith("adding\n") and json.loads(done.stdout.partition("\n")[2]) == {
        "sum": 42,
        "words": ["x", "y"],
    }
    assert "careful" in done.stderr
    answer = json.loads(server.cli(*line, "--json", cwd=agents).stdout)
    assert (answer["result"], answer["state"], answer["exit_code"]) == (
        {"sum": 42, "words": ["x", "y"]},
        "completed",
        0,
    )
    assert server.cli("run", "odd.py::fails", cwd=agents, check=False).returncode == 3
    for args, text in (
        (["run", "odd.py::add", "--a", "x"], "--a = 'x'"),
        (["run", "odd.py::add"], "needs --a"),
        (["run", "odd.py"], "3 agents"),
    ):
        done = server.cli(*args, cwd=agents, check=False)
        assert done.returncode == 2 and text in done.stderr


def test_the_quickstart(server: RunningServer, agents: Path) -> None:
    start = ("run", "-d", "--key", "my-counter", "counter.py", "--start", "40")
    session = server.cli(*start, cwd=agents).stdout.strip()
    assert server.cli(*start, cwd=agents).stdout.strip() == session
    done = server.cli("run", "-d", "--key", "my-counter", "counter.py", "--start", "41", cwd=agents, check=False)
    assert done.returncode == 5 and "my-counter" in done.stderr
    assert server.cli("send", session, "2", "--wait", "60s").stdout == "now 42\n"
    until_state(server, session, "waiting", "suspended")
    short = session[:14]
    assert session[:10] in server.cli("ls").stdout and "my-counter" in server.cli("ps").stdout
    assert server.cli("crash", short, "sandbox").returncode == 0
    assert server.cli("send", short, "--json", "5", "--wait", "60s").stdout.count("\n") == 1
    shown = server.cli("show", short).stdout
    assert session in shown and "1 crash, 0 model calls served from the log" in shown
    assert "crash" in server.cli("events", short).stdout
    kinds = [json.loads(line)["type"] for line in server.cli("events", short, "--json").stdout.splitlines()]
    assert kinds[0] == "session.created" and {"session.crashed", "snapshot.restored", "line.opened"} <= set(kinds)
    taken = said(server, "snapshot", "ls", short)
    assert taken and taken[0]["session"] == session and "PAUSED" in server.cli("snapshot", "ls", short).stdout

    view = said(server, "suspend", short)
    assert view["state"] == "suspended" and said(server, "why", short)["state"] == "suspended"
    assert "rethaw resume" in server.cli("why", short).stdout
    assert said(server, "resume", short)["state"] in ("running", "waiting")
    server.cli("send", short, "stop")
    until_state(server, session, "completed")
    assert server.cli("run", "--key", "my-counter", "counter.py", "--start", "40", cwd=agents).stdout == "47\n"
    assert server.cli("rm", short).stdout.strip() == session
    gone = server.cli("show", session, check=False)
    assert gone.returncode == 4 and session in gone.stderr


def test_a_signal_and_why(server: RunningServer, agents: Path) -> None:
    session = server.cli("run", "-d", "odd.py::ask", cwd=agents).stdout.strip()
    until_state(server, session, "waiting", "suspended")
    assert "approval" in server.cli("why", session).stdout
    assert server.cli("signal", session, "approval", '{"say": "yes"}').stdout.startswith("sig_")
    until_state(server, session, "completed")
    assert said(server, "run", "odd.py::ask", "--name", "another", "-d", cwd=agents)["agent"]["name"] == "another"


def test_cancel_and_rm_of_several(server: RunningServer) -> None:
    sessions = [server.cli("run", "-d", "--image", "base", "--", "sleep", "600").stdout.strip() for _ in range(3)]
    assert said(server, "cancel", sessions[0], "--now")["state"] == "cancelled"
    refused = server.cli("rm", *sessions[:2], check=False)
    assert refused.returncode == 5 and refused.stdout.strip() == sessions[0] and sessions[1] in refused.stderr
    assert server.cli("rm", "--force", *sessions[1:]).stdout.split() == sessions[1:]
    assert server.cli("ls", "-q", "--agent", "sleep").stdout == ""


def test_ctrl_c_detaches_and_logs_come_back(server: RunningServer) -> None:
    script = "i=0; while [ $i -lt 200 ]; do i=$((i+1)); echo line $i; sleep 0.05; done"
    command = [sys.executable, "-m", "rethaw.cli.main", "run", "--image", "base", "--", "sh", "-c", script]
    process = subprocess.Popen(command, env=server.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "line 3\n":
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    (session,) = set(re.findall(r"rethaw logs -f (s_\w+)", err))
    assert state(server, session) == "running"
    done = server.cli("logs", "-f", session)
    assert done.stdout.splitlines() == [f"line {i}" for i in range(1, 201)]
    assert server.cli("logs", session).stdout == done.stdout == server.cli("logs", session, "--stream", "stdout").stdout
    assert server.cli("logs", session, "--stream", "stderr").stdout == ""


def test_one_line_of_output_through_crashes_and_a_restart(server: RunningServer) -> None:
    """`logs -f` of a program that writes on while its sandbox, PostgreSQL and the whole server are killed under it."""
    script = "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.05; done"
    session = server.cli("run", "-d", "--image", "base", "--", "sh", "-c", script).stdout.strip()
    command = [sys.executable, "-m", "rethaw.cli.main", "logs", "-f", session]
    process = subprocess.Popen(command, env=server.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    for what in ("sandbox", "db", "node"):
        until_state(server, session, "running")
        server.request("POST", f"/v1/sessions/{session}/snapshots", {})
        until = len(lines) + 20
        for line in process.stdout:
            lines.append(line)
            if len(lines) >= until:
                break
        server.cli("crash", session, what)
        if what == "node":
            assert server.process is not None
            server.process.wait(30)
            server.start()
    until = len(lines) + 20
    for line in process.stdout:
        lines.append(line)
        if len(lines) >= until:
            break
    server.cli("cancel", session, "--now")
    lines += process.stdout  # not communicate(): that would lose what iterating has read ahead
    assert process.wait(60) == 0
    assert [line.strip() for line in lines] == [f"line {i}" for i in range(1, len(lines) + 1)]


def test_the_server_says_what_is_wrong(server: RunningServer) -> None:
    for args, code, text in (
        (["show", "s_nothing"], 4, "s_nothing"),
        (["show", "s_"], 4, "s_"),
        (["send", "s_nothing", "x"], 4, "s_nothing"),
        (["run", "--image", "base", "--memory", "1MiB", "--", "true"], 2, "memory"),
    ):
        done = server.cli(*args, check=False)
        assert done.returncode == code and done.stdout == "", (args, done)
        assert done.stderr.count("\n") == 1 and text in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "rethaw.cli.main", "ls"],
        env={**server.env, "RETHAW_TOKEN": "hunter2", "RETHAW_URL": server.url},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3 and "RETHAW_TOKEN" in done.stderr and "hunter2" not in done.stderr


def test_doctor_asks_the_server(server: RunningServer) -> None:
    found = said(server, "doctor")
    default, other = ("qemu", "gvisor") if ENGINE == "qemu" else ("gvisor", "qemu")
    assert found["ok"] and [f["name"] for f in found["findings"]] == [default, other, "engine"]
