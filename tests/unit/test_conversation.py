"""Recorded calls as conversations: read from the three forms, streamed or whole, and written in each."""

from __future__ import annotations

import json
from typing import Any, cast

import anthropic.types
import pytest
from openai.types.chat import ChatCompletionMessageParam
from openai.types.responses import ResponseInputParam
from pydantic import TypeAdapter

from rethaw.gateway.conversation import Api, Conversation, api_of, events, read, turns
from rethaw.gateway.messages import Form, written
from rethaw.testing import wire_anthropic, wire_chat, wire_responses
from rethaw.testing.conversation import ProviderRequest, turns_of
from rethaw.testing.reply import Reply, TokenUsage

PIXEL = "iVBORw0KGgo="
URL = f"data:image/png;base64,{PIXEL}"
REQUESTS: dict[Api, dict[str, Any]] = {
    "chat": {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": URL}},
            ]},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"deep": true}'}},
                {"id": "call_2", "type": "function", "function": {"name": "look", "arguments": "{}"}},
            ]},
            {"role": "tool", "tool_call_id": "call_1", "content": "a pixel"},
            {"role": "tool", "tool_call_id": "call_2", "content": "red"},
        ],
    },
    "responses": {
        "model": "m",
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [
                {"type": "input_text", "text": "What is this?"},
                {"type": "input_image", "image_url": URL, "detail": "auto"},
            ]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": '{"deep": true}'},
            {"type": "function_call", "call_id": "call_2", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "a pixel"},
            {"type": "function_call_output", "call_id": "call_2", "output": "red"},
        ],
    },
    "messages": {
        "model": "m",
        "max_tokens": 100,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
            ]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "tool_use", "id": "call_1", "name": "look", "input": {"deep": True}},
                {"type": "tool_use", "id": "call_2", "name": "look", "input": {}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": "a pixel"},
                {"type": "tool_result", "tool_use_id": "call_2", "content": [{"type": "text", "text": "red"}]},
            ]},
        ],
    },
}  # fmt: skip
WIRES: dict[Api, Any] = {"chat": wire_chat, "responses": wire_responses, "messages": wire_anthropic}
TOOLS = Reply("Let me see.", tool_calls=[("look", {"at": "ü🧊"}), ("stop", {})])
REPLIES = {"text": Reply("A red pixel.\nYes."), "tools": TOOLS, "only tools": Reply("", tool_calls=[("look", {})])}
FORMS: tuple[Form, ...] = ("openai", "responses", "anthropic")
NAMES: dict[Api, Form] = {"chat": "openai", "responses": "responses", "messages": "anthropic"}


def answered(api: Api, reply: Reply, stream: bool, request: dict[str, Any] | None = None) -> Conversation:
    body = json.dumps(REQUESTS[api] if request is None else request).encode()
    asked = ProviderRequest(1, api, "POST", "/", {}, body, json.loads(body))
    counts = TokenUsage(1, 2, 0)
    if stream:
        answer = b"".join(piece for _, piece in WIRES[api].events(asked, reply, counts, "k", 1))
    else:
        answer = WIRES[api].whole(asked, reply, counts, "k", 1)
    found = read(api, body, answer, stream=stream)
    assert found is not None
    return found


def valid(form: Form, messages: list[dict[str, Any]], system: str) -> None:
    """By the types of the provider's own client, and by the rules that they do not state."""
    if form == "openai":
        TypeAdapter(list[ChatCompletionMessageParam]).validate_python(messages)
        open_calls: list[str] = []
        for message in messages:
            if message["role"] == "tool":
                open_calls.remove(message["tool_call_id"])
                continue
            assert not open_calls
            open_calls = [call["id"] for call in message.get("tool_calls", [])]
            assert message.get("content") or message.get("tool_calls")
    elif form == "responses":
        TypeAdapter(ResponseInputParam).validate_python(messages)
    else:
        TypeAdapter(list[anthropic.types.MessageParam]).validate_python(messages)
        assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"][: len(messages)] or len(
            messages
        ) > 4
        for before, message in zip([None, *messages], messages, strict=False):
            assert before is None or before["role"] != message["role"]
            assert message["content"]
            uses = {b["id"] for b in before["content"] if b["type"] == "tool_use"} if before else set()
            results = [b["tool_use_id"] for b in message["content"] if b["type"] == "tool_result"]
            assert set(results) == uses
            assert all(b["type"] == "tool_result" for b in message["content"][: len(results)])
            assert all(b.get("text") != "" for b in message["content"])
    assert system == "Be brief."


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("api", REQUESTS)
def test_every_form_says_the_same_in_each(api: Api, stream: bool, reply: str, form: Form) -> None:
    found = answered(api, REPLIES[reply], stream)
    messages, system = written(found, form)
    valid(form, messages, system)
    assert json.loads(json.dumps(messages)) == messages
    # what a provider of that form makes of it
    other: Api = next(a for a, name in NAMES.items() if name == form)
    body = (
        {"messages": messages, "system": system} if other == "messages" else {"messages": messages, "input": messages}
    )
    understood = [t for t in turns_of(other, body) if t.role != "system"]
    assert [(t.role, t.text) for t in understood] == [
        ("user", "What is this?"), ("assistant", ""), ("tool", "a pixel"), ("tool", "red"),
        ("assistant", REPLIES[reply].text),
    ]  # fmt: skip
    calls = [(c.name, c.args) for t in understood for c in t.tool_calls]
    assert calls == [("look", {"deep": True}), ("look", {}), *((n, dict(a)) for n, a in REPLIES[reply].tool_calls)]
    assert [t.tool_id for t in understood if t.role == "tool"] == ["call_1", "call_2"]
    assert PIXEL in json.dumps(messages)


@pytest.mark.parametrize("api", REQUESTS)
def test_in_its_own_form_it_goes_back_as_it_was_sent(api: Api) -> None:
    found = answered(api, TOOLS, True)
    messages, _ = written(found, NAMES[api])
    sent = REQUESTS[api].get("messages") or REQUESTS[api]["input"]
    assert messages[: len(sent)] == sent
    assert answered(api, TOOLS, False).messages == found.messages


def test_the_whole_answer_is_taken_as_its_client_would_send_it_back() -> None:
    (said,) = answered("chat", TOOLS, True).messages[5:]
    assert said == {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {
                "id": "call_k00",
                "type": "function",
                "function": {"name": "look", "arguments": json.dumps({"at": "ü🧊"})},
            },
            {"id": "call_k01", "type": "function", "function": {"name": "stop", "arguments": "{}"}},
        ],
    }
    (said,) = answered("messages", TOOLS, True).messages[3:]
    assert said["content"] == [
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "toolu_k00", "name": "look", "input": {"at": "ü🧊"}},
        {"type": "tool_use", "id": "toolu_k01", "name": "stop", "input": {}},
    ]
    assert answered("responses", TOOLS, True).answer == answered("responses", TOOLS, False).answer == "resp_k"


def test_thinking_stays_with_the_model_that_thought() -> None:
    stream = b"".join(
        b"event: x\ndata: " + json.dumps(e).encode() + b"\n\n"
        for e in (
            {"type": "message_start", "message": {"id": "msg_1"}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "abc"}},
            {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "Hi"}},
            {"type": "message_stop"},
        )
    )  # fmt: skip
    found = read("messages", json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode(), stream, stream=True)
    assert found is not None
    assert found.messages[1]["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": "abc"}, {"type": "text", "text": "Hi"},
    ]  # fmt: skip
    assert written(found, "openai")[0] == [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Hi"}]


@pytest.mark.parametrize("api", REQUESTS)
def test_a_cut_or_broken_answer_is_left_out(api: Api) -> None:
    body = json.dumps(REQUESTS[api]).encode()
    asked = ProviderRequest(1, api, "POST", "/", {}, body, json.loads(body))
    pieces = [piece for _, piece in WIRES[api].events(asked, TOOLS, TokenUsage(1, 2, 0), "k", 1)]
    alone = read(api, body, None, stream=True)
    assert alone is not None
    for answer in (b"".join(pieces[:4]), b"".join(pieces[:4]) + WIRES[api].stream_error("later"), b"nonsense", b""):
        assert read(api, body, answer, stream=True) == alone
    assert read(api, body, b"<html>", stream=False) == alone


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"messages": 3', b"\xff", b'{"messages": null}'])
def test_a_request_that_is_none_of_these_is_none(body: bytes) -> None:
    for api in ("chat", "messages"):
        found = read(cast("Api", api), body, None, stream=False)
        assert found is None or found.messages == ()


def test_what_a_form_does_not_know() -> None:
    request = {
        "messages": [
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "a" * 60, "type": "function", "function": {"name": "f", "arguments": "not json"}},
            ]},
            {"role": "tool", "tool_call_id": "a" * 60, "content": ""},
        ],
    }  # fmt: skip
    found = read("chat", json.dumps(request).encode(), None, stream=False)
    assert found is not None
    messages, system = written(found, "anthropic")
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[2]["content"] == [{"type": "text", "text": "[file left out]"}]
    use, result = messages[3]["content"][0], messages[4]["content"][0]
    assert use["id"] == result["tool_use_id"] and len(use["id"]) < 40
    assert use["input"] == {"input": "not json"}
    assert system == ""
    items, _ = written(found, "responses")
    assert items[-1]["call_id"] == items[-2]["call_id"] == use["id"]
    assert items[-1]["output"] == "(nothing)"


def test_a_call_that_goes_on_from_an_earlier_answer() -> None:
    first = answered("responses", Reply("One."), False, {"input": "count", "instructions": "Up."})
    second = answered("responses", Reply("Two."), False, {"input": "on", "previous_response_id": first.answer})
    assert second.previous == first.answer
    whole = second.after(first)
    assert [t.text for t in turns(whole)] == ["count", "One.", "on", "Two."]  # instructions are of each call alone
    assert whole.previous is None


def test_endpoints() -> None:
    paths = ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings"]
    assert [api_of(path) for path in paths] == ["chat", "responses", "messages", None, None]
    assert list(events(b'data: {"a":\r\ndata: 1}\r\n\r\ndata: [DONE]\n\n')) == [{"a": 1}]
