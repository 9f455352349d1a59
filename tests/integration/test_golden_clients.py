"""Golden: the real clients, unmodified, get through guestd, channel and gateway what they get directly, byte for byte.

Each conversation runs twice, against two providers with the same script in the same state: directly, and through the
gateway. Compared are the bytes on the wires: what the client received, and what the provider received.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
from gateway_guest_fixtures import GuestRig, Message, Recorder, guest_rig

from rethaw.gateway import Providers
from rethaw.model.enums import EventType
from rethaw.testing import provider as scripted
from rethaw.testing.provider import Reply, ScriptedProvider, TokenUsage, by_turn

TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
RTOOL: Any = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}
ATOOL: Any = {"name": "add", "input_schema": {"type": "object"}}
PNG = base64.b64encode(bytes(range(256)) * 700).decode()
ASK: Any = [{"role": "user", "content": "one and two? \u2028 é \U0001f600"}]
SCRIPT = [
    Reply("let me see: é\n", tool_calls=[("add", {"a": 1, "b": "ü"}), ("add", {})], usage=TokenUsage(100, 7, 40),
          extra={"future_field": {"x": [1, None]}}, headers={"x-ratelimit-remaining": "9", "X-Odd": "a, b;c"}),
    lambda r: Reply(f"it is {','.join(r.tool_results)}", ragged=True),
]  # fmt: skip
KEY = "rethaw"  # what the guest has; the real one is the gateway's
AUTH = ("authorization", "x-api-key")  # guestd drops the guest's: the real one stands elsewhere among the headers
HOP = {"connection", "transfer-encoding", "date", "keep-alive"}


@dataclass
class Side:
    """One way to the provider: `client` and `upstream` are the wires."""

    provider: ScriptedProvider
    client: Recorder
    upstream: Recorder
    openai: str
    anthropic: str
    key: str


@dataclass
class Golden:
    direct: Side
    through: Side
    rig: GuestRig

    async def same(
        self, talk: Callable[[Side], Awaitable[Any]], *replies: Reply, whole: bool = True, leaves: bool = False
    ) -> list[Message]:
        """`talk` on both sides gives the same result and the same bytes. `whole`: the answers are whole. `leaves`: the
        client goes away in the middle, so how much it is sent is chance."""
        results: list[Any] = []
        for side in (self.direct, self.through):
            side.client.clear()
            side.upstream.clear()
            for reply in replies:
                side.provider.fail(reply)
            results.append(await talk(side))
        assert results[0] == results[1]
        assert results[0] is not None
        a, b = self.direct.client.responses(), self.through.client.responses()
        assert [m.start for m in a] == [m.start for m in b] and len(a) > 0
        for m, n in zip(a, b, strict=True):
            size = min(len(m.body), len(n.body)) if leaves else None
            assert m.body[:size] == n.body[:size] and m.body and n.body
        assert [_headers(m) for m in a] == [_headers(m) for m in b]
        if not leaves:
            assert [_complete(m) for m in a] == [_complete(m) for m in b] == [whole] * len(a)
        x, y = self.direct.upstream.requests(), self.through.upstream.requests()
        assert [m.start for m in x] == [m.start for m in y] and [m.body for m in x] == [m.body for m in y]
        for m, n in zip(x, y, strict=True):
            assert _headers(m, "host", *AUTH) == _headers(n, "host", *AUTH)
            assert next(h for h in n.headers if h[0].lower() in AUTH)[1].endswith("real-key")
        return b


def _complete(message: Message) -> bool:
    """Whole, or so far that a client hangs up: after [DONE] the last bytes of the framing may find it gone."""
    return message.whole or message.body.endswith(b"data: [DONE]\n\n")


def _headers(message: Message, *but: str) -> list[tuple[str, str]]:
    skip = HOP | set(but)
    out = [(n, v) for n, v in message.headers if n.lower() not in skip]
    # the client's own framing header has no fixed place
    return sorted(out, key=lambda h: h[0].lower() == "content-length")


@pytest.fixture
async def golden(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Golden]:
    monkeypatch.setattr(scripted.time, "time", lambda: 1_790_000_000.0)
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        one = await enter(ScriptedProvider(by_turn(SCRIPT)))
        two = await enter(ScriptedProvider(by_turn(SCRIPT)))
        wire = await enter(Recorder(("127.0.0.1", one.port)).running())
        upstream = await enter(Recorder(("127.0.0.1", two.port)).running())
        real = f"http://127.0.0.1:{upstream.port}"
        providers = Providers.from_config(
            {
                "openai": {"base_url": f"{real}/v1", "key": "real-key"},
                "anthropic": {"base_url": real, "key": "real-key"},
                "raw": {"base_url": real, "auth": "none"},
            },
            {},
        )
        rig = await enter(guest_rig(providers))
        front = await enter(Recorder(("127.0.0.1", int(rig.url.rpartition(":")[2]))).running())
        here, there = f"http://127.0.0.1:{wire.port}", f"http://127.0.0.1:{front.port}"
        yield Golden(
            Side(one, wire, wire, f"{here}/v1", here, "real-key"),
            Side(two, front, upstream, f"{there}/openai/v1", f"{there}/anthropic", KEY),
            rig,
        )


def aoai(side: Side, **kw: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=side.openai, api_key=side.key, **{"max_retries": 0, "timeout": 30, **kw})


def aanth(side: Side, **kw: Any) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        base_url=side.anthropic, api_key=side.key, **{"max_retries": 0, "timeout": 30, **kw}
    )


# ---------------------------------------------------------------- OpenAI Chat Completions


@pytest.mark.parametrize("gzip", [False, True])
async def test_golden_chat_tool_loop_async(golden: Golden, gzip: bool) -> None:
    async def talk(side: Side) -> Any:
        messages: list[Any] = [{"role": "system", "content": "be exact"}, *ASK]
        out: list[Any] = []
        async with aoai(side) as client:
            for _ in range(2):
                done = await client.chat.completions.create(
                    model="m-1", messages=messages, tools=[TOOL], extra_body={"unknown_param": {"a": [None, 1.5]}}
                )
                out.append(done.model_dump())
                message = done.choices[0].message
                messages.append(message.model_dump(exclude_none=True))
                messages += [
                    {"role": "tool", "tool_call_id": c.id, "content": "3\x00"} for c in message.tool_calls or ()
                ]
        assert gzip or out[0]["future_field"] == {"x": [1, None]}
        return out

    first = Reply("zipped", gzip=True, tool_calls=[("add", {"a": 1})]) if gzip else None
    answers = await golden.same(talk, *([first] if first else []))
    assert len(answers) == 2
    assert ("gzip" in str(answers[0].headers)) is gzip


async def test_golden_chat_stream_async(golden: Golden) -> None:
    async def talk(side: Side) -> Any:
        async with (
            aoai(side) as client,
            client.chat.completions.stream(
                model="m-1", messages=ASK, tools=[TOOL], stream_options={"include_usage": True}
            ) as s,
        ):
            events = [e.type async for e in s]
            return events, (await s.get_final_completion()).model_dump()

    await golden.same(talk)
    (done,) = golden.rig.log.of(EventType.EXCHANGE_COMPLETED)
    assert (done.data["model"], done.data["input_tokens"], done.data["cached_tokens"], done.data["output_tokens"]) == (
        "m-1", 100, 40, 7,
    )  # fmt: skip


async def test_golden_chat_sync_stream_and_raw(golden: Golden) -> None:
    def run(side: Side) -> Any:
        with openai.OpenAI(base_url=side.openai, api_key=side.key, max_retries=0, timeout=30) as client:
            raw = client.chat.completions.with_raw_response.create(model="m-1", messages=ASK)
            with client.chat.completions.with_streaming_response.create(model="m-1", messages=ASK) as r:
                data = b"".join(r.iter_bytes())
            chunks = [c.model_dump() for c in client.chat.completions.create(model="m-1", messages=ASK, stream=True)]
            return raw.status_code, raw.headers["x-odd"], raw.content, data, chunks

    await golden.same(lambda side: asyncio.to_thread(run, side))


async def test_golden_chat_image_and_large_tool_result(golden: Golden) -> None:
    async def talk(side: Side) -> Any:
        image: Any = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
        messages: Any = [
            {"role": "user", "content": [{"type": "text", "text": "look"}, image]},
            {"role": "assistant", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "x" * (10 << 20)},
        ]  # fmt: skip
        async with aoai(side) as client:
            return (await client.chat.completions.create(model="m-1", messages=messages)).model_dump()

    await golden.same(talk)


# ---------------------------------------------------------------- OpenAI Responses


async def test_golden_responses_tool_loop_and_stream(golden: Golden) -> None:
    async def talk(side: Side) -> Any:
        async with aoai(side) as client:
            first = await client.responses.create(model="m-1", input="go", tools=[RTOOL])
            answers: Any = [{"type": "function_call_output", "call_id": c.call_id, "output": "3"}
                            for c in first.output if c.type == "function_call"]  # fmt: skip
            async with client.responses.stream(
                model="m-1", input=answers, previous_response_id=first.id, tools=[RTOOL]
            ) as s:
                events = [e.type async for e in s]
                last = await s.get_final_response()
            return first.model_dump(), events, last.model_dump()

    await golden.same(talk)
    assert golden.rig.log.of(EventType.EXCHANGE_COMPLETED)[1].data["output_tokens"] > 0


# ---------------------------------------------------------------- Anthropic Messages


async def test_golden_anthropic_tool_loop_image_and_stream(golden: Golden) -> None:
    async def talk(side: Side) -> Any:
        image: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
        messages: list[Any] = [{"role": "user", "content": [image, {"type": "text", "text": "go"}]}]
        async with aanth(side) as client:
            first = await client.messages.create(
                model="c-1", max_tokens=99, messages=messages, tools=[ATOOL], system="be exact",
                extra_headers={"anthropic-beta": "x-1,y-2"},
            )  # fmt: skip
            messages.append({"role": "assistant", "content": [b.model_dump(exclude_none=True) for b in first.content]})
            messages.append({"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": b.id, "content": "3"}
                for b in first.content if b.type == "tool_use"]})  # fmt: skip
            async with client.messages.stream(model="c-1", max_tokens=99, messages=messages, tools=[ATOOL]) as s:
                events = [e.type async for e in s]
                last = await s.get_final_message()
            return first.model_dump(), events, last.model_dump()

    await golden.same(talk)
    assert len(golden.rig.gate.asked) == 2


async def test_golden_anthropic_sync_and_count_tokens(golden: Golden) -> None:
    def run(side: Side) -> Any:
        with anthropic.Anthropic(base_url=side.anthropic, api_key=side.key, max_retries=0, timeout=30) as client:
            count = client.messages.count_tokens(model="c-1", messages=ASK)
            raw = client.messages.with_raw_response.create(model="c-1", max_tokens=9, messages=ASK)
            with client.messages.stream(model="c-1", max_tokens=9, messages=ASK) as s:
                return count.model_dump(), raw.status_code, raw.text(), "".join(s.text_stream)

    await golden.same(lambda side: asyncio.to_thread(run, side))
    assert len(golden.rig.gate.asked) == 2  # counting tokens is no model call


# ---------------------------------------------------------------- failures, with hold_max=0


ERRORS = [
    Reply.rate_limited(2.0, message="slow down"), Reply.rate_limited(None), Reply.overloaded(), Reply.server_error(500),
    Reply(status=400, message="bad é"), Reply(status=401), Reply(status=404), Reply(status=413), Reply(status=503),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_golden_errors(golden: Golden, stream: bool) -> None:
    for reply in ERRORS:

        async def chat(side: Side) -> Any:
            async with aoai(side) as client:
                with pytest.raises(openai.APIStatusError) as e:
                    await client.chat.completions.create(model="m", messages=ASK, stream=stream)
            return type(e.value), e.value.status_code, str(e.value), e.value.body

        async def claude(side: Side) -> Any:
            async with aanth(side) as client:
                with pytest.raises(anthropic.APIStatusError) as e:
                    await client.messages.create(model="m", max_tokens=1, messages=ASK, stream=stream)
            return type(e.value), e.value.status_code, str(e.value), e.value.body

        await golden.same(chat, reply)
        await golden.same(claude, reply)


async def test_golden_client_retries_by_itself(golden: Golden) -> None:
    async def talk(side: Side) -> Any:
        async with aoai(side, max_retries=2) as client:
            return (await client.chat.completions.create(model="m", messages=ASK)).model_dump()

    answers = await golden.same(talk, Reply.server_error(500), Reply.rate_limited(0.1))
    assert [m.start.split()[1] for m in answers] == ["500", "429", "200"]


FAULTS = [
    Reply("some text " * 20, malformed_after=2), Reply("some text " * 20, error_after=3, message="Overloaded"),
    Reply("some text " * 20, ragged=True), Reply("", refusal="no"), Reply("x", truncated=True),
]  # fmt: skip


async def test_golden_odd_streams(golden: Golden) -> None:
    for reply in FAULTS:

        async def chat(side: Side) -> Any:
            async with aoai(side) as client:
                out: list[Any] = []
                try:
                    async for chunk in await client.chat.completions.create(model="m", messages=ASK, stream=True):
                        out.append(chunk.model_dump())
                except Exception as e:
                    out.append((type(e), str(e)))
                return out

        async def claude(side: Side) -> Any:
            async with aanth(side) as client:
                out: list[Any] = []
                try:
                    async for event in await client.messages.create(model="m", max_tokens=9, messages=ASK, stream=True):
                        out.append(event.model_dump())
                except Exception as e:
                    out.append((type(e), str(e)))
                return out

        broken = reply.malformed_after is not None or reply.error_after is not None
        await golden.same(chat, reply, leaves=broken)
        await golden.same(claude, reply, leaves=broken)


@pytest.mark.parametrize("cut", ["rst", "close"])
@pytest.mark.parametrize("after", [0, 4])
async def test_golden_connection_cut(golden: Golden, cut: Any, after: int) -> None:
    for stream in (True, False):

        async def talk(side: Side, stream: bool = stream) -> Any:
            async with aoai(side) as client:
                got: list[Any] = []
                with pytest.raises((openai.APIConnectionError, Exception)) as e:
                    answer: Any = await client.chat.completions.create(model="m", messages=ASK, stream=stream)
                    if stream:
                        async for chunk in answer:
                            got.append(chunk.model_dump())
                assert not isinstance(e.value, (AssertionError, openai.APIStatusError))
                return got, isinstance(e.value, openai.APIConnectionError)

        reply = Reply("some text " * 20, cut=cut, cut_after=after)
        if after:
            answers = await golden.same(talk, reply, whole=False)
            assert not answers[0].whole
        else:
            for side in (golden.direct, golden.through):
                side.provider.fail(reply)
                assert (await talk(side))[0] == []


async def test_golden_other_endpoints(golden: Golden) -> None:
    async def talk(side: Side) -> Any:
        async with aoai(side) as client:
            models = await client.models.list()
            missing: Any = None
            try:
                await client.embeddings.create(model="e", input="x")
            except openai.APIStatusError as e:
                missing = (e.status_code, str(e))
        base = side.openai.removesuffix("/v1")
        async with aiohttp.ClientSession(auto_decompress=False) as http:
            out = []
            for method in ("GET", "PUT", "DELETE", "OPTIONS"):
                async with http.request(
                    method, f"{base}/v1/nothing?a=%2F&b=ü", headers={"Authorization": f"Bearer {side.key}"}
                ) as r:
                    out.append((r.status, await r.read()))
        return [m.model_dump() for m in models.data], missing, out

    for side in (golden.direct, golden.through):
        side.client.clear()
        side.upstream.clear()
    a, b = await talk(golden.direct), await talk(golden.through)
    assert a == b
    x, y = golden.direct.upstream.requests(), golden.through.upstream.requests()
    assert [m.start for m in x] == [m.start for m in y] and golden.rig.gate.asked == []


async def test_golden_through_freezes(golden: Golden) -> None:
    """Frozen and thawed all along, and still the same bytes."""

    async def talk(side: Side) -> Any:
        async def one(i: int) -> Any:
            asked: Any = [{"role": "user", "content": f"{i}"}]
            async with aoai(side) as client:
                return [c.model_dump() async for c in await client.chat.completions.create(
                    model="m", messages=asked, stream=True)]  # fmt: skip

        freezing = asyncio.create_task(freeze()) if side is golden.through else None
        out = []
        for i in range(3):  # one after another: ids depend on the order of calls
            side.provider.fail(Reply("z" * 300, chunk_s=0.005))
            out.append(await one(i))
        if freezing:
            freezing.cancel()
            await asyncio.gather(freezing, return_exceptions=True)
        return out

    count = 0

    async def freeze() -> None:
        nonlocal count
        while True:
            await golden.rig.freeze_and_go()
            count += 1
            await asyncio.sleep(0.01)

    await golden.same(talk)
    assert count > 5


async def test_golden_keys_stay_outside(golden: Golden) -> None:
    async with aoai(golden.through) as client:
        await client.chat.completions.create(model="m", messages=ASK)
    assert golden.through.provider.calls[0].headers["authorization"] == "Bearer real-key"
    assert b"real-key" not in b"".join(map(bytes, golden.through.client.up + golden.through.client.down))
    (row,) = golden.rig.log.rows.values()
    assert "real-key" not in str(row.x) and "rethaw" not in str(row.x.meta)
