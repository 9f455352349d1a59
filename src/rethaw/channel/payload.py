"""JSON objects that carry one member's exact text.

Payloads of messages and signals are kept as the bytes of their JSON text. Inside a call's body or answer they travel
as a member of an object; parsing and printing that object again would change them (number forms, escapes, order), so
these two functions cut the text instead. Invalid UTF-8 passes through unchanged.
"""

from __future__ import annotations

import json
from typing import Any, Dict, Optional, Tuple

from rethaw.model.errors import InvalidInput

_scan = json.JSONDecoder()
_SPACE = " \t\r\n"


def embed(fields: Dict[str, Any], payload: bytes, member: str = "payload") -> bytes:
    """`fields` as a JSON object with `payload`, JSON text, as the value of its last member."""
    rest = {k: v for k, v in fields.items() if k != member}
    head = json.dumps(rest, separators=(",", ":")).encode("ascii")[:-1]
    return head + (b"," if rest else b"") + json.dumps(member).encode("ascii") + b":" + payload + b"}"


def split(text: bytes, member: str = "payload") -> Tuple[Dict[str, Any], Optional[bytes]]:
    """The object in `text` without `member`, and that member's exact text (None when it is missing).

    Raises InvalidInput when `text` is no JSON object."""
    source = text.decode("utf-8", "surrogateescape")
    fields: Dict[str, Any] = {}
    found: Optional[bytes] = None
    try:
        at = _skip(source, 0)
        if source[at : at + 1] != "{":
            raise ValueError("an object is expected")
        at = _skip(source, at + 1)
        more = source[at : at + 1] != "}"
        while more:
            key, at = _scan.raw_decode(source, at)
            if not isinstance(key, str):
                raise ValueError("a member's name is expected")
            at = _skip(source, at)
            if source[at : at + 1] != ":":
                raise ValueError(f"':' is expected after {key!r}")
            start = _skip(source, at + 1)
            value, end = _scan.raw_decode(source, start)
            if key == member:
                found = source[start:end].encode("utf-8", "surrogateescape")
            else:
                fields[key] = value
            at = _skip(source, end)
            mark = source[at : at + 1]
            if mark not in (",", "}"):
                raise ValueError(f"',' or '}}' is expected after the value of {key!r}")
            more = mark == ","
            at = _skip(source, at + 1) if more else at
        if _skip(source, at + 1) != len(source):
            raise ValueError("something follows the object")
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"not a JSON object: {error}", remedy="send one JSON object") from None
    return fields, found


def _skip(source: str, at: int) -> int:
    while at < len(source) and source[at] in _SPACE:
        at += 1
    return at
