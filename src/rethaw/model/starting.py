"""What may be said when a session is started: names of queues, priorities, tags. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rethaw.model.durations import human
from rethaw.model.errors import InvalidInput

DEFAULT_QUEUE = "default"
MAX_PRIORITY = 1_000_000
MAX_TAGS = 50
MAX_WAIT_S = 366 * 86_400.0  # of a delay, and of a ttl
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TAG = re.compile(r"[^\s,\x00-\x1f\x7f]{1,200}")


def check_name(what: str, name: str) -> str:
    """The name of a queue or a schedule. Raises InvalidInput."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{name[:100]!r} cannot be a {what}'s name", remedy="use letters, digits, '.', '_' and '-'")
    return name


def check_priority(priority: int) -> int:
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidInput(
            f"priority {priority!r} does not fit", remedy=f"use a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}"
        )
    return priority


def check_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """Each once, in the order given."""
    if isinstance(tags, str):
        raise InvalidInput(f"tags {tags!r} are one text", remedy=f"pass a list: [{tags!r}]")
    for tag in tags:
        if not _TAG.fullmatch(tag) or tag.encode("utf-8", "ignore").decode() != tag:
            raise InvalidInput(f"{tag[:100]!r} cannot be a tag", remedy="use 1 to 200 characters, no space, no comma")
    found = tuple(dict.fromkeys(tags))
    if len(found) > MAX_TAGS:
        raise InvalidInput(f"{len(found)} tags are too many", remedy=f"use at most {MAX_TAGS}")
    return found


def check_concurrency_key(key: str) -> str:
    if not 0 < len(key) <= 200 or "\0" in key or key.encode("utf-8", "ignore").decode() != key:
        raise InvalidInput(f"{key[:80]!r} cannot be a concurrency key", remedy="use 1 to 200 characters, no NUL")
    return key


def check_wait(what: str, value: float, *, least: float = 0.0) -> float:
    """Seconds of a delay or a ttl."""
    if not least <= value <= MAX_WAIT_S:
        raise InvalidInput(
            f"{what} of {value:g} s is out of range", remedy=f"use {human(least)} to {human(MAX_WAIT_S)}"
        )
    return value
