"""The wire format: whatever arrives, however it is split, the decoder says frames or ChannelBroken."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rethaw.channel import frames
from rethaw.channel.frames import ControlReader, Decoder, Frame
from rethaw.model.errors import ChannelBroken

KINDS = range(frames.CONTROL, frames.RESET + 1)


def _frame(kind: int, stream: int, offset: int, payload: bytes) -> Frame:
    if kind in (frames.CONTROL, frames.PART):
        stream = 0
    if kind in (frames.END, frames.CREDIT, frames.ACK):
        payload = b""
    if kind == frames.DATA and not payload:
        payload = b"x"
    return Frame(kind, stream, offset, payload)


some_frames = st.builds(
    _frame,
    st.sampled_from(KINDS),
    st.integers(1, frames.MAX_STREAM),
    st.integers(0, (1 << 64) - 1),
    st.binary(max_size=300),
)


def _split(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({c % (len(data) + 1) for c in cuts})
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


@given(st.lists(some_frames, max_size=20), st.lists(st.integers(0, 1 << 20), max_size=30))
def test_frames_come_back_whatever_the_split(sent: list[Frame], cuts: list[int]) -> None:
    data = b"".join(frames.encode(f.kind, f.stream, f.offset, f.payload) for f in sent)
    decoder, got = Decoder(), list[Frame]()
    for part in _split(data, cuts):
        decoder.feed(part)
        while (frame := decoder.next()) is not None:
            got.append(frame)
    assert got == sent
    assert decoder.rest() == b""


@given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=20))
def test_any_bytes_are_frames_or_channel_broken(data: bytes, cuts: list[int]) -> None:
    decoder = Decoder()
    used = 0
    try:
        for part in _split(data, cuts):
            decoder.feed(part)
            while (frame := decoder.next()) is not None:
                used += frames.HEADER_SIZE + len(frame.payload)
        assert used + len(decoder.rest()) == len(data)
    except ChannelBroken as error:
        assert error.message
        with pytest.raises(ChannelBroken, match=error.message.split(":")[0]):
            decoder.next()


@given(some_frames, st.integers(0, 17), st.integers(1, 255))
def test_a_flipped_header_byte_never_changes_a_frame_silently(frame: Frame, at: int, flip: int) -> None:
    data = bytearray(frames.encode(frame.kind, frame.stream, frame.offset, frame.payload))
    data[at] ^= flip
    decoder = Decoder()
    decoder.feed(bytes(data))
    with contextlib.suppress(ChannelBroken):
        assert decoder.next() != frame


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x00" * 18, "first byte is 0x00"),
        (frames._HEADER.pack(0xA5, 99, 1, 0, 0), "unknown kind 99"),
        (frames._HEADER.pack(0xA5, frames.DATA, 1, 65537, 0), "65537 bytes is over 65536"),
        (frames._HEADER.pack(0xA5, frames.DATA, 1, (1 << 32) - 1, 0), "4294967295 bytes is over"),
        (frames._HEADER.pack(0xA5, frames.DATA, 0, 1, 0), "stream 0 does not fit"),
        (frames._HEADER.pack(0xA5, frames.CONTROL, 3, 1, 0), "stream 3 does not fit"),
        (frames._HEADER.pack(0xA5, frames.ACK, 3, 1, 0), "carries 1 bytes"),
        (frames._HEADER.pack(0xA5, frames.DATA, 3, 0, 0), "it is empty"),
    ],
)
def test_what_is_malformed_is_named(data: bytes, what: str) -> None:
    decoder = Decoder()
    decoder.feed(data)
    with pytest.raises(ChannelBroken, match=what):
        decoder.next()


def test_a_huge_length_is_refused_before_anything_is_kept() -> None:
    decoder = Decoder()
    decoder.feed(frames._HEADER.pack(0xA5, frames.DATA, 1, 1 << 31, 0) + b"x" * 1000)
    with pytest.raises(ChannelBroken):
        decoder.next()
    assert len(decoder._buffer) == 0


@given(st.integers(0, 3 * frames.MAX_PAYLOAD))
def test_long_control_messages_are_put_together(size: int) -> None:
    message = {"type": "start", "text": "é" * (size // 6), "pad": "x" * (size % 6)}
    decoder, reader = Decoder(), ControlReader()
    decoder.feed(frames.encode_control(message))
    got = None
    while (frame := decoder.next()) is not None:
        got = reader.add(frame)
    assert got == message


def test_control_parts_have_a_cap() -> None:
    reader = ControlReader()
    part = Frame(frames.PART, 0, 0, b"x" * frames.MAX_PAYLOAD)
    with pytest.raises(ChannelBroken, match="over"):
        for _ in range(frames.CONTROL_LIMIT // frames.MAX_PAYLOAD + 1):
            reader.add(part)


@pytest.mark.parametrize(
    "payload", [b"", b"{", b"[]", b"nul", b"{}", b'{"type":1}', b"\xff\xfe", b"[" * 60000, b'{"type":' + b"9" * 60000]
)
def test_malformed_control_messages(payload: bytes) -> None:
    with pytest.raises(ChannelBroken, match="malformed control message"):
        ControlReader().add(Frame(frames.CONTROL, 0, 0, payload))


@given(st.binary(max_size=200))
def test_any_json_payload_is_an_object_or_channel_broken(payload: bytes) -> None:
    with contextlib.suppress(ChannelBroken):
        assert isinstance(frames.loads(payload, "x"), dict)


def test_lone_surrogates_travel() -> None:
    assert json.loads(frames.dumps({"a": "\ud800"})) == {"a": "\ud800"}


def test_a_payload_over_the_cap_is_refused_by_the_sender() -> None:
    with pytest.raises(ChannelBroken, match="65537"):
        frames.encode(frames.DATA, 1, 0, b"x" * (frames.MAX_PAYLOAD + 1))
