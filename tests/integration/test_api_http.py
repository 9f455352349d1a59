"""The HTTP API over a real server and PostgreSQL: every route, every kind of bad input, streams."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import logging
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from control_fixtures import (  # noqa: F401 - fixtures
    AGENT,
    World,
    cluster_fixture,
    dsn_fixture,
    eventually,
    world_fixture,
)

from rethaw.api.app import create_app
from rethaw.model.enums import EventType, Reason, State
from rethaw.model.ids import new_id
from rethaw.model.types import (
    MESSAGE_LIMIT,
    AgentSpec,
    Chunk,
    Event,
    Fence,
    RequestMeta,
    ResponseHead,
    SessionView,
    WaitSpec,
)

S = State
TOKEN = "correct horse"
AGENT_JSON = json.loads(AGENT.model_dump_json())


@dataclass
class Api:
    w: World
    url: str
    http: httpx.AsyncClient
    blobs: Path
    crashes: list[tuple[str, str]] = field(default_factory=list)

    async def get(self, path: str, **params: Any) -> Any:
        answer = await self.http.get(path, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def post(self, path: str, body: Any = None) -> Any:
        answer = await self.http.post(path, json=body)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()


@pytest.fixture(name="api")
async def api_fixture(w: World, tmp_path: Path) -> AsyncIterator[Api]:
    crashes: list[tuple[str, str]] = []

    async def crash_hook(session: str, what: str) -> None:
        crashes.append((session, what))

    async def doctor_hook() -> Any:
        return [{"engine": "gvisor", "ok": True}]

    app = create_app(
        w.control, w.log, w.catalog, token=TOKEN, crash_hook=crash_hook, doctor_hook=doctor_hook,
        blobs_dir=tmp_path / "code", public_url="http://rethaw.test", heartbeat_s=0.2,
    )  # fmt: skip
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    server.install_signal_handlers = lambda: None  # type: ignore[method-assign]
    serving = asyncio.create_task(server.serve([sock]))
    await eventually(lambda: _started(server))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=20, trust_env=False) as http:
        yield Api(w, url, http, tmp_path / "code", crashes)
    server.should_exit = True
    await serving


async def _started(server: uvicorn.Server) -> bool:
    return server.started


def error_of(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error, which is one clear line and no traceback."""
    assert answer.status_code == status, answer.text
    found = answer.json()["error"]
    assert found["code"] == code, found
    assert found["message"] and "\n" not in found["message"]
    assert "Traceback" not in answer.text and 'File "' not in answer.text
    assert set(found) == {"code", "message", "remedy", "details"}
    return found


# ---------------------------------------------------------------- sessions


async def test_start_show_list(api: Api) -> None:
    body = {"agent": AGENT_JSON, "args": {"n": 1}, "key": "k"}
    answer = await api.http.post("/v1/sessions", json=body)
    assert answer.status_code == 201
    view = SessionView.model_validate_json(answer.content)
    assert view.agent == AGENT and view.key == "k"
    again = await api.http.post("/v1/sessions", json=body)
    assert again.status_code == 200 and again.json()["id"] == view.id
    error_of(await api.http.post("/v1/sessions", json={**body, "args": {"n": 2}}), 409, "key_reused")
    shown = await api.get(f"/v1/sessions/{view.id}")
    assert shown["stats"]["crashes"] == 0
    assert shown["attempts"] == [] and shown["budget"] is None and shown["spent"]["tokens"] == 0
    for name in ("stats", "attempts", "budget", "spent"):
        shown.pop(name)
    SessionView.model_validate(shown)
    assert (await api.get(f"/v1/sessions/{view.id[:-1]}"))["id"] == view.id
    assert [s["id"] for s in (await api.get("/v1/sessions", state="starting"))["sessions"]] == [view.id]
    assert (await api.get("/v1/sessions", agent="nobody")) == {"sessions": [], "next": None}
    why = await api.get(f"/v1/sessions/{view.id}/why")
    assert why["state"] == "starting" and why["last_snapshot"] is None


async def test_the_life_of_a_session(api: Api) -> None:
    w = api.w
    session, fence = await w.start()
    path = f"/v1/sessions/{session}"
    assert (await api.post(f"{path}/suspend"))["desired"] == "suspended"
    await w.node.one("suspend", session)
    await w.sleep(fence, Reason.REQUESTED)
    assert (await api.get(f"{path}/why"))["waiting_for"][0]["kind"] == "person"
    assert (await api.post(f"{path}/resume", {}))["state"] == "resuming"
    _, fence = await w.back(session)
    assert (await api.post(f"{path}/crash", {"what": "sandbox"}))["state"] == "running"
    await w.node.one("crash", session)
    await api.post(f"{path}/crash", {"what": "db"})
    assert api.crashes == [(session, "db")]
    taking = asyncio.create_task(api.post(f"{path}/snapshots", {}))
    await w.node.one("snapshot", session)
    info = await w.save(fence, why="requested")
    assert (await taking)["id"] == info.id
    assert info.id in [s["id"] for s in (await api.get(f"{path}/snapshots"))["snapshots"]]
    error_of(await api.http.delete(path), 409, "conflict")
    assert (await api.post(f"{path}/cancel", {"now": True}))["state"] == "cancelled"
    stone = (await api.http.delete(path)).json()
    assert stone["session"] == session
    error_of(await api.http.get(path), 404, "not_found")
    assert (await api.get("/v1/nodes"))["nodes"][0]["alive"] is True
    assert (await api.post("/v1/doctor", {})) == {"reports": [{"engine": "gvisor", "ok": True}]}


async def test_result(api: Api) -> None:
    w = api.w
    session, fence = await w.start()
    error_of(await api.http.get(f"/v1/sessions/{session}/result"), 408, "wait_timeout")
    waiting = asyncio.create_task(api.http.get(f"/v1/sessions/{session}/result", params={"wait_s": 10}))
    await w.append(fence, EventType.SESSION_RESULT, b'{"x": "\\ud800\\u0000"}')
    await w.report(fence, S.COMPLETED, exit_code=0)
    answer = await waiting
    assert b'{"x": "\\ud800\\u0000"}' in answer.content
    assert (answer.json()["state"], answer.json()["exit_code"]) == ("completed", 0)


# ---------------------------------------------------------------- messages, signals, callbacks


async def test_payloads_are_kept_byte_for_byte(api: Api) -> None:
    session, _ = await api.w.start()
    path = f"/v1/sessions/{session}/messages"
    texts = [
        b'{"a" :  1.0e5,"b":"\\u0000\\ud800", "a": 2}', b"null", b'"\xc3\xa9"', b"123456789012345678901234567890.10",
        b"[ ]", b"-0.0", b"9" * 5000,
    ]  # fmt: skip
    for text in texts:
        answer = await api.http.post(path, content=b' {"idempotency_key" : null, "payload" : ' + text + b" } ")
        assert answer.status_code == 200, answer.text
        assert base64.urlsafe_b64decode(answer.json()["payload"]) == text
    inbox = (await api.get(path))["messages"]
    assert [base64.urlsafe_b64decode(m["payload"]) for m in inbox] == texts
    assert [m["number"] for m in inbox] == list(range(1, len(texts) + 1))


async def test_messages_signals_and_outbox(api: Api) -> None:
    w = api.w
    session, fence = await w.start()
    path = f"/v1/sessions/{session}"
    body = {"payload": {"n": 1}, "idempotency_key": "k"}
    first, again = await api.post(f"{path}/messages", body), await api.post(f"{path}/messages", body)
    assert first == again
    error_of(await api.http.post(f"{path}/messages", json={**body, "payload": 2}), 409, "key_reused")
    signal = (await api.post(f"{path}/signals/go%2Fon", {"payload": True}))["signal"]
    state = await w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="signal", name="go/on"))
    assert state.item == signal
    await w.append(fence, EventType.MESSAGE_SENT, b'"out"', message="m_1", key="send:1.2")
    assert (await api.get(f"{path}/outbox"))["messages"] == []
    waiting = asyncio.create_task(api.get(f"{path}/outbox", wait_s=10))
    await w.save(fence)
    found = (await waiting)["messages"]
    assert [(m["id"], m["number"]) for m in found] == [("m_1", 1)]
    assert (await api.get(f"{path}/outbox", after=1))["messages"] == []


async def test_callback_needs_no_token_and_works_once(api: Api) -> None:
    _, fence = await api.w.start()
    state = await api.w.control.open_wait(fence, 1, WaitSpec(id="1.1", kind="signal", name="ok"))
    path = str(state.url).removeprefix("http://rethaw.test")
    async with httpx.AsyncClient(base_url=api.url, trust_env=False) as stranger:
        error_of(await stranger.post(path, content=b"{oops"), 422, "invalid_input")
        answer = await stranger.post(path, content=b' {"approved": true} ')
        assert answer.status_code == 200, answer.text
        error_of(await stranger.post(path, content=b"1"), 409, "conflict")
        error_of(await stranger.post("/v1/callbacks/nope", content=b"1"), 404, "not_found")
    state = await api.w.control.poll_wait(fence, 1, "1.1", 0)
    assert state.payload == b'{"approved": true}'


# ---------------------------------------------------------------- bad input


async def test_tokens(api: Api) -> None:
    async with httpx.AsyncClient(base_url=api.url, trust_env=False) as stranger:
        assert (await stranger.get("/healthz")).json()["ok"] is True
        assert (await stranger.get("/openapi.json")).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"},
                        {"Authorization": "Bearer"}, {"Authorization": "Bearer " + "x" * 5000}):  # fmt: skip
            for path in ("/v1/sessions", "/v1/nodes", "/nothing", "/v1/sessions/s_1/events"):
                answer = await stranger.get(path, headers=headers)
                error_of(answer, 401, "unauthorized")
                assert TOKEN not in answer.text
                assert answer.headers["www-authenticate"] == "Bearer"
        error_of(await stranger.post("/v1/blobs", content=b"x"), 401, "unauthorized")
        ok = await stranger.get("/v1/sessions", headers={"Authorization": f"bearer {TOKEN}"})
        assert ok.status_code == 200


async def test_unknown_and_ambiguous(api: Api) -> None:
    a, _ = await api.w.start()
    b, _ = await api.w.start()
    for path in ("", "/events", "/why", "/logs", "/messages", "/outbox", "/snapshots", "/result", "/exchanges"):
        found = error_of(await api.http.get(f"/v1/sessions/s_unknown{path}"), 404, "not_found")
        assert "s_unknown" in found["message"]
    common = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    found = error_of(await api.http.get(f"/v1/sessions/{a[:common]}"), 409, "ambiguous_id")
    assert a in found["message"] and b in found["message"]
    nobody = new_id("s")  # has the form of an id, which is not looked up first everywhere
    for path in ("messages", "signals/go"):
        found = await api.http.post(f"/v1/sessions/{nobody}/{path}", json={"payload": 1})
        assert nobody in error_of(found, 404, "not_found")["message"]
    assert nobody in error_of(await api.http.get(f"/v1/sessions/{nobody}/outbox"), 404, "not_found")["message"]
    error_of(await api.http.get("/v1/exchanges/x_nope/request"), 404, "not_found")
    error_of(await api.http.get("/v1/nothing"), 404, "not_found")
    assert (await api.http.put("/v1/sessions")).status_code == 405
    agent = {**AGENT_JSON, "entry": "a.py::f", "command": [], "code": "0" * 64}
    error_of(await api.http.post("/v1/sessions", json={"agent": agent}), 404, "not_found")
    evil = {**agent, "code": "../../etc/passwd"}
    error_of(await api.http.post("/v1/sessions", json={"agent": evil}), 404, "not_found")


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/sessions", b'{"agent": {', "malformed JSON at character"),
        ("/v1/sessions", b"\xff\xfe", ""),
        ("/v1/sessions", b"[]", "body"),
        ("/v1/sessions", b"{}", "agent"),
        ("/v1/sessions", b'{"agent": {"name": "x", "command": ["a"], "memory": 1}}', "memory"),
        ("/v1/sessions", b'{"agent": {"name": "x", "command": ["a"]}, "args": {"a": NaN}}', "args"),
        ("/v1/sessions", b'{"agent": {"name": "x", "command": ["a"], "pids": "many"}}', "pids"),
        ("/v1/sessions", b'{"agent": {"name": "x", "command": []}}', "nothing to run"),
        ("/v1/sessions", b'{"agent": {"name": "x", "command": ["a"]}, "key": "\\u0000"}', "key"),
        ("MESSAGES", b"", "malformed JSON"),
        ("MESSAGES", b'{"payload": 1', "malformed JSON at line 1"),
        ("MESSAGES", b'{"payload": 1}}', "extra data"),
        ("MESSAGES", b'{"payload": }', "malformed JSON at line 1 column 13"),
        ("MESSAGES", b'{"payload": nan}', "malformed JSON"),
        ("MESSAGES", b'{"payload": NaN}', "NaN"),
        ("MESSAGES", b'{"payload": [' + b"[" * 200_000, "malformed JSON"),
        ("MESSAGES", b'{"payload": "\xff"}', "UTF-8"),
        ("MESSAGES", b'{"payload": 1, "extra": 2}', "extra"),
        ("MESSAGES", b'{"idempotency_key": "k"}', "payload is missing"),
        ("MESSAGES", b'{"payload": 1, "idempotency_key": 7}', "idempotency_key"),
        ("MESSAGES", b'{"payload": 1, "idempotency_key": "\\u0000"}', "idempotency_key"),
        ("MESSAGES", b'{"payload": 1, "idempotency_key": "\\ud800"}', "idempotency_key"),
        ("MESSAGES", b"[1]", "object is expected"),
        ("CANCEL", b'{"now": "perhaps"}', "now"),
        ("CRASH", b'{"what": "everything"}', "what"),
    ],
)
async def test_malformed_bodies(api: Api, path: str, body: bytes, says: str) -> None:
    session, _ = await api.w.start()
    where = {"MESSAGES": "messages", "CANCEL": "cancel", "CRASH": "crash"}.get(path)
    target = f"/v1/sessions/{session}/{where}" if where else path
    answer = await api.http.post(target, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    found = error_of(answer, answer.status_code, "invalid_input")
    assert says in found["message"], found


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=99999", "limit=x", "after=-1", "types=nonsense", "after=99999999999999999999"]
)
async def test_malformed_queries(api: Api, query: str) -> None:
    session, _ = await api.w.start()
    answer = await api.http.get(f"/v1/sessions/{session}/events?{query}")
    error_of(answer, 422, "invalid_input")


async def test_too_large(api: Api) -> None:
    session, _ = await api.w.start()
    path = f"/v1/sessions/{session}/messages"
    over = b'{"payload": "' + b"x" * MESSAGE_LIMIT + b'"}'
    found = error_of(await api.http.post(path, content=over), 413, "too_large")
    assert str(MESSAGE_LIMIT) in found["message"]
    fits = b'{"payload": "' + b"x" * (MESSAGE_LIMIT - 2) + b'"}'
    assert (await api.http.post(path, content=fits)).status_code == 200
    error_of(await api.http.post(path, content=b"x" * (4 * MESSAGE_LIMIT)), 413, "too_large")

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * (1 << 17)

    error_of(await api.http.post(path, content=endless()), 413, "too_large")


async def test_an_error_nobody_foresaw_tells_an_id_only(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(api.w.control, "nodes", broken)
    with caplog.at_level(logging.ERROR, "rethaw.api"):
        found = error_of(await api.http.get("/v1/nodes"), 500, "error")
    assert "secret" not in json.dumps(found)
    assert found["details"]["id"] in caplog.text and "secret detail" in caplog.text


# ---------------------------------------------------------------- events and output


async def read_sse(api: Api, path: str, stop: int, headers: dict[str, str] | None = None) -> list[tuple[int, Event]]:
    """The first `stop` events of a stream, or all of one that ends."""
    out: list[tuple[int, Event]] = []
    accept = {"Accept": "text/event-stream", **(headers or {})}
    async with api.http.stream("GET", path, headers=accept) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        ident, kind = 0, ""
        async for line in answer.aiter_lines():
            if line.startswith("id: "):
                ident = int(line[4:])
            elif line.startswith("event: "):
                kind = line[7:]
            elif line.startswith("data: "):
                event = Event.model_validate_json(line[6:])
                assert event.type.value == kind and event.seq == ident
                out.append((ident, event))
                if len(out) == stop:
                    break
    return out


async def test_events_are_followed_and_resumed(api: Api) -> None:
    w = api.w
    session, fence = await w.start()
    path = f"/v1/sessions/{session}/events"
    following = asyncio.create_task(read_sse(api, path, 6))
    for n in range(2):
        await w.append(fence, EventType.EMITTED, b'{"n": %d}' % n, name="x\ud800\0")
    found = await asyncio.wait_for(following, 10)
    assert [seq for seq, _ in found] == [1, 2, 3, 4, 5, 6]
    assert found[-1][1].body == b'{"n": 1}'
    assert found[-1][1].data["name"] == "x\ufffd\0"
    resumed = asyncio.create_task(read_sse(api, f"{path}?after=1", 3, {"Last-Event-ID": "5"}))
    await asyncio.sleep(0)
    for _ in range(2):
        await w.append(fence, EventType.EMITTED, name="y")
    assert [seq for seq, _ in await asyncio.wait_for(resumed, 10)] == [6, 7, 8]
    bad = await api.http.get(path, headers={"Accept": "text/event-stream", "Last-Event-ID": "x"})
    error_of(bad, 422, "invalid_input")


async def test_a_stream_ends_with_its_session(api: Api) -> None:
    w = api.w
    session, fence = await w.start()
    path = f"/v1/sessions/{session}/events?until_final=1"
    following = asyncio.create_task(read_sse(api, path, 1000))
    picked = asyncio.create_task(read_sse(api, f"{path}&types=emitted", 1000))
    await w.append(fence, EventType.EMITTED, name="y")
    await w.report(fence, S.COMPLETED, exit_code=0)
    found = await asyncio.wait_for(following, 10)
    assert found[-1][1].data["state"] == "completed"
    assert [e.type for _, e in await asyncio.wait_for(picked, 10)] == [EventType.EMITTED]
    late = await asyncio.wait_for(read_sse(api, path, 1000), 10)
    assert late == found
    nothing = await asyncio.wait_for(read_sse(api, path, 1000, {"Last-Event-ID": str(found[-1][0])}), 10)
    assert nothing == []


async def test_a_quiet_stream_has_heartbeats_and_ends_cleanly(api: Api) -> None:
    session, _ = await api.w.start()
    path = f"/v1/sessions/{session}/events?after=100"
    async with api.http.stream("GET", path, headers={"Accept": "text/event-stream"}) as answer:
        beats = 0
        async for line in answer.aiter_lines():
            beats += line.startswith(": still here")
            if beats == 2:
                break

    async def followers() -> bool:
        return not api.w.hub._waiters.get(("rethaw_log", session))

    await eventually(followers)


async def test_events_as_json(api: Api) -> None:
    w = api.w
    session, fence = await w.start()
    await w.save(fence)
    await w.act(fence)
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "x")
    path = f"/v1/sessions/{session}/events"
    every = (await api.get(path, all_lines="true"))["events"]
    assert [e["seq"] for e in every] == list(range(1, len(every) + 1))
    lost = [e["seq"] for e in every if e["superseded"]]
    shown = [e["seq"] for e in (await api.get(path))["events"]]
    assert lost and sorted(shown + lost) == [e["seq"] for e in every]
    states = (await api.get(path, types="session.state", after=3, limit=2))["events"]
    assert [e["data"]["state"] for e in states] == ["running", "recovering"]


async def test_logs_are_one_line_of_bytes(api: Api) -> None:
    w = api.w
    session, fence = await w.start()

    async def write(fence: Fence, offset: int, data: bytes, stream: str = "stdout") -> None:
        await w.append(fence, EventType.OUTPUT, data, stream=stream, offset=offset)

    await write(fence, 0, b"one \xff\0")
    await write(fence, 0, b"err", "stderr")
    await w.save(fence)
    await write(fence, 6, b"lost")
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "x")
    _, fence = await w.back(session)
    await write(fence, 4, b"\xff\0two")  # sent again from where it was not known to be durable
    path = f"/v1/sessions/{session}/logs"
    assert (await api.http.get(path)).content == b"one \xff\0two"
    assert (await api.http.get(path, params={"stream": "stderr"})).content == b"err"
    assert (await api.http.get(path, params={"stream": "both"})).content == b"one \xff\0errtwo"
    error_of(await api.http.get(path, params={"stream": "stdin"}), 422, "invalid_input")
    following = asyncio.create_task(api.http.get(path, params={"follow": "1"}))
    await write(fence, 9, b" end")
    await w.report(fence, S.COMPLETED, exit_code=0)
    assert (await asyncio.wait_for(following, 10)).content == b"one \xff\0two end"


async def test_exchanges(api: Api) -> None:
    w = api.w
    session, fence = await w.start()
    body = b'{"model": "m", "messages": [1, 2, 3]}'
    meta = RequestMeta(
        provider="openai", method="POST", path="/v1/x", digest="d" * 64, model_call=True, model="m", guest_id="1.1"
    )
    exchange = await w.log.begin_exchange(fence, meta, body, "me")
    await w.log.append_response(
        exchange.id,
        1,
        ResponseHead(status=200),
        [Chunk(offset=0, data=b"abc", at_us=0), Chunk(offset=3, data=b"d", at_us=1)],
    )
    listed = (await api.get(f"/v1/sessions/{session}/exchanges"))["exchanges"]
    assert [x["id"] for x in listed] == [exchange.id] and listed[0]["received"] == 4
    assert (await api.http.get(f"/v1/exchanges/{exchange.id}/request")).content == body
    assert (await api.http.get(f"/v1/exchanges/{exchange.id[:-1]}/response")).content == b"abcd"
    assert (await api.get(f"/v1/sessions/{session}/why"))["waiting_for"][0]["kind"] == "exchange"


async def test_blobs(api: Api) -> None:
    data = gzip.compress(b"code" * 100_000)
    answer = await api.http.post("/v1/blobs", content=data)
    digest = answer.json()["digest"]
    assert digest == hashlib.sha256(data).hexdigest()
    assert (api.blobs / f"{digest}.tar.gz").read_bytes() == data
    agent = AgentSpec(name="x", entry="agent.py::x", code=digest)
    view = await api.post("/v1/sessions", {"agent": json.loads(agent.model_dump_json())})
    assert view["agent"]["code"] == digest
    for bad in (b"", b"\x1f", b"PK not gzip"):
        error_of(await api.http.post("/v1/blobs", content=bad), 422, "invalid_input")
    assert [p.name for p in api.blobs.iterdir()] == [f"{digest}.tar.gz"]


async def test_openapi_describes_every_route(api: Api) -> None:
    schema = (await api.http.get("/openapi.json")).json()
    paths = schema["paths"]
    for path, method in (
        ("/healthz", "get"), ("/v1/blobs", "post"), ("/v1/sessions", "post"), ("/v1/sessions", "get"),
        ("/v1/sessions/{session}", "delete"), ("/v1/sessions/{session}/messages", "post"),
        ("/v1/sessions/{session}/signals/{name}", "post"), ("/v1/callbacks/{token}", "post"),
        ("/v1/exchanges/{exchange}/response", "get"), ("/v1/doctor", "post"),
    ):  # fmt: skip
        assert method in paths[path]
    assert "SessionView" in schema["components"]["schemas"]
    assert paths["/healthz"]["get"]["security"] == []
    assert schema["security"] == [{"token": []}]


# ---------------------------------------------------------------- queues and schedules


async def test_queues_over_http(api: Api) -> None:
    body = {"agent": AGENT_JSON, "options": {"queue": "q", "priority": 2, "tags": ["a", "b"], "concurrency_key": "k"}}
    assert (await api.http.put("/v1/queues/q", json={"limit": 1, "suspended": "free"})).json()["limit"] == 1
    one, two = await api.post("/v1/sessions", body), await api.post("/v1/sessions", body)
    assert (one["state"], two["state"], two["tags"]) == ("starting", "queued", ["a", "b"])
    shown = await api.get("/v1/queues/q")
    assert (shown["running"], shown["waiting"], shown["next"]) == (1, 1, [two["id"]])
    assert [q["name"] for q in (await api.get("/v1/queues"))["queues"]] == ["default", "q"]
    assert (await api.http.put("/v1/queues/q", json={"limit": None})).json()["suspended"] == "free"
    assert (await api.post("/v1/queues/q/pause"))["paused"] and not (await api.post("/v1/queues/q/resume"))["paused"]
    error_of(await api.http.request("DELETE", "/v1/queues/q"), 409, "conflict")
    error_of(await api.http.get("/v1/queues/none"), 404, "not_found")
    for wrong in ({"limit": 0}, {"limit": "2"}, {"limit": 1.5}, {"suspended": "maybe"}, {"most": 1}, []):
        error_of(await api.http.put("/v1/queues/q", json=wrong), 422, "invalid_input")
    for wrong in ({"queue": "a b"}, {"delay_s": -1}, {"priority": "high"}, {"tags": ["a b"]}, {"soon": True}):
        answer = await api.http.post("/v1/sessions", json={"agent": AGENT_JSON, "options": wrong})
        error_of(answer, 422, "invalid_input")


async def test_finding_over_http(api: Api) -> None:
    options = {"queue": "q", "tags": ["a", "b"]}
    one = await api.post("/v1/sessions", {"agent": AGENT_JSON, "args": {"topic": "Öl"}, "options": options})
    await api.post("/v1/sessions", {"agent": AGENT_JSON})
    past, future = "2020-01-01T00:00:00Z", "2100-01-01T00:00:00+02:00"
    for wanted in (
        {"tag": ["a", "b"]}, {"queue": "q"}, {"search": "TOPIC"}, {"search": "öl"}, {"tag": "a", "created_after": past},
        {"state": ["failed", "starting"], "queue": "q", "created_before": future},
    ):  # fmt: skip
        assert [s["id"] for s in (await api.get("/v1/sessions", **wanted))["sessions"]] == [one["id"]], wanted
    assert (await api.get("/v1/sessions", tag=["a", "c"]))["sessions"] == []
    assert (await api.get("/v1/sessions", created_after=future))["sessions"] == []
    for wrong in (
        {"state": "tired"},
        {"created_after": "yore"},
        {"created_after": "2026-01-01T00:00:00"},
        {"limit": 0},
    ):
        error_of(await api.http.get("/v1/sessions", params=wrong), 422, "invalid_input")


async def test_schedules_over_http(api: Api) -> None:
    body = {"name": "s", "agent": AGENT_JSON, "args": {"n": 1}, "cron": "0 9 * * *", "tz": "Europe/Berlin"}
    made = await api.post("/v1/schedules", body)
    assert made["next_at"].endswith("Z") and not made["paused"] and made["firings"] == []
    assert await api.post("/v1/schedules", body) == made
    error_of(await api.http.post("/v1/schedules", json={**body, "args": {}}), 409, "conflict")
    assert (await api.post("/v1/schedules", {**body, "args": {}, "replace": True}))["args"] == {}
    one = await api.post("/v1/schedules/s/trigger")
    assert one["tags"] == ["schedule:s"] and one["state"] == "starting"
    assert [f["what"] for f in (await api.get("/v1/schedules/s"))["firings"]] == ["triggered"]
    assert (await api.post("/v1/schedules/s/pause"))["paused"] and not (await api.post("/v1/schedules/s/resume"))[
        "paused"
    ]
    assert [s["name"] for s in (await api.get("/v1/schedules"))["schedules"]] == ["s"]
    for wrong in (
        {"cron": "0 9 * *"}, {"tz": "Moon"}, {"every_s": 5}, {"cron": None}, {"cron": None, "every_s": 0.1}, {"name": "a/b"},
        {"catch_up": "some"}, {"overlap": "maybe"}, {"options": {"queue": ""}}, {"when": "now"},
    ):  # fmt: skip
        error_of(await api.http.post("/v1/schedules", json={**body, "replace": True, **wrong}), 422, "invalid_input")
    coded = {**AGENT_JSON, "command": [], "entry": "a.py::f", "code": "0" * 64}
    error_of(await api.http.post("/v1/schedules", json={**body, "name": "t", "agent": coded}), 404, "not_found")
    assert (await api.http.request("DELETE", "/v1/schedules/s")).json()["name"] == "s"
    for method, path in (("GET", "s"), ("DELETE", "s"), ("POST", "s/trigger"), ("POST", "s/pause")):
        error_of(await api.http.request(method, f"/v1/schedules/{path}"), 404, "not_found")
