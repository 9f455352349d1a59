"""Images for real: built once for this machine, composed, shared, pruned."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from rethaw.images import steps
from rethaw.images.builder import BuiltImage, ImageStore
from rethaw.images.spec import base_digest
from rethaw.model import faults
from rethaw.model.errors import ImageError, RethawError
from rethaw.model.image_types import ImageSpec

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
IMAGES = Path(os.environ.get("RETHAW_TEST_IMAGES", Path(tempfile.gettempdir()) / "rethaw-test-images"))


def quiet(_: str) -> None:
    pass


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> ImageStore:
    """The machine's test images: the base takes 20 s."""
    monkeypatch.setenv("RETHAW_IMAGES", str(IMAGES))
    return ImageStore(Path("/nowhere"))


@pytest.fixture
async def base(shared: ImageStore) -> BuiltImage:
    return await shared.ensure(ImageSpec(), quiet)


@pytest.fixture
async def store(base: BuiltImage, monkeypatch: pytest.MonkeyPatch) -> ImageStore:
    """A store of its own, with the base in it by hard links."""
    monkeypatch.delenv("RETHAW_IMAGES")
    home = Path(tempfile.mkdtemp(prefix="store-", dir=IMAGES))
    digest = base_digest(ImageSpec())
    (home / "images").mkdir()
    subprocess.run(["cp", "-al", str(IMAGES / digest), str(home / "images" / digest)], check=True)  # noqa: ASYNC221
    yield ImageStore(home)  # type: ignore[misc]
    subprocess.run(["rm", "-rf", str(home)], check=True)  # noqa: ASYNC221


def archive(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("agent.py")
        info.size = 7
        tar.addfile(info, io.BytesIO(b"print()"))
    return path


async def test_the_base_is_sane(base: BuiltImage) -> None:
    for name in ("usr/bin/python3", "usr/bin/git", "usr/bin/rg", "etc/ssl/certs/ca-certificates.crt"):
        assert (base.rootfs / name).exists(), name
    assert "localhost" in (base.rootfs / "etc/hosts").read_text()
    assert (base.rootfs / "etc/passwd").read_text().startswith("root:x:0:0:")
    assert not list((base.rootfs / "var/lib/apt/lists").glob("*Packages*"))
    assert list((base.rootfs / "usr/lib/python3.11/__pycache__").glob("*.pyc"))
    assert base.env["LANG"] == "C.UTF-8"


async def test_composing_shares_files_and_costs_nothing_the_second_time(
    store: ImageStore, base: BuiltImage, tmp_path: Path
) -> None:
    code = archive(tmp_path / "code.tar.gz")
    image = await store.ensure(ImageSpec(env={"A": "1"}), quiet)
    assert image.env["A"] == "1"
    assert image.digest != base.digest
    plain, coded = await asyncio.gather(store.compose(image), store.compose(image, code))
    assert plain[0] != coded[0]
    assert (coded[1] / "app/agent.py").read_text() == "print()"
    assert not (plain[1] / "app/agent.py").exists()
    assert not (image.rootfs / ".rethaw/lib").exists(), "the layer below was written to"
    assert (coded[1] / "usr/bin/git").stat().st_ino == (base.rootfs / "usr/bin/git").stat().st_ino
    assert list((coded[1] / ".rethaw/lib/rethaw/guest/__pycache__").glob("guestd.*.pyc"))
    assert await store.compose(image, code) == coded
    assert await store.rootfs(coded[0]) == coded[1]
    assert await store.rootfs("0" * 64) is None


async def test_two_that_want_the_same_image_build_it_once(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    async def perform(spec: ImageSpec, number: int, below: steps.Below, rootfs: Path, *_: object) -> None:
        made.append(rootfs)
        await asyncio.sleep(0.3)
        (rootfs / "etc").mkdir(parents=True)

    monkeypatch.setattr(steps, "perform", perform)
    told: list[str] = []
    spec = ImageSpec(apt=("jq",))
    one, two = await asyncio.gather(store.ensure(spec, told.append), store.ensure(spec, told.append))
    assert one == two
    assert len(made) == 1
    assert any("waiting for somebody else" in line for line in told)


@pytest.mark.parametrize(
    "spec", [ImageSpec(apt=("no-such-package-anywhere",)), ImageSpec(pip=("no-such-dist-xyzzy==1",))]
)
async def test_a_failing_step_shows_its_last_lines_and_leaves_nothing(store: ImageStore, spec: ImageSpec) -> None:
    home = (await store.ensure(ImageSpec(), quiet)).rootfs.parent.parent
    before = {p.name for p in home.iterdir() if not p.name.endswith(".lock")}
    with pytest.raises(ImageError, match="no-such-"):
        await store.ensure(spec, quiet)
    assert {p.name for p in home.iterdir() if not p.name.endswith(".lock")} == before


async def test_a_build_that_was_killed_is_done_again(store: ImageStore) -> None:
    image = await store.ensure(ImageSpec(), quiet)
    home = image.rootfs.parent.parent
    faults.configure("images.made=raise")
    try:
        with pytest.raises(RethawError):
            await store.compose(image)
    finally:
        faults.configure("")
    digest, _ = await store.compose(image)
    # What a killed process leaves, and is found by the next one.
    (home / f".new-{digest}-dead/rootfs").mkdir(parents=True)
    (home / digest / "manifest.json").unlink()
    assert await store.rootfs(digest) is None
    assert (await store.compose(image))[0] == digest
    assert not list(home.glob(".new-*"))


async def test_a_cancelled_build_leaves_nothing(store: ImageStore) -> None:
    home = (await store.ensure(ImageSpec(), quiet)).rootfs.parent.parent
    started = asyncio.Event()
    task = asyncio.create_task(
        store.ensure(ImageSpec(apt=("jq",)), lambda line: started.set() if "apt" in line else None)
    )
    await asyncio.wait_for(started.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 30)
    assert not list(home.glob(".new-*"))
    assert str(home) not in Path("/proc/self/mounts").read_text()


async def test_pruning_keeps_what_is_needed_and_the_last_used(store: ImageStore, tmp_path: Path) -> None:
    image = await store.ensure(ImageSpec(), quiet)
    digests: list[str] = []
    for n in range(3):
        code = archive(tmp_path / f"{n}.tar.gz")
        code.write_bytes(code.read_bytes() + bytes(n))
        digests.append((await store.compose(image, code))[0])
        home = image.rootfs.parent.parent / digests[-1] / "manifest.json"
        os.utime(home, (1_000_000 + n, 1_000_000 + n))
    assert await store.prune({digests[0]}, spare=1) == [digests[1]]
    assert await store.rootfs(digests[0]) is not None
    assert await store.rootfs(digests[2]) is not None
    assert await store.rootfs(digests[1]) is None


async def test_python_packages_work_inside(store: ImageStore) -> None:
    image = await store.ensure(ImageSpec(pip=("idna", "charset-normalizer")), quiet)
    program = "import idna, charset_normalizer; print(idna.__file__, idna.__cached__)"
    argv = ["chroot", str(image.rootfs), "/usr/bin/python3", "-c", program]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)  # noqa: ASYNC221
    where, _, cached = done.stdout.strip().partition(" ")
    assert where.startswith("/usr/local/lib/python3.11/dist-packages/idna"), done.stderr
    assert (image.rootfs / cached.lstrip("/")).exists()
    script = image.rootfs / "usr/local/bin/normalizer"
    assert script.read_text().startswith("#!/usr/bin/python3\n")
    assert os.access(script, os.X_OK)
    base = await store.ensure(ImageSpec(), quiet)
    assert not (base.rootfs / "usr/local/bin/normalizer").exists()
