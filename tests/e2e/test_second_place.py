"""Snapshots beyond the node's disk: uploaded, replicated before release, brought back; carried in a file; pinned."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from e2e_fixtures import House, Session, gapless, house
from moto.server import ThreadedMotoServer

from rethaw.testing.faultproxy import FaultProxy

needs_root = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc")
pytestmark = [needs_root, pytest.mark.root]

WORKER = """
def main(ctx, turns, tag):
    said = []
    notes = {}
    for n in range(turns):
        said.append(ask("%s turn %d" % (tag, n)))
        notes[n] = os.urandom(4096)
        with open("/tmp/notes", "ab") as f:
            f.write(b"line %d\\n" % n)
        ctx.send("sent %d" % n)
    answer = ctx.wait("approval").payload
    with open("/tmp/notes", "rb") as f:
        return {"said": said, "approved": answer, "lines": f.read().count(b"\\n"), "kept": len(notes)}
"""


@pytest.fixture(scope="module", name="proxy")
def proxy_fixture() -> Iterator[FaultProxy]:
    """S3, behind what can break it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        client: Any = boto3.client(
            "s3", endpoint_url=url, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )  # fmt: skip
        client.create_bucket(Bucket="agents")
        client.close()
        with FaultProxy((host, port)) as proxy:
            yield proxy
    finally:
        server.stop()


@pytest.fixture(scope="module")
def home(proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    key = tmp_path_factory.mktemp("keys") / "key"
    key.write_bytes(os.urandom(32))
    bucket = {
        "bucket": "agents", "endpoint": proxy.url, "access_key_id": "key", "secret_access_key": "secret", "linger": "1s",
        "timeout": "3s",
    }  # fmt: skip
    with house(config={"snapshots": {"encryption_key_file": str(key), "s3": bucket}}) as found:
        yield found


def snapshots(home: House, session: Session) -> list[dict[str, Any]]:
    return home.server.request("GET", f"/v1/sessions/{session.id}/snapshots")["snapshots"]


def lose_the_disk(home: House) -> None:
    """Every snapshot of the node, and what it keeps in memory."""
    home.server.stop()
    shutil.rmtree(home.server.data_dir / "snapshots")
    home.server.restart()


def test_a_replicated_agent_survives_its_nodes_disk(home: House) -> None:
    session = home.agent(WORKER, {"turns": 4, "tag": "repl"}, durability="replicated", idle_suspend_s=0.5)
    session.until_state("suspended")
    found = snapshots(home, session)
    assert all(s["uploaded_ms"] is not None and s["uploaded_ms"] >= s["paused_ms"] for s in found)
    events = session.events()
    first_release = next(e["seq"] for e in events if e["type"] == "exchange.released")
    assert any(e["seq"] < first_release for e in events if e["type"] == "snapshot.created")
    lose_the_disk(home)
    session.signal("approval", "yes")
    result = session.result()
    assert result == {"said": [f"echo repl turn {n}" for n in range(4)], "approved": "yes", "lines": 4, "kept": 4}
    assert session.events("snapshot.unusable") == []
    assert home.provider.texts.count("repl turn 3") == 1
    assert session.outbox() == [f"sent {n}" for n in range(4)]
    gapless(session.events(all_lines=True))


def test_a_local_agent_is_uploaded_behind_its_back_and_read_from_there(home: House) -> None:
    session = home.agent(WORKER, {"turns": 2, "tag": "behind"}, idle_suspend_s=0.5)
    session.until_state("suspended")
    session.until("every upload", lambda s: all(i["uploaded_ms"] is not None for i in snapshots(home, s)))
    newest = snapshots(home, session)[-1]
    (home.server.data_dir / newest["path"]).unlink()
    home.server.restart()
    session.signal("approval", "on")
    assert session.result()["lines"] == 2
    assert session.events("snapshot.unusable") == []


def test_a_damaged_pack_is_fetched_again(home: House) -> None:
    session = home.agent(WORKER, {"turns": 2, "tag": "flip"}, idle_suspend_s=0.5)
    session.until_state("suspended")
    session.until("every upload", lambda s: all(i["uploaded_ms"] is not None for i in snapshots(home, s)))
    home.server.stop()
    for pack in (home.server.data_dir / "snapshots" / "store").glob("*.pack"):
        data = bytearray(pack.read_bytes())
        data[len(data) // 2] ^= 0xFF
        pack.write_bytes(data)
    home.server.restart()
    session.signal("approval", "on")
    assert session.result()["lines"] == 2
    assert session.events("snapshot.unusable") == []


def test_a_bucket_that_does_not_answer_is_waited_for(home: House, proxy: FaultProxy) -> None:
    session = home.agent(WORKER, {"turns": 2, "tag": "outage"}, durability="replicated", idle_suspend_s=0.5)
    session.until_state("suspended")
    lose_the_disk(home)
    proxy.set("down")
    try:
        session.signal("approval", "late")
        session.until("a try", lambda _: f"session {session.id} waits for snapshot" in home.server.log_tail(200))
        assert session.view["state"] == "resuming"
    finally:
        proxy.set(None)
    assert session.result(timeout_s=120)["approved"] == "late"
    assert session.events("line.opened") == [] and session.events("snapshot.unusable") == []


def test_no_page_is_readable_on_disk(home: House) -> None:
    session = home.agent(
        'def main(ctx):\n    mark = "plain" * 2000\n    ask("x")\n    ctx.wait("go")\n    return mark[:5]'
    )
    session.until("a snapshot", lambda s: snapshots(home, s))
    for path in (home.server.data_dir / "snapshots" / "store").iterdir():
        assert b"plainplainplain" not in path.read_bytes()
    session.signal("go")
    assert session.result() == "plain"


def test_a_server_without_the_key_does_not_start_and_says_which(home: House) -> None:
    settings = dict(home.server._config["snapshots"])  # pyright: ignore[reportPrivateUsage]
    home.server.stop()
    home.server.configure(snapshots={k: v for k, v in settings.items() if k != "encryption_key_file"})
    with pytest.raises(Exception, match="ended with"):
        home.server.start()
    assert "snapshots.encryption_key_file" in home.server.log_tail()
    assert "Traceback" not in home.server.log_tail()
    home.server.configure(snapshots=settings)
    home.server.start()


def test_export_and_import_carry_a_session_elsewhere(home: House, tmp_path: Path) -> None:
    session = home.agent(WORKER, {"turns": 2, "tag": "carry"}, idle_suspend_s=0.5)
    session.until_state("suspended")
    file = tmp_path / "agent.snap"
    assert home.server.cli("snapshot", "export", session.id, str(file)).returncode == 0
    assert home.server.cli("snapshot", "export", session.id, str(file), check=False).returncode == 5  # it exists
    session.signal("approval", "here")
    assert session.result()["approved"] == "here"
    with house() as other:
        made = other.server.cli("snapshot", "import", str(file), "--json", check=False)
        assert made.returncode == 0, made.stderr
        view = json.loads(made.stdout)
        assert (view["state"], view["reason"]) == ("suspended", "requested")
        there = Session(other, view)
        there.post("resume")
        there.signal("approval", "there")
        result = there.result()
        assert (result["approved"], result["lines"], result["kept"]) == ("there", 2, 2)
        assert other.provider.texts == []  # nothing was asked again
        gapless(there.events(all_lines=True))
        data = bytearray(file.read_bytes())
        for where in (3, 40, len(data) // 2, len(data) - 5):
            broken = bytearray(data)
            broken[where] ^= 1
            (tmp_path / "broken").write_bytes(broken)
            refused = other.server.cli("snapshot", "import", str(tmp_path / "broken"), check=False)
            assert refused.returncode == 2 and "the file" in refused.stderr, refused.stderr
        (tmp_path / "short").write_bytes(data[:-1])
        refused = other.server.cli("snapshot", "import", str(tmp_path / "short"), check=False)
        assert refused.returncode == 2 and "bytes" in refused.stderr
        assert other.server.cli("snapshot", "import", str(tmp_path / "nothing"), check=False).returncode == 2


def test_pins_are_seen(home: House) -> None:
    session = home.agent(WORKER, {"turns": 1, "tag": "pin"}, idle_suspend_s=0.5)
    session.until_state("suspended")
    taken = snapshots(home, session)[0]["id"]
    assert home.server.cli("snapshot", "pin", taken).returncode == 0
    assert "pinned" in home.server.cli("snapshot", "ls", session.id).stdout
    assert home.server.cli("snapshot", "unpin", taken).returncode == 0
    assert "pinned" not in home.server.cli("snapshot", "ls", session.id).stdout
    assert home.server.cli("snapshot", "pin", "snap_nosuch", check=False).returncode == 4


def test_replicated_without_a_bucket_is_refused() -> None:
    with house() as found, pytest.raises(Exception, match="needs an object store"):
        found.agent(WORKER, {"turns": 1, "tag": "x"}, durability="replicated")
