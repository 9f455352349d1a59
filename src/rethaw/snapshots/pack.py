"""A pack: the frames that one save added to the store. Written once, never changed. All numbers little-endian.

    offset   size
    0        8     magic b"RTHWPACK"
    8        2     version, 1
    10       2     flags: 1 frames and index are sealed (AES-256-GCM, see `keys`)
    12       8     key id (zeros without encryption)
    20       4     zero
    24       40    id of the pack, ASCII, filled up with NUL
    64             frames, one after the other: each a zstd frame of its own, then sealed if flag 1 is set
                   kind 0 PAGES  up to 16 whole pages of 4 KiB
                   kind 1 DELTAS up to 16 pages, each XORed with a whole page of this or another pack
                   kind 2 BLOB   up to 1 MiB of a section that has no pages
    index          a zstd frame (sealed if flag 1 is set): counts of frames u32, page slots u32, base packs u32; then
                   stored length u32, raw length u32 and kind u8 of each frame, the first 16 bytes of BLAKE3 of each
                   frame as stored; number u16 in the list of base packs and slot u32 of each delta's base; and the
                   ids of the base packs, 40 bytes each
    end - 48  8     offset of the index
    end - 40  4     stored length of the index, at most MAX_INDEX
    end - 36  4     raw length of the index, at most MAX_INDEX
    end - 32  16    first 16 bytes of BLAKE3 over header, offset and lengths, and the index as stored
    end - 16  16    magic b"RTHWPACK-the-end"

Page slots are numbered through the pack: 16 for each full frame, in order. A reader refuses a newer version by name,
checks every hash before it decompresses, and allocates no more than the index (capped) says.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard
from backports import zstd
from blake3 import blake3
from numpy.typing import NDArray

from rethaw.model.errors import SnapshotUnusable
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.pages import PAGE

MAGIC, END = b"RTHWPACK", b"RTHWPACK-the-end"
VERSION = 1
PAGES, DELTAS, BLOB = 0, 1, 2
FRAME_PAGES = 16
BLOB_BYTES = 1 << 20
MAX_INDEX = 256 << 20
HASH = 16
INDEX_NUMBER = 0xFFFF_FFFF  # the index is sealed under this number, no frame has it
_SEALED = 1
_ID = 40
_HEADER = struct.Struct(f"<8sHH8sI{_ID}s")
_local = threading.local()
_FOOTER = struct.Struct("<QII16s16s")
_COUNTS = struct.Struct("<III")


class Damaged(Exception):
    """What is wrong with a pack or manifest, in words that follow the file's name. The store makes SnapshotUnusable
    of it, which names the snapshot too."""


class TooNew(Damaged):
    """Sound perhaps, but a newer Rethaw wrote it."""


def digest(*parts: bytes | memoryview) -> bytes:
    """The hash used throughout the store."""
    state = blake3()
    for part in parts:
        state.update(part)
    return state.digest(length=HASH)


def key_bytes(key_id: str | None) -> bytes:
    """A key's id as it stands in a header."""
    return bytes(8) if key_id is None else bytes.fromhex(key_id)


def unsealed(keys: Keyring, key_id: str, ident: str, number: int, data: bytes) -> bytes:
    """`keys.open`, but what does not open is Damaged like any other damage. Raises KeyMissing."""
    try:
        return keys.open(key_id, ident, number, data)
    except SnapshotUnusable as error:
        what = "its index" if number == INDEX_NUMBER else f"frame {number}"
        raise Damaged(f"is damaged ({what} does not open with the key {key_id})") from error


def inflate(data: bytes, raw: int) -> bytes:
    """Decompress exactly `raw` bytes. Raises Damaged; never allocates much more than `raw`."""
    try:
        size = zstandard.frame_content_size(data)
        if size == raw:  # as we write them; a decompressor for each thread, since making one costs a tenth of a frame
            if not hasattr(_local, "decompressor"):
                _local.decompressor = zstandard.ZstdDecompressor()
            return _local.decompressor.decompress(data, allow_extra_data=False)
        if size >= 0:
            raise Damaged(f"holds {size} bytes where {raw} were stored")
        decompressor = zstd.ZstdDecompressor()
        out = decompressor.decompress(data, raw + 1)
    except (zstd.ZstdError, zstandard.ZstdError) as error:
        raise Damaged(f"does not decompress ({error})") from error
    if len(out) != raw or not decompressor.eof:
        raise Damaged(f"holds {len(out)} bytes where {raw} were stored")
    return out


@dataclass(frozen=True)
class Frame:
    """A frame to be written: `data` is compressed already."""

    kind: int
    raw: int
    data: bytes


@dataclass
class Index:
    """Where everything is in a pack."""

    pack: str
    key_id: str | None  # None: in clear
    lengths: NDArray[np.uint32]
    raws: NDArray[np.uint32]
    kinds: NDArray[np.uint8]
    hashes: bytes
    offsets: NDArray[np.int64]
    first_slot: NDArray[np.int64]  # of each frame, and the number of all slots
    base_pack: NDArray[np.int32]  # of each slot: number in `bases`, -1 for a whole page
    base_slot: NDArray[np.int32]
    bases: list[str]

    def hash_of(self, frame: int) -> bytes:
        return self.hashes[frame * HASH : (frame + 1) * HASH]


def _laid_out(
    lengths: NDArray[np.uint32], raws: NDArray[np.uint32], kinds: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Offsets of frames, first slots of frames, and which slots are deltas."""
    offsets = _HEADER.size + np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    slots = np.where(kinds == BLOB, 0, raws // PAGE).astype(np.int64)
    first = np.concatenate([[0], np.cumsum(slots)])
    return offsets[:-1], first, np.repeat(kinds == DELTAS, slots)


def write(
    path: Path,
    pack: str,
    frames: Sequence[Frame],
    bases: Sequence[str],
    base_pack: NDArray[np.int32],
    base_slot: NDArray[np.int32],
    keys: Keyring,
) -> tuple[Index, int]:
    """Write and fsync a pack, read it back and check it. `base_pack`, `base_slot`: of each delta in order.

    Returns its index and size. Raises OSError, Damaged when what was read back differs.
    """
    sealed = keys.active is not None
    header = _HEADER.pack(MAGIC, VERSION, _SEALED if sealed else 0, key_bytes(keys.active), 0, pack.encode())
    stored = [keys.seal(pack, n, f.data) if sealed else f.data for n, f in enumerate(frames)]
    lengths = np.array([len(data) for data in stored], dtype=np.uint32)
    raws = np.array([f.raw for f in frames], dtype=np.uint32)
    kinds = np.array([f.kind for f in frames], dtype=np.uint8)
    hashes = b"".join(digest(data) for data in stored)
    offsets, first, deltas = _laid_out(lengths, raws, kinds)
    plain = b"".join(
        (
            _COUNTS.pack(len(frames), int(first[-1]), len(bases)),
            lengths.tobytes(), raws.tobytes(), kinds.tobytes(), hashes,
            base_pack.astype(np.uint16).tobytes(), base_slot.astype(np.uint32).tobytes(),
            *(base.encode().ljust(_ID, b"\0") for base in bases),
        )
    )  # fmt: skip
    index = zstd.compress(plain, level=3)
    if sealed:
        index = keys.seal(pack, INDEX_NUMBER, index)
    place = struct.pack("<QII", _HEADER.size + int(lengths.sum(dtype=np.int64)), len(index), len(plain))
    footer = place + digest(header, place, index) + END
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for data in (header, *_joined(stored), index, footer):
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        os.fsync(fd)
        result = Index(
            pack, keys.active, lengths, raws, kinds, hashes, offsets, first,
            _spread(deltas, base_pack), _spread(deltas, base_slot), list(bases),
        )  # fmt: skip
        check(fd, result)
        return result, os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def _joined(parts: Sequence[bytes]) -> list[bytes]:
    """In writes of some MiB rather than one for each frame."""
    out: list[bytes] = []
    batch: list[bytes] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part)
        if size >= 4 << 20:
            out.append(b"".join(batch))
            batch, size = [], 0
    return [*out, b"".join(batch)]


def _spread(deltas: NDArray[np.bool_], values: NDArray[np.int32]) -> NDArray[np.int32]:
    """`values` of the deltas as an array over all slots, -1 elsewhere."""
    out = np.full(len(deltas), -1, dtype=np.int32)
    out[deltas] = values
    return out


def read_index(fd: int, pack: str, keys: Keyring) -> Index:
    """Raises Damaged, or OSError."""
    size = os.fstat(fd).st_size
    if size < _HEADER.size + _FOOTER.size:
        raise Damaged(f"has {size} bytes, which is no whole pack")
    header = exactly(fd, 0, _HEADER.size)
    magic, version, flags, key, _, name = _HEADER.unpack(header)
    if magic != MAGIC:
        raise Damaged(f"begins with {magic!r}, a pack with {MAGIC!r}")
    if version != VERSION:
        raise TooNew(f"is of version {version}, this Rethaw reads version {VERSION}; use a newer one")
    if flags & ~_SEALED:
        raise TooNew(f"has flags {flags}, of which this Rethaw knows {_SEALED}; use a newer one")
    if name.rstrip(b"\0") != pack.encode():
        raise Damaged(f"is the pack {name.rstrip(bytes(1))!r}")
    offset, length, raw, hashed, end = _FOOTER.unpack(exactly(fd, size - _FOOTER.size, _FOOTER.size))
    if end != END or offset + length + _FOOTER.size != size:
        raise Damaged("does not end as a pack does (it was cut off)")
    if max(length, raw) > MAX_INDEX:
        raise Damaged(f"has an index of {max(length, raw)} bytes, at most {MAX_INDEX} are allowed")
    index = exactly(fd, offset, length)
    if digest(header, struct.pack("<QII", offset, length, raw), index) != hashed:
        raise Damaged("is damaged (its index does not match its hash)")
    key_id = key.hex() if flags & _SEALED else None
    plain = inflate(index if key_id is None else unsealed(keys, key_id, pack, INDEX_NUMBER, index), raw)
    return _parsed(pack, key_id, plain, offset)


def key_of(path: Path) -> str | None:
    """The id of the key that a pack is sealed with, by its header alone. Raises OSError, Damaged."""
    with path.open("rb") as f:
        header = exactly(f.fileno(), 0, _HEADER.size)
    _, _, flags, key, _, _ = _HEADER.unpack(header)
    return key.hex() if flags & _SEALED else None


def _parsed(pack: str, key_id: str | None, plain: bytes, end: int) -> Index:
    view, at = memoryview(plain), _COUNTS.size
    if len(plain) < at:
        raise Damaged("has an index without its counts")
    frames, slots, base_count = _COUNTS.unpack(view[:at])

    def take(count: int, dtype: str) -> NDArray[np.generic]:
        nonlocal at
        size = count * np.dtype(dtype).itemsize
        if at + size > len(plain):
            raise Damaged("has an index that is shorter than its counts say")
        out = np.frombuffer(view[at : at + size], dtype=dtype)
        at += size
        return out

    lengths = take(frames, "<u4").astype(np.uint32)
    raws = take(frames, "<u4").astype(np.uint32)
    kinds = take(frames, "u1").astype(np.uint8)
    hashes = take(frames * HASH, "u1").tobytes()
    _check_sizes(lengths, raws, kinds)
    offsets, first, deltas = _laid_out(lengths, raws, kinds)
    count = int(deltas.sum())
    base_pack = take(count, "<u2").astype(np.int32)
    base_slot = take(count, "<u4").astype(np.int32)
    names = take(base_count * _ID, "u1").tobytes()
    fits = int(first[-1]) == slots and _HEADER.size + int(lengths.sum(dtype=np.int64)) == end and at == len(plain)
    if not (fits and bool((base_pack < base_count).all()) and bool((base_slot >= 0).all())):
        raise Damaged("has an index that contradicts itself")
    bases = [names[n : n + _ID].rstrip(b"\0").decode("ascii", "replace") for n in range(0, len(names), _ID)]
    return Index(
        pack, key_id, lengths, raws, kinds, hashes, offsets, first, _spread(deltas, base_pack),
        _spread(deltas, base_slot), bases,
    )  # fmt: skip


def _check_sizes(lengths: NDArray[np.uint32], raws: NDArray[np.uint32], kinds: NDArray[np.uint8]) -> None:
    """Before anything is reckoned or allocated from them. Raises Damaged."""
    blobs = kinds == BLOB
    good = (kinds <= BLOB) & (raws <= np.where(blobs, BLOB_BYTES, FRAME_PAGES * PAGE))
    good &= blobs | (raws % PAGE == 0)
    good &= lengths <= raws + raws // 128 + 1024  # zstd makes nothing much longer
    if not good.all():
        raise Damaged(f"has an index that contradicts itself, at frame {int(np.argmin(good))}")


def exactly(fd: int, offset: int, length: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) != length:
        raise Damaged(f"ends at byte {offset + len(data)}, where {offset + length} are needed")
    return data


def stored_frame(index: Index, frame: int, data: bytes) -> bytes:
    """`data` as read, checked against the frame's hash."""
    if digest(data) != index.hash_of(frame):
        raise Damaged(f"is damaged (frame {frame} at byte {int(index.offsets[frame])} does not match its hash)")
    return data


def raw_frame(index: Index, frame: int, data: bytes, keys: Keyring) -> bytes:
    """The content of a frame from its stored bytes. Raises Damaged."""
    stored_frame(index, frame, data)
    if index.key_id is not None:
        data = unsealed(keys, index.key_id, index.pack, frame, data)
    return inflate(data, int(index.raws[frame]))


def check(fd: int, index: Index, frames: Sequence[int] | None = None) -> None:
    """Compare frames (all by default) with their hashes, without decompressing. Raises Damaged."""
    for frame in range(len(index.lengths)) if frames is None else frames:
        stored_frame(index, frame, exactly(fd, int(index.offsets[frame]), int(index.lengths[frame])))
