"""A shell script as an agent: the `rethaw` command on its PATH, through freezes and crashes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_fixtures import SLOWER, House, gapless, house

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(120 * SLOWER),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]

SCRIPT = """
set -eu
cd "$(mktemp -d)"
echo 'raise SystemExit("not this one")' > json.py
n=0
while message=$(rethaw receive); do
    [ "$message" = '"stop"' ] && break
    n=$((n + message))
    echo "$n" > total
    rethaw send --json "{\\"total\\": $n}"
done
rethaw emit counted "{\\"total\\": $(cat total)}"
rethaw receive --timeout 0.1s || [ $? = 7 ]
rethaw fly 2>/dev/null || [ $? = 2 ]
approved=$(rethaw wait approval)
rethaw snapshot > /dev/null
rethaw sleep 0.1s
rethaw result "{\\"total\\": $n, \\"approved\\": $approved, \\"events\\": $(rethaw history | wc -l)}"
"""


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as h:
        yield h


def test_a_shell_script_counts_through_three_crashes_and_a_freeze(home: House) -> None:
    session = home.start(
        {"name": "shell", "command": ["/bin/sh", "-c", SCRIPT], "idle_suspend_s": 600, "env": {"PATH": "/usr/bin:/bin"}}
    )
    for n in (1, 2, 3):
        session.until_state("waiting")
        session.send(n)
        session.until("its answer", lambda s, n=n: len(s.outbox()) == n)
        session.post("crash", {"what": "sandbox"})
        session.until("the crash", lambda s, n=n: s.view["crashes"] == n)
    assert session.outbox() == [{"total": 1}, {"total": 3}, {"total": 6}]
    session.until_state("waiting")
    session.post("suspend")
    session.until_state("suspended")
    session.send("stop")
    session.signal("approval", True)
    session.post("resume")
    result = session.result()
    assert result["total"] == 6 and result["approved"] is True and result["events"] > 20
    (counted,) = session.events("emitted")
    assert counted["data"]["name"] == "counted"
    assert session.outbox() == [{"total": 1}, {"total": 3}, {"total": 6}]
    gapless(session.events(all_lines=True))


def test_a_node_program_goes_on_through_crashes(home: House) -> None:
    """examples/guides/inside/tasks.js, as the guide quotes it."""
    code = (Path(__file__).resolve().parents[2] / "examples/guides/inside/tasks.js").read_text()
    session = home.start(
        {"name": "node", "command": ["node", "-e", code], "image": {"apt": ["nodejs"]}, "idle_suspend_s": 600}
    )
    session.until_state("waiting", timeout_s=240)
    session.send("water the plants")
    session.until(
        "the person to be asked", lambda s: any(e["data"].get("name") == "approve-1" for e in s.events("wait.opened"))
    )
    session.crash()
    session.until("the crash", lambda s: s.view["crashes"] == 1)
    session.until_state("waiting")
    session.post("suspend")
    session.until_state("suspended")
    session.post("resume")
    session.signal("approve-1", True)
    session.until("its answer", lambda s: s.outbox())
    session.crash()
    session.until("the crash", lambda s: s.view["crashes"] == 2)
    session.send("stop")
    assert session.result() == {"tasks": 1}
    assert session.outbox() == [{"number": 1, "done": "water the plants"}]
    gapless(session.events(all_lines=True))
