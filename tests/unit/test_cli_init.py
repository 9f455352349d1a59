"""`rethaw init`: a project of any name is right as it is written, and nothing of anybody's is overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rethaw.cli.main import main
from rethaw.cli.project import FILES
from rethaw.sdk.agents import find


@pytest.mark.parametrize(
    ("directory", "given", "function", "name"),
    [
        ("reviewer", (), "reviewer", "reviewer"),
        ("My Agent 2.0!", (), "my_agent_2_0", "My-Agent-2.0"),
        ("--", (), "agent", "agent"),
        ("x", ("--name", "class"), "agent_class", "class"),
        ("y", ("--name", "ask"), "agent_ask", "ask"),
        ("z", ("--name", "7th"), "agent_7th", "7th"),
    ],
)
def test_a_project_is_an_agent_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: str, given: tuple[str, ...], function: str, name: str
) -> None:
    (tmp_path / directory).mkdir()
    monkeypatch.chdir(tmp_path / directory)
    assert main(["init", *given]) == 0
    assert sorted(path.name for path in Path().iterdir()) == sorted(FILES)
    agent = find(Path("agent.py"))
    assert (agent.name, agent.function.__name__) == (name, function)
    assert "@" not in "".join(path.read_text() for path in Path().iterdir()).replace("@rethaw.agent", "")
    compile(Path("test_agent.py").read_text(), "test_agent.py", "exec")


def test_the_project_is_typed_and_its_first_test_passes_anywhere(tmp_path: Path) -> None:
    project = tmp_path / "deep" / "down"
    assert main(["init", str(project)]) == 0
    checked = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable],
        cwd=project, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=project, capture_output=True, text=True, check=False, env=env,
    )  # fmt: skip
    assert "1 passed, 1 skipped" in done.stdout, done.stdout
    assert "needs root" in done.stdout or "there is no engine" in done.stdout


def test_what_is_there_is_named_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "agent.py").symlink_to("nowhere")
    assert main(["init", str(tmp_path)]) == 5
    assert "README.md, agent.py exist already" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("place", ["a-file", "a-file/below", "/proc/nowhere"])
def test_where_nothing_can_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    assert main(["init", place]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rethaw: ") and "name another directory" in said and "internal" not in said


@pytest.mark.parametrize("name", ["", "a b", "ä", "-x", "x" * 129])
def test_a_name_that_no_agent_can_have(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["init", str(tmp_path), f"--name={name}"]) == 2
    assert "pass --name" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
