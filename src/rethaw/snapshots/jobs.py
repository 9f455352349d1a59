"""Snapshots that wait for their upload, on disk, so that neither a long outage of the tier nor a crash loses any.

    REMOTE/jobs/NUMBER-SNAPSHOT.json    in the order of their numbers

Memory holds only the few that are next. Files are not synced: after a power cut the caller offers again what its catalog
says is not up.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

from rethaw.model.errors import InvalidInput
from rethaw.snapshots.places import write_small
from rethaw.snapshots.tiers.base import check_name

log = logging.getLogger("rethaw.snapshots")


@dataclass(frozen=True)
class PackFile:
    """A pack on this node's disk, complete and immutable."""

    id: str
    path: Path
    size: int


@dataclass(frozen=True)
class Job:
    """A snapshot to upload. `info`: its SnapshotInfo as JSON, kept as it is. `since`: monotonic, of this process."""

    snapshot: str
    manifest: Path
    packs: tuple[PackFile, ...]
    info: bytes
    since: float = field(default_factory=time.monotonic, compare=False)

    def __post_init__(self) -> None:
        for name in (self.snapshot, *(pack.id for pack in self.packs)):
            if "/" in check_name(name):
                raise InvalidInput(f"{name!r} is no id of a snapshot or pack", remedy="leave the slash out")


class JobFiles:
    """The queue. One event loop uses it."""

    def __init__(self, state_dir: Path) -> None:
        self._dir = state_dir / "jobs"
        self._numbers: dict[str, int] = {}  # of the snapshots that are in the queue, oldest first
        self._last = 0

    def load(self) -> None:
        """Find what an earlier process left. Raises OSError."""
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in sorted(self._dir.iterdir()):
            number, _, snapshot = path.name.removesuffix(".json").partition("-")
            if path.name.startswith(".") or not number.isdigit() or not snapshot:
                path.unlink(missing_ok=True)
                continue
            self._numbers[snapshot] = int(number)
            self._last = max(self._last, int(number))

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, snapshot: str) -> bool:
        return snapshot in self._numbers

    def add(self, job: Job) -> None:
        """Put `job` at the end, unless it is in the queue already. Raises OSError."""
        if job.snapshot in self._numbers:
            return
        self._last += 1
        value = {
            "snapshot": job.snapshot,
            "manifest": str(job.manifest),
            "packs": [[pack.id, str(pack.path), pack.size] for pack in job.packs],
            "info": base64.b64encode(job.info).decode(),
        }
        write_small(self._path(self._last, job.snapshot), json.dumps(value).encode())
        self._numbers[job.snapshot] = self._last

    def remove(self, snapshot: str) -> None:
        number = self._numbers.pop(snapshot, None)
        if number is not None:
            self._path(number, snapshot).unlink(missing_ok=True)

    def first(self, number: int, known: dict[str, Job]) -> list[Job]:
        """The `number` oldest; those in `known` are not read again."""
        found: list[Job] = []
        for snapshot in list(islice(self._numbers, number)):
            job = known.get(snapshot) or self._read(self._path(self._numbers[snapshot], snapshot))
            if job is None:
                self.remove(snapshot)
            else:
                found.append(job)
        return found

    def _path(self, number: int, snapshot: str) -> Path:
        return self._dir / f"{number:016}-{snapshot}.json"

    def _read(self, path: Path) -> Job | None:
        try:
            value = cast("dict[str, Any]", json.loads(path.read_bytes()))
            return Job(
                value["snapshot"],
                Path(value["manifest"]),
                tuple(PackFile(pack, Path(file), int(size)) for pack, file, size in value["packs"]),
                base64.b64decode(value["info"]),
            )
        except (OSError, ValueError, KeyError, TypeError, InvalidInput) as error:
            log.warning("%s is no upload any more (%s)", path, error)
            return None
