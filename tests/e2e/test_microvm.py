"""Sessions in microVMs beside those in gVisor, on one server. (`make test-long` runs whole suites with RETHAW_ENGINE=qemu.)"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_fixtures import House, Session, gapless, house

from rethaw.model.errors import RethawError
from rethaw.snapshots.staging import staging_for
from rethaw.testing import processes
from rethaw.testing.provider import Reply

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        os.geteuid() != 0 or None in (shutil.which("runsc"), shutil.which("qemu-system-x86_64")),
        reason="needs root, runsc and QEMU",
    ),
]

AGENT = """
def main(ctx, tag):
    import subprocess
    open("/srv/kept", "w").write(tag)
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    said = [ask(tag + " one")]
    choice = ctx.wait("choice").payload
    said.append(ask(tag + " two"))
    child.stdin.write(b"through the child")
    return {"said": said, "choice": choice, "kept": open("/srv/kept").read(), "child": child.stdout.read(17).decode(),
            "kernel": open("/proc/version").read().split()[0], "machine": os.uname().release}
"""


@pytest.fixture(scope="module")
def h() -> Iterator[House]:
    with house() as h:
        h.provider.answer = lambda r: Reply(
            f"re {r.last_text}", first_byte_s=2.0 if r.last_text.endswith("two") else 0.1
        )
        yield h


def result_of(session: Session) -> Any:
    found = session.result(120)
    assert "cloud" in found.pop("machine"), "it has a kernel of its own"
    return found


def test_a_microvm_suspends_crashes_forks_and_is_looked_into(h: House) -> None:
    session = h.agent(AGENT, {"tag": "vm"}, engine="qemu", idle_suspend_s=0.5)
    session.until_state("suspended", timeout_s=120)
    assert not h.server.sandboxes(), "a session that waits holds no process"
    (twin,) = h.server.request("POST", f"/v1/sessions/{session.id}/fork", {})["sessions"]
    fork = Session(h, twin)

    session.signal("choice", "left")
    session.until("the second call", lambda s: "vm two" in h.provider.texts, 120)
    session.until("its snapshot", lambda s: s.events("snapshot.created")[-1]["data"]["why"] == "exchange")
    (box,) = h.server.sandboxes()
    assert isinstance(box, processes.QemuProcess)
    processes.kill(box.pid)
    expected = {"said": ["re vm one", "re vm two"], "kept": "vm", "child": "through the child", "kernel": "Linux"}
    assert result_of(session) == {**expected, "choice": "left"}
    assert h.provider.texts.count("vm two") == 1, "not paid for twice"
    gapless(session.events(all_lines=True))
    assert session.view["crashes"] == 1

    fork.signal("choice", "right")
    assert result_of(fork) == {**expected, "choice": "right"}
    created = session.events("snapshot.created")
    cli = h.server.cli
    assert cli("snapshot", "cat", created[0]["data"]["snapshot"], "/srv/kept").stdout == "vm"
    assert "Linux" in cli("shell", created[0]["data"]["snapshot"], "--", "uname", "-a").stdout
    processes.wait_until(lambda: not h.server.sandboxes(), 30, "its sandboxes to be gone")
    # What a later turn adds is what changed, not the guest's memory.
    assert created[-1]["data"]["stored_bytes"] < created[0]["data"]["stored_bytes"] / 5


def test_both_engines_at_once_and_a_server_that_is_killed(h: House) -> None:
    sessions = [h.agent(AGENT, {"tag": f"{engine}-both"}, engine=engine) for engine in ("gvisor", "qemu")]
    for session in sessions:
        session.until("its wait", lambda s: s.view["state"] in ("waiting", "suspended"), 120)
    h.server.kill9()
    h.server.restart()
    for session in sessions:
        session.signal("choice", 1)
    results = [session.result(120) for session in sessions]
    assert [r["said"] for r in results] == [
        ["re gvisor-both one", "re gvisor-both two"],
        ["re qemu-both one", "re qemu-both two"],
    ]
    assert results[0]["machine"] != results[1]["machine"]
    assert [t.count("both one") for t in h.provider.texts].count(1) == 2


def mounts(place: str) -> list[str]:
    return [line for line in Path("/proc/mounts").read_text().splitlines() if place in line]


def lazy_servers(place: str) -> list[int]:
    return [pid for pid in processes.pids() if any(word.startswith(place) for word in processes.command_line(pid))]


def test_memory_is_read_when_it_is_touched_and_who_serves_it_may_die(tmp_path: Path) -> None:
    """Restored lazily three times, killed once with its machine, once with the server of its pages."""
    with house(env={"RETHAW_LAZY_FROM_BYTES": "1", "RETHAW_CACHE_BYTES": "0"}) as h:
        place = f"{staging_for(h.server.data_dir)}-lazy"
        h.provider.answer = lambda r: Reply(f"re {r.last_text}", first_byte_s=1.0)
        session = h.agent(AGENT, {"tag": "lazy"}, engine="qemu", idle_suspend_s=0.5)
        session.until_state("suspended", timeout_s=120)
        assert not mounts(place)
        session.signal("choice", "x")
        session.until("the second call", lambda s: "lazy two" in h.provider.texts, 120)
        assert len(mounts(place)) == 1
        (box,) = h.server.sandboxes()
        processes.kill(box.pid)
        session.until("another life", lambda s: s.view["crashes"] == 1 and h.server.sandboxes(), 60)
        assert lazy_servers(place)
        for pid in lazy_servers(place):
            processes.kill(pid)
        expected = {
            "said": ["re lazy one", "re lazy two"],
            "kept": "lazy",
            "child": "through the child",
            "kernel": "Linux",
        }
        assert result_of(session) == {**expected, "choice": "x"}
        assert h.provider.texts.count("lazy two") == 1, "not paid for twice"
        gapless(session.events(all_lines=True))
        h.server.kill9()
        processes.wait_until(lambda: not lazy_servers(place), 10, "the server of lazy files to end with its node")
    processes.wait_until(lambda: not mounts(place) and not lazy_servers(place), 10, "mounts to be gone")


def test_an_engine_that_is_not_there_is_named(h: House, tmp_path: Path) -> None:
    with pytest.raises(RethawError, match="engine"):
        h.start({"name": "x", "command": ["true"], "engine": "firecracker"})
    (tmp_path / "a.py").write_text("import rethaw\n\n@rethaw.agent(engine='xen')\ndef a(ctx): ...\n")
    refused = h.server.cli("run", "a.py", cwd=tmp_path, check=False)
    assert refused.returncode != 0 and "engine 'xen' is unknown" in refused.stderr and "gvisor, qemu" in refused.stderr
