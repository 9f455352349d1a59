"""Seeded chaos runs: 8 of 10 turns in every run of the suite, 200 of 30 turns with `-m long`.

A failure prints what was killed when, and the command that runs the seed again.
"""

from __future__ import annotations

import os
import shutil

import pytest

from rethaw.testing.chaos.__main__ import one

QUICK_TURNS, TURNS = 10, 30

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which(os.environ.get("RETHAW_RUNSC", "runsc")) is None, reason="needs root and runsc"
)


def run(seed: int, turns: int) -> None:
    broken = one(seed, turns, None)
    if broken:
        pytest.fail("\n".join(broken), pytrace=False)


@needs_root
@pytest.mark.root
@pytest.mark.timeout(360)
@pytest.mark.parametrize("seed", range(8))
def test_chaos(seed: int) -> None:
    """Seed 0 kills nothing; the even ones kill each target in turn, the odd ones at fault points."""
    run(seed, QUICK_TURNS)


@needs_root
@pytest.mark.root
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(200))
def test_chaos_long(seed: int) -> None:
    run(seed, TURNS)
