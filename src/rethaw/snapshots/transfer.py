"""A snapshot as one file, to be carried to another installation. All numbers little-endian.

    offset   size
    0        8     magic b"RTHWXPRT"
    8        2     version, 1
    10       6     zero
    16       4     length of the head, at most MAX_HEAD
    20       8     length of the manifest
    28       8     length of the pack
    36             head, JSON: {"info": the snapshot's row, "extra": what the server says of its session}
                   the manifest (see `manifest`), then the one pack that it needs (see `pack`), both in clear
    end - 16 16    first 16 bytes of BLAKE3 over all before

An exported file is not encrypted, whatever key the store has: it must open elsewhere. Keep it as you keep the data.
"""

from __future__ import annotations

import json
import os
import struct
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from rethaw.model.errors import InvalidInput
from rethaw.model.ids import new_id
from rethaw.snapshots import decode, encode, manifest
from rethaw.snapshots.decode import PackDamaged, Packs
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.pack import HASH, Damaged

MAGIC = b"RTHWXPRT"
VERSION = 1
MAX_HEAD = 16 << 20
_PREFIX = struct.Struct("<8sH6sIQQ")
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Exported:
    """The head of an exported file. `paged`: names of the sections that consist of pages."""

    info: dict[str, Any]
    extra: dict[str, Any]
    paged: frozenset[str]


def pack_up(
    sections: dict[str, Path],
    paged: frozenset[str],
    info: dict[str, Any],
    extra: dict[str, Any],
    target: Path,
    pool: Executor,
) -> None:
    """Write the raw `sections` of a snapshot into `target`, synced. Blocking. Raises OSError."""
    pack, partial = new_id("pk"), target.with_name(f".{target.name}.pack")
    keys = Keyring()
    try:
        encoded = encode.write(
            str(info["id"]),
            {},
            {n: p for n, p in sections.items() if n in paged},
            {n: p for n, p in sections.items() if n not in paged},
            {},
            pack,
            partial,
            keys,
            pool,
        )
        listing = manifest.encode(encoded.manifest, keys)
        head = json.dumps({"info": info, "extra": extra}).encode()
        state = blake3()
        with target.open("wb") as out, partial.open("rb") as source:
            prefix = _PREFIX.pack(MAGIC, VERSION, bytes(6), len(head), len(listing), encoded.pack_bytes)
            for data in (prefix, head, listing):
                state.update(data)
                out.write(data)
            while block := source.read(_BLOCK):
                state.update(block)
                out.write(block)
            out.write(state.digest(length=HASH))
            out.flush()
            os.fsync(out.fileno())
    finally:
        partial.unlink(missing_ok=True)


def _refuse(what: str) -> InvalidInput:
    return InvalidInput(f"the file {what}", remedy="export the snapshot again, and copy the file whole")


def unpack(source: Path, target: Path, pool: Executor) -> Exported:
    """Check an exported file, and write its raw sections into the directory `target`.

    Blocking. Raises InvalidInput when it is no such file, or damaged anywhere; OSError.
    """
    partial = target / ".pack"
    with source.open("rb") as f:
        head, listing, size = _lengths(f, source.stat().st_size)
        _check_digest(f, source.stat().st_size)
        f.seek(_PREFIX.size)
        try:
            described = json.loads(f.read(head))
            info, extra = dict(described["info"]), dict(described["extra"])
            found = manifest.decode(f.read(listing), str(info["id"]), Keyring())
            if [ref.size for ref in found.packs] != [size]:
                raise Damaged("does not name the one pack that is there")
        except (ValueError, KeyError, TypeError, Damaged) as error:
            raise _refuse(f"has contents that fit nowhere ({error})") from error
        try:
            with partial.open("wb") as out:
                while block := f.read(min(_BLOCK, size)):
                    out.write(block)
                    size -= len(block)
            files = {s.name: target / s.name for s in (*found.pages, *found.blobs)}
            decode.load(found, files, Packs(lambda _: partial, Keyring()), pool)
        except PackDamaged as error:
            raise _refuse(f"is damaged ({error})") from error
        finally:
            partial.unlink(missing_ok=True)
    return Exported(info, extra, frozenset(s.name for s in found.pages))


def _lengths(f: BinaryIO, size: int) -> tuple[int, int, int]:
    prefix = f.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        raise _refuse(f"has {len(prefix)} bytes and is no exported snapshot")
    magic, version, _, head, listing, pack = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise _refuse(f"begins with {magic!r} and is no exported snapshot")
    if version != VERSION:
        raise InvalidInput(
            f"the file is of version {version}, this Rethaw reads version {VERSION}", remedy="use a newer Rethaw"
        )
    if head > MAX_HEAD or listing > manifest.MAX_HEAD + manifest.MAX_BODY:
        raise _refuse(f"claims a head of {head} and a manifest of {listing} bytes, which is more than allowed")
    if _PREFIX.size + head + listing + pack + HASH != size:
        raise _refuse(f"has {size} bytes, {_PREFIX.size + head + listing + pack + HASH} were written")
    return head, listing, pack


def _check_digest(f: BinaryIO, size: int) -> None:
    state, left = blake3(), size - HASH
    f.seek(0)
    while left and (block := f.read(min(_BLOCK, left))):
        state.update(block)
        left -= len(block)
    if f.read(HASH) != state.digest(length=HASH):
        raise _refuse("is damaged (it does not match its digest)")
