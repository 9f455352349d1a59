"""Forks and rewinds on a real server: real sandboxes, a real log, a scripted provider."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_cli import refused as cli_refused
from e2e_fixtures import House, Session, body, house

from rethaw.model.errors import RethawError
from rethaw.testing.provider import Reply

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
ANSWERED = "exchange.completed"
PAGE = Path(__file__).resolve().parents[2] / "docs/branching.md"


@pytest.fixture(scope="module", name="h")
def house_fixture() -> Iterator[House]:
    with house() as made:
        yield made


@pytest.fixture(autouse=True)
def clean(h: House) -> Iterator[None]:
    h.provider.reset()
    yield
    h.provider.reset()


def fork(session: Session, at: int | str | None = None, n: int = 1, **more: Any) -> list[Session]:
    wanted = {"n": n, **({"at": at} if at is not None else {}), **more}
    found = session.house.server.request("POST", f"/v1/sessions/{session.id}/fork", wanted)["sessions"]
    return [Session(session.house, view) for view in found]


def rewind(session: Session, to: int | str, **more: Any) -> None:
    session.house.server.request("POST", f"/v1/sessions/{session.id}/rewind", {"to": to, **more})


def refused(work: Any) -> RethawError:
    with pytest.raises(RethawError) as error:
        work()
    return error.value


def checked(session: Session) -> list[dict[str, Any]]:
    """Promises 2, 3, 5 and 6, from the log: gapless, every answer once, nothing published or consumed twice, one writer."""
    every = session.events(all_lines=True)
    assert [e["seq"] for e in every] == list(range(1, len(every) + 1))
    path = session.events()
    own = [e for e in every if e["session"] == session.id]
    sent = [e["data"]["exchange"] for e in own if e["type"] == "exchange.upstream"]
    assert len(sent) == len(set(sent)), "a call went upstream twice"
    published = [e["data"]["message"] for e in every if e["type"] == "message.published"]
    assert len(published) == len(set(published))
    consumed = [e["data"]["number"] for e in path if e["type"] == "message.consumed"]
    assert len(consumed) == len(set(consumed))
    outbox = session.house.server.request("GET", f"/v1/sessions/{session.id}/outbox?after=0")["messages"]
    numbers = [m["number"] for m in outbox]
    assert numbers == sorted(set(numbers)) and len({m["id"] for m in outbox}) == len(numbers)
    return path


def seq_of(session: Session, kind: str, nth: int = 0) -> int:
    return session.events(kind)[nth]["seq"]


WAITS = """
import os, socket, uuid
def main(ctx):
    text = ask("before")
    ctx.send(text)
    choice = ctx.wait("choice", timeout="1h").payload
    return {"choice": choice, "answer": ask("after " + str(choice)), "random": os.urandom(8).hex(),
            "uuid": str(uuid.uuid4()), "session": ctx.session, "generation": ctx.generation,
            "host": socket.gethostname(), "address": socket.gethostbyname(socket.gethostname())}
"""


def test_three_forks_of_one_that_waits(h: House) -> None:
    parent = h.agent(WAITS, idle_suspend_s=0.2)
    parent.until_state("suspended")
    calls = len(h.provider.texts)
    forks = fork(parent, n=3)
    assert {f.view["state"] for f in forks} == {"suspended"}
    assert {f.view["forked_from"] for f in forks} == {parent.id}
    for number, one in enumerate(forks):
        one.signal("choice", number)
    results = [one.result() for one in forks]
    assert [r["choice"] for r in results] == [0, 1, 2]
    assert [r["answer"] for r in results] == [f"echo after {n}" for n in range(3)]
    assert [r["session"] for r in results] == [f.id for f in forks]
    assert [r["host"] for r in results] == [f.id.replace("_", "-") for f in forks]
    assert {r["address"] for r in results} == {"127.0.0.1"}
    for name in ("random", "uuid", "generation", "session"):
        assert len({r[name] for r in results}) == 3, name
    assert len(h.provider.texts) == calls + 3
    assert parent.view["state"] == "suspended"
    for one in forks:
        checked(one)
        assert one.outbox() == ["echo before"]
    assert {e["data"]["fork"] for e in parent.events("session.forked")} == {f.id for f in forks}
    parent.signal("choice", "mine")
    own = parent.result()
    assert own["choice"] == "mine" and own["host"] == parent.id.replace("_", "-")
    error = refused(lambda: h.server.request("DELETE", f"/v1/sessions/{parent.id}"))
    assert error.status == 409 and forks[0].id in str(error) and "rethaw rm" in str(error)
    for one in forks:
        h.server.request("DELETE", f"/v1/sessions/{one.id}")
    h.server.request("DELETE", f"/v1/sessions/{parent.id}")


TALKS = """
def main(ctx, turns=5):
    said = [ask("turn %d" % i) for i in range(turns)]
    ctx.send(said[-1])
    return said
"""


def test_a_fork_in_the_middle_pays_only_for_what_comes_after(h: House) -> None:
    parent = h.agent(TALKS)
    parent.result()
    assert len(h.provider.texts[-5:]) == 5
    h.provider.answer = lambda r: Reply(f"other {r.last_text}")
    for turn in (0, 2, 4):
        before = len(h.provider.texts)
        at = seq_of(parent, ANSWERED, turn)
        (one,) = fork(parent, at)
        said = one.result()
        assert said == [f"{'echo' if i <= turn else 'other'} turn {i}" for i in range(5)]
        assert len(h.provider.texts) - before == 4 - turn
        assert one.view["forked_seq"] == at
        checked(one)
        assert one.outbox() == [said[-1]]
    checked(parent)


def test_a_completed_session_is_rewound_and_goes_another_way(h: House) -> None:
    session = h.agent(TALKS)
    first = session.result()
    before = len(h.provider.texts)
    h.provider.answer = lambda r: Reply(f"other {r.last_text}")
    at = seq_of(session, ANSWERED, 1)
    rewind(session, at)
    assert session.view["state"] not in ("completed", "failed")
    second = session.result()
    assert second == [*first[:2], "other turn 2", "other turn 3", "other turn 4"]
    assert len(h.provider.texts) - before == 3
    path = checked(session)
    every = session.events(all_lines=True)
    left = [e for e in every if e["superseded"]]
    assert {e["data"]["exchange"] for e in left if e["type"] == "exchange.requested"}
    assert [json.loads(body(e)) for e in every if e["type"] == "session.result"] == [first, second]
    assert [e["data"]["why"] for e in path if e["type"] == "line.opened"] == ["rewind"]
    assert session.outbox() == [first[-1], second[-1]]


def test_a_running_session_is_rewound(h: House) -> None:
    code = """
def main(ctx):
    open("/tmp/file", "a").write("x")
    ctx.snapshot()
    open("/tmp/file", "a").write("y")
    print("waiting", open("/tmp/file").read(), flush=True)
    return ctx.wait("go").payload + open("/tmp/file").read()
"""
    session = h.agent(code, idle_suspend_s=None)
    session.until_output("waiting xy")
    snapshot = session.events("snapshot.created")[0]["data"]["snapshot"]
    generation = session.view["generation"]
    rewind(session, snapshot)
    session.until("a restored life", lambda s: s.view["state"] in ("running", "waiting"))
    assert session.view["generation"] != generation
    session.signal("go", "gone ")
    assert session.result() == "gone xy"
    assert len(session.events("snapshot.restored")) == 1
    checked(session)


def test_forks_in_the_middle_of_an_open_call(h: House) -> None:
    h.provider.answer = lambda r: Reply("for the parent", first_byte_s=3.0)
    code = "def main(ctx):\n    return ask('open')\n"
    parent = h.agent(code)
    parent.until("a snapshot of the call", lambda s: s.events("snapshot.created"))
    before = len(h.provider.texts)
    h.provider.answer = lambda r: Reply("for a fork")
    snapshot = parent.events("snapshot.created")[0]["data"]["snapshot"]
    forks = fork(parent, snapshot, 2)
    assert [one.result() for one in forks] == ["for a fork"] * 2
    assert parent.result() == "for the parent"
    assert len(h.provider.texts) - before == 2
    for one in forks:
        checked(one)
        assert len([e for e in one.events("exchange.upstream") if e["session"] == one.id]) == 1


def test_fork_of_a_fork_of_a_fork(h: House) -> None:
    code = """
def main(ctx):
    out = []
    for i in range(3):
        out.append(ctx.wait("s%d" % i).payload)
        out.append(ask("asked %s" % out[-1]))
        ctx.snapshot()
    return out
"""
    root = h.agent(code, idle_suspend_s=0.2)
    root.until_state("suspended")
    family = [root]
    for depth in range(3):
        (child,) = fork(family[-1])
        family.append(child)
        child.signal(f"s{depth}", f"g{depth}")
        if depth < 2:
            child.until(f"wait {depth}", lambda s, d=depth: any(
                e["data"].get("name") == f"s{d + 1}" for e in s.events("wait.opened")))  # fmt: skip
            child.until_state("suspended")
    before = len(h.provider.texts)
    last = family[-1]
    assert last.result() == ["g0", "echo asked g0", "g1", "echo asked g1", "g2", "echo asked g2"]
    assert len(h.provider.texts) - before <= 1
    path = checked(last)
    assert {e["session"] for e in path} == {s.id for s in family}
    # The second of them may go another way.
    family[2].signal("s2", "other")
    assert family[2].result()[-2:] == ["other", "echo asked other"]
    for one in family[1:3]:
        checked(one)


def test_a_fork_that_is_killed_before_its_first_snapshot(h: House) -> None:
    code = """
def main(ctx):
    ctx.snapshot()
    print("here", ctx.session, flush=True)
    return [ctx.session, ctx.wait("go").payload]
"""
    parent = h.agent(code, idle_suspend_s=None)
    parent.until_output("here")
    snapshot = parent.events("snapshot.created")[0]["data"]["snapshot"]
    parent.post("cancel", {"now": True})
    parent.until_state("cancelled")
    (one,) = fork(parent, snapshot)
    one.until_output(f"here {one.id}")
    assert not [e for e in one.events("snapshot.created") if e["session"] == one.id]
    h.server.sandboxes()
    one.crash()
    one.until("recovery", lambda s: s.view["crashes"] == 1 and s.view["state"] in ("running", "waiting"))
    assert one.view["snapshot"] == snapshot
    one.signal("go", 1)
    assert one.result() == [one.id, 1]
    assert one.output() == f"here {one.id}\n"
    checked(one)


def test_messages_before_and_after(h: House) -> None:
    code = """
def main(ctx):
    ctx.snapshot()
    return [m.payload for m in ctx.messages(idle="1s")]
"""
    parent = h.agent(code)
    parent.until("a snapshot", lambda s: s.events("snapshot.created"))
    parent.send("one")
    at = max(e["seq"] for e in parent.events("message.received"))
    parent.send("two")
    assert parent.result() == ["one", "two"]
    (short,) = fork(parent, at)
    (whole,) = fork(parent, at, redeliver=True)
    assert short.result() == ["one"] and whole.result() == ["one", "two"]
    rewind(parent, at)
    assert parent.result() == ["one"]
    for one in (short, whole, parent):
        checked(one)


def test_what_is_refused(h: House) -> None:
    session = h.agent(TALKS, {"turns": 1})
    session.result()
    other = h.agent(TALKS, {"turns": 1})
    other.result()
    foreign = other.events("snapshot.created")[0]["data"]["snapshot"]
    first = session.events("snapshot.created")[0]["data"]["seq"]
    last = session.view["last_seq"]
    cases: list[tuple[Any, int, str]] = [
        (last + 5, 422, f"1 to {last}"), (1, 422, str(first)), (0, 422, "event 0"), ("snap_no", 404, "snap_no"),
        (foreign, 422, session.id), (True, 422, "at"), ([], 422, "at"),
    ]  # fmt: skip
    for at, status, said in cases:
        error = refused(lambda at=at: fork(session, at))
        assert error.status == status and said in str(error) and "\n" not in str(error), error
        error = refused(lambda at=at: rewind(session, at))
        assert error.status == status, error
    for n in (0, 1001, -1):
        error = refused(lambda n=n: fork(session, n=n))
        assert error.status == 422 and str(n) in str(error)
    error = refused(lambda: h.server.request("POST", "/v1/sessions/s_nobody/fork", {}))
    assert error.status == 404


def test_the_page_and_the_commands(h: House, tmp_path: Path) -> None:
    text = PAGE.read_text()
    agent, script = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "trip.py").write_text(agent)
    cli = h.server.cli
    ident = cli("run", "-d", "trip.py", "--city", "Rome", cwd=tmp_path, timeout_s=300).stdout.strip()
    session = Session(h, {"id": ident})
    session.until_state("suspended", timeout_s=120)
    asked = len(h.provider.inner.calls)
    first, second = cli("fork", ident, "-n", "2").stdout.split()
    for one in (first, second):
        cli("signal", one, "choice", one)
    for one in (first, second):
        assert one in Session(h, {"id": one}).result()
    assert len(h.provider.inner.calls) == asked + 2
    scope: dict[str, Any] = {}
    exec(compile(script, str(PAGE), "exec"), scope)
    before = dict(os.environ)
    os.environ.update({"RETHAW_URL": h.server.url, "RETHAW_TOKEN": h.server.token})
    try:
        museums, food = scope["compare"](ident)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert "museums" in museums and "food" in food
    assert f"forked from {ident} at event" in cli("show", first).stdout
    table = cli("ls").stdout
    assert "FORK OF" in table and len([line for line in table.splitlines() if line.endswith(ident[:10])]) == 4
    shown = json.loads(cli("fork", ident, "--at", str(session.view["last_seq"]), "--json").stdout)
    assert shown["forked_from"] == ident
    snapshot = session.view["snapshot"]
    cli_refused(cli("rm", ident, check=False), 5, ident, first, "rethaw rm")
    assert cli("rewind", first, "--to", snapshot[:20]).stdout.startswith(first)
    cli("signal", first, "choice", "again")
    assert "again" in Session(h, {"id": first}).result()
    for args, code, words in (
        (("fork", "s_nobody"), 4, ["s_nobody"]),
        (("fork", ident, "--at", "snap_nobody"), 4, ["snap_nobody"]),
        (("fork", ident, "--at", "99999"), 2, ["99999"]),
        (("fork", ident, "--at", "-3"), 2, ["-3"]),
        (("fork", ident, "-n", "0"), 2, ["0 forks", "1 to 1000"]),
        (("fork", ident, "-n", "1001"), 2, ["1001"]),
        (("fork", ident, "-n", "many"), 2, ["many"]),
        (("rewind", ident, "--to", "1"), 2, ["event 1", "first one"]),
        (("rewind", ident), 2, ["--to"]),
    ):
        cli_refused(cli(*args, check=False), code, *words)


def test_a_running_session_takes_a_snapshot_for_its_fork(h: House) -> None:
    code = """
import time
def main(ctx):
    known = ctx.session  # before the snapshot, which may come as soon as it has begun
    print("begun", flush=True)
    while ctx.session == known:
        time.sleep(0.05)
    return "the fork"
"""
    parent = h.agent(code, idle_suspend_s=None)
    parent.until_output("begun")
    (one,) = fork(parent)
    assert one.result() == "the fork"
    assert parent.view["state"] == "running"
    (taken,) = parent.events("snapshot.created")
    assert taken["data"]["why"] == "requested" and one.view["forked_seq"] == taken["data"]["seq"]
    parent.post("cancel", {"now": True})
    checked(one)


def test_rewound_at_the_very_moment_of_its_end(h: House) -> None:
    session = h.agent("def main(ctx):\n    ctx.snapshot()\n    return ctx.generation\n")
    generations = set[str]()
    for _ in range(5):
        found = h.server.request("GET", f"/v1/sessions/{session.id}/result?wait_s=60", timeout_s=90)
        assert found["state"] == "completed"
        generations.add(found["result"])
        rewind(session, session.events("snapshot.created")[0]["data"]["snapshot"])
    session.result()
    assert len(generations) == 5
    checked(session)
