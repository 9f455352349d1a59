"""Models in and out of a real sandbox, classes with state, and the caller's own Python in the image; through crashes."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rethaw import Image
from rethaw.cli.main import main
from rethaw.model.errors import ImageError, InvalidInput, NotFound, SessionFailed
from rethaw.sdk import Client
from rethaw.sdk.agents import find
from rethaw.testing.server import RunningServer

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
AGENT = """
from __future__ import annotations
import sys
from importlib import metadata
import rethaw
from pydantic import BaseModel
from rethaw import Image

NEEDED = {"pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection"}
def others():
    return sorted({d.name for d in metadata.distributions()} - NEEDED - {"rethaw"})
mine = (
    Image.from_env(exclude=[name for name in others() if name.lower().replace("_", "-") not in NEEDED])
    .add_local_dir("data", "/data")
    .run("wc -l < /data/words > /etc/words; echo $GREETING > /etc/greeting")
)

class Step(BaseModel):
    name: str
    minutes: int = 1

class Plan(BaseModel):
    steps: list[Step]
    words: int
    python: str

@rethaw.agent(image=mine)
def plan(ctx: rethaw.Context, steps: list[Step]) -> Plan:
    done = []
    for message in ctx.messages():
        if message.payload is None:
            break
        done.append(steps[message.payload])
        ctx.send(done[-1].name)
    return Plan(steps=done, words=int(open("/etc/words").read()), python=sys.prefix)
"""
COUNTER = """
from __future__ import annotations
import dataclasses, rethaw

@dataclasses.dataclass
class Total:
    total: int
    names: list[str]

@rethaw.agent
class Counter:
    def __init__(self, ctx: rethaw.Context, start: Total) -> None:
        self.ctx, self.sum = ctx, start
    def run(self) -> Total:
        for message in self.ctx.messages():
            if message.payload is None:
                return self.sum
            self.add(**message.payload)
            self.ctx.send(self.sum.total)
        raise AssertionError
    def add(self, n: int, name: str) -> None:
        self.sum.total += n
        self.sum.names.append(name)
"""
PLAIN = """
import pydantic, rethaw
@rethaw.agent(image=rethaw.Image.debian().pip_install("six==1.16.0"))
def main(ctx: rethaw.Context) -> None: ...
"""


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer() as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.url, server.token) as connection:
        yield connection


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("agents") / "typed_agents.py"
    path.write_text(AGENT)
    path.with_name("counter_agent.py").write_text(COUNTER)
    (path.parent / "data/.git").mkdir(parents=True)
    (path.parent / "data/words").write_text("a\nb\nc\n")
    (path.parent / "data/.env").write_text("KEY=1")
    return path


def test_models_and_the_own_python_through_a_crash(client: Client, file: Path) -> None:
    plan = find(file, "plan")
    module: Any = sys.modules["rethaw_agent_typed_agents"]
    with pytest.raises(InvalidInput, match=r"argument steps = .* does not fit\[0\]: name: Field required"):
        plan.start_on(client, steps=[{}])
    session = plan.start_on(client, steps=[module.Step(name="a"), module.Step(name="b", minutes=7)])
    session.send(1)
    assert [m.payload for m in session.outbox(wait="60s")] == ["b"], session.logs(stream="stderr")
    session.crash()
    session.send(0)
    assert [m.payload for m in session.outbox(after=1, wait="60s")] == ["a"]
    session.send(None)
    result = session.result(timeout="60s")
    assert isinstance(result, module.Plan)
    assert result == module.Plan(
        steps=[module.Step(name="b", minutes=7), module.Step(name="a")], words=3, python="/opt/rethaw-venv"
    )
    assert session.detail().view.crashes == 1
    assert client.sessions.result(session.id)["steps"][0] == {"name": "b", "minutes": 7}


def test_a_class_keeps_its_state_through_a_crash(client: Client, file: Path) -> None:
    counter = find(file.with_name("counter_agent.py"))
    module: Any = sys.modules["rethaw_agent_counter_agent"]
    session = counter.start_on(client, module.Total(1, ["first"]))
    session.send({"n": 2, "name": "two"})
    assert [m.payload for m in session.outbox(wait="60s")] == [3]
    session.crash()
    session.send({"n": 3, "name": "three"})
    session.send(None)
    assert session.result(timeout="60s") == module.Total(6, ["first", "two", "three"])


def test_from_the_command_line(server: RunningServer, client: Client, file: Path) -> None:
    counter = str(file.with_name("counter_agent.py"))
    wrong = server.cli("run", counter, "--start", '{"total": "x", "names": []}', check=False)
    assert wrong.returncode == 2 and "--start = " in wrong.stderr and "does not fit.total: it is no int" in wrong.stderr
    ident = server.cli("run", "-d", counter, "--start", '{"total": 5, "names": ["a"]}').stdout.strip()
    session = client.sessions.get(ident)
    session.send(None)
    assert session.result(timeout="60s") == {"total": 5, "names": ["a"]}


def test_a_package_that_the_image_lacks_is_named(client: Client, tmp_path: Path) -> None:
    (tmp_path / "plain_agent.py").write_text(PLAIN)
    session = find(tmp_path / "plain_agent.py").start_on(client)
    with pytest.raises(SessionFailed):
        session.result(timeout="120s")
    said = session.logs(stream="stderr").decode()
    assert "rethaw: plain_agent.py imports pydantic, which is not in the image" in said
    assert 'pip_install("pydantic")' in said and "Traceback" not in said


def test_a_step_that_fails_is_told_to_whoever_started_it(client: Client, tmp_path: Path) -> None:
    code = (
        "import rethaw\n@rethaw.agent(image=rethaw.Image.debian().run('echo this is why; exit 3'))\ndef main(ctx): ..."
    )
    (tmp_path / "failing_agent.py").write_text(code)
    with pytest.raises(SessionFailed, match=r"(?s)step 1 of the image, `run echo .*exited with 3.*this is why"):
        find(tmp_path / "failing_agent.py").start_on(client).result(timeout="60s")


def test_arguments_that_came_some_other_way_are_checked_inside(client: Client, file: Path) -> None:
    counter = find(file.with_name("counter_agent.py"))
    older = counter.uploaded(client).model_copy(update={"signature": None})  # whose signature nobody recorded
    session = client.sessions.start(older, {"start": {"total": "many", "names": []}})
    with pytest.raises(SessionFailed):
        session.result(timeout="60s")
    said = session.logs(stream="stderr").decode()
    assert said.startswith("rethaw: argument start = {") and "does not fit.total: it is no int" in said


def test_a_dry_run_tells_what_travels(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dry-run", f"{file}::plan", "--steps", '[{"name": "a"}]']) == 0
    said = capsys.readouterr().out
    assert "typed_agents.py" in said and "added" in said and "         6  words" in said
    assert ".env" not in said and "wc -l" in said and 'arguments  {"steps": [{"name": "a"}]}' in said


def test_images_are_built_before_they_are_needed(server: RunningServer, client: Client, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("one two three")
    name = uuid.uuid4().hex  # of an image that nobody has built
    image = Image.debian().add_local_file(tmp_path / "words", "/srv/words").run(f"wc -w < /srv/words > /etc/{name}")
    first, again = client.images.build(image), client.images.build(image)
    assert first.built and not again.built and first.digest == again.digest
    found = client.images.list()
    assert {"base", "step"} <= {one.kind for one in found}
    assert any(f"/etc/{name}" in one.made_of and one.own_bytes < 1 << 20 for one in found)
    with pytest.raises(ImageError, match="no such thing"):
        client.images.build(Image.debian().run("echo no such thing >&2; exit 3"))
    step = {"kind": "add", "words": ["x"], "blob": "0" * 64, "target": "/x"}
    with pytest.raises(NotFound, match="upload them"):
        server.request("POST", "/v1/images", {"image": {"steps": [step]}})
