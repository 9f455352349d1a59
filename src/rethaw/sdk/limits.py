"""What an agent may do before it is given up: `Retries` of a program that fails, `Budget` of what a session spends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, cast

from rethaw.model.durations import Duration, optional_seconds, seconds
from rethaw.model.errors import InvalidInput

if TYPE_CHECKING:
    from rethaw.model.types import BudgetSpec, RetrySpec

FILES = ("fresh", "keep")
RETRIED_ON = ("exit", "crash_loop", "out_of_memory")
CHILDREN = ("cancel", "keep")
MOST_RETRIES = 1000
LIMITS = ("tokens", "input_tokens", "output_tokens", "money", "model_calls", "wall")


@dataclass(frozen=True)
class Retries:
    """`max` new attempts after one whose program failed: a fresh process with the same context (`ctx.history()`).

    The first begins after `delay`, each later one `factor` times later than the one before, none later than `max_delay`;
    `jitter` moves that by up to a quarter, so that many do not come back at once. `not_on`: exit statuses that are not
    tried again. `on`: which failures are: "exit" (the program ended by itself and failed), "crash_loop" (its sandbox died
    again and again), "out_of_memory" (again and again; the same memory is not often enough later). `files="keep"`: a new attempt begins with the files of the last snapshot instead of its image's. `children="keep"`: what the failed attempt spawned goes on (`ctx.child(id)`) and is not cancelled. An agent that knows that trying again is of no use raises `rethaw.NoRetry`.
    """

    max: int = 3
    delay: Duration = "1s"
    factor: float = 2.0
    max_delay: Duration = "5m"
    jitter: bool = True
    not_on: tuple[int, ...] = ()
    on: Sequence[str] = ("exit", "crash_loop")
    files: str = "fresh"
    children: str = "cancel"

    def __post_init__(self) -> None:
        if not _whole(self.max) or not 0 <= self.max <= MOST_RETRIES:
            raise InvalidInput(f"retries {self.max!r} is not a number of retries", remedy=f"use 0 to {MOST_RETRIES}")
        seconds(self.delay)
        seconds(self.max_delay)
        if not _number(self.factor) or not 1 <= self.factor <= 100:
            raise InvalidInput(f"factor {self.factor!r} of retries does not fit", remedy="use 1 to 100")
        if not all(_whole(code) and 0 < code < 256 for code in self.not_on):
            raise InvalidInput(f"not_on {self.not_on!r} of retries are no exit statuses", remedy="use 1 to 255")
        if isinstance(self.on, str) or not all(kind in RETRIED_ON for kind in self.on):
            raise InvalidInput(
                f"on = {self.on!r} of retries does not fit", remedy=f"use a list of {', '.join(RETRIED_ON)}"
            )
        if self.children not in CHILDREN:
            raise InvalidInput(
                f"children {self.children!r} of retries is unknown", remedy=f"use {' or '.join(CHILDREN)}"
            )
        if self.files not in FILES:
            raise InvalidInput(f"files {self.files!r} of retries is unknown", remedy=f"use {' or '.join(FILES)}")

    def spec(self) -> RetrySpec:
        """The wire form."""
        from rethaw.model.types import RetrySpec

        return RetrySpec(
            max=self.max,
            delay_s=seconds(self.delay),
            factor=float(self.factor),
            max_delay_s=seconds(self.max_delay),
            jitter=self.jitter,
            not_on=tuple(self.not_on),
            on=cast("Any", tuple(self.on)),
            files=cast("Any", self.files),
            children=cast("Any", self.children),
        )


def retries_of(given: int | Retries | None) -> Retries | None:
    """`retries=` of `@agent`: a number or a policy."""
    if given is None or isinstance(given, Retries):
        return given
    return Retries(max=given)


def checked_budget(given: Budget | None) -> Budget | None:
    """`budget=` of `@agent`. Raises InvalidInput for anything else."""
    if given is None or isinstance(given, Budget):  # pyright: ignore[reportUnnecessaryIsInstance]
        return given
    raise InvalidInput(f"budget {given!r} is not a budget", remedy="write budget=rethaw.Budget(tokens=100_000)")


@dataclass(frozen=True)
class Budget:
    """What a session may spend, over all of its attempts, crashes and rewinds; what a fork's ancestors spent does not count.

    `tokens`: input and output together. `money`: a decimal number ("5.00") in the currency of the server's price table.
    `model_calls`: requests sent to a provider. `wall`: time that its agent runs, suspended time left out. Once one of them
    is used up, the next model call (or the time) stops the session: failed, `budget_exceeded`.
    """

    tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    money: str | int | float | Decimal | None = None
    model_calls: int | None = None
    wall: Duration | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "input_tokens", "output_tokens", "model_calls"):
            value: Any = getattr(self, name)
            if value is not None and (not _whole(value) or not 0 <= value < 1 << 53):
                raise InvalidInput(f"{name} {value!r} of a budget is not a number", remedy="use 0 or more")
        money_text(self.money)
        optional_seconds(self.wall)

    def spec(self) -> BudgetSpec:
        """The wire form."""
        from rethaw.model.types import BudgetSpec

        return BudgetSpec(
            tokens=self.tokens,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            money=money_text(self.money),
            model_calls=self.model_calls,
            wall_s=optional_seconds(self.wall),
        )

    def over(self, other: Budget | None) -> Budget:
        """This one, with what it leaves open taken from `other`."""
        if other is None:
            return self
        return replace(self, **{n: getattr(other, n) for n in LIMITS if getattr(self, n) is None})


def add_names(names: Sequence[str]) -> list[str]:
    """Limits as the wire calls them. Raises InvalidInput for one that there is not."""
    for name in names:
        if name not in LIMITS:
            raise InvalidInput(f"{name!r} is no limit of a budget", remedy=f"use {', '.join(LIMITS)}")
    return ["wall_s" if name == "wall" else name for name in names]


def money_text(value: str | int | float | Decimal | None) -> str | None:
    """An amount as the text of a decimal number. Raises InvalidInput naming it."""
    if value is None:
        return None
    try:
        amount = Decimal(str(value).strip())
    except InvalidOperation:
        amount = Decimal("NaN")
    if isinstance(value, bool) or not amount.is_finite() or not 0 <= amount < 10**12:
        raise InvalidInput(f"money {value!r} of a budget is not an amount", remedy='write it like "5.00"')
    return format(amount, "f")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
