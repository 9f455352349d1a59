"""The store of root filesystems.

DATA/images/DIGEST/rootfs/        a complete tree
DATA/images/DIGEST/manifest.json  what it is made of; written last, so its presence means "complete"
DATA/images/specs/DIGEST.json     the spec of an image that was built
DATA/images/.DIGEST.lock          held while DIGEST is built
DATA/images/.new-DIGEST-*/        being built; garbage once the lock is free
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rethaw.images import archive, build, guest, oci, places, runtime, steps
from rethaw.images.spec import all_steps, check, layers, runtime_digest, spec_digest
from rethaw.model import faults
from rethaw.model.errors import ImageError, RethawError
from rethaw.model.image_types import ImageSpec

log = logging.getLogger("rethaw.images")

Progress = Callable[[str], None]
BASE_ENV = {"LANG": "C.UTF-8"}


@dataclass(frozen=True)
class BuiltImage:
    """An image that is there. `digest`: of its spec; `rootfs`: its tree, read-only; `env`: for everything inside."""

    digest: str
    rootfs: Path
    env: dict[str, str]
    suite: str = "bookworm"
    workdir: str | None = None  # made where it is missing
    plain: ImageSpec | None = None  # with anything on its base: the base, whose python3 may be executed on the host
    runtime: Path | None = None  # the tree with the interpreter that it is given, if it has no Debian below


class ImageStore:
    """Builds and keeps trees under `data_dir`/images, or RETHAW_IMAGES when that is set (several servers may share it)."""

    def __init__(self, data_dir: Path) -> None:
        elsewhere = os.environ.get("RETHAW_IMAGES")
        self._home = Path(elsewhere) if elsewhere else data_dir.absolute() / "images"
        self._blobs = data_dir.absolute() / "code"  # uploads, by digest
        self._guest: tuple[str, dict[str, bytes]] | None = None
        self._code: dict[Path, tuple[tuple[int, int, int], str]] = {}

    @property
    def home(self) -> Path:
        """Where the trees are."""
        return self._home

    async def ensure(self, spec: ImageSpec, progress: Progress, *, record: bool = True) -> BuiltImage:
        """The image of `spec`, built when it is not there: about 20 s, once, whoever else asks meanwhile. `record`: somebody
        wants it, and not only another image.

        Raises ImageError with the last lines of the step that failed; nothing is left behind then.
        """
        check(spec)
        digests = layers(spec)
        rootfs, first = None, len(digests)
        while rootfs is None and first > 0:  # the highest layer that is there
            first -= 1
            rootfs = await self.rootfs(digests[first])
        if rootfs is None:
            rootfs = await self._base(spec, digests[0], progress)
        for number in range(first, len(digests) - 1):
            rootfs = await self._step(spec, number, digests[number + 1], rootfs, progress)
        if record:
            await asyncio.to_thread(self._record, spec)
        plain = ImageSpec(suite=spec.suite) if len(digests) > 1 else None
        runtime_ = await self.runtime(spec.suite, progress) if spec.oci is not None else None
        env = {**BASE_ENV, **spec.env}
        return BuiltImage(spec_digest(spec), rootfs, env, spec.suite, spec.workdir, plain, runtime_)

    async def runtime(self, suite: str, progress: Progress) -> Path:
        """The tree that has the private interpreter (`images.runtime`); about 15 s, once."""
        digest = runtime_digest(suite)
        known = await self.rootfs(digest)
        if known is not None:
            return known

        async def make(rootfs: Path) -> None:
            await runtime.make(suite, rootfs, progress)

        return await self._build(digest, {"kind": "runtime", "suite": suite}, make, progress)

    def _record(self, spec: ImageSpec) -> None:
        """Remember what an image is made of, for those who list and remove images."""
        path = self.records / f"{spec_digest(spec)}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            fresh = path.with_name(f".{path.name}.{os.getpid()}")
            fresh.write_text(spec.model_dump_json())
            fresh.rename(path)

    @property
    def records(self) -> Path:
        """DIGEST.json for each image that was built, its spec."""
        return self._home / "specs"

    async def remove(self, digests: Sequence[str]) -> None:
        """Take trees away; one that is being built is waited for."""
        for digest in digests:
            async with self._locked(digest, log.debug):
                await asyncio.to_thread(self._take_away, digest)

    def _take_away(self, digest: str) -> None:
        home = self._home / digest
        # The manifest goes first: a tree half removed must not look complete.
        (home / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(home, ignore_errors=True)
        (self._home / f".{digest}.lock").unlink(missing_ok=True)

    async def _step(self, spec: ImageSpec, number: int, digest: str, below: Path, progress: Progress) -> Path:
        async def make(rootfs: Path) -> None:
            private = await self.runtime(spec.suite, progress) if spec.oci is not None else None
            await steps.perform(spec, number, steps.Below(below, private), rootfs, self._blobs, progress)

        about = {"kind": "step", "suite": spec.suite, "step": all_steps(spec)[number].model_dump(mode="json")}
        return await self._build(digest, about, make, progress)

    async def _base(self, spec: ImageSpec, digest: str, progress: Progress) -> Path:
        if spec.oci is not None:
            return await self._oci(spec.oci, digest, progress)

        async def make(rootfs: Path) -> None:
            progress(f"building the base image {digest[:12]} (Debian {spec.suite}), once")
            await build.debian(spec.suite, rootfs, progress)

        return await self._build(digest, {"kind": "base", "suite": spec.suite}, make, progress)

    async def _oci(self, blob: str, digest: str, progress: Progress) -> Path:
        async def make(rootfs: Path) -> None:
            source = self._blobs / f"{blob}.tar.gz"
            if not source.is_file():
                raise ImageError(f"the image {blob[:12]} is not on this node", remedy="start the agent again")
            progress(f"unpacking the image {blob[:12]}")
            await asyncio.to_thread(oci.unpack, source, rootfs, rootfs.with_name("layers"), progress)

        return await self._build(digest, {"kind": "oci", "blob": blob}, make, progress)

    async def compose(self, image: BuiltImage, code: Path | None = None) -> tuple[str, Path]:
        """What a sandbox boots: `image`, the guest's modules, and the archive `code` (tar.gz) under /app.

        Returns its digest and tree; about 0.3 s the first time, then nothing.
        """
        contents_digest, contents = await self._guest_files()
        code_digest = await asyncio.to_thread(self._code_digest, code) if code is not None else ""
        own = f"composed 1 {image.digest} {contents_digest} {code_digest}"
        if image.runtime is not None:
            own += f" {image.runtime.parent.name} {hashlib.sha256(guest.PRIVATE_SCRIPT).hexdigest()}"
        digest = hashlib.sha256(own.encode()).hexdigest()
        known = await self.rootfs(digest)
        if known is not None:
            return digest, known

        async def make(rootfs: Path) -> None:
            await build.link_copy(image.rootfs, rootfs)
            private = image.runtime is not None
            await asyncio.to_thread(guest.install, contents, rootfs, guest.PRIVATE_SCRIPT if private else guest.SCRIPT)
            if image.runtime is not None:
                await build.link_copy(image.runtime / runtime.HOME, rootfs / runtime.HOME)
                await build.compile_apart(image.runtime, rootfs, rootfs / guest.LIB)
            elif image.plain is None:
                await build.byte_compile(rootfs, rootfs / guest.LIB)
            else:
                trusted = await self.ensure(image.plain, log.debug, record=False)
                await build.compile_apart(trusted.rootfs, rootfs, rootfs / guest.LIB)
            if image.workdir is not None:
                await asyncio.to_thread(places.inside, rootfs, image.workdir)
            if code is not None:
                fresh = rootfs.with_name("app")
                await asyncio.to_thread(archive.extract, code, fresh)
                await asyncio.to_thread(places.merge, fresh, rootfs, "app")
                await asyncio.to_thread(shutil.rmtree, fresh)

        about = {
            "kind": "composed",
            "image": image.digest,
            "tree": image.rootfs.parent.name,
            "guest": contents_digest,
            "code": code_digest,
        }
        return digest, await self._build(digest, about, make, log.debug)

    async def _guest_files(self) -> tuple[str, dict[str, bytes]]:
        if self._guest is None:
            contents = await asyncio.to_thread(guest.files)
            self._guest = guest.digest(contents), contents
        return self._guest

    def _code_digest(self, code: Path) -> str:
        try:
            stat = code.stat()
            state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            known = self._code.get(code)
            if known is not None and known[0] == state:
                return known[1]
            with code.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ImageError(f"the code archive {code} cannot be read: {error}", remedy="upload it again") from None
        self._code[code] = (state, digest)
        return digest

    async def rootfs(self, digest: str) -> Path | None:
        """The tree of a digest, if it is here; counts as a use of it."""
        home = self._home / digest

        def look() -> Path | None:
            try:
                os.utime(home / "manifest.json")
            except OSError:
                return None
            return home / "rootfs"

        return await asyncio.to_thread(look)

    async def base(self, digest: str) -> tuple[str, Path] | None:
        """Digest and tree of the image that the tree `digest` was composed from; None when it was not. The tree itself may be
        gone: what was made of it is known by them."""

        def look() -> tuple[str, Path] | None:
            try:
                about = json.loads((self._home / digest / "manifest.json").read_text())
                image = str(about["tree"])
            except (OSError, ValueError, KeyError, TypeError):
                return None
            return image, self._home / image / "rootfs"

        return await asyncio.to_thread(look)

    # ------------------------------------------------------------------ building

    async def _build(
        self, digest: str, about: dict[str, Any], make: Callable[[Path], Awaitable[None]], progress: Progress
    ) -> Path:
        async with self._locked(digest, progress):
            known = await self.rootfs(digest)
            if known is not None:
                return known
            await asyncio.to_thread(self._remove_leftovers, digest)
            temporary = Path(tempfile.mkdtemp(prefix=f".new-{digest}-", dir=self._home))
            try:
                temporary.chmod(0o755)
                started = time.monotonic()
                await make(temporary / "rootfs")
                faults.point("images.made")
                size = await asyncio.to_thread(_own_bytes, temporary / "rootfs")
                manifest = {
                    **about,
                    "digest": digest,
                    "own_bytes": size,
                    "built_s": round(time.monotonic() - started, 1),
                }
                await asyncio.to_thread(_finish, temporary, self._home / digest, manifest)
            except BaseException as error:
                await asyncio.to_thread(shutil.rmtree, temporary, True)
                if isinstance(error, OSError) and not isinstance(error, RethawError):
                    raise ImageError(
                        f"image {digest[:12]} could not be built: {error}", remedy="free some space"
                    ) from error
                raise
            progress(f"image {digest[:12]} is ready: {size / 1e6:.0f} MB of its own in {manifest['built_s']}s")
            return self._home / digest / "rootfs"

    @contextlib.asynccontextmanager
    async def _locked(self, digest: str, progress: Progress) -> AsyncGenerator[None]:
        await asyncio.to_thread(self._home.mkdir, parents=True, exist_ok=True)
        fd = os.open(self._home / f".{digest}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            told = False
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not told:
                        progress(f"waiting for somebody else who builds {digest[:12]}")
                        told = True
                    await asyncio.sleep(0.05)
            yield
        finally:
            os.close(fd)

    def _remove_leftovers(self, digest: str) -> None:
        for path in self._home.glob(f".new-{digest}-*"):
            shutil.rmtree(path, ignore_errors=True)

    async def prune(self, keep: set[str], spare: int = 4) -> list[str]:
        """Remove trees that nobody in `keep` (digests of trees that sandboxes or snapshots need) names, except the
        `spare` most recently used composed ones and the layers that all these stand on; their digests."""
        return await asyncio.to_thread(self._prune, keep, spare)

    def _prune(self, keep: set[str], spare: int) -> list[str]:
        trees: list[tuple[float, str, str]] = []
        for path in self._home.glob("*/manifest.json"):
            with contextlib.suppress(OSError, ValueError):
                kind = str(json.loads(path.read_text()).get("kind"))
                trees.append((path.stat().st_mtime, path.parent.name, kind))
        trees.sort(reverse=True)
        spared: dict[str, int] = {}
        gone: list[str] = []
        for _, digest, kind in trees:
            if digest in keep:
                continue
            layer = "composed" if kind == "composed" else "layer"
            spared[layer] = spared.get(layer, 0) + 1
            if spared[layer] <= spare:
                continue
            self._take_away(digest)
            gone.append(digest)
        return gone


def _own_bytes(rootfs: Path) -> int:
    """Bytes that only this tree holds (files with one link)."""
    total = 0
    stack = [str(rootfs)]
    while stack:
        with os.scandir(stack.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    stack.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    stat = entry.stat(follow_symlinks=False)
                    if stat.st_nlink == 1:
                        total += stat.st_blocks * 512
    return total


def _finish(temporary: Path, home: Path, manifest: dict[str, Any]) -> None:
    """Durable, then visible in one step. Blocking."""
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if manifest["kind"] != "composed":
            # The others can be made anew from these in a moment.
            ctypes.CDLL(None, use_errno=True).syncfs(fd)
        if home.exists():
            shutil.rmtree(home)
        temporary.rename(home)
        os.fsync(fd)
    finally:
        os.close(fd)
