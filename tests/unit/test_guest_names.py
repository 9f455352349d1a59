"""What guestd's name server makes of questions, good and bad, and what it tells of them."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator

import pytest

from rethaw.guest.loop import Loop
from rethaw.guest.names import Names, question, refusal

QUERY = struct.Struct(">HHHHHH")


def query(name: str, kind: int = 1, flags: int = 0x0100, count: int = 1) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return QUERY.pack(7, flags, count, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)


def test_a_question_is_answered_that_there_is_no_such_name() -> None:
    asked = query("API.Example.com", 28) + b"\0\0\x29\x04\xd0\0\0\0\0\0\0"  # and EDNS, which is left out
    name, kind, end = question(asked) or ("", 0, 0)
    assert (name, kind, asked[end - 2 : end]) == ("api.example.com", 28, b"\0\1")
    answer = refusal(asked, end)
    ident, flags, *counts = QUERY.unpack(answer[:12])
    assert (ident, flags, counts) == (7, 0x8183, [1, 0, 0, 0])  # an answer, recursion available, NXDOMAIN
    assert answer[12:] == asked[12:end]


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\0" * 11,
        query("a.example")[:-5],  # no end
        query("a.example")[:-1],  # half a class
        query("a.example", flags=0x8100),  # an answer
        query("a.example", flags=0x2800),  # an update
        query("a.example", count=2),
        QUERY.pack(1, 0x100, 1, 0, 0, 0) + b"\0\0\1\0\1",  # the root
        QUERY.pack(1, 0x100, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1",  # a pointer to itself
    ],
)
def test_what_is_no_plain_question_is_not_answered(packet: bytes) -> None:
    assert question(packet) is None


def test_noise_does_no_harm() -> None:
    dice = random.Random(5)
    for _ in range(20_000):
        packet = bytearray(query("some.name.example"))
        for _ in range(dice.randrange(1, 5)):
            packet[dice.randrange(len(packet))] = dice.randrange(256)
        found = question(bytes(packet[: dice.randrange(len(packet) + 1)]))
        assert found is None or (found[0].isascii() or "\ufffd" in found[0])


@pytest.fixture
def asking() -> Iterator[tuple[Names, Loop, list[str], socket.socket]]:
    told: list[str] = []
    loop = Loop()
    names = Names(loop, 0, told.append)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        assert names.port is not None
        client.connect(("127.0.0.1", names.port))
        yield names, loop, told, client


def test_each_name_is_told_once_a_minute(
    asking: tuple[Names, Loop, list[str], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, loop, told, client = asking
    now = [1000.0]
    monkeypatch.setattr("rethaw.guest.names.time.monotonic", lambda: now[0])
    own = socket.gethostname().lower()
    for name in ("a.example", "A.EXAMPLE", "localhost", "x.localhost", "1.0.0.127.in-addr.arpa", own, "b"):
        for kind in (1, 28, 33):
            client.send(query(name, kind))
            loop.run_once(5000)
            assert QUERY.unpack(client.recv(600)[:12])[1] & 0xF == 3
    client.send(query("_http._tcp.c.example", 33))  # a service is no address
    loop.run_once(5000)
    assert told == ["a.example", "b"]
    now[0] += 61
    client.send(query("a.example"))
    loop.run_once(5000)
    assert told == ["a.example", "b", "a.example"]
    for n in range(100):
        client.send(query(f"n{n}.example"))
        loop.run_once(5000)
    assert len(told) == 3 + 59  # sixty in a minute


def test_a_taken_port_is_left_alone(
    asking: tuple[Names, Loop, list[str], socket.socket], capfd: pytest.CaptureFixture[str]
) -> None:
    names = asking[0]
    assert names.port is not None
    assert Names(Loop(), names.port, lambda name: None).port is None
    assert f"port {names.port}" in capfd.readouterr().err
