"""What is killed when: a function of the seed alone."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import rethaw
from rethaw.testing.chaos.script import calls_needed

Target = Literal["agent", "guestd", "sandbox", "server", "postgres", "backend", "everything"]
TARGETS: tuple[Target, ...] = ("sandbox", "guestd", "server", "postgres", "everything", "backend", "agent")
_POINT = re.compile(r"faults\.point\(\s*\"([\w.]+)\"")


@dataclass(frozen=True)
class Hit:
    """SIGKILL `target`, `delay_s` after the provider's call number `after_call`."""

    target: Target
    after_call: int
    delay_s: float


@dataclass(frozen=True)
class Plan:
    """`fault`: RETHAW_FAULTS of the server's first life. `die_at`, `die_after`: the agent kills itself then."""

    seed: int
    turns: int
    hits: tuple[Hit, ...] = ()
    fault: str = ""
    die_at: int | None = None
    die_after: float = 0.0
    restart_after_s: float = 0.2

    @property
    def server_may_die(self) -> bool:
        """Whether something kills the process that holds upstream connections."""
        return bool(self.fault) or any(h.target in ("server", "everything") for h in self.hits)

    def __str__(self) -> str:
        parts = [f"{h.target} {h.delay_s:.2f} s after call {h.after_call}" for h in self.hits]
        parts += [f"fault {self.fault}"] if self.fault else []
        parts += [f"the agent itself {self.die_after:.2f} s into turn {self.die_at}"] if self.die_at is not None else []
        return f"seed {self.seed}, {self.turns} turns: kill " + ("; ".join(parts) or "nothing")


def fault_points() -> list[str]:
    """Every named fault point in Rethaw's code."""
    root = Path(rethaw.__file__).parent
    own = Path(__file__).parent
    files = [f for f in root.rglob("*.py") if not f.is_relative_to(own)]
    return sorted({name for file in files for name in _POINT.findall(file.read_text())})


def plan(seed: int, turns: int = 30, points: Sequence[str] | None = None) -> Plan:
    """Even seeds kill at random moments, odd ones at a fault point, each point in its turn. Seed 0 kills nothing."""
    rng = random.Random(seed)
    if seed == 0:
        return Plan(0, turns)
    calls = calls_needed(turns)
    points = fault_points() if points is None else points
    hits: list[Hit] = []
    target: Target
    fault, die_at, die_after = "", None, 0.0
    if seed % 2 and points:
        name = points[seed // 2 % len(points)]
        fault = f"{name}:{rng.choice((1, 1, 2, 3, 5, 8, 13))}=kill"
        # Some points are passed on the way back only.
        target = rng.choice(TARGETS[:2])
        hits.append(Hit(target, rng.randint(2, max(3, calls // 2)), rng.uniform(0, 0.6)))
    else:
        first = TARGETS[seed // 2 % len(TARGETS)]
        if first == "agent":
            die_at, die_after = rng.randrange(turns // 2, turns), rng.uniform(0, 0.5)
            first = rng.choice((TARGETS[0], TARGETS[2]))
        targets: list[Target] = [first, *rng.choices(TARGETS[:-1], k=rng.randint(0, 2))]
        at = sorted(rng.randint(1, calls - 1) for _ in targets)
        hits += [
            Hit(t, n, rng.choice((0.0, rng.uniform(0, 0.2), rng.uniform(0, 1.5))))
            for t, n in zip(targets, at, strict=True)
        ]
        if rng.random() < 0.3:  # and once more while it comes back
            hits.append(Hit(rng.choice(TARGETS[:-1]), hits[-1].after_call, hits[-1].delay_s + rng.uniform(0.05, 1.5)))
    return Plan(seed, turns, tuple(hits), fault, die_at, die_after, rng.uniform(0, 1.0))
