"""Where things are printed: data to stdout, everything else to stderr. Short ids, tables, ages."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rethaw.model.durations import human

_SHOWN = 8  # characters of an id after its prefix, at least
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_COLORS = {
    "running": "32",
    "completed": "32",
    "waiting": "36",
    "suspended": "36",
    "recovering": "33",
    "failed": "31",
    "cancelled": "31",
}


def data(text: str) -> None:
    """A line of data."""
    sys.stdout.write(text + "\n")


def raw(chunk: bytes, *, stderr: bool = False) -> None:
    """Bytes of the agent, as they are."""
    stream = sys.stderr if stderr else sys.stdout
    stream.flush()
    stream.buffer.write(chunk)
    stream.buffer.flush()


def emit(value: Any) -> None:
    """One JSON value of data, on one line."""
    sys.stdout.write(json.dumps(jsonable(value)) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """A line for the reader, not for a program."""
    sys.stdout.flush()
    sys.stderr.write(f"{color(text, '2', sys.stderr)}\n")
    sys.stderr.flush()


def jsonable(value: Any) -> Any:
    """`value` with wire types, dataclasses, bytes and times turned into what JSON has."""
    import base64
    import dataclasses

    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, bytes):
        return base64.urlsafe_b64encode(value).decode()
    if isinstance(value, datetime):
        return value.isoformat()
    return value


def color(text: str, code: str, stream: Any = None) -> str:
    """`text` in a colour when `stream` (stdout by default) is a terminal that wants it."""
    stream = sys.stdout if stream is None else stream
    if not code or not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def state_color(state: str) -> str:
    return _COLORS.get(state, "")


def plain(text: str, limit: int = 0) -> str:
    """`text` on one line without control characters (they may come from an agent), cut at `limit`."""
    clean = _CONTROL.sub(lambda m: {"\n": "⏎", "\t": " "}.get(m[0], "·"), text)
    return clean if not limit or len(clean) <= limit else clean[: limit - 1] + "…"


def short(ids: Iterable[str]) -> dict[str, str]:
    """Each id -> its shortest beginning that is unique among `ids` (the prefix and 8 characters at least)."""
    every = sorted(set(ids))
    out: dict[str, str] = {}
    for i, one in enumerate(every):
        length = one.find("_") + 1 + _SHOWN
        for other in every[max(0, i - 1) : i] + every[i + 1 : i + 2]:
            length = max(length, _common(one, other) + 1)
        out[one] = one[:length]
    return out


def _common(a: str, b: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def ago(at: datetime | None) -> str:
    """How long since `at`."""
    return "-" if at is None else human(max(0.0, (datetime.now(UTC) - at).total_seconds()))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, codes: Sequence[Sequence[str]] = ()) -> None:
    """Aligned columns. `codes`: a colour for each cell, "" for none."""
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    data("  ".join(f"{name:<{width}}" for name, width in zip(header, widths, strict=True)).rstrip())
    for number, row in enumerate(cells):
        parts: list[str] = []
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            padded = cell if column == len(row) - 1 else f"{cell:<{width}}"
            parts.append(color(padded, codes[number][column]) if codes else padded)
        data("  ".join(parts).rstrip())
