"""Payload texts survive a call's body and answer byte for byte."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rethaw.channel.payload import embed, split
from rethaw.model.errors import InvalidInput

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(values, st.dictionaries(st.text(), values, max_size=3), st.integers(0, 4))
def test_what_is_embedded_is_split_off_again(payload: object, fields: dict[str, object], indent: int) -> None:
    fields.pop("payload", None)
    raw = json.dumps(payload, indent=indent or None).encode()
    text = embed(fields, raw)
    assert json.loads(text) == {**fields, "payload": payload}
    assert split(text) == (fields, raw)


@pytest.mark.parametrize("raw", [b"1.50", b'"\\u00e9"', b'"\\ud800"', b"1e3", b'{"b":1,"a":1}', b'"\\u0000"', b"[ 1 ]"])
def test_forms_that_printing_would_change(raw: bytes) -> None:
    assert split(b'{ "x": 1 , "payload" : ' + raw + b' , "y": [2] }') == ({"x": 1, "y": [2]}, raw)


def test_invalid_utf8_is_kept() -> None:
    assert split(embed({}, b'"\xff\xfe"'))[1] == b'"\xff\xfe"'


def test_without_the_member() -> None:
    assert split(b'{"a": 1}') == ({"a": 1}, None)
    assert split(b" {} ") == ({}, None)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b'{"a"', b'{"a":', b'{"a":1', b'{"a":1,', b'{"a":1}x', b"{1:2}", b"{,}", b"[" * 5000]
)
def test_what_is_no_object(text: bytes) -> None:
    with pytest.raises(InvalidInput, match="not a JSON object"):
        split(text)


@given(st.binary(max_size=100))
def test_any_bytes(text: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        split(text)
