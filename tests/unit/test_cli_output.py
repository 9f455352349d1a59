"""What the CLI prints: short ids, tables, one line of output through crashes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rethaw.cli import output, render
from rethaw.cli.attach import OneLine
from rethaw.model.ids import new_id
from rethaw.sdk.types import OpenWait, Stats, Why


@given(st.lists(st.text(alphabet="ab", min_size=20, max_size=20), min_size=1, max_size=20, unique=True))
def test_short_ids_name_one_thing_each(tails: list[str]) -> None:
    ids = [f"s_{tail}" for tail in tails]
    found = output.short(ids)
    for one, shown in found.items():
        assert [other for other in ids if other.startswith(shown)] == [one] and len(shown) >= 10


def test_short_ids_of_one_moment_differ() -> None:
    ids = [new_id("s") for _ in range(200)]
    assert len(set(output.short(ids).values())) == 200


def test_tables_line_up_and_keep_control_characters_out(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["A", "NAME"], [["1", "x\x1b[31m\n"], ["22", ""]])
    assert capsys.readouterr().out == "A   NAME\n1   x·[31m⏎\n22\n"


def test_what_durability_did() -> None:
    assert render.durability(Stats(crashes=3, served_from_log=4, tokens_not_paid_twice=182_000)) == (
        "3 crashes, 4 model calls served from the log, 182k tokens not paid twice"
    )
    assert render.durability(Stats(1, served_from_log=1, tokens_not_paid_twice=1)).startswith("1 crash, 1 model call ")


def test_why_says_how_to_wake_it() -> None:
    why = Why("suspended", "idle", waiting_for=[OpenWait("signal", "approval", None, None)], last_snapshot={"id": "snap_1", "seq": 7})  # fmt: skip
    text = "\n".join(render.why_lines("s_1", why))
    assert "suspended (idle)" in text and "rethaw signal s_1 approval PAYLOAD" in text and "snap_1, seq 7" in text


class Screen:
    def __init__(self) -> None:
        self.shown = b""
        self.notes: list[str] = []
        self.line = OneLine(self.write, self.notes.append)

    def write(self, data: bytes, stderr: bool) -> None:
        assert not stderr
        self.shown += data

    def take(self, offset: int, data: bytes, attempt: int = 1) -> None:
        self.line.take("stdout", offset, data, attempt)


def test_output_written_again_is_shown_once() -> None:
    screen = Screen()
    screen.take(0, b"one two ")
    screen.take(8, b"three ")
    screen.take(4, b"two three four")  # a new life goes on from offset 4
    assert (screen.shown, screen.notes) == (b"one two three four", [])


def test_output_that_differs_is_shown_and_said() -> None:
    screen = Screen()
    screen.take(0, b"one two ")
    screen.take(4, b"TWO ")
    screen.take(8, b"three")
    assert screen.shown == b"one two TWO three" and len(screen.notes) == 1


def test_a_new_attempt_begins_again() -> None:
    screen = Screen()
    screen.take(0, b"same")
    screen.take(0, b"same", attempt=2)
    assert (screen.shown, screen.notes) == (b"samesame", [])


@given(st.binary(min_size=1, max_size=60), st.data())
def test_any_replay_of_the_same_bytes_is_one_line(whole: bytes, data: st.DataObject) -> None:
    screen, at = Screen(), 0
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, at))  # restored at a snapshot not after what was written
        while at < len(whole):
            size = data.draw(st.integers(1, len(whole) - at))
            screen.take(at, whole[at : at + size])
            at += size
            if data.draw(st.booleans()):
                break
    assert whole.startswith(screen.shown) and screen.notes == []


@given(st.lists(st.tuples(st.integers(0, 30), st.binary(min_size=1, max_size=20)), max_size=6))
def test_whatever_a_new_life_writes_is_at_the_end_of_the_screen(lives: list[tuple[int, bytes]]) -> None:
    screen, current = Screen(), b""
    for back, data in lives:
        at = min(back, len(current))
        screen.take(at, data)
        if not current[at:].startswith(data):  # else it is on the screen already
            current = current[:at] + data
            assert screen.shown.endswith(data)
