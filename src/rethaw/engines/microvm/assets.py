"""What all microVMs of a machine share, made once and named by digest: a kernel, its initramfs, disks of images.

DIRECTORY/kernel-PACKAGE/vmlinuz, initramfs      from Debian's cloud kernel and busybox
DIRECTORY/kvm.json                               whether guests run by KVM here, see `accelerators`
DIRECTORY/blank-MIB.ext4                         an empty disk, sparse
DIRECTORY/image-DIGEST-PLACE.ext4                an image's root filesystem, sparse
DIRECTORY/layer-DIGEST-PLACE.ext4                what a tree has beyond the image it was made from: guestd, the agent's code
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

from rethaw.engines.base import Base, SandboxSpec
from rethaw.engines.microvm import initramfs
from rethaw.model.errors import EngineError, EngineUnusable

KERNEL, BUSYBOX = "linux-image-cloud-amd64", "busybox-static"
REMEDY = "apt-get update; apt-get install e2fsprogs qemu-system-x86"
_STEP_S = 600.0
_SLACK = 64 << 20  # of an image's disk beyond its files: nobody writes there, but mke2fs must be at ease
_FILES = 200_000  # that a disk takes at least; each is a quarter of a KiB
_FILE_BYTES = 256
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
        self.directory = directory
        self._kernel: Kernel | None = None

    async def kernel(self) -> Kernel:
        """Raises EngineUnusable when its packages cannot be had."""
        if self._kernel is None:
            self._kernel = await asyncio.to_thread(self._find_kernel)
        return self._kernel

    def _find_kernel(self) -> Kernel:
        target = self.directory / f"kernel-{initramfs.digest()}"
        with _made(target) as place:
            if place is not None:
                _make_kernel(place)
        digest = hashlib.sha256()
        for name in ("vmlinuz", "initramfs"):
            digest.update((target / name).read_bytes())
        return Kernel(target / "vmlinuz", target / "initramfs", digest.hexdigest())

    async def image(self, spec: SandboxSpec) -> tuple[Path, Path]:
        """Two disks of the image of `spec`: its base, and what comes on top."""
        base = spec.base or Base(spec.image_digest, spec.rootfs)
        below = self._disk_name("image", base.digest, base.rootfs)
        above = self._disk_name("layer", spec.image_digest, spec.rootfs)

        def make() -> tuple[Path, Path]:
            lower = self._disk(below, lambda path: _make_image(path, base.rootfs))
            upper = self._disk(above, lambda path: _make_layer(path, spec.rootfs, base.rootfs))
            for path in (lower, upper):  # it is in use
                os.utime(path)
            return lower, upper

        return await asyncio.to_thread(make)

    @staticmethod
    def _disk_name(kind: str, digest: str, rootfs: Path) -> str:
        """Bound to the place as well, since only tests have two trees of one digest."""
        place = hashlib.sha256(str(rootfs).encode()).hexdigest()[:8]
        return f"{kind}-{digest}-{place}.ext4"

    async def prune(self, keep: set[str], spare: int = 4) -> None:
        """Remove disks of images not in `keep` (digests of whole trees), but the `spare` most recently used ones of each
        kind; bases only once there is no disk on top of any."""

        def look() -> None:
            found = {kind: sorted(self.directory.glob(f"{kind}-*.ext4"), key=_age) for kind in ("image", "layer")}
            dead = [path for path in found["layer"] if path.name.split("-")[1] not in keep][spare:]
            for path in dead:
                path.unlink(missing_ok=True)
            if not set(found["layer"]) - set(dead):
                for path in found["image"][spare:]:
                    path.unlink(missing_ok=True)

        await asyncio.to_thread(look)

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
        target = self.directory / name
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
    sizes = [_blocks(entry) for entry in rootfs.rglob("*")]
    files = max(_FILES, len(sizes) + 1024)
    size = (sum(sizes) * 5 // 4 + (files - _FILES) * _FILE_BYTES + _SLACK) // MIB * MIB
    with path.open("wb") as f:
        f.truncate(size)
    options = ["-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard", "-m", "0", "-N", str(files)]
    _run(["mke2fs", "-q", "-t", "ext4", *options, "-d", str(rootfs), str(path)])
    path.chmod(0o444)


def _make_layer(path: Path, rootfs: Path, base: Path) -> None:
    """A disk with what `rootfs` has beyond `base`: every file that is not the same one as there."""
    with tempfile.TemporaryDirectory(prefix=".layer-", dir=path.parent) as place:
        tree = Path(place) / "tree"
        tree.mkdir()
        if rootfs != base:
            _differences(rootfs, base, tree)
        _make_image(path, tree)


def _differences(rootfs: Path, base: Path, tree: Path) -> bool:
    """Copy them into the empty directory `tree`; whether there were any."""
    some = False
    with os.scandir(rootfs) as entries:
        for entry in entries:
            stat, target, there = entry.stat(follow_symlinks=False), tree / entry.name, base / entry.name
            known = there.lstat() if os.path.lexists(there) else None
            if entry.is_dir(follow_symlinks=False):
                target.mkdir()
                if not _differences(Path(entry.path), there, target) and known is not None:
                    target.rmdir()
                    continue
            elif known is not None and (known.st_dev, known.st_ino) == (stat.st_dev, stat.st_ino):
                continue
            else:
                shutil.copy2(entry.path, target, follow_symlinks=False)
            some = True
            os.chown(target, stat.st_uid, stat.st_gid, follow_symlinks=False)
            if not entry.is_symlink():
                target.chmod(stat.st_mode & 0o7777)
    return some


def disk_id(path: Path) -> str:
    """What tells a disk from any other that was ever made: the UUID of its file system."""
    with path.open("rb") as f:
        f.seek(1024 + 0x68)
        return f.read(16).hex()


def _age(path: Path) -> float:
    return -path.stat().st_mtime


def _blocks(path: Path) -> int:
    return -(-path.lstat().st_size // 4096) * 4096
