"""Agents across versions on a real server: real sandboxes, real files, the old code's promises kept by the new."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_cli import refused
from e2e_fixtures import ASK, House, Session, house

from rethaw import Agent
from rethaw.cli.main import main
from rethaw.model.errors import InvalidInput, RethawError
from rethaw.testing.chaos.run import code_archive

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
PAGE = Path(__file__).resolve().parents[2] / "docs/versions.md"


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(name="cli")
def cli_fixture(h: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process, in a directory of the test's: starting an interpreter for each takes a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETHAW_URL", h.server.url)
    monkeypatch.setenv("RETHAW_TOKEN", h.server.token)

    def run(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = main(args)
        done = subprocess.CompletedProcess(args, code, *capsys.readouterr())
        assert code == 0 or not check, done
        return done

    return run


@pytest.fixture(scope="module", name="h")
def house_fixture() -> Iterator[House]:
    with house() as made:
        yield made


def version(session: Session, code: str) -> dict[str, Any]:
    """The agent of `session` with other code."""
    digest = session.house.server.request("POST", "/v1/blobs", code_archive(agent=(ASK + code).encode()))["digest"]
    return {**session.view["agent"], "code": digest}


def upgrade(session: Session, agent: dict[str, Any], **body: Any) -> dict[str, Any]:
    path = f"/v1/sessions/{session.id}/upgrade"
    return session.house.server.request("POST", path, {"agent": agent, **body}, timeout_s=90)


def until_sent(session: Session, *expected: str) -> None:
    session.until(f"outbox {expected}", lambda s: s.outbox() == list(expected))


# Both versions have one length and one time of change: byte code of the one would pass for that of the other.
HELPER = (
    ASK
    + """
import rethaw
BUG = 1
@rethaw.agent(name="helper", idle_suspend="0.3s")
def helper(ctx, who):
    with open("/root/notes", "a") as notes:
        notes.write("began%d\\n" % ctx.attempt)
    if ctx.fresh:
        answered = [e["body"] for e in ctx.history() if e["type"] == "message.sent"]
        print("fresh", answered, open("/root/notes").read().split(), os.readlink("/app/link"), flush=True)
    else:
        os.symlink("notes", "/app/link")
    for message in ctx.messages(idle="1h"):
        said = ask(message.payload)
        if BUG and message.payload == "boom":
            raise ValueError("a bug was shipped")
        with open("/root/notes", "a") as notes:
            notes.write(message.payload + "\\n")
        ctx.send("v%d %s to %s" % (2 - BUG, said, who))
"""
)


def test_a_bug_is_corrected_in_the_middle_of_a_conversation(h: House, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "helper.py"
    file.write_text(HELPER)
    assert cli("deploy", "helper.py").stdout == "helper@1\n"
    session = Session(h, {"id": cli("run", "-d", "--agent", "helper", "--who", "Ann").stdout.strip()})
    session.send("hello")
    until_sent(session, "v1 echo hello to Ann")
    session.send("boom")
    session.until_state("failed")
    assert "a bug was shipped" in session.output("stderr")
    refused(cli("upgrade", session.id, check=False), 5, "runs version 1 already")
    file.write_text(HELPER.replace("BUG = 1", "BUG = 0"))
    assert cli("deploy", "helper.py").stdout == "helper@2\n"
    assert "already" in cli("deploy", "helper.py").stderr
    said = cli("upgrade", session.id).stdout
    assert re.match(rf"{session.id}  version 1 -> 2 \([0-9a-f]{{8}}\); ", said), said
    until_sent(session, "v1 echo hello to Ann", "v2 echo boom to Ann")  # delivered again
    assert """fresh ['"v1 echo hello to Ann"'] ['began1', 'hello', 'began2'] notes""" in session.output()
    # It recovers into the new version, with its files.
    session.until_state("suspended")
    session.send("more")
    session.until("the third answer", lambda s: len(s.outbox()) == 3)
    session.until_state("running", "waiting", "suspended")
    if session.view["state"] == "suspended":
        session.post("resume")
        session.send("wake")
    else:
        session.crash()
        session.send("wake")
    session.until("the fourth answer", lambda s: len(s.outbox()) == 4)
    assert all(text.startswith("v2 ") for text in session.outbox()[1:])
    assert session.view["version"] == 2 and len(session.events("session.upgraded")) == 1
    # A downgrade is the same; a fork of a snapshot from before it is of the version whose memory that is.
    snapshot = session.events("snapshot.created")[-1]["data"]["snapshot"]
    assert "version 2 -> 1 (" in cli("upgrade", session.id, "--to", "1").stdout
    session.send("again")
    session.until("the old one's answer", lambda s: s.outbox()[-1] == "v1 echo again to Ann")
    assert "'wake', 'began3'] notes" in session.output()
    fork = Session(h, json.loads(cli("fork", session.id, "--at", snapshot, "--json").stdout))
    fork.send("forked")
    fork.until("the fork's answer", lambda s: s.outbox()[-1:] == ["v2 echo forked to Ann"])
    assert (fork.view["version"], session.view["version"]) == (2, 1)
    table = cli("agent", "show", "helper").stdout
    assert f"{session.id[:10]}  1" in table and f"{fork.id[:10]}  2" in table
    assert "helper@1" in cli("ls").stdout and "version     1 (" in cli("show", session.id).stdout
    for one in (fork, session):
        one.post("cancel", {"now": True})


WAITS = """
import rethaw
@rethaw.agent(name="waiter", idle_suspend="0.2s")
def waiter(ctx):
    url = ctx.signal("approval").url
    print("url", url, flush=True)
    return ["old", ctx.wait("approval", timeout="1h").payload, ctx.fresh]
"""


def test_an_old_callback_address_completes_the_new_codes_wait(h: House, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "waiter.py"
    file.write_text(WAITS)
    sessions = [Session(h, {"id": cli("run", "-d", "waiter.py").stdout.strip()}) for _ in range(2)]
    for session in sessions:
        session.until_state("suspended")
    refused(cli("upgrade", sessions[0].id, check=False), 4, "waiter", "never deployed")
    file.write_text(WAITS.replace('"old"', '"new"'))
    cli("deploy", "waiter.py")
    lines = cli("upgrade", "--all-of", "waiter").stdout.splitlines()
    assert len(lines) == 2 and all("version 1 -> 2" in line for line in lines)
    for number, session in enumerate(sessions):
        session.until_state("suspended")
        first, second = re.findall(r"url (\S+)", session.output())
        assert first != second
        request = urllib.request.Request((first, second)[number], data=b'{"ok": 1}', method="POST")
        urllib.request.urlopen(request, timeout=30).close()
        assert session.result() == ["new", {"ok": 1}, True]
    assert "runs" not in cli("upgrade", "--all-of", "waiter").stdout  # none is unfinished


def test_from_before_the_damage(h: House) -> None:
    code = """
def main(ctx):
    files = sorted(os.listdir("/srv")) if ctx.fresh else []
    events = [e["body"] for e in ctx.history() if e["type"] == "emitted"]
    if ctx.fresh:
        return [files, events, ask("third")]
    open("/srv/good", "w").write("x")
    ask("first")
    ctx.emit("good")
    at = ask("second")
    open("/srv/damage", "w").write("x")
    ctx.emit("damage", bad=True)
    ask("damaged")
    ctx.wait("never", timeout="1h")
"""
    session = h.agent(code, idle_suspend_s=0.2)
    session.until_state("suspended")
    good = session.events("exchange.completed")[1]["seq"]
    done = upgrade(session, version(session, code + "# other\n"), from_seq=good)
    assert (done["at"], done["changed"]) == (good, True)
    assert session.result() == [["good"], ["{}"], "echo third"]
    left = [e for e in session.events(all_lines=True) if e["superseded"]]
    assert any(e["type"] == "emitted" and e["data"]["name"] == "damage" for e in left)
    with pytest.raises(RethawError, match="no event 99999"):
        upgrade(session, session.view["agent"], from_seq=99999)


def test_one_that_runs_is_upgraded_with_what_it_wrote(h: House) -> None:
    code = """
def main(ctx):
    if ctx.fresh:
        return [os.path.getsize("/var/tmp/count"), open("/var/tmp/d/f").read(), oct(os.stat("/var/tmp/d").st_mode & 0o777),
                os.listdir("/var/tmp/empty"), open("/app/agent.py").read().endswith("# other\\n"),
                os.path.exists("/etc/debian_version")]
    os.makedirs("/var/tmp/d", mode=0o750)
    os.makedirs("/var/tmp/empty")
    os.unlink("/etc/debian_version")
    open("/var/tmp/d/f", "w").write("é")
    open("/app/agent.py", "a").write("# changed by itself\\n")
    with open("/var/tmp/count", "w") as file:
        file.write("x" * 3000000)
    print("written", flush=True)
    while True:
        time.sleep(0.01)
"""
    session = h.agent(code, idle_suspend_s=None)
    session.until_output("written")
    done = upgrade(session, version(session, code + "# other\n"))
    (taken,) = session.events("snapshot.created")
    assert (done["files"], done["at"]) == (taken["data"]["snapshot"], taken["data"]["seq"])
    # What came with the new code is the new code's.
    assert session.result() == [3000000, "é", "0o750", [], True, False]


KEEPS = """
def main(ctx):
    if not ctx.fresh:
        open("/srv/kept", "w").write("of the first life")
    return ["old", ctx.wait("go", timeout="1h").payload, open("/srv/kept").read(), ctx.attempt]
"""


def test_the_server_is_killed_in_the_middle_of_an_upgrade(h: House) -> None:
    points = ("carry.made", "control.upgrade.before", "control.upgrade.after")
    sessions = [h.agent(KEEPS, idle_suspend_s=0.2) for _ in points]
    for session in sessions:
        session.until_state("suspended")
    new = version(sessions[0], KEEPS.replace('"old"', '"new"'))
    for point, session in zip(points, sessions, strict=True):
        h.server.restart(faults=f"{point}:1=kill")
        with contextlib.suppress(OSError, RethawError):
            upgrade(session, new)
        assert h.server.process is not None
        h.server.process.wait(60)
    h.server.restart()
    for point, session in zip(points, sessions, strict=True):
        done = upgrade(session, new)  # as who saw no answer does
        assert done["changed"] is (point == "control.upgrade.before")
        session.signal("go", point)
    for point, session in zip(points, sessions, strict=True):
        assert session.result() == ["new", point, "of the first life", 2]
        every = session.events(all_lines=True)
        assert [e["type"] for e in every].count("session.upgraded") == 1
        assert [e["seq"] for e in every] == list(range(1, len(every) + 1))


TYPED = """
import dataclasses, rethaw
@dataclasses.dataclass
class Place:
    city: str
    zip: int = 0
@rethaw.agent(name="trip")
def trip(ctx, code: str, days: int = 2, place: Place | None = None):
    'Plan a trip.'
    return [code, days, place and place.city]
"""


def test_a_deployed_agent_says_what_it_takes(
    h: House, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trip.py").write_text(TYPED)
    cli("deploy", "trip.py")
    (tmp_path / "trip.py").unlink()  # its code is on the server alone
    started = cli("run", "-d", "--agent", "trip", "--code", "007", "--place", '{"city": "Ulm"}').stdout.strip()
    assert Session(h, {"id": started}).result() == ["007", 2, "Ulm"]  # text stays text where it says str
    told = cli("run", "--agent", "trip", "--help").stdout
    assert "Plan a trip." in told and re.search(r"--days +int +default 2", told)
    assert "  Place: city: str, zip: int" in told
    assert re.search(r"--code +str +needed", cli("agent", "show", "trip").stdout)
    takes = "it takes --code str [--days int] [--place Place | None]"
    refused(cli("run", "--agent", "trip", check=False), 2, "needs --code", takes)
    refused(cli("run", "--agent", "trip", "--code", "x", "--days", "many", check=False), 2, "--days = 'many'", takes)
    before = h.server.request("GET", "/v1/sessions")["sessions"]
    for given, said in (
        ({}, "agent trip needs argument 'code'; it takes code: str, days: int = 2, place: Place | None = null"),
        ({"code": 7}, "agent trip: argument code = 7 does not fit: it is no str; it has to be str"),
        ({"code": "x", "place": {"zip": 1}}, "argument place = {'zip': 1} does not fit: field 'city' is missing"),
        ({"code": "x", "dys": 1}, "agent trip has no argument 'dys'"),
    ):
        with pytest.raises(InvalidInput, match=re.escape(said)):
            Agent.from_name("trip").start(**given)
    assert h.server.request("GET", "/v1/sessions")["sessions"] == before


def test_the_page(h: House, cli: Cli, tmp_path: Path) -> None:
    text = PAGE.read_text()
    agent, begin, correct = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "helper.py").write_text(agent.replace("helper(ctx", "guide(ctx"))
    (tmp_path / "helper2.py").write_text(agent.replace("helper(ctx", "guide(ctx").replace("{who}: ", "{who}, "))
    cli("deploy", "helper.py")
    scope: dict[str, Any] = {}
    exec(compile(begin.replace('"helper"', '"guide"') + correct, str(PAGE), "exec"), scope)
    session = Session(h, {"id": scope["begin"]("Bea")})
    until_sent(session, "Bea: hello")
    assert scope["correct"](session.id, str(tmp_path / "helper2.py")) == 2
    session.send("again")
    until_sent(session, "Bea: hello", "Bea, again")
    assert session.view["version"] == 2
    # What its definition says of how it is started, and of what follows a failure, is deployed with it.
    slow = agent.replace("helper(ctx", "guide(ctx").replace('idle_suspend="2s"', 'queue="slow", tags=["own"]')
    (tmp_path / "slow.py").write_text(slow)
    cli("deploy", "slow.py")
    queued = Agent.from_name("guide").with_options(tags=["more"], priority=4, retries=2).start(who="Cid")
    assert (queued.view.queue, queued.view.priority, queued.view.tags) == ("slow", 4, ("own", "more"))
    assert queued.view.agent.retries is not None and queued.view.agent.retries.max == 2
    queued.cancel(now=True)
    cli("deploy", "helper2.py")
    assert cli("agent", "pin", "guide", "1").stdout == "guide@1\n"
    assert "pinned" in cli("agent", "ls").stdout
    assert cli("agent", "unpin", "guide").stdout == "guide@2\n"
    for args, code, words in (
        (("agent", "pin", "guide", "9"), 4, ["version 9", "1 to 4"]),
        (("agent", "show", "nobody"), 4, ["nobody"]),
        (("run", "--agent", "guide@x"), 2, ["guide@x"]),
        (("run", "--agent", "nobody"), 4, ["nobody"]),
        (("run", "--agent", "guide", "--memory", "1GiB", "--who", "x"), 2, ["--memory"]),
        (("upgrade",), 2, ["SESSION"]),
        (("upgrade", session.id, "--to", "7"), 4, ["version 7"]),
        (("upgrade", session.id, "--files", "some"), 2, ["some"]),
        (("upgrade", session.id, "helper.py", "--to", "1"), 2, ["--to"]),
        (("upgrade", "--all-of", "nobody"), 4, ["nobody"]),
    ):
        refused(cli(*args, check=False), code, *words)
