"""Blocks of the pages that only show a call: typed and run against a real server, in the order of the page, in one place.

The commands are run in this process (each of them takes a second to start otherwise); what a page leaves to its reader, a
session's id or a file that is there, is made before."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from e2e_fixtures import SLOWER, House, Session, house
from e2e_programs import BEGIN_S

import rethaw
from rethaw.cli.main import main
from rethaw.testing.provider import Reply

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(900 * SLOWER),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shared() -> Iterator[House]:
    with house(config={"prices": {"gpt-5-mini": {"input": 0.25, "output": 2.0}}}) as h:
        yield h


class Page:
    """A page, read by somebody who types what it says. `names`: what it calls SESSION and the like."""

    def __init__(self, home: House, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home = home
        self.place = place
        self.names: dict[str, str] = {}
        self.scope: dict[str, Any] = {}
        self._capsys = capsys
        self._text = ""

    def open(self, page: str) -> None:
        """Take its files down."""
        self._text = (ROOT / page).read_text()
        for code in self.blocks("python"):
            if named := re.match(r"# (\w+\.py)\n", code):
                (self.place / named[1]).write_text(code)

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```$", self._text, re.DOTALL | re.MULTILINE)

    def lines(self, has: str) -> list[str]:
        """Commands of the shell block that `has` this."""
        (block,) = [b for b in self.blocks("sh") if has in b]
        return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]

    def type(self, line: str, code: int = 0) -> str:
        """Run a line of the page; its stdout."""
        words = shlex.split(line, comments=True)
        if words[-2:-1] == [">"]:
            words = words[:-2]
        assert words[0] == "rethaw", line
        self._capsys.readouterr()
        got = main([self.names.get(word, word) for word in words[1:]])
        said = self._capsys.readouterr()
        assert got == code, (line, got, said)
        return said.out

    def run(self, has: str, **instead: str) -> None:
        """Run the one Python block that `has` this and no file of its own, in the page's namespace; with some words in place
        of others."""
        (code,) = [b for b in self.blocks("python") if has in b and not b.startswith("# ")]
        for word, other in instead.items():
            code = code.replace(word, other)
        for name, value in self.names.items():
            code = code.replace(f'"{name}"', f'"{value}"')
        exec(compile(code, has, "exec"), self.scope)

    def session(self, ident: str) -> Session:
        self.names.update(SESSION=ident, s_06f2=ident)
        return Session(self.home, {"id": ident})


@pytest.fixture
def page(shared: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Page:
    shared.provider.reset()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("RETHAW_URL", shared.server.url)
    monkeypatch.setenv("RETHAW_TOKEN", shared.server.token)
    return Page(shared, tmp_path, capsys)


def test_agents(page: Page) -> None:
    page.open("docs/agents.md")
    helped, dry = page.lines("plan.py --help")
    assert re.search(r"--goal +str +needed", page.type(helped)) and "Step: what: str, minutes: int" in page.type(helped)
    assert "nothing was started" in page.type(dry)
    (page.place / "prompts/drafts").mkdir(parents=True)
    for name in ("requirements.txt", "settings.toml", "prompts/one.txt", "prompts/drafts/two.txt"):
        (page.place / name).write_text("")
    page.run('apt_install("ffmpeg")\n    .pip_install')
    made = page.scope["image"]
    assert made.spec.apt == ("ffmpeg",) or "ffmpeg" in str(made.spec)
    assert [file["name"] for one in made.sources() for file in one.described()["files"]] == ["one.txt", "settings.toml"]
    page.run("Image.from_env(", torch='numpy", "obstore", "mkdocs-material')  # what is installed here
    assert "ffmpeg" in str(page.scope["image"].spec) and page.scope["image"].spec != made.spec


def test_images(page: Page) -> None:
    page.open("docs/images.md")
    (page.place / "prompts").mkdir()
    (page.place / "prompts/one.txt").write_text("")
    page.run("npm_install(")
    assert [step.kind for step in page.scope["image"].spec.steps][-1] == "run"
    (whole,) = page.blocks("toml")
    (page.place / "rethaw.toml").write_text(whole)
    (page.place / "src").mkdir()
    (page.place / "src/app.ts").write_text("")
    assert "tsc --version > compiler" in page.type("rethaw run --image . --dry-run -- true")


def test_snapshots_policy(page: Page) -> None:
    page.open("docs/snapshots.md")
    (code,) = page.blocks("python")
    (page.place / "careful.py").write_text(code)
    session = page.session(page.type("rethaw run -d careful.py").strip())
    assert session.result() == "kept for a week"
    agent = session.view["agent"]
    assert (agent["keep_all_s"], agent["keep_bytes"]) == (7 * 86400, 20 << 30)


def test_ports_from_python(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    page.open("docs/ports.md")
    work = "mkdir -p /app; echo whole > /app/report; echo ready; exec python3 -m http.server 3000"
    session = page.session(page.type(f"rethaw run -d --image base -- sh -c '{work}'").strip())
    session.until_output("ready")
    (page.place / "data.csv").write_text("1,2\n")
    capsys.readouterr()
    page.run("session.exec(")
    said = capsys.readouterr().out
    assert re.match(r"128 .*\nhttp://\S+/ports/3000/\?rethaw_link=\S+\n$", said)  # of git: no repository there
    assert (page.place / "report").read_text() == "whole\n"
    assert page.type("rethaw exec SESSION -- cat /app/data.csv") == "1,2\n"
    session.post("cancel", {"now": True})


def test_context(page: Page) -> None:
    page.open("docs/context.md")
    assert page.type("""rethaw run research.py::research --urls '["a", "b"]'""").endswith(
        '{\n  "a": "what a says",\n  "b": "what b says"\n}\n'
    )
    session = page.session(page.type("rethaw run -d explore.py --question why").strip())
    assert session.result() == "the careful way: a plan for why"
    (told,) = session.outbox()
    assert Session(page.home, {"id": told["the other one"]}).result() == "the bold way: a plan for why"
    session = page.session(page.type("rethaw run -d review.py --text draft").strip())
    session.until("its message", lambda s: s.outbox())
    session.send("better")
    session.signal("approval", {"ok": True})
    assert session.result() in ("approved: better", "approved: draft")  # whichever it took first


def test_a_conversation_goes_on(page: Page) -> None:
    page.open("docs/context.md")
    session = page.session(page.type("rethaw run -d resume.py --topic tides").strip())
    for number, question in enumerate(["why?", "twice a day?"], 1):
        session.send(question)
        session.until("its answer", lambda s, n=number: len(s.outbox()) == n, timeout_s=BEGIN_S)
    assert session.outbox() == ["echo why?", "echo twice a day?"]
    page.type("rethaw deploy resume.py")
    page.type("rethaw upgrade SESSION")
    session.send("and the moon?")
    session.until("its answer", lambda s: len(s.outbox()) == 3)
    said = page.home.provider.inner.calls[-1].json
    assert said is not None
    assert said["system"] == "You teach tides."
    assert [(m["role"], m["content"] if isinstance(m["content"], str) else m["content"][0]["text"]) for m in said["messages"]] == [
        ("user", "why?"), ("assistant", "echo why?"), ("user", "twice a day?"), ("assistant", "echo twice a day?"),
        ("user", "and the moon?"),
    ]  # fmt: skip
    session.post("cancel", {"now": True})


def test_comparison(page: Page) -> None:
    page.open("docs/comparison.md")
    session = page.session(page.type("rethaw run -d moved.py --goal rest").strip())
    session.until("its message", lambda s: s.outbox(), timeout_s=BEGIN_S)
    answer = "echo what is known about rest\nwhat is known about objections to rest"
    assert session.outbox() == [answer]
    session.signal("approval", True)
    assert session.result() == answer
    assert "requested" in [e["data"]["why"] for e in session.events("snapshot.created")]


class _Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"at {self.path}".encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_network(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    """With a site of this machine instead of the page's hosts, allowed by the address."""
    page.open("docs/network.md")
    site = ThreadingHTTPServer(("127.0.0.2", 0), _Site)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    where = f"127.0.0.2:{site.server_port}"
    try:
        file = page.place / "watch.py"
        file.write_text(
            file.read_text().replace("https://api.github.com", f"http://{where}").replace("api.github.com", where)
        )
        watch, allowed, events = page.lines("watch.py --repository")
        assert page.type(watch) == "at /repos/python/cpython\n"
        allowed = allowed.replace("example.com", where)
        assert page.type(allowed) == "200\n"
        listed = page.home.server.request("GET", "/v1/sessions?limit=1")["sessions"]
        page.session(listed[0]["id"])
        assert re.search(rf"egress.opened +{where}\n(.*\n)*.*egress.closed +{where}, sent ", page.type(events))
        words = shlex.split(allowed.replace(f"--allow {where}", "--allow another.example"))
        assert main(words[1:]) == 1
        said = capsys.readouterr().err
        assert f"egress to {where} refused" in said and f"--allow {where}" in said
    finally:
        site.shutdown()
        site.server_close()


def test_engines(page: Page) -> None:
    page.open("docs/engines.md")
    (page.place / "agent.py").write_text("import rethaw\n\n\n@rethaw.agent\ndef main(ctx):\n    return 'here'\n")
    _, run, _ = page.lines("--engine qemu")
    assert page.type(run) == "here\n"


def test_queues(page: Page) -> None:
    page.open("docs/queues.md")
    limit, run, ls = page.lines("rethaw queue set reports --limit 2")
    page.type(limit)
    first = page.session(page.type(run).strip())
    assert first.result() == "about snapshots" and (first.view["queue"], first.view["priority"]) == ("reports", 5)
    page.type(ls)
    page.run("client.queues.set")
    view = page.scope["session"].view
    assert (view.state, view.queue, view.tags) == ("queued", "reports", ("report", "urgent"))
    for line in page.lines("--key-limit 1"):
        if line.startswith("rethaw queue rm"):
            page.session(view.id)
            page.type("rethaw cancel SESSION --now")
            first.until("all are over", lambda s: not _waiting(page))
        said = page.type(line)
        if "queue show" in line:
            assert re.search(r"limit +4 at once\n", said) and re.search(r"delayed +1\n", said)
    page.run("client.schedules.create")
    once, *others = page.lines("schedule create news")
    page.type("rethaw schedule rm news")  # the page makes it by either way
    for line in (once, *others):
        said = page.type(line)
        if "trigger" in line:
            assert page.session(said.strip()).result() == "about news"
    page.type("rethaw schedule rm poll")
    for line in page.lines("--search"):
        page.type(line)


def _waiting(page: Page) -> bool:
    found = page.home.server.request("GET", "/v1/sessions?queue=reports&limit=100")["sessions"]
    return any(one["state"] not in ("completed", "failed", "cancelled") for one in found)


def test_retries_and_budgets(page: Page) -> None:
    page.open("docs/retries-and-budgets.md")
    page.home.provider.answer = lambda request: Reply(f"re {request.last_text}")
    with_retries, with_budget, command = page.lines("--retry-delay")
    assert "re One sentence: re Five facts about https://example.com" in page.type(with_retries)
    assert "re One sentence" in page.type(with_budget)
    page.type(command)
    # One that always fails, and waits for its time.
    start = (
        "rethaw run -d --retries 9 --retry-delay 5m --budget-tokens 5 --budget-wall 1h --image base -- sh -c 'exit 1'"
    )
    session = page.session(page.type(start).strip())
    for attempt, line in enumerate(page.lines("rethaw why SESSION"), 1):
        if "retry" in line.split("#")[0]:
            session.until("the next backoff", lambda s: s.view["state"] == "queued" and s.view["retry_at"])
        if "why" in line:
            session.until("the first backoff", lambda s: s.view["state"] == "queued" and s.view["retry_at"])
        said = page.type(line)
        assert attempt != 1 or "attempt 2 of 10 begins at" in said
    assert session.view["agent"]["memory_bytes"] == 1 << 30
    for line in page.lines("rethaw budget SESSION "):
        page.type(line)
    assert session.view["budget"]["tokens"] == 100_005 and session.view["budget"]["money"] == "7.50"
    page.run("def more(")
    session.until("the next backoff", lambda s: s.view["state"] == "queued" and s.view["retry_at"])
    attempt = session.view["attempt"]
    page.scope["more"](session.id)
    assert session.view["budget"]["tokens"] == 200_005
    session.until("another attempt", lambda s: s.view["attempt"] > attempt)
    session.post("cancel", {"now": True})


def test_versions(page: Page) -> None:
    page.open("docs/versions.md")
    deploy, run, *look = page.lines("helper@1: starts")
    assert page.type(deploy) == "helper@1\n"
    session = page.session(page.type(run).strip())
    session.send("hello")
    session.until("an answer", lambda s: s.outbox() == ["Ann: hello"])
    assert "helper" in page.type(look[0]) and re.search(r"--who +str +needed", page.type(look[1]))
    page.run("Agent.from_name(")
    begun = Session(page.home, {"id": page.scope["begin"]("Bo")})
    begun.until("an answer", lambda s: s.outbox() == ["Bo: hello"])
    file = page.place / "helper.py"
    file.write_text(file.read_text().replace("{who}: ", "{who}, "))
    for line in page.lines("helper@2"):
        page.type(line)
    session.until("it runs", lambda s: s.view["state"] in ("running", "waiting", "suspended"))
    session.send("again")
    session.until("the new one's answer", lambda s: s.outbox() == ["Ann: hello", "Ann, again"])
    events, upgrade = page.lines("find the last good event")
    assert "message.sent" in page.type(events)
    page.names["57"] = str(session.events("message.sent")[0]["seq"])
    file.write_text(file.read_text().replace("{who}, ", "{who}; "))
    page.type("rethaw deploy helper.py")
    page.type(upgrade)
    session.until("it runs", lambda s: s.view["state"] in ("running", "waiting", "suspended"))
    session.send("last")
    session.until("its answer", lambda s: "Ann; last" in s.outbox())
    file.write_text(file.read_text().replace("{who}; ", "{who} - "))
    page.run("client.agents.deploy(")
    number = page.scope["correct"](session.id, "helper.py")
    session.send("corrected")
    session.until("its answer", lambda s: "Ann - corrected" in s.outbox())
    assert session.view["version"] == number
    begun.post("cancel", {"now": True})
    session.post("cancel", {"now": True})


def test_inspect_from_python(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    page.open("docs/inspect.md")
    start = "rethaw run -d --image base -- sh -c 'mkdir -p /app; echo notes > /app/notes.md; sleep 600'"
    session = page.session(page.type(start).strip())
    session.until("it is written", lambda s: s.view["state"] == "running")
    with rethaw.Client() as client:
        first = client.sessions.get(session.id).snapshot()
        second = client.sessions.get(session.id).snapshot()
    page.names.update(snap_06f2=first.id, snap_06g7=second.id)
    page.run("client.snapshots.read")
    assert page.scope["notes"] == b"notes\n" and isinstance(page.scope["changed"], list | tuple)
    assert "notes.md" in capsys.readouterr().out
    session.post("cancel", {"now": True})
