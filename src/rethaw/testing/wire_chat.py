"""OpenAI Chat Completions as the service writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

from rethaw.testing.conversation import ProviderRequest
from rethaw.testing.reply import Reply, TokenUsage, pieces


def sse(data: Any) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def usage(counts: TokenUsage) -> dict[str, Any]:
    return {
        "prompt_tokens": counts.input,
        "completion_tokens": counts.output,
        "total_tokens": counts.input + counts.output,
        "prompt_tokens_details": {"cached_tokens": counts.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _finish(reply: Reply) -> str:
    if reply.truncated:
        return "length"
    return "tool_calls" if reply.tool_calls else "stop"


def whole(request: ProviderRequest, reply: Reply, counts: TokenUsage, key: str, created: int) -> bytes:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None, "refusal": reply.refusal}
    if reply.tool_calls:
        message["tool_calls"] = [
            {
                "id": f"call_{key}{i:02d}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(args)},
            }
            for i, (name, args) in enumerate(reply.tool_calls)
        ]
    message["annotations"] = []
    body = {
        "id": f"chatcmpl-{key}",
        "object": "chat.completion",
        "created": created,
        "model": reply.model or request.model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(reply)}],
        "usage": usage(counts),
        "service_tier": "default",
        "system_fingerprint": "fp_5cript3d00",
        **reply.extra,
    }
    return (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode()


def events(
    request: ProviderRequest, reply: Reply, counts: TokenUsage, key: str, created: int
) -> Iterator[tuple[bool, bytes]]:
    """Server-sent events; the flag says that a pause belongs before it (a further piece of text)."""
    options = request.json.get("stream_options")
    with_usage = isinstance(options, dict) and cast(dict[str, Any], options).get("include_usage") is True

    def chunk(delta: dict[str, Any] | None, finish: str | None = None, final: dict[str, Any] | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        body: dict[str, Any] = {
            "id": f"chatcmpl-{key}",
            "object": "chat.completion.chunk",
            "created": created,
            "model": reply.model or request.model,
            "service_tier": "default",
            "system_fingerprint": "fp_5cript3d00",
            "choices": [] if delta is None else [choice],
        }
        if with_usage:
            body["usage"] = final
        body["obfuscation"] = "x" * (len(json.dumps(delta)) % 7 + 1)
        return sse({**body, **reply.extra})

    first: dict[str, Any] = {"role": "assistant", "content": "" if reply.text or not reply.tool_calls else None}
    first["refusal"] = None
    yield False, chunk(first)
    pause = False
    for field, text in (("content", reply.text), ("refusal", reply.refusal or "")):
        for piece in pieces(text, reply.chunks):
            yield pause, chunk({field: piece})
            pause = True
    for i, (name, args) in enumerate(reply.tool_calls):
        head = {"index": i, "id": f"call_{key}{i:02d}", "type": "function", "function": {"name": name, "arguments": ""}}
        yield pause, chunk({"tool_calls": [head]})
        for piece in pieces(json.dumps(args), reply.chunks):
            yield True, chunk({"tool_calls": [{"index": i, "function": {"arguments": piece}}]})
        pause = True
    yield False, chunk({}, _finish(reply))
    if with_usage:
        yield False, chunk(None, None, usage(counts))
    yield False, b"data: [DONE]\n\n"


def error(status: int, message: str, kind: str | None) -> bytes:
    kinds = {
        400: ("invalid_request_error", None),
        401: ("invalid_request_error", "invalid_api_key"),
        404: ("invalid_request_error", None),
        429: ("requests", "rate_limit_exceeded"),
    }
    known, code = kinds.get(status, ("server_error", None))
    body = {"error": {"message": message, "type": kind or known, "param": None, "code": code}}
    return (json.dumps(body, indent=4) + "\n").encode()


def stream_error(message: str) -> bytes:
    return sse({"error": {"message": message, "type": "server_error", "param": None, "code": None}})
