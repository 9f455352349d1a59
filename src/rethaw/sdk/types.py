"""What the SDK hands out besides the wire types of `rethaw.model.types`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rethaw.model.types import Attempt, BudgetSpec, SessionView, Spent


@dataclass(frozen=True)
class Message:
    """An inbox or outbox message. `raw` is its exact JSON text; `number` counts from 1 within its box."""

    id: str
    number: int
    raw: bytes
    at: datetime | None

    @property
    def payload(self) -> Any:
        return json.loads(self.raw)


@dataclass(frozen=True)
class Stats:
    """What a session did and what durability did for it. Counts are of the whole session, all lines."""

    crashes: int = 0
    exchanges: int = 0
    upstream_calls: int = 0  # requests that really went to a provider
    served_from_log: int = 0  # answered after a restore without the provider
    tokens_not_paid_twice: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    snapshots: int = 0  # ever taken
    restores: int = 0
    stored_bytes: int = 0  # of the snapshots that are kept


@dataclass(frozen=True)
class Detail:
    """A session and its numbers. `budget`: what it may spend, None without one."""

    view: SessionView
    stats: Stats
    attempts: list[Attempt] = field(default_factory=list["Attempt"])
    budget: BudgetSpec | None = None
    spent: Spent | None = None


@dataclass(frozen=True)
class OpenWait:
    """One thing that a session waits for."""

    kind: str
    name: str | None
    since: str | None
    wakes_it: str | None


@dataclass(frozen=True)
class LastWords:
    """The end of what a failed session's program wrote, 10 lines at most. `cut`: there was more before them."""

    stream: str
    lines: list[str]
    cut: bool


@dataclass(frozen=True)
class Why:
    """Why a session stands where it does. `would_resume_at`: what a crash now would go back to. `last_words`: of one that
    failed, unless it wrote nothing."""

    state: str
    reason: str
    detail: str | None = None
    since: str | None = None
    waiting_for: list[OpenWait] = field(default_factory=list[OpenWait])
    last_snapshot: Any = None
    would_resume_at: Any = None
    last_words: LastWords | None = None


@dataclass(frozen=True)
class Outcome:
    """Where a session stands: `result` once it completed, `exit_code` once its program ended."""

    state: str
    result: Any
    exit_code: int | None


@dataclass(frozen=True)
class Output:
    """Some bytes that a session's program wrote. `offset`: of the first of them in its stream."""

    stream: str  # "stdout" or "stderr"
    offset: int
    data: bytes
    seq: int
