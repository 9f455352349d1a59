"""The example agent without Rethaw around it: its loop and the scripted side agree, for both kinds of client."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rethaw.testing.provider import ScriptedProvider, load_script

CODER = Path(__file__).parents[2] / "examples" / "coder"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"coder_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Context:
    """Approves, and remembers what was emitted."""

    def __init__(self, approved: bool) -> None:
        self.approved = approved
        self.emitted: dict[str, Any] = {}

    async def wait(self, name: str, *, timeout: str) -> Any:
        assert (name, timeout) == ("approval", "3d")
        return SimpleNamespace(payload={"approved": self.approved})

    async def emit(self, name: str, **data: Any) -> None:
        self.emitted[name] = data


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    yield monkeypatch


@pytest.mark.parametrize("model", ["openai:any", "anthropic:any"])
@pytest.mark.parametrize("approved", [True, False])
async def test_demo_agent_and_script(
    model: str, approved: bool, tmp_path: Path, environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In a sandbox port 8000 is always free; here it need not be.
    path = tmp_path / "script.py"
    path.write_text((CODER / "script.py").read_text().replace("8000", str(free_port())))
    script = load(path)
    project = tmp_path / "project"
    project.mkdir()
    async with ScriptedProvider(load_script(str(path))) as provider:
        for name, value in {
            "MODEL": model,
            "OPENAI_BASE_URL": provider.openai_url,
            "OPENAI_API_KEY": "k",
            "ANTHROPIC_BASE_URL": provider.anthropic_url,
            "ANTHROPIC_API_KEY": "k",
        }.items():
            environment.setenv(name, value)
        agent = load(CODER / "agent.py")
        environment.setattr(agent, "PROJECT", project)
        ctx = Context(approved)
        answer = await agent.coder(ctx, goal="a counting server")
    assert "[start_server]" in capsys.readouterr().out, "the demo looks for this"
    if not approved:
        assert answer == "Not approved, so I stop here."
        return
    assert answer.startswith("I made a server"), "the demo looks for this"
    assert "has served 4 requests" in answer
    assert provider.count == script.TURNS
    assert ctx.emitted["files"]["sha256"] == script.SHA256


def test_demo_hello_is_ten_lines() -> None:
    hello = (CODER.parent / "hello.py").read_text()
    assert len([line for line in hello.splitlines() if line.strip()]) <= 10
