"""One section of a snapshot on disk, in plain form.

    offset  size
    0       8     magic  b"RTHWSEC1"
    8       8     raw size, big-endian; at most MAX_SECTION
    16      n     one zstd frame (level 1, content checksum on)

The frame's own checksum guards the raw bytes, the sha256 of the whole file (kept in the manifest and in the database)
guards the stored ones. A reader checks magic, cap and sha256 before it decompresses anything.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from backports import zstd

from rethaw.model.errors import SnapshotUnusable, StorageFull
from rethaw.model.types import Section

MAGIC = b"RTHWSEC1"
MAX_SECTION = 1 << 40
_HEADER = struct.Struct(">8sQ")
_BLOCK = 4 << 20
_OPTIONS: dict[int, int] = {zstd.CompressionParameter.compression_level: 1, zstd.CompressionParameter.checksum_flag: 1}


def storage_full(error: OSError, what: str) -> StorageFull | None:
    """`error` as StorageFull when that is what it says, else None."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"no space left for {what}", remedy="free disk space; the agent keeps running meanwhile")
    return None


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as f:
        while block := f.read(_BLOCK):
            yield block


def encode(name: str, raw: Path, target: Path) -> Section:
    """Compress `raw` into `target`, fsync it. Raises StorageFull."""
    size = raw.stat().st_size
    digest = hashlib.sha256()
    stored = 0
    compressor = zstd.ZstdCompressor(options=_OPTIONS)
    try:
        with target.open("wb", buffering=0) as out:

            def put(data: bytes) -> None:
                nonlocal stored
                view = memoryview(data)
                while view:
                    view = view[out.write(view) :]
                digest.update(data)
                stored += len(data)

            put(_HEADER.pack(MAGIC, size))
            for block in _blocks(raw):
                put(compressor.compress(block))
            put(compressor.flush(zstd.ZstdCompressor.FLUSH_FRAME))
            os.fsync(out.fileno())
    except OSError as error:
        raise storage_full(error, str(target)) or error from error
    return Section(name=name, raw_bytes=size, stored_bytes=stored, sha256=digest.hexdigest())


def decode(section: Section, source: Path, target: Path | None, snapshot: str) -> None:
    """Check `source` against `section` and decompress it into `target` (None: only check).

    Raises SnapshotUnusable naming snapshot and file; then `target` must not be used.
    """

    def unusable(what: str) -> SnapshotUnusable:
        return SnapshotUnusable(
            f"snapshot {snapshot}: {source.name} {what}",
            remedy="its parent is used instead",
            snapshot=snapshot,
            file=source.name,
        )

    try:
        size = source.stat().st_size
    except OSError as error:
        raise unusable(f"cannot be read ({error.strerror})") from error
    if size != section.stored_bytes:
        raise unusable(f"has {size} bytes, {section.stored_bytes} were written")
    digest = hashlib.sha256()
    for block in _blocks(source):
        digest.update(block)
    if digest.hexdigest() != section.sha256:
        raise unusable("is damaged (its hash does not match)")
    out = target.open("wb", buffering=0) if target is not None else None
    try:
        with source.open("rb") as f:
            magic, raw_size = _HEADER.unpack(f.read(_HEADER.size))
            if magic != MAGIC:
                raise unusable(f"has the magic {magic!r}, this version reads {MAGIC!r}")
            if raw_size != section.raw_bytes or raw_size > MAX_SECTION:
                raise unusable(f"claims {raw_size} raw bytes, {section.raw_bytes} were saved")
            decompressor = zstd.ZstdDecompressor()
            done = 0
            while not decompressor.eof:
                data = b""
                if decompressor.needs_input and not (data := f.read(_BLOCK)):
                    raise unusable("ends in the middle")
                raw = decompressor.decompress(data, _BLOCK)
                done += len(raw)
                if done > raw_size:
                    raise unusable("holds more than it says")
                if out is not None:
                    view = memoryview(raw)
                    while view:
                        view = view[out.write(view) :]
            if done != raw_size:
                raise unusable(f"holds {done} raw bytes, {raw_size} were saved")
    except zstd.ZstdError as error:
        raise unusable(f"does not decompress ({error})") from error
    except OSError as error:
        raise storage_full(error, f"section {section.name} of snapshot {snapshot}") or error from error
    finally:
        if out is not None:
            out.close()
