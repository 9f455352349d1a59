"""How a session is started, apart from what runs: queue, priority, delay, ttl, concurrency key, tags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rethaw.model.durations import Duration, optional_seconds
from rethaw.model.starting import check_concurrency_key, check_name, check_priority, check_tags, check_wait


@dataclass(frozen=True)
class Starting:
    """What was said, checked. None: nothing. Times in seconds."""

    queue: str | None = None
    priority: int | None = None
    delay: float | None = None
    ttl: float | None = None
    concurrency_key: str | None = None
    tags: tuple[str, ...] = ()

    def over(self, base: Starting) -> Starting:
        """This, and what `base` says where this says nothing; the tags of both."""
        return Starting(
            queue=base.queue if self.queue is None else self.queue,
            priority=base.priority if self.priority is None else self.priority,
            delay=base.delay if self.delay is None else self.delay,
            ttl=base.ttl if self.ttl is None else self.ttl,
            concurrency_key=base.concurrency_key if self.concurrency_key is None else self.concurrency_key,
            tags=tuple(dict.fromkeys([*base.tags, *self.tags])),
        )

    def given(self) -> dict[str, Any]:
        """What was said, as keyword arguments of `starting`."""
        return {name: value for name, value in vars(self).items() if value not in (None, ())}

    def wire(self) -> dict[str, Any]:
        """What was said, as the server's StartOptions."""
        names = {"delay": "delay_s", "ttl": "ttl_s"}
        return {names.get(name, name): value for name, value in self.given().items()}


def starting(
    *,
    queue: str | None = None,
    priority: int | None = None,
    delay: Duration | None = None,
    ttl: Duration | None = None,
    concurrency_key: str | None = None,
    tags: Sequence[str] = (),
) -> Starting:
    """Check what a person wrote. Raises InvalidInput naming the value and the remedy."""
    wait, life = optional_seconds(delay), optional_seconds(ttl)
    return Starting(
        queue=None if queue is None else check_name("queue", queue),
        priority=None if priority is None else check_priority(priority),
        delay=None if wait is None else check_wait("a delay", wait),
        ttl=None if life is None else check_wait("a ttl", life, least=0.1),
        concurrency_key=None if concurrency_key is None else check_concurrency_key(concurrency_key),
        tags=check_tags(tags),
    )
