"""Flow control without I/O: windows, turns, order, sending again."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rethaw.channel import frames
from rethaw.channel.frames import Decoder, Frame
from rethaw.channel.mux import WINDOW, Mux, Receiver, Sender
from rethaw.model.errors import ChannelBroken


def _frames(data: bytes) -> list[Frame]:
    decoder = Decoder()
    decoder.feed(data)
    out: list[Frame] = []
    while (frame := decoder.next()) is not None:
        out.append(frame)
    assert decoder.rest() == b""
    return out


def _drain(mux: Mux) -> list[Frame]:
    out: list[Frame] = []
    while mux.pending:
        out += _frames(mux.take())
    return out


def test_no_more_than_a_window_is_in_flight() -> None:
    mux, sender = Mux(), Sender(1)
    sender.write(b"x" * 200_000)
    mux.wake(sender)
    assert sum(len(f.payload) for f in _drain(mux)) == WINDOW
    sender.credit(WINDOW + 10)
    mux.wake(sender)
    assert sum(len(f.payload) for f in _drain(mux)) == 10


def test_a_stuck_stream_does_not_hold_up_another() -> None:
    mux, stuck, free = Mux(), Sender(1), Sender(2)
    stuck.write(b"s" * 1_000_000)
    mux.wake(stuck)
    _drain(mux)
    got = 0
    for _ in range(100):
        free.write(b"f" * 10_000)
        mux.wake(free)
        got += sum(len(f.payload) for f in _drain(mux) if f.stream == 2)
        free.credit(got + WINDOW)
    assert got == 1_000_000


def test_control_goes_first_and_streams_take_turns() -> None:
    mux, a, b = Mux(), Sender(1), Sender(2)
    for sender in (a, b):
        sender.write(b"x" * WINDOW)
        mux.wake(sender)
    first = _frames(mux.take(1))
    assert [f.stream for f in first] == [1]
    mux.send(frames.encode_control({"type": "ping"}))
    assert [f.stream for f in _drain(mux)] == [0, 2, 1, 2]


def test_end_follows_the_data_and_comes_once() -> None:
    mux, sender = Mux(), Sender(1)
    sender.write(b"abc")
    sender.finish()
    mux.wake(sender)
    mux.wake(sender)
    kinds = [(f.kind, f.offset) for f in _drain(mux)]
    assert kinds == [(frames.DATA, 0), (frames.END, 3)]
    mux.wake(sender)
    assert not mux.pending


def test_kept_bytes_are_sent_again_from_the_base() -> None:
    mux, sender = Mux(), Sender(1, keep=True)
    sender.write(b"abcdef")
    mux.wake(sender)
    _drain(mux)
    sender.forget(2)
    sender.rewind()
    mux.wake(sender)
    assert [(f.offset, f.payload) for f in _drain(mux)] == [(2, b"cdef")]


@given(st.lists(st.binary(max_size=5000), max_size=30), st.randoms())
@settings(deadline=None)
def test_sender_and_receiver_agree(parts: list[bytes], random: random.Random) -> None:
    mux, sender, receiver = Mux(), Sender(7, keep=True), Receiver(7)
    got, held = bytearray(), 0
    for part in [*parts, None]:
        if part is None:
            sender.finish()
        else:
            sender.write(part)
        mux.wake(sender)
        for frame in _drain(mux):
            if frame.kind == frames.DATA:
                receiver.data(frame.offset, len(frame.payload))
                got += frame.payload
                held += len(frame.payload)
            else:
                receiver.end(frame.offset)
        take = held if part is None else random.randint(0, held)
        held -= take
        credit = receiver.consume(take)
        if credit is not None:
            sender.credit(_frames(credit)[0].offset)
    while not receiver.ended:
        mux.wake(sender)
        for frame in _drain(mux):
            if frame.kind == frames.DATA:
                receiver.data(frame.offset, len(frame.payload))
                got += frame.payload
                credit = receiver.consume(len(frame.payload))
                if credit is not None:
                    sender.credit(_frames(credit)[0].offset)
            else:
                receiver.end(frame.offset)
    assert bytes(got) == b"".join(parts)


def test_what_no_honest_end_would_send() -> None:
    receiver = Receiver(3)
    with pytest.raises(ChannelBroken, match="offset 5, expected 0"):
        receiver.data(5, 1)
    with pytest.raises(ChannelBroken, match="allowed up to"):
        receiver.data(0, WINDOW + 1)
    with pytest.raises(ChannelBroken, match="end at 9"):
        receiver.end(9)
    receiver.end(0)
    with pytest.raises(ChannelBroken, match="after its end"):
        receiver.data(0, 1)
    sender = Sender(3, keep=True)
    sender.write(b"abc")
    with pytest.raises(ChannelBroken, match="only 0 sent"):
        sender.forget(2)
    with pytest.raises(ChannelBroken, match="credit up to"):
        sender.credit(WINDOW + 1)
