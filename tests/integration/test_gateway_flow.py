"""One life: recording, release, hold, hang-ups, refusals."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from backports import zstd
from gateway_fixtures import CHAT, Gate, Rig, make_rig

from rethaw.gateway import hold
from rethaw.model import faults
from rethaw.model.enums import Durability, EventType, ExchangeState
from rethaw.model.errors import Fenced, QuiesceTimeout
from rethaw.model.types import EXCHANGE_LIMIT
from rethaw.testing.provider import Reply, ScriptedProvider, echo


def chat(text: str, **more: Any) -> bytes:
    return json.dumps({"model": "m-1", "messages": [{"role": "user", "content": text}], **more}).encode()


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with ScriptedProvider(echo) as p:
        yield p


@pytest.fixture
async def rig(provider: ScriptedProvider) -> AsyncIterator[Rig]:
    rig = await make_rig(provider)
    yield rig
    await rig.gateway.close()


async def direct(provider: ScriptedProvider, body: bytes) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession(auto_decompress=False) as http,
        http.post(provider.url + CHAT, data=body, headers={"content-type": "application/json"}) as r,
    ):
        return r.status, await r.read()


async def test_request_is_durable_before_upstream_and_answer_before_its_end(rig: Rig):
    seen: list[tuple[list[str], int]] = []

    def script(request: Any) -> Reply:
        seen.append((rig.log.kinds(), len(rig.log.rows)))
        return Reply(text="hello there")

    rig.provider._script = script
    call = await rig.ask(chat("hi", stream=True))
    assert seen == [(["exchange.requested", "exchange.upstream"], 1)]
    assert call.ended and call.status == 200 and b"[DONE]" in call.data
    row = rig.log.rows[call.exchange or ""]
    assert bytes(row.data) == call.data and row.x.state is ExchangeState.COMPLETE
    assert row.body == chat("hi", stream=True)
    assert rig.gate.asked == [call.exchange]
    (done,) = rig.log.of(EventType.EXCHANGE_COMPLETED)
    assert done.data["status"] == 200 and done.data["model"] == "m-1"
    sent = rig.provider.calls[0].headers
    assert sent["authorization"] == "Bearer sk-real"
    await rig.session.flush()
    assert [e.data["exchange"] for e in rig.log.of(EventType.EXCHANGE_RELEASED)] == [call.exchange]


async def test_nothing_is_released_before_the_gate(rig: Rig):
    rig.session.attach(rig.log.fence, 1, gate := Gate(open_=False), rig.hooks)
    call = rig.call(chat("hi"))
    rig.serve(call)
    await rig.until(lambda: rig.log.of(EventType.EXCHANGE_COMPLETED))
    assert call.exchange and gate.asked == [call.exchange] and call.head is None
    assert rig.session.open() == [call.exchange]
    gate.open.set()
    await rig.done(call)
    assert call.ended and rig.session.open() == []


async def test_last_bytes_wait_until_durable(rig: Rig):
    """The last event of a stream, and the last part of a body with a length, come after the log has all."""
    rig.log.slow_s = 0.05
    for body, piece in ((chat("abc", stream=True), b"[DONE]"), (chat("abc"), b"}")):
        call = rig.call(body)
        rig.serve(call)
        await rig.until(lambda call=call, piece=piece: piece in call.data[-8:] or call.ended)
        assert bytes(rig.log.rows[call.exchange or ""].data) == call.data
        await rig.done(call)


async def test_relaxed_asks_no_gate_and_other_endpoints_neither(provider: ScriptedProvider):
    rig = await make_rig(provider, durability=Durability.RELAXED)
    await rig.ask(chat("hi"))
    assert rig.gate.asked == []
    await rig.gateway.close()
    rig = await make_rig(provider)
    models = await rig.ask(b"", path="/v1/models", method="GET", headers=())
    assert models.ended and models.status == 200 and rig.gate.asked == []
    assert rig.log.rows[models.exchange or ""].x.state is ExchangeState.COMPLETE
    await rig.gateway.close()


async def test_quiesce_in_the_middle_of_a_stream_goes_on_by_offset(rig: Rig, provider: ScriptedProvider):
    provider.fail(Reply(text="x" * 400, chunk_s=0.01), times=1)
    call = rig.call(chat("hi", stream=True))
    rig.serve(call)
    for _ in range(5):
        size = len(call.data)
        await rig.until(lambda size=size: len(call.data) > size + 100)
        await rig.quiesce(call)
        held = len(call.data)
        await asyncio.sleep(0.02)
        assert len(call.data) == held <= len(rig.log.rows[call.exchange or ""].data)
        rig.go(call)
    await rig.done(call)
    assert call.ended and call.data == bytes(rig.log.rows[call.exchange or ""].data)
    assert call.data.count(b"[DONE]") == 1 and provider.count == 1
    assert len(rig.gate.asked) == 1


async def test_request_cut_off_before_accept_is_found_again(rig: Rig, provider: ScriptedProvider):
    """The handler is cancelled while the request becomes durable; guestd sends it again under the same id."""
    rig.log.slow_s = 0.1
    call = rig.call(chat("hi"))
    rig.serve(call)
    await rig.until(lambda: rig.log.appends > 1)
    await rig._cancel(call)
    assert call.exchange is None
    rig.go(call)
    await rig.done(call)
    assert call.ended and provider.count == 1 and len(rig.log.rows) == 1


async def test_settled_waits_for_requests_under_way_and_holds_new_ones(rig: Rig):
    rig.log.slow_s = 0.05
    first, second = rig.call(chat("a")), rig.call(chat("b"))
    rig.serve(first)
    await rig.until(lambda: rig.log.appends > 1)
    async with rig.session.settled():
        assert first.exchange is not None
        rig.serve(second)
        await asyncio.sleep(0.15)
        assert len(rig.log.rows) == 1
    await rig.done(first, second)
    rig.log.slow_s = 0.3
    third = rig.call(chat("c"))
    rig.serve(third)
    await rig.until(lambda: rig.session._entering == 1)
    with pytest.raises(QuiesceTimeout):
        async with rig.session.settled(0.02):
            pass
    await rig.done(third)


async def test_client_that_times_out_and_asks_again_gets_the_same_call(rig: Rig, provider: ScriptedProvider):
    provider.fail(Reply(text="slow", first_byte_s=0.3))
    first = rig.call(chat("hi"), headers=[("Content-Type", "application/json"), ("x-stainless-retry-count", "0")])
    rig.serve(first)
    await provider.wait_for_calls(1)
    await rig.hang_up(first)
    assert rig.session.open() == []
    again = await rig.ask(chat("hi"), headers=[("content-type", "application/json"), ("x-stainless-retry-count", "1")])
    assert again.ended and again.exchange == first.exchange and provider.count == 1
    assert [e.data["how"] for e in rig.log.of(EventType.EXCHANGE_ADOPTED)] == ["hangup"]
    after = await rig.ask(chat("hi"))  # delivered whole: the next equal request is a new one
    assert after.exchange != first.exchange and provider.count == 2


async def test_client_that_hangs_up_while_its_request_becomes_durable(rig: Rig, provider: ScriptedProvider):
    rig.log.slow_s = 0.1
    first = rig.call(chat("hi"))
    rig.serve(first)
    await rig.until(lambda: rig.log.appends > 1)
    await rig.hang_up(first)
    await rig.until(lambda: rig.log.rows)
    await rig.until(lambda: rig.session.open() == [])
    again = await rig.ask(chat("hi"))
    assert again.ended and provider.count == 1 and list(rig.log.rows) == [again.exchange]


async def test_client_that_gives_up_before_its_request_is_durable_and_asks_again_at_once(
    rig: Rig, provider: ScriptedProvider
):
    rig.log.slow_s = 0.1
    calls = [rig.call(chat("hi")) for _ in range(3)]
    for call in calls[:2]:
        rig.serve(call)
        await rig.until(lambda: rig.session.life.intakes)
        await rig.hang_up(call)
        assert not rig.log.rows
    rig.serve(calls[2])
    await rig.done(calls[2])
    assert calls[2].ended and provider.count == 1 and list(rig.log.rows) == [calls[2].exchange]


async def test_client_that_gives_up_while_its_repeated_request_is_adopted(rig: Rig, provider: ScriptedProvider):
    provider.fail(Reply(text="slow", first_byte_s=0.3))
    first, second = rig.call(chat("hi")), rig.call(chat("hi"))
    rig.serve(first)
    await provider.wait_for_calls(1)
    await rig.hang_up(first)
    rig.log.slow_s = 0.1
    rig.serve(second)
    await rig.until(lambda: rig.session.life.intakes)
    await rig.hang_up(second)
    third = await rig.ask(chat("hi"))
    assert third.ended and third.exchange == first.exchange and provider.count == 1


async def test_client_that_left_while_its_whole_answer_was_under_way_gets_it_when_it_asks_again(
    rig: Rig, provider: ScriptedProvider
):
    """The node has ended the stream when it learns that the agent had given up without having seen a byte."""
    for told in ("at once", "by the hello"):
        first = await rig.ask(chat(told))
        calls = provider.count
        assert first.ended and first.exchange and rig.session.runs == {}
        if told == "at once":
            rig.session.left(first.exchange, 0)
        else:
            await rig.quiesce()
            rig.go(left={first.exchange: 0, "x_of_somebody_else": 0})
        again, parallel = rig.call(chat(told)), rig.call(chat(told))
        rig.serve(again, parallel)
        await rig.done(again, parallel)
        assert again.exchange == first.exchange and again.data == first.data and again.ended
        assert parallel.exchange != first.exchange and provider.count == calls + 1
    assert [e.data["how"] for e in rig.log.of(EventType.EXCHANGE_ADOPTED)] == ["hangup"] * 2


async def test_a_call_does_not_wait_for_the_log_to_tell_what_other_calls_clients_left(rig: Rig):
    """A client that closes its connection after each answer leaves one behind for each."""
    for n in range(3):
        call = await rig.ask(chat(f"{n}"))
        assert call.exchange
        rig.session.left(call.exchange, 0)
    rig.log.looked_up.clear()
    other = await rig.ask(chat("something else"))
    assert other.ended and rig.log.looked_up == []
    again = await rig.ask(chat("1"))
    assert again.ended and len(rig.log.of(EventType.EXCHANGE_ADOPTED)) == 1 and len(rig.log.looked_up) == 1


async def test_client_that_closes_after_the_last_event_has_seen_the_answer(rig: Rig, provider: ScriptedProvider):
    """It does not wait for the end of the connection; an equal request that it makes next is another one."""
    rig.log.slow_s = 0.1
    for n in range(2):
        call = rig.call(chat("hi", stream=True))
        rig.serve(call)
        await rig.until(lambda call=call: b"[DONE]" in call.data)
        assert not call.ended
        await rig.hang_up(call, taken=len(call.data))
        assert provider.count == n + 1 and rig.session.open() == []
    await rig.until(lambda: len(rig.log.of(EventType.EXCHANGE_COMPLETED)) == 2)
    half = rig.call(chat("hi", stream=True))
    rig.serve(half)
    await rig.until(lambda: half.data)
    await rig.hang_up(half, taken=1)
    again = await rig.ask(chat("hi", stream=True))
    assert again.exchange == half.exchange and provider.count == 3


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br"])
async def test_last_event_of_a_compressed_stream_waits_too(rig: Rig, provider: ScriptedProvider, encoding: str):
    plain = b'data: {"model": "m"}\n\n' * 50 + b"data: [DONE]\n\n"
    packed = {"gzip": gzip.compress, "zstd": zstd.compress, "br": lambda x: x}[encoding](plain)
    head = {"content-encoding": encoding}
    provider.fail(Reply(raw=packed, content_type="text/event-stream", headers=head))
    rig.log.slow_s = 0.05
    call = rig.call(b"{}", path="/v1/other")
    rig.serve(call)
    await rig.until(lambda: call.data)
    assert len(rig.log.rows[call.exchange or ""].data) == len(packed)
    await rig.done(call)
    assert call.data == packed


async def test_parallel_equal_requests_are_two_calls(rig: Rig, provider: ScriptedProvider):
    """Also when the first one is cut off by a freeze just as the second comes."""
    provider.fail(Reply(text="slow", first_byte_s=0.2), times=2)
    first, second = rig.call(chat("hi")), rig.call(chat("hi"))
    rig.serve(first)
    await provider.wait_for_calls(1)
    await rig.quiesce(first)
    rig.go(second, first)
    await rig.done(first, second)
    assert first.exchange != second.exchange and provider.count == 2 and first.ended and second.ended


async def test_hung_up_call_is_given_up_after_the_window(rig: Rig, provider: ScriptedProvider):
    rig.session._shared.adopt_window_s = 0.1
    provider.fail(Reply(hang=True))
    call = rig.call(chat("hi"))
    rig.serve(call)
    await provider.wait_for_calls(1)
    await rig.hang_up(call)
    await rig.until(lambda: rig.log.of(EventType.EXCHANGE_FAILED))
    (failed,) = rig.log.of(EventType.EXCHANGE_FAILED)
    assert failed.data["possibly_paid"] is True
    await rig.until(lambda: provider.calls[0].client_gone)
    assert rig.session.runs == {}


@pytest.mark.parametrize("reply", [Reply.rate_limited(0.1), Reply.overloaded(), Reply(status=503, retry_after=0.05)])
async def test_later_is_held_and_the_agent_sees_a_slow_call(provider: ScriptedProvider, reply: Reply):
    rig = await make_rig(provider, hold_max_s=30.0)
    provider.fail(reply, times=1)
    call = rig.call(chat("hi"))
    rig.serve(call)
    await rig.until(lambda: rig.hooks.holds)
    assert rig.session.held() and rig.hooks.answers == []
    await rig.done(call)
    assert call.status == 200 and call.ended and provider.count == 2 and rig.upstream_tries() == 2
    (held,) = rig.log.of(EventType.EXCHANGE_HELD)
    assert held.data["status"] == reply.status and held.data["retry_after_s"] == reply.retry_after
    assert rig.hooks.answers == [call.exchange] and not rig.session.held()
    await rig.gateway.close()


async def test_beyond_hold_max_the_providers_bytes_pass(provider: ScriptedProvider):
    for hold_max, retry_after in ((0.0, 1.0), (5.0, 60.0)):
        rig = await make_rig(provider, hold_max_s=hold_max)
        provider.fail(Reply.rate_limited(retry_after, message="slow down"))
        call = await rig.ask(chat("hi"))
        assert call.status == 429 and b"slow down" in call.data and call.head
        assert ("retry-after", f"{retry_after:g}") in [(n.lower(), f"{float(v):g}") for n, v in call.head[2]
                                                      if n.lower() == "retry-after"]  # fmt: skip
        assert rig.events(EventType.EXCHANGE_HELD) == []
        await rig.gateway.close()


async def test_what_waiting_does_not_mend_is_not_held(provider: ScriptedProvider):
    rig = await make_rig(provider, hold_max_s=30.0)
    provider.fail(Reply.rate_limited(None, error_type="insufficient_quota", message="insufficient_quota: pay"))
    call = await rig.ask(chat("hi"))
    assert call.status == 429 and b"insufficient_quota" in call.data and rig.hooks.holds == []
    provider.fail(Reply.server_error(500))
    call = await rig.ask(chat("hi"))
    assert call.status == 500 and rig.hooks.holds == []
    await rig.gateway.close()


async def test_outage_is_held(provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hold, "BACKOFF_S", 0.1)
    rig = await make_rig(provider, hold_max_s=30.0)
    await provider.refuse(0.3)
    call = await rig.ask(chat("hi"))
    assert call.status == 200 and provider.count == 1
    assert rig.log.of(EventType.EXCHANGE_HELD)[0].data["possibly_paid"] is False
    provider.fail(Reply(cut="rst"))  # after the request was sent
    call = await rig.ask(chat("hi"))
    assert call.status == 200 and provider.count == 3
    assert rig.log.of(EventType.EXCHANGE_HELD)[-1].data["possibly_paid"] is True
    await rig.gateway.close()


async def test_outage_without_hold_breaks_the_connection(rig: Rig, provider: ScriptedProvider):
    await provider.refuse(5)
    call = await rig.ask(chat("hi"))
    assert call.head is None and call.broken
    (failed,) = rig.log.of(EventType.EXCHANGE_FAILED)
    assert failed.data["possibly_paid"] is False
    assert rig.hooks.answers == [call.exchange]


@pytest.mark.parametrize("how", ["rst", "close"])
async def test_broken_stream_passes_what_came_and_breaks_off(rig: Rig, provider: ScriptedProvider, how: Any):
    provider.fail(Reply(text="a long answer " * 10, cut=how, cut_after=4))
    call = await rig.ask(chat("hi", stream=True))
    assert call.broken and not call.ended and call.data.count(b"data:") >= 4
    row = rig.log.rows[call.exchange or ""]
    assert bytes(row.data) == call.data and row.x.state is ExchangeState.FAILED
    assert rig.log.of(EventType.EXCHANGE_FAILED)[0].data["possibly_paid"] is True
    again = await rig.ask(chat("hi", stream=True))
    assert again.ended and provider.count == 2


async def test_cut_json_answer_breaks_off(rig: Rig, provider: ScriptedProvider):
    provider.fail(Reply(text="x" * 2000, cut="close", cut_after=1))
    call = await rig.ask(chat("hi"))
    assert call.broken and not call.ended and len(call.data) > 0


async def test_provider_without_key_and_unknown_provider(rig: Rig, provider: ScriptedProvider):
    call = await rig.ask(chat("hi"), provider="keyless")
    assert call.status == 401 and call.ended
    assert "NO_SUCH_KEY" in json.loads(call.data)["error"]["message"]
    call = await rig.ask(chat("hi"), provider="nobody", path="/v1/messages")
    assert call.status == 404 and json.loads(call.data)["type"] == "error"
    assert "[providers.nobody]" in json.loads(call.data)["error"]["message"]
    assert provider.count == 0 and len(rig.log.of(EventType.EXCHANGE_COMPLETED)) == 2
    assert rig.events(EventType.EXCHANGE_UPSTREAM) == []


async def test_lies_are_refused(rig: Rig, provider: ScriptedProvider):
    for path in ("/v1/../admin", "/v1/%2e%2e/x", "/a\r\nHost: evil", "x", "/a?b", "/a/..;/b"):
        call = await rig.ask(chat("hi"), path=path)
        assert call.status == 400 and call.exchange is None, path
    call = await rig.ask(b"x" * (EXCHANGE_LIMIT + 1))
    assert call.status == 413
    call = await rig.ask(chat("hi"), headers=[("x", "a\r\nb: c")])
    assert call.status == 400
    foreign = rig.call(chat("hi"))
    foreign.exchange = "x_of_somebody_else"
    rig.serve(foreign)
    await rig.done(foreign)
    assert foreign.broken and foreign.head is None
    assert provider.count == 0


async def test_guests_own_key_is_neither_sent_nor_recorded(rig: Rig, provider: ScriptedProvider):
    headers = [("Authorization", "Bearer stolen"), ("X-Api-Key", "stolen"), ("Cookie", "stolen"), ("Accept", "*/*")]
    call = await rig.ask(chat("hi"), headers=headers)
    assert "stolen" not in str(provider.calls[0].headers)
    assert "stolen" not in str(rig.log.rows[call.exchange or ""].x.meta)
    assert provider.calls[0].headers["authorization"] == "Bearer sk-real"
    await rig.ask(chat("hi"), provider="anthropic", path="/v1/messages")
    assert provider.calls[1].headers["x-api-key"] == "ak-real"


async def test_stale_life_is_fenced(rig: Rig):
    rig.log.generation = "somebody else"
    call = rig.call(chat("hi"))
    rig.serve(call)
    with pytest.raises(Fenced):
        await rig.done(call)


async def test_log_away_in_the_middle_delays_the_end_only(rig: Rig, provider: ScriptedProvider):
    provider.fail(Reply(text="x" * 200, chunk_s=0.005))
    call = rig.call(chat("hi", stream=True))
    rig.serve(call)
    await rig.until(lambda: len(call.data) > 300)
    rig.log.away = True
    await rig.until(lambda: provider.calls[0].completed)
    await asyncio.sleep(0.05)
    assert not call.ended and b"[DONE]" not in call.data
    rig.log.away = False
    await rig.done(call)
    assert call.ended and bytes(rig.log.rows[call.exchange or ""].data) == call.data


async def test_large_answer_is_not_kept_in_memory(rig: Rig, provider: ScriptedProvider):
    body = bytes(range(256)) * 4096 * 12
    provider.fail(Reply(raw=body, content_type="application/octet-stream"))
    call = rig.call(b"{}", provider="raw", path="/big")
    rig.serve(call)
    rig.streams[id(call)].credit.clear()
    await rig.until(lambda: rig.log.of(EventType.EXCHANGE_COMPLETED))
    run = rig.session.runs[call.exchange or ""]
    assert len(run._body) <= 5 << 20
    rig.streams[id(call)].credit.set()
    await rig.done(call)
    assert call.data == body and call.ended


async def test_bytes_are_those_of_the_provider(rig: Rig, provider: ScriptedProvider):
    for reply in (Reply(text="hé", gzip=True), Reply(text="z", extra={"unknown": [1, {"x": None}]}), Reply(status=500)):
        provider.fail(reply, times=2)
        body = chat("hi")
        call = await rig.ask(body, headers=[("Content-Type", "application/json"), ("Accept-Encoding", "gzip")])
        status, data = await direct(provider, body)
        assert call.status == status
        if not reply.gzip:
            assert len(call.data) == len(data)
        assert provider.calls[-2].body == body


POINTS = (
    "gateway.request.before_durable", "gateway.request.durable", "gateway.accepted", "gateway.upstream.before",
    "gateway.upstream.first_byte", "gateway.response.batch", "gateway.release", "gateway.finish.before",
)  # fmt: skip


@pytest.mark.parametrize("point", POINTS)
async def test_an_error_inside_is_seen_by_the_agent_and_hurts_nobody_else(rig: Rig, point: str):
    faults.configure(f"{point}:1=raise")
    try:
        call = await rig.ask(chat("hi"))
        assert point in faults.names
    finally:
        faults.configure("")
    assert (call.ended and call.status == 200) or call.broken
    other = await rig.ask(chat("again"))
    assert other.ended and other.status == 200
    await rig.session.flush()
