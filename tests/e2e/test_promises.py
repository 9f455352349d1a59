"""The promises of SPECIFICATION.md on a whole server: real sandboxes, real PostgreSQL, real kills."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from e2e_fixtures import House, Session, gapless, house

from rethaw.model.errors import Conflict, RethawError
from rethaw.snapshots import decode, manifest
from rethaw.snapshots.decode import Packs
from rethaw.snapshots.keys import Keyring
from rethaw.testing import processes
from rethaw.testing.provider import ProviderRequest, Reply

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]


@pytest.fixture(scope="module")
def shared() -> Iterator[House]:
    with house() as h:
        yield h


@pytest.fixture
def home(shared: House) -> House:
    shared.provider.reset()
    return shared


def calls(home: House, session_text: str) -> int:
    return sum(session_text in t for t in home.provider.texts)


def slow(text: str, seconds: float, tag: str) -> Any:
    def answer(request: ProviderRequest) -> Reply:
        mine = tag in request.last_text
        return Reply(f"{text} {request.last_text}", first_byte_s=seconds if mine else 0.0)

    return answer


# ---------------------------------------------------------------- 1, 4: ordinary code comes back in the middle


BUSY = """
import os, socket, sqlite3, subprocess, sys
def main(ctx, tag):
    child = subprocess.Popen([sys.executable, "-c", '''
import http.server
class H(http.server.BaseHTTPRequestHandler):
    n = 0
    def do_GET(self):
        H.n += 1
        data = str(H.n).encode()
        self.send_response(200); self.send_header("content-length", str(len(data))); self.end_headers()
        self.wfile.write(data)
    def log_message(self, *a): pass
http.server.HTTPServer(("127.0.0.1", 8000), H).serve_forever()
'''])
    def count():
        for _ in range(100):
            try:
                c = http.client.HTTPConnection("127.0.0.1", 8000); c.request("GET", "/"); return int(c.getresponse().read())
            except OSError:
                time.sleep(0.05)
    deleted = open("/tmp/deleted", "w+"); os.unlink("/tmp/deleted"); deleted.write("still here"); deleted.flush()
    db = sqlite3.connect("/tmp/x.db"); db.execute("create table t (n)"); db.execute("insert into t values (42)")
    secret = os.urandom(16).hex()
    seen = [count()]
    for turn in range(4):
        print("asking", turn, flush=True)
        seen.append(ask("%s turn %d" % (tag, turn)))
        seen.append(count())
    deleted.seek(0)
    db.commit()
    return {"seen": seen, "deleted": deleted.read(), "row": db.execute("select n from t").fetchone()[0],
            "same": secret, "pid": child.poll()}
"""


def test_an_ordinary_program_survives_three_kills_in_the_middle_of_its_calls(home: House) -> None:
    home.provider.answer = slow("re", 1.5, "three-kills")
    session = home.agent(BUSY, {"tag": "three-kills"})
    for turn in range(3):
        asked = f"three-kills turn {turn}"
        session.until(f"call {turn}", lambda s, asked=asked: calls(home, asked) == 1)
        session.until("its snapshot", lambda s, n=turn: len(s.events("snapshot.created")) > n)
        processes.kill(session.sandbox().pid)
        session.until("recovery", lambda s, n=turn: s.view["crashes"] == n + 1)
    result = session.result()
    expected: list[Any] = [1]
    for turn in range(4):
        expected += [f"re three-kills turn {turn}", turn + 2]
    assert result["seen"] == expected
    assert result["deleted"] == "still here"
    assert result["row"] == 42
    assert result["pid"] is None
    assert calls(home, "three-kills") == 4
    gapless(session.events(all_lines=True))


def test_an_answer_that_comes_while_no_sandbox_exists_is_kept(home: House) -> None:
    home.provider.answer = slow("late", 3.0, "kept-answer")
    session = home.agent('def main(ctx):\n    return ask("kept-answer")\n')
    session.until("the call", lambda s: calls(home, "kept-answer") == 1)
    session.until("its snapshot", lambda s: s.events("snapshot.created"))
    processes.kill(session.sandbox().pid)
    assert session.result() == "late kept-answer"
    assert calls(home, "kept-answer") == 1


def test_eight_parallel_calls_answered_after_a_crash_are_paid_once(home: House) -> None:
    def answer(request: ProviderRequest) -> Reply:
        n = int(request.last_text.split()[-1]) if "parallel" in request.last_text else 0
        return Reply(f"re {request.last_text}", first_byte_s=3.0 - n * 0.2)

    home.provider.answer = answer
    code = """
def main(ctx):
    out = [None] * 8
    def one(n):
        out[n] = ask("parallel %d" % n)
    threads = [threading.Thread(target=one, args=(n,)) for n in range(8)]
    [t.start() for t in threads]; [t.join() for t in threads]
    return out
"""
    session = home.agent(code)
    session.until("all calls", lambda s: calls(home, "parallel") == 8)
    session.until("a snapshot", lambda s: s.events("snapshot.created"))
    processes.kill(session.sandbox().pid)
    assert session.result() == [f"re parallel {n}" for n in range(8)]
    assert calls(home, "parallel") == 8


def test_a_client_that_times_out_and_tries_again_is_paid_once(home: House) -> None:
    home.provider.answer = slow("re", 4.0, "impatient")
    code = """
def main(ctx):
    for attempt in range(5):
        try:
            return [attempt, ask("impatient", timeout=2)]
        except OSError:
            print("timeout", flush=True)
"""
    session = home.agent(code)
    attempt, text = session.result()
    assert text == "re impatient"
    assert attempt >= 1
    assert calls(home, "impatient") == 1


# ---------------------------------------------------------------- 5: edges


ECHO = """
def main(ctx, crashes):
    for message in ctx.messages(idle="20s"):
        ctx.send({"got": message.payload, "number": message.number})
        if message.payload == "end":
            return "done"
"""


def test_messages_are_consumed_once_and_answers_appear_once_across_crashes(home: House) -> None:
    session = home.agent(ECHO, {"crashes": 3})
    session.until_state("running", "waiting")
    for n in range(6):
        session.send(n)
        if n % 2:
            session.until("an answer", lambda s, n=n: len(s.outbox()) > n)
            session.crash()
            session.until("recovery", lambda s, n=n: s.view["crashes"] == n // 2 + 1)
    session.send("end")
    assert session.result() == "done"
    assert [m["got"] for m in session.outbox()] == [0, 1, 2, 3, 4, 5, "end"]
    assert [m["number"] for m in session.outbox()] == list(range(1, 8))


def test_a_wait_keeps_its_deadline_across_crashes(home: House) -> None:
    code = """
import rethaw
def main(ctx):
    try:
        ctx.wait("never", timeout="6s")
    except rethaw.WaitTimeout:
        return "timed out"
"""
    session = home.agent(code)
    session.until("the wait", lambda s: s.events("wait.opened"))
    began = time.monotonic()
    session.post("snapshots")
    session.crash()
    assert session.result() == "timed out"
    assert time.monotonic() - began < 15
    assert len(session.events("wait.opened", all_lines=True)) <= 2


# ---------------------------------------------------------------- 7, 9: suspending


WAITER = """
def main(ctx):
    before = time.monotonic()
    print("waiting", flush=True)
    answer = ctx.wait("go")
    return {"payload": answer.payload, "waited": time.monotonic() - before, "wall": time.time()}
"""


def sandboxes_of(session: Session) -> list[int]:
    """Sandboxes beyond those created ahead (these hold no session)."""
    return [b.pid for b in session.house.server.sandboxes() if processes.alive(b.pid) and b.status() == "running"]


def test_a_waiting_session_holds_no_process_and_wakes_by_a_signal(home: House) -> None:
    session = home.agent(WAITER, idle_suspend_s=0.5)
    session.until_state("suspended")
    assert session.view["reason"] == "idle"
    processes.wait_until(lambda: not sandboxes_of(session), 20, "its sandbox to be gone")
    time.sleep(4)  # time that must not pass for the agent: not a wait for anything
    session.signal("go", {"ok": True})
    result = session.result()
    assert result["payload"] == {"ok": True}
    assert result["waited"] < 4
    assert abs(result["wall"] - time.time()) < 10


def test_a_person_suspends_and_a_signal_does_not_wake(home: House) -> None:
    session = home.agent(WAITER, idle_suspend_s=None)
    session.until_output("waiting")
    session.post("suspend")
    session.until_state("suspended")
    session.signal("go", 1)
    time.sleep(1)  # long enough for a wake-up that must not come
    assert session.view["state"] == "suspended"
    session.post("resume")
    assert session.result()["payload"] == 1


def test_five_generations_of_suspend_and_resume(home: House) -> None:
    code = """
def main(ctx):
    data = bytearray(os.urandom(1 << 20)); import hashlib
    total = []
    for n in range(5):
        ctx.wait("go-%d" % n)
        data[n] ^= 1
        total.append(hashlib.sha256(data).hexdigest())
    return len(set(total))
"""
    session = home.agent(code, idle_suspend_s=0.2)
    for n in range(5):
        session.until_state("suspended")
        session.signal(f"go-{n}")
        session.until("resume", lambda s, n=n: len(s.events("snapshot.restored")) > n)
    assert session.result() == 5


def test_a_wait_that_the_agent_gave_up_is_not_idleness(home: House) -> None:
    code = """
import asyncio
async def main(ctx):
    try:
        await asyncio.wait_for(ctx.receive(), 0.5)
    except asyncio.TimeoutError:
        pass
    end = time.monotonic() + 4
    while time.monotonic() < end:
        sum(range(1000))
    return "done"
"""
    session = home.agent(code, idle_suspend_s=1.5)
    assert session.result() == "done"
    assert [e for e in session.events("session.state") if e["data"]["state"] == "suspending"] == []
    assert session.events("wait.cancelled")


# ---------------------------------------------------------------- 6, 8


def test_no_secret_and_no_network_card_in_the_sandbox(home: House, tmp_path: Path) -> None:
    code = """
import subprocess
def main(ctx):
    ask("secrets")
    links = open("/proc/net/dev").read()
    # Backwards, so that looking for it does not put it into memory.
    def environ(p):
        try:
            return open("/proc/%s/environ" % p, "rb").read()
        except OSError:  # of a kernel's thread, or of one with more rights
            return b""
    found = [p for p in os.listdir("/proc") if p.isdigit() and b"yek-redivorp-terces" in environ(p)[::-1]]
    return {"links": [l.split(":")[0].strip() for l in links.splitlines()[2:]], "found": found, "key": os.environ["OPENAI_API_KEY"]}
"""
    session = home.agent(code)
    assert session.result() == {"links": ["lo"], "found": [], "key": "rethaw"}
    server = home.server
    # Frames are compressed, and pages lie as deltas: what comes out of them is looked at.
    home_of_packs = server.data_dir / "snapshots" / "store"
    packs = Packs(lambda pack: home_of_packs / f"{pack}.pack", Keyring())
    infos = server.request("GET", f"/v1/sessions/{session.id}/snapshots")["snapshots"]
    assert infos
    with ThreadPoolExecutor(2) as pool:
        for info in infos:
            found = manifest.decode((server.data_dir / info["path"]).read_bytes(), info["id"], Keyring())
            target = {s.name: tmp_path / s.name for s in (*found.pages, *found.blobs)}
            decode.load(found, target, packs, pool)
            assert not [name for name, path in target.items() if b"secret-provider-key" in path.read_bytes()]


def test_the_log_refuses_to_be_changed(home: House) -> None:
    session = home.agent('def main(ctx):\n    return ask("kept")\n')
    session.result()
    with pytest.raises((Conflict, RethawError)):
        home.server.request("PUT", f"/v1/sessions/{session.id}/events", {})
    home.server.request("DELETE", f"/v1/sessions/{session.id}")
    with pytest.raises(RethawError, match=session.id):
        home.server.request("GET", f"/v1/sessions/{session.id}")


# ---------------------------------------------------------------- everything dies


def test_server_and_database_die_in_the_middle_of_a_call(tmp_path: Path) -> None:
    with house() as home:
        home.provider.answer = slow("re", 3.0, "everything")
        session = home.agent(BUSY, {"tag": "everything"})
        session.until("call 1", lambda s: calls(home, "everything turn 1") == 1)
        session.until("its snapshot", lambda s: len(s.events("snapshot.created")) > 1)
        postgres = home.server.postgres_pid()
        home.server.kill9()
        processes.kill(postgres)
        processes.wait_until(lambda: not processes.alive(postgres), 20, "PostgreSQL to be gone")
        home.server.restart()
        result = session.result(timeout_s=90)
        assert result["seen"][1::2] == [f"re everything turn {n}" for n in range(4)]
        assert result["seen"][0::2] == [1, 2, 3, 4, 5]
        # The call that the kill cut off upstream is issued again once, and the log says so.
        reissued = len(session.events("exchange.reissued", all_lines=True))
        assert calls(home, "everything") == 4 + reissued
        assert reissued <= 1
        gapless(session.events(all_lines=True))


def test_postgresql_dies_while_an_agent_works(home: House) -> None:
    home.provider.answer = slow("re", 0.3, "pg-dies")
    session = home.agent(BUSY, {"tag": "pg-dies"})
    session.until("call 1", lambda s: calls(home, "pg-dies turn 1") == 1)
    session.post("crash", {"what": "db"})
    result = session.result(timeout_s=90)
    assert result["seen"][0::2] == [1, 2, 3, 4, 5]
    assert calls(home, "pg-dies") == 4


def test_stopping_the_server_in_order_suspends_and_starting_it_resumes(tmp_path: Path) -> None:
    with house() as home:
        session = home.agent(WAITER, idle_suspend_s=None)
        session.until_output("waiting")
        assert home.server.stop() == 0
        assert home.server.processes() == []
        home.server.restart()
        session.until("resume", lambda s: s.view["state"] in ("running", "waiting"))
        assert session.view["crashes"] == 0
        session.signal("go", "on")
        assert session.result()["payload"] == "on"


def test_a_wait_that_begins_as_the_server_stops_does_not_undo_its_suspending(tmp_path: Path) -> None:
    """It was told that the session waits after it was told that it is being suspended: it came back as after a crash."""
    with house() as home:
        home.server.stop()
        home.server.restart(faults="saver.quiesce=delay:0.5")
        session = home.agent(WAITER, idle_suspend_s=None)
        session.until_output("waiting")
        assert home.server.stop() == 0
        home.server.restart(faults="")
        session.until("resume", lambda s: s.view["state"] in ("running", "waiting"))
        assert session.view["crashes"] == 0


def test_a_snapshot_asked_for_while_it_starts_is_taken(home: House) -> None:
    session = home.agent(WAITER, idle_suspend_s=None)
    taken = session.post("snapshots")
    assert taken["session"] == session.id
    session.signal("go", 1)
    assert session.result()["payload"] == 1
