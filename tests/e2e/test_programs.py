"""Programs that know nothing of Rethaw (the examples of docs/guides): frozen and killed in the middle of their model calls, they end
as if nothing had been."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from e2e_fixtures import House, house
from e2e_programs import ROOT, Outcome, Program, cli, compare

from rethaw.testing.reply import by_turn

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as h:
        yield h


def check_shell(outcome: Outcome) -> None:
    assert outcome.stdout.splitlines()[-4:] == [
        "step 3: the model said 1, the sum is 50",
        "the background job is still there",
        "it counted without a gap",
        "said: 42 7 1",
    ]


SHELL = Program(
    "shell",
    cli("--image", "base", "--", "bash", "-c", (ROOT / "examples/guides/shell/work.sh").read_text()),
    by_turn(["42", "7", "1"]),
    check=check_shell,
)


def test_a_shell_with_a_background_job(home: House) -> None:
    compare(home, SHELL)
