"""What is written down of an agent's arguments: read again, it takes and refuses what the function does."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NotRequired, Optional, TypedDict

import pytest
from pydantic import BaseModel, BeforeValidator, Field

import rethaw
from rethaw import Image, InvalidInput
from rethaw.cli.arguments import described, parse
from rethaw.model import signatures, typed
from rethaw.model.types import AgentSpec, Signature
from rethaw.model.versions import digest, unsigned


class Step(BaseModel):
    name: str
    minutes: int = 1
    then: list[Step] = []


class Colour(enum.Enum):
    RED = "red"
    TEN = 10


@dataclasses.dataclass
class Point:
    x: float
    label: str = ""
    near: list[Point] = dataclasses.field(default_factory=list["Point"])


class Row(TypedDict):
    name: str
    size: NotRequired[int]


HERE = object()


def nothing(ctx: Any) -> None: ...


ALL: list[Any] = [
    None, True, False, 0, 1, -3, 2.5, "", "red", "a", "1", [], [1], ["a"], [1, "a"], [1, "a", 2], [[1]], [None], {},
    {"a": 1}, {"1": "x"}, {"x": 1}, {"x": 1, "label": "l"}, {"x": 1, "near": [{"x": 2.5}]}, {"x": 1, "near": [{}]},
    {"x": 1, "y": 2}, {"name": "n"}, {"name": "n", "size": 2}, {"name": 1}, {"name": "n", "minutes": 2}, 10,
]  # fmt: skip
KINDS: list[Any] = [
    str, int, float, bool, None, Any, list, list[int], list[str | None], Sequence[float], tuple[int, str], tuple[int, ...],
    set[int], dict, dict[str, int], dict[int, str], int | str, Optional[bool], Literal["a", 1], Colour, Colour | None, Point,  # noqa: UP045
    list[Point], Row, dict[str, Row] | int, Point | None,
]  # fmt: skip


def takes(kind: Any, default: Any = ...) -> Callable[..., Any]:
    def agent(ctx: Any, value: Any) -> None: ...

    agent.__annotations__["value"] = kind
    if default is not ...:
        agent.__defaults__ = (default,)
    return agent


def record(function: Callable[..., Any]) -> Signature:
    made = signatures.of(function)
    assert made is not None
    return Signature.model_validate_json(made.model_dump_json())  # as it comes out of the database


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_record_takes_and_refuses_what_the_function_does(kind: Any) -> None:
    function = takes(kind)
    written = record(function)
    for value in ALL:
        try:
            typed.built_arguments(function, {"value": value})
            fits = True
        except InvalidInput:
            fits = False
        if fits:
            signatures.check("a", written, {"value": value})
        else:
            with pytest.raises(InvalidInput, match=r"agent a: argument value = "):
                signatures.check("a", written, {"value": value})
    shown = [line.replace("Point", "").split() for line in described(signatures.stand_in("a", written))]
    if kind is not Colour and kind != Colour | None:  # its values are what callers write
        assert shown[:1] == [line.replace("Point", "").split() for line in described(function)][:1] or kind in (
            list, tuple[int, ...], set[int], Sequence[float], dict,
        )  # fmt: skip


def lenient(value: Any) -> Any:
    return str(value)


@pytest.mark.parametrize("kind", [Step, list[Step], Step | None, Annotated[int, Field(gt=0)]], ids=str)
def test_what_pydantic_checks_is_left_to_the_sandbox_and_described(kind: Any) -> None:
    written = record(takes(kind))
    wrong: Any = [{"nom": 1}] if kind == list[Step] else {"nom": 1}
    signatures.check("a", written, {"value": wrong})  # its validators may take anything: they are not here
    lines = described(signatures.stand_in("a", written))
    assert lines[0].split()[:2] == described(takes(kind))[0].split()[:2]
    if kind is Step:
        assert lines[-1] == "  Step: name: str, minutes: int, then: list[Step]"


def test_text_stays_text_where_pydantic_only_limits_it() -> None:
    def agent(
        ctx: Any, code: Annotated[str, Field(max_length=3)], any_: Annotated[str, BeforeValidator(lenient)] = ""
    ) -> None: ...

    again = signatures.stand_in("a", record(agent))
    assert parse(again, ["--code", "007", "--any-", "7"]) == {"code": "007", "any_": 7}
    with pytest.raises(InvalidInput, match="argument code = 7 does not fit"):
        signatures.check("a", record(agent), {"code": 7})
    signatures.check("a", record(agent), {"code": "7", "any_": 7})


def test_missing_and_unknown_arguments_are_named() -> None:
    def agent(ctx: Any, goal: str, depth: int = 3, *, point: Point | None = None, made: Any = HERE) -> int:
        """Look it up.

        At length."""
        return 0

    written = record(agent)
    usage = "it takes goal: str, depth: int = 3, point: Point | None = null, made: JSON = ..."
    with pytest.raises(InvalidInput) as missing:
        signatures.check("looker", written, {"depth": 2})
    assert str(missing.value) == f"agent looker needs argument 'goal'; {usage}"
    with pytest.raises(InvalidInput) as unknown:
        signatures.check("looker", written, {"goal": "x", "dept": 2})
    assert str(unknown.value) == f"agent looker has no argument 'dept'; {usage}"
    with pytest.raises(InvalidInput) as wrong:
        signatures.check("looker", written, {"goal": "x", "depth": "2"})
    assert str(wrong.value) == "agent looker: argument depth = '2' does not fit: it is no int; it has to be int"
    again = signatures.stand_in("looker", written)
    assert again.__doc__ == "Look it up.\n\nAt length."
    assert written.result == {"type": "integer"}
    assert parse(again, ["--goal", "7", "--depth", "2", "--point", '{"x": 1}']) == {
        "goal": "7", "depth": 2, "point": {"x": 1},
    }  # fmt: skip
    assert described(again)[-1] == "  Point: x: float, label: str, near: list[Point]"
    signatures.check("none", record(nothing), {})
    with pytest.raises(InvalidInput, match="it takes no arguments"):
        signatures.check("none", record(nothing), {"a": 1})


def test_any_names_and_odd_names() -> None:
    def agent(own: Any, ctx: int, **arguments: int) -> None: ...

    signatures.check("a", record(agent), {"ctx": 1, "more": 2})
    with pytest.raises(InvalidInput, match="argument more = 'x'"):
        signatures.check("a", record(agent), {"ctx": 1, "more": "x"})

    class Stateful:
        def __init__(self, ctx: Any, start: int) -> None: ...

        def run(self) -> str:
            return ""

    assert record(Stateful).result == {"type": "string"}
    with pytest.raises(InvalidInput, match="needs argument 'start'"):
        signatures.check("a", record(Stateful), {})


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"properties": [], "required": [], "additionalProperties": False},
        {"properties": {"a": {"type": "thing"}}, "required": [], "additionalProperties": False},
        {"properties": {"a": {"$ref": "#/$defs/x"}}, "required": [], "additionalProperties": False},
        {"properties": {"not a name": {}}, "required": [], "additionalProperties": False},
        {"properties": {"a": 1}, "required": [], "additionalProperties": False},
        {"properties": {}, "required": 7, "additionalProperties": False},
    ],
    ids=str,
)
def test_a_record_that_cannot_be_read_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="signature of agent a cannot be read"):
        signatures.stand_in("a", Signature(arguments=arguments))


def test_a_record_that_is_too_much_is_not_written() -> None:
    kind = Literal[tuple(f"choice number {n}" for n in range(5000))]  # type: ignore[valid-type]
    assert signatures.of(takes(kind)) is None


def test_no_digest_changes_by_a_signature() -> None:
    bare = AgentSpec(name="x", command=("y",), agents={"z": AgentSpec(name="z", command=("z",))})
    told = signatures.of(takes(int))
    other = bare.agents["z"].model_copy(update={"signature": told})
    signed = bare.model_copy(update={"signature": told, "agents": {"z": other}})
    assert digest(signed) == digest(bare) and unsigned(signed) == bare and unsigned(bare) is bare
    assert "signature" not in bare.model_dump_json()  # as it was written before there were any
    assert json.loads(signed.model_dump_json())["signature"]["arguments"]["required"] == ["value"]


def test_an_agent_writes_it_down_for_itself_and_what_it_may_spawn() -> None:
    spec = documented.spec("0" * 64)
    assert spec.signature is not None and list(spec.signature.arguments["properties"]) == ["step"]
    other = spec.agents["helper"].signature
    assert other is not None and other.arguments["required"] == ["n"]


@rethaw.agent(image=Image.debian().pip_install("pydantic"))
def documented(ctx: rethaw.Context, step: Step) -> str:
    return step.name


@rethaw.agent
def helper(ctx: rethaw.Context, n: int) -> int:
    return n
