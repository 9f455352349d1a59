"""When a schedule is due: cron lines by a time zone's wall clock, and plain intervals.

Where clocks change, cron lines do as Debian's cron does. One that names an hour: a time that is left out comes right
after the gap, one that there is twice comes once. One that repeats (`*`) goes by real time.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from rethaw.model.errors import InvalidInput

_SHORT = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
LEAST_S = 1.0
MOST_S = 366 * 86_400.0


def zone(name: str) -> tzinfo:
    """Raises InvalidInput for one that is unknown here."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidInput(
            f"time zone {name[:80]!r} is unknown", remedy='write it like "Europe/Berlin", or "UTC"'
        ) from error


@dataclass(frozen=True)
class Calendar:
    """Times of `cron` in `tz`, or of `every_s` from `anchor` on. All times are given and returned in UTC."""

    cron: str | None
    tz: str
    every_s: float | None
    anchor: datetime

    def check(self) -> None:
        """Raises InvalidInput naming the value and the remedy."""
        zone(self.tz)
        if (self.cron is None) == (self.every_s is None):
            said = "when it is due is not said" if self.cron is None else "it is said twice when it is due"
            raise InvalidInput(said, remedy='give either cron or every, not both (--cron "0 9 * * 1-5", --every 15m)')
        if self.every_s is not None and not LEAST_S <= self.every_s <= MOST_S:
            raise InvalidInput(f"every {self.every_s:g} s does not fit", remedy="use 1s to 366d")
        self.next_after(datetime.now(UTC))

    def next_after(self, after: datetime) -> datetime:
        """The first time after `after`."""
        if self.every_s is not None:
            step = timedelta(seconds=self.every_s)
            return self.anchor + step * max(1, (after - self.anchor) // step + 1)
        try:
            found = next(self._sim(after, reverse=False)).astimezone(UTC)
        except StopIteration:
            raise InvalidInput(f"cron {self.cron!r} never comes", remedy="correct its day and month") from None
        # Going forward over a change by half an hour (Lord Howe) leaves out a time that going back finds.
        with contextlib.suppress(StopIteration):
            before = next(self._sim(found, reverse=True)).astimezone(UTC)
            return before if after < before < found else found
        return found

    def latest(self, until: datetime, due: datetime) -> datetime:
        """The last time that is not after `until`, of `due` and those that follow it."""
        if self.every_s is not None:
            step = timedelta(seconds=self.every_s)
            return max(due, self.anchor + step * ((until - self.anchor) // step))
        try:
            # Going back, whole seconds: its own is looked at first if there is a fraction.
            found = next(self._sim(until.replace(microsecond=until.microsecond or 1), reverse=True)).astimezone(UTC)
        except StopIteration:
            return due
        return max(due, found) if found <= until else due

    def _sim(self, at: datetime, *, reverse: bool) -> CronSim:
        line = (self.cron or "").strip()
        line = _SHORT.get(line.lower(), line)
        try:
            if len(line.split()) != 5:
                raise CronSimError("it has not five fields")
            return CronSim(line, at.astimezone(zone(self.tz)), reverse=reverse)
        except CronSimError as error:
            raise InvalidInput(
                f"cron {(self.cron or '')[:80]!r} does not fit: {error}",
                remedy='write minute, hour, day, month, weekday, like "0 9 * * 1-5"',
            ) from error
