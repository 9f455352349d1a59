"""Packs and manifests taken apart and put together again by their documented layout, with every hash right: so that what
refuses a crafted file is its checks, not its hashes. Written from the layout, not from the code that it tests."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from backports import zstd
from blake3 import blake3

PACK_HEADER, PACK_FOOTER = 64, 48
MANIFEST_PREFIX, MANIFEST_HEADER = 80, 96


def b3(*parts: bytes) -> bytes:
    return blake3(b"".join(parts)).digest(length=16)


@dataclass(frozen=True)
class PackFile:
    """A pack in clear, taken apart."""

    header: bytes
    frames: bytes
    index: bytes  # as stored
    raw: int  # what the footer says of the index's raw length
    offset: int

    @classmethod
    def of(cls, data: bytes) -> PackFile:
        offset, length, raw, hashed, end = struct.unpack("<QII16s16s", data[-PACK_FOOTER:])
        assert end == b"RTHWPACK-the-end"
        index = data[offset : offset + length]
        assert hashed == b3(data[:PACK_HEADER], data[-PACK_FOOTER:-32], index)
        return cls(data[:PACK_HEADER], data[PACK_HEADER:offset], index, raw, offset)

    @property
    def plain(self) -> bytes:
        return zstd.decompress(self.index)

    def with_plain(self, plain: bytes) -> PackFile:
        return replace(self, index=zstd.compress(plain), raw=len(plain))

    @property
    def data(self) -> bytes:
        place = struct.pack("<QII", self.offset, len(self.index), self.raw)
        footer = place + b3(self.header, place, self.index) + b"RTHWPACK-the-end"
        return self.header + self.frames + self.index + footer

    def field(self, at: int, form: str, *values: Any) -> PackFile:
        """With other values at offset `at` of the header."""
        size = struct.calcsize(form)
        return replace(self, header=self.header[:at] + struct.pack(form, *values) + self.header[at + size :])


@dataclass
class IndexTables:
    """The index of a pack as lists."""

    counts: list[int]
    lengths: list[int]
    raws: list[int]
    kinds: list[int]
    hashes: list[bytes]
    base_pack: list[int]
    base_slot: list[int]
    bases: list[bytes]

    @classmethod
    def of(cls, plain: bytes) -> IndexTables:
        frames, slots, bases = struct.unpack_from("<III", plain)
        at = 12

        def take(form: str, count: int) -> list[Any]:
            nonlocal at
            out = [v for (v,) in struct.iter_unpack(f"<{form}", plain[at : at + count * struct.calcsize(f"<{form}")])]
            at += count * struct.calcsize(f"<{form}")
            return out

        lengths, raws, kinds = take("I", frames), take("I", frames), take("B", frames)
        hashes = take("16s", frames)
        deltas = sum(raw // 4096 for raw, kind in zip(raws, kinds, strict=True) if kind == 1)
        out = cls([frames, slots, bases], lengths, raws, kinds, hashes, take("H", deltas), take("I", deltas), take("40s", bases))  # fmt: skip
        assert at == len(plain)
        return out

    def plain(self) -> bytes:
        def put(form: str, values: list[Any]) -> bytes:
            return b"".join(struct.pack(f"<{form}", v) for v in values)

        return (
            put("I", self.counts) + put("I", self.lengths) + put("I", self.raws) + put("B", self.kinds)
            + put("16s", self.hashes) + put("H", self.base_pack) + put("I", self.base_slot) + put("40s", self.bases)
        )  # fmt: skip


@dataclass(frozen=True)
class ManifestFile:
    """A manifest in clear, taken apart."""

    prefix: bytes
    head: bytes
    body: bytes

    @classmethod
    def of(cls, data: bytes) -> ManifestFile:
        head, body, _ = struct.unpack("<IQQ", data[60:80])
        assert len(data) == MANIFEST_HEADER + head + body
        assert data[80:96] == b3(data[:80], data[96:])
        return cls(data[:80], data[96 : 96 + head], data[96 + head :])

    @property
    def data(self) -> bytes:
        return self.prefix + b3(self.prefix, self.head, self.body) + self.head + self.body

    def field(self, at: int, form: str, *values: Any) -> ManifestFile:
        size = struct.calcsize(form)
        return replace(self, prefix=self.prefix[:at] + struct.pack(form, *values) + self.prefix[at + size :])

    def with_head(self, head: Any) -> ManifestFile:
        text = head if isinstance(head, bytes) else json.dumps(head).encode()
        return replace(self, head=text).field(60, "<I", len(text))

    def with_body(self, plain: bytes) -> ManifestFile:
        body = zstd.compress(plain)
        return replace(self, body=body).field(64, "<QQ", len(body), len(plain))

    def edited(self, change: Callable[[dict[str, Any]], Any]) -> ManifestFile:
        head = json.loads(self.head)
        change(head)
        return self.with_head(head)


def boundaries(pack: bytes) -> list[int]:
    """Offsets at which a field, a frame or a region of a pack in clear begins."""
    parts = PackFile.of(pack)
    out, at = [0, 8, 10, 12, 20, 24, 64], PACK_HEADER
    for length in IndexTables.of(parts.plain).lengths:
        at += length
        out.append(at)
    return [*out, parts.offset + len(parts.index), len(pack) - 40, len(pack) - 36, len(pack) - 32, len(pack) - 16]
