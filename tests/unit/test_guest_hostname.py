"""The host name of a session, and who knows it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from rethaw.guest import hostname
from rethaw.model.ids import new_id


def test_a_name_is_one_that_hosts_may_have() -> None:
    session = new_id("s")
    assert hostname.of(session) == session.replace("_", "-")
    assert hostname.of("_A.b/\u00e4_") == "a-b"
    assert hostname.of("") == "" and len(hostname.of("x" * 200)) == 63


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("127.0.0.1 localhost agent\n::1 localhost\n", "127.0.0.1 localhost new\n::1 localhost\n"),
        ("127.0.0.1 agent agent2 xagent\n# agent", "127.0.0.1 new agent2 xagent\n# new"),
        ("127.0.0.1 localhost\n", "127.0.0.1 localhost\n"),
        ("", ""),
    ],
)
def test_the_resolver_knows_the_new_name(tmp_path: Path, before: str, after: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(before)
    hosts.chmod(0o600)
    hostname.known(str(hosts), "agent", "new")
    assert hosts.read_text() == after and list(tmp_path.iterdir()) == [hosts]
    assert hosts.stat().st_mode & 0o777 == (0o600 if before == after else 0o644)


def test_a_machine_that_is_not_its_own_keeps_its_name(tmp_path: Path) -> None:
    before = socket.gethostname()
    hostname.change("s_other", str(tmp_path))
    assert socket.gethostname() == before and list(tmp_path.iterdir()) == []
