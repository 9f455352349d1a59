"""A snapshot's record in a tier: all that a node without any files of its own needs to read the snapshot.

`snapshots/SNAPSHOT`, written after all objects that it names, big-endian:

    offset  size
    0       8     magic b"RTHWREC1" (the last byte is the version)
    8       4     header length H, at most MAX_HEADER
    12      8     manifest length M, at most MAX_MANIFEST
    20      32    sha256 of the header
    52      H     header, JSON in UTF-8:
                    snapshot   its id
                    info       SnapshotInfo as JSON text; this module does not look into it
                    packs      {pack: {"size": bytes, "extents": [[object, object_offset, pack_offset, length], ...]}}
    52+H    M     the snapshot's manifest, as the page store wrote it
    52+H+M  32    sha256 of the manifest

Extents of a pack are in order and leave no hole. The header has a sum of its own, so that the garbage collector reads
no manifests. A record is put whole and never changed in part.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rethaw.model.errors import InvalidInput, ObjectDamaged
from rethaw.snapshots.packing import Extent, cover
from rethaw.snapshots.tiers.base import Tier, check_name

FOLDER = "snapshots"
MAGIC = b"RTHWREC1"
MAX_HEADER = 64 << 20
MAX_MANIFEST = 256 << 20
_FIXED = struct.Struct(">8sIQ32s")
_SUM = 32
_FIRST_READ = 64 << 10  # holds nearly every header


@dataclass(frozen=True)
class PackPlace:
    """A pack of `size` bytes and where they are."""

    size: int
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class Header:
    snapshot: str
    info: bytes
    packs: Mapping[str, PackPlace]

    @property
    def objects(self) -> frozenset[str]:
        """Names of all objects that the snapshot needs."""
        return frozenset(extent.object for place in self.packs.values() for extent in place.extents)


@dataclass(frozen=True)
class Record:
    header: Header
    manifest: bytes


def name_of(snapshot: str) -> str:
    return f"{FOLDER}/{snapshot}"


def encode(header: Header, manifest: bytes) -> bytes:
    """Raises InvalidInput when it is larger than a reader would take, or does not fit together."""
    for pack, place in header.packs.items():
        if cover(place.extents, 0, place.size) != list(place.extents):
            raise InvalidInput(f"the extents of pack {pack} do not make it up", remedy="upload the pack first")
    text = json.dumps(
        {
            "snapshot": header.snapshot,
            "info": header.info.decode(),
            "packs": {p: {"size": place.size, "extents": place.extents} for p, place in header.packs.items()},
        },
        separators=(",", ":"),
    ).encode()
    if len(text) > MAX_HEADER or len(manifest) > MAX_MANIFEST:
        raise InvalidInput(
            f"snapshot {header.snapshot} has a header of {len(text)} bytes and a manifest of {len(manifest)}",
            remedy=f"at most {MAX_HEADER} and {MAX_MANIFEST} can be stored",
        )
    fixed = _FIXED.pack(MAGIC, len(text), len(manifest), hashlib.sha256(text).digest())
    return b"".join((fixed, text, manifest, hashlib.sha256(manifest).digest()))


async def read(tier: Tier, snapshot: str) -> Record:
    """The whole record. Raises ObjectMissing, ObjectDamaged, TierUnavailable."""
    name = name_of(snapshot)
    data = await _read_all(tier, name, await tier.size(name))
    header, at, length = _decode_header(data, name, tier.label)
    manifest = data[at : at + length]
    if hashlib.sha256(manifest).digest() != data[at + length :]:
        raise _damaged(name, tier.label, "its manifest does not match its sum")
    return Record(header, manifest)


async def read_header(tier: Tier, snapshot: str, size: int) -> Header:
    """Without the manifest; `size` is that of the object. Raises as `read`."""
    name = name_of(snapshot)
    data = await tier.get(name, 0, min(size, _FIRST_READ))
    if len(data) >= _FIXED.size:
        wanted = _FIXED.size + min(_FIXED.unpack_from(data)[1], MAX_HEADER)
        if len(data) < wanted <= size:
            data += await tier.get(name, len(data), wanted - len(data))
    return _decode_header(data, name, tier.label, whole=size)[0]


async def _read_all(tier: Tier, name: str, size: int) -> bytes:
    if size > _FIXED.size + MAX_HEADER + MAX_MANIFEST + _SUM:
        raise _damaged(name, tier.label, f"it has {size} bytes, more than any record")
    return await tier.get(name, 0, size)


def _decode_header(data: bytes, name: str, label: str, whole: int | None = None) -> tuple[Header, int, int]:
    """(header, where the manifest begins, its length). `whole`: the object's size, when `data` is its beginning only."""
    size = len(data) if whole is None else whole
    if len(data) < _FIXED.size:
        raise _damaged(name, label, f"it has {size} bytes only")
    magic, header, manifest, digest = cast("tuple[bytes, int, int, bytes]", _FIXED.unpack_from(data))
    if magic != MAGIC:
        raise _damaged(name, label, f"it has the magic {magic!r}, this version reads {MAGIC!r}")
    if header > MAX_HEADER or manifest > MAX_MANIFEST or size != _FIXED.size + header + manifest + _SUM:
        raise _damaged(name, label, f"it claims {header} and {manifest} bytes, {size} are there")
    text = data[_FIXED.size : _FIXED.size + header]
    if hashlib.sha256(text).digest() != digest:
        raise _damaged(name, label, "its header does not match its sum")
    try:
        found = cast("dict[str, Any]", json.loads(text))
        if name != name_of(str(found["snapshot"])):
            raise ValueError(f"it is of {found['snapshot']!r}")
        packs = {
            str(pack): PackPlace(int(place["size"]), tuple(_extent(e) for e in place["extents"]))
            for pack, place in cast("dict[str, Any]", found["packs"]).items()
        }
        for pack, place in packs.items():
            if cover(place.extents, 0, place.size) != list(place.extents):
                raise ValueError(f"the extents of pack {pack} do not make it up")
        return (
            Header(str(found["snapshot"]), str(found["info"]).encode(), packs),
            _FIXED.size + header,
            manifest,
        )
    except (ValueError, KeyError, TypeError, AttributeError, InvalidInput) as error:
        raise _damaged(name, label, f"its header is not one ({error})") from error


def _extent(value: Sequence[Any]) -> Extent:
    name, *numbers = value
    object_offset, pack_offset, length = map(int, numbers)
    return Extent(check_name(str(name)), object_offset, pack_offset, length)


def _damaged(name: str, label: str, what: str) -> ObjectDamaged:
    return ObjectDamaged(
        f"record {name} in {label} cannot be used: {what}",
        remedy="an older snapshot is used instead",
        object=name,
        tier=label,
    )
