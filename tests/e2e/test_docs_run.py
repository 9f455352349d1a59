"""The guides, done as their reader would: their files written, their commands typed one after another, against a real server and a
scripted model."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_fixtures import SLOWER, House, house

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(240 * SLOWER),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
ROOT = Path(__file__).resolve().parents[2]
# Set-up, and what would start a second server.
_NOT_HERE = re.compile(r"^(sudo )?(make |export |(sudo )?(\S*/)?rethaw (up|doctor)\b)|--preserve-env", re.MULTILINE)
_PRELUDE = """
set -euo pipefail
rethaw() {
    local code=0
    %s -m rethaw.cli.main "$@" < /dev/stdin > .out 2> .err || code=$?
    cat .out; cat .err >&2
    case "$1 $*" in run*\\ -d\\ *|template*start*) head -n 1 .out > .session;; esac
    return $code
}
session() { cat .session; }
snapshot() { rethaw snapshot ls "$(session)" --json | %s -c 'import json, sys; print(json.load(sys.stdin)[0]["id"])'; }
seq_of_snapshot() { rethaw snapshot ls "$(session)" --json | %s -c 'import json, sys; print(json.load(sys.stdin)[0]["seq"])'; }
"""


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as h:
        yield h


class Reader:
    """Somebody with a page in hand, in a directory of their own."""

    def __init__(self, home: House, place: Path) -> None:
        self.home = home
        self.place = place
        python = shlex.quote(sys.executable)
        self._prelude = _PRELUDE % (python, python, python)

    def files(self, page: str) -> None:
        """Write each Python block that says its name."""
        for code in re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
            if named := re.match(r"# (\w+\.py)\n", code):
                (self.place / named[1]).write_text(code)

    def type(self, script: str, timeout_s: float = 120.0) -> str:
        """Run it in bash; its stdout."""
        script = re.sub(r"(sudo )?(\.venv/bin/)?rethaw\b(?=[ \n])", "rethaw", script)
        script = re.sub(r"\bSNAPSHOT\b|\bsnap_06f2\b", '"$(snapshot)"', script)
        script = re.sub(r"\bSESSION\b|\bs_06f2\b", '"$(session)"', script)
        script = re.sub(r"(?<=--at )57|(?<=--to )57|(?<=--to )120|(?<=--at )120", '"$(seq_of_snapshot)"', script)
        done = subprocess.run(
            ["bash", "-c", self._prelude + script], cwd=self.place, env=self.home.server.env, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
        return done.stdout

    def blocks(self, page: str) -> list[str]:
        found = re.findall(r"^```sh\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
        return [block for block in found if not _NOT_HERE.search(block)]

    def python(self, file: str) -> str:
        env = {**self.home.server.env, "RETHAW_URL": self.home.server.url, "RETHAW_TOKEN": self.home.server.token}
        done = subprocess.run(
            [sys.executable, file], cwd=self.place, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def until(self, state: str) -> None:
        self.type(
            f'for n in $(seq 300); do rethaw show SESSION --json | grep -q \'"state": *"{state}"\' && exit 0; sleep 0.1; done; '
            "rethaw show SESSION; exit 1"
        )


@pytest.fixture
def reader(home: House, tmp_path: Path) -> Reader:
    return Reader(home, tmp_path)


def test_quickstart(reader: Reader) -> None:
    reader.files("docs/quickstart.md")
    said = [reader.type(block) for block in reader.blocks("docs/quickstart.md")]
    assert "step 3" in said[0]
    assert "now 42" in said[1]
    assert "now 47" in said[2] and "1 crash" in said[2]
    assert "Why is the sky blue?" in said[3]
    assert reader.python("client.py") == "42\n"


def test_readme(reader: Reader) -> None:
    reader.files("README.md")
    use, around, walk = (b for b in reader.blocks("README.md") if "approve.py" in b or "rethaw fork" in b)
    start, following = use.split("\n", 1)
    reader.type(start)
    reader.until("waiting")  # a reader is slower than a script
    said = reader.type(following)
    assert "waits for signal 'approval'" in said and "1 crash" in said
    reader.until("completed")
    start, following = around.split("rethaw deploy", 1)
    reader.type(start)
    reader.until("waiting")
    assert "writer@1" in reader.type("rethaw deploy" + following)
    assert "def test_" in (reader.place / "my-agent/test_agent.py").read_text()
    reader.until("waiting")
    reader.type("rethaw fork SESSION > .fork")
    walk = walk.replace(" FORK ", ' "$(cat .fork)" ').replace("rethaw shell SESSION", "rethaw shell SESSION -- true")
    assert len(set(re.findall(r"^s_\w+$", reader.type(walk), re.MULTILINE))) >= 4
    assert (reader.place / "agent.snap").stat().st_size > 1 << 20


def test_the_command_inside(reader: Reader) -> None:
    (reader.place / "examples").symlink_to(ROOT / "examples")
    (block,) = (b for b in reader.blocks("docs/guides/index.md") if "tasks.sh" in b)
    reader.type(block)
    reader.until("completed")
    session = (reader.place / ".session").read_text().strip()
    assert reader.home.server.request("GET", f"/v1/sessions/{session}/result?wait_s=30")["result"] == {"tasks": 1}


def test_templates(reader: Reader) -> None:
    reader.files("docs/templates.md")
    first, second, *rest = reader.blocks("docs/templates.md")
    assert "greeter" in reader.type(first)
    reader.until("completed")
    session = (reader.place / ".session").read_text().strip()
    said = reader.home.server.request("GET", f"/v1/sessions/{session}/result?wait_s=30")
    assert said["result"] == "hello Ada, I know 430 primes"
    reader.type(second)
    reader.type("rethaw template rm repl")
    for block in rest:
        reader.type(block)


def test_snapshots_and_looking_inside(reader: Reader) -> None:
    reader.type("rethaw run -d --image base -- sh -c 'mkdir /app; echo notes > /app/notes.md; sleep 600'")
    reader.until("running")
    reader.type("rethaw snapshot create SESSION")
    for block in reader.blocks("docs/snapshots.md"):
        reader.type(block)
    for block in reader.blocks("docs/inspect.md"):
        typed = re.sub(r"rethaw diff snap_06f2 snap_06g7", "rethaw diff snap_06f2 snap_06f2", block)
        reader.type(re.sub(r"rethaw shell s_06f2 +#", "rethaw shell s_06f2 -- true #", typed))
    assert (reader.place / "then.md").read_text() == "notes\n"
    assert (reader.place / "app-then/notes.md").read_text() == "notes\n"
    reader.type("rethaw cancel SESSION --now")
