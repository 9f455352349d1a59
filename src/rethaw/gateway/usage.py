"""Token counts out of a response, as the provider reported them. Reads along, never in the way: whatever cannot be
understood yields None."""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Sequence
from typing import Any, cast

from backports import zstd

from rethaw.model.types import Usage

log = logging.getLogger("rethaw.gateway")

_DECODED_LIMIT = 16 << 20  # of a compressed body: enough for any answer, little enough for a bomb
_JSON_LIMIT = 8 << 20
# The events after which an SSE answer is whole. Clients act on them before the connection ends.
_TERMINAL = re.compile(
    rb"^(?:data: ?\[DONE\]|event: ?(?:message_stop|response\.(?:completed|incomplete|failed)|error))[ \t]*\r?$",
    re.MULTILINE,
)


def header(headers: Sequence[tuple[str, str]], name: str) -> str | None:
    """The first header called `name` (lower case)."""
    return next((v for n, v in headers if n.lower() == name), None)


def is_event_stream(headers: Sequence[tuple[str, str]]) -> bool:
    return (header(headers, "content-type") or "").lower().startswith("text/event-stream")


def terminal_at(data: bytes) -> int:
    """Where the line that ends an SSE answer begins in `data`, or -1. `data` should begin at the start of a line."""
    if b"[DONE]" not in data and b"event:" not in data:
        return -1
    found = _TERMINAL.search(data)
    return found.start() if found else -1


def decode(body: bytes, encoding: str | None) -> bytes | None:
    """`body` without its content-encoding; what can be decoded of a cut one; None for one that cannot be read."""
    kind = (encoding or "identity").strip().lower()
    if kind in ("identity", ""):
        return body
    try:
        if kind in ("gzip", "x-gzip", "deflate"):
            try:
                return zlib.decompressobj(wbits=47).decompress(body, _DECODED_LIMIT)
            except zlib.error:
                return zlib.decompressobj(wbits=-15).decompress(body, _DECODED_LIMIT)  # raw deflate, as some send it
        if kind == "zstd":
            return zstd.ZstdDecompressor().decompress(body, _DECODED_LIMIT)
    except (zlib.error, zstd.ZstdError, EOFError):
        pass
    return None


class Decoder:
    """A content-encoding undone piece by piece. Raises ValueError for one that is not known here."""

    def __init__(self, encoding: str | None) -> None:
        kind = (encoding or "identity").strip().lower()
        self._inner: Any = None
        if kind in ("gzip", "x-gzip", "deflate"):
            self._inner = zlib.decompressobj(wbits=47)
        elif kind == "zstd":
            self._inner = zstd.ZstdDecompressor()
        elif kind != "identity":
            raise ValueError(kind)

    def feed(self, data: bytes) -> bytes:
        """What `data` adds. Raises ValueError when it cannot be read."""
        if self._inner is None:
            return data
        try:
            out: bytes = self._inner.decompress(data, _DECODED_LIMIT)
        except (zlib.error, zstd.ZstdError, EOFError) as error:
            raise ValueError(str(error)) from None
        return out


def usage_of(headers: Sequence[tuple[str, str]], body: bytes) -> Usage | None:
    """The counts in a whole (or cut) response body."""
    try:
        plain = decode(body, header(headers, "content-encoding"))
        if plain is None:
            return None
        if is_event_stream(headers):
            return _merge(_sse_objects(plain))
        if len(plain) > _JSON_LIMIT:
            return None
        return _merge([json.loads(plain)])
    except (ValueError, RecursionError, TypeError, AttributeError):
        return None
    except Exception:
        log.exception("usage parsing failed; the answer is not affected")
        return None


def _sse_objects(body: bytes) -> list[Any]:
    """The JSON of the `data:` lines that may carry a model or counts. Most lines (tokens) carry neither and are
    skipped unparsed, but for the first, which names the model."""
    out: list[Any] = []
    for line in body.splitlines():
        if not line.startswith(b"data:") or (out and b'usage"' not in line):
            continue
        try:
            out.append(json.loads(line[5:]))
        except ValueError:
            continue
    return out


def _merge(objects: Sequence[Any]) -> Usage | None:
    """Later objects win field by field: Anthropic sends input counts first and the final output count last."""
    model: str | None = None
    seen: dict[str, int] = {}
    for item in objects:
        if not isinstance(item, dict):
            continue
        layers = [cast("dict[str, Any]", item)]
        layers += [
            cast("dict[str, Any]", layers[0][k]) for k in ("message", "response") if isinstance(layers[0].get(k), dict)
        ]
        for layer in layers:
            name = layer.get("model")
            if model is None and isinstance(name, str) and name.isprintable():
                model = name[:200]
            usage = layer.get("usage")
            if isinstance(usage, dict):
                seen.update(_counts(cast("dict[str, Any]", usage)))
    if model is None and not seen:
        return None
    # Anthropic counts cached input apart; input_tokens here is always all input
    extra = seen.get("cache_read_input_tokens", 0) + seen.get("cache_creation_input_tokens", 0)
    given = seen.get("input_tokens")
    return Usage(
        model=model,
        input_tokens=None if given is None else given + extra,
        cached_tokens=seen.get("cached_tokens", seen.get("cache_read_input_tokens")),
        output_tokens=seen.get("output_tokens"),
    )


def _counts(usage: dict[str, Any]) -> dict[str, int]:
    out: dict[str, int] = {}

    def take(name: str, value: Any) -> None:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53:
            out[name] = value

    for name, source in (
        ("input_tokens", "prompt_tokens"),
        ("output_tokens", "completion_tokens"),
        ("input_tokens", "input_tokens"),
        ("output_tokens", "output_tokens"),
        ("cache_read_input_tokens", "cache_read_input_tokens"),
        ("cache_creation_input_tokens", "cache_creation_input_tokens"),
    ):
        take(name, usage.get(source))
    for details in ("prompt_tokens_details", "input_tokens_details"):
        inner = usage.get(details)
        if isinstance(inner, dict):
            take("cached_tokens", cast("dict[str, Any]", inner).get("cached_tokens"))
    return out
