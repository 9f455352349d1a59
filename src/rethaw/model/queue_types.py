"""What travels of queues and schedules. Times in seconds, `at` in UTC, unless said otherwise."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from rethaw.model.types import AgentSpec, StartOptions
from rethaw.model.wire import Wire


class Queue(Wire):
    """A queue. Limits: None is none. `suspended`: whether suspended sessions "count" towards them, or are "free" and
    wait for a slot to be resumed. `running`: sessions that have a slot; `waiting`: that want one now; `delayed`: later."""

    name: str
    limit: int | None = None
    key_limit: int | None = None
    paused: bool = False
    suspended: Literal["count", "free"] = "count"
    running: int = 0
    waiting: int = 0
    delayed: int = 0
    next: tuple[str, ...] = ()  # the first of those that wait, in their order


class Firing(Wire):
    """What became of one time of a schedule."""

    due: datetime
    what: Literal["started", "triggered", "skipped", "missed", "failed"]
    session: str | None = None
    detail: str | None = None


class ScheduleSpec(Wire):
    """What a schedule starts and when: `cron` in time zone `tz`, or every `every_s` seconds. Checked by control.

    `catch_up`: of times that passed while no server ran, start the "latest", "all" or "none". `overlap`: "allow", or
    "skip" a time while a session of an earlier one goes on."""

    agent: AgentSpec
    args: dict[str, Any] = Field(default_factory=dict[str, Any])
    options: StartOptions = StartOptions()
    cron: str | None = None
    tz: str = "UTC"
    every_s: float | None = None
    catch_up: Literal["latest", "none", "all"] = "latest"
    overlap: Literal["allow", "skip"] = "allow"


class Schedule(ScheduleSpec):
    """A schedule as it stands. `next_at` is where it would go on if it is paused. `firings`: the newest first."""

    name: str
    paused: bool
    next_at: datetime
    created_at: datetime
    firings: tuple[Firing, ...] = ()
