"""Arguments and results by their annotations: what may be annotated, what a value becomes in JSON and comes back as."""

from __future__ import annotations

import dataclasses
import enum
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, TypedDict

import pytest
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, computed_field
from pydantic.dataclasses import dataclass as pydantic_dataclass

import rethaw
from rethaw import AsyncContext, Context, Image, InvalidInput, LocalContext
from rethaw.model import typed
from rethaw.sdk.agents import find

if TYPE_CHECKING:
    from decimal import Decimal

PYDANTIC = Image.debian().pip_install("pydantic")


class Step(BaseModel):
    name: str
    minutes: int = 1


class Plan(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    kind: Literal["plan"] = "plan"
    first_step: Step = Field(alias="firstStep")
    when: Annotated[float, Field(gt=0)] = 1.0
    _cache: dict[str, int] = PrivateAttr(default_factory=dict)

    @computed_field
    @property
    def length(self) -> int:
        return self.first_step.minutes


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: float
    label: str = ""
    near: list[Point] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Pixel:
    x: float
    colour: Colour = Colour.RED


@pydantic_dataclass
class Checked:
    n: int


class Row(TypedDict, total=False):
    name: str
    step: Step


UserId = NewType("UserId", int)
PLAN = Plan(firstStep=Step(name="a"))


@pytest.mark.parametrize(
    ("value", "kind", "wire"),
    [
        (1, int, 1),
        (1, float, 1.0),
        (None, None, None),
        ("a", str | None, "a"),
        (3, int | str, 3),
        ("3", int | str, "3"),
        (True, bool | int, True),
        ((1, "a"), tuple[int, str], [1, "a"]),
        ({1}, set[int], [1]),
        ([1], Sequence[int], [1]),
        ({"a": [1]}, Mapping[str, list[int]], {"a": [1]}),
        ({1: "a"}, dict[int, str], {"1": "a"}),
        ({"a": 1}, Any, {"a": 1}),
        ("red", Literal["red", 1], "red"),
        (Colour.BLUE, Colour, "blue"),
        (UserId(4), UserId, 4),
        (Point(1.0, near=[Point(2.0)]), Point, {"x": 1.0, "label": "", "near": [{"x": 2.0, "label": "", "near": []}]}),
        (Pixel(1.0), Point | Pixel, {"x": 1.0, "colour": "red"}),
        (Step(name="a"), Step, {"name": "a", "minutes": 1}),
        ([Step(name="a")], list[Step], [{"name": "a", "minutes": 1}]),
        (PLAN, Plan, {"kind": "plan", "firstStep": {"name": "a", "minutes": 1}, "when": 1.0}),
        (PLAN, Step | Plan | None, {"kind": "plan", "firstStep": {"name": "a", "minutes": 1}, "when": 1.0}),
        (Checked(1), Checked, {"n": 1}),
        ({"name": "x", "step": Step(name="a")}, Row, {"name": "x", "step": {"name": "a", "minutes": 1}}),
        (3, Annotated[int, Field(gt=2)], 3),
        (3, Annotated[int, "a comment"], 3),
    ],
)
def test_there_and_back(value: Any, kind: Any, wire: Any) -> None:
    got = typed.dump(value, kind, "x")
    assert got == wire and type(got) is type(wire)
    back = typed.build(json.loads(json.dumps(got)), kind, "x")
    assert back == value and type(back) is (float if kind is float else type(value))


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ("1", int, "x = '1' does not fit: it is no int; it has to be int"),
        (True, int, "no int"),
        (float("nan"), float, "x = nan does not fit"),
        ({1}, Any, "x is not JSON: Object of type set"),
        ("ab", list[str], "no list"),
        ([1, "b"], list[int], "does not fit[1]: it is no int"),
        ((1,), tuple[int, int], "it has 1 items, not 2"),
        ({1: 2}, dict[str, int], "its key 1 is no str"),
        ("green", Literal["red"], "none of 'red'"),
        (Point("a"), Point, "does not fit.x: it is no float"),  # type: ignore[arg-type]
        ({"x": 1.0}, Point, "no Point"),
        ("a", int | None, "does not fit: it is no int; it has to be int | None"),
        ([], int | str | None, "int: it is no int; str: it is no str; None: it is no None"),
        ({"name": 1}, Step, "name: Input should be a valid string"),
        (Plan.model_construct(firstStep=Step(name="a"), when=-1.0), Plan, "cannot be read again"),
        (1, Annotated[int, Field(gt=2)], "greater than 2"),
    ],
)
def test_what_does_not_fit_is_named_before_it_is_sent(value: Any, kind: Any, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        typed.dump(value, kind, "x")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("wire", "kind", "said"),
    [
        ({"x": 1, "z": 2}, Point, "Point has no field 'z'"),
        ({}, Point, "field 'x' is missing"),
        ({"name": "a", "minutes": "many"}, Step, "minutes: Input should be a valid integer"),
        ("green", Colour, "none of 'red', 'blue'"),
        ({"a": 1}, dict[int, int], "its key 'a' is no int"),
    ],
)
def test_what_came_is_checked_as_well(wire: Any, kind: Any, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        typed.build(wire, kind, "x")
    assert said in str(caught.value)


def test_a_union_that_json_cannot_tell_apart_is_refused() -> None:
    @dataclasses.dataclass
    class Twin:
        x: float
        label: str = ""
        near: list[Any] = dataclasses.field(default_factory=list)

    with pytest.raises(InvalidInput, match=r"a Twin would come back as Point.*Literal"):
        typed.dump(Twin(1.0), Point | Twin, "x")


def test_annotations_that_json_cannot_hold_are_errors_at_definition() -> None:
    def with_socket(ctx: Context, connection: socket.socket) -> None: ...

    def with_path(ctx: Context, files: list[Path]) -> None: ...

    def with_keys(ctx: Context, table: dict[tuple[int, int], str]) -> None: ...

    def returns(ctx: Context) -> bytes: ...

    def yields(ctx: Context) -> Generator[bytes, None, int]:
        yield b""
        return 1

    for function, said in (
        (with_socket, r"'with_socket': parameter 'connection' is of type socket\.socket.*use str, int.*pydantic"),
        (with_path, r"parameter 'files' is of type pathlib\.Path"),
        (with_keys, r"parameter 'table'.*text keys"),
        (returns, "its result is of type bytes"),
        (yields, "what it yields is of type bytes"),
    ):
        with pytest.raises(InvalidInput, match=said):
            rethaw.agent(function)


def test_pydantic_needs_an_image_that_has_it() -> None:
    def planned(ctx: Context, plan: Plan | None = None) -> None: ...

    with pytest.raises(InvalidInput, match=r"parameter 'plan' .*needs pydantic inside.*pip_install\(\"pydantic\"\)"):
        rethaw.agent(planned)
    rethaw.agent(image=Image.debian().pip_install("openai"))(planned)


def test_names_that_are_for_type_checkers_only() -> None:
    @rethaw.agent
    def later(ctx: Context, price: Decimal) -> None: ...

    with pytest.raises(InvalidInput, match=r"'price' is of type 'Decimal', which cannot be found.*TYPE_CHECKING"):
        later.arguments(price=1)  # type: ignore[arg-type]


def test_a_class_defined_after_its_agent_is_found(tmp_path: Path) -> None:
    file = tmp_path / "later_agent.py"
    file.write_text("""
from __future__ import annotations
import dataclasses, rethaw
@rethaw.agent
def main(ctx: rethaw.Context, a: A) -> A:
    return a
@dataclasses.dataclass
class A:
    n: int
""")
    main = find(file)
    kind = sys.modules["rethaw_agent_later_agent"].A
    assert main.arguments(kind(1)) == {"a": {"n": 1}}
    assert main.local(kind(1)) == kind(1)
    with pytest.raises(InvalidInput, match=r"argument a = 3 does not fit: it is no A"):
        main.arguments(3)


# ---------------------------------------------------------------- whole agents


@rethaw.agent(image=PYDANTIC)
def plan(ctx: Context, step: Step, more: list[Step] | None = None, **rest: Step) -> Plan:
    assert isinstance(step, Step)
    return Plan(firstStep=Step(name=step.name, minutes=len(more or []) + len(rest)))


@rethaw.agent(image=PYDANTIC)
def told(ctx: Context, n: int) -> Generator[Step, None, Step]:
    for number in range(n):
        yield Step(name=str(number))
    return Step(name="last")


@rethaw.agent
class Counter:
    """Counts."""

    def __init__(self, ctx: Context, start: int = 0) -> None:
        self.ctx = ctx
        self.total = start

    def run(self) -> int:
        for message in self.ctx.messages(idle="1d"):
            self.add(int(message.payload))
        return self.total

    def add(self, n: int) -> None:
        self.total += n


@rethaw.agent(name="later")
class Later:
    def __init__(self, ctx: AsyncContext, name: str) -> None:
        assert isinstance(ctx, AsyncContext)
        self.ctx, self.name = ctx, name

    async def run(self) -> str:
        await self.ctx.send(self.name)
        return self.name.upper()


@rethaw.agent
class Steps:
    def __init__(self, ctx: Context, n: int) -> None:
        self.n = n

    def run(self) -> Generator[int, None, str]:
        yield from range(self.n)
        return "done"


@rethaw.agent
class Stream:
    def __init__(self, ctx: AsyncContext) -> None: ...

    async def run(self) -> AsyncIterator[str]:
        yield "a"


def test_models_go_in_and_out() -> None:
    assert plan.local(Step(name="a"), [Step(name="b")], c=Step(name="c")) == Plan(firstStep=Step(name="a", minutes=2))
    assert plan.arguments(Step(name="a"))["step"] == {"name": "a", "minutes": 1}
    with pytest.raises(InvalidInput, match=r"agent 'plan': argument more = .* does not fit\[0\]: name: Field required"):
        plan.arguments(Step(name="a"), [{}])  # type: ignore[list-item]
    ctx = LocalContext()
    assert ctx.run(told, n=2) == Step(name="last")
    assert [message["name"] for message in ctx.outbox] == ["0", "1"]
    assert plan.built({"firstStep": {"name": "a"}}) == PLAN
    with pytest.raises(InvalidInput, match=r"agent 'plan': the result = \{\} does not fit: firstStep"):
        plan.built({})


def test_secrets_do_not_travel_as_stars() -> None:
    class Login(BaseModel):
        password: SecretStr

    with pytest.raises(InvalidInput, match="it holds a secret"):
        typed.dump(Login(password=SecretStr("x")), Login, "x")


def test_classes_keep_their_state_in_memory() -> None:
    ctx = LocalContext(inbox=[1, 2, 39])
    assert ctx.run(Counter, start=1) == 43
    assert (Counter.name, Later.name, Counter.__doc__) == ("Counter", "later", "Counts.")
    assert Later.local("ann") == "ANN"
    assert Steps.local(n=2) == "done"
    assert Stream.local() is None
    ctx = LocalContext()
    assert (ctx.run(Steps, n=2), ctx.run(Stream)) == ("done", None) and ctx.outbox == [0, 1, "a"]
    assert Counter.entry == "test_typed.py::Counter"
    assert Counter.arguments(3) == {"start": 3}
    by_hand = Counter(LocalContext(), start=5)
    by_hand.add(1)
    assert by_hand.total == 6


def test_classes_that_do_not_fit() -> None:
    class NoRun:
        def __init__(self, ctx: Context) -> None: ...

    class NoContext:
        def run(self) -> None: ...

    class Takes:
        def __init__(self, ctx: Context) -> None: ...
        def run(self, goal: str) -> None: ...

    class Wrong:
        def __init__(self, ctx: Context, lock: socket.socket) -> None: ...
        def run(self) -> None: ...

    for cls, said in (
        (NoRun, r"'NoRun' is a class without a method run; write def run\(self\)"),
        (NoContext, r"'NoContext' has no parameter for its Context; write def __init__\(self, ctx"),
        (Takes, r"its run takes goal; take arguments in __init__"),
        (Wrong, r"parameter 'lock' is of type socket\.socket"),
    ):
        with pytest.raises(InvalidInput, match=said):
            rethaw.agent(cls)  # type: ignore[call-overload]


def test_plain_types_need_no_pydantic() -> None:
    code = """
import dataclasses, sys
from rethaw.model import typed
@dataclasses.dataclass
class A:
    n: int
assert typed.build(typed.dump([A(1)], list[A], "x"), list[A], "x") == [A(1)]
print([name for name in sys.modules if name.startswith("pydantic")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
