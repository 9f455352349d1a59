"""What tokens cost: the `[prices]` table of rethaw.toml."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, cast

from rethaw.model.errors import InvalidInput

_FIELDS = {"input", "cached", "output"}
_MILLION = Decimal(1_000_000)


@dataclass(frozen=True)
class Price:
    """Of a million tokens. `cached`: of input that the provider had in its cache."""

    input: Decimal
    cached: Decimal
    output: Decimal

    def of(self, input_tokens: int, cached_tokens: int, output_tokens: int) -> Decimal:
        cached = min(cached_tokens, input_tokens)
        return ((input_tokens - cached) * self.input + cached * self.cached + output_tokens * self.output) / _MILLION


@dataclass(frozen=True)
class Prices:
    """By the model's name, or by a pattern such as "gpt-5*"; the longest pattern that fits counts."""

    table: Mapping[str, Price] = field(default_factory=dict[str, Price])

    def of(self, model: str | None) -> Price | None:
        if model is None:
            return None
        if model in self.table:
            return self.table[model]
        fits = [pattern for pattern in self.table if fnmatch.fnmatchcase(model, pattern)]
        return self.table[max(fits, key=len)] if fits else None


def prices_from(table: object, where: str) -> Prices:
    """From the `[prices."MODEL"]` tables. Raises InvalidInput naming table, field and remedy."""
    if not isinstance(table, Mapping):
        raise InvalidInput(
            f"{where}: prices is not a table", remedy='write [prices."MODEL"] and input and output below it'
        )
    return Prices({model: _price(model, given, where) for model, given in cast("Mapping[str, Any]", table).items()})


def _price(model: str, given: object, where: str) -> Price:
    name = f'{where}: [prices."{model}"]'
    if not isinstance(given, Mapping):
        raise InvalidInput(
            f"{name} is not a table", remedy='put the model into quotes: [prices."gpt-5-mini"], input and output below'
        )
    fields = cast("Mapping[str, Any]", given)
    for wrong in sorted(set(fields) - _FIELDS):
        unquoted = isinstance(fields[wrong], Mapping)  # a dot in the name of the model
        remedy = "put the model into quotes" if unquoted else "known: cached, input, output"
        raise InvalidInput(f"{name} has an unknown field {wrong!r}", remedy=remedy)
    for missing in sorted({"input", "output"} - set(fields)):
        raise InvalidInput(f"{name} has no {missing}", remedy="write what a million tokens cost")
    amounts = {field: _amount(value, f"{name} {field}") for field, value in fields.items()}
    return Price(amounts["input"], amounts.get("cached", amounts["input"]), amounts["output"])


def _amount(value: object, where: str) -> Decimal:
    try:
        amount = Decimal("NaN") if isinstance(value, bool) else Decimal(str(value))
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or not 0 <= amount < 10**9:
        raise InvalidInput(f"{where} = {value!r} is not a price", remedy="write what a million tokens cost, like 0.25")
    return amount
