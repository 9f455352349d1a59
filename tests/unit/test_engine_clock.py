"""The frozen clock, on made-up kernel states."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rethaw.engines.gvisor import clock

NOW = 1_795_398_000_000_000_000
TIMEKEEPER = (
    b"\x0d\x05\x06\x25\x00\x06\x26\x00\x0b\x0f\x01" + clock.zigzag(NOW - 10**9) + b"\x01\xfa\xdb\x81\xf4\x0b\x01"
)
SLEEP = b"\x0d\x03\x0e\x01\x00\x2f\x06\x25\x00\x0b\x0f\x01"
SLEEP_TYPE = b"\x00\x00\x00\x34pkg/sentry/syscalls/linux.clockNanosleepRestartBlock"


def state(*parts: bytes) -> bytes:
    """A file with `parts` as its chunks (each already spread)."""
    metadata = b'{"x": 1}'
    return b"MAGIC..." + struct.pack(">Q", len(metadata)) + metadata + b"h" * 32 + b"".join(parts)


def value(data: bytes, offset: int) -> int:
    digits = data[offset + 4 : offset + 45 : 5]
    number = sum((byte & 0x7F) << 7 * n for n, byte in enumerate(digits))
    return number >> 1


@given(st.integers(min_value=0, max_value=2**62 - 1))
def test_numbers_come_back(number: int) -> None:
    data = clock.zigzag(number)
    assert sum((byte & 0x7F) << 7 * n for n, byte in enumerate(data)) >> 1 == number
    assert all(byte & 0x80 for byte in data[:-1])
    assert not data[-1] & 0x80


def test_the_far_future_has_as_many_bytes_as_now() -> None:
    assert len(clock.zigzag(clock.FAR_FUTURE_NS)) == len(clock.zigzag(time.time_ns())) == 9
    assert time.time_ns() < clock.FAR_FUTURE_NS


def test_the_one_number_in_the_window_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.img"
    other = clock.spread(clock.zigzag(NOW - 10**9))
    path.write_bytes(state(other, clock.spread(clock.zigzag(NOW)), other))
    size = path.stat().st_size
    notes = clock.freeze(path, NOW - 10**7, NOW + 10**7)
    assert notes["frozen"] is True
    assert notes["saved_ns"] == NOW
    assert path.stat().st_size == size
    assert value(path.read_bytes(), int(str(notes["offset"]))) == clock.FAR_FUTURE_NS
    assert path.read_bytes().count(other) == 2


@pytest.mark.parametrize("edge", [NOW - 10**7, NOW + 10**7])
def test_the_window_includes_its_edges(edge: int) -> None:
    data = state(clock.spread(clock.zigzag(edge)))
    assert [v for _, v in clock.find(data, NOW - 10**7, NOW + 10**7)] == [edge]


def test_a_window_over_a_carry_of_the_upper_bytes() -> None:
    border = (NOW >> 41 << 41) + (1 << 41)  # where the upper three digits change
    data = state(clock.spread(clock.zigzag(border - 5)), clock.spread(clock.zigzag(border + 5)))
    assert [v for _, v in clock.find(data, border - 10, border + 10)] == [border - 5, border + 5]


def test_files_written_in_the_moment_of_the_save_do_not_confuse_it(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.img"
    mtimes = b"".join(clock.spread(b"\x01" + clock.zigzag(NOW + n)) for n in range(50))
    path.write_bytes(state(mtimes, clock.spread(TIMEKEEPER + clock.zigzag(NOW + 7)), mtimes))
    notes = clock.freeze(path, NOW - 10**7, NOW + 10**7)
    assert notes["frozen"] is True
    assert notes["saved_ns"] == NOW + 7


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([], id="none"),
        pytest.param([clock.spread(clock.zigzag(NOW))] * 2, id="two of no shape"),
        pytest.param([clock.spread(TIMEKEEPER + clock.zigzag(NOW))] * 2, id="two of its shape"),
    ],
)
def test_what_is_not_clear_is_left_alone(tmp_path: Path, parts: list[bytes]) -> None:
    path = tmp_path / "checkpoint.img"
    path.write_bytes(state(clock.spread(b"abc"), *parts))
    before = path.read_bytes()
    notes = clock.freeze(path, NOW - 10**7, NOW + 10**7)
    assert notes["frozen"] is False
    assert "look like the time of the save" in str(notes["why"])
    assert path.read_bytes() == before


@pytest.mark.parametrize("data", [b"", b"short", b"M" * 8 + struct.pack(">Q", 2**60) + b"x" * 100])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "checkpoint.img"
    path.write_bytes(data)
    assert clock.freeze(path, NOW - 10**7, NOW + 10**7)["frozen"] is False
    assert path.read_bytes() == data


def test_sleeps_by_the_wall_clock_are_found_and_moved() -> None:
    saved = time.time_ns() - 30 * 10**9
    ends = [saved + 10**9, saved + 3600 * 10**9, saved + 400 * 86400 * 10**9]
    records = [
        clock.spread(SLEEP + clock.zigzag(end) + (b"\x02\x80\x01" if n else b"\x05")) for n, end in enumerate(ends)
    ]
    past = clock.spread(SLEEP + clock.zigzag(saved - 10**9) + b"\x02")
    future_file = clock.spread(b"\x01" + clock.zigzag(saved + 10**12) + b"\x02")
    data = state(SLEEP_TYPE, past, future_file, *records)
    offsets = clock.find_sleeps(data, saved)
    assert [value(data, offset) for offset in offsets] == ends
    moved = clock.shift(data, offsets, saved, restore_ms=100)
    assert len(moved) == len(data)
    for offset, end in zip(offsets, ends, strict=True):
        assert 0 <= value(moved, offset) - end - 30.1 * 1e9 < 1e9
    untouched = moved
    for offset in offsets:
        untouched = untouched[:offset] + data[offset : offset + 45] + untouched[offset + 45 :]
    assert untouched == data


def typed(name: str) -> bytes:
    text = name.encode()
    size = bytes((len(text),))
    return clock.spread(b"\x11" + size) + b"\0\0\0" + size + text


def timer(listener: bytes, end: int, period: bytes = b"\x05") -> bytes:
    head = b"\x0d\x04\x0e\x01\x00\x2f\x06\x25\x00\x0e\x01\x00" + listener + b"\x06\x8d\x05\x00"
    return clock.spread(head + b"\x0b\x24\x0d\x03\x00\x01\x0b\x0f\x01" + clock.zigzag(end) + period)


def test_timers_on_the_wall_clock_are_found_by_their_type() -> None:
    """`timeout` used to fire at the restore."""
    saved = NOW
    types = [typed("pkg/a.First"), typed("pkg/sentry/kernel.timekeeperClock")]
    types += [typed(f"pkg/b.T{n}") for n in range(0x12E - 0x2F - 1)]
    types += [typed("pkg/sentry/kernel.IntervalTimer"), typed("pkg/sentry/fsimpl/timerfd.TimerFileDescription")]
    own, timerfd = b"\xae\x02", b"\xaf\x02"
    ends = [saved + 10**9, saved + 5000 * 10**9]
    data = state(
        *types,
        timer(own, saved - 10**9),
        timer(own, ends[0]),
        timer(timerfd, saved + 10**10),
        timer(own, ends[1], period=b"\x01\x80\x02"),
        clock.spread(b"\x01" + clock.zigzag(saved + 10**12) + b"\x05"),
    )
    assert [value(data, offset) for offset in clock.find_timers(data, saved)] == ends
    assert (
        clock.find_timers(state(*types[1:], timer(own, ends[0])).replace(b"timekeeperClock", b"timekeeperClocc"), saved)
        == []
    )
    assert clock.find_timers(state(timer(own, ends[0])), saved) == []


def test_without_the_type_there_is_no_sleep() -> None:
    saved = NOW
    record = clock.spread(SLEEP + clock.zigzag(saved + 10**9) + b"\x02")
    assert clock.find_sleeps(state(record), saved) == []


def test_shift_leaves_offsets_that_hold_something_else() -> None:
    data = state(clock.spread(b"abcdefghijklmnop"))
    assert clock.shift(data, [60, 3, 10**9], NOW, 100) == data


@given(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.integers() | st.text())))
def test_notes_of_any_kind_are_read(notes: dict[str, object]) -> None:
    saved, offsets = clock.sleeps_of(notes)
    assert isinstance(saved, int)
    assert all(isinstance(offset, int) for offset in offsets)
