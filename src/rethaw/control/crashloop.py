"""The crash-loop rule: what follows the death of a sandbox. Pure, so that every path of it can be tested.

Progress is the number of things the agent did on the session's path in its current attempt (calls, messages, waits,
...). Doing again what an abandoned life had done already is no progress: without that distinction, an agent that always
runs out of memory at its fifth call would make its fifth call anew after each step back, and never be given up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum

from rethaw.control.policy import Policy


class Level(IntEnum):
    """How far back a session in a crash loop has been taken."""

    NEWEST = 0
    PARENT = 1
    FRESH = 2


class Step(StrEnum):
    SAME = "same"  # the newest usable snapshot of the path again, or a boot when there is none
    PARENT = "parent"
    FRESH = "fresh"
    FAIL = "fail"


@dataclass(frozen=True)
class Loop:
    """What is remembered between deaths (columns of the session's row)."""

    level: Level = Level.NEWEST
    deaths: int = 0  # since the last step, without a new event
    total: int = 0  # since the last step
    high: int = 0  # most progress ever seen


@dataclass(frozen=True)
class Death:
    counted: bool  # false when the agent had no part in it: its node was lost, or a person asked for the crash
    progress: int  # at the death
    at_start: int  # progress when the life began
    snapshot: bool  # whether there is a usable snapshot of this attempt on the path
    parent: bool  # whether that one has a usable parent


def next_step(loop: Loop, death: Death, policy: Policy) -> tuple[Loop, Step]:
    """The new memory, and what to do."""
    if death.progress > loop.high:
        loop = Loop(high=death.progress)
    elif death.progress > death.at_start:
        loop = replace(loop, deaths=0)
    if death.counted:
        again = death.progress <= death.at_start
        loop = replace(loop, total=loop.total + 1, deaths=loop.deaths + again)
    if loop.deaths < policy.deaths_per_step and loop.total < policy.deaths_per_step_total:
        return loop, Step.SAME
    if loop.level == Level.FRESH or not death.snapshot:
        return loop, Step.FAIL
    if loop.level == Level.NEWEST and death.parent:
        return Loop(level=Level.PARENT, high=loop.high), Step.PARENT
    return Loop(level=Level.FRESH, high=loop.high), Step.FRESH
