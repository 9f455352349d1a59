"""What epoll no longer watches, on made-up kernel states."""

from __future__ import annotations

from pathlib import Path

import pytest

from rethaw.engines.gvisor import clock, epoll

HEAD = b"\0" * 8 + (2).to_bytes(8, "big") + b"{}" + b"\0" * 32
ET = 2147491869


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def text(value: bytes) -> bytes:
    return clock.spread(varint(len(value))) + len(value).to_bytes(4, "big") + value


def kind(name: bytes, *fields: bytes) -> bytes:
    return clock.spread(b"\x11") + text(name) + clock.spread(varint(len(fields))) + b"".join(map(text, fields))


KINDS = [
    kind(b"pkg/cpuid.FeatureSet", b"hwCap"),
    kind(b"pkg/sentry/kernel.Kernel", b"clock"),
    kind(b"pkg/of.Seventeen", *[b"seventeen letters" for _ in range(17)]),  # looks like a description itself
    *[kind(b"pkg/filler.T%d" % n) for n in range(200)],  # so that the numbers have two bytes
    kind(b"pkg/sentry/vfs.epollInterest", b"epoll"),
    kind(b"pkg/sentry/vfs.epollInterestKey", b"file"),
]
INTEREST, KEY = varint(203), varint(204)


def key(file: int, fd: int, *, inside: bool = False) -> bytes:
    """`inside`: the description is part of another object."""
    path = clock.spread(b"\x01\x09") + len(b"vfsfd").to_bytes(4, "big") + b"vfsfd" + clock.spread(b"\x00\x83\x01")
    reference = clock.spread(b"\x06" + varint(file)) + (path if inside else clock.spread(b"\x00"))
    return clock.spread(KEY + b"\x0d\x02") + reference + clock.spread(b"\x01" + varint(fd << 1))


def interest(number: int, fd: int, mask: int = ET) -> bytes:
    waiter = (
        b"\x0b\x05\x0d\x03\x0b\x06\x0d\x02\x05\x05\x0e\x01\x00" + INTEREST + b"\x06" + varint(number) + b"\x00\x02\x40"
    )
    before = clock.spread(b"\x02" + varint(number) + b"\x0b" + INTEREST + b"\x0d\x08\x06\x10\x00\x0b")
    after = b"\x02" + varint(mask) + b"\x05\x0b\x07\x0d\x02\x05\x05\x02\x07\x09\x02\x01\x04\x06"
    return before + key(900 + fd, fd, inside=fd % 2 == 1) + clock.spread(waiter + after)


def table(number: int, *entries: tuple[int, int]) -> bytes:
    out = clock.spread(b"\x02" + varint(number) + b"\x0a" + varint(len(entries)))
    for n, (fd, watched) in enumerate(entries):
        tags = (b"\x0b", b"\x06") if n == 0 else (b"", b"")
        out += clock.spread(tags[0]) + key(900 + fd, fd, inside=fd % 2 == 1)
        out += clock.spread(tags[1] + varint(watched) + b"\x00")
    return out


def state(*objects: bytes) -> bytes:
    return HEAD + b"".join(KINDS) + clock.spread(b"\x02\x01\x05") + b"".join(objects) + clock.spread(b"\x02\x0f\x05")


def masks(data: bytes) -> list[int]:
    numbers = epoll._numbers(data)  # pyright: ignore[reportPrivateUsage]
    assert numbers is not None
    found, _ = epoll._interests(data, epoll._record(numbers[0], 8))  # pyright: ignore[reportPrivateUsage]
    return [epoll._Reader(data, at).number() for at, _ in found.values()]  # pyright: ignore[reportPrivateUsage]


WATCHED = [interest(407, 5), interest(412, 39), interest(1366, 31, 25)]


def test_what_no_table_has_gets_an_empty_mask_and_nothing_else_changes(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.img"
    before = state(*WATCHED, interest(821, 49), table(1066, (5, 407), (39, 412)), table(1294, (31, 1366)), table(1300))
    path.write_bytes(before)
    assert masks(before) == [ET, ET, 25, ET]
    assert epoll.hush(path) == 1
    after = path.read_bytes()
    assert masks(after) == [ET, ET, 25, 0] and len(after) == len(before)
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 5
    assert epoll.find_stale(after) == epoll.find_stale(before)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(HEAD + clock.spread(b"\x02\x01\x05"), id="no epoll at all"),
        pytest.param(state(*WATCHED, table(1066, (5, 407), (39, 412), (31, 1366))), id="all are watched"),
        pytest.param(state(*WATCHED), id="no tables"),
        pytest.param(state(*WATCHED, table(1066, (5, 407), (39, 999))), id="a table of something else"),
        pytest.param(state(interest(407, 5), table(1066, (5, 407)))[:-400], id="cut off"),
        pytest.param(
            state(*WATCHED, table(1066, (5, 407))).replace(clock.spread(b"\x0e"), clock.spread(b"\x33")), id="odd"
        ),
    ],
)
def test_a_state_that_is_not_understood_is_left_alone(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "checkpoint.img"
    path.write_bytes(data)
    assert epoll.hush(path) == 0
    assert path.read_bytes() == data
