"""Agents that are Python functions, run as a sandbox runs them: standard library only, whatever Python is there."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from link_fixtures import LIBRARY, guest

from rethaw.control import retries
from rethaw.guest import protocol

RUNNER = (sys.executable, "-S", "-m", "rethaw.guest.runner")  # -S: no site-packages, as in a bare image


async def run(code: str, entry: str = "agent.py::main", **boot: Any) -> tuple[int, list[Any], str, str]:
    """Exit code, results, stdout, stderr."""
    async with guest() as g:
        (g.directory / "agent.py").write_text(code)
        await g.start(*RUNNER, entry, **boot)
        body = await asyncio.wait_for(g.exit, 20)
        return body["code"], g.ops("result"), g.output["stdout"].decode(), g.output["stderr"].decode()


async def test_a_decorated_function() -> None:
    code = """
import rethaw
@rethaw.agent(image=rethaw.Image.debian().apt_install("jq").pip_install("openai").env(A="1"), memory="1GiB", idle_suspend="5s")
def main(ctx: rethaw.Context, topic: str, n: int = 1) -> dict[str, int]:
    print(topic, ctx.args, type(ctx).__name__)
    return {topic: n + 1}
"""
    assert await run(code, args={"topic": "tea", "n": 4}) == (
        0, [{"value": {"tea": 5}}], "tea {'topic': 'tea', 'n': 4} Context\n", "",
    )  # fmt: skip


async def test_a_coroutine_function_without_parentheses_and_without_a_name() -> None:
    code = """
import asyncio, rethaw
@rethaw.agent
async def main(ctx: rethaw.AsyncContext):
    await asyncio.gather(*(ctx.emit("tick", n=n) for n in range(5)))
    return None
"""
    assert await run(code, "agent.py") == (0, [{"value": None}], "", "")


async def test_a_class_with_typed_arguments() -> None:
    code = """
from __future__ import annotations
import dataclasses, rethaw
@rethaw.agent(image=rethaw.Image.from_env(exclude=["x"]).run("true").add_local_dir("nowhere", "/x"))
class Main:
    def __init__(self, ctx: rethaw.AsyncContext, point: Point | None, more: list[Point]) -> None:
        self.sum = sum((p.x for p in more), point.x if point else 0.0)
    async def run(self) -> Point:
        return Point(self.sum)
@dataclasses.dataclass
class Point:
    x: float
"""
    args = {"point": {"x": 1}, "more": [{"x": 2.5}]}
    assert await run(code, "agent.py::Main", args=args) == (0, [{"value": {"x": 3.5}}], "", "")
    status, results, _, err = await run(code, "agent.py::Main", args={"point": {}, "more": []})
    assert (status, results) == (1, []) and err.startswith("rethaw: argument point = {} does not fit: field 'x' is mis")


async def test_an_exception_is_a_traceback_and_exit_status_1() -> None:
    code, results, _, err = await run("def main(ctx):\n    raise ValueError('broken')\n")
    assert (code, results) == (1, [])
    assert 'agent.py", line 2, in main' in err
    assert err.endswith("ValueError: broken\n")


async def test_no_retry_is_said_before_the_end() -> None:
    code = """
import rethaw
@rethaw.agent(retries=rethaw.Retries(max=2, delay="1s"), budget=rethaw.Budget(tokens=5))
def main(ctx):
    raise rethaw.NoRetry("it cannot work")
"""
    async with guest() as g:
        (g.directory / "agent.py").write_text(code)
        await g.start(*RUNNER, "agent.py::main")
        body = await asyncio.wait_for(g.exit, 20)
        assert body["code"] == 1
        (said,) = g.ops("emit")
        assert said["name"] == protocol.NO_RETRY == retries.NO_RETRY and said["data"] == {"error": "it cannot work"}
        assert g.output["stderr"].decode().endswith("rethaw: it cannot work\n")


@pytest.mark.parametrize(
    ("code", "entry", "status", "text"),
    [
        ("def main(ctx): return {1, 2}", "agent.py::main", 1, "the agent's result is not JSON: Object of type set"),
        ("def main(ctx): pass", "none.py::main", 1, "there is no file"),
        ("def main(ctx): pass", "agent.py::other", 1, "has no agent 'other'; it defines: none; write agent.py::NAME"),
        ("main = 1", "agent.py::main", 1, "has no agent 'main'"),
        ("import nothing_like_it", "agent.py::main", 1, "No module named 'nothing_like_it'"),
        ("def main(ctx): import sys; sys.exit(5)", "agent.py::main", 5, ""),
        (
            "def main(ctx, missing): pass",
            "agent.py::main",
            1,
            "missing a required argument: 'missing'; it takes (missing)",
        ),
        ("import rethaw\ndef main(ctx): rethaw.Client()", "agent.py::main", 1, "rethaw.Client is not available inside"),
    ],
)
async def test_what_goes_wrong_is_said(code: str, entry: str, status: int, text: str) -> None:
    got, results, _, err = await run(code, entry)
    assert (got, results) == (status, [])
    assert text in err


async def test_modules_beside_the_agent_are_found() -> None:
    async with guest() as g:
        (g.directory / "agent.py").write_text("import helper\ndef main(ctx): return helper.VALUE\n")
        (g.directory / "helper.py").write_text("VALUE = 42\n")
        await g.start(*RUNNER, "agent.py::main")
        assert (await asyncio.wait_for(g.exit, 20))["code"] == 0
        assert g.ops("result") == [{"value": 42}]


def test_import_rethaw_loads_only_the_standard_library_and_little_of_it() -> None:
    code = "import sys; before = set(sys.modules); import rethaw; print(sorted(set(sys.modules) - before))"
    out = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(LIBRARY)}, check=True, capture_output=True
    )
    assert out.stdout == b"['__future__', 'rethaw']\n"


def test_every_public_name_loads() -> None:
    code = "import rethaw; print([getattr(rethaw, n) for n in rethaw.__all__] and rethaw.errors.__name__)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert out.stdout == b"rethaw.model.errors\n"
    code = "import rethaw\ntry: rethaw.nothing\nexcept AttributeError as e: print(e)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert out.stdout == b"module 'rethaw' has no attribute 'nothing'\n"


def _pythons() -> list[str]:
    found = [shutil.which(f"python3.{n}") for n in (9, 10, 12, 13)]
    found += [str(p) for p in Path("/root/.pyenv/versions").glob("3.*/bin/python3") if _minor(p) >= 9]
    usable = {p for p in found if p and subprocess.run([p, "-c", ""], capture_output=True, check=False).returncode == 0}
    return sorted(usable)


def _minor(path: Path) -> int:
    return int(path.parent.parent.name.split(".")[1])


@pytest.mark.parametrize("python", _pythons() or [sys.executable])
async def test_guestd_and_agents_under_other_pythons(python: str) -> None:
    """Python 3.9 and newer, both as guestd's and as the agent's."""
    code = """
import rethaw
@rethaw.agent
async def main(ctx: rethaw.AsyncContext):
    import sys
    await ctx.emit("version", minor=sys.version_info[1])
    return (await ctx.receive()).payload
"""
    async with guest(python) as g:

        async def receive(call: str, body: dict[str, Any]) -> Any:
            return {"number": 1, "id": "m_1", "payload": "hi"}

        g.answers["receive"] = receive
        (g.directory / "agent.py").write_text(code)
        await g.start(python, "-S", "-m", "rethaw.guest.runner", "agent.py::main")
        await g.thaw("g-1")
        body = await asyncio.wait_for(g.exit, 30)
        assert body == {"code": 0, "signal": None}, g.output["stderr"].decode()
        assert g.ops("result") == [{"value": "hi"}]
