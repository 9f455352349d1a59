"""The scripted provider, seen by the real clients and on the wire."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from rethaw.model.errors import InvalidInput
from rethaw.testing.provider import (
    ProviderRequest,
    Reply,
    ScriptedProvider,
    TokenUsage,
    by_turn,
    echo,
    load_script,
    matching,
)

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
ATOOL: Any = {"name": "add", "input_schema": {"type": "object"}}
ASK: Any = [{"role": "user", "content": "one and two?"}]
TURNS = by_turn([
    Reply("let me see", tool_calls=[("add", {"a": 1, "b": 2}), ("add", {"a": "ü"})], usage=TokenUsage(100, 7, 40)),
    lambda r: Reply(f"it is {','.join(r.tool_results)}"),
])  # fmt: skip


@contextlib.asynccontextmanager
async def chat(p: ScriptedProvider, **more: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=p.openai_url, api_key="k", max_retries=0, timeout=20, **more) as client:
        yield client


@contextlib.asynccontextmanager
async def claude(p: ScriptedProvider, **more: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        base_url=p.anthropic_url, api_key="k", max_retries=0, timeout=20, **more
    ) as client:
        yield client


# ---------------------------------------------------------------- the three formats, both ways


@pytest.mark.parametrize("stream", [False, True])
async def test_provider_chat_tool_loop(stream: bool) -> None:
    async with ScriptedProvider(TURNS) as p, chat(p) as client:
        messages: list[Any] = list(ASK)

        async def ask() -> Any:
            if not stream:
                return await client.chat.completions.create(model="m-1", messages=messages, tools=[TOOL])  # type: ignore[list-item]
            async with client.chat.completions.stream(
                model="m-1",
                messages=messages,
                tools=[TOOL],  # type: ignore[list-item]
                stream_options={"include_usage": True},
            ) as s:
                async for _ in s:
                    pass
                return await s.get_final_completion()

        first = await ask()
        message = first.choices[0].message
        assert first.choices[0].finish_reason == "tool_calls"
        assert message.content == "let me see"
        assert [json.loads(c.function.arguments) for c in message.tool_calls] == [{"a": 1, "b": 2}, {"a": "ü"}]
        assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (100, 7)
        assert first.usage.prompt_tokens_details.cached_tokens == 40
        messages.append({
            "role": "assistant",
            "content": message.content,
            "tool_calls": [
                {"id": c.id, "type": "function", "function": {"name": "add", "arguments": c.function.arguments}}
                for c in message.tool_calls
            ],
        })  # fmt: skip
        messages += [
            {"role": "tool", "tool_call_id": c.id, "content": str(i)} for i, c in enumerate(message.tool_calls)
        ]
        second = await ask()
        assert second.choices[0].message.content == "it is 0,1"
        assert second.choices[0].finish_reason == "stop"
        assert p.count == 2
        assert all(c.completed and c.status == 200 and not c.client_gone for c in p.calls)


@pytest.mark.parametrize("stream", [False, True])
async def test_provider_responses_tool_loop(stream: bool) -> None:
    async with ScriptedProvider(TURNS) as p, chat(p) as client:
        items: list[Any] = list(ASK)

        async def ask(**more: Any) -> Any:
            if not stream:
                return await client.responses.create(model="m-1", **more)
            async with client.responses.stream(model="m-1", **more) as s:
                numbers = [e.sequence_number async for e in s]
                assert numbers == list(range(len(numbers)))
                return await s.get_final_response()

        first = await ask(input=items)
        assert first.output_text == "let me see"
        calls = [o for o in first.output if o.type == "function_call"]
        assert [json.loads(c.arguments) for c in calls] == [{"a": 1, "b": 2}, {"a": "ü"}]
        assert (first.usage.input_tokens, first.usage.input_tokens_details.cached_tokens) == (100, 40)
        results = [{"type": "function_call_output", "call_id": c.call_id, "output": "3"} for c in calls]
        by_id = await ask(previous_response_id=first.id, input=results)
        items += [o.model_dump(exclude={"parsed_arguments"}, exclude_none=True) for o in first.output]
        for item in items:
            for part in item.get("content", []) if isinstance(item.get("content"), list) else []:
                part.pop("parsed", None)
        in_full = await ask(input=items + results)
        assert by_id.output_text == in_full.output_text == "it is 3,3"


@pytest.mark.parametrize("stream", [False, True])
async def test_provider_messages_tool_loop(stream: bool) -> None:
    async with ScriptedProvider(TURNS) as p, claude(p) as client:
        messages: list[Any] = list(ASK)

        async def ask() -> Any:
            if not stream:
                return await client.messages.create(model="m-1", max_tokens=99, messages=messages, tools=[ATOOL])
            async with client.messages.stream(model="m-1", max_tokens=99, messages=messages, tools=[ATOOL]) as s:
                return await s.get_final_message()

        first = await ask()
        assert first.stop_reason == "tool_use"
        assert first.content[0].text == "let me see"
        assert [b.input for b in first.content[1:]] == [{"a": 1, "b": 2}, {"a": "ü"}]
        assert (first.usage.input_tokens, first.usage.cache_read_input_tokens, first.usage.output_tokens) == (60, 40, 7)
        blocks = [b.model_dump(include={"type", "text", "id", "name", "input"}) for b in first.content]
        messages.append({"role": "assistant", "content": blocks})
        results = [{"type": "tool_result", "tool_use_id": b.id, "content": "3"} for b in first.content[1:]]
        messages.append({"role": "user", "content": results})
        second = await ask()
        assert second.content[0].text == "it is 3,3"
        assert second.stop_reason == "end_turn"


def test_provider_serves_sync_clients() -> None:
    async def serve() -> None:
        async with ScriptedProvider(echo) as p:

            def use() -> None:
                with openai.OpenAI(base_url=p.openai_url, api_key="k", max_retries=0) as o:
                    assert o.chat.completions.create(model="m", messages=ASK).choices[0].message.content == (
                        "0: one and two?"
                    )
                    text = [
                        e.choices[0].delta.content
                        for e in o.chat.completions.create(model="m", messages=ASK, stream=True)
                    ]
                    assert "".join(t or "" for t in text) == "0: one and two?"
                    raw = o.chat.completions.with_raw_response.create(model="m", messages=ASK)
                    assert raw.headers["x-request-id"].startswith("req_")
                    assert raw.headers["x-ratelimit-limit-requests"] == "10000"
                with anthropic.Anthropic(base_url=p.anthropic_url, api_key="k", max_retries=0) as a:
                    message = a.messages.create(model="m", max_tokens=9, messages=ASK)
                    assert message._request_id and message._request_id.startswith("req_")
                    with a.messages.stream(model="m", max_tokens=9, messages=ASK) as s:
                        assert "".join(s.text_stream) == "0: one and two?"
                    assert a.messages.count_tokens(model="m", messages=ASK).input_tokens > 0

            await asyncio.to_thread(use)

    asyncio.run(serve())


async def test_provider_frames_streams_as_the_services_do() -> None:
    """Names of events, separators and the end marks, byte by byte."""
    async with (
        ScriptedProvider(by_turn([Reply("ab", extra={"zz_unknown": [1]})])) as p,
        aiohttp.ClientSession() as http,
    ):

        async def stream(path: str, body: dict[str, Any]) -> list[bytes]:
            async with http.post(p.url + path, json={"model": "m", "stream": True, **body}) as r:
                assert r.content_type == "text/event-stream"
                assert r.headers["transfer-encoding"] == "chunked"
                parts = (await r.read()).split(b"\n\n")
                assert parts.pop() == b""
                return parts

        lines = await stream("/v1/chat/completions", {"messages": ASK})
        assert all(line.startswith(b"data: ") for line in lines)
        assert lines[-1] == b"data: [DONE]"
        chunks = [json.loads(line[6:]) for line in lines[:-1]]
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
        assert "usage" not in chunks[0]
        assert all(c["zz_unknown"] == [1] for c in chunks)

        def named(lines: list[bytes]) -> list[str]:
            out: list[str] = []
            for line in lines:
                event, data = line.split(b"\n")
                assert event.startswith(b"event: ") and data.startswith(b"data: ")
                assert json.loads(data[6:])["type"] == event[7:].decode()
                out.append(event[7:].decode())
            return out

        assert named(await stream("/v1/responses", {"input": "x"})) == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert named(await stream("/v1/messages", {"messages": ASK, "max_tokens": 9})) == [
            "message_start",
            "content_block_start",
            "ping",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]


async def test_provider_refusal_truncation_and_ragged_writes() -> None:
    replies = [Reply(refusal="no"), Reply("cut sh", truncated=True, ragged=True), Reply("häppy", ragged=True)]
    async with ScriptedProvider(replies) as p, chat(p) as client:
        first = await client.chat.completions.create(model="m", messages=ASK)
        assert (first.choices[0].message.refusal, first.choices[0].message.content) == ("no", None)
        for want, finish in (("cut sh", "length"), ("häppy", "stop")):
            async with client.chat.completions.stream(model="m", messages=ASK) as s:
                text = ""
                with contextlib.suppress(openai.LengthFinishReasonError):
                    async for e in s:
                        if e.type == "chunk" and e.chunk.choices:
                            text += e.chunk.choices[0].delta.content or ""
                            last = e.chunk.choices[0].finish_reason
                assert (text, last) == (want, finish)
        with pytest.raises(openai.BadRequestError, match="3 replies and this is call 4"):
            await client.chat.completions.create(model="m", messages=ASK)


async def test_provider_gzip_only_for_clients_that_accept_it() -> None:
    async with ScriptedProvider(lambda r: Reply("z" * 500, gzip=True)) as p, chat(p) as client:
        raw = await client.chat.completions.with_raw_response.create(model="m", messages=ASK)
        assert raw.headers["content-encoding"] == "gzip"
        assert (await client.chat.completions.create(model="m", messages=ASK)).choices[0].message.content == "z" * 500


# ---------------------------------------------------------------- failures


async def test_provider_errors_in_each_providers_form() -> None:
    fails = [Reply.rate_limited(7), Reply.overloaded(), Reply.server_error(), Reply(status=400, message="bad thing")]
    kinds: list[type[Exception]] = [openai.RateLimitError, openai.InternalServerError, openai.InternalServerError]
    async with ScriptedProvider([*fails, *fails]) as p, chat(p) as client, claude(p) as other:
        for kind in [*kinds, openai.BadRequestError]:
            with pytest.raises(kind) as caught:
                await client.chat.completions.create(model="m", messages=ASK)
            if kind is openai.RateLimitError:
                assert isinstance(caught.value, openai.RateLimitError)
                assert caught.value.response.headers["retry-after"] == "7"
                assert caught.value.code == "rate_limit_exceeded"
        types: list[str] = []
        for _ in fails:
            with pytest.raises(anthropic.APIStatusError) as status:
                await other.messages.create(model="m", max_tokens=9, messages=ASK)
            assert isinstance(status.value.body, dict)
            types.append(status.value.body["error"]["type"])
            assert status.value.body["type"] == "error" and status.value.body["request_id"]
        assert types == ["rate_limit_error", "overloaded_error", "api_error", "invalid_request_error"]
        assert [c.status for c in p.calls] == [429, 529, 500, 400] * 2


@pytest.mark.parametrize("how", ["rst", "close"])
@pytest.mark.parametrize("after", [0, 3])
async def test_provider_cuts_a_stream(how: str, after: int) -> None:
    async with ScriptedProvider([Reply("hello " * 20, cut=how, cut_after=after), "fine"]) as p:  # type: ignore[arg-type]

        async def post() -> tuple[bytes, bool]:
            """The bytes of the answer, and whether the connection was reset."""
            reader, writer = await asyncio.open_connection(p.host, p.port)
            body = json.dumps({"model": "m", "messages": ASK, "stream": True}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + body)
            got = b""
            try:
                while data := await reader.read(4096):
                    got += data
            except ConnectionResetError:
                return got, True
            finally:
                writer.close()
            return got, False

        got, reset = await post()
        assert reset == (how == "rst")
        assert got.count(b"\n\n") == after
        assert not got.endswith(b"0\r\n\r\n")
        whole, reset = await post()
        assert whole.endswith(b"0\r\n\r\n") and b"data: [DONE]" in whole and not reset
        assert [c.completed for c in p.calls] == [False, True]
        assert not p.calls[0].client_gone


async def test_provider_cuts_a_whole_answer() -> None:
    async with ScriptedProvider([Reply("hello " * 20, cut="close", cut_after=1)]) as p, chat(p) as client:
        with pytest.raises(openai.APIConnectionError):
            await client.chat.completions.create(model="m", messages=ASK)


async def test_provider_malformed_and_error_events() -> None:
    async with (
        ScriptedProvider([Reply("abc" * 20, malformed_after=2), Reply("abc" * 20, error_after=4)]) as p,
        chat(p) as client,
        claude(p) as other,
    ):
        with pytest.raises(json.JSONDecodeError):
            async for _ in await client.chat.completions.create(model="m", messages=ASK, stream=True):
                pass
        with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
            async with other.messages.stream(model="m", max_tokens=9, messages=ASK) as s:
                await s.get_final_message()


async def test_provider_slow_and_silent() -> None:
    """A client that gives up is seen; delays are what was asked for."""
    async with (
        ScriptedProvider([Reply(hang=True), Reply("abcd", first_byte_s=0.3, chunk_s=0.2, chunks=4)]) as p,
        chat(p) as client,
    ):
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.3).chat.completions.create(model="m", messages=ASK)
        async with asyncio.timeout(5):
            while not p.calls[0].client_gone:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        clock = asyncio.get_running_loop().time
        start, seen = clock(), list[float]()
        async for _ in await client.chat.completions.create(model="m", messages=ASK, stream=True):
            seen.append(clock() - start)
        assert 0.3 <= seen[0] < 0.8
        assert seen[-1] - seen[0] >= 0.58


@pytest.mark.parametrize("text", ["in several pieces of text", "one piece"])
async def test_provider_holds_a_stream_after_its_first_piece(text: str) -> None:
    """A test that holds it decides when it goes on."""
    gate = asyncio.Event()
    async with ScriptedProvider(lambda _: Reply(text, hold=gate.is_set)) as p, chat(p) as client:
        stream = aiter(await client.chat.completions.create(model="m", messages=ASK, stream=True))
        first = await anext(stream)
        assert first.choices[0].delta.role == "assistant"
        more = asyncio.create_task(_said(stream))
        await asyncio.sleep(0.3)  # long enough for a whole answer
        assert not more.done() and not p.calls[0].completed
        gate.set()
        assert await more == text


async def _said(stream: Any) -> str:
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


async def test_provider_refuses_connections_for_a_while() -> None:
    async with ScriptedProvider(echo) as p, chat(p) as client:
        await p.refuse(0.4)
        with pytest.raises(openai.APIConnectionError) as caught:
            await client.chat.completions.create(model="m", messages=ASK)
        assert "ConnectError" in repr(caught.value.__cause__)
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(openai.APIConnectionError):
                    await client.chat.completions.create(model="m", messages=ASK)
                    break
                await asyncio.sleep(0.05)
        assert p.count == 1


# ---------------------------------------------------------------- scripts


async def test_provider_by_turn_is_a_pure_function_of_the_conversation() -> None:
    async with ScriptedProvider(TURNS) as p, chat(p) as client:
        answers = [await client.chat.completions.create(model="m", messages=ASK) for _ in range(3)]
        assert {a.choices[0].message.content for a in answers} == {"let me see"}
        assert len({a.id for a in answers}) == 3, "another call is another answer, by its id"


async def test_provider_matching_and_armed_failures() -> None:
    script = matching([("two", "found"), (".*", "other")])
    async with ScriptedProvider(script) as p, chat(p) as client:
        p.fail(Reply.server_error(), times=2, when=lambda r: "two" in r.last_text)
        said = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "three"}])
        assert said.choices[0].message.content == "other"
        for _ in range(2):
            with pytest.raises(openai.InternalServerError):
                await client.chat.completions.create(model="m", messages=ASK)
        assert (await client.chat.completions.create(model="m", messages=ASK)).choices[0].message.content == "found"


async def test_provider_script_may_wait() -> None:
    gate = asyncio.Event()

    async def script(request: ProviderRequest) -> str:
        await gate.wait()
        return f"{request.user_turns} {request.system} {request.tools}"

    async with ScriptedProvider(script) as p, chat(p) as client:
        messages: Any = [{"role": "developer", "content": "sys"}, *ASK]
        task = asyncio.create_task(client.chat.completions.create(model="m", messages=messages, tools=[TOOL]))  # type: ignore[list-item]
        await p.wait_for_calls(1, 10)
        assert not task.done()
        gate.set()
        assert (await task).choices[0].message.content == "1 sys ('add',)"


def test_provider_script_names(tmp_path: Path) -> None:
    file = tmp_path / "s.py"
    file.write_text("def script(r): return 'a'\nother = ['b']\n")
    assert load_script(str(file)) is not None
    assert load_script(f"{file}::other") is not None
    with pytest.raises(InvalidInput, match="no 'third'"):
        load_script(f"{file}::third")
    with pytest.raises(InvalidInput, match=r"nowhere\.py"):
        load_script("nowhere.py")
    with pytest.raises(InvalidInput, match="'txt'"):
        Reply.from_json({"txt": "x"})


# ---------------------------------------------------------------- as a process


async def _spawn(*args: str) -> tuple[asyncio.subprocess.Process, dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "rethaw.testing.provider", *args, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(20):
        return process, json.loads(await process.stdout.readline())


async def test_provider_process_counts_over_kill_9(tmp_path: Path) -> None:
    """The journal has each call that was received in full, also when the provider is killed while it answers."""
    (tmp_path / "s.py").write_text(
        "from rethaw.testing.provider import Reply, by_turn\nscript = by_turn([Reply('x' * 50, chunk_s=9)])\n"
    )
    journal = tmp_path / "journal.jsonl"
    process, at = await _spawn("--script", str(tmp_path / "s.py"), "--journal", str(journal))
    client = openai.AsyncOpenAI(base_url=at["openai_url"], api_key="k", max_retries=0, timeout=20)
    stream = await client.chat.completions.create(model="m", messages=ASK, stream=True)
    async for _ in stream:
        break
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line["what"] for line in lines] == ["call"]
    again, at = await _spawn("--journal", str(journal), "--port", str(at["port"]))
    try:
        assert (await client.chat.completions.create(model="m", messages=ASK)).choices[0].message.content
        async with aiohttp.ClientSession() as http:
            async with http.get(at["url"] + "/_calls") as r:
                assert (await r.json())["count"] == 2
            async with http.post(at["url"] + "/_fail", json={"status": 529, "contains": "two"}) as r:
                assert r.status == 200
            async with http.post(at["url"] + "/_fail", json={"statsu": 529}) as r:
                assert r.status == 422
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="m", messages=ASK)
        assert (await client.chat.completions.create(model="m", messages=ASK)).choices
    finally:
        await client.close()
        again.terminate()
        async with asyncio.timeout(10):
            assert await again.wait() == 0
    whats = [json.loads(line)["what"] for line in journal.read_text().splitlines()]
    assert whats.count("call") == 4
