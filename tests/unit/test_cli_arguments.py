"""Arguments of an agent on the command line of `rethaw run`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from rethaw.cli.app import build
from rethaw.cli.arguments import FLAGS, SCHEDULE_FLAGS, SCHEDULE_VALUES, VALUES, asked_about, parse, prepared, separate
from rethaw.cli.main import main
from rethaw.model.errors import InvalidInput


class Step(BaseModel):
    name: str
    minutes: int = 1


class Colour(enum.Enum):
    RED = "red"


def agent(
    ctx: Any,
    task: str,
    depth: int = 1,
    ratio: float = 0.5,
    fast: bool = False,
    tags: list[str] | None = None,
    config: dict[str, Any] | None = None,
    mode: Literal["fast", "slow"] = "fast",
    limit: int | None = None,
    either: int | str = 0,
    free=None,
    step: Step | None = None,
    steps: list[Step] | None = None,
    colour: Colour = Colour.RED,
    share: Annotated[float, Field(le=1)] = 0.5,
) -> None: ...


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["--task", "1"], {"task": "1"}),
        (["--task", "{}"], {"task": "{}"}),
        (["--task=--x=y"], {"task": "--x=y"}),
        (["--task", ""], {"task": ""}),
        (["--depth", "-3"], {"depth": -3}),
        (["--ratio", "2"], {"ratio": 2.0}),
        (["--fast"], {"fast": True}),
        (["--fast", "no"], {"fast": False}),
        (["--fast=true"], {"fast": True}),
        (["--tags", "a", "--tags", "2"], {"tags": ["a", "2"]}),
        (["--tags", '["a", "b"]'], {"tags": ["a", "b"]}),
        (["--config", '{"a": [1]}'], {"config": {"a": [1]}}),
        (["--config", "null"], {"config": None}),
        (["--mode", "slow"], {"mode": "slow"}),
        (["--limit", "4"], {"limit": 4}),
        (["--either", "4"], {"either": 4}),
        (["--either", "four"], {"either": "four"}),
        (["--free", "[1]"], {"free": [1]}),
        (["--free", "text, not JSON"], {"free": "text, not JSON"}),
        (["--free"], {"free": True}),
        (["--step", '{"name": "a"}'], {"step": {"name": "a"}}),
        (["--steps", '{"name": "a"}', "--steps", '{"name": "b"}'], {"steps": [{"name": "a"}, {"name": "b"}]}),
        (["--colour", "red"], {"colour": "red"}),
        (["--share", "1"], {"share": 1.0}),
    ],
)
def test_typed_by_the_function(tokens: list[str], expected: dict[str, Any]) -> None:
    got = parse(agent, [*([] if "task" in expected else ["--task", "t"]), *tokens])
    got = {k: v for k, v in got.items() if k in expected}
    assert got == expected and [type(v) for v in got.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], "needs --task"),
        (["--task"], "--task has no value"),
        (["--task", "x", "--depth", "three"], "--depth = 'three' does not fit: it is no int"),
        (["--task", "x", "--depth", "1.5"], "it is no int"),
        (["--task", "x", "--depth", "true"], "it is no int"),
        (["--task", "x", "--mode", "warp"], "none of the choices"),
        (["--task", "x", "--config", "[]"], "it is no dict"),
        (["--task", "x", "--task", "y"], "given 2 times"),
        (["--tsak", "x"], "did you mean --task?"),
        (["--nothing-like-it", "x"], "it takes --task str [--depth int]"),
        (["--task", "x", "--step", "{}"], "--step = {} does not fit: name: Field required"),
        (["--task", "x", "--step", "a"], "--step = 'a' does not fit: it is not JSON; it takes --task str"),
        (["--task", "x", "--steps", '[{"name": 1}]'], "--steps = [{'name': 1}] does not fit[0]: name: Input should be"),
        (["--task", "x", "--colour", "green"], "none of the choices red"),
        (["--task", "x", "--share", "2"], "--share = 2.0 does not fit: it: Input should be less than or equal to 1"),
        (["stray"], "'stray' belongs to no argument"),
    ],
)
def test_what_does_not_fit_is_named(tokens: list[str], said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(agent, tokens)
    assert said in str(caught.value)


def test_any_name_where_the_function_takes_any() -> None:
    def open_agent(ctx: Any, **options: Any) -> None: ...

    assert parse(open_agent, ["--a-b", "1", "--c=x"]) == {"a_b": 1, "c": "x"}


@pytest.mark.parametrize(
    ("line", "separated"),
    [
        ("a.py", "a.py"),
        ("a.py --task x -d --key k", "a.py -d --key k -- --task x"),
        ("-d --key=k a.py::b --task=x", "-d --key=k a.py::b -- --task=x"),
        ("a.py --fast -d", "a.py -d -- --fast"),
        ("a.py --fast --json", "a.py --json -- --fast"),
        ("a.py --dry-run --task x", "a.py --dry-run -- --task x"),
        ("a.py --depth -3 --env A=1", "a.py --env A=1 -- --depth -3"),
        ("a.py -- --key k -d", "a.py -- --key k -d"),
        ("a.py --task x -- --key k", "a.py -- --task x --key k"),
        ("--image base -- sh -c x", "--image base -- sh -c x"),
        ("--image base sh -c x", "--image base sh -- -c x"),
        ("", ""),
        ("--help", "--help"),
    ],
)
def test_own_options_are_told_from_the_agents(line: str, separated: str) -> None:
    assert separate(line.split()) == separated.split()


@pytest.mark.parametrize(
    ("line", "separated"),
    [
        ("d --cron @daily a.py --task x --tag t", "d --cron @daily a.py --tag t -- --task x"),
        ("d a.py --task x --every 1h", "d a.py --every 1h -- --task x"),
        ("--every=1h d a.py --replace --key k", "--every=1h d a.py --replace -- --key k"),
        ("d --every 1h --image base -- echo --cron", "d --every 1h --image base -- echo --cron"),
        ("d a.py -- --every 1h", "d a.py -- --every 1h"),
    ],
)
def test_own_options_of_a_schedule(line: str, separated: str) -> None:
    assert prepared(["schedule", "create", *line.split()]) == ["schedule", "create", *separated.split()]
    assert prepared(["schedule", "rm", "d"]) == ["schedule", "rm", "d"]


@pytest.mark.parametrize(
    ("command", "own"), [(("run",), (FLAGS, VALUES)), (("schedule", "create"), (SCHEDULE_FLAGS, SCHEDULE_VALUES))]
)
def test_the_lists_of_own_options_are_those_of_the_commands(command: tuple[str, ...], own: Any) -> None:
    flags, values, node = {"--help", "-h"}, set[str](), build()
    for word in command:
        node = node[word]
    for argument in node.assemble_argument_collection():
        if argument.parameter.show is not False and argument.names[0].startswith("-"):
            (flags if argument.hint is bool else values).update(argument.names)
    assert (flags, values) == tuple(set(one) for one in own)


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("a.py --help", ("a.py", "file")),
        ("-h x/a.py::b", ("x/a.py::b", "file")),
        ("--agent a@2 --help", ("a@2", "agent")),
        ("-h --agent=a.py", ("a.py", "agent")),
        ("--agent --help", None),
        ("--help", None),
        ("a.py -- --help", None),
        ("a.py", None),
    ],
)
def test_help_about_a_file(line: str, target: tuple[str, str] | None) -> None:
    assert asked_about(line.split()) == target


def test_help_lists_the_agents_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trip.py").write_text("""
import dataclasses, rethaw
@dataclasses.dataclass
class Step:
    name: str
    minutes: int = 1
@rethaw.agent
class Trip:
    \"\"\"Plans a trip.\"\"\"
    def __init__(self, ctx: rethaw.Context, goal: str, steps: list[Step] | None = None, max_depth: int = 3) -> None: ...
    def run(self) -> str: return ""
""")
    assert main(["run", f"{tmp_path}/trip.py", "--help"]) == 0
    said = capsys.readouterr().out
    assert "Plans a trip." in said and "Arguments of Trip:" in said
    assert "  --goal       str " in said and "needed" in said
    assert "  --steps      list[Step] | None  default None" in said and "  Step: name: str, minutes: int\n" in said
    assert "  --max-depth  int " in said and "default 3" in said
    assert main(["run", f"{tmp_path}/trip.py", "--goal", "x", "--max-depth", "deep", "--dry-run"]) == 2
    assert "--max-depth = 'deep' does not fit: it is no int; it takes --goal str" in capsys.readouterr().err
