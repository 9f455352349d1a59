"""JSON objects whose values are kept as the bytes they were sent as.

Parsing and writing again would change numbers, drop NULs or refuse lone surrogates; a payload goes through untouched."""

from __future__ import annotations

import json
from json.decoder import scanstring  # type: ignore[attr-defined] - undocumented, in every CPython since 2.6
from typing import Any, cast

from rethaw.model.errors import InvalidInput

_WHITE = " \t\n\r"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


# Numbers are not evaluated: their text is what counts, and int() of a million digits takes its time.
_decoder = json.JSONDecoder(parse_constant=_no_constant, parse_int=lambda _: 0, parse_float=lambda _: 0.0)


def _text(raw: bytes, what: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{what} is not UTF-8: byte {error.start} is wrong") from error


def _malformed(what: str, text: str, error: Exception) -> InvalidInput:
    at = getattr(error, "pos", None)
    where = ""
    if isinstance(at, int):
        line = text.count("\n", 0, at) + 1
        where = f" at line {line} column {at - text.rfind(chr(10), 0, at)}"
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error) or type(error).__name__
    return InvalidInput(f"{what} is malformed JSON{where}: {reason}", remedy="send a valid JSON text")


def check(raw: bytes, what: str = "the body") -> bytes:
    """`raw` without white space around it, if it is one JSON text. Raises InvalidInput saying where it is not."""
    text = _text(raw, what)
    try:
        start = _skip(text, 0)
        _, end = _value(text, start)
        rest = _skip(text, end)
        if rest != len(text):
            raise json.JSONDecodeError("extra data", text, rest)
    except (ValueError, RecursionError) as error:
        raise _malformed(what, text, error) from error
    return text[start:end].encode()


def members(raw: bytes, what: str = "the body") -> dict[str, bytes]:
    """The members of a JSON object, each as the bytes of its JSON text. Raises InvalidInput."""
    text = _text(raw, what)
    found: dict[str, bytes] = {}
    try:
        at = _skip(text, 0)
        if text[at : at + 1] != "{":
            raise json.JSONDecodeError("an object is expected", text, at)
        at = _skip(text, at + 1)
        if text[at : at + 1] == "}":
            at += 1
        else:
            at = _members(text, at, found)
        at = _skip(text, at)
        if at != len(text):
            raise json.JSONDecodeError("extra data", text, at)
    except (ValueError, RecursionError) as error:
        raise _malformed(what, text, error) from error
    return found


def _members(text: str, at: int, found: dict[str, bytes]) -> int:
    while True:
        if text[at : at + 1] != '"':
            raise json.JSONDecodeError("a name in quotes is expected", text, at)
        name, at = cast("tuple[str, int]", scanstring(text, at + 1, True))
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise json.JSONDecodeError("':' is expected", text, at)
        start = _skip(text, at + 1)
        _, end = _value(text, start)
        found[name] = text[start:end].encode()
        at = _skip(text, end)
        mark = text[at : at + 1]
        at += 1
        if mark == "}":
            return at
        if mark != ",":
            raise json.JSONDecodeError("',' or '}' is expected", text, at - 1)
        at = _skip(text, at)


def _value(text: str, at: int) -> tuple[Any, int]:
    if at >= len(text):
        raise json.JSONDecodeError("a value is expected", text, at)
    return _decoder.raw_decode(text, at)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _WHITE:
        at += 1
    return at
