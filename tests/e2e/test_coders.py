"""Claude Code, Codex, a Node program and a browser, as docs/guides show them: frozen and killed in the middle of their model calls."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from e2e_fixtures import SLOWER, House, house
from e2e_programs import compare, guide

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(900 * SLOWER),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
FOUND = "[2, 3, 5, 7, 11, 13, 17, 19, 23, 29]"
UUID = r"(?<![0-9a-f])[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"
CODEX = [
    r"Chunk ID: [0-9a-f]+",
    r"Wall time: [\d.]+ seconds",
    r"turn_started_at_unix_ms\W+\d+",
]
SESSION = [r"(?<=session ID )\d+", r"(?<=\"session_id\": )\d+", r"(?<=\"session_id\":)\d+"]
DEVICE = r"\b[0-9a-f]{64}\b"


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as h:
        yield h


def test_claude_code(home: House) -> None:
    _, disturbed = compare(home, guide("claude-code", ids=[UUID, DEVICE]))
    assert disturbed.result["answer"] == f"The primes are {FOUND}."


@pytest.mark.long
def test_codex(home: House) -> None:
    _, disturbed = compare(home, guide("codex", ids=[UUID, *SESSION], vary=CODEX))
    assert disturbed.result["answer"] == f"The primes are {FOUND}."


def test_a_node_program_with_a_child_process(home: House) -> None:
    _, disturbed = compare(home, guide("node"))
    assert disturbed.stdout.splitlines()[-1] == "the child saw pear, maple, heron; the timer ran: true"


@pytest.mark.long
def test_a_page_in_chromium(home: House) -> None:
    _, disturbed = compare(home, guide("chromium"))
    assert disturbed.result == {
        "clicked": ["apple", "tea", "apple"],
        "basket": ["apple", "tea", "apple"],
        "timers_run": True,
    }


UNWATCHED = """
def main(ctx):
    import select
    epoll = select.epoll()
    gone, there = os.pipe(), os.pipe()
    for reader, _ in (gone, there):
        epoll.register(reader, select.EPOLLIN | select.EPOLLET)
    os.close(gone[1])
    os.write(there[1], b"x")
    seen = [sorted(fd for fd, _ in epoll.poll(5)) == sorted([gone[0], there[0]])]  # both at once
    epoll.unregister(gone[0])
    for n in range(3):
        ctx.snapshot()
        print("saved", n, flush=True)
        ctx.wait(f"go-{n}")
        seen.append(gone[0] in [fd for fd, _ in epoll.poll(0.2)])
    return seen
"""


def test_a_thaw_reports_nothing_that_epoll_does_not_watch_any_more(home: House) -> None:
    """Codex hung or died of it: its runtime keeps pointers in epoll."""
    session = home.agent(UNWATCHED)
    for n in range(3):
        session.until_output(f"saved {n}")
        session.crash()
        session.until("the crash", lambda s, n=n: s.view["crashes"] > n)
        session.signal(f"go-{n}")
    assert session.result() == [True, False, False, False]
