"""The server is killed at each named point of saving, restoring, recording and serving; saves fail; nodes lose their
generation. The session ends with the right result, and its log explains every call that the provider saw."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from e2e_agents import Agents
from e2e_fixtures import House, Session, gapless, house

from rethaw.model.errors import Conflict, RethawError
from rethaw.testing import processes
from rethaw.testing.provider import ProviderRequest, Reply

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(150),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
agents = Agents()


@pytest.fixture(scope="module")
def shared() -> Iterator[House]:
    with house() as h:
        yield h


@pytest.fixture
def home(shared: House) -> Iterator[House]:
    shared.provider.reset()
    yield shared
    if not shared.server.running:
        shared.server.restart()
    for view in shared.server.request("GET", "/v1/sessions?limit=20")["sessions"]:
        if view["state"] not in ("completed", "failed", "cancelled"):  # of a test that failed: the next one must not
            shared.server.request("DELETE", f"/v1/sessions/{view['id']}?force=1")


CHORES = agents.add("""
def main(ctx, tag):
    said = [ask("%s one" % tag)]
    ctx.send({"said": said[0]})
    ctx.emit("done", step=1)
    approved = ctx.wait("approval").payload
    said.append(ask("%s two" % tag))
    ctx.sleep(0.05)
    ctx.send({"said": said[1]})
    return {"said": said, "approved": approved, "attempt": ctx.attempt}
""")


class Play:
    """One session of CHORES against a server that dies once at `fault` and is started again without it."""

    def __init__(self, home: House, fault: str, slow_s: float = 0.0) -> None:
        self.home = home
        self.fault = fault
        self.died = 0
        self.tag = re.sub(r"[^a-z0-9]+", "-", fault.lower()) + f"-{uuid.uuid4().hex[:6]}"
        self.session: Session | None = None

        def answer(request: ProviderRequest) -> Reply:
            wait = slow_s if request.last_text == f"{self.tag} two" else 0.1
            return Reply(f"re {request.last_text}", first_byte_s=wait, chunk_s=0.02)

        home.provider.answer = answer

    def boot(self, faults: str = "") -> None:
        """(Re)start the server; one that dies at a fault while it starts is started again without."""
        server = self.home.server
        server.kill9()
        try:
            server.restart(faults=faults)
        except RethawError:
            assert faults
            self.revive()

    def revive(self) -> None:
        process = self.home.server.process
        assert process is not None
        assert process.wait(30) == -signal.SIGKILL, self.home.server.log_tail()
        self.died += 1
        self.home.server.restart()

    def insist(self, what: str, action: Any, timeout_s: float = 60.0) -> Any:
        """The value of `action` once it is true, over the death of the server."""
        end = time.monotonic() + timeout_s
        while True:
            try:
                value = action()
                if value:
                    return value
            except Conflict:
                raise
            except (OSError, RethawError, ValueError, KeyError):
                pass
            if not self.home.server.running:
                self.revive()
            if time.monotonic() > end:
                events = self.session.events(all_lines=True)[-30:] if self.session else []
                tail = "\n".join(f"{e['seq']} {e['line']} {e['type']} {e['data']}" for e in events)
                raise AssertionError(f"{what} did not happen\n{tail}\n{self.home.server.log_tail()}")
            time.sleep(0.02)

    def start(self) -> None:
        def begin() -> Session:
            return agents.start(self.home, CHORES, {"tag": self.tag}, key=self.tag, idle_suspend_s=0.2)

        self.session = self.insist("start", begin)

    def reach(self, *states: str) -> None:
        session = self.session
        assert session is not None
        self.insist(f"state {states}", lambda: session.view["state"] in states)

    def approve(self) -> None:
        session = self.session
        assert session is not None
        body = {"payload": "yes", "idempotency_key": self.tag}
        self.insist("approval", lambda: session.post("signals/approval", body))

    def end(self) -> None:
        """The result is right, the provider was asked as often as the log says, and nothing is left over."""
        session = self.session
        assert session is not None
        self.reach("completed", "failed", "cancelled")
        result = session.result()
        said = [f"re {self.tag} one", f"re {self.tag} two"]
        assert result == {"said": said, "approved": "yes", "attempt": 1}
        assert [m["said"] for m in session.outbox()] == said
        events = session.events(all_lines=True)
        gapless(events)
        reissued = [e for e in events if e["type"] == "exchange.reissued"]
        sent = [e for e in events if e["type"] == "exchange.upstream"]
        calls = [t for t in self.home.provider.texts if self.tag in t]
        assert 2 <= len(calls) <= min(2 + len(reissued), len(sent)), (calls, reissued, sent)
        assert len(reissued) <= 1
        assert self.died == 1, f"the server passed {self.fault} without dying"
        processes.wait_until(lambda: not self.home.server.sandboxes(), 20, "its sandboxes to be gone")


def restored_and_half_way(home: House, fault: str) -> None:
    """The fault strikes a server that was started anew while the session slept."""
    play = Play(home, fault)
    play.boot()
    play.start()
    play.reach("suspended")
    assert home.server.stop() == 0
    play.boot(f"{fault}=kill")
    play.approve()
    play.end()


def crashed_in_a_call(home: House, fault: str) -> None:
    """The fault strikes while a sandbox that died in the middle of a call comes back."""
    play = Play(home, fault, slow_s=1.5)
    play.boot(f"{fault}=kill")
    play.start()
    play.reach("suspended")
    play.approve()
    session = play.session
    assert session is not None
    play.insist("call two", lambda: f"{play.tag} two" in home.provider.texts)
    play.insist(
        "its snapshot",
        lambda: len([e for e in session.events("snapshot.created") if e["data"]["why"] == "exchange"]) > 1,
    )
    boxes = home.server.sandboxes()
    for box in boxes:
        processes.kill(box.pid)
    play.end()


def from_the_beginning(home: House, fault: str) -> None:
    play = Play(home, fault)
    play.boot(f"{fault}=kill")
    play.start()
    play.reach("suspended", "completed")
    play.approve()
    play.end()


long = pytest.mark.long
FROM_THE_BEGINNING = [
    pytest.param("saver.quiet", marks=long),
    "saver.captured",
    "store.written",
    pytest.param("saver.commit", marks=long),
    "catalog.commit.inside",
    pytest.param("supervisor.suspended", marks=long),
    pytest.param("log.append.after_commit:3", marks=long),
    "gateway.request.durable",
    pytest.param("gateway.upstream.before", marks=long),
    "gateway.finish.before",
    "supervisor.exited",
    pytest.param("saver.quiesce", marks=long),
    pytest.param("saver.thawed", marks=long),
    pytest.param("saver.stored", marks=long),
    pytest.param("saver.committed", marks=long),
    pytest.param("saver.captured:3", marks=long),
    pytest.param("saver.commit:3", marks=long),
    pytest.param("store.verified", marks=long),
    pytest.param("store.between", marks=long),
    pytest.param("store.renamed", marks=long),
    pytest.param("catalog.commit.before", marks=long),
    pytest.param("catalog.commit.after", marks=long),
    pytest.param("engine.boot.before", marks=long),
    pytest.param("engine.boot.after", marks=long),
    pytest.param("engine.capture.before", marks=long),
    pytest.param("engine.capture.after", marks=long),
    pytest.param("supervisor.boot", marks=long),
    pytest.param("supervisor.running", marks=long),
    pytest.param("supervisor.released", marks=long),
    pytest.param("supervisor.final", marks=long),
    pytest.param("log.append.before_commit", marks=long),
    pytest.param("log.append.before_commit:4", marks=long),
    pytest.param("log.append.after_commit", marks=long),
    pytest.param("log.append.after_commit:6", marks=long),
    pytest.param("log.exchange.before_commit", marks=long),
    pytest.param("log.exchange.before_commit:2", marks=long),
    pytest.param("log.exchange.before_commit:3", marks=long),
    pytest.param("log.exchange.after_commit", marks=long),
    pytest.param("log.exchange.after_commit:2", marks=long),
    pytest.param("log.exchange.after_commit:3", marks=long),
    pytest.param("log.response.before_commit", marks=long),
    pytest.param("log.response.after_commit", marks=long),
    pytest.param("gateway.request.before_durable", marks=long),
    pytest.param("gateway.accepted", marks=long),
    pytest.param("gateway.upstream.first_byte", marks=long),
    pytest.param("gateway.response.batch", marks=long),
    pytest.param("gateway.release", marks=long),
    pytest.param("gateway.release:2", marks=long),
    pytest.param("control.register.between", marks=long),
    pytest.param("control.report.before_commit", marks=long),
    pytest.param("control.report.after_commit", marks=long),
    pytest.param("control.report.before_commit:3", marks=long),
    pytest.param("control.report.after_commit:3", marks=long),
    pytest.param("control.wait.before", marks=long),
    pytest.param("control.wait.after", marks=long),
    pytest.param("pg.start", marks=long),
]
RESTORED = [
    pytest.param("supervisor.loaded", marks=long),
    "supervisor.restored",
    pytest.param("store.load", marks=long),
    pytest.param("engine.restore.before", marks=long),
    pytest.param("engine.restore.after", marks=long),
    pytest.param("supervisor.restore", marks=long),
    pytest.param("supervisor.running", marks=long),
    pytest.param("gateway.release", marks=long),
]
IN_A_CALL = [
    "gateway.tail.reattach",
    pytest.param("control.death.before_commit", marks=long),
    pytest.param("control.death.after_commit", marks=long),
    pytest.param("supervisor.restored:2", marks=long),
]


@pytest.mark.parametrize("fault", FROM_THE_BEGINNING)
def test_killed_at(home: House, fault: str) -> None:
    from_the_beginning(home, fault)


@pytest.mark.parametrize("fault", RESTORED)
def test_killed_while_a_sleeping_session_comes_back_at(home: House, fault: str) -> None:
    restored_and_half_way(home, fault)


@pytest.mark.parametrize("fault", IN_A_CALL)
def test_killed_while_a_crashed_sandbox_comes_back_at(home: House, fault: str) -> None:
    crashed_in_a_call(home, fault)


def test_killed_while_the_tail_is_adopted(home: House) -> None:
    """The snapshot of the second call is slow, the sandbox dies before it: the call is found in the tail, and there the
    server dies as well."""
    play = Play(home, "gateway.tail.adopt", slow_s=0.5)
    play.boot()
    play.start()
    play.reach("suspended")
    assert home.server.stop() == 0
    play.boot("store.written=delay:3,gateway.tail.adopt=kill")  # every save, since how many come first varies
    play.approve()
    play.insist("call two", lambda: f"{play.tag} two" in home.provider.texts)
    for box in home.server.sandboxes():
        processes.kill(box.pid)
    play.end()
    assert play.session is not None
    assert play.session.events("exchange.adopted") or play.session.events("exchange.served")


FAMILY = ("control.child.ended", "control.fork_self.before", "control.fork_self.made")
UPLOADS = (
    "upload.object", "upload.put", "upload.noted", "upload.record", "upload.recorded", "upload.done", "collect.condemn",
    "collect.deleted", "fetch.block",
)  # fmt: skip


def test_every_point_of_the_code_is_killed_at_here_or_named_elsewhere() -> None:
    """A new fault point needs a case."""
    elsewhere = {
        "images.made": "tests of images",
        "pg.initdb.before_rename": "tests of the embedded PostgreSQL",
        "gateway.tail.adopt": "above",
        "store.unlinked": "tests/unit/test_snapshots_collect.py",
        **dict.fromkeys(FAMILY, "test_context_family.py"),
        **dict.fromkeys(("carry.made", "control.upgrade.before", "control.upgrade.after"), "test_versions.py"),
        **dict.fromkeys(("control.schedule.before_commit", "control.schedule.after_commit"), "test_queues.py"),
        **dict.fromkeys(UPLOADS, "tests/unit/test_snapshots_upload_kills.py, test_snapshots_uploads.py"),
    }
    source = Path(__file__).parents[2] / "src" / "rethaw"
    text = "\n".join(p.read_text() for p in source.rglob("*.py") if p.name != "faults.py")
    points = set(re.findall(r'faults\.point\("([^"]+)"\)', text)) | set(re.findall(r'"(engine\.\w+\.after)"', text))
    tried = {str(getattr(c, "values", (c,))[0]).partition(":")[0] for c in (*FROM_THE_BEGINNING, *RESTORED, *IN_A_CALL)}
    assert points - tried - set(elsewhere) == set()


# ---------------------------------------------------------------- failing saves


TURNS = agents.add("""
def main(ctx, tag, turns):
    said = []
    for turn in range(turns):
        said.append(ask("%s %d" % (tag, turn)))
        print("said", turn, flush=True)
        ctx.wait("next-%d" % turn)
    return said
""")
FAILING = (
    "saver.quiesce:1=raise",
    "saver.quiet:1=raise",
    "engine.capture.before:1=raise",
    "engine.capture.after:1=enospc",
    "saver.captured:1=raise",
    "saver.thawed:1=raise",
    "store.written:1=enospc",
    "store.verified:1=raise",
    "store.renamed:1=raise",
    "saver.stored:1=raise",
    "saver.commit:1=raise",
    "catalog.commit.before:1=raise",
)


def partial_files(home: House) -> set[Path]:
    return {p for p in (home.server.data_dir / "snapshots" / "store").iterdir() if p.name.startswith(".")}


def test_saves_that_fail_at_every_step_leave_the_agent_running(home: House) -> None:
    home.server.kill9()
    killed = partial_files(home)  # kept for a while by what died before
    home.server.restart(faults=",".join(FAILING))
    turns = len(FAILING) + 2
    session = agents.start(home, TURNS, {"tag": "failing", "turns": turns}, idle_suspend_s=None)
    for turn in range(turns):
        session.until_output(f"said {turn}")
        if turn + 3 > len(FAILING):
            break
        # The first turn is held until three saves failed; from then on each turn asks for one.
        session.until("failure", lambda s, n=turn + 3: f"({n} in a row)" in s.house.server.log_file.read_text())
        session.signal(f"next-{turn}")
    assert len(session.events("durability.degraded")) == 1
    session.until("a save", lambda s: s.events("durability.restored"))
    sandbox = session.sandbox().pid
    assert session.view["crashes"] == 0
    for n in range(turn, turns):
        session.signal(f"next-{n}")
    assert session.result() == [f"echo failing {n}" for n in range(turns)]
    assert len([t for t in home.provider.texts if "failing" in t]) == turns
    assert not session.events("snapshot.restored")
    processes.wait_until(lambda: not processes.alive(sandbox), 20, "its sandbox to be gone")
    assert partial_files(home) - killed == set()
    gapless(session.events(all_lines=True))


@pytest.mark.long
def test_a_suspension_that_fails_at_every_step_leaves_the_agent_running(home: House) -> None:
    home.server.kill9()
    home.server.restart(faults=",".join(f.replace(":1=", ":2=") for f in FAILING))
    session = agents.start(home, TURNS, {"tag": "no-sleep", "turns": 1}, idle_suspend_s=None)
    session.until("a save", lambda s: s.events("snapshot.created") and s.view["state"] == "waiting")
    sandbox = session.sandbox().pid
    for failure in range(1, len(FAILING) + 1):
        session.post("suspend")
        session.until(
            "refusal",
            lambda s, n=failure: (
                s.events("durability.degraded")
                or len(s.events("snapshot.failed")) >= n
                or s.view["state"] == "suspended"
            ),
        )
        if session.view["state"] == "suspended":
            break
        session.until_state("running", "waiting")
        assert session.sandbox().pid == sandbox
    session.signal("next-0")
    if session.view["state"] == "suspended":
        session.post("resume")
    assert session.result() == ["echo no-sleep 0"]


STEPS = agents.add("""
def main(ctx):
    n = 0
    while ctx.wait("step-%d" % n).payload != "end":
        n += 1
    return n
""")


@pytest.mark.long
def test_a_suspend_that_meets_the_beginning_of_a_wait_is_not_lost(home: House) -> None:
    """A late report of "waiting" used to undo "suspending", and the suspension was refused."""
    if not home.server.running:
        home.server.restart()
    session = agents.start(home, STEPS, idle_suspend_s=None)
    session.until_state("waiting")
    rounds = 8
    for n in range(rounds):
        session.signal(f"step-{n}")
        time.sleep(0.17 + n * 0.01)  # a wait is reported after 0.2 s
        session.post("suspend")
        session.until_state("suspended", timeout_s=20)
        session.post("resume")
        session.until_state("running", "waiting")
    session.signal(f"step-{rounds}", "end")
    assert session.result() == rounds


def test_a_session_that_comes_back_in_the_middle_of_a_wait_is_suspended_again(home: House) -> None:
    """It used to stay `running`, with all its memory, until the wait was over."""
    session = agents.start(home, STEPS, idle_suspend_s=0.5)
    session.until_state("suspended")
    session.post("resume")
    session.until("resume", lambda s: s.events("snapshot.restored"))
    session.until_state("suspended", timeout_s=20)
    session.post("resume")
    session.until("resume", lambda s: len(s.events("snapshot.restored")) == 2 and s.view["state"] != "resuming")
    session.sandbox()
    session.crash()
    session.until("recovery", lambda s: s.view["crashes"] == 1)
    session.until_state("suspended", timeout_s=20)
    session.signal("step-0", "end")
    assert session.result() == 0


LISTENER = agents.add("""
def main(ctx, work_s):
    heard = []
    def listen():
        heard.append(ctx.receive().payload)
    threading.Thread(target=listen, daemon=True).start()
    end = time.monotonic() + work_s
    n = 0
    while time.monotonic() < end:
        n += 1
    return [n > 0, heard]
""")
ASKER = agents.add("""
def main(ctx, tag, rounds):
    said = []
    for n in range(rounds):
        ctx.wait("go-%d" % n)
        said.append(ask("%s %d" % (tag, n)))
        print("said", n, flush=True)
    return said
""")


def test_an_agent_that_computes_beside_a_wait_is_not_suspended(home: House) -> None:
    """A thread that listens for messages made the whole agent look idle, and nothing woke it."""
    session = agents.start(home, LISTENER, {"work_s": 5.0}, idle_suspend_s=0.5)
    assert session.result(timeout_s=30) == [True, []]
    assert not session.events("snapshot.restored")


@pytest.mark.long
def test_an_agent_that_went_on_while_it_was_being_suspended_runs_on(home: House) -> None:
    """It was suspended in the middle of a model call, as idle, and nothing woke it: what it had waited for had come and
    was heard between the decision and the save. Here signals come at any moment around that decision."""
    home.provider.answer = lambda r: Reply(f"re {r.last_text}", first_byte_s=0.4)
    rounds = 10
    session = agents.start(home, ASKER, {"tag": "went-on", "rounds": rounds}, idle_suspend_s=0.3)
    for n in range(rounds):
        session.until("a wait", lambda s, n=n: any(e["data"].get("name") == f"go-{n}" for e in s.events("wait.opened")))
        time.sleep(0.5 + n * 0.03)  # idle for 0.3 s, seen to be so for 0.25 s, then frozen within some 0.1 s
        session.signal(f"go-{n}")
        session.until_output(f"said {n}", timeout_s=15)
    assert session.result() == [f"re went-on {n}" for n in range(rounds)]


# ---------------------------------------------------------------- fencing


def database(home: House) -> psycopg.Connection[Any]:
    """The embedded PostgreSQL of the server, as its superuser."""
    host = home.server.data_dir / "run" / "pg" / "s"
    return psycopg.connect(host=str(host), user="postgres", dbname="rethaw", autocommit=True)


TALKER = agents.add("""
def main(ctx):
    n = 0
    while True:
        n += 1
        ctx.send(n)
        time.sleep(0.1)
""")


def test_a_zombie_finds_out_at_its_next_write_and_its_sandbox_is_killed(home: House) -> None:
    home.server.kill9()
    home.server.restart()
    session = agents.start(home, TALKER)
    session.until("messages", lambda s: len(s.outbox()) > 2)
    sandbox = session.sandbox().pid
    with database(home) as db:
        db.execute("UPDATE sessions SET generation = %s WHERE id = %s", (str(uuid.uuid4()), session.id))
        # The row's lock orders the writers: from here on nothing of the former life may be added.
        (before,) = db.execute("SELECT last_seq FROM sessions WHERE id = %s", (session.id,)).fetchone() or (None,)
    processes.wait_until(lambda: not processes.alive(sandbox), 20, "the zombie's sandbox to be killed")
    events = session.events(all_lines=True)
    assert [e["type"] for e in events[before:]] == []
    assert home.server.running
    session.post("cancel", {"now": True})
    session.until_state("cancelled", timeout_s=90)


@pytest.mark.long
def test_a_server_that_stood_still_for_longer_than_its_lease(home: House) -> None:
    home.server.kill9()
    home.server.restart()
    home.provider.answer = lambda r: Reply(f"re {r.last_text}", first_byte_s=2.0)
    session = agents.start(home, TURNS, {"tag": "stood-still", "turns": 2}, idle_suspend_s=None)
    session.until("the call", lambda s: any("stood-still 0" in t for t in home.provider.texts))
    os.kill(home.server.pid, signal.SIGSTOP)
    try:
        time.sleep(22)  # the lease is 15 s
    finally:
        os.kill(home.server.pid, signal.SIGCONT)
    for n in range(2):
        session.until_output(f"said {n}")
        session.signal(f"next-{n}")
    assert session.result() == ["re stood-still 0", "re stood-still 1"]
    events = session.events(all_lines=True)
    reissued = [e for e in events if e["type"] == "exchange.reissued"]
    calls = [t for t in home.provider.texts if "stood-still" in t]
    assert len(calls) == 2 + len(reissued)
    assert len(reissued) <= 1


@pytest.mark.long
def test_a_database_that_does_not_answer_for_longer_than_any_retry(home: House) -> None:
    home.server.kill9()
    home.server.restart()
    session = agents.start(home, TURNS, {"tag": "pg-stopped", "turns": 2}, idle_suspend_s=None)
    session.until_output("said 0")
    family = processes.descendants(home.server.postgres_pid())
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(40)  # every call to the database gives up after 30 s
    finally:
        for pid in family:
            processes.kill(pid, signal.SIGCONT)
    session.until("the server to answer", lambda s: s.view["state"] in ("waiting", "running"))
    for n in range(2):
        session.signal(f"next-{n}")
    assert session.result(timeout_s=90) == ["echo pg-stopped 0", "echo pg-stopped 1"]
    assert len([t for t in home.provider.texts if "pg-stopped" in t]) == 2
