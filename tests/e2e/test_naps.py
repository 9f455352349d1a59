"""Programs that policy suspends for a time because they do nothing: shells at their prompts, servers, sleepers."""

from __future__ import annotations

import os
import shutil
import urllib.request
from collections.abc import Iterator

import pytest
from e2e_fixtures import SLOWER, House, Session, house
from e2e_terminal import Person, prompted

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(240 * SLOWER),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
AWAKE = ("running", "waiting")


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as h:
        yield h


def run(home: House, *args: str) -> Session:
    return Session(
        home, {"id": home.server.cli("run", "-d", "--image", "base", "--idle-suspend", "1s", *args).stdout.strip()}
    )


def naps(session: Session) -> int:
    """How many there were, the present one too."""
    states = session.events("session.state", all_lines=True)
    return sum(e["data"]["state"] == "suspended" and e["data"]["reason"] == "nap" for e in states)


def napping(session: Session) -> None:
    session.until("a nap", lambda s: (s.view["state"], s.view["reason"]) == ("suspended", "nap"))


def test_a_shell_at_its_prompt_naps_and_a_key_wakes_it(home: House) -> None:
    session = run(home, "-it", "--nap", "1h", "-e", "PS1=$ ", "--", "sh")
    with Person(home.server, "attach", session.id) as person:
        person.enter("x=0\n")
        napping(session)
        known = naps(session)
        for generation in range(1, 4):
            session.until("nothing to be left of it", lambda s: not s.house.server.sandboxes())
            person.enter(f"x=$((x+1)); echo woken $x of {generation}\n")
            person.sees(f"woken {generation} of {generation}")
            napping(session)
            assert naps(session) == known + generation  # keys that it has had wake it only once
        why = home.server.cli("why", session.id).stdout
        assert "suspended (nap)" in why and "a key (rethaw attach" in why, why
        assert home.server.cli("exec", session.id, "--", "echo", "beside it").stdout == "beside it\n"
        napping(session)
        session.send("look")
        session.until("to be woken by a message", lambda s: s.view["state"] in AWAKE)
        person.enter("echo b''usy; while :; do :; done\n")
        person.sees("busy")
        session.crash()
        session.until("its recovery", lambda s: s.view["crashes"] == 1 and s.view["state"] in (*AWAKE, "suspended"))
        person.until(prompted)
        person.enter("echo still $x\n")
        person.sees("still 3")
        person.enter("exit 5\n")
        assert person.ended() == 5


def test_a_sleeper_goes_on_and_a_busy_loop_never_naps(home: House) -> None:
    busy = run(home, "--nap", "1s", "--", "sh", "-c", "while :; do :; done")
    never = run(home, "--", "sleep", "1000")
    sleeper = run(home, "--nap", "1s", "--", "sh", "-c", "sleep 8; echo woke up")
    sleeper.until_state("completed", timeout_s=120)
    assert sleeper.output() == "woke up\n"
    assert naps(sleeper) >= 3
    for other in (busy, never):
        assert other.view["state"] == "running"
        assert [e["data"]["state"] for e in other.events("session.state")][-1] == "running"
        assert not [e for e in other.events("session.state") if e["data"]["state"] == "suspending"]
        other.post("cancel", {"now": True})


def test_a_server_naps_and_a_request_wakes_it(home: House) -> None:
    session = run(home, "--nap", "1h", "--", "python3", "-m", "http.server", "8000", "--directory", "/etc")
    for generation in range(1, 4):
        napping(session)
        assert naps(session) == generation
        request = urllib.request.Request(
            f"{home.server.url}/sessions/{session.id}/ports/8000/debian_version",
            headers={"Authorization": f"Bearer {home.server.token}", "Connection": "close"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200 and answer.read()
    session.post("cancel", {"now": True})


def test_a_key_undid_the_next_suspension_of_a_session_that_waits(home: House) -> None:
    """The guest says only of many bytes that it has them: what was given long ago counted as still to be given."""
    waits = 'rethaw receive > /dev/null & while read line; do echo "woken $line"; done'
    session = run(home, "-it", "--", "sh", "-c", waits)

    def suspended() -> int:
        session.until("it to sleep", lambda s: (s.view["state"], s.view["reason"]) == ("suspended", "idle"))
        session.until("nothing to be left of it", lambda s: not s.house.server.sandboxes())
        states = session.events("session.state", all_lines=True)
        return sum(e["data"]["state"] == "suspended" for e in states)

    with Person(home.server, "attach", session.id) as person:
        known = suspended()
        for generation in range(1, 4):
            person.type(f"{generation}\n")
            person.sees(f"woken {generation}")
            assert suspended() == known + generation
    session.post("cancel", {"now": True})
