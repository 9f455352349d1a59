"""What MCP clients see without a server: tools with schemas, errors with remedies, which files and addresses are let in."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from mcp_types import CallToolResult
from starlette.testclient import TestClient

from rethaw.cli import app
from rethaw.cli.main import main
from rethaw.mcp.connection import Connection
from rethaw.mcp.local import AgentsDir
from rethaw.mcp.server import PATH, Door, build, listen, security
from rethaw.model.errors import InvalidInput

ROOT = Path(__file__).resolve().parents[2]
AGENT = '''
import rethaw
from rethaw import agent
raise RuntimeError("imported")

@rethaw.agent(memory="1GiB")
async def asks(ctx: rethaw.AsyncContext, topic: str, depth: int = 3, *, tags: list[str] | None = None) -> str:
    """Asks about a topic.

    More."""

@agent
def plain(ctx): ...

@other.agent
def no(ctx): ...
'''


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("RETHAW_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("RETHAW_TOKEN", "a-token")


async def call(name: str, agents: AgentsDir | None = None, **arguments: Any) -> CallToolResult:
    async with Client(build(Connection(), agents)) as client:
        return await client.call_tool(name, arguments)


def text(result: CallToolResult) -> str:
    return "".join(getattr(part, "text", "") for part in result.content)


async def test_every_tool_says_what_it_takes_gives_and_does() -> None:
    async with Client(build(Connection(), AgentsDir(Path()))) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert {"session_start_command", "session_start_agent", "session_watch", "session_fork", "snapshot_read"} <= set(
        tools
    )
    for tool in tools.values():
        assert tool.description and "\n" not in tool.description and tool.output_schema and tool.annotations, tool.name
        assert tool.output_schema["type"] == "object"
        for argument, schema in tool.input_schema["properties"].items():
            known = argument in ("limit", "stream", "path", "deep", "name", "last_bytes")
            assert known or "description" in schema, (tool.name, argument)
    ends = {name for name, tool in tools.items() if tool.annotations and tool.annotations.destructive_hint}
    assert ends == {"session_cancel", "session_rewind"}
    without = {tool.name for tool in await build(Connection()).list_tools()}
    assert set(tools) - without == {"agent_list", "session_start_agent"}


async def test_the_documented_tools_are_those_there_are_and_the_configurations_start_them() -> None:
    body = (ROOT / "docs" / "mcp.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| .* \|$", body, re.MULTILINE)
    tools = {tool.name for tool in await build(Connection(), AgentsDir(Path())).list_tools()}
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == tools
    local, remote = (
        json.loads(block)["mcpServers"]["rethaw"] for block in re.findall(r"```json\n(.*?)```", body, re.DOTALL)
    )
    parsed = app.build().parse_args([*local["args"]], exit_on_error=False, print_error=False)
    assert local["command"] == "rethaw" and parsed[0].__name__ == "mcp"
    assert remote["url"].endswith(PATH) and remote["headers"]["Authorization"] == "Bearer ${RETHAW_TOKEN}"


async def test_an_error_says_what_to_do() -> None:
    result = await call("session_why", session="s_1")
    assert result.is_error and result.structured_content is None
    assert text(result).startswith("no Rethaw server answers at http://127.0.0.1:1; start it with `sudo rethaw up`")
    assert result.meta and result.meta["rethaw/error"]["code"] == "unavailable"
    for name, arguments, said in (
        ("session_why", {"session": ""}, "'' is not an id"),
        ("session_start_command", {"command": []}, "at least 1 item"),
        ("session_start_command", {"command": ["x"], "memory": "lots"}, "'lots'"),
        ("session_start_command", {"command": ["x"], "apt": ["a b"]}, "'a b' is not a Debian package name"),
        ("session_watch", {"session": "s_1", "wait_s": 3600}, "less than or equal to 50"),
        ("session_result", {"session": "s_1"}, "no Rethaw server answers"),
    ):
        result = await call(name, **arguments)
        assert result.is_error and said in text(result), (name, text(result))


async def test_agents_are_listed_unread_and_only_those_below_the_directory_start(tmp_path: Path) -> None:
    root = tmp_path / "agents"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "asks.py").write_text(AGENT)
    (root / "broken.py").write_text("def (")
    (root / ".hidden.py").write_text(AGENT)
    (tmp_path / "outside.py").write_text(AGENT)
    (root / "link.py").symlink_to(tmp_path / "outside.py")
    agents = AgentsDir(root)
    result = await call("agent_list", agents)
    listed = {(a["file"], a["agent"]): a for a in (result.structured_content or {})["agents"]}
    mine = listed["deep/asks.py", "asks"]
    assert mine["arguments"] == "topic: str, depth: int = 3, tags: list[str] | None = None"
    assert mine["about"] == "Asks about a topic." and listed["deep/asks.py", "plain"]["arguments"] == ""
    assert {agent for file, agent in listed if file == "deep/asks.py"} == {"asks", "plain"}
    for file, said in (
        ("../outside.py", "is outside of"),
        ("link.py", "is outside of"),
        (str(tmp_path / "outside.py"), "is outside of"),
        ("nowhere.py", "there is no file 'nowhere.py'"),
        ("deep/asks.py", "cannot be imported: RuntimeError: imported; correct it"),
    ):
        result = await call("session_start_agent", agents, file=file)
        assert result.is_error and said in text(result), (file, text(result))
    with pytest.raises(InvalidInput, match="is no directory"):
        AgentsDir(tmp_path / "none")


def test_the_door_wants_the_token_of_the_moment_and_the_right_host(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = Connection()
    inner = build(connection).streamable_http_app(
        stateless_http=True, transport_security=security("127.0.0.1", 7421, ["mcp.example.org"])
    )
    hello = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    good = {
        "authorization": "Bearer a-token",
        "accept": "application/json, text/event-stream",
        "host": "127.0.0.1:7421",
    }
    with TestClient(Door(inner, lambda: connection.token)) as client:

        def status(path: str = "/mcp", **headers: str | None) -> int:
            sent = {k: v for k, v in (good | headers).items() if v is not None}
            return client.post(path, json=hello, headers=sent).status_code

        assert status() == 200
        refused = client.post("/mcp", json=hello)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "unauthorized"
        for header in (None, "Bearer", "Bearer ", "Bearer a-tokem", "Basic a-token", "a-token"):
            assert status(authorization=header) == 401, header
        assert status(path="/elsewhere", authorization=None) == 401
        assert client.get("/mcp").status_code == client.delete("/mcp").status_code == 401
        for host in ("evil.example", "127.0.0.1:80", "127.0.0.1", "evil.example:7421", "127.0.0.1:7421.evil.example"):
            assert status(host=host) == 421, host
        newest = {"mcp-protocol-version": "2026-07-28", "mcp-method": "tools/list"}
        assert status(host="evil.example", **newest) == 421 and status(origin="http://evil.example", **newest) == 403
        for host in ("localhost:7421", "[::1]:7421", "mcp.example.org"):
            assert status(host=host) == 200, host
        for origin in ("http://evil.example", "null", "http://127.0.0.1:7421.evil.example", "http://127.0.0.1:80"):
            assert status(origin=origin) == 403, origin
        assert status(origin="http://127.0.0.1:7421") == status(origin="https://mcp.example.org") == 200
        monkeypatch.setenv("RETHAW_TOKEN", "another")
        assert status() == 401 and status(authorization="bearer another") == 200
        monkeypatch.delenv("RETHAW_TOKEN")
        assert status(authorization="Bearer ") == status(authorization="Bearer None") == 401


@pytest.mark.parametrize("address", ["", "7421", "127.0.0.1", ":7421", "127.0.0.1:x", "127.0.0.1:99999", "no such:1"])
def test_addresses_that_are_none(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mcp", f"--http={address}"]) == 2
    said = capsys.readouterr().err
    assert "internal" not in said and ("write it like" in said or "name another address" in said)


def test_what_the_command_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["mcp", "--http", f"127.0.0.1:{port}"]) == 2
        assert f"127.0.0.1:{port} cannot be listened on: Address already in use" in capsys.readouterr().err
    assert main(["mcp", "--allow-host", "x"]) == 2
    assert main(["mcp", "--agents", "/nowhere"]) == 2
    assert main(["mcp", "--http", "127.0.0.1:0", "--allow-host", "http://x"]) == 2
    monkeypatch.delenv("RETHAW_TOKEN")
    assert main(["mcp", "--http", "127.0.0.1:0"]) == 3
    assert "no token to ask MCP clients for; start the server with `sudo rethaw up`" in capsys.readouterr().err
    listen("[::1]:0").close()


@pytest.mark.parametrize("end", ["interrupt", "eof"])
def test_it_ends_with_its_client(end: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rethaw.cli.main", "mcp"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    request = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["result"]["serverInfo"]["name"] == "rethaw"
    if end == "interrupt":
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20) if end == "eof" else (None, b"")
    assert process.wait(20) == (0 if end == "eof" else -signal.SIGINT) and said == b""
