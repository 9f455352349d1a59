"""A guest's request, validated. A guest may lie, so nothing of it is used before it has been looked at here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote

from rethaw.model.errors import InvalidInput, TooLarge
from rethaw.model.types import RequestMeta

# Part of a request's identity (DESIGN §5 step 2): they change what the answer means or how its bytes must be read.
# Not: authorisation, user-agent, x-stainless-* (telemetry, retry count, timeouts), traceparent, date, idempotency-key.
MEANING_HEADERS = frozenset(
    {
        "accept",
        "accept-encoding",
        "anthropic-beta",
        "anthropic-version",
        "content-encoding",
        "content-type",
        "openai-beta",
        "openai-organization",
        "openai-project",
    }
)
# RFC 9110 §7.6.1, and those that aiohttp writes itself
HOP_BY_HOP = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# Never recorded, never forwarded: the node adds the real key
SECRET_HEADERS = frozenset({"authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie"})

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PROVIDER = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_GUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
# RFC 3986 characters and the few that clients send raw; no space, control, '#', '?' or backslash
_PATH = re.compile(r"/[!$%&'()*+,./0-9:;=@A-Z_a-z~|{}\[\]\"^`-]*")
_QUERY = re.compile(r"[!$%&'()*+,./0-9:;=?@A-Z_a-z~|{}\[\]\"^`-]*")
PATH_LIMIT = 8 << 10
QUERY_LIMIT = 32 << 10
HEADERS_LIMIT = 64 << 10
HEADERS_COUNT = 256
_MODEL_KEY = re.compile(rb'"model"\s*:\s*"([^"\\]{1,200})"')
_PARSE_LIMIT = 64 << 10  # larger bodies are searched, not parsed: the name is for people and statistics only


@dataclass(frozen=True)
class Request:
    """The validated head of a request."""

    provider: str
    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]  # order kept; hop-by-hop and secret ones left out
    guest_id: str

    def meta(self, body: bytes, digest: str, *, model_call: bool) -> RequestMeta:
        return RequestMeta(
            provider=self.provider,
            method=self.method,
            path=self.path,
            query=self.query,
            headers=self.headers,
            digest=digest,
            model_call=model_call,
            model=model_name(body) if model_call else None,
            guest_id=self.guest_id,
        )

    def digest(self, body: bytes) -> str:
        """Identity of DESIGN §5 step 2, sha256 hex. Each part is preceded by its length, so none can pose as another."""
        parts = [self.provider, self.method, self.path, self.query]
        for name, value in sorted((n.lower(), v) for n, v in self.headers if n.lower() in MEANING_HEADERS):
            parts += [name, value]
        h = hashlib.sha256()
        for part in parts:
            raw = part.encode()
            h.update(len(raw).to_bytes(8, "big") + raw)
        h.update(b"\xff body")
        h.update(body)
        return h.hexdigest()


def parse(meta: Mapping[str, object]) -> Request:
    """The request that a stream's `meta` describes. Raises InvalidInput or TooLarge naming the part that does not fit."""
    provider = _text(meta, "provider")
    method = _text(meta, "method")
    path = _text(meta, "path")
    query = _text(meta, "query", default="")
    guest_id = _text(meta, "guest_id")
    if not _PROVIDER.fullmatch(provider):
        raise InvalidInput(f"{provider[:80]!r} is not a provider name", remedy="use /<provider>/... as configured")
    if method not in _METHODS:
        raise InvalidInput(
            f"method {method[:40]!r} is not passed on", remedy=f"use one of {', '.join(sorted(_METHODS))}"
        )
    if not _GUEST_ID.fullmatch(guest_id):
        raise InvalidInput(f"{guest_id[:80]!r} is not a call id", remedy="send <attempt>.<counter>")
    if len(path) > PATH_LIMIT or len(query) > QUERY_LIMIT:
        raise TooLarge(f"the URL has {len(path) + len(query)} bytes", remedy=f"send at most {PATH_LIMIT} of path")
    _check_path(path)
    if not _QUERY.fullmatch(query):
        raise InvalidInput(
            f"query {query[:120]!r} has characters that a URL cannot carry", remedy="percent-encode them"
        )
    headers = _headers(meta.get("headers", ()))
    return Request(provider, method, path, query, headers, guest_id)


def model_name(body: bytes) -> str | None:
    """The model that a JSON request asks for, when it says so."""
    if len(body) <= _PARSE_LIMIT:
        try:
            value: Any = json.loads(body)
        except (ValueError, RecursionError):
            return None
        model: Any = cast("dict[str, Any]", value).get("model") if isinstance(value, dict) else None
        return model[:200] if isinstance(model, str) and model.isprintable() else None
    found = _MODEL_KEY.search(body)
    return found.group(1).decode("utf-8", "replace") if found else None


def _text(meta: Mapping[str, object], field: str, default: str | None = None) -> str:
    value = meta.get(field, default)
    if not isinstance(value, str):
        raise InvalidInput(f"{field} = {str(value)[:80]!r} of a request is not text", remedy="the guest is not guestd")
    return value


def _sequence(value: object) -> Sequence[object] | None:
    return cast("Sequence[object]", value) if isinstance(value, (list, tuple)) else None


def _check_path(path: str) -> None:
    if not _PATH.fullmatch(path):
        raise InvalidInput(f"path {path[:120]!r} is not a URL path", remedy="percent-encode other characters")
    plain = path
    for _ in range(3):  # servers and proxies on the way may decode more than once
        if any(segment.partition(";")[0] in (".", "..") for segment in re.split(r"[/\\]", plain)):
            raise InvalidInput(f"path {path[:120]!r} leaves its place", remedy="send a path without . or .. in it")
        plain = unquote(plain, errors="replace")


def _headers(value: object) -> tuple[tuple[str, str], ...]:
    items = _sequence(value)
    if items is None:
        raise InvalidInput("headers of a request are not a list", remedy="the guest is not guestd")
    if len(items) > HEADERS_COUNT:
        raise TooLarge(f"a request has {len(items)} headers", remedy=f"send at most {HEADERS_COUNT}")
    pairs: list[tuple[str, str]] = []
    size = 0
    for item in items:
        pair = _sequence(item) or ()
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], str):
            raise InvalidInput(f"header {str(item)[:80]!r} is not a name and a value", remedy="the guest is not guestd")
        name, text = pair[0], pair[1]
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(text):
            raise InvalidInput(f"header {name[:80]!r} has characters that HTTP does not allow", remedy="remove them")
        size += len(name) + len(text)
        pairs.append((name, text))
    if size > HEADERS_LIMIT:
        raise TooLarge(f"the headers of a request have {size} bytes", remedy=f"send at most {HEADERS_LIMIT}")
    # what Connection lists is hop-by-hop too
    hop = (
        HOP_BY_HOP
        | SECRET_HEADERS
        | {t.strip().lower() for n, v in pairs if n.lower() == "connection" for t in v.split(",")}
    )
    kept: list[tuple[str, str]] = []
    for name, text in pairs:
        if name.lower() not in hop:
            kept.append((name, text))
    return tuple(kept)
