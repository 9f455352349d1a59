"""What surrounds an answer at the real services: headers, errors, endpoints that generate nothing."""

from __future__ import annotations

import json
from typing import Any

from rethaw.testing import wire_anthropic, wire_chat
from rethaw.testing.conversation import ProviderRequest
from rethaw.testing.reply import Reply

_MESSAGES = {
    400: "Bad request.",
    401: "Incorrect API key provided.",
    404: "Not found.",
    429: "Rate limit reached for requests.",
    500: "The server had an error while processing your request. Sorry about that!",
    503: "The engine is currently overloaded, please try again later.",
    529: "Overloaded",
}


def headers(request: ProviderRequest, reply: Reply, key: str) -> dict[str, str]:
    """Response headers of the provider's kind, `reply.headers` last."""
    out: dict[str, str] = {}
    if request.api == "messages" or "anthropic-version" in request.headers:
        out |= {
            "anthropic-ratelimit-requests-limit": "4000",
            "anthropic-ratelimit-requests-remaining": "0" if reply.status == 429 else "3999",
            "anthropic-ratelimit-requests-reset": "2026-01-01T00:00:00Z",
            "anthropic-ratelimit-input-tokens-limit": "2000000",
            "anthropic-ratelimit-input-tokens-remaining": "1999000",
            "anthropic-organization-id": "00000000-0000-4000-8000-000000000000",
            "request-id": f"req_{key}",
        }
    else:
        out |= {
            "openai-organization": "scripted",
            "openai-processing-ms": "12",
            "openai-version": "2020-10-01",
            "x-ratelimit-limit-requests": "10000",
            "x-ratelimit-limit-tokens": "2000000",
            "x-ratelimit-remaining-requests": "0" if reply.status == 429 else "9999",
            "x-ratelimit-remaining-tokens": "1999000",
            "x-ratelimit-reset-requests": "6ms",
            "x-ratelimit-reset-tokens": "0s",
            "x-request-id": f"req_{key}",
        }
    if reply.retry_after is not None:
        out["retry-after"] = f"{reply.retry_after:g}"
    return out | dict(reply.headers)


def error_body(request: ProviderRequest, reply: Reply, key: str) -> bytes:
    if reply.raw is not None:
        return reply.raw
    message = reply.message or _MESSAGES.get(reply.status, "An error occurred.")
    if request.api == "messages" or "anthropic-version" in request.headers:
        return wire_anthropic.error(reply.status, message, reply.error_type, f"req_{key}")
    return wire_chat.error(reply.status, message, reply.error_type)


def other(request: ProviderRequest) -> Reply | None:
    """The services' endpoints that generate nothing; None: the script decides."""
    path = request.path.partition("?")[0]
    body: dict[str, Any]
    if path.endswith("/v1/messages/count_tokens"):
        body = {"input_tokens": max(1, len(request.body) // 4)}
    elif path.endswith("/v1/models"):
        body = {"object": "list", "data": [{"id": "scripted-1", "object": "model", "created": 1, "owned_by": "rethaw"}]}
    elif path.endswith("/v1/embeddings"):
        vector = {"object": "embedding", "index": 0, "embedding": [0.0, 0.5, -0.5]}
        body = {
            "object": "list",
            "data": [vector],
            "model": request.model,
            "usage": {"prompt_tokens": 1, "total_tokens": 1},
        }
    else:
        return None
    return Reply(raw=json.dumps(body, indent=2).encode())
