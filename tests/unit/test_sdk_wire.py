"""Between HTTP and the SDK's types: errors, server-sent events, exact JSON, sizes."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rethaw.model import errors
from rethaw.sdk import calls
from rethaw.sdk.sizes import human_bytes, human_count, size_bytes
from rethaw.sdk.sse import Parser, ServerEvent


def all_errors() -> list[type[errors.RethawError]]:
    found, todo = [errors.RethawError], [errors.RethawError]
    while todo:
        subs = todo.pop().__subclasses__()
        found += subs
        todo += subs
    return found


@pytest.mark.parametrize("cls", all_errors())
def test_errors_come_back_as_the_class_they_were(cls: type[errors.RethawError]) -> None:
    sent = {"code": cls.code, "message": "m", "remedy": "r", "details": {"message": "x", "self": 1, "session": "s_1"}}
    got = calls.error_of(cls.status, json.dumps({"error": sent}).encode(), url="http://x", token_source="y")
    assert type(got) is cls or got.code == cls.code
    assert (got.message, (got.remedy or "")[:1], got.details["session"]) == ("m", "r", "s_1")


def test_a_code_of_a_newer_server_is_kept() -> None:
    body = b'{"error": {"code": "brand_new", "message": "m", "remedy": null, "details": {}}}'
    got = calls.error_of(418, body, url="http://x", token_source="y")
    assert type(got) is errors.RethawError and got.code == "brand_new" and str(got) == "m"


@pytest.mark.parametrize(
    "body", [b"", b"<html>Bad gateway</html>", b"[]", b'{"error": 1}', b'{"detail": "x"}', b"\xff"]
)
def test_an_answer_that_is_not_ours_says_so(body: bytes) -> None:
    got = calls.error_of(502, body, url="http://x", token_source="y")
    assert isinstance(got, errors.Unavailable) and "http://x answered 502" in got.message


def test_a_wrong_token_says_where_it_came_from() -> None:
    body = b'{"error": {"code": "unauthorized", "message": "wrong token", "remedy": null}}'
    assert "RETHAW_TOKEN" in str(calls.error_of(401, body, url="u", token_source="RETHAW_TOKEN"))


@given(st.lists(st.tuples(st.integers(0, 99), st.text(max_size=30)), max_size=8), st.data())
def test_server_sent_events_however_cut(events: list[tuple[int, str]], data: st.DataObject) -> None:
    raw = b": hello\r\n\r\n" + b"".join(
        f"id: {seq}\nevent: e\ndata: {json.dumps(text, ensure_ascii=False)}\n\n".encode() for seq, text in events
    )
    parser, got = Parser(), list[ServerEvent]()
    while raw:
        size = data.draw(st.integers(1, len(raw)))
        got += parser.feed(raw[:size])
        raw = raw[size:]
    assert [(int(e.id), e.event, json.loads(e.data)) for e in got] == [(seq, "e", text) for seq, text in events]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(st.characters()), st.lists, max_leaves=5))
def test_payloads_survive(value: object) -> None:
    body = calls.send("s_1", calls.to_json(value), None).content
    assert body is not None and json.loads(body) == {"payload": value}


def test_payloads_with_nul_and_lone_surrogates() -> None:
    assert calls.to_json("a\0\ud800") == b'"a\\u0000\\ud800"'
    text = b'{"n": 1.0000000000000000001, "s": "\\ud800"}'
    assert calls.send("s", calls.checked_json(text), "k").content == b'{"payload":%b,"idempotency_key":"k"}' % text


@pytest.mark.parametrize("text", ["", "{", "nan", "NaN", "'a'", b"\xff", "\udc80", "[" * 100_000])
def test_json_that_is_none(text: str | bytes) -> None:
    with pytest.raises(errors.InvalidInput):
        calls.checked_json(text)


@pytest.mark.parametrize("value", [{1, 2}, b"x", float("inf"), object()])
def test_values_that_are_no_json(value: object) -> None:
    with pytest.raises(errors.InvalidInput, match="payload"):
        calls.to_json(value)


def test_messages_are_read_byte_for_byte() -> None:
    raw = b'"\\u0000 \xc3\xa9 ~~~???"'
    for encode in (base64.urlsafe_b64encode, base64.b64encode):
        got = calls.message({"id": "m_1", "number": 3, "payload": encode(raw).decode(), "at": "2026-01-01T00:00:00Z"})
        assert got.raw == raw and got.payload == "\0 é ~~~???" and got.number == 3


def test_ids_cannot_leave_their_place_in_the_path() -> None:
    with pytest.raises(errors.InvalidInput, match=r"'\.\./nodes' is not an id or a name, which have no '/'"):
        calls.get("../nodes")
    assert calls.signal("s", "a/b?c", b"1", None).path == "/v1/sessions/s/signals/a%2Fb%3Fc"
    for bad in ("", ".", ".."):
        with pytest.raises(errors.InvalidInput):
            calls.get(bad)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2GB", 2 * 10**9), ("64k", 65536), ("10", 10), (7, 7), ("1tib", 1 << 40)],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert size_bytes(text) == size


@pytest.mark.parametrize("bad", ["", "MiB", "-1", "1 XB", 0, -5, True, None, "1e3"])
def test_sizes_that_are_none(bad: object) -> None:
    with pytest.raises(errors.InvalidInput):
        size_bytes(bad)  # type: ignore[arg-type]


def test_sizes_and_counts_for_readers() -> None:
    assert [human_bytes(n) for n in (0, 812, 3482, 512 << 20, 5 << 30)] == [
        "0 B",
        "812 B",
        "3.4 KiB",
        "512 MiB",
        "5 GiB",
    ]
    assert [human_count(n) for n in (0, 950, 1000, 1234, 182_000, 999_600, 2_500_000)] == [
        "0", "950", "1k", "1.2k", "182k", "1M", "2.5M",
    ]  # fmt: skip
