"""The command line when something is not as its user thinks: names that are nearly right, sessions that have ended."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_agents import Agents
from e2e_cli import as_nobody, refused
from e2e_fixtures import House, house

pytestmark = pytest.mark.root
agents = Agents()


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as running:
        yield running


def cli(home: House, *args: str) -> subprocess.CompletedProcess[str]:
    return home.server.cli(*args, check=False)


def test_names_and_ids_that_are_nearly_right(home: House) -> None:
    session = home.start({"name": "watcher", "command": ["sleep", "600"]}, key="nightly-report")
    session.until_state("running")
    session.post("suspend")
    session.until_state("suspended")
    snapshot = session.view["snapshot"]
    spec = {"name": "researcher", "command": ["true"]}
    server = home.server
    server.request("POST", "/v1/agents", {"agent": spec})
    server.cli("schedule", "create", "daily", "--every", "1h", "--image", "base", "--", "true")
    server.cli("queue", "set", "reports", "--limit", "2")
    template = {"name": "writer", "agent": {"name": "w", "command": ["sleep", "100"]}}
    server.request("POST", "/v1/templates", template)

    wrong = session.id[:12] + ("0" if session.id[12] != "0" else "1")
    swapped = session.id[:9] + session.id[10] + session.id[9] + session.id[11:]
    assert swapped != session.id
    for words, said in (
        (("show", wrong), f"there is no session {wrong!r}; did you mean {session.id[:13]}?"),
        (("why", swapped), f"; did you mean {session.id}?"),
        (("events", "nightly-report"), f"did you mean {session.id}, which has that key?"),
        (("suspend", "watcher"), f"did you mean {session.id}, the newest of that agent?"),
        (("show", "s_zzzzzzzzzz"), "there is no session 's_zzzzzzzzzz'; `rethaw ls` shows those there are"),
        (("snapshot", "pin", snapshot[:-1]), None),
        (("snapshot", "unpin", snapshot[:-1] + ("0" if snapshot[-1] != "0" else "1")), f"did you mean {snapshot}?"),
        (("snapshot", "files", "nightly-report", "/"), f"did you mean {session.id}, which has that key?"),
        (("agent", "show", "reseacher"), "there is no agent 'reseacher'; did you mean 'researcher'?"),
        (("agent", "show", "Researcher"), "did you mean 'researcher'?"),
        (("agent", "show", "gardener"), "there is no agent 'gardener'; `rethaw agent ls` shows those there are"),
        (("run", "--agent", "reseacher"), "there is no agent 'reseacher'; did you mean 'researcher'?"),
        (("schedule", "show", "dialy"), "there is no schedule 'dialy'; did you mean 'daily'?"),
        (("queue", "show", "report"), "there is no queue 'report'; did you mean 'reports'?"),
        (("queue", "show", "zebra"), "there is no queue 'zebra'; `rethaw queue ls` shows those there are"),
        (("template", "start", "wirter"), "there is no template 'wirter'; did you mean 'writer'?"),
    ):
        done = cli(home, *words)
        if said is None:
            assert done.returncode == 0, done.stderr
        else:
            refused(done, 4, said)
    server.request("DELETE", "/v1/schedules/daily")


FAILS = agents.add(r"""
def main(ctx):
    print("loading", flush=True)
    for n in range(40):
        print("step %d \x1b[31mof\x1b[0m 40" % n, file=sys.stderr, flush=True)
    ctx.snapshot()
    if ctx.receive().payload == "fail":
        raise ValueError("the moon is not there")
""")


def test_why_quotes_the_last_words_of_what_failed(home: House) -> None:
    """Of its last life, across a crash: the traceback, not the steps before it; and never more than ten lines."""
    session = agents.start(home, FAILS)
    session.until("a snapshot", lambda s: s.view["state"] in ("waiting", "suspended"))
    assert "last_words" in home.server.request("GET", f"/v1/sessions/{session.id}/why")
    if session.view["state"] == "waiting":
        session.crash()
        session.until("its return", lambda s: s.events("snapshot.restored"))
    session.send("fail")
    session.until_state("failed")
    said = home.server.request("GET", f"/v1/sessions/{session.id}/why")["last_words"]
    assert said["stream"] == "stderr" and said["cut"] and len(said["lines"]) == 10
    assert said["lines"][-1] == "ValueError: the moon is not there"
    lines = cli(home, "why", session.id[:16]).stdout.splitlines()
    at = lines.index("the end of its stderr:")
    assert lines[at + 10] == "  ValueError: the moon is not there"
    assert lines[at + 11].startswith(f"all that it wrote: rethaw logs {session.id[:16]}")
    assert "\x1b" not in "".join(lines)
    answer = json.loads(cli(home, "why", session.id, "--json").stdout)
    assert answer["last_words"] == said


def test_last_words_are_bounded_and_come_from_stdout_when_stderr_is_silent(home: House) -> None:
    code = "import sys; sys.stdout.write('x' * 5000 + '\\n' + 'y' * 1500 + '\\nthe end'); sys.exit(3)"
    session = home.start({"name": "long", "command": ["python3", "-c", code]})
    quiet = home.start({"name": "quiet", "command": ["false"]})
    session.until_state("failed")
    said = home.server.request("GET", f"/v1/sessions/{session.id}/why")["last_words"]
    assert said == {"stream": "stdout", "lines": ["y" * 1500, "the end"], "cut": True}
    quiet.until_state("failed")
    assert home.server.request("GET", f"/v1/sessions/{quiet.id}/why")["last_words"] is None
    assert "the end of its" not in cli(home, "why", quiet.id).stdout


ENDS = agents.add("""
def main(ctx):
    what = ctx.receive().payload
    if what == "fail":
        raise ValueError("no")
    if what == "stay":
        ctx.wait("never")
    return what
""")


@pytest.mark.parametrize(
    ("text", "then", "said"),
    [("fail", None, "sent no answer, it is failed (exit code 1); see `rethaw why"), ("finish", None, "sent no answer, it is completed; see `rethaw show"),
     ("stay", "cancel", "sent no answer, it is cancelled; see `rethaw why")],
)  # fmt: skip
def test_send_does_not_wait_for_the_answer_of_one_that_has_ended(
    home: House, text: str, then: str | None, said: str
) -> None:
    """It asked again and again until its time was over."""
    session = agents.start(home, ENDS)
    session.until_state("waiting", "suspended")
    command = [sys.executable, "-m", "rethaw.cli.main", "send", session.id, text, "--wait", "10m"]
    process = subprocess.Popen(command, env=home.server.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if then is not None:
            session.until("the message", lambda s: s.events("message.consumed"))
            session.post(then, {"now": True})
        began = time.monotonic()
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - began < 60 and out == ""
    assert process.returncode == 1 and err.startswith("rethaw: session ") and said in err, err
    assert err.count("\n") == 1


# ---------------------------------------------------------------- top


BUSY = "i=0; while :; do i=$((i+1)); done"


class Terminal:
    """A command on a terminal of its own. `shown` is what it wrote, escape sequences and all."""

    def __init__(self, home: House, *args: str, columns: int = 120, rows: int = 30) -> None:
        self.shown = b""
        self._ours, theirs = pty.openpty()
        self.resize(columns, rows)
        env = {**home.server.env, "TERM": "xterm-256color"}
        for name in ("COLUMNS", "LINES"):  # of another terminal
            env.pop(name, None)
        command = ["setsid", "--ctty", sys.executable, "-m", "rethaw.cli.main", *args]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
        self.attributes = termios.tcgetattr(theirs)
        self._theirs = theirs

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def until(self, *texts: str, timeout_s: float = 60.0) -> str:
        """What it showed since the last call, once all of `texts` are in it."""
        end = time.monotonic() + timeout_s
        while not all(text.encode() in self.shown for text in texts):
            assert time.monotonic() < end, (texts, self.shown)
            if select.select([self._ours], [], [], 0.2)[0]:
                self.shown += os.read(self._ours, 1 << 16)
        shown, self.shown = self.shown.decode(errors="replace"), b""
        return shown

    def ends(self, timeout_s: float = 30.0) -> int:
        """Its exit code; the terminal is as it was."""
        end = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < end, self.shown
            if select.select([self._ours], [], [], 0.1)[0]:
                self.shown += os.read(self._ours, 1 << 16)
        assert termios.tcgetattr(self._theirs) == self.attributes
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)


@contextlib.contextmanager
def terminal(home: House, *args: str, **size: int) -> Iterator[Terminal]:
    made = Terminal(home, *args, **size)
    try:
        yield made
    finally:
        made.close()


ASKS = agents.add("""
def main(ctx):
    ask("one")
    ask("two")
    ctx.wait("never")
""")


def test_top_of_a_server_without_sessions_and_of_none(tmp_path: Path) -> None:
    with house() as empty:
        done = cli(empty, "top")
        assert (done.returncode, done.stdout) == (0, "") and "no sessions; start one" in done.stderr
        found = json.loads(cli(empty, "top", "--json").stdout)
        assert found["sessions"] == [] and found["cpus"] == os.cpu_count() and found["memory_bytes"] > 1 << 28
        with terminal(empty, "top", columns=20, rows=5) as screen:
            screen.until("no sessions")
            screen.press("q")
            assert screen.ends() == 0
        env = {"RETHAW_URL": empty.server.url, "RETHAW_TOKEN": empty.server.token}
        done = as_nobody(empty.server, "top", "--json", cwd=tmp_path, env=env)
        assert done.returncode == 0 and json.loads(done.stdout) | {"clock_s": 0} == found | {"clock_s": 0}, done.stderr
        empty.server.kill9()
        refused(cli(empty, "top"), 6, "no Rethaw server answers at")


def test_top_tells_what_sessions_take(home: House) -> None:
    busy = home.start({"name": "busy", "command": ["sh", "-c", BUSY], "memory_bytes": 256 << 20})
    asks = agents.start(home, ASKS)
    try:
        busy.until_state("running")
        asks.until_state("waiting", "suspended")
        asks.post("suspend")
        asks.until_state("suspended")
        found = json.loads(cli(home, "top", "--json", "--sort", "cpu").stdout)
        first, by_id = found["sessions"][0], {one["id"]: one for one in found["sessions"]}
        assert first["id"] == busy.id and 5 < first["cpu_percent"] <= 100 * os.cpu_count() * 1.1
        assert 1 << 20 < first["memory_bytes"] < first["memory_limit_bytes"] == 256 << 20
        mine = by_id[asks.id]
        assert (mine["cpu_s"], mine["memory_bytes"], mine["cpu_percent"]) == (None, None, None)
        stats = home.server.request("GET", f"/v1/sessions/{asks.id}")["stats"]
        assert mine["model_calls"] == 2 and mine["input_tokens"] == stats["input_tokens"] > 0
        assert mine["output_tokens"] == stats["output_tokens"] > 0
        assert mine["stored_bytes"] == stats["stored_bytes"] > 0 and mine["snapshots"] >= 1
        assert found["states"]["running"] >= 1 and found["states"]["suspended"] >= 1
        assert all(one["state"] not in ("completed", "failed", "cancelled") for one in found["sessions"])

        lines = cli(home, "top", "--once", "--sort", "tokens").stdout.splitlines()
        assert lines[0].split()[:3] == ["SESSION", "AGENT", "STATE"] and lines[1].startswith(asks.id[:10])
        refused(cli(home, "top", "--sort", "beauty"), 2, "beauty")
        refused(cli(home, "top", "--every", "1ms"), 2, "--every '1ms' is too short")
        command = [sys.executable, "-m", "rethaw.cli.main", "top", "--json", "--follow", "--every", "200ms"]
        process = subprocess.Popen(command, env=home.server.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        looks = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        process.communicate()
        assert looks[0]["clock_s"] < looks[1]["clock_s"] < looks[2]["clock_s"]
    finally:
        busy.post("cancel", {"now": True})


def test_top_on_a_terminal(home: House) -> None:
    """Wide and narrow, its keys, a server that goes away and comes back, Ctrl-C."""
    busy = home.start({"name": "busy", "command": ["sh", "-c", BUSY]})
    busy.until_state("running")
    with terminal(home, "top", "--every", "300ms", columns=200) as screen:
        wide = screen.until("SNAPSHOTS", busy.id[:10], "running", "MiB", "q end")
        assert "\x1b[?1049h" in wide and "ACTIVE" in wide
        screen.press("m")
        screen.resize(48, 12)
        screen.process.send_signal(signal.SIGWINCH)
        screen.until("SESSION")
        narrow = screen.until("SESSION", busy.id[:10], "CPU %", "MEMORY")
        narrow = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", narrow[narrow.rindex("\x1b[H") if "\x1b[H" in narrow else 0 :])
        assert all(len(line) <= 48 for line in narrow.replace("\r", "").split("\n")), narrow
        assert "SNAPSHOTS" not in narrow
        home.server.kill9()
        screen.until("no Rethaw server answers")
        home.server.start()
        screen.shown = b""
        screen.until(busy.id[:10], "1 sandbox: ")
        screen.press("\x03")
        assert screen.ends() == 130
        assert b"\x1b[?1049l" in screen.shown
    busy.post("cancel", {"now": True})
