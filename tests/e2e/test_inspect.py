"""Looking into snapshots as a user does: a shell, files, differences, verification; and that nothing of it is noticed by
the session."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from e2e_agents import Agents
from e2e_cli import as_nobody, refused
from e2e_fixtures import House, Session, house

from rethaw.testing import processes

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
agents = Agents()

WORKER = agents.add("""
def main(ctx):
    import subprocess
    os.makedirs("/work/deep", exist_ok=True)
    open("/work/kept.txt", "w").write("as it was\\n")
    open("/work/grows.txt", "w").write("one\\n")
    open("/work/gone.txt", "w").write("soon gone\\n")
    open("/work/same-size.txt", "w").write("aaaa")
    open("/work/touched.txt", "w").write("touched")
    open("/work/mode.txt", "w").write("mode")
    open(b"/work/odd-\\xff\\n.txt", "w").write("odd")
    os.symlink("kept.txt", "/work/link")
    os.mkfifo("/work/fifo")
    os.chmod("/work/kept.txt", 0o640)
    clock = "while :; do date +%s.%N >> /work/clock.txt; sleep 0.05; done"
    child = subprocess.Popen(["sh", "-c", clock], start_new_session=True)
    ask("first")
    stopped = ctx.wait("go")
    os.killpg(child.pid, 9); child.wait()  # with the `date` that may be about to write
    ctx.snapshot()
    print("one", flush=True)
    ctx.wait("write")
    open("/work/grows.txt", "a").write("two\\n")
    open("/work/new.txt", "w").write("new\\n")
    os.makedirs("/work/many/below")
    for n in range(20):
        open("/work/many/below/%d" % n, "w").write("x" * n)
    before = os.stat("/work/same-size.txt")
    open("/work/same-size.txt", "w").write("bbbb")
    os.utime("/work/same-size.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime("/work/touched.txt")
    os.chmod("/work/mode.txt", 0o600)
    os.remove("/work/gone.txt")
    open("/etc/hostname.agent", "w").write("etc\\n")
    open("/etc/issue", "a").write("changed\\n")
    os.remove("/etc/debian_version")
    ask("second"); ask("third")
    ctx.snapshot()
    print("two", flush=True)
    ctx.wait("end")
    return open("/work/grows.txt").read()
""")


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as h:
        yield h


@pytest.fixture(scope="module")
def busy(home: House) -> Session:
    """Suspended while a child of it writes a file all the time."""
    session = agents.start(home, WORKER, idle_suspend_s=None)
    session.until("its first call", lambda s: s.events("exchange.completed"))
    session.post("suspend")
    session.until_state("suspended")
    return session


@pytest.fixture(scope="module")
def two(home: House) -> tuple[Session, str, str]:
    """A session, and two snapshots of it between which it worked."""
    session = agents.start(home, WORKER, idle_suspend_s=None)
    session.signal("go")
    session.until_output("one\n")
    first = newest(session)
    session.signal("write")
    session.until_output("two\n")
    return session, first, newest(session)


def newest(session: Session) -> str:
    return str(session.view["snapshot"])


def throwaways(home: House) -> list[int]:
    """Host pids of the throwaway sandboxes that run now."""
    ids = set(re.findall(r"throwaway (\S+) of snapshot", home.server.log_file.read_text()))
    return [box.pid for box in home.server.sandboxes() if box.id in ids and processes.alive(box.pid)]


def until_none(home: House, timeout_s: float = 30.0) -> None:
    processes.wait_until(lambda: not throwaways(home), timeout_s, "the end of all throwaways")


def cli(home: House, *args: str, given: str | bytes = b"", check: bool = True) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [sys.executable, "-m", "rethaw.cli.main", *args],
        env=home.server.env,
        check=False,
        capture_output=True,
        input=given.encode() if isinstance(given, str) else given,
        timeout=90,
    )
    assert not check or done.returncode == 0, (args, done)
    return done


class Terminal:
    """The command line in a terminal of its own."""

    all: ClassVar[list[Terminal]] = []

    def __init__(self, home: House, *args: str, columns: int = 90, rows: int = 30) -> None:
        self.master, slave = pty.openpty()
        self.size(columns, rows)
        self.seen = ""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", sys.executable, "-m", "rethaw.cli.main", *args],
            env={**home.server.env, "TERM": "xterm"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self.all.append(self)

    def size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, text: str, timeout_s: float = 30.0) -> None:
        end = time.monotonic() + timeout_s
        # Without what only moves the cursor.
        while text.replace("\r", "") not in re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]|\r", "", self.seen):
            assert time.monotonic() < end, (text, self.seen)
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"it ended before {text!r}: {self.seen!r}") from None

    def say(self, text: str) -> None:
        self.seen = ""
        os.write(self.master, text.encode())

    def end(self) -> int:
        code = self.process.wait(30)
        os.close(self.master)
        self.all.remove(self)
        return code


@pytest.fixture(autouse=True)
def _no_terminal_is_left() -> Iterator[None]:
    yield
    for terminal in list(Terminal.all):
        terminal.process.kill()
        terminal.end()


# ---------------------------------------------------------------- the shell


def test_a_shell_sees_the_frozen_moment_and_changes_nothing(home: House, busy: Session) -> None:
    seq, line, generation = busy.view["last_seq"], busy.view["line"], busy.view["generation"]
    script = (
        "cat /work/kept.txt; pwd; wc -c < /work/clock.txt; tail -n 1 /work/clock.txt; "
        "sleep 0.5; wc -c < /work/clock.txt; tail -n 1 /work/clock.txt; "
        "for p in /proc/[0-9]*; do printf '%s|%s\\n' \"$(grep ^State $p/status)\" \"$(tr '\\0' ' ' < $p/cmdline)\"; done; "
        "echo spoiled > /work/kept.txt; rm -rf /work/deep; kill -9 -1 2>/dev/null; exit 9"
    )
    done = cli(home, "shell", busy.id, "--", "sh", "-c", script, check=False)
    out = done.stdout.decode().splitlines()
    assert out[0] == "as it was"
    assert out[1] == "/app"
    assert out[2:4] == out[4:6], "the child went on writing under the reader"
    states = [row.partition("|")[::2] for row in out[6:]]
    assert any("T (stopped)" in state and "while :; do date" in argv for state, argv in states), out
    assert any("guestd.py" in argv for _, argv in states)
    assert done.returncode == 9, done
    again = cli(home, "shell", newest(busy), "--", "cat", "/work/kept.txt")
    assert again.stdout == b"as it was\n"
    until_none(home)
    view = busy.view
    assert (view["last_seq"], view["line"], view["generation"], view["state"]) == (seq, line, generation, "suspended")


def test_the_session_resumes_unharmed_after_shells(home: House) -> None:
    session = agents.start(home, WORKER, idle_suspend_s=None)
    session.signal("go")
    session.until_output("one\n")
    session.post("suspend")
    session.until_state("suspended")
    before = session.events(all_lines=True)
    cli(home, "shell", session.id, "--", "sh", "-c", "echo spoiled > /work/grows.txt; kill -9 1", check=False)
    assert session.events(all_lines=True) == before
    session.post("resume")
    session.signal("write")
    session.signal("end")
    assert session.result() == "one\ntwo\n"


def test_streams_are_passed_on_as_they_are(home: House, busy: Session) -> None:
    data = bytes(range(256)) * 4096
    done = cli(home, "shell", busy.id, "--", "cat", given=data)
    assert done.stdout == data
    done = cli(home, "shell", busy.id, given="cd /work\ncat kept.txt; echo no >&2\nexit 4\n", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (4, b"as it was\n", b"no\n")
    done = cli(home, "shell", busy.id, "--", "no-such-program", check=False)
    assert done.returncode == 127 and b"no-such-program" in done.stderr
    found = json.loads(
        cli(home, "shell", busy.id, "--json", "--", "sh", "-c", "echo a; echo b >&2; exit 3", check=False).stdout
    )
    assert (found["stdout"], found["stderr"], found["exit_code"]) == ("a\n", "b\n", 3)


def test_a_terminal_resizes_and_ctrl_c_reaches_the_program_alone(home: House, busy: Session) -> None:
    terminal = Terminal(home, "shell", busy.id)
    terminal.until("nothing that you change is kept")
    terminal.until("# ")
    terminal.say("PS1='ready> '; stty size\n")
    terminal.until("30 90\r\nready> ")
    terminal.say("trap 'stty size; echo changed' WINCH\n")
    terminal.until("ready> ")
    terminal.size(120, 40)
    terminal.until("40 120\r\nchanged")
    terminal.say("sh -c 'echo begun; exec sleep 1000'\n")
    terminal.until("begun\r\n")
    terminal.say("\x03")
    terminal.until("ready> ")
    terminal.say("echo code $?\n")
    terminal.until("code 130\r\nready> ")
    terminal.say("\x04")
    assert terminal.end() == 0
    until_none(home)


def test_two_shells_of_one_snapshot_do_not_meet(home: House, busy: Session) -> None:
    until_none(home)
    one, other = Terminal(home, "shell", busy.id), Terminal(home, "shell", busy.id)
    for terminal in (one, other):
        terminal.until("# ")
        terminal.say("PS1='ready> '\n")
        terminal.until("\r\nready> ")
    one.say("echo mine > /work/kept.txt; cat /work/kept.txt\n")
    one.until("\r\nmine\r\n")
    other.say("cat /work/kept.txt\n")
    other.until("\r\nas it was\r\n")
    assert len(throwaways(home)) == 2
    for terminal in (one, other):
        terminal.say("exit\n")
        assert terminal.end() == 0
    until_none(home)


def test_a_client_that_is_killed_takes_its_sandbox_along(home: House, busy: Session) -> None:
    until_none(home)
    terminal = Terminal(home, "shell", busy.id)
    terminal.until("# ")
    (pid,) = throwaways(home)
    terminal.process.kill()
    terminal.end()
    until_none(home)
    assert not processes.alive(pid)


def test_a_shell_that_idles_is_ended_and_says_so(home: House, busy: Session) -> None:
    done = cli(home, "shell", busy.id, "--idle", "1s", "--", "sleep", "1000", check=False)
    assert done.returncode != 0 and b"nothing was typed or shown for 1 s" in done.stderr
    until_none(home)


def test_there_is_no_channel_no_model_and_no_network(home: House, busy: Session) -> None:
    asked = len(home.provider.inner.calls)
    script = (
        "import socket, urllib.request\n"
        "try: print(urllib.request.urlopen('http://127.0.0.1:8484/openai/v1/models', timeout=1).status)\n"
        "except Exception as e: print(type(e).__name__)\n"
        "try: socket.create_connection(('1.1.1.1', 53), 1); print('out')\n"
        "except OSError as e: print('no way out')\n"
    )
    done = cli(home, "shell", busy.id, "--", "python3", "-c", script)
    assert done.stdout.splitlines()[0] != b"200" and done.stdout.splitlines()[1] == b"no way out"
    assert len(home.provider.inner.calls) == asked


def test_it_needs_the_token_and_names_what_is_not_there(home: House, busy: Session, tmp_path: Path) -> None:
    env = {"RETHAW_URL": home.server.url, "RETHAW_TOKEN": home.server.token}
    done = as_nobody(home.server, "shell", busy.id, "--", "id", "-u", cwd=Path("/tmp"), env=env)
    assert done.stdout == "0\n", "the server needs root, its user does not"
    wrong = {**env, "RETHAW_TOKEN": "wrong"}
    refused(as_nobody(home.server, "shell", busy.id, cwd=Path("/tmp"), env=wrong), 3, "the token is wrong")
    refused(as_nobody(home.server, "shell", "snap_zzz", cwd=Path("/tmp"), env=env), 4, "snap_zzz")
    refused(as_nobody(home.server, "shell", "zzz", cwd=Path("/tmp"), env=env), 4, "no snapshot or session 'zzz'")
    nowhere = {**env, "RETHAW_URL": "http://127.0.0.1:1"}
    refused(as_nobody(home.server, "shell", busy.id, cwd=Path("/tmp"), env=nowhere), 6, "127.0.0.1:1")
    refused(as_nobody(home.server, "shell", busy.id, "--idle", "8d", cwd=Path("/tmp"), env=env), 2, "--idle 8d")


# ---------------------------------------------------------------- files


def test_files_are_listed_read_and_copied(home: House, busy: Session, tmp_path: Path) -> None:
    rows = cli(home, "snapshot", "files", busy.id, "/work").stdout.decode().splitlines()
    (kept,) = [row for row in rows if row.endswith("/work/kept.txt")]
    assert kept.startswith("-rw-r-----") and " 10 " in kept
    assert any(row.startswith("prw") and row.endswith("/work/fifo") for row in rows)
    assert any(row.endswith("/work/link -> kept.txt") for row in rows)
    assert any(row.endswith("/work/odd-\\xff\\x0a.txt") for row in rows), rows
    found = json.loads(cli(home, "snapshot", "files", busy.id, "/work/kept.txt", "--json").stdout)
    assert [(f["path"], f["kind"], f["size"], f["mode"]) for f in found] == [("/work/kept.txt", "file", 10, 0o640)]
    assert cli(home, "snapshot", "cat", busy.id, "/work/link").stdout == b"as it was\n"
    assert cli(home, "snapshot", "cat", busy.id, os.fsdecode(b"work/odd-\xff\n.txt")).stdout == b"odd"
    first = cli(home, "snapshot", "cat", busy.id, "/proc/1/cmdline").stdout
    assert b"guestd.py" in first or b"starter.py" in first, "of gVisor, of a microVM"
    value = json.loads(cli(home, "snapshot", "cat", busy.id, "/work/kept.txt", "--json").stdout)
    assert base64.urlsafe_b64decode(value["content"]) == b"as it was\n"
    done = cli(home, "snapshot", "get", busy.id, "/work", str(tmp_path))
    assert done.stdout.decode().strip() == str(tmp_path / "work")
    assert (tmp_path / "work/kept.txt").read_text() == "as it was\n"
    assert (tmp_path / "work/kept.txt").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "work/link").readlink() == Path("kept.txt")
    assert (tmp_path / os.fsdecode(b"work/odd-\xff\n.txt")).read_text() == "odd"
    assert not (tmp_path / "work/fifo").exists() and (tmp_path / "work/deep").is_dir()
    cli(home, "snapshot", "get", busy.id, "/work/kept.txt", str(tmp_path / "alone"))
    assert (tmp_path / "alone").read_text() == "as it was\n"


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["cat", "/work/none"], 4, ["there is no '/work/none'"]),
        (["cat", "/work"], 2, ["'/work' is a directory", "snapshot files"]),
        (["cat", "/work/fifo"], 2, ["is a fifo"]),
        (["cat", "/dev/zero"], 2, ["is a device"]),
        (["files", "/none/at/all"], 4, ["there is no '/none/at/all'"]),
        (["files", "/work/kept.txt/x"], 4, ["'/work/kept.txt/x'"]),
        (["get", "/work/none", "DEST"], 4, ["there is no '/work/none'"]),
        (["get", "/proc/1", "DEST"], 2, ["snapshot cat"]),
        (["get", "/work", "TAKEN"], 5, ["exists already"]),
        (["get", "/work", "NOWHERE"], 4, ["no directory"]),
        (["cat", os.fsdecode(b"/work/odd-\xfe")], 4, ["odd-\\xfe"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else str(v),
)
def test_what_cannot_be_read_is_named(
    home: House, busy: Session, tmp_path: Path, args: list[str], code: int, words: list[str]
) -> None:
    (tmp_path / "taken").write_text("mine")
    places = {"DEST": "out", "TAKEN": "taken", "NOWHERE": "none/out"}
    verb, *rest = [str(tmp_path / places[a]) if a in places else a for a in args]
    done = home.server.cli("snapshot", verb, busy.id, *rest, check=False)
    refused(done, code, *words)
    assert (tmp_path / "taken").read_text() == "mine" and not (tmp_path / "out").exists()


def test_several_reads_share_one_restore(home: House, busy: Session) -> None:
    def opened() -> int:
        return len(re.findall(r"throwaway \S+ of snapshot", home.server.log_file.read_text()))

    until_none(home)
    before = opened()
    for _ in range(3):
        home.server.request("GET", f"/v1/snapshots/{busy.id}/files?path=/work")
    assert opened() == before + 1
    until_none(home)


# ---------------------------------------------------------------- differences


def test_a_diff_shows_exactly_what_was_written(home: House, two: tuple[Session, str, str]) -> None:
    session, first, second = two
    found = json.loads(cli(home, "diff", first, second, "--json").stdout)
    seen = {f["path"]: (f["change"], f["size_before"], f["size_after"], tuple(f["what"])) for f in found["files"]}
    many = {f"/work/many/below/{n}": ("added", None, n, ()) for n in range(20)}
    assert seen == {
        "/etc/debian_version": ("removed", seen["/etc/debian_version"][1], None, ()),
        "/etc/hostname.agent": ("added", None, 4, ()),
        "/etc/issue": ("changed", seen["/etc/issue"][1], seen["/etc/issue"][1] + 8, ("content",)),
        "/work/gone.txt": ("removed", 10, None, ()),
        "/work/grows.txt": ("changed", 4, 8, ("content",)),
        "/work/many": ("added", None, 0, ()),
        "/work/many/below": ("added", None, 0, ()),
        "/work/mode.txt": ("changed", 4, 4, ("mode",)),
        "/work/new.txt": ("added", None, 4, ()),
        "/work/same-size.txt": ("changed", 4, 4, ("content",)),
        **many,
    }
    taken = home.server.request("GET", f"/v1/sessions/{session.id}/snapshots")["snapshots"]
    seqs = {s["id"]: s["seq"] for s in taken}
    assert found["common"]["seq"] == seqs[first] and found["log"]["before"]["events"] == {}
    after = found["log"]["after"]
    assert (after["after"], after["upto"]) == (seqs[first], seqs[second])
    between = [e for e in session.events() if seqs[first] < e["seq"] <= seqs[second]]
    assert sum(after["events"].values()) == len(between)
    assert after["model_calls"] == 2
    usage = [e["data"] for e in between if e["type"] == "exchange.completed"]
    assert after["input_tokens"] == sum(int(u.get("input_tokens") or 0) for u in usage)
    text = cli(home, "diff", first, second).stdout.decode()
    assert "+ /work/many/  (20 files, " in text and "/work/many/below" not in text
    assert "~ /work/grows.txt  content  4 B -> 8 B" in text and "- /work/gone.txt  10 B" in text
    assert "2 model calls" in text
    back = json.loads(cli(home, "diff", second, first, "--json").stdout)
    assert {f["path"]: f["change"] for f in back["files"]}["/work/new.txt"] == "removed"
    assert back["log"]["before"]["model_calls"] == 2 and back["log"]["after"]["model_calls"] == 0
    quick = json.loads(cli(home, "diff", first, second, "--no-files", "--json").stdout)
    assert quick["files"] == [] and quick["log"] == found["log"]
    assert b"no file differs" in cli(home, "diff", second, second).stdout


def test_sessions_of_their_own_are_compared_alone(home: House, busy: Session, two: tuple[Session, str, str]) -> None:
    found = json.loads(cli(home, "diff", busy.id, two[0].id, "--json").stdout)
    assert found["before"]["id"] == newest(busy) and found["common"] is None
    assert found["log"]["before"]["after"] == 0 and found["log"]["before"]["session"] == busy.id
    paths = {f["path"] for f in found["files"]}
    assert "/work/new.txt" in paths and not any(p.startswith(("/usr", "/proc", "/run/rethaw")) for p in paths)


def test_a_fork_is_compared_from_where_it_parted(home: House, two: tuple[Session, str, str]) -> None:
    session, first, second = two
    (view,) = home.server.request("POST", f"/v1/sessions/{session.id}/fork", {"at": first})["sessions"]
    fork = Session(home, view)
    fork.signal("write")
    fork.until_output("two\n")
    found = json.loads(cli(home, "diff", second, fork.id, "--json").stdout)
    # it wrote the same; its host name is its own
    assert [(f["path"], f["change"], f["what"]) for f in found["files"]] == [("/etc/hosts", "changed", ["content"])]
    seqs = {s["id"]: s["seq"] for s in home.server.request("GET", f"/v1/sessions/{session.id}/snapshots")["snapshots"]}
    assert (found["common"]["session"], found["common"]["seq"]) == (session.id, seqs[first])
    sides = found["log"]
    assert (sides["before"]["session"], sides["after"]["session"]) == (session.id, fork.id)
    assert sides["before"]["model_calls"] == sides["after"]["model_calls"] == 2
    assert sides["after"]["events"]["wait.opened"] >= 1
    text = cli(home, "diff", second, fork.id, "--no-files").stdout.decode()
    assert f"before: events ({seqs[first]}, " in text and f"after: events ({seqs[first]}, " in text


# ---------------------------------------------------------------- verification, and the ends


def test_verify_finds_the_damaged_one(home: House) -> None:
    session = agents.start(home, WORKER, idle_suspend_s=None)
    session.signal("go")
    session.until_output("one\n")
    session.post("cancel", {"now": True})
    session.until_state("cancelled")
    ids = [s["id"] for s in home.server.request("GET", f"/v1/sessions/{session.id}/snapshots")["snapshots"]]
    assert len(ids) >= 2
    done = cli(home, "snapshot", "verify", session.id)
    assert done.stdout.decode().count("  whole  ") == len(ids)
    assert f"{len(ids)} of {len(ids)} snapshots are whole" in done.stderr.decode()
    damage(home, session, ids[-1])
    refused(home.server.cli("snapshot", "verify", ids[-1], check=False), 10, ids[-1])
    done = cli(home, "snapshot", "verify", session.id, check=False)
    assert done.returncode == 10 and f"{len(ids) - 1} of {len(ids)} snapshots are whole" in done.stderr.decode()
    assert re.search(rf"^{ids[-1]}  damaged: ", done.stdout.decode(), re.MULTILINE)
    rows = [json.loads(row) for row in cli(home, "snapshot", "verify", *ids, "--json", check=False).stdout.splitlines()]
    assert [row["ok"] for row in rows] == [True] * (len(ids) - 1) + [False]
    assert cli(home, "snapshot", "verify", "--all", check=False).returncode == 10
    home.server.restart()  # raw copies of it in memory would serve as well
    refused(home.server.cli("shell", ids[-1], "--", "true", check=False), 10, ids[-1])
    refused(home.server.cli("snapshot", "cat", ids[-1], "/etc/passwd", check=False), 10, ids[-1])
    until_none(home)
    refused(home.server.cli("snapshot", "verify", check=False), 2, "--all")
    refused(home.server.cli("snapshot", "verify", "snap_zz", check=False), 4, "snap_zz")


def damage(home: House, session: Session, snapshot: str) -> None:
    """One byte of its largest file."""
    files = [p for p in (home.server.data_dir / "snapshots").rglob("*") if snapshot in str(p) and p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes((byte[0] ^ 1,)))


def test_a_server_that_stops_leaves_no_throwaway(home: House, two: tuple[Session, str, str]) -> None:
    until_none(home)
    terminal = Terminal(home, "shell", two[1])
    terminal.until("# ")
    home.server.request("GET", f"/v1/snapshots/{two[2]}/files?path=/work")  # and one that is kept for readers
    pids = throwaways(home)
    assert len(pids) == 2
    home.server.stop()
    try:
        assert not any(processes.alive(pid) for pid in pids)
        assert terminal.end() != 0
    finally:
        home.server.start()


def test_a_server_that_is_killed_leaves_none_behind_its_next_start(home: House, two: tuple[Session, str, str]) -> None:
    terminal = Terminal(home, "shell", two[1])
    terminal.until("# ")
    pids = throwaways(home)
    home.server.kill9()
    home.server.start()
    processes.wait_until(lambda: not any(processes.alive(p) for p in pids), 30, "the end of the orphan")
    terminal.process.send_signal(signal.SIGKILL)
    terminal.end()


def test_what_one_asks_wrongly_over_the_socket_is_said(home: House, busy: Session) -> None:
    from websockets.sync.client import connect

    address = f"ws{home.server.url.removeprefix('http')}/v1/snapshots/{busy.id}/shell"
    for first, word in (("{", "JSON"), ('{"command": 5}', "command"), ('{"idle_s": 1e9}', "idle_s"), ("[]", "object")):
        with connect(address, additional_headers={"Authorization": f"Bearer {home.server.token}"}) as socket:
            socket.send(first)
            said: dict[str, Any] = json.loads(socket.recv(timeout=30))
            assert said["type"] == "error" and said["error"]["code"] == "invalid_input"
            assert word in said["error"]["message"] or word in str(said["error"]["details"]), said
    until_none(home)
