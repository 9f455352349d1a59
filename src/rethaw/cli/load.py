"""What `rethaw top` shows: two looks at a server's sessions make how much of a CPU each of them uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rethaw.cli.output import ago, jsonable, plain, short
from rethaw.sdk.sizes import human_bytes, human_count

if TYPE_CHECKING:
    from rethaw.model.loads import MachineLoad, SessionLoad

_ENDED = ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class Row:
    """A session, and how much of one CPU it used between the two newest looks; None without a sandbox, or at its first."""

    load: SessionLoad
    cpu_percent: float | None


@dataclass(frozen=True)
class Column:
    """`rank`: the higher, the earlier it gives way on a narrow terminal."""

    title: str
    text: Callable[[Row, dict[str, str]], str]
    rank: int = 0
    right: bool = True


def _size(value: int | None) -> str:
    return "-" if value is None else human_bytes(value)


def _state(row: Row) -> str:
    return f"{row.load.state.value}{' (degraded)' if row.load.degraded else ''}"


COLUMNS = (
    Column("SESSION", lambda row, ids: ids[row.load.id], right=False),
    Column("AGENT", lambda row, _: plain(row.load.agent, 24), rank=5, right=False),
    Column("STATE", lambda row, _: _state(row), right=False),
    Column("CPU %", lambda row, _: "-" if row.cpu_percent is None else f"{row.cpu_percent:.1f}"),
    Column("MEMORY", lambda row, _: _size(row.load.memory_bytes)),
    Column("LIMIT", lambda row, _: _size(row.load.memory_limit_bytes), rank=9),
    Column("CALLS", lambda row, _: str(row.load.model_calls), rank=3),
    Column("TOKENS", lambda row, _: human_count(row.load.input_tokens + row.load.output_tokens), rank=4),
    Column("SNAPSHOTS", lambda row, _: str(row.load.snapshots), rank=8),
    Column("STORED", lambda row, _: _size(row.load.stored_bytes), rank=6),
    Column("ACTIVE", lambda row, _: ago(row.load.active_at), rank=2),
)
_MOST = float("-inf")
SORTS: dict[str, Callable[[Row], float]] = {
    "cpu": lambda row: _MOST if row.cpu_percent is None else row.cpu_percent,
    "memory": lambda row: row.load.memory_bytes or 0,
    "calls": lambda row: row.load.model_calls,
    "tokens": lambda row: row.load.input_tokens + row.load.output_tokens,
    "stored": lambda row: row.load.stored_bytes,
    "active": lambda row: row.load.active_at.timestamp(),
    "age": lambda row: row.load.created_at.timestamp(),
}


@dataclass(frozen=True)
class Look:
    """One look at the server, sorted."""

    machine: MachineLoad
    rows: list[Row]

    @property
    def sandboxes(self) -> int:
        """How many sessions have a sandbox."""
        return sum(row.load.cpu_s is not None for row in self.rows)

    @property
    def value(self) -> dict[str, Any]:
        """For programs."""
        sessions = [{**jsonable(row.load), "cpu_percent": row.cpu_percent} for row in self.rows]
        return {**jsonable(self.machine), "sessions": sessions}

    @property
    def head(self) -> str:
        """The machine in a line."""
        live = {state: n for state, n in self.machine.states.items() if state not in _ENDED and n}
        ended = sum(self.machine.states.get(state, 0) for state in _ENDED)
        counts = [f"{n:,} {state}" for state, n in sorted(live.items(), key=lambda one: -one[1])]
        counts += [f"{ended:,} ended"] if ended else []
        used = sum(row.load.memory_bytes or 0 for row in self.rows)
        cpu = sum(row.cpu_percent or 0.0 for row in self.rows)
        sandboxes = f"{self.sandboxes} sandbox{'' if self.sandboxes == 1 else 'es'}"
        return (
            f"{', '.join(counts) or 'no sessions'}; {sandboxes}: {cpu:.0f} % of {self.machine.cpus} CPUs,"
            f" {human_bytes(used)} of {human_bytes(self.machine.memory_bytes)}"
        )

    def cells(self) -> list[list[str]]:
        """The text of each column of each row."""
        ids = short(row.load.id for row in self.rows)
        return [[column.text(row, ids) for column in COLUMNS] for row in self.rows]


class Looks:
    """`ask` the server again and again; `sort` may be changed in between."""

    def __init__(self, ask: Callable[[], MachineLoad], sort: str) -> None:
        self.sort = sort
        self._ask = ask
        self._before: MachineLoad | None = None
        self._last: MachineLoad | None = None

    def take(self) -> Look:
        """A new look."""
        found = self._ask()
        self._before, self._last = self._last, found
        return self.now

    @property
    def now(self) -> Look:
        """The newest look again, in the order that is wanted now."""
        last, before = self._last, self._before
        assert last is not None
        known = {one.id: one.cpu_s for one in before.sessions} if before is not None else {}
        passed = last.clock_s - before.clock_s if before is not None else 0.0
        rows = [Row(one, _percent(known.get(one.id), one.cpu_s, passed)) for one in last.sessions]
        rows.sort(key=lambda row: (SORTS[self.sort](row), row.load.active_at), reverse=True)
        return Look(last, rows)


def _percent(before: float | None, now: float | None, passed: float) -> float | None:
    """Of one CPU. A sandbox that came in place of another counts from 0; None when nothing was known before."""
    if now is None or before is None or passed <= 0:
        return None
    used = now - before if now >= before else now
    return round(used / passed * 100, 1)


def fitting(cells: list[list[str]], width: int) -> list[int]:
    """Which columns fit into `width` characters: those that say least give way first."""
    chosen = list(range(len(COLUMNS)))

    def needed(columns: list[int]) -> int:
        widest = [max(len(row[i]) for row in [[c.title for c in COLUMNS], *cells]) for i in columns]
        return sum(widest) + 2 * (len(columns) - 1)

    while len(chosen) > 1 and needed(chosen) > width:
        least = max(chosen, key=lambda i: COLUMNS[i].rank)
        if not COLUMNS[least].rank:
            break  # what is left is cut
        chosen.remove(least)
    return chosen
