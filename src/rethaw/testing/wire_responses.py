"""OpenAI Responses as the service writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rethaw.testing.conversation import ProviderRequest
from rethaw.testing.reply import Reply, TokenUsage, pieces


def usage(counts: TokenUsage) -> dict[str, Any]:
    return {
        "input_tokens": counts.input,
        "input_tokens_details": {"cached_tokens": counts.cached},
        "output_tokens": counts.output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts.input + counts.output,
    }


def _items(reply: Reply, key: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if reply.refusal is not None or reply.text or not reply.tool_calls:
        part: dict[str, Any] = {"type": "output_text", "annotations": [], "logprobs": [], "text": reply.text}
        if reply.refusal is not None:
            part = {"type": "refusal", "refusal": reply.refusal}
        items.append(
            {"id": f"msg_{key}", "type": "message", "status": "completed", "content": [part], "role": "assistant"}
        )
    for i, (name, args) in enumerate(reply.tool_calls):
        items.append(
            {
                "id": f"fc_{key}{i:02d}",
                "type": "function_call",
                "status": "completed",
                "arguments": json.dumps(args),
                "call_id": f"call_{key}{i:02d}",
                "name": name,
            }
        )
    return items


def _response(
    request: ProviderRequest, reply: Reply, key: str, created: int, *, status: str, counts: TokenUsage | None
) -> dict[str, Any]:
    asked = request.json
    done = counts is not None
    return {
        "id": f"resp_{key}",
        "object": "response",
        "created_at": created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": asked.get("instructions"),
        "max_output_tokens": asked.get("max_output_tokens"),
        "max_tool_calls": None,
        "model": reply.model or request.model,
        "output": _items(reply, key) if done else [],
        "parallel_tool_calls": asked.get("parallel_tool_calls", True),
        "previous_response_id": asked.get("previous_response_id"),
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default" if done else "auto",
        "store": asked.get("store", True),
        "temperature": asked.get("temperature", 1.0),
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": asked.get("tool_choice", "auto"),
        "tools": asked.get("tools", []),
        "top_logprobs": 0,
        "top_p": asked.get("top_p", 1.0),
        "truncation": asked.get("truncation", "disabled"),
        "usage": usage(counts) if counts is not None else None,
        "user": asked.get("user"),
        "metadata": asked.get("metadata") or {},
        **reply.extra,
    }


def _status(reply: Reply) -> str:
    return "incomplete" if reply.truncated else "completed"


def whole(request: ProviderRequest, reply: Reply, counts: TokenUsage, key: str, created: int) -> bytes:
    return (
        json.dumps(_response(request, reply, key, created, status=_status(reply), counts=counts), indent=2) + "\n"
    ).encode()


def events(
    request: ProviderRequest, reply: Reply, counts: TokenUsage, key: str, created: int
) -> Iterator[tuple[bool, bytes]]:
    """Server-sent events; the flag says that a pause belongs before it (a further piece of text)."""
    number = -1

    def event(kind: str, **data: Any) -> bytes:
        nonlocal number
        number += 1
        text = json.dumps({"type": kind, "sequence_number": number, **data}, separators=(",", ":"), ensure_ascii=False)
        return f"event: {kind}\ndata: {text}\n\n".encode()

    empty = _response(request, reply, key, created, status="in_progress", counts=None)
    yield False, event("response.created", response=empty)
    yield False, event("response.in_progress", response=empty)
    pause = False
    for index, item in enumerate(_items(reply, key)):
        at = {"item_id": item["id"], "output_index": index}
        if item["type"] == "message":
            part = item["content"][0]
            field = "text" if part["type"] == "output_text" else "refusal"
            name = "output_text" if field == "text" else "refusal"
            start: dict[str, Any] = {**item, "status": "in_progress", "content": []}
            yield False, event("response.output_item.added", output_index=index, item=start)
            yield False, event("response.content_part.added", **at, content_index=0, part={**part, field: ""})
            more: dict[str, Any] = {"logprobs": []} if field == "text" else {}
            for piece in pieces(part[field], reply.chunks):
                shade = {"obfuscation": "x" * (16 - len(piece) % 16)} if field == "text" else {}
                yield pause, event(f"response.{name}.delta", **at, content_index=0, delta=piece, **more, **shade)
                pause = True
            yield False, event(f"response.{name}.done", **at, content_index=0, **{field: part[field]}, **more)
            yield False, event("response.content_part.done", **at, content_index=0, part=part)
        else:
            start = {**item, "status": "in_progress", "arguments": ""}
            yield pause, event("response.output_item.added", output_index=index, item=start)
            for piece in pieces(item["arguments"], reply.chunks):
                shade = "x" * (16 - len(piece) % 16)
                yield pause, event("response.function_call_arguments.delta", **at, delta=piece, obfuscation=shade)
                pause = True
            yield False, event("response.function_call_arguments.done", **at, arguments=item["arguments"])
        yield False, event("response.output_item.done", output_index=index, item=item)
    final = _response(request, reply, key, created, status=_status(reply), counts=counts)
    yield False, event(f"response.{_status(reply)}", response=final)


def stream_error(message: str) -> bytes:
    data = {"type": "error", "sequence_number": 9999, "code": "server_error", "message": message, "param": None}
    return f"event: error\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
