"""How bytes and small metadata are kept: bodies as they are or zstd, `data` as JSON that PostgreSQL can hold.

jsonb refuses U+0000 and lone surrogates. A string that holds one (or the escape character itself) is stored with
U+F8FF and four hex digits in their place, and read back exactly.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from backports import zstd

from rethaw.model.errors import InvalidInput, RethawError, TooLarge
from rethaw.model.types import EXCHANGE_LIMIT, MIB, NewEvent

RAW, ZSTD = 0, 1
DATA_LIMIT = 1 * MIB  # bytes of JSON in one event's `data`; larger things belong into `body`
BODY_LIMIT = 4 * EXCHANGE_LIMIT
OFF_LOOP = 256 * 1024  # bytes from which work leaves the event loop's thread
OWN_KEY = "~"  # first character of keys that the log makes itself; readers never see them
_KEY_LIMIT = 1000  # characters; an index row of PostgreSQL ends at 2700 bytes
_LEVEL = 1
_SMALL = 256  # bytes below which compressing is not tried
_ODD = re.compile("[\0\uf8ff\ud800-\udfff]")
_ESCAPED = re.compile("\uf8ff([0-9a-f]{4})")
_MAYBE_ODD = re.compile(r"\\u(?:0000|f8ff|d[89a-f])")


@dataclass(frozen=True)
class Rows:
    """Columns for rethaw_append, one list for each."""

    types: list[str]
    datas: list[str]
    keys: list[str | None]
    sizes: list[int]
    codecs: list[int]
    bodies: list[bytes | None]


async def rows(events: Sequence[NewEvent], keys: Sequence[str | None] | None = None) -> Rows:
    """`events` as columns; `keys` in place of the events' own. Raises InvalidInput, TooLarge."""
    out = Rows([], [], [], [], [], [])
    for i, event in enumerate(events):
        body = event.body
        codec, stored = RAW, body
        if body is not None:
            if len(body) > BODY_LIMIT:
                raise TooLarge(f"an event's body of {len(body)} bytes", remedy=f"the limit is {BODY_LIMIT}")
            codec, stored = await asyncio.to_thread(pack, body) if len(body) >= OFF_LOOP else pack(body)
        out.types.append(event.type.value)
        out.datas.append(dump_data(event.data))
        out.keys.append(check_key(event.key) if keys is None or keys[i] is None else keys[i])
        out.sizes.append(0 if body is None else len(body))
        out.codecs.append(codec)
        out.bodies.append(stored)
    return out


def pack(data: bytes) -> tuple[int, bytes]:
    """(codec, stored bytes): compressed when that saves at least a sixteenth."""
    if len(data) >= _SMALL:
        small = zstd.compress(data, level=_LEVEL)
        if len(small) <= len(data) - len(data) // 16:
            return ZSTD, small
    return RAW, data


def unpack(stored: bytes, codec: int, size: int) -> bytes:
    """What `pack` was given. Raises RethawError when the stored bytes are not that."""
    if codec not in (RAW, ZSTD):
        raise RethawError(
            f"bytes are stored with codec {codec}, this Rethaw knows {RAW} and {ZSTD}",
            remedy="start the newer Rethaw that wrote them",
        )
    try:
        data = bytes(stored) if codec == RAW else zstd.decompress(stored)
    except zstd.ZstdError as e:
        raise RethawError(f"stored bytes are damaged: {e}") from e
    if len(data) != size:
        raise RethawError(f"stored bytes are damaged: {len(data)} bytes instead of {size}")
    return data


def dump_data(data: dict[str, Any]) -> str:
    """JSON text for a jsonb column. Raises InvalidInput for what JSON cannot express, TooLarge."""
    try:
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
        if _MAYBE_ODD.search(text):
            text = json.dumps(_walk(data, _escape), allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as e:
        raise InvalidInput(f"an event's data is no JSON: {e}") from e
    if len(text) > DATA_LIMIT:
        raise TooLarge(f"an event's data of {len(text)} bytes", remedy=f"the limit is {DATA_LIMIT}; use its body")
    return text


def load_data(data: dict[str, Any]) -> dict[str, Any]:
    """`data` as psycopg loaded it from jsonb, with what `dump_data` escaped put back."""
    return _walk(data, _unescape) if _has_escape(data) else data


def _escape(text: str) -> str:
    return _ODD.sub(lambda m: f"\uf8ff{ord(m[0]):04x}", text)


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda m: chr(int(m[1], 16)), text)


def _has_escape(value: Any) -> bool:
    if isinstance(value, str):
        return "\uf8ff" in value
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value)
        return any("\uf8ff" in k or _has_escape(v) for k, v in items.items())
    return isinstance(value, list) and any(_has_escape(v) for v in cast("list[Any]", value))


def _walk(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(str(k)): _walk(v, change) for k, v in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_walk(v, change) for v in cast("list[Any]", value)]
    return value


def exchange_key(guest_id: str, digest: str) -> str:
    """Key of the event of a request that the guest numbered itself."""
    return f"{OWN_KEY}x:{guest_id}:{digest}"


def check_key(key: str | None) -> str | None:
    """`key`, when callers may use it. Raises InvalidInput."""
    if key is not None and (not key or len(key) > _KEY_LIMIT or key.startswith(OWN_KEY) or not _storable(key)):
        raise InvalidInput(
            f"{key[:80]!r} cannot be an event's key",
            remedy=f"use 1 to {_KEY_LIMIT} characters, no NUL, not starting with {OWN_KEY!r}",
        )
    return key


def _storable(text: str) -> bool:
    if "\0" in text:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
