"""`rethaw exec` and `rethaw cp` in real running sandboxes, through saves, crashes and suspensions."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_fixtures import House, Session, house

from rethaw.model.errors import InvalidInput, NotFound, SessionEnded, Unavailable, WaitTimeout
from rethaw.sdk.client import Client
from rethaw.sdk.session import Session as Remote

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as running:
        yield running


@pytest.fixture(scope="module")
def box(home: House) -> Session:
    """A program that does nothing."""
    session = home.start(
        {
            "name": "box",
            "command": ["sleep", "100000"],
            "idle_suspend_s": None,
            "env": {"COLOR": "blue"},
            "workdir": "/tmp",
        }
    )
    session.until_state("running", "waiting")
    return session


def remote(session: Session) -> Remote[object]:
    server = session.house.server
    return Client(server.url, token=server.token).sessions.get(session.id)


def test_a_command_has_its_streams_and_its_exit_code(home: House, box: Session) -> None:
    code = "echo $COLOR $MORE; pwd; cat; echo no >&2; exit 9"
    command = [sys.executable, "-m", "rethaw.cli.main", "exec", "-i", "-e", "MORE=x", box.id, "--", "sh", "-c", code]
    done = subprocess.run(command, input=b"given", capture_output=True, env=home.server.env, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == (b"blue x\n/tmp\ngiven", b"no\n", 9)
    missing = home.server.cli("exec", box.id, "--", "nosuch", check=False)
    assert missing.returncode == 4 and "command 'nosuch': No such file or directory" in missing.stderr
    plain = home.server.cli("exec", "-t", box.id, "--", "true", check=False)
    assert plain.returncode == 2 and "-t needs a terminal here" in plain.stderr
    session = remote(box)
    found = session.exec(["sh", "-c", "cat; exit 3"], input=b"\0" * 300_000)
    assert (found.exit_code, len(found.stdout), found.stderr) == (3, 300_000, b"")
    with pytest.raises(WaitTimeout, match="did not end within"):
        session.exec(["sleep", "1000"], timeout=1.0)
    assert session.exec(["sh", "-c", "echo $COLOR"], workdir="/").stdout == b"blue\n"


def test_a_terminal_through_the_command_line(home: House, box: Session) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "rethaw.cli.main", "exec", "-it", box.id, "--", "sh", "-c", "stty size; tty; trap 'echo caught; exit 6' INT; echo ready; while :; do sleep 0.1; done"]  # fmt: skip
    import fcntl
    import struct
    import termios

    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 91, 0, 0))
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=home.server.env | {"TERM": "vt100"}, start_new_session=True)  # fmt: skip
    os.close(slave)
    seen = b""
    try:
        while b"ready" not in seen:
            seen += os.read(master, 1000)
        os.write(master, b"\x03")
        assert process.wait(30) == 6
        assert b"33 91" in seen and b"/dev/pts/" in seen
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_a_key_that_interrupts_was_left_in_the_input(home: House, box: Session) -> None:
    """Where the kernel leaves keys in the input (gVisor), the command after an interrupted one got it in front of its name."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "rethaw.cli.main", "exec", "-it", box.id, "--", "sh"]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=home.server.env | {"TERM": "vt100"}, start_new_session=True)  # fmt: skip
    os.close(slave)
    seen = b""

    def until(what: str, done: Callable[[], bool]) -> None:
        nonlocal seen
        while not done():
            assert select.select([master], [], [], 60)[0], (what, seen)
            seen += os.read(master, 1000)

    try:
        for n in range(3):
            until("its prompt", lambda n=n: seen.count(b"# ") > n)
            os.write(master, b"sh -c 'echo $((%d + 40)); exec sleep 1000'\n" % n)
            until("its answer", lambda n=n: b"\n%d" % (40 + n) in seen)
            os.write(master, b"\x03")
        until("its prompt", lambda: seen.count(b"# ") > 3)
        os.write(master, b"exit 7\n")
        assert process.wait(30) == 7, seen
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_it_goes_on_through_saves_and_a_crash_cuts_it_off_three_times(home: House) -> None:
    session = home.start({"name": "box", "command": ["sleep", "100000"], "idle_suspend_s": None})
    session.until_state("running", "waiting")
    there = remote(session)
    for generation in range(3):
        with there.program(["cat"]) as program:
            expected = b""
            for n in range(3):
                session.post("snapshots")
                piece = f"{generation}.{n} ".encode()
                program.write(piece)
                expected += piece
                got = b""
                while len(got) < len(piece):
                    found = program.read()
                    assert found is not None
                    got += found[1]
                assert got == piece
            session.crash()
            assert program.read() is None
            assert program.exit_code == 70 and "the connection to the program is gone" in program.why
        assert there.exec(["echo", "again"]).stdout == b"again\n"
    session.post("suspend")
    session.until_state("suspended")
    refused = home.server.cli("exec", session.id, "--", "true", check=False)
    assert refused.returncode == 5 and f"rethaw resume {session.id}" in refused.stderr
    session.post("cancel", {"now": True})
    session.until_state("cancelled")
    with pytest.raises(SessionEnded):
        there.exec(["true"])


SLEEPER = "def main(ctx):\n    while True:\n        ctx.receive()\n"


@pytest.mark.long  # a silence of a minute
def test_a_suspended_session_is_resumed_for_it_and_stays_awake_meanwhile(home: House) -> None:
    session = home.agent(SLEEPER, idle_suspend_s=1.0)
    session.until_state("suspended")
    there = remote(session)
    assert there.exec(["sh", "-c", "sleep 4; echo done"]).stdout == b"done\n"
    session.until_state("suspended")


# ---------------------------------------------------------------- cp


def test_files_there_and_back(home: House, box: Session, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "sub dir").mkdir(parents=True)
    odd = source / os.fsdecode("na\nme\udcff -rf ü".encode("utf-8", "surrogateescape"))
    odd.write_bytes(b"odd")
    big = source / "sub dir" / "big"
    big.write_bytes(os.urandom(5_000_000))
    big.chmod(0o751)
    (source / "link").symlink_to("/etc/passwd")
    (source / "empty").mkdir(mode=0o700)
    os.mkfifo(source / "pipe")
    session = remote(box)
    left = session.copy_in(source, "/tmp/there")
    assert len(left) == 1 and "pipe" in left[0]
    listed = session.exec(
        ["sh", "-c", "stat -c '%a %F' /tmp/there/link '/tmp/there/sub dir/big' /tmp/there/empty"]
    ).stdout
    assert listed == b"777 symbolic link\n751 regular file\n700 directory\n"
    assert session.copy_out("/tmp/there", tmp_path / "back") == []
    back = tmp_path / "back"
    assert (back / odd.name).read_bytes() == b"odd" and (back / "sub dir" / "big").read_bytes() == big.read_bytes()
    assert (back / "sub dir" / "big").stat().st_mode & 0o777 == 0o751 and (back / "link").readlink() == Path(
        "/etc/passwd"
    )
    # Into a directory it keeps its name, to a new name it gets that, over a file it takes its place.
    run = home.server.cli
    run("cp", str(source / "sub dir" / "big"), f"{box.id}:/tmp")
    run("cp", str(source / "sub dir" / "big"), f"{box.id}:/tmp/renamed")
    assert session.exec(["cmp", "/tmp/big", "/tmp/renamed"]).exit_code == 0
    session.exec(["sh", "-c", "echo new > relative"])
    run("cp", f"{box.id}:relative", str(tmp_path))
    session.exec(["sh", "-c", "echo newer > relative"])
    run("cp", f"{box.id}:/tmp/relative", str(tmp_path / "relative"))
    assert (tmp_path / "relative").read_text() == "newer\n"
    for words, code, said in (
        ((f"{box.id}:/nosuch", str(tmp_path)), 4, "'/nosuch' in the sandbox: No such file"),
        ((str(tmp_path / "none"), f"{box.id}:/tmp"), 4, "there is no"),
        ((str(source), f"{box.id}:/nosuch/dir"), 4, "there is no directory '/nosuch' in the sandbox"),
        (("a", "b"), 2, "must be SESSION:PATH"),
        ((f"{box.id}:/proc", str(tmp_path / "p")), 2, "is the kernel's"),
    ):
        done = run("cp", *words, check=False)
        assert done.returncode == code and said in done.stderr, (words, done)


def test_tar_streams(home: House, box: Session, tmp_path: Path) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in (("one", b"1"), ("d/two", b"22")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    command = [sys.executable, "-m", "rethaw.cli.main", "cp"]
    subprocess.run(
        [*command, "-", f"{box.id}:/opt"], input=data.getvalue(), env=home.server.env, check=True, timeout=60
    )
    out = subprocess.run(
        [*command, f"{box.id}:/opt", "-"], env=home.server.env, check=True, capture_output=True, timeout=60
    )
    with tarfile.open(fileobj=io.BytesIO(out.stdout)) as tar:
        assert {"opt", "opt/one", "opt/d", "opt/d/two"} <= set(tar.getnames())
    hostile = io.BytesIO()
    with tarfile.open(fileobj=hostile, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../outside"))
    done = subprocess.run([*command, "-", f"{box.id}:/opt"], input=hostile.getvalue(), env=home.server.env, check=False, capture_output=True, timeout=60)  # fmt: skip
    assert done.returncode == 2 and b"which would lie elsewhere" in done.stderr


def test_a_copy_that_a_crash_cuts_off_leaves_nothing_half_and_says_so(home: House, tmp_path: Path) -> None:
    session = home.start({"name": "box", "command": ["sleep", "100000"], "idle_suspend_s": None})
    session.until_state("running", "waiting")
    session.post("snapshots")
    there = remote(session)
    there.exec(["sh", "-c", "head -c 30000000 /dev/urandom > /tmp/big"])
    (tmp_path / "big").write_text("former")
    half = threading.Event()

    def told(size: int) -> None:
        if size > 2_000_000 and not half.is_set():
            half.set()
            session.crash()

    from rethaw.sdk import copying

    with pytest.raises((Unavailable, NotFound, InvalidInput), match=r"broke off|not a whole archive"):
        copying.copy_out(there, "/tmp/big", tmp_path / "big", progress=told)
    assert (tmp_path / "big").read_text() == "former" and os.listdir(tmp_path) == ["big"]  # noqa: PTH208
    session.post("cancel", {"now": True})
