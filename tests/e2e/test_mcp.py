"""`rethaw mcp` with the official client over both transports, against a real server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from rethaw.testing import AgentServer

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "rethaw.cli.main", "mcp"]
AGENT = '''
import os
import rethaw

if "RETHAW_SOCKET" not in os.environ:
    print("imported on this machine")  # must not get between client and server

@rethaw.agent
def echo(ctx: rethaw.Context, greeting: str = "hi") -> dict[str, object]:
    """Says everything again."""
    open("/root/notes.txt", "w").write("kept: é")
    print("up", flush=True)
    for count, message in enumerate(ctx.messages(idle="1h")):
        if message.payload == "stop":
            break
        ctx.send([greeting, message.payload])
    return {"answered": count, "approved": ctx.wait("approval").payload}
'''


@pytest.fixture(scope="module")
def server() -> Iterator[AgentServer]:
    running = AgentServer().open()
    try:
        yield running
    finally:
        running.close()


@pytest.fixture
def env(server: AgentServer, tmp_path: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH")}
    return kept | {"HOME": str(tmp_path), "RETHAW_URL": server.url, "RETHAW_TOKEN": server.token}


class Caller:
    """Structured results of tools; an error is raised with its text."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def __call__(self, tool: str, **arguments: Any) -> Any:
        result = await self.client.call_tool(tool, arguments)
        text = "".join(getattr(part, "text", "") for part in result.content)
        if result.is_error:
            raise AssertionError(text)
        assert json.loads(text) == result.structured_content
        return result.structured_content

    async def until(self, session: str, state: str) -> None:
        async with asyncio.timeout(60):
            while (await self("session_show", session=session))["session"]["state"] != state:  # noqa: ASYNC110 - another process's
                await asyncio.sleep(0.05)


@asynccontextmanager
async def stdio(env: dict[str, str], *args: str) -> AsyncIterator[Caller]:
    given = StdioServerParameters(command=COMMAND[0], args=[*COMMAND[1:], *args], env=env)
    async with Client(given, read_timeout_seconds=90) as client:
        yield Caller(client)


async def test_a_session_from_beginning_to_end_over_stdio(
    env: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "echo.py").write_text(AGENT)
    async with stdio(env, "--agents", str(tmp_path)) as call:
        assert "durable sessions" in (call.client.instructions or "")
        (known,) = (await call("agent_list"))["agents"]
        assert known["about"] == "Says everything again." and known["arguments"] == "greeting: str = 'hi'"
        one = {"file": "echo.py", "arguments": {"greeting": "hey"}, "key": "one"}
        session = (await call("session_start_agent", **one))["id"]
        assert (await call("session_start_agent", **one))["id"] == session
        with pytest.raises(AssertionError, match=r"agent 'echo'.*greet.*it takes"):
            await call("session_start_agent", file="echo.py", arguments={"greet": "hey"})

        # talking
        payload = {"text": "a", "n": 1.5}
        sent = await call("session_send", session=session, payload=payload, idempotency_key="k")
        assert (await call("session_send", session=session, payload=payload, idempotency_key="k")) == sent
        answer = await call("session_outbox", session=session, wait_s=50)
        assert [m["payload"] for m in answer["messages"]] == [["hey", {"text": "a", "n": 1.5}]] and answer["next"] == 1
        assert (await call("session_output", session=session)) == {"text": "up\n", "bytes": 3, "cut": False}
        why = await call("session_why", session=session)
        assert why["waiting_for"][0]["kind"] == "inbox"

        # watching: all there is, then what comes
        seen = await call("session_watch", session=session, limit=1000)
        assert [e["seq"] for e in seen["events"]] == list(range(1, seen["next"] + 1)) and not seen["over"]
        assert {"session.created", "message.sent", "snapshot.created"} <= {e["type"] for e in seen["events"]}
        assert next(e["body"] for e in seen["events"] if e["type"] == "output") == "up\n"
        waiting = asyncio.ensure_future(
            call("session_watch", session=session, after=seen["next"], types=["message.received"], wait_s=50)
        )
        await asyncio.sleep(0.2)  # so that it waits; it is right in any case
        await call("session_send", session=session, payload="b")
        (event,) = (await waiting)["events"]
        assert event["type"] == "message.received" and json.loads(event["body"]) == "b"
        await call("session_outbox", session=session, after=1, wait_s=50)

        # back and forth in time
        taken = await call("session_snapshot", session=session)
        assert taken["id"] in [s["id"] for s in (await call("snapshot_list", session=session))["snapshots"]]
        assert (await call("snapshot_read", snapshot=taken["id"], path="/root/notes.txt"))["text"] == "kept: é"
        files = (await call("snapshot_files", snapshot=session, path="/root"))["files"]
        assert {"path": "/root/notes.txt", "kind": "file", "size": 8} in files
        (forked,) = (await call("session_fork", session=session, at=taken["id"]))["sessions"]
        assert forked["forked_from"] == session
        await call("session_send", session=forked["id"], payload="c")
        other = await call("session_outbox", session=forked["id"], after=2, wait_s=50)
        assert [m["payload"] for m in other["messages"]] == [["hey", "c"]]
        await call("session_cancel", session=forked["id"], now=True)
        await call.until(forked["id"], "cancelled")
        assert (await call("session_result", session=forked["id"], wait_s=5))["detail"] == "cancelled"

        # frozen and thawed
        await call("session_suspend", session=session)
        await call.until(session, "suspended")
        assert session in [s["id"] for s in (await call("session_list", state="suspended"))["sessions"]]
        await call("session_resume", session=session)
        assert not (await call("session_result", session=session))["over"]
        await call("session_send", session=session, payload="stop")
        await call("session_signal", session=session, name="approval", payload=True)
        result = await call("session_result", session=session, wait_s=50)
        assert result["over"] and result["result"] == {"answered": 2, "approved": True}
        end = await call("session_watch", session=session, after=seen["next"], limit=1000, wait_s=50)
        assert end["over"] and end["events"][-1]["seq"] == end["next"]
        assert (await call("session_watch", session=session, after=end["next"], wait_s=50)) == {
            "events": [], "next": end["next"], "state": "completed", "over": True
        }  # fmt: skip
        back = await call("session_rewind", session=session, to=taken["id"])
        assert not back["over"]
        with pytest.raises(AssertionError, match=r"'s_nobody'|s_nobody"):
            await call("session_show", session="s_nobody")

        # resources
        shown = await call.client.read_resource(f"rethaw://sessions/{session}")
        assert json.loads(getattr(shown.contents[0], "text", ""))["session"]["agent"] == "echo"
        logged = await call.client.read_resource(f"rethaw://sessions/{session}/events")
        lines = [json.loads(line) for line in getattr(logged.contents[0], "text", "").splitlines()]
        assert lines[0]["seq"] == 1 and lines[0]["type"] == "session.created"
        with pytest.raises(MCPError, match="s_nobody"):
            await call.client.read_resource("rethaw://sessions/s_nobody")
    assert "Failed to parse" not in caplog.text


def documented_client() -> Any:
    """`run` of the example in docs/mcp.md."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "mcp.md").read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {"__name__": "mcp_client"}  # mcp_client.py of the page
    exec(code, names)
    return names["run"]


async def test_the_same_over_http_behind_its_token(
    env: dict[str, str], server: AgentServer, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(  # noqa: ASYNC220 - it only starts
        [*COMMAND, "--http", "127.0.0.1:0", "--json"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        url = json.loads(await asyncio.to_thread(process.stdout.readline))["url"]
        async with httpx2.AsyncClient() as stranger:
            assert (await stranger.post(url, json={})).status_code == 401
            wrong = {"authorization": "Bearer wrong"}
            assert (await stranger.post(url, json={}, headers=wrong)).status_code == 401
        run = await asyncio.to_thread(documented_client)
        await run(url, server.token)
        assert "'state': 'completed'" in (told := capsys.readouterr().out) and "'text': 'hello\\n'" in told
        headers = {"authorization": f"Bearer {server.token}"}
        for mode in ("auto", "legacy"):
            async with (
                httpx2.AsyncClient(headers=headers, timeout=90) as http,
                Client(streamable_http_client(url, http_client=http), mode=mode) as client,
            ):
                call = Caller(client)
                assert "session_start_agent" not in [t.name for t in (await client.list_tools()).tools]
                program = ["sh", "-c", "echo begun; sleep 1; echo $WORD >&2; exit 3"]
                session = (await call("session_start_command", command=program, env={"WORD": "é"}, name="prog"))["id"]
                seen, after, over = [], 0, False
                while not over:
                    page = await call("session_watch", session=session, after=after, wait_s=50, limit=5)
                    after, over = page["next"], page["over"]
                    seen += [event["seq"] for event in page["events"]]
                assert seen == list(range(1, after + 1))
                result = await call("session_result", session=session)
                assert result["state"] == "failed" and result["exit_code"] == 3 and result["detail"]
                output = await call("session_output", session=session, stream="both", last_bytes=3)
                assert output == {"text": "é\n", "bytes": 9, "cut": True}
    finally:
        process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait, 20)
        said = process.stderr.read()
    assert (code, said) == (0, "")


async def test_the_server_may_go_and_come(env: dict[str, str], server: AgentServer) -> None:
    async with stdio(env) as call:
        session = (await call("session_start_command", command=["sleep", "600"]))["id"]
        server.server.kill9()
        with pytest.raises(AssertionError, match=r"no Rethaw server answers at .*; start it with `sudo rethaw up`"):
            await call("session_list")
        await asyncio.to_thread(server.server.restart)
        assert session in [one["id"] for one in (await call("session_list"))["sessions"]]
        await call("session_cancel", session=session, now=True)


async def test_a_deployed_agent_is_started_by_its_name(
    env: dict[str, str], server: AgentServer, tmp_path: Path
) -> None:
    (tmp_path / "echo.py").write_text(AGENT)
    server.client.agents.deploy(tmp_path / "echo.py")
    async with stdio(env) as call:
        (told,) = [one for one in (await call("deployed_list"))["agents"] if one["name"] == "echo"]
        assert told["version"] == 1 and told["arguments"]["properties"]["greeting"]["type"] == "string"
        with pytest.raises(AssertionError, match="agent echo: argument greeting = 7 does not fit"):
            await call("session_start_deployed", agent="echo", arguments={"greeting": 7})
        started = await call("session_start_deployed", agent="echo", arguments={"greeting": "yo"}, key="deployed")
        await call("session_send", session=started["id"], payload="x")
        answer = await call("session_outbox", session=started["id"], wait_s=50)
        assert answer["messages"][0]["payload"] == ["yo", "x"]
        with pytest.raises(AssertionError, match="'nobody'"):
            await call("session_start_deployed", agent="nobody")
        await call("session_cancel", session=started["id"], now=True)
