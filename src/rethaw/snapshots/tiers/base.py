"""What every tier does, so that the rest need not know which one it is. tests/conformance/test_tiers.py is the contract.

Objects are written whole, never changed, and read by range. A name is a path of parts [A-Za-z0-9._-] that do not begin
with a dot; a name is not at the same time a folder of other names.

Errors, all of them naming object, tier and remedy: ObjectMissing, ObjectDamaged (it has another length than it should),
TierUnavailable (the same call may work later), StorageFull; SnapshotUnusable when a file that should be put is not what
it should be; InvalidInput for names and ranges that no tier takes.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rethaw.model.errors import InvalidInput, ObjectDamaged, ObjectMissing, SnapshotUnusable

Piece = tuple[Path, int, int]  # file, offset, length
Source = bytes | Path | Sequence[Piece]
NAME_LIMIT = 512  # characters; with a prefix of the bucket still below S3's 1,024
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Found:
    """An object in a listing. `modified`: seconds since 1970 by the tier's own clock. `tag` changes with the content."""

    name: str
    size: int
    modified: float
    tag: str


class Tier(Protocol):
    """A place for objects beyond the node's own files."""

    @property
    def label(self) -> str:
        """Its name in messages."""
        ...

    async def put(self, name: str, data: Source) -> None:
        """Store an object; durable and wholly visible when this returns, invisible before. Replaces an older one."""
        ...

    async def get(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`, or an error."""
        ...

    async def size(self, name: str) -> int:
        """Of an object, in bytes."""
        ...

    async def list(self, prefix: str) -> Sequence[Found]:
        """All objects below the folder `prefix` ("": all there are), sorted by name."""
        ...

    async def delete(self, name: str) -> None:
        """Remove an object; one that is not there is fine."""
        ...


def check_name(name: str) -> str:
    """`name`, if a tier takes it. Raises InvalidInput."""
    if len(name) > NAME_LIMIT or not all(_PART.fullmatch(part) for part in name.split("/")):
        raise InvalidInput(
            f"{name[:80]!r} is no object's name", remedy="use parts of [A-Za-z0-9._-] with slashes between them"
        )
    return name


def check_prefix(prefix: str) -> str:
    """`prefix` without a slash at its end, if a tier takes it. Raises InvalidInput."""
    return check_name(prefix.rstrip("/")) if prefix.rstrip("/") else ""


def check_range(offset: int, length: int) -> None:
    if offset < 0 or length < 0:
        raise InvalidInput(f"a range cannot begin at {offset} with {length} bytes", remedy="use numbers from 0 on")


def missing(name: str, label: str) -> ObjectMissing:
    return ObjectMissing(
        f"object {name} is not in {label}",
        remedy="it was deleted or never written; an older snapshot is used instead",
        object=name,
        tier=label,
    )


def too_short(name: str, label: str, size: int, offset: int, length: int) -> ObjectDamaged:
    return ObjectDamaged(
        f"object {name} in {label} has {size} bytes, {length} from {offset} on were wanted",
        remedy="it is damaged; an older snapshot is used instead",
        object=name,
        tier=label,
        size=size,
    )


def source_size(data: Source) -> int:
    """How many bytes `data` stands for. Raises SnapshotUnusable when its file cannot be read."""
    if isinstance(data, bytes):
        return len(data)
    if isinstance(data, Path):
        try:
            return data.stat().st_size
        except OSError as error:
            raise _unreadable(data, error) from error
    return sum(length for _, _, length in data)


def chunks(data: Source, largest: int) -> Iterator[bytes]:
    """The bytes of `data`, `largest` at a time except for the last. Raises SnapshotUnusable when a file is not there or
    ends too early."""
    if isinstance(data, bytes):
        for at in range(0, len(data), largest):
            yield data[at : at + largest]
        return
    pieces = [(data, 0, source_size(data))] if isinstance(data, Path) else data
    parts: list[bytes] = []
    have = 0
    for path, offset, length in pieces:
        done = 0
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            while done < length:
                try:
                    part = os.pread(fd, min(largest - have, length - done), offset + done)
                except OSError as error:
                    raise _unreadable(path, error) from error
                if not part:
                    raise SnapshotUnusable(
                        f"{path} ends after {offset + done} bytes, {offset + length} were expected",
                        remedy="an older snapshot is used instead",
                        file=str(path),
                    )
                parts.append(part)
                done += len(part)
                have += len(part)
                if have == largest:
                    yield parts[0] if len(parts) == 1 else b"".join(parts)
                    parts, have = [], 0
        finally:
            os.close(fd)
    if parts:
        yield parts[0] if len(parts) == 1 else b"".join(parts)


def _unreadable(path: Path, error: OSError) -> SnapshotUnusable:
    remedy = "an older snapshot is used instead" if error.errno == errno.ENOENT else "check the disk and permissions"
    return SnapshotUnusable(f"{path} cannot be read: {error.strerror}", remedy=remedy, file=str(path))
