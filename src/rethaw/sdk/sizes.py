"""Sizes as people write them: "512MiB", "1.5 GiB", "2GB", 1048576."""

from __future__ import annotations

import re

from rethaw.model.errors import InvalidInput

_BINARY = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DECIMAL = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS = {"": 1, "b": 1, **_BINARY, **{f"{unit}ib": n for unit, n in _BINARY.items()}, **_DECIMAL}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def size_bytes(value: str | int) -> int:
    """`value` in bytes, positive. KiB and K are 1024, kB is 1000. Raises InvalidInput naming the value."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        unit = _UNITS.get(match[2].lower()) if match else None
        number = int(float(match[1]) * unit) if match and unit else 0
    if number <= 0:
        raise InvalidInput(f"{value!r} is not a size", remedy='write it like "512MiB", "2GiB", or bytes')
    return number


def human_bytes(value: float) -> str:
    """`value` bytes for a reader: 812 B, 3.4 KiB, 512 MiB, 1.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return (
                f"{value:.0f} {unit}" if unit == "B" or value >= 100 or value == int(value) else f"{value:.1f} {unit}"
            )
        value /= 1024
    raise AssertionError


def human_count(value: int) -> str:
    """`value` things for a reader: 950, 18k, 1.2M."""
    if value < 1000:
        return str(value)
    for unit, step in (("k", 1_000), ("M", 1_000_000), ("G", 1_000_000_000)):
        if value < step * 999.5 or unit == "G":
            scaled = value / step
            return f"{scaled:.1f}{unit}" if scaled < 10 and f"{scaled:.1f}"[-1] != "0" else f"{scaled:.0f}{unit}"
    raise AssertionError
