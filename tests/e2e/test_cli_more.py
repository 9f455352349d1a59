"""The command line when something is not as its user thinks: names that are nearly right, sessions that have ended."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from e2e_agents import Agents
from e2e_cli import refused
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
