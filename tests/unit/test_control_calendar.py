"""When schedules are due, above all where clocks change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from rethaw.control.calendar import Calendar
from rethaw.model.errors import InvalidInput

ANCHOR = datetime(2026, 1, 1, tzinfo=UTC)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def times(cron: str, tz: str, after: str, n: int) -> list[str]:
    calendar, at, out = Calendar(cron, tz, None, ANCHOR), utc(after), list[str]()
    for _ in range(n):
        at = calendar.next_after(at)
        out.append(at.isoformat()[:16])
    return out


def test_weekdays_at_nine_by_the_clock_on_the_wall() -> None:
    """Friday in winter, Monday in summer time: an hour earlier."""
    assert times("0 9 * * 1-5", "Europe/Berlin", "2026-03-26T12:00", 3) == [
        "2026-03-27T08:00",
        "2026-03-30T07:00",
        "2026-03-31T07:00",
    ]


def test_a_time_that_is_left_out_comes_after_the_gap() -> None:
    """On 29 March 2026 Berlin goes from 2:00 to 3:00."""
    assert times("30 2 * * *", "Europe/Berlin", "2026-03-28T00:00", 3) == [
        "2026-03-28T01:30",
        "2026-03-29T01:00",
        "2026-03-30T00:30",
    ]


def test_a_time_that_there_is_twice_comes_once() -> None:
    """On 25 October 2026 Berlin goes from 3:00 back to 2:00."""
    assert times("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", 2) == ["2026-10-25T00:30", "2026-10-26T01:30"]
    assert times("30 1 * * *", "America/New_York", "2026-10-31T12:00", 2) == ["2026-11-01T05:30", "2026-11-02T06:30"]


def test_what_repeats_goes_by_real_time() -> None:
    assert times("*/30 * * * *", "Europe/Berlin", "2026-10-25T00:00", 5) == [
        "2026-10-25T00:30", "2026-10-25T01:00", "2026-10-25T01:30", "2026-10-25T02:00", "2026-10-25T02:30",
    ]  # fmt: skip
    assert times("@hourly", "Europe/Berlin", "2026-03-29T00:30", 2) == ["2026-03-29T01:00", "2026-03-29T02:00"]


@pytest.mark.parametrize("tz", ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"])
@pytest.mark.parametrize("cron", ["30 2 * * *", "*/20 * * * *", "0 */6 * * *", "15 1,2,3 * * 0", "0 0 1 * *"])
def test_the_latest_is_the_last_one_that_going_forward_finds(tz: str, cron: str) -> None:
    """Whatever time it is asked at, over both changes of the clock."""
    calendar = Calendar(cron, tz, None, ANCHOR)
    for begin in ("2026-03-28T00:00", "2026-10-24T00:00", "2026-10-31T00:00", "2026-04-04T00:00"):
        every = [calendar.next_after(utc(begin))]
        while every[-1] < utc(begin) + timedelta(days=2, hours=6):
            every.append(calendar.next_after(every[-1]))
        assert every == sorted(set(every))
        now = utc(begin) + timedelta(minutes=7, microseconds=3)
        for _ in range(60):
            now += timedelta(minutes=53)
            expected = [at for at in every if at <= now][-1:] or every[:1]
            found = calendar.latest(now, every[0])
            # Asked at the second of two equal wall times, it may be the one before: the other is found going on from it.
            assert found == expected[0] or calendar.next_after(found) == expected[0], (now, found, expected)


def test_a_time_is_its_own_latest() -> None:
    calendar = Calendar("0 9 * * *", "UTC", None, ANCHOR)
    first, due = utc("2026-01-02T09:00"), utc("2026-01-05T09:00")
    assert calendar.latest(due, first) == due
    assert calendar.latest(due - timedelta(microseconds=1), first) == due - timedelta(days=1)
    assert calendar.latest(due + timedelta(microseconds=1), first) == due


def test_intervals_count_from_where_they_began() -> None:
    calendar = Calendar(None, "UTC", 900.0, ANCHOR)
    assert calendar.next_after(ANCHOR) == utc("2026-01-01T00:15")
    assert calendar.next_after(utc("2026-01-01T00:15")) == utc("2026-01-01T00:30")
    assert calendar.next_after(utc("2026-01-01T00:29")) == utc("2026-01-01T00:30")
    assert calendar.latest(utc("2026-01-09T10:44"), utc("2026-01-01T00:15")) == utc("2026-01-09T10:30")


@pytest.mark.parametrize(
    ("cron", "tz", "every", "said"),
    [
        ("0 9 * *", "UTC", None, "cron '0 9 * *' does not fit: it has not five fields"),
        ("0 9 * * * *", "UTC", None, "five fields"),
        ("61 9 * * *", "UTC", None, "Bad minute"),
        ("0 9 * * FOO", "UTC", None, "Bad day-of-week"),
        ("0 0 30 2 *", "UTC", None, "Bad day-of-month"),
        ("", "UTC", None, "cron ''"),
        ("@often", "UTC", None, "@often"),
        ("0 9 * * *", "Europe/Berlinn", None, "time zone 'Europe/Berlinn' is unknown"),
        ("0 9 * * *", "../../etc/passwd", None, "is unknown"),
        ("0 9 * * *", "Europe", None, "is unknown"),
        ("0 9 * * *", "", None, "is unknown"),
        ("0 9 * * *", "UTC", 5.0, "not both"),
        (None, "UTC", None, "either cron or every"),
        (None, "UTC", 0.1, "every 0.1 s"),
        (None, "UTC", 1e9, "every 1e+09 s"),
    ],
)
def test_what_does_not_fit_is_named(cron: str | None, tz: str, every: float | None, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Calendar(cron, tz, every, ANCHOR).check()
    assert said in str(caught.value)
