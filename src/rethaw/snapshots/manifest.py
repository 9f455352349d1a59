"""A manifest: where every page of one snapshot lies. Flat: no parent is asked. All numbers little-endian.

    offset   size
    0        8     magic b"RTHWMANI"
    8        2     version, 1
    10       2     flags: 1 the body is sealed (AES-256-GCM, see `keys`)
    12       8     key id (zeros without encryption)
    20       40    id of the snapshot, ASCII, filled up with NUL
    60       4     length of the head, at most MAX_HEAD
    64       8     stored length of the body, at most MAX_BODY
    72       8     raw length of the body, at most MAX_BODY
    80       16    first 16 bytes of BLAKE3 over bytes 0 to 79, the head and the body as stored
    96             head, JSON: {"meta": what the saver knows of the snapshot, "packs": [[id, bytes, index hash], ...],
                   "sections": [{"name", "raw_bytes", "pages"}, or {"name", "raw_bytes", "pack", "frames": [first, n]}]}
                   body, a zstd frame: for each section with pages, its pages' pack numbers (i32, -1: a page of zeros)
                   and their slots (i32, each less the one before it less 1, so that runs are zeros)

A page is found by two array look-ups here and one in the index of its pack; it takes one frame to read, or two when it
is a delta. A reader refuses a newer version by name, checks the hash first and allocates no more than the caps say.
"""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from backports import zstd
from numpy.typing import NDArray

from rethaw.model.errors import SnapshotUnusable
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.pack import BLOB_BYTES, Damaged, TooNew, digest, inflate, key_bytes
from rethaw.snapshots.pages import PAGE

MAGIC = b"RTHWMANI"
VERSION = 1
MAX_HEAD = 16 << 20
MAX_BODY = 256 << 20  # 16 million pages of 4 KiB, 64 GiB
MAX_SECTION = 64 << 30
_SEALED = 1
# Both become parts of file names, and a manifest may come from elsewhere.
_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,100}")
_ID = re.compile(r"[A-Za-z0-9_-]{1,40}")
_PREFIX = struct.Struct("<8sHH8s40sIQQ")
_HASH = 16
HEADER = _PREFIX.size + _HASH
_NUMBER = 0xFFFF_FFFE  # the body is sealed under this number
ZERO = -1

Ints = NDArray[np.int32]


@dataclass
class Pages:
    """A section in pages: for each the number of its pack in `Manifest.packs` (ZERO: nothing but zeros), and its slot."""

    name: str
    raw_bytes: int
    pack: Ints
    slot: Ints


@dataclass
class Blob:
    """A section without pages: frames `first` to `first + count - 1` of a pack."""

    name: str
    raw_bytes: int
    pack: int
    first: int
    count: int


@dataclass(frozen=True)
class PackRef:
    """A pack that a snapshot needs. `index_hash` is the hex of the hash in its footer."""

    id: str
    size: int
    index_hash: str


@dataclass
class Manifest:
    snapshot: str
    meta: dict[str, Any]
    packs: list[PackRef] = field(default_factory=list["PackRef"])
    pages: list[Pages] = field(default_factory=list["Pages"])
    blobs: list[Blob] = field(default_factory=list["Blob"])

    @property
    def raw_bytes(self) -> int:
        return sum(s.raw_bytes for s in (*self.pages, *self.blobs))


def encode(manifest: Manifest, keys: Keyring) -> bytes:
    """The bytes of the file."""
    sections: list[dict[str, Any]] = [
        {"name": s.name, "raw_bytes": s.raw_bytes, "pages": len(s.pack)} for s in manifest.pages
    ]
    sections += [
        {"name": b.name, "raw_bytes": b.raw_bytes, "pack": b.pack, "frames": [b.first, b.count]} for b in manifest.blobs
    ]
    head = {
        "meta": manifest.meta,
        "packs": [[p.id, p.size, p.index_hash] for p in manifest.packs],
        "sections": sections,
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    plain = b"".join(a for s in manifest.pages for a in (s.pack.astype("<i4").tobytes(), _packed(s.slot)))
    body = zstd.compress(plain, level=3)
    if keys.active is not None:
        body = keys.seal(manifest.snapshot, _NUMBER, body)
    flags = 0 if keys.active is None else _SEALED
    name = manifest.snapshot.encode()
    prefix = _PREFIX.pack(MAGIC, VERSION, flags, key_bytes(keys.active), name, len(text), len(body), len(plain))
    return prefix + digest(prefix, text, body) + text + body


def _packed(slot: Ints) -> bytes:
    return (np.diff(slot, prepend=np.int32(-1)) - 1).astype("<i4").tobytes()


def _unpacked(data: bytes) -> Ints:
    steps = np.frombuffer(data, dtype="<i4").astype(np.int64) + 1
    return (np.cumsum(steps) - 1).astype(np.int32)


def _checked(data: bytes, snapshot: str) -> tuple[str | None, int, int]:
    """Key id, length of the head, raw length of the body, of a file that is whole."""
    if len(data) < HEADER:
        raise Damaged(f"has {len(data)} bytes, which is no whole manifest")
    magic, version, flags, key, name, head, body, raw = _PREFIX.unpack(data[: _PREFIX.size])
    if magic != MAGIC:
        raise Damaged(f"begins with {magic!r}, a manifest with {MAGIC!r}")
    if version != VERSION:
        raise TooNew(f"is of version {version}, this Rethaw reads version {VERSION}; use a newer one")
    if flags & ~_SEALED:
        raise TooNew(f"has flags {flags}, of which this Rethaw knows {_SEALED}; use a newer one")
    if name.rstrip(b"\0") != snapshot.encode():
        raise Damaged(f"is of the snapshot {name.rstrip(bytes(1))!r}")
    if head > MAX_HEAD or max(body, raw) > MAX_BODY:
        raise Damaged(f"claims a head of {head} and a body of {max(body, raw)} bytes, which is more than allowed")
    if len(data) != HEADER + head + body:
        raise Damaged(f"has {len(data)} bytes, {HEADER + head + body} were written")
    if digest(data[: _PREFIX.size], data[HEADER:]) != data[_PREFIX.size : HEADER]:
        raise Damaged("is damaged (it does not match its hash)")
    return key.hex() if flags & _SEALED else None, head, raw


def decode(data: bytes, snapshot: str, keys: Keyring) -> Manifest:
    """Raises Damaged, or a RethawError that names the key that is missing."""
    key_id, head, raw = _checked(data, snapshot)
    out, described = _head(data[HEADER : HEADER + head], snapshot)
    body = data[HEADER + head :]
    if key_id is not None:
        try:
            body = keys.open(key_id, snapshot, _NUMBER, body)
        except SnapshotUnusable as error:
            raise Damaged(f"is damaged (its body does not open with the key {key_id})") from error
    plain = inflate(body, raw)
    at = 0
    for section in described:
        count = section["pages"]
        half = 4 * count
        if at + 2 * half > len(plain):
            raise Damaged("has a body that is shorter than its sections")
        pack = np.frombuffer(plain[at : at + half], dtype="<i4").astype(np.int32)
        slot = _unpacked(plain[at + half : at + 2 * half])
        at += 2 * half
        if len(pack) and (int(pack.max()) >= len(out.packs) or int(pack.min()) < ZERO):
            raise Damaged(f"names a pack that is not in its list, in section {section['name']}")
        out.pages.append(Pages(section["name"], section["raw_bytes"], pack, slot))
    if at != len(plain):
        raise Damaged("has a body that is longer than its sections")
    return out


def read(path: Path) -> bytes:
    """A manifest's bytes, no more than there may be. Raises OSError, Damaged."""
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size > HEADER + MAX_HEAD + MAX_BODY:
            raise Damaged(f"has {size} bytes, which is more than allowed")
        return f.read(size)


def decode_head(data: bytes, snapshot: str) -> tuple[Manifest, str | None]:
    """Packs and meta only, which takes no key, and the id of the key that the rest needs. Raises Damaged."""
    key_id, head, _ = _checked(data, snapshot)
    return _head(data[HEADER : HEADER + head], snapshot)[0], key_id


def _head(text: bytes, snapshot: str) -> tuple[Manifest, list[dict[str, Any]]]:
    try:
        head = json.loads(text)
        packs = [_ref(*entry) for entry in head["packs"]]
        out = Manifest(snapshot, dict(head["meta"]), packs)
        paged: list[dict[str, Any]] = []
        names: set[str] = set()
        for section in head["sections"]:
            name, raw = str(section["name"]), int(section["raw_bytes"])
            if not 0 <= raw <= MAX_SECTION or not _NAME.fullmatch(name) or name in names:
                raise ValueError(f"section {name!r} of {raw} bytes")
            names.add(name)
            if "pages" in section:
                if int(section["pages"]) != -(-raw // PAGE):
                    raise ValueError(f"section {name!r} of {raw} bytes in {section['pages']} pages")
                paged.append({"name": name, "raw_bytes": raw, "pages": int(section["pages"])})
            else:
                first, count = section["frames"]
                blob = Blob(name, raw, int(section["pack"]), int(first), int(count))
                if not 0 <= blob.pack < len(packs) or blob.first < 0 or blob.count != -(-raw // BLOB_BYTES):
                    raise ValueError(f"section {name!r} of {raw} bytes in {blob.count} frames of pack {blob.pack}")
                out.blobs.append(blob)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Damaged(f"has a head that says nothing sensible ({str(error)[:200]})") from error
    return out, paged


def _ref(ident: Any, size: Any, hashed: Any) -> PackRef:
    """The id becomes part of a file's name."""
    good = isinstance(ident, str) and isinstance(size, int) and isinstance(hashed, str)
    if not good or not _ID.fullmatch(ident) or size < 0:
        raise ValueError(f"pack {ident!r} of {size!r} bytes")
    return PackRef(ident, size, hashed)
