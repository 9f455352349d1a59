"""The lean JSON is the ordinary one."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rethaw.channel import lean

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_both_ways_as_json_does(value: object) -> None:
    text = json.dumps(value, separators=(",", ":")).encode()
    assert lean.dumps(value) == text
    assert lean.loads(text) == json.loads(text) == value
    assert lean.loads(json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "surrogatepass")) == value


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789.eE+-truefalsn\\u \n', max_size=40).map(str.encode))
def test_what_json_refuses_is_refused(text: bytes) -> None:
    try:
        expected = json.loads(text.decode())
    except ValueError:
        with pytest.raises(ValueError):
            lean.loads(text)
    else:
        got = lean.loads(text)
        assert got == expected or (isinstance(got, float) and math.isnan(got))


def test_what_is_no_json() -> None:
    with pytest.raises(TypeError, match="set is not JSON"):
        lean.dumps({1})
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="Circular"):
        lean.dumps(loop)
    with pytest.raises(RecursionError):
        lean.loads(b"[" * 100_000)


def test_malformed_text_where_json_is_not_loaded() -> None:
    code = "from rethaw.channel import lean\nfor text in (b'{', b'[1,', b'\"', b'', b'{\"a\"}', b'nul'):\n"
    code += " try: lean.loads(text)\n except ValueError: print('refused')"
    root = lean.__file__.rsplit("/rethaw/", 1)[0]
    argv = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"]
    assert subprocess.run(argv, check=True, capture_output=True).stdout == b"refused\n" * 6


def test_guestd_loads_no_more_than_it_has_to() -> None:
    """DESIGN §4: what PID 1 loads is in every first snapshot."""
    code = "import sys; before = set(sys.modules); import rethaw.guest.daemon; print(*(set(sys.modules) - before))"
    root = lean.__file__.rsplit("/rethaw/", 1)[0]
    argv = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"]
    loaded = set(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split())
    assert not loaded & {"re", "enum", "typing", "json", "socket", "signal", "collections", "pathlib", "contextlib"}
