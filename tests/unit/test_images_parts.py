"""Images without building one: names, mirrors, archives."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from rethaw.images import archive, guest, mirrors
from rethaw.images.spec import check, spec_digest, tree_digest
from rethaw.model.errors import ImageError, InvalidInput
from rethaw.model.image_types import ImageSpec
from rethaw.node.boot import GATEWAY

# ---------------------------------------------------------------- names


def test_a_digest_does_not_depend_on_order() -> None:
    one = ImageSpec(apt=("jq", "curl"), pip=("a", "b"), env={"A": "1", "B": "2"})
    two = ImageSpec(apt=("curl", "jq"), pip=("b", "a"), env={"B": "2", "A": "1"})
    assert spec_digest(one) == spec_digest(two)


@pytest.mark.parametrize("other", [ImageSpec(apt=("jq",)), ImageSpec(pip=("a",)), ImageSpec(env={"A": "1"})])
def test_a_digest_depends_on_everything(other: ImageSpec) -> None:
    assert spec_digest(other) != spec_digest(ImageSpec())


def test_images_that_differ_in_their_environment_share_a_tree() -> None:
    assert tree_digest(ImageSpec(env={"A": "1"})) == tree_digest(ImageSpec())


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (ImageSpec(suite="sarge"), "sarge"),
        (ImageSpec(apt=("--option",)), "--option"),
        (ImageSpec(apt=("a b",)), "a b"),
        (ImageSpec(pip=("--index-url=http://x",)), "--index-url"),
        (ImageSpec(pip=("-r file",)), "-r file"),
        (ImageSpec(pip=("a\n--pre",)), "a"),
        (ImageSpec(env={"A B": "1"}), "A B"),
    ],
)
def test_what_cannot_be_part_of_an_image_is_named(spec: ImageSpec, named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        check(spec)


@pytest.mark.parametrize("requirement", ["httpx", "openai>=2", "uvicorn[standard] ~= 0.30", "a; python_version < '4'"])
def test_requirements(requirement: str) -> None:
    check(ImageSpec(pip=(requirement,)))


# ---------------------------------------------------------------- mirrors

TARGETS = """\
Packages|http://mirror.example/debian/|bookworm|main
Packages|http://mirror.example/debian/|bookworm|contrib
Packages|http://mirror.example/debian/|bookworm-updates|main
Packages|http://mirror.example/sec/|bookworm-security|main
Packages|https://other.example/apt/|cloud|main
DEP-11|http://wrong.example/debian/|bookworm|main
"""


def test_mirrors_are_the_machine_s_own() -> None:
    found = mirrors.parse("bookworm", TARGETS, 'Acquire::http::Proxy "http://proxy:3128";\nAcquire::Retries "3";\n')
    lines = [line.replace("[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ", "") for line in found.sources]
    assert lines == [
        "deb http://mirror.example/debian bookworm main",
        "deb http://mirror.example/debian bookworm-updates main",
        "deb http://mirror.example/sec bookworm-security main",
    ]
    assert found.options == ('Acquire::http::Proxy "http://proxy:3128"',)


def test_mirrors_of_a_machine_that_is_no_debian() -> None:
    with pytest.raises(ImageError, match=r"no mirror of Debian bookworm.*sources\.list"):
        mirrors.parse("bookworm", "Packages|http://archive.example/other/|noble|main\n", "")


def test_mirrors_without_security_updates() -> None:
    found = mirrors.parse("bookworm", "Packages|http://mirror.example/debian/|bookworm|main\n", "")
    assert len(found.sources) == 1


# ---------------------------------------------------------------- archives


def packed(path: Path, fill: Callable[[tarfile.TarFile], None]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        fill(tar)
    return path


def member(tar: tarfile.TarFile, name: str, data: bytes = b"x", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data) if info.isfile() else None)


def test_an_ordinary_archive(tmp_path: Path) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        member(tar, "./agent.py", b"print()", mode=0o644, mtime=1_600_000_000)
        member(tar, "bin/run", b"#!/bin/sh", mode=0o4777, uid=1000)
        member(tar, "empty", b"", type=tarfile.DIRTYPE, mode=0o700)
        member(tar, "link", b"", type=tarfile.SYMTYPE, linkname="bin/run")
        member(tar, "agent.py", b"print(2)", mode=0o644, mtime=1_600_000_000)

    archive.extract(packed(tmp_path / "a.tar.gz", fill), tmp_path / "app")
    app = tmp_path / "app"
    assert (app / "agent.py").read_text() == "print(2)"
    assert (app / "agent.py").stat().st_mtime == 1_600_000_000
    assert stat.S_IMODE((app / "bin/run").stat().st_mode) == 0o755
    assert (app / "bin/run").stat().st_uid == os.getuid()
    assert (app / "link").read_text() == "#!/bin/sh"
    assert stat.S_IMODE((app / "empty").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": "/etc/passwd"}, "/etc/passwd"),
        ({"name": "../up"}, "../up"),
        ({"name": "a/../../up"}, "up"),
        ({"name": "link", "type": tarfile.SYMTYPE, "linkname": "/etc"}, "link"),
        ({"name": "a/link", "type": tarfile.SYMTYPE, "linkname": "../../etc"}, "link"),
        ({"name": "hard", "type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}, "hard"),
        ({"name": "device", "type": tarfile.CHRTYPE}, "device"),
        ({"name": "pipe", "type": tarfile.FIFOTYPE}, "pipe"),
    ],
)
def test_what_leads_outside_is_refused(tmp_path: Path, fields: dict[str, object], named: str) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        name = str(fields["name"])
        rest = {key: value for key, value in fields.items() if key != "name"}
        member(tar, name, b"" if rest else b"x", **rest)

    with pytest.raises(ImageError, match=named):
        archive.extract(packed(tmp_path / "a.tar.gz", fill), tmp_path / "app")
    assert sorted(p.name for p in tmp_path.iterdir()) in (["a.tar.gz"], ["a.tar.gz", "app"])


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        member(tar, "dir", b"", type=tarfile.DIRTYPE)
        member(tar, "link", b"", type=tarfile.SYMTYPE, linkname="dir")
        member(tar, "link/file", b"x")

    with pytest.raises(ImageError, match="through a link"):
        archive.extract(packed(tmp_path / "a.tar.gz", fill), tmp_path / "app")


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 1 << 20)
    path = packed(tmp_path / "a.tar.gz", lambda tar: member(tar, "zeros", bytes(2 << 20)))
    with pytest.raises(ImageError, match="larger than 1 MiB"):
        archive.extract(path, tmp_path / "app")
    monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
    path = packed(tmp_path / "b.tar.gz", lambda tar: [member(tar, str(n)) for n in range(4)] and None)
    with pytest.raises(ImageError, match="3 files"):
        archive.extract(path, tmp_path / "app2")


@pytest.mark.parametrize(
    "data",
    [b"", b"not gzip", gzip.compress(b"not tar" * 1000), b"\x1f\x8b\x08\x00cut"],
    ids=["empty", "text", "no-tar", "cut"],
)
def test_a_damaged_archive_is_an_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"a\.tar\.gz"):
        archive.extract(path, tmp_path / "app")


# ---------------------------------------------------------------- guest


def test_the_guest_s_modules_need_only_the_standard_library(tmp_path: Path) -> None:
    import subprocess
    import sys

    contents = guest.files()
    assert {"__init__.py", "guest/guestd.py", "channel/frames.py", "model/errors.py"} <= set(contents)
    guest.install(contents, tmp_path)
    program = (
        "import rethaw.guest.guestd, rethaw.channel.frames, rethaw.model.errors, sys; print('pydantic' in sys.modules)"
    )
    env = {"PYTHONPATH": str(tmp_path / ".rethaw/lib")}
    done = subprocess.run([sys.executable, "-S", "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
    assert guest.digest(contents) == guest.digest(dict(reversed(contents.items())))
    assert guest.digest(contents) != guest.digest({**contents, "guest/new.py": b""})


def test_presets_of_clients_give_way_to_the_image_and_stay_inside_it(tmp_path: Path) -> None:
    import tomllib

    fresh, own, linked, odd = (tmp_path / name for name in ("fresh", "own", "linked", "odd"))
    outside = tmp_path / "outside"
    for path in (fresh, own / "etc/codex", linked / "etc", odd / "etc", outside):
        path.mkdir(parents=True)
    (own / "etc/codex/config.toml").write_text("model = 'mine'\n")
    (linked / "etc/codex").symlink_to(outside)  # inside, it leads to a place of the image
    (odd / "etc/codex").write_text("a file")
    for tree in (fresh, own, linked, odd):
        guest.install({}, tree)
    preset = fresh / "etc/codex/config.toml"
    read = tomllib.loads(preset.read_text())
    assert read["model_providers"][read["model_provider"]]["base_url"] == f"{GATEWAY}/openai/v1"
    assert preset.stat().st_mtime == guest.MODIFIED
    assert (own / "etc/codex/config.toml").read_text() == "model = 'mine'\n"
    assert not list(outside.iterdir()) and (odd / "etc/codex").read_text() == "a file"
    assert linked.joinpath(*outside.parts[1:], "config.toml").read_bytes() == preset.read_bytes()
