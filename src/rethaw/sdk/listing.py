"""Which sessions a list has, and its pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from rethaw.model.durations import seconds
from rethaw.model.enums import State
from rethaw.model.errors import InvalidInput

if TYPE_CHECKING:
    from rethaw.model.types import SessionView

When = datetime | str
PAGE = 200


@dataclass(frozen=True)
class Page:
    """Some sessions, newest first, and the cursor of the next page; None after the last."""

    sessions: list[SessionView]
    next: str | None


@dataclass(frozen=True)
class Wanted:
    """What `sessions.list` and `page` were given, as parameters of the API."""

    params: dict[str, str | list[str]]


def wanted(
    *,
    state: str | Sequence[str] | None = None,
    agent: str | None = None,
    tag: str | Sequence[str] | None = None,
    queue: str | None = None,
    search: str | None = None,
    created_after: When | None = None,
    created_before: When | None = None,
) -> Wanted:
    """Raises InvalidInput for a state or a time that is none."""
    states = [state] if isinstance(state, str) else list(state or ())
    for one in states:
        if one not in list(State):
            raise InvalidInput(f"{one!r} is not a state", remedy=f"use one of {', '.join(State)}")
    params: dict[str, str | list[str] | None] = {
        "state": states,
        "agent": agent,
        "tag": [tag] if isinstance(tag, str) else list(tag or ()),
        "queue": queue,
        "search": search,
        "created_after": None if created_after is None else _time(created_after),
        "created_before": None if created_before is None else _time(created_before),
    }
    return Wanted({name: value for name, value in params.items() if value is not None and value != []})


def _time(value: When) -> str:
    """A time with its zone; text may also be how long ago, like "2h". What has no zone is of this machine's."""
    if isinstance(value, datetime):
        return value.astimezone().isoformat()
    try:
        return datetime.fromisoformat(value).astimezone().isoformat()
    except (ValueError, OverflowError):
        pass
    try:
        return (datetime.now(UTC) - timedelta(seconds=seconds(value))).isoformat()
    except (InvalidInput, OverflowError):
        raise InvalidInput(
            f"{value!r} is not a time", remedy='write 2026-01-31, 2026-01-31T09:00, or how long ago, like "2h"'
        ) from None
