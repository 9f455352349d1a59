"""Queues and schedules on a real server: limits across crashes, times across kills, the command line and the clients."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from e2e_cli import refused
from e2e_fixtures import House, Session, house

from rethaw import AsyncClient, Client, Unavailable
from rethaw.cli.main import main
from rethaw.sdk.agents import find
from rethaw.testing.processes import wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]

AGENT = """
import rethaw

@rethaw.agent(queue="reports", tags=["report"], idle_suspend=None)
def report(ctx, topic, n=1):
    if topic == "wait":
        ctx.wait("go")
    return [topic, n]
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


class Cli:
    """The command line in this process, which is quicker than one for each."""

    def __init__(self, home: House, capsys: pytest.CaptureFixture[str]) -> None:
        self._home = home
        self._capsys = capsys

    def __call__(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        self._capsys.readouterr()
        code = main(args)
        out, err = self._capsys.readouterr()
        assert code == 0 or not check, err
        return subprocess.CompletedProcess(args, code, out, err)

    def session(self, *args: str) -> Session:
        """The one whose id the command prints."""
        return Session(self._home, {"id": self(*args).stdout.strip()})


@pytest.fixture(name="cli")
def cli_fixture(home: House, code: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.chdir(code)
    monkeypatch.setenv("RETHAW_URL", home.server.url)
    monkeypatch.setenv("RETHAW_TOKEN", home.server.token)
    return Cli(home, capsys)


def test_a_limit_holds_across_crashes(home: House, cli: Cli) -> None:
    def run(*more: str) -> Session:
        return cli.session("run", "-d", "agent.py", *more)

    cli("queue", "set", "reports", "--limit", "1")
    one = run("--topic", "wait", "--tag", "first")
    one.until_state("waiting")
    low, high = run("--topic", "low"), run("--topic", "high", "--priority", "5")
    assert (
        "queue reports lets 1 run at once" in cli("why", low.id).stdout
        and "1 wait before it" in cli("why", low.id).stdout
    )
    assert "reports, priority 5\ntags        report\n" in cli("show", high.id).stdout
    one.post("snapshots")
    one.crash()
    one.until("a crash", lambda s: s.view["crashes"] == 1 and s.view["state"] == "waiting")
    home.server.kill9()
    home.server.start()
    one.until("another", lambda s: s.view["crashes"] == 2 and s.view["state"] == "waiting")
    assert [s.view["state"] for s in (low, high)] == ["queued", "queued"]
    shown = json.loads(cli("queue", "show", "reports", "--json").stdout)
    assert (shown["running"], shown["next"]) == (1, [high.id, low.id])
    one.signal("go")
    assert one.result() == ["wait", 1] and high.result() == ["high", 1] and low.result() == ["low", 1]
    began = [next(e["at"] for e in s.events("session.state") if e["data"]["state"] == "starting") for s in (high, low)]
    ended = [s.events("session.state")[-1]["at"] for s in (one, high)]
    assert ended[0] <= began[0] and ended[1] <= began[1]

    found = cli("ls", "--tag", "report", "--queue", "reports", "-q").stdout.split()
    assert set(found) == {high.id, low.id, one.id}
    assert cli("ls", "--tag", "report", "--tag", "first", "-q").stdout.split() == [one.id]
    assert cli("ls", "--search", "HIGH", "--since", "1h", "-q").stdout.split() == [high.id]
    assert cli("ls", "--state", "failed", "--state", "queued", "-q").stdout == ""
    assert " QUEUE " in cli("ls").stdout and "report first" in cli("ls").stdout
    refused(cli("queue", "set", "a b", "--limit", "1", check=False), 2, "'a b'")
    refused(cli("queue", "rm", "nobody", check=False), 4, "no queue 'nobody'")
    assert cli("queue", "rm", "reports").stdout == "reports\n"


def test_each_time_of_a_schedule_is_started_once_whatever_is_killed(home: House, cli: Cli) -> None:
    server = home.server
    cli("schedule", "create", "tick", "--every", "1s", "--catch-up", "all", "--delay", "1h", "agent.py", "--topic", "t")
    for where in ("before_commit:1", "after_commit:2"):
        server.kill9()
        server.faults = f"control.schedule.{where}=kill"
        with contextlib.suppress(Unavailable):  # it may be killed before it answers
            server.start()
        wait_until(lambda: not server.running, 30, "the kill")
    server.restart()
    wait_until(lambda: len(home.server.request("GET", "/v1/schedules/tick")["firings"]) > 3, 30, "times")
    cli("schedule", "pause", "tick")
    view = json.loads(cli("schedule", "show", "tick", "--json").stdout)
    found = server.request("GET", "/v1/sessions?tag=schedule:tick&limit=1000")["sessions"]
    due = sorted(datetime.fromisoformat(s["key"].removeprefix("schedule:tick:")) for s in found)
    assert len(due) == len(set(due)) >= 4
    assert {round((b - a).total_seconds(), 3) for a, b in itertools.pairwise(due)} == {1.0}, "none is missing"
    assert round((datetime.fromisoformat(view["next_at"]) - due[-1]).total_seconds(), 3) == 1.0
    assert {s["state"] for s in found} == {"queued"}
    cli("schedule", "rm", "tick")
    for one in found:
        server.request("DELETE", f"/v1/sessions/{one['id']}?force=1")


def test_schedules_on_the_command_line(cli: Cli) -> None:
    def said(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return cli("schedule", *args, check=check)

    refused(said("create", "d", "--cron", "0 25 * * *", "agent.py", "--topic", "x", check=False), 2, "'0 25 * * *'")
    refused(
        said("create", "d", "--cron", "@daily", "--tz", "Moon", "agent.py", "--topic", "x", check=False), 2, "'Moon'"
    )
    refused(said("create", "d", "--every", "1h", "agent.py", check=False), 2, "needs --topic")
    refused(said("create", "d", "--every", "1h", "agent.py", "--topc", "x", check=False), 2, "did you mean --topic")
    refused(said("create", "d", "agent.py", "--topic", "x", check=False), 2, "either cron or every")
    refused(said("create", "d", "--every", "1h", check=False), 2, "what to run is not named")
    refused(said("show", "d", check=False), 4, "no schedule 'd'")
    said("create", "d", "--cron", "0 9 * * 1-5", "--tz", "Europe/Berlin", "agent.py", "--topic", "x", "--tag", "own")
    refused(said("create", "d", "--every", "1h", "agent.py", "--topic", "x", check=False), 5, "exists and differs")
    said("create", "d", "--every", "1h", "--replace", "agent.py", "--topic", "y", "--queue", "q")
    said("create", "c", "--cron", "@hourly", "--image", "base", "--", "echo", "-n", "hello")
    assert "every 1h" in said("ls").stdout and "@hourly (UTC)" in said("ls").stdout
    one = cli.session("schedule", "trigger", "d")
    assert one.result() == ["y", 1] and (one.view["queue"], one.view["tags"]) == ("q", ["report", "schedule:d"])
    two = cli.session("schedule", "trigger", "c")
    two.until_state("completed")
    assert two.output() == "hello"
    shown = said("show", "d").stdout
    assert f"triggered  {one.id}" in shown and '{"topic": "y"}' in shown
    said("pause", "d")
    assert "paused" in said("ls").stdout
    said("resume", "d")
    for name in "cd":
        said("rm", name)
    assert json.loads(said("ls", "--json").stdout) == []


async def test_the_clients(home: House, code: Path) -> None:
    agent = find(code / "agent.py")
    with Client(home.server.url, home.server.token) as client:
        client.queues.set("reports", limit=1, key_limit=1, suspended="free")
        client.queues.pause("reports")
        made = [agent.with_options(tags=[f"n{n}"], ttl="1h").start_on(client, "x", n=n) for n in range(5)]
        assert [s.view.queue for s in made] == ["reports"] * 5 and made[0].view.tags == ("report", "n0")
        assert client.queues.get("reports").waiting == 5
        later = agent.with_options(queue="other", delay="1h", key="later-one").start_on(client, "x")
        assert later.view.not_before is not None and later.view.state == "queued"
        page = client.sessions.page(state=["queued"], queue="reports", limit=2)
        rest = client.sessions.page(state=["queued"], queue="reports", limit=10, cursor=page.next)
        assert [v.id for v in page.sessions + rest.sessions] == [
            v.id for v in client.sessions.every(queue="reports", state="queued")
        ]
        assert rest.next is None and len(page.sessions) == 2 and len(rest.sessions) == 3
        assert [v.id for v in client.sessions.list(tag=["n3", "report"])] == [made[3].id]
        assert [v.id for v in client.sessions.list(search="later-", created_after="1h")] == [later.id]
        client.queues.set("reports", limit=None, key_limit=None)
        client.queues.resume("reports")
        assert [s.result(timeout=60) for s in made] == [["x", n] for n in range(5)]
        later.client.sessions.cancel(later.id)
        plan = client.schedules.create("s", agent, {"topic": "z"}, cron="0 0 1 1 *", tz="Asia/Tokyo", overlap="skip")
        assert plan.options.queue == "reports" and plan.next_at.utcoffset() is not None
        assert client.schedules.trigger("s").result(timeout=60) == ["z", 1]
        assert [f.what for f in client.schedules.get("s").firings] == ["triggered"]
    async with AsyncClient(home.server.url, home.server.token) as client:
        assert [s.name for s in await client.schedules.list()] == ["s"]
        assert (
            await client.schedules.create("s", agent, {"topic": "z"}, cron="0 0 1 1 *", tz="Asia/Tokyo", overlap="skip")
        ).name == "s"
        assert (await client.schedules.pause("s")).paused and not (await client.schedules.resume("s")).paused
        session = await client.schedules.trigger("s")
        assert await session.result(timeout=60) == ["z", 1]
        assert [v.id async for v in client.sessions.every(tag="schedule:s")][:1] == [session.id]
        assert len((await client.sessions.page(queue="reports")).sessions) >= 7
        await client.schedules.delete("s")
        assert (await client.queues.set("reports", limit=3)).limit == 3
        assert (await client.queues.pause("reports")).paused and not (await client.queues.resume("reports")).paused
        assert "reports" in [q.name for q in await client.queues.list()]
        assert (await client.queues.get("reports")).running == 0
        await client.queues.delete("reports")
