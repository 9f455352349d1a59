"""Programs that know nothing of Rethaw (the examples of docs/guides): frozen and killed in the middle of their model calls, they end
as if nothing had been."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from e2e_fixtures import SLOWER, House, house
from e2e_programs import GUIDES, Program, Stop, cli, compare, guide

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(900 * SLOWER),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
FOUND = "[2, 3, 5, 7, 11, 13, 17, 19, 23, 29]"


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as h:
        yield h


def test_a_shell_with_a_background_job(home: House) -> None:
    """One kill comes before the snapshot of its call: the script goes on from the call before, and nothing is paid again."""
    script = (GUIDES / "shell/work.sh").read_text()
    program = guide("shell", start=cli("--image", "base", "--", "bash", "-c", script))
    stops = (Stop(1, away=True), Stop(2, ("kill",), at_once=True), Stop(3, ("freeze", "kill")))
    _, disturbed = compare(home, program, stops)
    assert disturbed.stdout.splitlines() == [
        "step 1: the model said 42, the sum is 42",
        "step 2: the model said 7, the sum is 49",
        "step 3: the model said 1, the sum is 50",
        "the background job is still there",
        "it counted without a gap",
        "said: 42 7 1",
    ]


def test_a_sqlite_database_in_the_middle_of_a_transaction(home: House) -> None:
    """The server dies as well, while the program is frozen."""
    stops = (Stop(1, away=True), Stop(2, ("server",), away=True), Stop(3, ("freeze", "kill")))
    _, disturbed = compare(home, guide("sqlite"), stops)
    assert disturbed.result == {
        "rows": [["Bakery Miller", 430, "bakery"], ["Railways", 2990, "railways"], ["Book shop", 1850, "book"]],
        "seen_before": [0, 0, 0],
        "integrity": "ok",
    }
    assert disturbed.stdout.count("locked out: True") == 3


def test_the_openai_agents_sdk(home: House) -> None:
    _, disturbed = compare(home, guide("openai-agents"))
    assert disturbed.result == {
        "answer": "The primes below thirty, found in 2 lines.",
        "done": ["wrote primes.py", "ran python3 primes.py", "ran wc -l < primes.py"],
        "files": ["primes.py"],
    }


def test_a_tool_loop_around_the_anthropic_client(home: House) -> None:
    _, disturbed = compare(home, guide("anthropic"))
    assert disturbed.result == {"answer": f"The primes below thirty are {FOUND}.", "files": ["primes.py"]}


def test_langgraph(home: House) -> None:
    _, disturbed = compare(home, guide("langgraph"))
    assert disturbed.result == {"answer": "There are 42 together.", "looked": ["apples", "pears"], "checkpoints": 7}


@pytest.mark.long
def test_smolagents(home: House) -> None:
    _, disturbed = compare(home, guide("smolagents", vary=[r"Duration \d+\.\d+ seconds"]))
    assert disturbed.result == {
        "answer": 2397,
        "variables": {"primes": [2, 3, 5, 7, 11, 13, 17, 19, 23, 29], "total": 2397},
        "tested": 30,
    }


@pytest.mark.long
def test_a_jupyter_kernel(home: House) -> None:
    _, disturbed = compare(home, guide("jupyter"))
    assert disturbed.result == {"answer": "The mean is 3.875.", "variables": "['data', 'mean']"}


FICKLE = """
python3 -c 'import json, os, urllib.request
for n in 1, 2, 3:
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({"model": "m", "messages": [{"role": "user", "content": str(n)}]}).encode(), {"content-type": "application/json"})
    print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"], flush=True)'
rethaw info | grep -o '"generation".*'
"""


def test_a_difference_is_seen(home: House) -> None:
    """A program that tells its generation does not end the same."""
    fickle = Program("fickle", cli("--image", "base", "--", "sh", "-c", FICKLE), lambda r: r.last_text)
    with pytest.raises(AssertionError, match="generation"):
        compare(home, fickle, (Stop(2, ("kill",)),))
