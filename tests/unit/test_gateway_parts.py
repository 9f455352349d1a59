"""Requests, identity, usage, retry-after, providers: the parts without I/O."""

from __future__ import annotations

import gzip
import json
import zlib
from email.utils import formatdate
from typing import Any

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from rethaw.gateway import hold
from rethaw.gateway.providers import Providers
from rethaw.gateway.request import model_name, parse
from rethaw.gateway.usage import decode, terminal_at, usage_of
from rethaw.model.errors import InvalidInput, ProviderError, RethawError, TooLarge

META: dict[str, Any] = {
    "provider": "openai", "method": "POST", "path": "/v1/chat/completions", "query": "a=1&b=%20", "guest_id": "1.2",
    "headers": [["Accept", "*/*"], ["User-Agent", "x"], ["Authorization", "Bearer k"], ["Connection", "x-drop"],
                ["X-Drop", "1"], ["Host", "h"], ["X-Twice", "1"], ["x-twice", "2"]],
}  # fmt: skip


def test_headers_keep_order_and_lose_what_is_the_hops_or_secret():
    r = parse(META)
    assert r.headers == (("Accept", "*/*"), ("User-Agent", "x"), ("X-Twice", "1"), ("x-twice", "2"))


def test_identity_is_of_what_means_something():
    def digest(body: bytes = b"{}", **changes: Any) -> str:
        return parse({**META, **changes}).digest(body)

    base = digest()
    same = [["x-stainless-retry-count", "2"], ["accept", "*/*"], ["traceparent", "0"], ["x-api-key", "other"]]
    assert digest(headers=same) == base == digest(guest_id="1.9")
    others = {
        digest(b"{ }"), digest(provider="x"), digest(method="PUT"), digest(path="/v1/responses"), digest(query="a=1"),
        digest(headers=[["Accept", "*/*"], ["anthropic-beta", "b"]]), digest(headers=[["Accept", "text/plain"]]),
        digest(headers=[]), base,
    }  # fmt: skip
    assert len(others) == 9
    assert digest(path="/v1/a", query="b") != digest(path="/v1/", query="ab")


@pytest.mark.parametrize(
    "bad",
    [
        {"provider": "../x"}, {"provider": 3}, {"provider": ""}, {"method": "CONNECT"}, {"method": "get"},
        {"path": "v1"}, {"path": "/v1 x"}, {"path": "/\x00"}, {"path": "/a/../b"}, {"path": "/%2e%2E/b"},
        {"path": "/a/%252e%252e/b"}, {"path": "/a%2f..%2fb"}, {"path": "/a\\..\\b"}, {"path": "/a#b"}, {"path": "/é"},
        {"query": "a b"}, {"query": "a\nb"}, {"query": "#"}, {"guest_id": ""}, {"guest_id": "a b"}, {"headers": "x"},
        {"headers": [["a"]]}, {"headers": [["a", 1]]}, {"headers": [["a b", "c"]]}, {"headers": [["a", "b\r\nc: d"]]},
        {"headers": [["a", "\x00"]]}, {"headers": {"a": "b"}}, {"headers": [["a", "\u1234"]]},
    ],
)  # fmt: skip
def test_what_a_guest_may_not_say(bad: dict[str, Any]):
    with pytest.raises(InvalidInput):
        parse({**META, **bad})


@pytest.mark.parametrize("bad", [{"path": "/" + "a" * 9000}, {"headers": [["a", "b" * 70000]]},
                                 {"headers": [["a", "b"]] * 300}])  # fmt: skip
def test_what_is_too_much(bad: dict[str, Any]):
    with pytest.raises(TooLarge):
        parse({**META, **bad})


@given(
    st.dictionaries(
        st.sampled_from(sorted(META)),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
        ),
    )
)
def test_any_lie_is_refused_or_harmless(lies: dict[str, Any]):
    try:
        r = parse({**META, **lies})
    except RethawError:
        return
    url = Providers.from_config({}, {"OPENAI_API_KEY": "k"}).get("openai").url(r.path, r.query)
    assert url.startswith("https://api.openai.com/") and url.isascii() and not set(url) & set(" \r\n\t#\\")


def test_model_names():
    assert model_name(b'{"messages": [{"model": "no"}], "model": "yes"}') == "yes"
    assert model_name(b'{"model": "big", "messages": ["' + b"x" * 70000 + b'"]}') == "big"
    for other in (b"", b"[]", b"\xff", b'{"model": 3}', b"[" * 5000, b"--multipart"):
        assert model_name(other) is None


SSE = (("Content-Type", "text/event-stream; charset=utf-8"),)
JSON = (("content-type", "application/json"),)
ANTHROPIC = (
    b'event: message_start\ndata: {"type":"message_start","message":{"model":"claude","usage":{"input_tokens":10,'
    b'"cache_read_input_tokens":5,"output_tokens":1}}}\n\nevent: content_block_delta\ndata: {"usage"\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":42}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
CHAT = (
    b'data: {"model":"gpt","choices":[]}\n\ndata: {"choices":[]}\n\n'
    b'data: {"model":"gpt","usage":{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":'
    b'{"cached_tokens":2}}}\n\ndata: [DONE]\n\n'
)
RESPONSES = (
    b'event: response.created\ndata: {"response":{"model":"gpt-r","usage":null}}\n\n'
    b'event: response.completed\ndata: {"response":{"model":"gpt-r","usage":{"input_tokens":4,'
    b'"input_tokens_details":{"cached_tokens":1},"output_tokens":9}}}\n\n'
)


def counts(headers: Any, body: bytes) -> Any:
    u = usage_of(headers, body)
    return u and (u.model, u.input_tokens, u.cached_tokens, u.output_tokens)


def test_usage_of_each_format():
    assert counts(SSE, ANTHROPIC) == ("claude", 15, 5, 42)
    assert counts(SSE, CHAT) == ("gpt", 7, 2, 3)
    assert counts(SSE, CHAT.replace(b"\n", b"\r\n")) == ("gpt", 7, 2, 3)
    assert counts(SSE, RESPONSES) == ("gpt-r", 4, 1, 9)
    whole = {"model": "m", "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    assert counts(JSON, json.dumps(whole).encode()) == ("m", 1, None, 2)
    whole = {"model": "m", "usage": {"input_tokens": 1, "cache_creation_input_tokens": 3, "output_tokens": 2}}
    assert counts(JSON, json.dumps(whole).encode()) == ("m", 4, None, 2)
    for encoding, pack in (("gzip", gzip.compress), ("deflate", zlib.compress), ("zstd", zstd.compress)):
        assert counts((*SSE, ("Content-Encoding", encoding)), pack(CHAT)) == ("gpt", 7, 2, 3)


@given(
    st.binary(), st.sampled_from([SSE, JSON, (*JSON, ("content-encoding", "gzip")), (*SSE, ("content-encoding", "br"))])
)
def test_usage_never_fails(body: bytes, headers: Any):
    usage_of(headers, body)
    for start in (b"data: {", b'{"usage": {"input_tokens": true, "output_tokens": "x"}, "model": 3', b'{"message": 3}'):
        usage_of(headers, start + body)


def test_bombs_are_cut():
    assert len(decode(gzip.compress(b"\0" * (40 << 20)), "gzip") or b"") <= 16 << 20


@pytest.mark.parametrize("body", [ANTHROPIC, CHAT, RESPONSES])
def test_the_last_event_is_seen_and_no_other(body: bytes):
    at = terminal_at(body)
    assert at == max(body.rfind(b"data: [DONE]"), body.rfind(b"event: message_stop"),
                     body.rfind(b"event: response.completed"))  # fmt: skip
    assert terminal_at(body[:at]) == -1
    assert terminal_at(b'data: {"text": "data: [DONE]"}\n\nevent: response.completed.not\n') == -1


def test_retry_after_forms():
    assert hold.retry_after([("Retry-After", "3")]) == 3
    assert hold.retry_after([("retry-after", "9"), ("retry-after-ms", "1500")]) == 1.5
    assert hold.retry_after([("retry-after", formatdate(0, usegmt=True))]) == 0
    for odd in ("soon", "-1", "inf", "nan", "", "1e300"):
        assert hold.retry_after([("retry-after", odd)]) is None
    assert [hold.pause(n, None) for n in (1, 2, 3, 20)] == [1, 2, 4, 60]
    assert not hold.says_later(429, [("x-should-retry", "false")])
    assert not hold.says_later(503, []) and hold.says_later(503, [("retry-after", "1")]) and hold.says_later(529, [])


def test_providers():
    p = Providers.from_config(
        {
            "openai": {"base_url": "https://proxy.example/openai/v1/"},
            "gemini": {"base_url": "https://g.example", "auth": "header:X-Goog-Api-Key", "key_env": "G",
                       "model_calls": ["/v1beta/models/*:generateContent"]},
            "local": {"base_url": "http://127.0.0.1:11434", "auth": "none"},
        },
        {"OPENAI_API_KEY": "ok", "G": "gk"},
    )  # fmt: skip
    openai, gemini = p.get("openai"), p.get("gemini")
    assert openai.url("/v1/chat/completions", "x=1") == "https://proxy.example/openai/v1/chat/completions?x=1"
    assert (openai.auth_header, openai.auth_value) == ("Authorization", "Bearer ok")
    assert (gemini.auth_header, gemini.auth_value) == ("X-Goog-Api-Key", "gk")
    assert gemini.is_model_call("POST", "/v1beta/models/x:generateContent")
    assert not gemini.is_model_call("POST", "/v1beta/files")
    assert p.get("local").ready and p.get("local").is_model_call("POST", "/any")
    assert openai.is_model_call("POST", "/v1/responses") and not openai.is_model_call("GET", "/v1/responses")
    with pytest.raises(ProviderError, match="ANTHROPIC_API_KEY"):
        p.get("anthropic")
    with pytest.raises(ProviderError, match=r"\[providers.x\]"):
        p.get("x")


@pytest.mark.parametrize(
    "table",
    [
        {}, {"base_url": "api.example"}, {"base_url": "https://u:p@h"}, {"base_url": "https://h?x"},
        {"base_url": "https://h", "auth": "basic"}, {"base_url": "https://h", "format": "x"},
        {"base_url": "https://h", "keyy": "x"}, {"base_url": "https://h", "key": "a\nb"},
        {"base_url": "https://h", "key": 3}, {"base_url": "https://h", "model_calls": "x"},
        {"base_url": "https://h", "auth": "header:"}, 3,
    ],
)  # fmt: skip
def test_bad_provider_tables_are_named(table: Any):
    with pytest.raises(InvalidInput, match=r"providers\.p"):
        Providers.from_config({"p": table}, {})
