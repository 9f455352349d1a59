"""What this node knows of what is in the tier, in small files, so that a crash costs no more than one upload.

    REMOTE/objects/OBJECT.json    {"packs": {pack: [[object_offset, pack_offset, length], ...]}}, after its upload
    REMOTE/snapshots/SNAPSHOT     empty: its record is up
    REMOTE/owner                  this node's id as the owner of a tier, unless it is given one

Nothing here is synced, and nothing is missed: a file that is lost, empty or half-written stands for an upload that is
made again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rethaw.snapshots.packing import Extent, cover, gaps

log = logging.getLogger("rethaw.snapshots")


def write_small(path: Path, data: bytes) -> None:
    """Whole or not at all, as far as a running system sees it. Not synced."""
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def own_id(path: Path) -> str:
    """The id in `path`, made there when there is none. Lost with it."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch(r"[0-9a-f]{32}", found := path.read_text()):
            return found
    made = os.urandom(16).hex()
    write_small(path, made.encode())
    return made


class Places:
    """Objects that are up with the packs they hold, and snapshots whose records are up. One event loop uses it."""

    def __init__(self, state_dir: Path) -> None:
        self._objects_dir = state_dir / "objects"
        self._snapshots_dir = state_dir / "snapshots"
        self._objects: dict[str, dict[str, list[Extent]]] = {}  # object -> pack -> extents
        self._packs: dict[str, set[str]] = {}  # pack -> objects
        self._whole: dict[str, tuple[Extent, ...]] = {}  # packs that are known to be up as a whole
        self._up: set[str] = set()

    def load(self) -> None:
        """Read what an earlier process knew. Raises OSError."""
        for folder in (self._objects_dir, self._snapshots_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._objects_dir.iterdir():
            try:
                if path.name.startswith("."):
                    raise ValueError("left by a crash")
                name = f"objects/{path.name.removesuffix('.json')}"
                found = cast("dict[str, Any]", json.loads(path.read_bytes()))["packs"]
                packs = {str(p): [Extent(name, *map(int, e)) for e in extents] for p, extents in found.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                log.info("%s is forgotten (%s); what it says is uploaded again", path, error)
                path.unlink(missing_ok=True)
                continue
            self._remember(name, packs)
        self._up = {path.name for path in self._snapshots_dir.iterdir() if not path.name.startswith(".")}

    # ------------------------------------------------------------------ packs

    def extents(self, pack: str) -> list[Extent]:
        """All that is known of a pack; may overlap."""
        return [e for name in self._packs.get(pack, ()) for e in self._objects[name][pack]]

    def cover(self, pack: str, size: int) -> tuple[Extent, ...] | None:
        """Where the whole pack is; None while some of it is nowhere."""
        known = self._whole.get(pack)
        if known is None and (found := cover(self.extents(pack), 0, size)) is not None:
            known = self._whole[pack] = tuple(found)
        return known

    def gaps(self, pack: str, size: int, more: Iterable[tuple[int, int]] = ()) -> list[tuple[int, int]]:
        """(offset, length) of what is neither up nor in `more`."""
        if pack in self._whole:
            return []
        return gaps(size, [*((e.pack_offset, e.length) for e in self.extents(pack)), *more])

    def add(self, name: str, packs: Mapping[str, Sequence[Extent]]) -> None:
        """The object `name` is up and holds this."""
        merged = {pack: list(extents) for pack, extents in self._objects.get(name, {}).items()}
        for pack, extents in packs.items():
            merged[pack] = sorted({*merged.get(pack, ()), *extents}, key=lambda e: e.pack_offset)
        self._remember(name, merged)
        text = json.dumps({"packs": {pack: [e[1:] for e in extents] for pack, extents in merged.items()}})
        try:
            write_small(self._object_file(name), text.encode())
        except OSError as error:  # uploading it again and again would be worse
            log.warning("that %s is uploaded is remembered in memory only: %s", name, error)

    def learn(self, packs: Mapping[str, Sequence[Extent]]) -> None:
        """Take over where packs of another node are, from a snapshot's record, so that they are not uploaded again."""
        objects: dict[str, dict[str, list[Extent]]] = {}
        for pack, extents in packs.items():
            for extent in extents:
                objects.setdefault(extent.object, {}).setdefault(pack, []).append(extent)
        for name, found in objects.items():
            self.add(name, found)

    def forget(self, name: str) -> bool:
        """The object `name` is not there any more. Whether it was known."""
        packs = self._objects.pop(name, None)
        for pack in packs or ():
            self._whole.pop(pack, None)
            self._packs[pack].discard(name)
            if not self._packs[pack]:
                del self._packs[pack]
        self._object_file(name).unlink(missing_ok=True)
        return packs is not None

    def _remember(self, name: str, packs: dict[str, list[Extent]]) -> None:
        self._objects[name] = packs
        for pack in packs:
            self._packs.setdefault(pack, set()).add(name)

    def _object_file(self, name: str) -> Path:
        return self._objects_dir / f"{name.rpartition('/')[2]}.json"

    # ------------------------------------------------------------------ snapshots

    def is_up(self, snapshot: str) -> bool:
        return snapshot in self._up

    def set_up(self, snapshot: str) -> None:
        self._up.add(snapshot)
        try:
            (self._snapshots_dir / snapshot).touch(mode=0o600)
        except OSError as error:
            log.warning("that %s is uploaded is remembered in memory only: %s", snapshot, error)

    def set_down(self, snapshot: str) -> None:
        self._up.discard(snapshot)
        with contextlib.suppress(FileNotFoundError):
            (self._snapshots_dir / snapshot).unlink()
