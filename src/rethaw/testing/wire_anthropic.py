"""Anthropic Messages as the service writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rethaw.testing.conversation import ProviderRequest
from rethaw.testing.reply import Reply, TokenUsage, pieces

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


def usage(counts: TokenUsage, output: int) -> dict[str, Any]:
    """`input_tokens` here leaves out what came from the cache, unlike OpenAI's."""
    return {
        "input_tokens": counts.input - counts.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": output,
        "service_tier": "standard",
    }


def _stop(reply: Reply) -> str:
    if reply.refusal is not None:
        return "refusal"
    if reply.truncated:
        return "max_tokens"
    return "tool_use" if reply.tool_calls else "end_turn"


def _blocks(reply: Reply, key: str) -> list[dict[str, Any]]:
    text = reply.refusal if reply.refusal is not None else reply.text
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    for i, (name, args) in enumerate(reply.tool_calls):
        blocks.append({"type": "tool_use", "id": f"toolu_{key}{i:02d}", "name": name, "input": dict(args)})
    return blocks


def _message(request: ProviderRequest, reply: Reply, key: str) -> dict[str, Any]:
    return {"model": reply.model or request.model, "id": f"msg_{key}", "type": "message", "role": "assistant"}


def whole(request: ProviderRequest, reply: Reply, counts: TokenUsage, key: str, created: int) -> bytes:
    body = {
        **_message(request, reply, key),
        "content": _blocks(reply, key),
        "stop_reason": _stop(reply),
        "stop_sequence": None,
        "usage": usage(counts, counts.output),
        **reply.extra,
    }
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def _event(kind: str, **data: Any) -> bytes:
    text = json.dumps({"type": kind, **data}, separators=(",", ":"), ensure_ascii=False)
    return f"event: {kind}\ndata: {text}\n\n".encode()


def events(
    request: ProviderRequest, reply: Reply, counts: TokenUsage, key: str, created: int
) -> Iterator[tuple[bool, bytes]]:
    """Server-sent events; the flag says that a pause belongs before it (a further piece of text)."""
    start: dict[str, Any] = {
        **_message(request, reply, key),
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage(counts, 1),
        **reply.extra,
    }
    yield False, _event("message_start", message=start)
    pause = False
    for index, block in enumerate(_blocks(reply, key)):
        if block["type"] == "text":
            yield pause, _event("content_block_start", index=index, content_block={"type": "text", "text": ""})
            if index == 0:
                yield False, b'event: ping\ndata: {"type": "ping"}\n\n'
            for piece in pieces(block["text"], reply.chunks):
                yield pause, _event("content_block_delta", index=index, delta={"type": "text_delta", "text": piece})
                pause = True
        else:
            yield pause, _event("content_block_start", index=index, content_block={**block, "input": {}})
            if index == 0:
                yield False, b'event: ping\ndata: {"type": "ping"}\n\n'
            for piece in ["", *pieces(json.dumps(block["input"]), reply.chunks)]:
                delta = {"type": "input_json_delta", "partial_json": piece}
                yield pause, _event("content_block_delta", index=index, delta=delta)
                pause = bool(piece) or pause
        yield False, _event("content_block_stop", index=index)
    delta = {"stop_reason": _stop(reply), "stop_sequence": None}
    yield False, _event("message_delta", delta=delta, usage=usage(counts, counts.output))
    yield False, _event("message_stop")


def error(status: int, message: str, kind: str | None, request_id: str) -> bytes:
    kind = kind or ERROR_TYPES.get(status, "api_error")
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
    return json.dumps(body, separators=(",", ":")).encode()


def stream_error(message: str) -> bytes:
    return _event("error", error={"details": None, "type": "overloaded_error", "message": message})
