"""Answers that the gateway gives itself, in the style of the provider that was asked, so that clients show them."""

from __future__ import annotations

import json

from rethaw.model.errors import ProviderError, RethawError, TooLarge
from rethaw.model.types import ResponseHead

# None of these is retried by the official clients (they retry 408, 409, 429 and 5xx)
_STATUS = {"key": (401, "authentication_error"), "provider": (404, "not_found_error")}


def refusal(error: RethawError, *, anthropic: bool) -> tuple[ResponseHead, bytes]:
    """`error` as an HTTP answer: 401 for a missing key, 404 for an unknown provider, 413 for too much, else 400."""
    status, kind = 400, "invalid_request_error"
    if isinstance(error, ProviderError):
        status, kind = _STATUS.get(str(error.details.get("missing")), (status, kind))
    elif isinstance(error, TooLarge):
        status, kind = 413, "request_too_large"
    text = f"rethaw: {error}"
    if anthropic:
        body: dict[str, object] = {"type": "error", "error": {"type": kind, "message": text}}
    else:
        body = {"error": {"message": text, "type": kind, "param": None, "code": f"rethaw_{error.code}"}}
    data = json.dumps(body).encode()
    headers = (("content-type", "application/json"), ("content-length", str(len(data))), ("x-should-retry", "false"))
    return ResponseHead(status=status, reason="Refused by Rethaw", headers=headers), data
