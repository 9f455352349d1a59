"""Every example of every `--help`, typed as it stands there, against a real server with the sessions, agents, queues, templates
and schedules that the examples name.

A command that this file does not know is tried as it is: its own lane, the session that stands for `s_06f2`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from e2e_fixtures import House, house
from e2e_terminal import Person
from oci_fixtures import busybox_layers, docker_save, entry, layer

from rethaw.cli.main import main
from rethaw.cli.table import COMMANDS
from rethaw.testing import processes

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
ROOT = Path(__file__).resolve().parents[2]
NAMES = [command.name for command in COMMANDS]

# Which sessions s_06f2, s_07aa, ... of an example are; by default STANDING and OTHER. They come in turns: what `cancel`
# ends, `retry` begins again and `rm` erases. One list for each example, the last for those that follow.
STANDING, OTHER, A, B, C, ENDED, OLD = "standing", "other", "a", "b", "c", "ended", "old"
PAYS, SCREEN = "pays", "screen"
MEANT: dict[str, list[tuple[str, ...]]] = {
    "suspend": [(A,)],
    "resume": [(A,)],
    "cancel": [(A,), (B,)],
    "retry": [(B,)],
    "rewind": [(C,)],
    "rm": [(A,), (B, C)],
    "upgrade": [(OLD,)],
    "events": [(ENDED,)],
    "logs": [(ENDED,)],
    "budget": [(PAYS,)],
    "attach": [(SCREEN,)],
}
# What comes before each example: one that has been put to sleep has no sandbox to crash, and only what has ended is tried again.
BEFORE = {
    "crash": "rethaw resume s_06f2",
    "retry": "rethaw cancel --now s_06f2 || true; rethaw logs -f s_06f2 >&2 || true",
}
# One after another within a lane, in the order of the table; lanes go side by side.
LANES = {
    **dict.fromkeys(("suspend", "resume", "cancel", "rewind", "retry", "rm"), "life"),
    **dict.fromkeys(("deploy", "upgrade"), "agent"),
    "ls": "run",
    **dict.fromkeys(("exec", "cp", "forward", "link"), "inside"),
}
LAST = ("crash",)  # alone, when all else is done
LONG = ("up", "doctor")  # whole servers, and machines that are only tried out

STANDS = '''"""Answers each message; leaves with what it was given."""
import pathlib
import socket
import threading
import rethaw

def ports():
    """Says its number to whoever comes."""
    import select
    open_ = [socket.create_server(("127.0.0.1", port)) for port in (3000, 5432)]
    while True:
        for one in select.select(open_, [], [])[0]:
            with one.accept()[0] as there:
                there.sendall(b"%d" % one.getsockname()[1])

@rethaw.agent
def NAME(ctx: rethaw.Context, topic: str = "", goal: str = "", depth: int = 1) -> str:
    if topic or goal:
        return f"{topic or goal} at depth {depth}"
    for name in "notes.md", "report.pdf":
        pathlib.Path("/app", name).write_text("noted")
    threading.Thread(target=ports, daemon=True).start()
    for message in ctx.messages():
        ctx.send(f"heard {message.payload}")
    return "done"
'''
WRITER = """import rethaw

@rethaw.agent
def writer(ctx: rethaw.Context) -> str:
    return f"about {ctx.ready().get('topic')}"

@rethaw.agent
def researcher(topic: str = "") -> str:
    return topic
"""


@dataclass
class Ran:
    """An example and what became of it."""

    line: str
    code: int
    out: str
    err: str
    seconds: float


@dataclass
class World:
    """What the examples take for granted. `sessions` and `snapshots`: ids by the names above."""

    home: House
    place: Path
    sessions: dict[str, str] = field(default_factory=dict[str, str])
    snapshots: dict[str, list[str]] = field(default_factory=dict[str, "list[str]"])
    image: str = ""  # the digest of app.tar's, once that is built

    @property
    def env(self) -> dict[str, str]:
        return {**self.home.server.env, "HOME": str(self.place), "PATH": f"{self.place / 'bin'}:{os.environ['PATH']}"}

    def type(self, line: str, *, env: dict[str, str] | None = None, timeout_s: float = 600.0) -> Ran:
        """Run it in bash, without a terminal. An image may have to be built first."""
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail\n{line}"], cwd=self.place, env=env or self.env, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        return Ran(line, done.returncode, done.stdout, done.stderr, time.monotonic() - began)

    def begin(self, line: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", f"exec {line}"], cwd=self.place, env=self.env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def meant(self, line: str, labels: tuple[str, ...]) -> str:
        """`line` with real ids in place of those of the help."""
        for number, name in enumerate(dict.fromkeys(re.findall(r"\bs_\w+", line))):
            line = re.sub(rf"\b{name}\b", self.sessions[labels[min(number, len(labels) - 1)]], line)
        mine = self.snapshots.get(labels[0]) or self.snapshots[STANDING]
        for number, name in enumerate(dict.fromkeys(re.findall(r"\bsnap_\w{4}\b", line))):
            line = re.sub(rf"\b{name}\b", mine[min(number, len(mine) - 1)], line)
        if re.search(r"--(at|to|from) 57\b", line):
            line = re.sub(r"\b57\b", str(self.seq(mine[-1])), line)
        line = re.sub(r"\b3f2a91\b", self.image, line)
        return re.sub(r"(> |--config )/etc/", rf"\1{self.place}/etc/", line)

    def seq(self, snapshot: str) -> int:
        owner = next(self.sessions[name] for name, all_ in self.snapshots.items() if snapshot in all_)
        found = self.home.server.request("GET", f"/v1/sessions/{owner}/snapshots")["snapshots"]
        return next(one["seq"] for one in found if one["id"] == snapshot)


def examples(name: str) -> list[str]:
    """The lines below "For example:" in the help of a command, those that go on in the next one joined."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main([*name.split(), "--help"]) == 0
    _, _, after = shown.getvalue().partition("For example:\n")
    block = re.split(r"\n\s*\n|\n[╭┌]", after)[0]
    return [line.strip() for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]


# ---------------------------------------------------------------- what does not end by itself


def hello(world: World, line: str) -> Ran:
    """Somebody looks on, another sends it a message, then Ctrl-C: the session goes on."""
    began, process = time.monotonic(), world.begin(line)
    said: list[str] = []

    def read() -> None:
        assert process.stderr is not None
        said.extend(process.stderr)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        processes.wait_until(lambda: "waits for a message: rethaw send" in "".join(said), 60, "that it waits")
        (session,) = set(re.findall(r"rethaw send (s_\w+)", "".join(said)))
        answer = world.type(f"rethaw send {session} world --wait 60s")
        assert answer.out == "1. Hello, world!\n", answer
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    finally:
        process.kill()
    thread.join(10)
    world.type(f"rethaw cancel --now {session}")
    assert code == 130, said
    return Ran(line, 0, "", "".join(said), time.monotonic() - began)


def mcp(world: World, line: str) -> Ran:
    """A client says hello on stdin, or over HTTP, and asks for the tools."""
    asked = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    first = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": asked}
    rest = [
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/list"},
    ]
    began = time.monotonic()
    if "--http" in line:
        process = world.begin(line.replace("7421", "0"))
        assert process.stdout is not None
        try:
            url = process.stdout.readline().partition("ready at ")[2].strip()
            assert url.startswith("http://127.0.0.1:"), process.communicate()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
        return Ran(
            line,
            0 if process.returncode in (0, 130, -signal.SIGINT) else process.returncode,
            url,
            err,
            time.monotonic() - began,
        )
    process = world.begin(line)
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write("".join(json.dumps(one) + "\n" for one in (first, *rest)))
        process.stdin.flush()
        answers = [process.stdout.readline(), process.stdout.readline()]
        assert "session_list" in answers[1], answers
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return Ran(line, process.returncode, out, err, time.monotonic() - began)


def up(world: World, line: str) -> Ran:
    """A second server, in a data directory of its own; ended as its user would."""
    began = time.monotonic()
    data = world.home.server.root / "up"
    env = {**world.env, "RETHAW_DATA_DIR": str(data), "HOME": str(world.place / "srv")}  # for it gives out credentials
    for name in ("RETHAW_LISTEN", "RETHAW_CONFIG"):
        env.pop(name)
    port = str(free_port())
    line_ = re.sub(r"127\.0\.0\.1:7500", f"127.0.0.1:{port}", line)
    if "--listen" not in line:
        env["RETHAW_LISTEN"] = f"127.0.0.1:{port}"
    where = data / "server.json"
    where.unlink(missing_ok=True)
    process = subprocess.Popen(
        ["bash", "-c", f"exec {line_}"], cwd=world.place, env=env, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        processes.wait_until(lambda: where.exists() or process.poll() not in (None, 0), 120, "its start")
        assert where.exists(), process.communicate()
        server = int(json.loads(where.read_text())["pid"])
        if "--detach" in line:
            assert process.wait(60) == 0
        # Its own process, or the one that --detach left.
        os.kill(server, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        processes.wait_until(lambda: not processes.alive(server), 60, "its end")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        processes.sweep(data)
    return Ran(line, process.returncode, out, err, time.monotonic() - began)


def screen(world: World, line: str) -> Ran:
    """On a terminal: its user types a command, sees its answer, and leaves."""
    began = time.monotonic()
    number = len(line)  # another one for each who comes to the same screen
    typed, keys = b"echo mark-$((%d + 1000))\n" % number, b"\x01d" if "ctrl-a,d" in line else b"\x10\x11"
    if line.endswith("--no-stdin"):
        steps = [("#", b"\x03")]
    elif line == "rethaw top":
        steps = [("STATE", b"q")]
    else:
        steps = [("#", typed), (f"mark-{number + 1000}", keys if "attach" in line else b"exit\n")]
    with Person(world.home.server, argv=["bash", "-c", f"exec {line}"], cwd=world.place, env=world.env) as person:
        for part, answer in steps:
            person.shows(part, 30)
            person.type(answer)
        code = person.ended(30)
        out = bytes(person.raw).decode(errors="replace")
    assert line.endswith("--no-stdin") or "attach" not in line or "detached" in out, out
    return Ran(line, code, out, "", time.monotonic() - began)


def forward(world: World, line: str) -> Ran:
    """Each port that it names leads to that of the session; then Ctrl-C."""
    began = time.monotonic()
    ports = line.split()[3:]
    # Where this machine has another program on a port, a free one stands for it.
    process = world.begin(" ".join([*line.split()[:3], *(f"{port.partition(':')[0]}:0" for port in ports)]))
    assert process.stdout is not None
    said = ""
    try:
        for port in ports:
            said += (told := process.stdout.readline())
            host, local = told.split()[0].split(":")
            with socket.create_connection((host, int(local)), 30) as there:
                there.settimeout(30)
                assert there.recv(100) == port.partition(":")[0].encode(), said
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return Ran(line, process.returncode, said + out, err, time.monotonic() - began)


def build(world: World, line: str) -> Ran:
    """The image of app.tar is looked at and removed later."""
    ran = world.type(line)
    if "app.tar" in line:
        world.image = ran.out.strip()
    return ran


def init(world: World, line: str) -> Ran:
    """In a directory of its own, where nothing is."""
    place = world.place / f"new-{len(list(world.place.iterdir()))}"
    place.mkdir()
    return world.type(f"cd {place}\n{line}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


RUNNERS: dict[str, Callable[[World, str], Ran]] = {
    "rethaw run examples/hello.py": hello,
    "mcp": mcp,
    "up": up,
    "init": init,
    "attach": screen,
    "rethaw top": screen,
    "forward": forward,
    "image build": build,
}


# ---------------------------------------------------------------- the world


def prepare(world: World) -> None:
    place, home = world.place, world.home
    bin_ = place / "bin"
    for directory in (
        "bin",
        "examples",
        "agents",
        "etc/bash_completion.d",
        ".zfunc",
        ".config/fish/completions",
        "srv",
    ):
        (place / directory).mkdir(parents=True)
    scripts = {
        "rethaw": f'exec {shlex.quote(sys.executable)} -m rethaw.cli.main "$@"',
        "sudo": 'exec "$@"',
        **({} if shutil.which("jq") else {"jq": f"exec {shlex.quote(sys.executable)} -m json.tool"}),
    }
    for name, text in scripts.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_ / name).chmod(0o755)
    shutil.copy(ROOT / "examples/hello.py", place / "examples")
    shutil.copytree(home.server.home / ".config", place / ".config", dirs_exist_ok=True)
    (place / "research.py").write_text(STANDS.replace("NAME", "researcher"))
    (place / "agents.py").write_text(STANDS.replace("NAME", "researcher").replace("heard", "read"))
    (place / "standing.py").write_text(STANDS.replace("NAME", "standing"))
    (place / "report.py").write_text(STANDS.replace("NAME", "report").replace('topic: str = ""', 'topic: str = "news"'))
    (place / "agent.py").write_text(WRITER)
    (place / "report.txt").write_text("all is well")
    (place / "notes.txt").write_text("one\ntwo\n")
    (place / "check.py").write_text("print(1 + 1)")
    (place / "etc/rethaw.toml").write_text("")
    (place / "rethaw.toml").write_text('[image]\nbase = "base"\nenv = { MODEL = "gpt-5-mini" }\n')
    unique = layer([entry("unique", uuid.uuid4().hex)])  # so that nobody else misses what is removed
    docker_save(place / "app.tar", [*busybox_layers(), unique], {"Env": ["PATH=/bin"], "Cmd": ["true"]})
    for name in ("data", "src"):
        (place / name).mkdir()
        (place / name / "one.txt").write_text("one")
    for line in ("rethaw deploy research.py", "rethaw deploy agents.py"):
        _fine(world.type(line))

    def start(name: str) -> tuple[str, str]:
        if name == ENDED:
            line = "rethaw run -d --image base -- sh -c 'echo out; echo err >&2'"
        elif name == "failed":
            line = "rethaw run -d --image base -- false"
        elif name == SCREEN:
            line = "rethaw run -dit --image base -- bash"
        else:
            limits = "--budget-tokens 1000 --budget-money 5 --budget-wall 1h" if name == PAYS else ""
            line = f"rethaw run -d {limits} {'research' if name == OLD else 'standing'}.py"
        return name, _fine(world.type(line)).out.strip()

    names = (STANDING, OTHER, A, B, C, OLD, PAYS, SCREEN, ENDED, "failed")
    with ThreadPoolExecutor(4) as pool:
        world.sessions.update(pool.map(start, names))
    states = {ENDED: ("completed",), "failed": ("failed",), SCREEN: ("running", "waiting", "suspended")}

    def stands(name: str) -> bool:
        view = home.server.request("GET", f"/v1/sessions/{world.sessions[name]}")
        return view["state"] in states.get(name, ("waiting", "suspended"))

    for name in names:
        processes.wait_until(lambda n=name: stands(n), 90, f"{name} to stand")
    for name in (STANDING, C, OLD):
        taken = [
            home.server.request("POST", f"/v1/sessions/{world.sessions[name]}/snapshots", {})["id"]
            for _ in range(2 if name == STANDING else 1)
        ]
        world.snapshots[name] = sorted(taken)


def _fine(ran: Ran) -> Ran:
    assert ran.code == 0, ran
    return ran


def lane(name: str) -> str:
    return LANES.get(name) or (name.split(maxsplit=1)[0] if " " in name else name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with house(config={"prices": {"test": {"input": 1.0, "output": 2.0}}}) as home:
        made = World(home, tmp_path_factory.mktemp("examples"))
        prepare(made)
        yield made


@pytest.fixture(scope="module")
def ran(world: World) -> dict[str, list[Ran | Exception]]:
    """What became of the examples of each command that is not LONG."""
    lanes: dict[str, list[str]] = {}
    for name in NAMES:
        if name not in (*LAST, *LONG):
            lanes.setdefault(lane(name), []).append(name)
    results: dict[str, list[Ran | Exception]] = {}

    def go(names: list[str]) -> None:
        for name in names:
            results[name] = [one(world, name, number, line) for number, line in enumerate(examples_of[name])]

    examples_of = {name: examples(name) for name in NAMES}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(go, sorted(lanes.values(), key=len, reverse=True)))
    go(list(LAST))
    return results


def one(world: World, name: str, number: int, line: str) -> Ran | Exception:
    labels = MEANT.get(name, [(STANDING, OTHER)])
    try:
        mine = labels[min(number, len(labels) - 1)]
        if name in BEFORE:
            _fine(world.type(world.meant(BEFORE[name], mine)))
        typed = world.meant(line, mine)
        runner = screen if re.match(r"rethaw (run|exec) -it ", line) else RUNNERS.get(line) or RUNNERS.get(name)
        return runner(world, typed) if runner is not None else world.type(typed)
    except Exception as error:
        return error


def good(name: str, all_: list[Ran | Exception]) -> None:
    assert all_, f"rethaw {name} --help has no example"
    for ran in all_:
        assert isinstance(ran, Ran), repr(ran)
        said = f"{ran.line}\n--- exit code {ran.code}\n--- stdout\n{ran.out}\n--- stderr\n{ran.err}"
        assert f"rethaw {name}" in ran.line or name in ("deploy", "ls"), said
        assert ran.code == 0, said
        assert "Traceback" not in ran.out + ran.err and "internal error" not in ran.err, said


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LONG])
def test_the_examples_of_its_help_run(ran: dict[str, list[Ran | Exception]], name: str) -> None:
    good(name, ran[name])


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_the_examples_of_its_help_run_that_take_long(world: World, name: str) -> None:
    good(name, [one(world, name, number, line) for number, line in enumerate(examples(name))])
