"""The pytest plugin as its users have it: the documented tests pass, failures tell what happened, nothing stays behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rethaw.testing import processes
from rethaw.testing.agents import missing

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
AGENT = """
import http.client, json, os, urllib.parse
import rethaw

@rethaw.agent
def asks(ctx: rethaw.Context, question: str) -> str:
    base = urllib.parse.urlsplit(os.environ["OPENAI_BASE_URL"])
    connection = http.client.HTTPConnection(base.hostname, base.port, timeout=60)
    body = json.dumps({"model": "test", "messages": [{"role": "user", "content": question}]})
    connection.request("POST", base.path + "/chat/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    found = json.loads(answer.read())
    if answer.status != 200:
        return "refused: " + found["error"]["message"]
    print("heard", found["choices"][0]["message"]["content"], flush=True)
    ctx.wait("more")
    return found["choices"][0]["message"]["content"]
"""
TESTS = """
import os
import subprocess
import sys
import pytest
from asks import asks
from rethaw import Client, errors
from rethaw.testing import AgentServer, Reply

@pytest.fixture(scope="session")
def rethaw_config():
    return {"log_level": os.environ["LEVEL"]}

def test_ways_to_start_and_to_crash(rethaw_server):
    rethaw_server.model.fail(Reply.rate_limited(0.1))
    rethaw_server.model.script("one", lambda request: f"two to {request.last_text}")
    session = asks.start(question="a")  # RETHAW_URL names the server
    rethaw_server.wait_for(session, output="heard one")
    for what in ("db", "sandbox"):
        rethaw_server.crash(session, what)
    rethaw_server.wait_for(session, waiting="more", event="snapshot.restored")
    session.suspend()
    rethaw_server.wait_for(session, state="suspended")
    with pytest.raises(errors.Conflict, match="resume it first"):
        rethaw_server.crash(session)
    session.resume()
    session.signal("more")
    assert session.result("60s") == "one"
    assert rethaw_server.model.prompts == ["a", "a"]  # the first was told to come later
    assert rethaw_server.start(asks, question="b").id != session.id
    done = subprocess.run([sys.executable, "-m", "rethaw.cli.main", "ls", "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and session.id in done.stdout

def test_begins_with_nothing(rethaw_server):
    assert rethaw_server.client.sessions.list() == [] and rethaw_server.model.calls == 0
    session = rethaw_server.start(asks, question="why")
    assert session.result("60s") == "refused: no answer is scripted, and the agent asks 'why': see model.script(...)"

def test_that_fails(rethaw_server):
    rethaw_server.model.script("x")
    session = rethaw_server.start(asks, question="fails")
    rethaw_server.wait_for(session, output="heard x")
    session.signal("more")
    rethaw_server.wait_for(session, output="never said", timeout="30s")
"""


def run(directory: Path, *args: str, **env: str) -> str:
    """pytest's output."""
    load = ("-p", "rethaw.testing.plugin") if "PYTHONPATH" not in env else ()
    plain = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *load, "-p", "no:cacheprovider", "-c", "/dev/null",
         "-o", "asyncio_mode=auto", "--rootdir", directory, "-rs", *args, directory],
        cwd=directory, capture_output=True, text=True, check=False, env=plain | env, timeout=240,
    )  # fmt: skip
    return done.stdout + done.stderr


def servers() -> list[int]:
    return [p for p in processes.mentioning("rethaw-t-plugin") if processes.alive(p)]


def test_documented_tests_pass(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "testing.md").read_text()
    named = re.findall(r"^```python\n(# (\w+\.py)\n.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for code, name in named:
        (tmp_path / name).write_text(code)
    assert [name for _, name in named] == ["essayist.py", "test_essayist.py", "test_essayist_more.py"]
    said = run(tmp_path)
    assert "2 passed" in said, said


def test_failures_tell_and_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(AGENT)
    (tmp_path / "test_asks.py").write_text(TESTS)
    temporary = tmp_path / "rethaw-t-plugin"
    temporary.mkdir(mode=0o711)
    for above in (tmp_path, tmp_path.parent):
        above.chmod(0o711)  # PostgreSQL's user must get through
    images = os.environ.get("RETHAW_TEST_IMAGES", "/tmp/rethaw-test-images")
    here = {"TMPDIR": str(temporary), "RETHAW_TEST_IMAGES": images}
    said = run(tmp_path, LEVEL="no-such", **here)
    assert "3 errors" in said and "rethaw.toml: log_level = 'no-such'" in said and "Traceback" not in said, said
    said = run(tmp_path, LEVEL="info", **here)
    assert "2 passed" in said and "1 failed" in said, said
    assert "output 'never said': the session ended without it" in said
    report = said[said.rindex("- rethaw -") :]
    assert "of asks: completed" in report and "| heard x" in report and "1 model calls: ['fails']" in report, said
    assert list(temporary.iterdir()) == [] and servers() == []


def test_where_no_server_runs_tests_are_skipped_unless_they_are_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_any.py").write_text(
        "pytest_plugins = ['rethaw.testing.plugin']\ndef test_any(rethaw_server): pass"
    )
    # The package's own entry point beside it, whether it is installed or on the path: loaded once.
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    about = tmp_path / "like_rethaw-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: like-rethaw\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[pytest11]\n" + "".join(f"{name} = {module}\n" for name, module in declared.items())
    )
    nothing = {"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join([*sys.path, str(tmp_path)])}
    said = run(tmp_path, **nothing)
    assert "1 skipped" in said and "there is no engine: install runsc (gVisor)" in said, said
    said = run(tmp_path, RETHAW_TEST_REQUIRED="1", **nothing)
    assert "1 error" in said and "install runsc" in said and "RETHAW_TEST_REQUIRED is set" in said, said
    assert missing() is None
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in str(missing())
