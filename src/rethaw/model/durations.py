"""Durations as people write them: "20s", "1.5h", "7d", 20, timedelta. Standard library only, Python >= 3.9."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import Optional, Union

from rethaw.model.errors import InvalidInput

Duration = Union[str, int, float, timedelta]  # noqa: UP007
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|min|s|m|h|d|w)")


def seconds(value: Duration) -> float:
    """`value` in seconds, finite and not negative. "1h30m" is allowed. Raises InvalidInput naming the value."""
    if isinstance(value, timedelta):
        result = value.total_seconds()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        result = float(value)
    elif isinstance(value, str):
        text, total, pos = value.strip(), 0.0, 0
        while pos < len(text):
            part = _PART.match(text, pos)
            if part is None:
                total = math.nan
                break
            total += float(part.group(1)) * _UNITS[part.group(2)]
            pos = part.end()
        result = total if text else math.nan
    else:
        result = math.nan
    if not math.isfinite(result) or result < 0:
        raise InvalidInput(f"{value!r} is not a duration", remedy='write it like "20s", "1h30m", "7d", or seconds')
    return result


def optional_seconds(value: Optional[Duration]) -> Optional[float]:  # noqa: UP045
    """`seconds`, with None passed through."""
    return None if value is None else seconds(value)


def human(value: float) -> str:
    """`value` seconds for a reader: 850ms, 4.2s, 3m 20s, 2h 05m, 3d 4h."""
    if value < 1:
        return f"{value * 1000:.0f}ms"
    if value < 60:
        return f"{value:.1f}s"
    whole = int(value)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"
