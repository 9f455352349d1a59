"""Images of other tools become the tree that their tool would make of them, and nothing outside of it is touched."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from oci_fixtures import Layout, docker_save, entry, layer

from rethaw import Image
from rethaw.images import oci
from rethaw.images.spec import check
from rethaw.model.errors import ImageError, InvalidInput, NotFound, TooLarge
from rethaw.sdk import oci as sdk_oci

pytestmark = [pytest.mark.root]


def unpacked(path: Path, work: Path, **choice: Any) -> Path:
    work.mkdir(exist_ok=True)
    (work / "blob.tar.gz").write_bytes(sdk_oci.read(path, **choice).pack())
    rootfs = work / "rootfs"
    if rootfs.exists():
        shutil.rmtree(rootfs)
    try:
        oci.unpack(work / "blob.tar.gz", rootfs, work / "layers", lambda _: None)
    finally:
        assert not (work / "layers").exists()
    return rootfs


def made(top: Path, *layers: list[Any], **config: Any) -> Path:
    layout = Layout(top)
    layout.add([layer(one) for one in layers], config)
    return top


def test_layers_are_applied_with_owners_modes_and_links(tmp_path: Path) -> None:
    below = [
        entry("usr"), entry("usr/bin"), entry("bin", "", link="usr/bin"), entry("usr/bin/su", "su", mode=0o4755),
        entry("home/me", mode=0o700, uid=1000, gid=1001, mtime=1000), entry("home/me/file", "one", uid=1000, gid=1001, mtime=5),
        entry("home/me/same", "", hard="home/me/file"), entry("home/me/abs", "", link="/usr/bin/su", uid=7, gid=8),
        entry("dev/null", "", type=tarfile.CHRTYPE), entry("null", "", type=tarfile.CHRTYPE), entry("pipe", "", type=tarfile.FIFOTYPE),
        entry("tmp/lost", "x"), entry("var/run", "", link="/run"), entry("var/run/lost", "x"), entry("etc/hosts", "theirs"),
    ]  # fmt: skip
    above = [entry("bin/through", "the link"), entry("./usr/share/", mode=0o711), entry("home/me/file", "two", uid=1)]
    root = unpacked(made(tmp_path / "image", below, above), tmp_path / "work")
    assert (root / "bin").is_symlink() and (root / "usr/bin/through").read_text() == "the link"
    assert stat.S_IMODE((root / "usr/bin/su").stat().st_mode) == 0o4755
    about = (root / "home/me").stat()
    assert (about.st_uid, about.st_gid, stat.S_IMODE(about.st_mode)) == (1000, 1001, 0o700)
    # The new file is not written into what the link of the layer below shares.
    assert (root / "home/me/file").read_text() == "two" and (root / "home/me/same").read_text() == "one"
    assert (root / "home/me/file").stat().st_uid == 1 and (root / "home/me/same").stat().st_uid == 1000
    link = (root / "home/me/abs").lstat()
    assert (link.st_uid, link.st_gid) == (7, 8)
    assert stat.S_IMODE((root / "usr/share").stat().st_mode) == 0o711
    assert not (root / "null").exists() and not (root / "pipe").exists() and not list((root / "dev").iterdir())
    assert not list((root / "tmp").iterdir()) and not list((root / "run").iterdir())
    assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777 and (root / ".rethaw").is_dir()
    assert "localhost" in (root / "etc/hosts").read_text()


def test_whiteouts_hide_the_layers_below_and_only_those(tmp_path: Path) -> None:
    below = [
        entry("a/keep", "1"), entry("a/gone", "1"), entry("a/tree/deep/x", "1"), entry("opaque/old", "1"),
        entry("opaque/both", "1"), entry("opaque/sub/old", "1"), entry("replaced/x", "1"), entry("link", "", link="a"),
    ]  # fmt: skip
    above = [
        entry("a/.wh.gone", ""), entry("a/.wh.tree", ""), entry("a/.wh.never", ""),
        entry("opaque/new", "2"), entry("opaque/both", "2"), entry("opaque/sub/new", "2"), entry("opaque/.wh..wh..opq", ""),
        entry("replaced/y", "2"), entry(".wh.replaced", ""), entry(".wh.link", ""),
    ]  # fmt: skip
    root = unpacked(made(tmp_path / "image", below, above), tmp_path / "work")
    assert sorted(p.name for p in (root / "a").iterdir()) == ["keep"]
    assert sorted(str(p.relative_to(root)) for p in (root / "opaque").rglob("*") if p.is_file()) == [
        "opaque/both", "opaque/new", "opaque/sub/new",
    ]  # fmt: skip
    assert (root / "opaque/both").read_text() == "2"
    assert sorted(p.name for p in (root / "replaced").iterdir()) == ["y"]
    assert not (root / "link").is_symlink() and not list(root.rglob(".wh.*"))


@pytest.mark.parametrize(
    "hostile",
    [
        [entry("../outside", "x")],
        [entry("a/../../outside", "x")],
        [entry("x", "", link="../../.."), entry("x/outside", "x")],
        [entry("x", "", link="/"), entry("x/outside", "x")],
        [entry("x", "", hard="../../secret")],
        [entry("x", "", link="../../../secret"), entry("y", "", hard="x"), entry("y", "x")],
        [entry("etc", "", link="../../.."), entry(".wh.secret", "")],
        [entry("d", "", link="../.."), entry("d/.wh.secret", ""), entry("d/.wh..wh..opq", "")],
        [entry(".wh..", "")],
        [entry(".wh...", "")],
        [entry("x", "", link="/.rethaw"), entry("x/python/bin/python3", "evil")],
        [entry(".rethaw/python/bin/python3", "evil")],
        [entry("app", "", link="/proc"), entry("etc", "", link="/dev")],
    ],
)
def test_nothing_leads_outside(hostile: list[Any], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    before = {p.name for p in tmp_path.iterdir()} | {"image", "work"}
    with_refusal = False
    try:
        root = unpacked(made(tmp_path / "image", hostile), tmp_path / "work")
    except ImageError:
        with_refusal = True
    assert secret.read_text() == "mine" and {p.name for p in tmp_path.iterdir()} == before
    assert {p.name for p in (tmp_path / "work").iterdir()} <= {"blob.tar.gz", "rootfs"}
    assert with_refusal or not list((root / ".rethaw").iterdir())
    assert not Path("/outside").exists() and not Path("/python").exists()


def test_a_directory_that_became_a_link_gave_its_mode_to_one_of_the_host(tmp_path: Path) -> None:
    """Directories are given their modes at a layer's end; by then what led to them may be a link to anywhere."""
    theirs = tmp_path / "host/here"
    theirs.mkdir(parents=True)
    theirs.chmod(0o700)
    before = theirs.stat()
    members = [entry("a"), entry("a/here", mode=0o777, uid=77, mtime=1), entry("a", link=str(tmp_path / "host"))]
    root = unpacked(made(tmp_path / "image", members), tmp_path / "work")
    assert (root / "a").is_symlink()
    after = theirs.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime) == (before.st_mode, before.st_uid, before.st_mtime)


def test_docker_archives_and_layouts_are_the_same_image(tmp_path: Path) -> None:
    layers = [[entry("a", "1"), entry("b", "1")], [entry(".wh.a", ""), entry("c", "2")]]
    config = {
        "Env": ["PATH=/opt/bin:/bin", "A=b=c"],
        "WorkingDir": "/srv/",
        "Entrypoint": ["/bin/e"],
        "Cmd": ["x"],
        "User": "me",
    }
    top = made(tmp_path / "layout", *layers, **config)
    packed = [layer(one) for one in layers]
    files = [docker_save(tmp_path / name, packed, config) for name in ("a.tar", "a.tar.gz")]
    with tarfile.open(tmp_path / "layout.tar", "w") as tar:
        tar.add(top, ".")
    for number, path in enumerate([top, *files, tmp_path / "layout.tar"]):
        image = Image.from_oci(path)
        assert image.spec.env == {"PATH": "/opt/bin:/bin", "A": "b=c"} and image.spec.workdir == "/srv"
        assert image.command == ("/bin/e", "x")
        check(image.spec)
        assert image.uploads()[0][1] == image.uploads()[0][1]
        root = unpacked(path, tmp_path / f"work{number}")
        assert (root / "b").read_text() == "1" and (root / "c").read_text() == "2" and not (root / "a").exists()
    changed = Image.from_oci(files[0]).env(PATH="/mine").workdir("/").apt_install("jq").run("true")
    assert changed.spec.env["PATH"] == "/mine" and changed.spec.workdir is None and changed.spec.apt == ()
    assert [step.kind for step in changed.spec.steps] == ["apt", "run"]


def test_one_of_several_is_chosen_by_name_or_machine(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "several")
    layout.add([layer([entry("which", "other")])], {}, machine="riscv64")
    layout.add([layer([entry("which", "ours")])], {})
    assert (unpacked(layout.top, tmp_path / "work") / "which").read_text() == "ours"
    with pytest.raises(ImageError, match="is for riscv64, this node is"):
        unpacked(layout.top, tmp_path / "work", platform="linux/riscv64")
    with pytest.raises(InvalidInput, match="no image for linux/mips, but for linux/"):
        Image.from_oci(layout.top, platform="linux/mips")
    named = Layout(tmp_path / "named")
    named.add([layer([entry("which", "one")])], {}, "one:1")
    named.add([layer([entry("which", "two")])], {}, "two:1")
    with pytest.raises(InvalidInput, match=r"does not hold one image: one:1, two:1"):
        Image.from_oci(named.top)
    assert (unpacked(named.top, tmp_path / "work", name="two:1") / "which").read_text() == "two"
    with pytest.raises(InvalidInput, match=r"no image 'three'; it has one:1, two:1"):
        Image.from_oci(named.top, name="three")


def test_what_is_no_image_or_damaged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match=r"no image .*none\.tar"):
        Image.from_oci(tmp_path / "none.tar")
    (tmp_path / "text.tar").write_text("hello")
    with pytest.raises(InvalidInput, match="is no archive of an image"):
        Image.from_oci(tmp_path / "text.tar")
    (tmp_path / "export.tar").write_bytes(layer([entry("bin/sh", "x")]))
    with pytest.raises(InvalidInput, match="has neither manifest"):
        Image.from_oci(tmp_path / "export.tar")
    top = made(tmp_path / "image", [entry("a", "1111" + os.urandom(1000).hex())], [entry("b", "2")])
    manifest = json.loads((top / "index.json").read_text())["manifests"][0]["digest"].partition(":")[2]
    first, second = (
        top / "blobs/sha256" / one["digest"].partition(":")[2]
        for one in json.loads((top / "blobs/sha256" / manifest).read_text())["layers"]
    )
    good = first.read_bytes()
    first.write_bytes(good.replace(b"1111", b"1112", 1))
    with pytest.raises(InvalidInput, match=r"the layer blobs/sha256/\w+ is damaged"):
        Image.from_oci(top).uploads()
    first.write_bytes(good)
    monkeypatch.setattr(sdk_oci, "MAX_BYTES", 1000)
    with pytest.raises(TooLarge, match="when packed"):
        Image.from_oci(top).uploads()
    second.unlink()
    with pytest.raises(InvalidInput, match="lacks the layer"):
        Image.from_oci(top)
    (top / "index.json").write_text('{"manifests": [{"digest": "sha256:../../../etc/passwd"}]}')
    with pytest.raises(InvalidInput, match="is not the digest of a part"):
        Image.from_oci(top)


def test_a_server_takes_no_archives_word_for_it(tmp_path: Path) -> None:
    raw = layer([entry("a", "1")])
    about = {"architecture": sdk_oci.MACHINES[os.uname().machine], "layers": ["layers/0"], "config": {}}
    honest = {**about, "diff_ids": [f"sha256:{hashlib.sha256(raw).hexdigest()}"]}

    def refused(members: list[Any]) -> str:
        (tmp_path / "x.tar.gz").write_bytes(gzip.compress(layer(members)))
        with pytest.raises(ImageError) as caught:
            oci.unpack(tmp_path / "x.tar.gz", tmp_path / "rootfs", tmp_path / "layers", lambda _: None)
        shutil.rmtree(tmp_path / "rootfs", ignore_errors=True)
        assert {p.name for p in tmp_path.iterdir()} == {"x.tar.gz"}
        return str(caught.value)

    said = entry("image.json", json.dumps(honest))
    assert "digest" in refused(
        [entry("image.json", json.dumps({**about, "diff_ids": ["sha256:0"]})), entry("layers/0", raw)]
    )
    assert "has a part" in refused([said, entry("layers/../../x", raw)])
    assert "has a part" in refused([said, entry("layers/0", "", link="/etc/passwd")])
    assert "no layer 0" in refused([entry("image.json", json.dumps({**honest, "layers": ["../x"]}))])
    assert "cannot be unpacked" in refused([said])
    assert "cannot be unpacked" in refused([said, entry("layers/0", b"\x28\xb5\x2f\xfd damaged")])
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(layer([said, entry("layers/0", zstd.compress(raw))])))
    oci.unpack(tmp_path / "x.tar.gz", tmp_path / "rootfs", tmp_path / "layers", lambda _: None)
    assert (tmp_path / "rootfs/a").read_text() == "1"
