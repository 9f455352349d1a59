"""`rethaw image`: built with its log, listed, looked at, removed; nothing is left of what fails or is given up."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_fixtures import House, Session, house
from oci_fixtures import IMAGES, Layout, busybox_layers

from rethaw import AsyncClient, Client, Conflict, Image, ImageError, NotFound
from rethaw.images.builder import ImageStore
from rethaw.images.spec import runtime_digest
from rethaw.testing import processes

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]


@pytest.fixture(scope="module")
def images() -> Iterator[Path]:
    """A store of this file's own, with the machine's private interpreter in it by hard links."""
    shared = pytest.MonkeyPatch()
    shared.setenv("RETHAW_IMAGES", str(IMAGES))
    asyncio.run(ImageStore(Path("/nowhere")).runtime("bookworm", lambda _: None))
    shared.undo()
    home = Path(tempfile.mkdtemp(prefix="store-", dir=IMAGES))
    digest = runtime_digest("bookworm")
    subprocess.run(["cp", "-al", str(IMAGES / digest), str(home / digest)], check=True)
    yield home
    subprocess.run(["rm", "-rf", str(home)], check=True)


@pytest.fixture(scope="module")
def home(images: Path) -> Iterator[House]:
    with house(images=images) as h:
        yield h


@pytest.fixture(scope="module")
def client(home: House) -> Iterator[Client]:
    with Client(home.server.url, home.server.token) as connection:
        yield connection


def env(home: House) -> dict[str, str]:
    return {**os.environ, "RETHAW_URL": home.server.url, "RETHAW_TOKEN": home.server.token}


def rethaw(home: House, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "rethaw.cli.main", *words]
    done = subprocess.run(argv, env=env(home), capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A rethaw.toml on an image of 2 MiB, whose steps take moments."""
    layout = Layout(tmp_path / "busy")
    layout.add(busybox_layers(), {"Env": ["PATH=/bin"], "Cmd": ["cat", "/srv/said"]})
    (tmp_path / "rethaw.toml").write_text(f"""
[image]
from_oci = "busy"
workdir = "/srv"

[[image.steps]]
run = "echo {uuid.uuid4().hex} > unique; echo working; cat data > said"
""")
    return tmp_path


def left(images: Path) -> tuple[set[str], list[str], list[int]]:
    """What builds leave: trees, mounts, processes."""
    trees = {p.name for p in images.iterdir() if not p.name.endswith(".lock")}
    return trees, processes.mounts_below(images), processes.mentioning(str(images))


def test_an_image_from_its_file_to_its_end(home: House, client: Client, project: Path, images: Path) -> None:
    done = rethaw(home, "image", "build", str(project))
    digest = done.stdout.strip()
    assert re.fullmatch(r"[0-9a-f]{64}", digest) and "working" in done.stderr and "built in" in done.stderr
    again = rethaw(home, "image", "build", "--json", str(project / "rethaw.toml"))
    assert json.loads(again.stdout)["digest"] == digest and not json.loads(again.stdout)["built"]
    listed = rethaw(home, "image", "ls").stdout
    assert digest[:12] in listed and "KIND" not in listed
    every = json.loads(rethaw(home, "image", "ls", "--all", "--json").stdout)
    assert {"image", "oci", "step", "runtime"} <= {one["kind"] for one in every}
    assert rethaw(home, "run", "--image", str(project)).stdout == "from the image\n"  # its own command
    assert (
        rethaw(home, "run", "--image", digest[:10], "--", "sh", "-c", "pwd; cat said").stdout
        == "/srv\nfrom the image\n"
    )
    session = home.start({"name": "holds", "command": ["sh", "-c", "rethaw receive"], "image": spec_of(client, digest)})
    session.until_state("waiting")
    looked = rethaw(home, "image", "inspect", digest[:9])
    assert session.id in looked.stdout and "workdir    /srv" in looked.stdout and "layer 2" in looked.stdout
    refused = rethaw(home, "image", "rm", digest[:9], code=5)
    assert f"is needed by session {session.id}" in refused.stderr and "rethaw rm" in refused.stderr
    with pytest.raises(Conflict) as caught:
        client.images.remove(digest)
    assert session.id in caught.value.details["sessions"]
    client.sessions.cancel(session.id, now=True)
    session.until_state("cancelled")
    snapshots = client.images.inspect(digest).snapshots
    if snapshots:  # of sessions that have ended
        assert snapshots[0] in rethaw(home, "image", "rm", digest[:9], code=5).stderr
    for one in client.sessions.list():
        rethaw(home, "rm", one.id)
    trees = {one.digest for one in client.images.inspect(digest).layers}
    gone = json.loads(rethaw(home, "image", "rm", "--json", digest[:9]).stdout)
    assert {digest, *trees} <= set(gone["digests"]) and gone["bytes"] > 1 << 20
    assert not any((images / one).exists() for one in gone["digests"])
    assert digest[:12] not in rethaw(home, "image", "ls").stdout
    assert "there is no image" in rethaw(home, "image", "inspect", digest[:9], code=4).stderr


def spec_of(client: Client, digest: str) -> Any:
    found = client.images.inspect(digest).spec
    assert found is not None
    return found.model_dump(mode="json")


def test_a_failing_step_shows_its_last_lines_and_leaves_nothing(
    home: House, client: Client, project: Path, images: Path
) -> None:
    rethaw(home, "image", "build", str(project))  # the layers below stay
    before = left(images)
    text = (project / "rethaw.toml").read_text()
    (project / "rethaw.toml").write_text(
        f"{text}\n[[image.steps]]\nrun = 'mkdir -p /half; echo the reason; sleep 1000 & exit 9'\n"
    )
    done = rethaw(home, "image", "build", str(project), code=9)
    assert "exited with 9" in done.stderr and "the reason" in done.stderr.splitlines()[-1] and not done.stdout
    processes.wait_until(lambda: left(images) == before, 30, "nothing is left")
    kinds = [one.kind for one in client.images.list() if "the reason" in one.made_of]
    assert kinds == []


def test_who_goes_away_ends_the_build(home: House, project: Path, images: Path) -> None:
    rethaw(home, "image", "build", str(project / "busy"))
    before = left(images)
    (project / "rethaw.toml").write_text("[image]\nfrom_oci = 'busy'\nrun = 'echo begun; sleep 1000'\n")
    argv = [sys.executable, "-m", "rethaw.cli.main", "image", "build", str(project)]
    with subprocess.Popen(argv, env=env(home), stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:  # live, and not at the end
            if "begun" in line:
                break
        assert left(images) != before
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 130
    processes.wait_until(lambda: left(images) == before, 60, "nothing is left")


def test_an_export_carries_what_the_image_took_from_uploads(
    home: House, client: Client, images: Path, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "busy")
    layout.add(busybox_layers(), {"Env": ["PATH=/bin"]})
    (tmp_path / "words").write_text("one two three")
    image = Image.from_oci(layout.top).add_local_file(tmp_path / "words", "/srv/")
    command = ["sh", "-c", "x=kept; rethaw snapshot > /dev/null; m=$(rethaw receive); echo $x $m $(cat /srv/words)"]
    session = home.start(
        {"name": "carried", "command": command, "image": client.images.upload(image).model_dump(mode="json")}
    )
    session.until_state("waiting")
    rethaw(home, "snapshot", "export", session.id, str(tmp_path / "file"))
    elsewhere = Path(tempfile.mkdtemp(prefix="store-", dir=IMAGES))
    try:
        digest = runtime_digest("bookworm")
        subprocess.run(["cp", "-al", str(images / digest), str(elsewhere / digest)], check=True)
        with house(images=elsewhere) as other:
            taken = rethaw(other, "snapshot", "import", str(tmp_path / "file")).stdout.strip()
            there = Session(other, {"id": taken})
            there.send(1)
            there.post("resume")
            there.until_state("completed")
            assert there.output() == "kept 1 one two three\n"
    finally:
        subprocess.run(["rm", "-rf", str(elsewhere)], check=True)
    session.post("cancel")


def test_mistakes_are_one_line(home: House) -> None:
    assert "does not name an image" in rethaw(home, "image", "inspect", "nothing", code=2).stderr
    assert "no image is named" in rethaw(home, "image", "rm", code=2).stderr
    assert "did you mean 'node'?" in rethaw(home, "run", "--image", "nod", "--", "true", code=4).stderr


async def test_the_same_with_await(home: House, project: Path) -> None:
    lines: list[str] = []
    layout = Layout(project / "other")
    layout.add(busybox_layers(), {})
    image = Image.from_oci(layout.top).run(f"echo {uuid.uuid4().hex} > /srv/x")
    async with AsyncClient(home.server.url, home.server.token) as connection:
        made = await connection.images.build(image, lines.append)
        assert made.built and list(made.lines) == lines
        assert (await connection.images.inspect(made.digest[:20])).info.digest == made.digest
        assert made.digest in {one.digest for one in await connection.images.list()}
        with pytest.raises(ImageError, match="no such thing"):
            await connection.images.build(image.run("echo no such thing; exit 1"), lines.append)
        assert made.digest in (await connection.images.remove(made.digest)).digests
        with pytest.raises(NotFound):
            await connection.images.inspect(made.digest)
