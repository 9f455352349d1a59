"""The SDK against a real server: both clients, typed handles, streams that outlive the server."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rethaw.model.enums import State
from rethaw.model.errors import Conflict, KeyReused, NotFound, SessionFailed, Unauthorized, Unavailable, WaitTimeout
from rethaw.sdk import AsyncClient, Client
from rethaw.sdk.agents import find
from rethaw.testing.server import RunningServer

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
AGENT = """
import rethaw, shouting_beside
@rethaw.agent
def echo(ctx: rethaw.Context, greeting: str = "hi") -> int:
    count = 0
    for message in ctx.messages(idle="1h"):
        if message.payload is None:
            return count
        count += 1
        ctx.send([shouting_beside.shout(greeting), message.payload])
@rethaw.agent
async def fails(ctx: rethaw.AsyncContext) -> None:
    raise ValueError("on purpose")
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
    path = tmp_path_factory.mktemp("agent") / "echo_agent.py"
    path.write_text(AGENT)
    (path.parent / "shouting_beside.py").write_text("def shout(text): return text.upper()")
    return path


def test_start_talk_and_result(client: Client, file: Path) -> None:
    echo = find(file, "echo").with_options(key="talk")
    session = echo.start_on(client, greeting="hey")
    assert echo.start_on(client, greeting="hey").id == session.id
    with pytest.raises(KeyReused):
        echo.start_on(client, greeting="other")
    payload = {"text": "a\0b\ud800 é", "number": 1.5}
    session.send(payload, idempotency_key="one")
    assert session.send(payload, idempotency_key="one").number == 1
    (answer,) = session.outbox(wait="60s")
    assert answer.payload == ["HEY", payload]
    with pytest.raises(WaitTimeout):
        session.result(timeout=0.2)
    session.send(None)
    assert session.result(timeout="60s") == 1
    assert session.refresh().state is State.COMPLETED and session.detail().stats.snapshots > 0
    seqs = [event.seq for event in session.events(all_lines=True)]
    assert seqs == list(range(1, len(seqs) + 1))
    assert [s.id for s in client.sessions.list(agent="echo", state="completed")] == [session.id]
    session.delete()
    with pytest.raises(NotFound):
        session.refresh()


def test_a_failure_is_raised_with_its_reason(client: Client, file: Path) -> None:
    session = find(file, "fails").start_on(client)
    with pytest.raises(SessionFailed) as caught:
        session.result(timeout="60s")
    assert caught.value.details["session"] == session.id and caught.value.details["exit_code"] == 1
    assert b"on purpose" in session.logs(stream="stderr")
    with pytest.raises(Conflict):
        session.suspend()


def test_errors_of_the_connection(server: RunningServer, client: Client) -> None:
    with pytest.raises(Unauthorized), Client(server.url, "wrong") as stranger:
        stranger.sessions.list()
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1.*rethaw up"), Client("http://127.0.0.1:1", "x") as nobody:
        nobody.sessions.list()
    assert client.health()["ok"] and client.nodes()


async def test_async_is_the_same(server: RunningServer, file: Path) -> None:
    async with AsyncClient(server.url, server.token) as client:
        session = await find(file, "echo").aio.start_on(client, greeting="a")
        seen: list[str] = []

        async def watch() -> None:
            async for event in session.events(follow=True):
                seen.append(event.type.value)

        watching = asyncio.ensure_future(watch())
        await session.send("x")
        assert [m.payload for m in await session.outbox(wait="60s")] == [["A", "x"]]
        await session.suspend()
        async with asyncio.timeout(60):
            while (await session.refresh()).state is not State.SUSPENDED:  # noqa: ASYNC110 - another process's state
                await asyncio.sleep(0.05)
        await session.resume()
        await session.send(None)
        assert await session.result("60s") == 1
        await asyncio.wait_for(watching, 30)
        assert seen[0] == "session.created" and "snapshot.restored" in seen and "session.result" in seen
        with pytest.raises(NotFound):
            await client.sessions.get("s_nothing")


def test_streams_and_results_outlive_the_server(server: RunningServer, file: Path) -> None:
    gaps: list[Unavailable] = []
    with Client(server.url, server.token, patience="120s", on_gap=gaps.append) as client:
        session = find(file, "echo").start_on(client)
        seqs: list[int] = []
        seen_some = threading.Event()

        def watch() -> None:
            for event in client.sessions.stream(session.id):
                seqs.append(event.seq)
                seen_some.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert seen_some.wait(60)
        session.send("x")
        assert session.outbox(wait="60s")
        server.kill9()
        restart = threading.Thread(target=server.start)
        restart.start()
        assert [m.payload for m in session.outbox(wait="60s")] == [["HI", "x"]]
        restart.join()
        session.send(None)
        assert session.result(timeout="60s") == 1
        watcher.join(60)
        assert not watcher.is_alive() and gaps
        on_path = [event.seq for event in session.events()]
        assert len(seqs) == len(set(seqs)) and seqs == sorted(seqs) and set(on_path) <= set(seqs)
