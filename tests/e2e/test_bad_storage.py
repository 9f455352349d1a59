"""Disks that fill up, files that rot, engines that are replaced: the agent goes on, and the log says what happened."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_agents import Agents
from e2e_cli import refused
from e2e_fixtures import ENGINE, SLOWER, House, Session, gapless, house

from rethaw.snapshots import manifest
from rethaw.snapshots.pack import Damaged
from rethaw.snapshots.staging import staging_for
from rethaw.testing import processes

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(150 * SLOWER),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
agents = Agents()
MIB = 1 << 20


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A server with a runsc of its own, which the tests may replace. Each test leaves it running."""
    runsc = tmp_path_factory.mktemp("bin") / "runsc"
    shutil.copy(str(shutil.which("runsc")), runsc)
    with house(env={"RETHAW_RUNSC": str(runsc)}) as h:
        yield h


@pytest.fixture
def home(shared: House) -> House:
    shared.provider.reset()
    if not shared.server.running:
        shared.server.restart()
    return shared


def calls(home: House, tag: str) -> int:
    return sum(tag in text for text in home.provider.texts)


def flip(path: Path) -> None:
    """Damage a byte of every 256, the length kept: whatever is read of the file is damaged."""
    data = bytearray(path.read_bytes())
    data[100::256] = bytes(b ^ 0xFF for b in data[100::256])
    path.write_bytes(data)


# ---------------------------------------------------------------- the disk is full


WORKER = agents.add("""
def main(ctx, tag):
    said = []
    for turn in range(20):
        said.append(ask("%s turn %d" % (tag, turn)))
        if ctx.receive().payload == "end":
            return said
""")


@pytest.fixture
def small_disk(home: House) -> Iterator[Path]:
    """A tmpfs of 64 MiB over the directory of snapshots. The server starts on it and stops on it: snapshots share packs,
    so it must not count on ones that the mount hides."""
    point = home.server.data_dir / "snapshots"
    home.server.stop()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=0700", "tmpfs", str(point)], check=True)
    try:
        home.server.restart()
        yield point
    finally:
        home.server.stop()
        subprocess.run(["umount", "-l", str(point)], check=True)


def fill(point: Path) -> Path:
    filler = point / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):  # with a buffer, closing it would fail
        while True:
            file.write(b"\1" * (1 << 16))
    return filler


def test_disk_full_while_saving(home: House, small_disk: Path) -> None:
    session = agents.start(home, WORKER, {"tag": "full"}, idle_suspend_s=None)
    session.until("a snapshot", lambda s: s.events("snapshot.created"))
    session.until("turn 0", lambda s: s.view["state"] == "waiting")
    filler = fill(small_disk)
    session.send("on")
    session.until("degraded", lambda s: s.events("durability.degraded"))
    session.until("turn 1", lambda s: s.view["state"] == "waiting" and calls(home, "full turn") == 2)
    (degraded,) = session.events("durability.degraded")
    assert degraded["data"]["durability"] == "local"
    assert all(word in degraded["data"]["detail"] for word in ("no space left", str(small_disk), "free disk space"))
    assert session.view["degraded"] is True
    shown = home.server.cli("ls").stdout
    assert "durability degraded" in shown
    # Nothing half-written stays, and no suspension destroys what it could not save.
    refused(home.server.cli("suspend", session.id, check=False), 5, session.id, "runs on")
    session.until_state("waiting")
    assert session.events("snapshot.failed")
    assert session.view["desired"] == "running"
    assert [p for p in small_disk.rglob("*") if p.name.startswith(".")] == []
    session.send("on")
    session.until("turn 2", lambda s: s.view["state"] == "waiting" and calls(home, "full turn") == 3)
    filler.unlink()
    session.send("on")
    session.until("restored", lambda s: s.events("durability.restored"))
    assert session.view["degraded"] is False
    assert "degraded" not in home.server.cli("ls").stdout
    session.until("turn 3", lambda s: calls(home, "full turn") == 4 and s.view["state"] == "waiting")
    session.crash()
    session.send("end")
    assert session.result() == [f"echo full turn {n}" for n in range(4)]
    assert calls(home, "full turn") == 4
    gapless(session.events(all_lines=True))


def test_a_crash_while_the_disk_is_full_goes_back_to_the_last_snapshot(home: House, small_disk: Path) -> None:
    session = agents.start(home, WORKER, {"tag": "crash-full"}, idle_suspend_s=None)
    session.until("turn 0", lambda s: s.events("snapshot.created") and s.view["state"] == "waiting")
    filler = fill(small_disk)
    session.send("on")
    session.until("degraded", lambda s: s.events("durability.degraded"))
    session.until("turn 1", lambda s: s.view["state"] == "waiting" and calls(home, "crash-full") == 2)
    session.crash()
    session.until("recovery", lambda s: s.events("snapshot.restored"))
    assert session.view["degraded"] is True
    filler.unlink()
    session.post("snapshots")
    session.until("restored", lambda s: s.events("durability.restored"))
    assert session.view["degraded"] is False
    session.send("end")
    assert session.result() == ["echo crash-full turn 0", "echo crash-full turn 1"]
    # The answer was released without a snapshot, but it is in the log: served from there.
    assert calls(home, "crash-full") == 2


SPEAKER = agents.add("""
def main(ctx):
    ctx.send("before")
    ctx.wait("on")
    ctx.send("after")
    ctx.wait("end")
""")


@pytest.mark.long
def test_a_message_sent_while_the_disk_was_full_appears_once_there_is_room(home: House, small_disk: Path) -> None:
    session = agents.start(home, SPEAKER, idle_suspend_s=None)
    session.until("a message", lambda s: s.outbox() == ["before"])
    filler = fill(small_disk)
    session.signal("on")
    session.until("degraded", lambda s: s.events("durability.degraded"))
    assert session.outbox() == ["before"]
    filler.unlink()
    session.until("the message", lambda s: s.outbox() == ["before", "after"], timeout_s=30)
    assert session.view["degraded"] is False
    session.signal("end")
    session.result()


# ---------------------------------------------------------------- damaged files


THREE = agents.add("""
def main(ctx, tag):
    said = []
    for turn in range(3):
        said.append(ask("%s turn %d" % (tag, turn)))
        print("said", turn, flush=True)
    approved = ctx.wait("approval").payload
    return {"said": said, "approved": approved, "attempt": ctx.attempt, "fresh": ctx.fresh}
""")


def asleep(home: House, tag: str) -> Session:
    """A session that was suspended by hand after three calls, and the server stopped: no raw copy of it is left."""
    session = agents.start(home, THREE, {"tag": tag}, idle_suspend_s=None)
    session.until("all calls", lambda s: "said 2" in s.output() and s.view["state"] == "waiting")
    session.post("suspend")
    session.until_state("suspended")
    assert home.server.stop() == 0
    return session


def snapshots(home: House, session: Session) -> list[dict[str, Any]]:
    """Oldest first."""
    return home.server.request("GET", f"/v1/sessions/{session.id}/snapshots")["snapshots"]


def stored(home: House, session: Session) -> dict[str, list[Path]]:
    """The packs that each of its snapshots needs, oldest snapshot first; the one that a snapshot added is its first."""
    place = home.server.data_dir / "snapshots" / "store"
    found: dict[str, list[Path]] = {}
    for path in sorted(place.glob("*.manifest")):
        try:
            head, _ = manifest.decode_head(path.read_bytes(), path.stem)
        except Damaged:  # another test's victim
            continue
        if head.meta["session"] == session.id:
            found[path.stem] = [place / f"{ref.id}.pack" for ref in head.packs]
    return found


def resumed(home: House, session: Session) -> dict[str, Any]:
    home.server.restart()
    session.post("resume")
    session.until_state("running", "waiting", "completed", "failed")
    session.signal("approval", "yes")
    return session.result()


@pytest.mark.parametrize("kind", ["pack", "manifest"])
@pytest.mark.parametrize(
    "damage", ["flipped", pytest.param("short", marks=pytest.mark.long), pytest.param("gone", marks=pytest.mark.long)]
)
def test_corrupted_snapshot_file_falls_back_to_its_parent(home: House, damage: str, kind: str) -> None:
    tag = f"corrupt-{damage}-{kind}"
    session = asleep(home, tag)
    newest, packs = list(stored(home, session).items())[-1]
    victim = packs[0] if kind == "pack" else packs[0].with_name(f"{newest}.manifest")
    if damage == "flipped":
        flip(victim)
    elif damage == "short":
        os.truncate(victim, victim.stat().st_size // 3)
    else:
        victim.unlink()
    result = resumed(home, session)
    said = [f"echo {tag} turn {n}" for n in range(3)]
    assert result == {"said": said, "approved": "yes", "attempt": 1, "fresh": False}
    assert calls(home, tag) == 3
    unusable = session.events("snapshot.unusable")
    assert {e["data"]["snapshot"] for e in unusable} == {newest}
    assert all(victim.stem in e["data"]["detail"] for e in unusable)
    rows = {s["id"]: s for s in snapshots(home, session)}
    assert rows[newest]["unusable"]
    (restored,) = [e for e in session.events("snapshot.restored") if e["data"]["snapshot"] in rows]
    assert restored["data"]["snapshot"] == rows[newest]["parent"]
    assert "unusable" in home.server.cli("snapshot", "ls", session.id).stdout
    gapless(session.events(all_lines=True))


def test_a_damaged_pack_makes_those_unusable_that_need_it_and_no_others(home: House) -> None:
    session = asleep(home, "shared-pack")
    needs = stored(home, session)
    # The youngest pack that more than one snapshot needs.
    count = Counter(path for packs in needs.values() for path in packs)
    victim = max(path for path, uses in count.items() if uses > 1)
    flip(victim)
    result = resumed(home, session)
    assert result["said"] == [f"echo shared-pack turn {n}" for n in range(3)]
    assert calls(home, "shared-pack") == 3
    unusable = session.events("snapshot.unusable", all_lines=True)
    damaged = [snapshot for snapshot, packs in needs.items() if victim in packs]
    sound = [snapshot for snapshot in needs if snapshot not in damaged]
    assert {e["data"]["snapshot"] for e in unusable} == set(damaged)
    assert all(victim.stem in e["data"]["detail"] for e in unusable)
    if sound:
        restored = [e["data"]["snapshot"] for e in session.events("snapshot.restored", all_lines=True)]
        assert sound[-1] in restored
        assert not result["fresh"]
    else:
        assert (result["attempt"], result["fresh"]) == (2, True)
    gapless(session.events(all_lines=True))


def test_all_snapshots_corrupted_boots_fresh_from_the_log(home: House) -> None:
    session = asleep(home, "all-corrupt")
    needs = stored(home, session)
    for path in {path for packs in needs.values() for path in packs}:
        flip(path)
    home.server.restart()
    session.post("resume")
    session.until("a fresh attempt", lambda s: s.view["attempt"] == 2)
    session.signal("approval", "yes")
    result = session.result()
    assert result["said"] == [f"echo all-corrupt turn {n}" for n in range(3)]
    assert (result["attempt"], result["fresh"]) == (2, True)
    named = {e["data"]["snapshot"] for e in session.events("snapshot.unusable", all_lines=True)}
    assert named >= set(needs)
    gapless(session.events(all_lines=True))


def test_a_damaged_raw_copy_in_staging_is_not_believed_for_ever(home: House) -> None:
    """The quick copy in memory is lost with the machine's memory, not silently: what is on disk is what counts."""
    session = agents.start(home, THREE, {"tag": "staging"}, idle_suspend_s=None)
    session.until("all calls", lambda s: "said 2" in s.output() and s.view["state"] == "waiting")
    session.post("suspend")
    session.until_state("suspended")
    for path in staging_for(home.server.data_dir).iterdir():
        shutil.rmtree(path)
    session.post("resume")
    session.signal("approval", "yes")
    assert session.result()["said"] == [f"echo staging turn {n}" for n in range(3)]
    assert calls(home, "staging") == 3


# ---------------------------------------------------------------- another runsc

of_gvisor = pytest.mark.skipif(ENGINE != "gvisor", reason="runsc is kept with its snapshots, QEMU is not")


def replace_runsc(home: House) -> None:
    """Another build on its place: the same program, with some bytes more."""
    path = Path(home.server.env["RETHAW_RUNSC"])
    other = path.with_suffix(".new")
    shutil.copy(path, other)
    with other.open("ab") as file:
        file.write(random.randbytes(16))
    other.replace(path)


@of_gvisor
def test_runsc_replaced_while_a_session_is_suspended(home: House) -> None:
    session = asleep(home, "replaced")
    replace_runsc(home)
    result = resumed(home, session)
    assert result["said"] == [f"echo replaced turn {n}" for n in range(3)]
    assert calls(home, "replaced") == 3
    assert not session.events("snapshot.unusable", all_lines=True)
    other = agents.start(home, THREE, {"tag": "new-build"}, idle_suspend_s=None)
    other.signal("approval")
    other.result()
    builds = {s["engine_build"] for s in (snapshots(home, session)[0], snapshots(home, other)[0])}
    assert len(builds) == 2


@of_gvisor
def test_runsc_replaced_under_a_running_server(home: House) -> None:
    session = agents.start(home, THREE, {"tag": "under"}, idle_suspend_s=None)
    session.until("all calls", lambda s: "said 2" in s.output() and s.view["state"] == "waiting")
    replace_runsc(home)
    Path(home.server.env["RETHAW_RUNSC"]).write_bytes(b"no program")
    try:
        session.crash()
        session.until("recovery", lambda s: s.events("snapshot.restored"))
        session.signal("approval")
        assert session.result()["said"] == [f"echo under turn {n}" for n in range(3)]
        assert calls(home, "under") == 3
    finally:
        shutil.copy(str(shutil.which("runsc")), home.server.env["RETHAW_RUNSC"])


@of_gvisor
def test_the_kept_runsc_is_lost_as_well(home: House) -> None:
    session = asleep(home, "lost")
    home.server.restart()
    build = snapshots(home, session)[-1]["engine_build"]
    assert home.server.stop() == 0
    replace_runsc(home)
    (home.server.data_dir / "engines" / build / "runsc").unlink()
    home.server.restart()
    session.post("resume")
    session.until("a fresh attempt", lambda s: s.view["attempt"] == 2)
    session.signal("approval", "yes")
    result = session.result()
    assert (result["attempt"], result["fresh"]) == (2, True)
    unusable = session.events("snapshot.unusable", all_lines=True)
    assert unusable
    assert all(build in e["data"]["detail"] for e in unusable)
    assert processes.alive(home.server.pid)
