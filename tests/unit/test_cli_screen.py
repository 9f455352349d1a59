"""A screen drawn anew is the screen as it was: against another emulator, and for what comes after it."""

from __future__ import annotations

import random
import unicodedata

import pyte
import pytest

from rethaw.cli.screen import Screen

SAMPLES: dict[str, bytes] = {
    "plain": b"one\r\ntwo\r\n\tthree",
    "colour prompt": b"\x1b[1;32muser\x1b[0m:\x1b[38;5;33m~/src\x1b[39m$ ls \x1b[38;2;1;2;3mx\x1b[0m",
    "wrapped": b"x" * 95 + b"\r\n" + b"y" * 39 + b"z",
    "last column": b"a" * 40,
    "scrolled": b"".join(b"line %d\r\n" % n for n in range(30)),
    "region": b"top\x1b[3;6r\x1b[6;1Hlast" + b"\r\nmore" * 5,
    "region upwards": b"a\r\nb\r\nc\x1b[2;4r\x1b[2;1H\x1bM\x1bMup",
    "insert and delete": b"abcdefgh\x1b[1;3H\x1b[2@XY\x1b[1;7H\x1b[3P\x1b[2;1Hq\x1b[1L",
    "erase": b"abcdefgh\r\nijklmnop\r\nqrst\x1b[2;4H\x1b[1K\x1b[1;3H\x1b[K\x1b[3;2H\x1b[1J",
    "cleared": b"junk\r\n" * 20 + b"\x1b[H\x1b[2Jfresh",
    "wide": "漢字かな\r\n混ぜ a書き\r\ne\u0301te\u0301 👍".encode(),
    "lines": b"\x1b(0lqqk\r\nx  x\r\nmqqj\x1b(B ok",
    "tabs": b"a\tb\x1b[3g\x1b[1;5H\x1bH\r\tc",
    "saved cursor": b"abc\x1b7\x1b[5;5Hxyz\x1b8def",
    "hidden cursor": b"\x1b[?25l\x1b[?2004h\x1b[?1hmenu",
    "reverse": b"\x1b[7minverse\x1b[27m \x1b[4munder\x1b[24m\x1b[3mitalic\x1b[23m",
    "question": b"a\x1b[6n\x1b[c\x1b]11;?\x07bc",
    "device string": b"a\x1bP+q544e\x1b\\b",
    "backspace": b"abc\b\b\bXY\r\x1b[2CZ",
}
NOT_THEIRS = ("lines", "device string")  # pyte shows the first as letters and the second at all


def reference(rows: int = 12, cols: int = 40) -> tuple[object, object]:
    screen = pyte.Screen(cols, rows)
    return screen, pyte.ByteStream(screen)


def shown(screen: object) -> list[str]:
    return [unicodedata.normalize("NFD", line.rstrip()) for line in screen.display]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in NOT_THEIRS])
def test_a_screen_is_what_another_emulator_shows(name: str) -> None:
    ours = Screen(12, 40)
    theirs, stream = reference()
    ours.feed(SAMPLES[name])
    stream.feed(SAMPLES[name])  # type: ignore[attr-defined]
    assert [unicodedata.normalize("NFD", line) for line in ours.text] == shown(theirs)
    assert (ours.cursor.y, ours.cursor.x) == (theirs.cursor.y, min(theirs.cursor.x, 39))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("after", [b"", b"next\r\n", b"\x1b[2;3Hthere\n\n", b"w" * 90, b"\x1b8back\tx"])
def test_a_redrawn_screen_goes_on_like_the_first(name: str, after: bytes) -> None:
    ours, again = Screen(12, 40), Screen(12, 40)
    ours.feed(SAMPLES[name])
    again.feed(b"\x1b[?1049h\x1b[31mjunk of another program\x1b[2;5r\x1b[?25l\x1b(0\x1b[>1u")
    again.feed(ours.redraw())
    same(ours, again)
    ours.feed(after)
    again.feed(after)
    same(ours, again)
    theirs, stream = reference()
    for data in (SAMPLES[name], after):
        stream.feed(data)  # type: ignore[attr-defined]
    redrawn, other = reference()
    before = Screen(12, 40)
    before.feed(SAMPLES[name])
    for data in (before.redraw(), after):
        other.feed(data)  # type: ignore[attr-defined]
    if name not in (*NOT_THEIRS, "saved cursor", "wide") and not after.startswith(
        b"\x1b8"
    ):  # it forgets what it restored once
        assert shown(redrawn) == shown(theirs)


def same(one: Screen, two: Screen) -> None:
    assert one.lines == two.lines
    assert one.modes == two.modes
    a, b = one.cursor, two.cursor
    assert (a.y, a.x, a.wrap, a.style, a.sets, a.shift) == (b.y, b.x, b.wrap, b.style, b.sets, b.shift)


def test_the_alternate_screen_is_left_for_what_was_there() -> None:
    ours, again = Screen(5, 20), Screen(5, 20)
    ours.feed(b"$ vi file\r\n\x1b[?1049h\x1b[2J\x1b[Htext\r\n~\r\n~\x1b[?1000h")
    again.feed(ours.redraw())
    assert again.text == ["text", "~", "~", "", ""]
    for screen in (ours, again):
        screen.feed(b"\x1b[?1000l\x1b[?1049l$ ")
    same(ours, again)
    assert again.text == ["$ vi file", "$", "", "", ""]


def test_a_resize_cuts_and_lengthens() -> None:
    screen = Screen(4, 10)
    screen.feed(b"0123456789\r\nb\r\nc\r\nd$ ")
    screen.resize(2, 6)
    assert screen.text == ["c", "d$"]
    screen.resize(3, 12)
    screen.feed(b"x" * 10)
    assert screen.text == ["c", "d$ xxxxxxxxx", "x"]
    blank = Screen(10, 10)
    blank.feed(b"top$ ")
    blank.resize(3, 10)
    assert blank.text == ["top$", "", ""]


def test_bytes_may_be_cut_anywhere() -> None:
    data = b"".join(SAMPLES.values())
    whole = Screen(12, 40)
    whole.feed(data)
    for seed in range(20):
        rest, parts = data, Screen(12, 40)
        shuffled = random.Random(seed)
        while rest:
            size = shuffled.randint(1, 7)
            parts.feed(rest[:size])
            rest = rest[size:]
        same(whole, parts)


def test_noise_does_no_harm() -> None:
    shuffled = random.Random(1)
    pieces = [
        *SAMPLES.values(),
        b"\x1b[999;999H",
        b"\x1b[0;0r",
        b"\x1b[99999999999m",
        b"\x1b[?;;h",
        b"\x1b[",
        b"\x1b]0;",
    ]
    for _ in range(300):
        screen, again = Screen(7, 23), Screen(7, 23)
        screen.feed(b"".join(shuffled.choice(pieces)[: shuffled.randint(1, 40)] for _ in range(20)) + b"\x07\x1b\\")
        screen.feed(shuffled.randbytes(200) + b"\x07\x1b\\\x1b[m")
        screen.resize(shuffled.randint(1, 12), shuffled.randint(2, 50))
        again.resize(screen.rows, screen.cols)
        again.feed(screen.redraw())
        assert again.text == screen.text
        assert all(len(line) == screen.cols for line in screen.lines) and len(screen.lines) == screen.rows


def test_questions_are_not_asked_again() -> None:
    screen = Screen(5, 20)
    screen.feed(SAMPLES["question"])
    drawn = screen.redraw()
    assert b"[6n" not in drawn and b"[c" not in drawn and b"]11" not in drawn
    assert screen.text[0] == "abc"
