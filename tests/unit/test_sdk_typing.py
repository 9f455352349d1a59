"""What a type checker sees of the SDK: arguments and results of the user's own function."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import rethaw

CODE = """
from collections.abc import AsyncIterator, Generator
import rethaw
from pydantic import BaseModel
from rethaw import Image

@rethaw.agent(image=Image.debian(), memory="1GiB")
async def ask(ctx: rethaw.AsyncContext, question: str, n: int = 1) -> str:
    return question

@rethaw.agent
def plain(ctx: rethaw.Context, a: int) -> dict[str, int]:
    return {"a": a}

@rethaw.agent
def steps(ctx: rethaw.Context, n: int) -> Generator[str, None, int]:
    yield "one"
    return n

@rethaw.agent()
async def told(ctx: rethaw.AsyncContext) -> AsyncIterator[str]:
    yield "one"

@rethaw.agent
def family(ctx: rethaw.Context) -> None:
    reveal_type(ctx.spawn(plain, a=1).result())
    reveal_type(ctx.spawn("other", x=1))
    reveal_type(ctx.wait_any(ctx.inbox, ctx.spawn(steps, 1), "go"))
    ctx.spawn(plain, a="1")

async def cousins(ctx: rethaw.AsyncContext) -> None:
    child = await ctx.spawn(ask, "x")
    reveal_type(await child.result())
    reveal_type(await ctx.history("openai"))
    await ctx.spawn(ask)

class Plan(BaseModel):
    steps: list[str]

@rethaw.agent(image=Image.debian().pip_install("pydantic"))
class Planner:
    def __init__(self, ctx: rethaw.Context, goal: str, depth: int = 1) -> None:
        self.goals = [goal] * depth
    def run(self) -> Plan:
        return Plan(steps=self.goals)

@rethaw.agent
class Later:
    def __init__(self, ctx: rethaw.AsyncContext, goal: str) -> None:
        self.ctx = ctx
    async def run(self) -> int:
        await self.ctx.send("x")
        return 1

@rethaw.agent
class Steps:
    def __init__(self, ctx: rethaw.Context) -> None: ...
    def run(self) -> Generator[str, None, float]:
        yield "one"
        return 1.5

@rethaw.agent()
class Told:
    def __init__(self, ctx: rethaw.AsyncContext) -> None: ...
    async def run(self) -> AsyncIterator[int]:
        yield 1

@rethaw.agent(image=Image.debian().pip_install("pydantic"))
def planned(ctx: rethaw.Context, plan: Plan, more: list[Plan] | None = None) -> Plan:
    return plan

reveal_type(Planner.start)
reveal_type(Planner.start("x").result().steps)
reveal_type(Later.local("x"))
reveal_type(Steps.start().result())
reveal_type(Told.local())
reveal_type(planned.start(Plan(steps=[])).result())
reveal_type(steps.start(n=1).result())
reveal_type(told.start().result())
reveal_type(steps.local(n=1))
reveal_type(ask.local("x"))
reveal_type(ask.start)
reveal_type(ask.start("x", n=2).result())
reveal_type(plain.with_options(key="k").start(a=1))
async def later() -> None:
    reveal_type(await (await ask.aio.start("x")).result())
reveal_type(rethaw.Agent.from_name("x", version=2).start(any=1))
ask.start(3)
plain.start()
plain.start(a=1, b=2)
Planner.start()
planned.start({})
"""
REVEALED = [
    "dict[str, int]",
    "Child[Any]",
    "Signal | Message | Timer | Child[Any]",
    "str",
    "Messages",
    "(goal: str, depth: int = 1) -> Session[Plan]",
    "list[str]",
    "int",
    "float",
    "None",
    "Plan",
    "int",
    "None",
    "int",
    "str",
    "(question: str, n: int = 1) -> Session[str]",
    "str",
    "Session[dict[str, int]]",
    "str",
    "Session[Any]",
]


def test_types_are_those_of_the_function(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(CODE)
    source = str(Path(rethaw.__file__).parents[1])
    config = {"typeCheckingMode": "strict", "extraPaths": [source]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = json.loads(done.stdout)["generalDiagnostics"]
    told = [d["message"].split(" is ", 1)[1].strip('"') for d in found if d["severity"] == "information"]
    assert told == REVEALED
    lines = CODE.splitlines()
    wrong = list(dict.fromkeys(lines[d["range"]["start"]["line"]] for d in found if d["severity"] == "error"))
    assert [line.strip() for line in wrong] == [
        'ctx.spawn(plain, a="1")', "await ctx.spawn(ask)", "ask.start(3)", "plain.start()", "plain.start(a=1, b=2)",
        "Planner.start()", "planned.start({})",
    ]  # fmt: skip
