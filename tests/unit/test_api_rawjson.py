"""JSON members as the bytes they were sent as."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rethaw.api import rawjson
from rethaw.model.errors import InvalidInput

_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
_space = st.text(alphabet=" \t\r\n", max_size=3)


@given(st.dictionaries(st.text(), _values, max_size=5), st.booleans(), _space, _space)
def test_each_member_comes_back_as_it_was_sent(
    value: dict[str, Any], ascii_only: bool, before: str, after: str
) -> None:
    texts = {key: json.dumps(v, ensure_ascii=ascii_only, indent=1) for key, v in value.items()}
    inner = f"{before},{after}".join(
        f"{before}{json.dumps(key)}{after}:{before}{text}{after}" for key, text in texts.items()
    )
    raw = f"{before}{{{inner}{after}}}{before}".encode("utf-8", "surrogatepass")
    try:
        raw.decode()
    except UnicodeDecodeError:
        with pytest.raises(InvalidInput, match="UTF-8"):
            rawjson.members(raw)
        return
    assert rawjson.members(raw) == {key: text.encode() for key, text in texts.items()}


@given(_values, _space)
def test_check_takes_one_text(value: Any, space: str) -> None:
    text = json.dumps(value)
    assert rawjson.check(f"{space}{text}{space}".encode()) == text.encode()


@given(st.binary(max_size=60) | st.text(alphabet='{}[]:,"\\u0129ae. tfn', max_size=40).map(str.encode))
def test_whatever_comes_is_refused_clearly_or_is_json(raw: bytes) -> None:
    for parse in (rawjson.check, rawjson.members):
        try:
            parse(raw)
        except InvalidInput as error:
            assert "malformed JSON" in error.message or "UTF-8" in error.message
            assert "\n" not in error.message
        else:
            json.loads(raw)


@given(st.binary(max_size=40))
def test_it_refuses_what_json_refuses(raw: bytes) -> None:
    def strict(name: str) -> Any:
        raise ValueError(name)

    try:
        json.loads(raw.decode(), parse_constant=strict)
        fine = True
    except (ValueError, RecursionError):
        fine = False
    try:
        rawjson.check(raw)
        taken = True
    except InvalidInput:
        taken = False
    assert fine == taken


def test_the_last_of_repeated_members_counts() -> None:
    assert rawjson.members(b'{"a": 1, "a": 2}') == {"a": b"2"}
