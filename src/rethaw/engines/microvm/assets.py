"""What all microVMs of a machine share, made once and named by digest: a kernel, its initramfs, disks of images.

DIRECTORY/kernel-PACKAGE/vmlinuz, initramfs      from Debian's cloud kernel and busybox
DIRECTORY/blank-MIB.ext4                         an empty disk, sparse
DIRECTORY/image-DIGEST.ext4                      an image's root filesystem, sparse
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from rethaw.engines.microvm import initramfs
from rethaw.model.errors import EngineError, EngineUnusable

KERNEL, BUSYBOX = "linux-image-cloud-amd64", "busybox-static"
REMEDY = "apt-get update; apt-get install e2fsprogs qemu-system-x86"
_STEP_S = 600.0
_SLACK = 64 << 20  # of an image's disk beyond its files: nobody writes there, but mke2fs must be at ease
MIB = 1 << 20


@dataclass(frozen=True)
class Kernel:
    """`digest` covers kernel and initramfs: a snapshot can only go on with the same."""

    image: Path
    initramfs: Path
    digest: str


def _run(argv: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            argv, cwd=cwd, capture_output=True, text=True, timeout=_STEP_S, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise EngineUnusable(f"{argv[0]} is not installed", remedy=REMEDY) from None
    except subprocess.TimeoutExpired:
        raise EngineError(f"{argv[0]} took longer than {_STEP_S:.0f} s", remedy="try again") from None
    if done.returncode != 0:
        last = " ".join((done.stderr or done.stdout).split())[-400:]
        raise EngineError(f"{argv[0]} failed: {last}", remedy="correct it and try again")
    return done.stdout


@contextlib.contextmanager
def _made(target: Path) -> Generator[Path | None]:
    """A path to make `target` at, which takes its place afterwards; None when it is there. One maker at a time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(target.parent / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
            return
        place = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
        try:
            yield place / target.name
            (place / target.name).rename(target)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(lock)


class Assets:
    """Those in `directory`; several processes may share it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kernel: Kernel | None = None

    async def kernel(self) -> Kernel:
        """Raises EngineUnusable when its packages cannot be had."""
        if self._kernel is None:
            self._kernel = await asyncio.to_thread(self._find_kernel)
        return self._kernel

    def _find_kernel(self) -> Kernel:
        target = self._directory / f"kernel-{initramfs.digest()}"
        with _made(target) as place:
            if place is not None:
                _make_kernel(place)
        digest = hashlib.sha256()
        for name in ("vmlinuz", "initramfs"):
            digest.update((target / name).read_bytes())
        return Kernel(target / "vmlinuz", target / "initramfs", digest.hexdigest())

    async def image(self, digest: str, rootfs: Path) -> Path:
        """The disk of an image whose files are in `rootfs`."""
        name = hashlib.sha256(f"{digest} {rootfs}".encode()).hexdigest()[:32]
        return await asyncio.to_thread(self._disk, f"image-{name}.ext4", lambda path: _make_image(path, rootfs))

    async def blank(self, size: int) -> Path:
        """An empty disk of `size` bytes."""

        def make(path: Path) -> None:
            with path.open("wb") as f:
                f.truncate(size)
            # No journal: a snapshot has the disk as it is, and what was not saved is gone with the machine.
            options = ["-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard", "-m", "0"]
            _run(["mke2fs", "-q", "-t", "ext4", *options, str(path)])

        return await asyncio.to_thread(self._disk, f"blank-{size // MIB}.ext4", make)

    def _disk(self, name: str, make: Callable[[Path], None]) -> Path:
        target = self._directory / name
        if not target.exists():
            with _made(target) as place:
                if place is not None:
                    make(place)
        return target


def _make_kernel(place: Path) -> None:
    place.mkdir()
    work = place / "work"
    work.mkdir()
    if shutil.which("apt-get") is None:
        raise EngineUnusable("the kernel of microVMs comes from Debian's packages, and this is no Debian")
    try:
        package = _download(work)
    except EngineError:  # the package lists are missing or of yesterday
        _run(["apt-get", "-q", "update"])
        package = _download(work)
    for archive in work.glob("*.deb"):
        _run(["dpkg-deb", "-x", str(archive), str(work / archive.name.partition("_")[0])])
    tree = work / package
    (found,) = (tree / "boot").glob("vmlinuz-*")
    shutil.copyfile(found, place / "vmlinuz")
    (place / "vmlinuz").chmod(0o444)  # QEMU's user reads it by a descriptor
    busybox = next(path for path in (work / BUSYBOX).rglob("busybox") if path.is_file() and path.parent.name == "bin")
    (place / "initramfs").write_bytes(initramfs.base(tree, busybox.read_bytes()))
    shutil.rmtree(work)


def _download(work: Path) -> str:
    """Fetch kernel and busybox; the name of the kernel's package. Raises EngineError."""
    shown = _run(["apt-cache", "depends", "--no-recommends", "--no-suggests", KERNEL])
    package = next((line.split()[-1] for line in shown.splitlines() if "Depends: linux-image-" in line), None)
    if package is None:
        raise EngineError(f"apt knows no package {KERNEL}", remedy="apt-get update")
    _run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package, BUSYBOX], cwd=work)
    return package


def _make_image(path: Path, rootfs: Path) -> None:
    if not rootfs.is_dir():
        raise EngineError(f"the root filesystem {rootfs} is not there", remedy="build the image again")
    used = sum(_blocks(entry) for entry in rootfs.rglob("*"))
    size = (used * 5 // 4 + _SLACK) // MIB * MIB
    with path.open("wb") as f:
        f.truncate(size)
    options = ["-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard", "-m", "0", "-N", "200000"]
    _run(["mke2fs", "-q", "-t", "ext4", *options, "-d", str(rootfs), str(path)])
    path.chmod(0o444)


def _blocks(path: Path) -> int:
    return -(-path.lstat().st_size // 4096) * 4096
