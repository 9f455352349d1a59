"""Programs on images of other tools, without Python and without a C library: as durable as any."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_fixtures import House, gapless, house
from oci_fixtures import IMAGES, Layout, busybox_layers, python_layer

from rethaw import Client, Image, ImageError
from rethaw.images.spec import tree_digest

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(400),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
ENV = {"PATH": "/bin", "GREETING": "hello", "LD_LIBRARY_PATH": "/nowhere", "PYTHONHOME": "/nowhere"}
# Counts in a shell's memory and in a file; the `rethaw` command is all that it knows of Rethaw.
SCRIPT = """
set -eu
echo "$GREETING from $(pwd): $(cat /srv/data)"
ls -a /; env
n=0
while message=$(rethaw receive); do
    [ "$message" = '"stop"' ] && break
    n=$((n + message))
    echo "$n" >> /srv/total
    rethaw send --json "{\\"total\\": $n, \\"lines\\": $(wc -l < /srv/total)}"
done
rethaw result "$n"
"""


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as h:
        yield h


@pytest.fixture(scope="module")
def client(home: House) -> Iterator[Client]:
    with Client(home.server.url, home.server.token) as connection:
        yield connection


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, client: Client) -> Image:
    layout = Layout(tmp_path_factory.mktemp("oci") / "layout")
    layout.add(busybox_layers(), {"Env": [f"{k}={v}" for k, v in ENV.items()], "WorkingDir": "/srv", "Cmd": ["sh"]})
    made = Image.from_oci(layout.top)
    client.images.build(made)  # uploads it
    return made


def test_a_program_without_a_c_library_survives_three_crashes_and_two_freezes(home: House, image: Image) -> None:
    spec = image.spec.model_dump(mode="json")
    session = home.start({"name": "busy", "command": ["sh", "-c", SCRIPT], "image": spec, "idle_suspend_s": 600})
    for n in (1, 2, 3):
        session.until_state("waiting")
        session.send(n)
        session.until("its answer", lambda s, n=n: len(s.outbox()) == n)
        session.crash()
        session.until("the crash", lambda s, n=n: s.view["crashes"] == n)
        if n > 1:
            session.until_state("waiting")
            session.post("suspend")
            session.until_state("suspended")
            session.post("resume")
    totals = [{"total": total, "lines": number} for number, total in enumerate((1, 3, 6), 1)]
    assert session.outbox() == totals
    session.until_state("waiting")
    session.send("stop")
    assert session.result() == 6
    said = session.output()
    assert said.startswith("hello from /srv: from the image\n")
    assert "PATH=/bin:/.rethaw/bin\n" in said and "LD_LIBRARY_PATH=/nowhere\n" in said
    assert "PYTHON" not in said.replace("PYTHONPATH=", "").replace("PYTHONUNBUFFERED=", "").replace("PYTHONHOME=", "")
    gapless(session.events(all_lines=True))


def test_steps_run_on_it_and_what_it_lacks_is_said(home: House, client: Client, image: Image, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("one two three")
    more = image.run("cat /srv/data | tr a-z A-Z > upper; mkdir -p new; rm /etc/ld.so.cache").add_local_file(
        tmp_path / "words", "/srv/new/"
    )
    client.images.build(more)
    command = ["sh", "-c", "cat upper new/words; ls /etc; pwd"]
    session = home.start({"name": "more", "command": command, "image": more.spec.model_dump(mode="json")})
    session.until_state("completed")
    assert session.output().startswith("FROM THE IMAGE\none two three") and session.output().endswith("\n/srv\n")
    assert "ld.so.cache" not in session.output()
    with pytest.raises(ImageError, match=r"(?s)`apt jq`.*the image has no apt-get"):
        client.images.build(image.apt_install("jq"))
    with pytest.raises(ImageError, match=r"(?s)`pip httpx`.*the image has no python3 to install"):
        client.images.build(image.pip_install("httpx"))
    with pytest.raises(ImageError, match=r"(?s)`npm semver`.*the image has neither npm nor apt-get"):
        client.images.build(image.npm_install("semver"))


@pytest.mark.parametrize("own", [True, False], ids=["its-own-pip", "a-pip-for-the-build"])
def test_python_packages_on_an_image_with_python(home: House, client: Client, tmp_path: Path, own: bool) -> None:
    debian = Image.debian().apt_install("python3-pip")
    client.images.build(debian)
    tree = IMAGES / tree_digest(debian.spec) / "rootfs"
    layout = Layout(tmp_path / "with-python")
    layout.add([python_layer(tree, own)], {"Env": ["PATH=/usr/bin:/bin", "PYTHONHOME=/usr"], "Cmd": ["python3"]})
    image = Image.from_oci(layout.top).pip_install("six==1.16.0", "charset-normalizer")
    client.images.build(image)
    said = "import six, charset_normalizer, os; print(six.__file__, os.path.exists(six.__cached__))"
    command = [
        "sh",
        "-c",
        f"python3 -c '{said}'; /usr/local/bin/normalizer --version; ls -d /.rethaw/* /usr/bin/pip3",
    ]
    session = home.start({"name": "pips", "command": command, "image": image.spec.model_dump(mode="json")})
    session.until("its end", lambda s: s.view["state"] in ("completed", "failed"))
    out = session.output()
    assert out.startswith("/usr/local/lib/python3.11/dist-packages/six.py True\nCharset-Normalizer"), out
    assert ("/usr/bin/pip3" in out.split()) is own and "/.rethaw/pip" not in out and "/.rethaw/pip.conf" not in out


def test_a_program_alone_without_a_shell_runs(home: House, client: Client, tmp_path: Path) -> None:
    from oci_fixtures import busybox, entry, layer

    layout = Layout(tmp_path / "scratch")
    layout.add(
        [layer([entry("busybox", busybox(), mode=0o755)])], {"Entrypoint": ["/busybox", "echo"], "Cmd": ["alone"]}
    )
    image = Image.from_oci(layout.top)
    client.images.build(image)
    spec = image.spec.model_dump(mode="json")
    session = home.start({"name": "alone", "command": list(image.command), "image": spec})
    session.until_state("completed")
    assert session.output() == "alone\n"
    with pytest.raises(ImageError, match="the image has no /bin/sh"):
        client.images.build(image.run("true"))


def test_a_function_runs_on_an_image_without_python(home: House, image: Image) -> None:
    code = """
import sys
def main(ctx):
    first = ask("one")
    return [first, ask("two"), sys.version_info >= (3, 9), open("/srv/data").read()]
"""
    session = home.agent(code, image=image.spec.model_dump(mode="json"))
    assert session.result() == ["echo one", "echo two", True, "from the image\n"]


@pytest.mark.long
@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs QEMU")
def test_it_runs_in_a_microvm(home: House, image: Image) -> None:
    command = ["sh", "-c", "m=$(rethaw receive); echo got $m; cat /srv/data"]
    spec = image.spec.model_dump(mode="json")
    session = home.start({"name": "vm", "command": command, "image": spec, "engine": "qemu"})
    session.until_state("waiting", timeout_s=150)
    session.crash()
    session.until("the crash", lambda s: s.view["crashes"] == 1)
    session.send(1)
    session.until_state("completed", timeout_s=150)
    assert session.output() == "got 1\nfrom the image\n"


def test_a_snapshot_of_it_can_be_looked_into(home: House, client: Client, image: Image) -> None:
    command = ["sh", "-c", "echo inside > /srv/made; rethaw snapshot; rethaw receive"]
    session = home.start({"name": "look", "command": command, "image": image.spec.model_dump(mode="json")})
    session.until_state("waiting")
    snapshot = session.events("snapshot.created")[-1]["data"]["snapshot"]
    assert client.snapshots.read(snapshot, "/srv/made") == b"inside\n"
    session.post("cancel")
