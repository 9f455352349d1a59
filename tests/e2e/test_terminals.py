"""A terminal that outlives what its session goes through, as a person at one sees it: real keys in, a real screen out."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_cli import refused
from e2e_fixtures import SLOWER, House, Session, house
from e2e_terminal import Person, prompted

from rethaw.testing import processes

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(240 * SLOWER),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
DETACH = b"\x10\x11"
ASLEEP = "sh -c 'echo a\"\"sleep; exec sleep 1000'\n"


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as h:
        yield h


def newest(home: House) -> Session:
    """The session that was started last."""
    views = home.server.request("GET", "/v1/sessions?limit=1")["sessions"]
    return Session(home, views[0])


def shell(home: House, *options: str, command: tuple[str, ...] = ("sh",)) -> Person:
    return Person(home.server, "run", "-it", "--image", "base", "-e", "PS1=$ ", *options, "--", *command)


def agree(one: Person, two: Person) -> None:
    """Both terminals show the same, letters, colours and cursor."""
    end = time.monotonic() + 30
    while True:
        with one._lock, two._lock:
            a, b = one.screen, two.screen
            same = a.lines == b.lines and (a.cursor.y, a.cursor.x) == (b.cursor.y, b.cursor.x) and a.modes == b.modes
            if same:
                return
            left, right = a.text, b.text
        assert time.monotonic() < end, "\n".join(["one:", *left, "two:", *right])
        time.sleep(0.05)


def test_a_shell_lives_through_freezes_and_crashes(home: House) -> None:
    with shell(home) as first:
        first.until(prompted)
        session = newest(home)
        first.enter("x=1; (while :; do echo tick >> /ticks; sleep 0.1; done) &\n")
        first.enter(ASLEEP)
        first.shows("asleep")
        first.type(b"\x03")
        first.until(prompted, "the prompt after Ctrl-C")
        first.enter("echo x is $x\n")
        first.sees("x is 1")
        session.post("suspend")
        session.until_state("suspended")
        first.enter("x=2; echo woken $x\n")  # the first key wakes it, and none is lost
        first.sees("woken 2")
        session.post("snapshots")
        session.crash()
        session.until("its recovery", lambda s: s.view["crashes"] == 1 and s.view["state"] in ("running", "waiting"))
        first.enter("echo again $x; stty size\n")
        first.sees("again 2")
        first.sees("24 80")
        first.resize(30, 100)
        first.until(lambda _: session.events("terminal.resized")[-1:] and
                    session.events("terminal.resized")[-1]["data"]["rows"] == 30)  # fmt: skip
        first.enter("stty size\n")
        first.sees("30 100")
        session.post("snapshots")
        session.crash()
        session.until("its recovery", lambda s: s.view["crashes"] == 2 and s.view["state"] in ("running", "waiting"))
        first.type(
            "clear; stty size; jobs; a=$(wc -l < /ticks); sleep 1; test $(wc -l < /ticks) -gt $a && echo ticking\n"
        )
        first.sees("ticking")
        first.sees("30 100")
        first.shows("Running")
        first.enter("kill $!; exit 5\n")
        assert first.ended() == 5
        assert session.view["state"] == "failed" and session.view["exit_code"] == 5


def test_attach_shows_the_screen_of_one_that_never_left(home: House) -> None:
    with shell(home, "--detach-keys", "ctrl-a,d", command=("bash", "--norc")) as first:
        first.shows("$")
        session = newest(home)
        first.type("PS1='\\[\\e[1;32m\\]green\\[\\e[0m\\]:\\[\\e[44m\\]\\w\\[\\e[0m\\]> '\n")
        first.shows("green:/>")
        first.type("for n in $(seq 40); do echo line $n of many; done; printf '%0120d\\n' 7\n")
        first.shows("0000007")
        with Person(home.server, "attach", session.id) as second:
            second.shows("0000007")
            agree(first, second)
            full = "printf '\\e[?1049h\\e[2J\\e[3;5H\\e[31mfull screen\\e[5;20r\\e[20;1H~\\n~\\e[7m status \\e[m\\e[?25l'; read key\n"
            first.type(full)
            second.shows("full screen")
            session.post("suspend")
            session.until_state("suspended")
            with Person(home.server, "attach", session.id, "--no-stdin") as third:
                third.shows("full screen")
                agree(first, third)
            assert session.view["state"] == "suspended"  # looking on wakes nothing
            second.type("\n")
            second.type("printf '\\e[r\\e[?25h\\e[?1049l'; echo left\n")
            first.sees("left")
            first.shows("green:/>")
            assert any("0000007" in line for line in first.text)  # the screen behind it
            agree(first, second)
        first.resize(40, 90)
        first.type("echo resized\n")
        first.sees("resized")
        session.post("snapshots")
        session.crash()
        session.until("its recovery", lambda s: s.view["crashes"] == 1 and s.view["state"] in ("running", "waiting"))
        first.type("echo recovered\n")
        first.sees("recovered")
        with Person(home.server, "attach", session.id, rows=40, cols=90) as fourth:
            fourth.sees("recovered")
            agree(first, fourth)
            fourth.type(DETACH)
            assert fourth.ended() == 0
        first.type(b"\x01d")
        assert first.ended() == 0
        first.shows("rethaw attach")
    assert session.view["state"] in ("running", "waiting")
    session.post("cancel", {"now": True})


def test_a_crash_takes_back_what_is_on_the_screen(home: House) -> None:
    with shell(home) as person:
        person.until(prompted)
        session = newest(home)
        person.enter("echo kept\n")
        person.sees("kept")
        session.until("its output in the log", lambda s: "kept\r\n" in s.output())
        session.post("snapshots")
        person.enter("y=lost; echo taken back\n")
        person.sees("taken back")
        session.crash()
        person.until(lambda text: "taken back" not in text and "kept" in text, "the screen as it was")
        person.enter("echo y is ${y:-unset}\n")
        person.sees("y is unset")
        person.enter("exit\n")
        assert person.ended() == 0


def test_the_connection_mends_itself_when_the_server_is_killed(home: House) -> None:
    with shell(home) as person:
        person.until(prompted)
        session = newest(home)
        person.enter("z=there; echo before\n")
        person.sees("before")
        session.until("its output in the log", lambda s: "before\r\n" in s.output())
        session.post("snapshots")
        home.server.kill9()
        try:
            person.shows("waiting for it to come")
            person.type("echo z is $z\n")  # waits for the connection
        finally:
            home.server.restart()
        person.sees("z is there", 90)
        person.enter("exit 7\n")
        assert person.ended() == 7


def test_a_paste_of_a_megabyte_loses_nothing(home: House) -> None:
    lines = b"".join(b"%07d %s\n" % (n, b"x" * 91) for n in range(10486))
    with shell(home) as person:
        person.until(prompted)
        session = newest(home)
        person.enter("stty -echo; echo ready; cat > /cooked; md5sum < /cooked; stty echo\n")
        person.sees("ready")
        person.type(lines)
        person.type(b"\x04")
        person.shows(md5(lines), 120)
        person.enter(f"clear; stty raw -echo; echo again; head -c {len(lines)} | md5sum; stty -raw echo\n")
        person.sees("again")
        session.post("suspend")  # in the middle of it; the next key wakes it
        person.type(lines)
        person.shows(md5(lines), 120)
        session.post("cancel", {"now": True})
        assert person.ended() != 0


def md5(data: bytes) -> str:
    import hashlib

    return hashlib.md5(data).hexdigest()


def run(home: House, *args: str, given: bytes = b"", cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "rethaw.cli.main", *args],
        env=home.server.env, input=given, capture_output=True, check=False, timeout=120, cwd=cwd,
    )  # fmt: skip


def test_pipes(home: House, tmp_path: Path) -> None:
    done = run(home, "run", "-i", "--rm", "--image", "base", "--", "cat", given=b"hi\n")
    assert (done.returncode, done.stdout) == (0, b"hi\n"), done.stderr
    sent = os.urandom(300_000)
    done = run(home, "run", "-i", "--image", "base", "--", "sh", "-c", "md5sum; exit 3", given=sent)
    assert done.stdout.split()[0].decode() == md5(sent) and done.returncode == 3
    done = run(home, "run", "--image", "base", "--", "cat", given=b"is not read")
    assert (done.returncode, done.stdout) == (0, b"")


def test_a_pipe_is_given_again_after_a_crash(home: House) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rethaw.cli.main", "run", "-i", "--image", "base", "--",
         "sh", "-c", "while read line; do n=$((n+1)); echo $n $line; done"],
        env=home.server.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        want = 0
        for generation in range(3):
            for _ in range(100):
                want += 1
                process.stdin.write(b"line-%d\n" % want)
            process.stdin.flush()
            if generation == 0:
                processes.wait_until(lambda: newest(home).output().count("\n") >= 100, 60, "its output")
                session = newest(home)
                session.post("snapshots")
            else:
                session.until("output", lambda s, n=want: f"{n} line-{n}\n" in s.output())
                session.crash()
                session.until("recovery", lambda s, n=generation: s.view["crashes"] == n)
        out, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert out.decode() == "".join(f"{n} line-{n}\n" for n in range(1, want + 1))
    assert process.returncode == 0


def test_a_copy_of_a_directory_travels(home: House, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/code.txt").write_text("code\n")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / ".rethawignore").write_text("secret*\n")
    script = "pwd; find . -type f; echo changed > src/code.txt"
    done = run(home, "run", "--image", "base", "--mount-copy", ".", "--", "sh", "-c", script, cwd=tmp_path)
    assert done.stdout.decode().split() == ["/work", "./src/code.txt"], done.stderr
    assert (tmp_path / "src/code.txt").read_text() == "code\n"
    given = f"{tmp_path}/src:/data/there"
    done = run(home, "run", "--image", "base", "--mount-copy", given, "--", "cat", "/data/there/code.txt")
    assert done.stdout == b"code\n", done.stderr


def test_rm_erases_it(home: House) -> None:
    done = run(home, "run", "--rm", "--image", "base", "--name", "passing", "--", "echo", "gone")
    assert done.stdout == b"gone\n"
    assert home.server.request("GET", "/v1/sessions?agent=passing")["sessions"] == []


def test_wrong_use(home: House) -> None:
    def cli(*args: str) -> subprocess.CompletedProcess[str]:
        return home.server.cli(*args, check=False)

    refused(cli("run", "-it", "--image", "base", "--", "sh"), 2, "-t", "terminal")
    refused(cli("run", "-t", "agent.py"), 2, "--image")
    refused(cli("run", "-d", "--rm", "--image", "base", "--", "true"), 2, "--rm", "-d")
    refused(cli("run", "--detach-keys", "ctrl-a", "--image", "base", "--", "true"), 2, "-t")
    refused(cli("run", "--image", "base", "--mount-copy", "/no/such", "--", "true"), 4, "/no/such")
    ended = home.server.cli("run", "-d", "--image", "base", "--", "true").stdout.strip()
    Session(home, {"id": ended}).until_state("completed")
    refused(cli("attach", ended), 5, ended, "completed", "rethaw logs")
    refused(cli("attach", ended, "--detach-keys", "ctrl-1"), 2, "ctrl-1")
    refused(cli("attach", "s_none"), 4, "s_none")
    waits = home.server.cli("run", "-dit", "--image", "base", "--", "sh").stdout.strip()
    refused(cli("attach", waits), 2, "terminal", "--no-stdin")
    with Person(home.server, "attach", waits) as person:
        person.shows("#")
        person.process.terminate()
        assert person.ended() == 143  # and its terminal is as it was
    home.server.cli("cancel", "--now", waits)


def test_attach_says_that_a_session_started_without_i_takes_no_keys(home: House) -> None:
    looked_at = home.server.cli("run", "-dt", "--image", "base", "--", "sh").stdout.strip()
    with Person(home.server, "attach", looked_at) as person:
        person.shows("started without -i; Ctrl-C leaves")
        person.shows("#")
        person.process.send_signal(signal.SIGINT)
        assert person.ended() == 0
    assert Session(home, {"id": looked_at}).view["state"] not in ("completed", "failed", "cancelled")
    home.server.cli("cancel", "--now", looked_at)


def test_attach_without_a_terminal_shows_what_is_written(home: House) -> None:
    script = "trap 'exit 6' TERM; echo shown; while :; do sleep 0.1; done"
    plain = home.server.cli("run", "-d", "--image", "base", "--", "sh", "-c", script).stdout.strip()
    session = Session(home, {"id": plain})
    session.until_output("shown")
    with subprocess.Popen(
        [sys.executable, "-m", "rethaw.cli.main", "attach", plain],
        env=home.server.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"shown\n"
        session.post("cancel")
        assert process.wait(60) == (session.view["exit_code"] or 1)
        assert b"has no terminal" in process.stderr.read()
