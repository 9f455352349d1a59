"""The node's snapshots: staged in memory, compared with what is there, written durably, read back.

    DATA/snapshots/store/PACK.pack             frames that one save added, see `pack`
    DATA/snapshots/store/SNAPSHOT.manifest     where each page of a snapshot lies, see `manifest`
    STAGING/SNAPSHOT/NAME                      raw sections, see `staging`

A save writes its pack, then its manifest, each synced and renamed into place, the pack read back and checked before. The
database row comes after that (the saver's business), so a row always has its files. A pack goes once no manifest names it
and no save in progress counts on it. One process owns the directory, so both are kept in its memory, under one lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rethaw.model import faults
from rethaw.model.errors import RethawError, Unavailable
from rethaw.model.ids import new_id
from rethaw.model.types import MIB, Section, SnapshotInfo
from rethaw.snapshots import decode, encode, manifest, transfer
from rethaw.snapshots.books import Books
from rethaw.snapshots.decode import PackDamaged, Packs
from rethaw.snapshots.encode import Encoded, Known
from rethaw.snapshots.files import sync_directory, to_the_end, write_synced
from rethaw.snapshots.healing import Healer, healed, unusable
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.lazily import LAZY_FROM, Lazily, Loaded
from rethaw.snapshots.manifest import Manifest
from rethaw.snapshots.pack import Damaged, TooNew, digest, key_of
from rethaw.snapshots.pages import PAGE
from rethaw.snapshots.parents import Parents
from rethaw.snapshots.remote import Remote
from rethaw.snapshots.staging import Staging, default_budget, lazy_for, staging_for, storage_full
from rethaw.snapshots.uploads import Job

T = TypeVar("T")
log = logging.getLogger("rethaw.snapshots")
_THREADS = 4
_COLLECT_REMOTE_S = 3600.0  # it lists the bucket


@dataclass(frozen=True)
class Written:
    """A snapshot on disk. `path` is relative to the data directory; `stored_bytes` is what it added to the store."""

    path: str
    sections: tuple[Section, ...]
    digest: str
    stored_bytes: int
    raw_bytes: int


class SnapshotStore:
    """`staging_bytes`: the budget of staging (default: a quarter of memory). `kept_bytes`: how much raw, already durable
    data staging may keep for quick restores (oldest use goes first). `wait_s`: how long a capture waits for room.
    `lazy_from`: see `load_lazily`."""

    def __init__(
        self,
        data_dir: Path,
        *,
        keys: Keyring | None = None,
        staging_bytes: int | None = None,
        kept_bytes: int = 1024 * MIB,
        wait_s: float = 10.0,
        remote: Remote | None = None,
        lazy_from: int = LAZY_FROM,
    ) -> None:
        self._data = data_dir
        self._home = data_dir / "snapshots" / "store"
        self.keys = keys or Keyring()
        self.remote = remote
        self._pool = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="snapshots")
        self.packs = Packs(self.pack_path, self.keys)
        self._parents = Parents(self.packs, self._pool)
        self.staging = Staging(
            staging_for(data_dir),
            budget=staging_bytes or default_budget(),
            kept_bytes=kept_bytes,
            wait_s=wait_s,
            dropped=self._parents.raw_gone,
        )
        self._lazy_from = lazy_from
        self._lazily = Lazily(lazy_for(data_dir), self._home, self.keys, self.manifest_path)
        self._books = Books(self._remove_packs)
        self._healer = Healer(self.packs, self._books, self.manifest_path, self.pack_path)
        self._writing: set[str] = set()  # names of partial files
        self._first: dict[
            tuple[str, str], str
        ] = {}  # engine and image -> snapshot that new sessions of it are compared with
        self._loading: dict[str, tuple[asyncio.Lock, int]] = {}  # and how many want it
        self._collected = time.monotonic()

    # ------------------------------------------------------------ files

    def pack_path(self, pack: str) -> Path:
        return self._home / f"{pack}.pack"

    def manifest_path(self, snapshot: str) -> Path:
        return self._home / f"{snapshot}.manifest"

    def open(self) -> None:
        """Make the directories, empty staging, and read which snapshots need which packs. Blocking.

        Raises KeyMissing when a snapshot or a pack that it needs is encrypted with a key that is not configured.
        """
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._home.chmod(0o700)
        self.staging.open()
        self._lazily.sweep()
        for path in sorted(self._home.glob("[!.]*.manifest")):
            self._read_needs(path)
        for pack in self._books.packs():
            with contextlib.suppress(OSError, Damaged):
                if (key := key_of(self.pack_path(pack))) is not None:
                    self.keys.require(key, pack)

    def _read_needs(self, path: Path) -> None:
        """Note which packs the manifest `path` needs. Raises KeyMissing."""
        try:
            found, key = manifest.decode_head(manifest.read(path), path.stem)
        except FileNotFoundError:
            self._books.remove(path.stem)
            return
        except (Damaged, OSError) as error:
            log.warning("%s %s", path.name, error)
            if isinstance(error, OSError | TooNew):
                self._books.unread(path.stem)
            return
        if key is not None:
            self.keys.require(key, path.stem)
        self._books.add(path.stem, found.packs)
        if found.meta.get("parent") is None:
            self._first.setdefault(_kind(found.meta), path.stem)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self.staging.close()

    def _remove_packs(self, packs: Collection[str]) -> None:
        for pack in packs:
            self.packs.forget(pack)
            with contextlib.suppress(OSError):
                self.pack_path(pack).unlink()

    # ------------------------------------------------------------ staging

    async def stage(self, snapshot: str, need: int) -> Path:
        """An empty directory for a capture of about `need` bytes. Raises StorageFull when staging has no room."""
        return await self.staging.make(snapshot, need)

    def drop_staged(self, snapshot: str) -> None:
        """Forget staged files of `snapshot` (a failed save, or a snapshot that is not wanted any more)."""
        self.staging.drop(snapshot)

    def keep(self, snapshot: str) -> None:
        """The staged raw sections of a durable snapshot may stay for quick restores, within the budget."""
        self.staging.keep(snapshot)

    # ------------------------------------------------------------ write

    async def write(
        self, snapshot: str, sections: dict[str, Path], paged: Collection[str], meta: dict[str, Any]
    ) -> Written:
        """Make staged sections durable and verified. `paged`: names of those that consist of pages. `meta`: JSON that
        travels with the manifest; its `parent` (snapshot id or None) is what pages are compared with, without one it is
        the first snapshot of the same `image`.

        Raises StorageFull, SnapshotUnusable (what was read back differs) or OSError; then nothing is left on disk.
        """
        with self._books.pinned(meta.get("parent") or self._first.get(_kind(meta))) as wanted:
            former = await self._former(wanted)
            try:
                try:
                    written, encoded = await to_the_end(self._write, snapshot, sections, paged, meta, former)
                except PackDamaged as error:  # in a page of the former one that was wanted
                    log.warning("snapshot %s is not compared with %s: %s", snapshot, wanted, error)
                    written, encoded = await to_the_end(self._write, snapshot, sections, paged, meta, {})
            except asyncio.CancelledError:  # which may have come after the last step
                self._delete(snapshot)
                raise
        self._parents.remember(snapshot, encoded.known)
        if meta.get("parent") is None:
            self._first.setdefault(_kind(meta), snapshot)
        return written

    async def _former(self, wanted: str | None) -> dict[str, Known]:
        """What to compare with. A former snapshot that cannot be read costs space, not the save."""
        if wanted is None:
            return {}
        raw = self.staging.kept(wanted)
        if raw is not None:
            self.staging.use(wanted)
        try:
            found = await asyncio.to_thread(self._parents.get, wanted, lambda: self._manifest(wanted), raw)
            if not self._parents.knows(wanted):  # the next session of this image wants it too
                self._parents.remember(wanted, found, thin=True)
            return found
        except (RethawError, PackDamaged, OSError) as error:
            log.warning("the next snapshot is not compared with %s: %s", wanted, error)
            return {}
        finally:
            if raw is not None:
                self.done(wanted)

    def _write(
        self,
        snapshot: str,
        sections: dict[str, Path],
        paged: Collection[str],
        meta: dict[str, Any],
        former: dict[str, Known],
    ) -> tuple[Written, Encoded]:
        pack = new_id("pk")
        final = {"pack": self.pack_path(pack), "manifest": self.manifest_path(snapshot)}
        partial = {name: path.with_name(f".{path.name}") for name, path in final.items()}
        self._writing.update(path.name for path in partial.values())
        self._books.hold(pack)
        try:
            encoded = encode.write(
                snapshot,
                meta,
                {name: path for name, path in sections.items() if name in paged},
                {name: path for name, path in sections.items() if name not in paged},
                former,
                pack,
                partial["pack"],
                self.keys,
                self._pool,
                self._parents.read_pages,
                self._parents.first_slots,
            )
            faults.point("store.written")
            data = manifest.encode(encoded.manifest, self.keys)
            write_synced(partial["manifest"], data)
            manifest.decode(partial["manifest"].read_bytes(), snapshot, self.keys)
            faults.point("store.verified")
            partial["pack"].rename(final["pack"])
            faults.point("store.between")
            partial["manifest"].rename(final["manifest"])
            faults.point("store.renamed")
            sync_directory(self._home)
            self._books.add(snapshot, encoded.manifest.packs)
        except BaseException as error:
            for path in (final["manifest"], *partial.values(), final["pack"]):
                with contextlib.suppress(OSError):
                    path.unlink()
            if isinstance(error, Damaged):
                raise unusable(snapshot, f"pack {pack} {error}", f"{pack}.pack") from error
            if isinstance(error, OSError) and (full := storage_full(error, f"snapshot {snapshot} in {self._home}")):
                raise full from error
            raise
        finally:
            self._writing.difference_update(path.name for path in partial.values())
            self._books.let_go(pack)
        found = sorted((*encoded.manifest.pages, *encoded.manifest.blobs), key=lambda section: section.name)
        written = Written(
            path=str(final["manifest"].relative_to(self._data)),
            sections=tuple(Section(name=section.name, raw_bytes=section.raw_bytes) for section in found),
            digest=digest(data).hex(),
            stored_bytes=encoded.pack_bytes + len(data),
            raw_bytes=encoded.manifest.raw_bytes,
        )
        return written, encoded

    # ------------------------------------------------------------ read

    def _manifest(self, snapshot: str, expected: str | None = None) -> Manifest:
        """Raises SnapshotUnusable. `expected`: the digest of the file as committed."""
        path = self.manifest_path(snapshot)
        try:
            data = manifest.read(path)
            if expected is not None and digest(data).hex() != expected:
                raise Damaged("is damaged (its hash does not match)")
            return manifest.decode(data, snapshot, self.keys)
        except OSError as error:
            raise unusable(snapshot, f"{path.name} cannot be read ({error.strerror})", path.name) from error
        except Damaged as error:
            raise unusable(snapshot, f"{path.name} {error}", path.name) from error

    async def load(self, info: SnapshotInfo) -> dict[str, Path]:
        """Raw sections of `info`, ready for an engine. Call `done` when the engine has read them.

        Raises SnapshotUnusable naming snapshot and file, or StorageFull.
        """
        if (kept := self.staging.kept(info.id)) is not None:
            self.staging.use(info.id)
            return {s.name: kept / s.name for s in info.sections}
        faults.point("store.load")
        return await self._healed(info.id, lambda: self._read(info))

    async def load_lazily(self, info: SnapshotInfo, names: Collection[str]) -> Loaded:
        """As `load`, but sections among `names` that have `lazy_from` bytes or more are not read: unless they are here still,
        or FUSE is not."""
        large = {s.name for s in info.sections if s.name in names and s.raw_bytes >= self._lazy_from}
        if not large or self.staging.kept(info.id) is not None or not await self._lazily.ready(info.id):
            return Loaded(await self.load(info), {}, lambda: self.done(info.id))
        faults.point("store.load")
        return await self._healed(info.id, lambda: self._rest(info, large))

    async def _rest(self, info: SnapshotInfo, lazy: set[str]) -> Loaded:
        """All sections but those in `lazy`, whose packs are looked at all the same."""
        found = await asyncio.to_thread(self._manifest, info.id, info.digest)
        rest = replace(found, pages=[s for s in found.pages if s.name not in lazy])
        name = f"{info.id}.{secrets.token_hex(4)}"
        directory = await self.staging.make(name, rest.raw_bytes)
        try:
            await to_the_end(self._load, info.id, rest, directory)
            await to_the_end(self._look_at, info.id, found)
        except BaseException:
            self.staging.drop(name)
            raise
        sections = {s.name: directory / s.name for s in (*rest.pages, *rest.blobs)}
        given = {s.name: self._lazily.section(info, s.name, s.raw_bytes) for s in found.pages if s.name in lazy}
        return Loaded(sections, given, lambda: self.staging.drop(name))

    def _look_at(self, snapshot: str, found: Manifest) -> None:
        with self._books.pinned(snapshot):
            try:
                for ref in found.packs:
                    self.packs.get(ref)
            except PackDamaged as error:
                raise unusable(snapshot, str(error), f"{error.pack}.pack") from error

    async def close_lazy(self) -> None:
        """Before `close`: nothing is given lazily any more, and what maps such a file cannot read on."""
        await self._lazily.close()

    async def _read(self, info: SnapshotInfo) -> dict[str, Path]:
        return await self._raw(info.id, await asyncio.to_thread(self._manifest, info.id, info.digest))

    async def _raw(self, snapshot: str, found: Manifest) -> dict[str, Path]:
        """The sections in staging, in use. Callers that want the same at once share one copy."""
        names = [s.name for s in (*found.pages, *found.blobs)]
        async with self._one_load(snapshot):
            directory = self.staging.kept(snapshot)
            if directory is None:
                directory = await self.staging.make(snapshot, found.raw_bytes)
                self.staging.use(snapshot)
                try:
                    await to_the_end(self._load, snapshot, found, directory)
                except BaseException:
                    self.staging.done(snapshot)
                    self.staging.drop(snapshot)
                    raise
                self.staging.keep(snapshot)
            else:
                self.staging.use(snapshot)
        return {name: directory / name for name in names}

    @contextlib.asynccontextmanager
    async def _one_load(self, snapshot: str) -> AsyncGenerator[None]:
        """Loads of one snapshot take turns."""
        lock, waiting = self._loading.get(snapshot) or (asyncio.Lock(), 0)
        self._loading[snapshot] = (lock, waiting + 1)
        try:
            async with lock:
                yield
        finally:
            waiting = self._loading[snapshot][1] - 1
            if waiting:
                self._loading[snapshot] = (lock, waiting)
            else:
                del self._loading[snapshot]

    def _load(self, snapshot: str, found: Manifest, directory: Path) -> None:
        with self._books.pinned(snapshot):
            try:
                decode.load(
                    found, {s.name: directory / s.name for s in (*found.pages, *found.blobs)}, self.packs, self._pool
                )
            except PackDamaged as error:
                raise unusable(snapshot, str(error), f"{error.pack}.pack") from error
            except OSError as error:
                raise storage_full(error, f"snapshot {snapshot} in {directory}") or error from error

    def done(self, snapshot: str) -> None:
        """The engine has read what `load` gave."""
        self.staging.done(snapshot)

    def page(self, info: SnapshotInfo, section: str, number: int) -> bytes:
        """One page alone, 4096 bytes: one frame is read, or two when the page is a delta. Raises SnapshotUnusable."""
        found = self._manifest(info.id, info.digest)
        pages = next(s for s in found.pages if s.name == section)
        pack = int(pages.pack[number])
        if pack == manifest.ZERO:
            return bytes(PAGE)
        try:
            return self.packs.page(found.packs[pack], int(pages.slot[number]), found.packs)
        except PackDamaged as error:
            raise unusable(info.id, str(error), f"{error.pack}.pack") from error

    async def verify(self, info: SnapshotInfo) -> int:
        """Read every frame that `info` needs and check it; the bytes read. Raises SnapshotUnusable."""

        def look() -> int:
            found = self._manifest(info.id, info.digest)
            try:
                return decode.check(found, self.packs, self._pool) + self.manifest_path(info.id).stat().st_size
            except PackDamaged as error:
                raise unusable(info.id, str(error), f"{error.pack}.pack") from error

        return await self._healed(info.id, lambda: asyncio.to_thread(look))

    # ------------------------------------------------------------ a second place

    async def _healed(self, snapshot: str, read: Callable[[], Awaitable[T]]) -> T:
        return await healed(read, lambda file: self._healer.bring(self.remote, snapshot, file))

    async def upload(self, info: SnapshotInfo) -> None:
        """Returns once the second place has `info`, which need not have a row yet. Raises TierUnavailable."""
        if self.remote is None:
            raise Unavailable("no object store is configured", remedy="set bucket in [snapshots.s3] of rethaw.toml")
        await self.remote.uploader.upload(await self._job(self.remote, info))

    async def upload_later(self, info: SnapshotInfo) -> None:
        """The same in the background, if there is a second place."""
        if self.remote is not None:
            await self.remote.uploader.enqueue(await self._job(self.remote, info))

    async def _job(self, remote: Remote, info: SnapshotInfo) -> Job:
        found = await asyncio.to_thread(self._manifest, info.id)
        return remote.job(info, self.manifest_path(info.id), found.packs, self.pack_path)

    # ------------------------------------------------------------ one file

    async def export(self, info: SnapshotInfo, extra: dict[str, Any], target: Path) -> None:
        """Write `info` and all that a restore needs into one file, in clear (see `transfer`). Raises SnapshotUnusable,
        StorageFull."""
        sections = await self.load(info)
        paged = frozenset(s.name for s in (await asyncio.to_thread(self._manifest, info.id, info.digest)).pages)
        try:
            row = info.model_dump(mode="json")
            await asyncio.to_thread(transfer.pack_up, sections, paged, row, extra, target, self._pool)
        except OSError as error:
            raise storage_full(error, str(target)) or error from error
        finally:
            self.done(info.id)

    async def take_in(self, snapshot: str, source: Path) -> tuple[Written, transfer.Exported]:
        """Add what an exported file holds to the store as `snapshot`. Raises InvalidInput when the file is damaged."""
        staged = await self.stage(snapshot, source.stat().st_size)
        try:
            found = await asyncio.to_thread(transfer.unpack, source, staged, self._pool)
            sections = {path.name: path for path in staged.iterdir()}
            meta = {k: v for k, v in found.info.items() if k in ("engine", "engine_build", "cpu", "image", "clock")}
            written = await self.write(snapshot, sections, found.paged, {**meta, "id": snapshot, "parent": None})
        except BaseException as error:
            self.drop_staged(snapshot)
            if isinstance(error, OSError):
                raise storage_full(error, f"snapshot {snapshot}") or error from error
            raise
        self.keep(snapshot)
        return written, found

    # ------------------------------------------------------------ removal

    async def delete(self, snapshot: str) -> None:
        """Remove a snapshot, durable and staged, and the packs that only it needed."""
        self.drop_staged(snapshot)
        if self.remote is not None:
            await self.remote.uploader.forget(snapshot)
        await asyncio.to_thread(self._delete, snapshot)

    def _delete(self, snapshot: str) -> None:
        for kind, first in list(self._first.items()):
            if first == snapshot:
                del self._first[kind]
        with contextlib.suppress(OSError):
            self.manifest_path(snapshot).unlink()
        faults.point("store.unlinked")
        self._books.remove(snapshot)

    async def collect(self, live: Collection[str], grace_s: float) -> int:
        """Remove what died half-way: manifests of snapshots not in `live`, packs that nothing needs and partial files,
        all older than `grace_s`; the number of files. Safe beside saves: theirs are younger, or pinned."""
        removed = await asyncio.to_thread(self._collect, frozenset(live), grace_s)
        if self.remote is not None and time.monotonic() - self._collected > _COLLECT_REMOTE_S:
            self._collected = time.monotonic()
            await self.remote.uploader.collect(live)
        return removed

    def _collect(self, live: frozenset[str], grace_s: float) -> int:
        removed = 0
        for snapshot in self._books.unsure():
            self._read_needs(self.manifest_path(snapshot))
        for path in list(self._home.iterdir()):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime < grace_s:
                    continue
                if path.name in self._writing:
                    continue
                if path.name.startswith("."):
                    path.unlink()
                elif path.suffix == ".manifest" and path.stem not in live:
                    self._delete(path.stem)
                elif path.suffix == ".pack" and not self._books.used(path.stem):
                    self._remove_packs([path.stem])
                else:
                    continue
                removed += 1
        return removed

    def stored_bytes(self) -> int:
        """What the store takes on disk."""
        return sum(p.stat().st_size for p in self._home.iterdir())


def _kind(meta: dict[str, Any]) -> tuple[str, str]:
    """Snapshots whose pages are worth comparing."""
    return str(meta.get("engine")), str(meta.get("image"))
