"""Manifests: laid out as documented, read within their caps, refused in words when anything is off."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from store_damage import MANIFEST_HEADER, ManifestFile, b3
from store_fixtures import KEY, OTHER, keyring

from rethaw.model.errors import KeyMissing
from rethaw.snapshots import manifest
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.manifest import MAX_BODY, MAX_HEAD, MAX_SECTION, Blob, Manifest, PackRef, Pages
from rethaw.snapshots.pack import Damaged
from rethaw.snapshots.pages import PAGE

PLAIN = Keyring()
RINGS = pytest.mark.parametrize("keys", [PLAIN, keyring()], ids=["clear", "sealed"])
META = {"parent": None, "image": "i", "clock": {"name": "Zürich"}}


def example() -> Manifest:
    refs = [PackRef("pk_1", 1000, "ab" * 16), PackRef("pk_2", 2000, "cd" * 16)]
    memory = Pages("pages.img", 4 * PAGE + 5, np.array([0, 0, -1, 1, 0], np.int32), np.array([7, 8, 0, 70_000, 2], np.int32))  # fmt: skip
    return Manifest("snap_1", META, refs, [memory, Pages("none.img", 0, memory.pack[:0], memory.slot[:0])],
                    [Blob("kernel.img", (1 << 20) + 1, 0, 3, 2), Blob("empty", 0, 0, 5, 0)])  # fmt: skip


def decoded(data: bytes, keys: Keyring = PLAIN) -> Manifest:
    return manifest.decode(data, "snap_1", keys)


def same(one: Manifest, two: Manifest) -> bool:
    def pages(m: Manifest) -> list[Any]:
        return [(s.name, s.raw_bytes, s.pack.tolist(), s.slot.tolist()) for s in m.pages]

    return (one.snapshot, one.meta, one.packs, one.blobs, pages(one)) == (
        two.snapshot, two.meta, two.packs, two.blobs, pages(two),
    )  # fmt: skip


@RINGS
def test_what_was_encoded_is_decoded(keys: Keyring) -> None:
    data = manifest.encode(example(), keys)
    assert same(decoded(data, keys), example())
    assert example().raw_bytes == 4 * PAGE + 5 + (1 << 20) + 1
    head, key = manifest.decode_head(data, "snap_1")  # takes no key
    assert (head.packs, head.meta, key) == (example().packs, META, keys.active)


def test_a_manifest_lies_as_documented() -> None:
    """Parsed by hand from the layout in the module."""
    data = manifest.encode(example(), PLAIN)
    magic, version, flags, key, name, head, body, raw = struct.unpack("<8sHH8s40sIQQ", data[:80])
    assert (magic, version, flags, key, name) == (b"RTHWMANI", 1, 0, bytes(8), b"snap_1".ljust(40, b"\0"))
    assert data[80:96] == b3(data[:80], data[96:])
    assert len(data) == 96 + head + body
    assert json.loads(data[96 : 96 + head]) == {
        "meta": META,
        "packs": [["pk_1", 1000, "ab" * 16], ["pk_2", 2000, "cd" * 16]],
        "sections": [
            {"name": "pages.img", "raw_bytes": 4 * PAGE + 5, "pages": 5},
            {"name": "none.img", "raw_bytes": 0, "pages": 0},
            {"name": "kernel.img", "raw_bytes": (1 << 20) + 1, "pack": 0, "frames": [3, 2]},
            {"name": "empty", "raw_bytes": 0, "pack": 0, "frames": [5, 0]},
        ],
    }
    plain = zstd.decompress(data[96 + head :])
    assert len(plain) == raw
    # Pack numbers; then slots, each less the one before it less 1: 7 from -1, 8, 0, 70000, 2.
    assert struct.unpack("<5i5i", plain) == (0, 0, -1, 1, 0, 7, 0, -9, 69_999, -69_999)
    assert ManifestFile.of(data).data == data


@RINGS
def test_every_flipped_byte_is_noticed(keys: Keyring) -> None:
    data = manifest.encode(example(), keys)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(Damaged):
            decoded(bytes(damaged), keys)
        with pytest.raises(Damaged):
            manifest.decode_head(bytes(damaged), "snap_1")


def test_every_cut_and_every_addition_is_noticed() -> None:
    data = manifest.encode(example(), PLAIN)
    for size in range(len(data)):
        with pytest.raises(Damaged):
            decoded(data[:size])
    for more in (b"\0", b"RTHWMANI", data):
        with pytest.raises(Damaged, match=f"{len(data) + len(more)} bytes, {len(data)} were written"):
            decoded(data + more)


def test_a_newer_version_is_refused_by_name() -> None:
    parts = ManifestFile.of(manifest.encode(example(), PLAIN))
    with pytest.raises(Damaged, match="of version 2, this Rethaw reads version 1; use a newer one"):
        decoded(parts.field(8, "<H", 2).data)
    with pytest.raises(Damaged, match=r"has flags 4.*use a newer one"):
        decoded(parts.field(10, "<H", 4).data)


def test_a_manifest_of_another_snapshot_is_refused() -> None:
    with pytest.raises(Damaged, match="of the snapshot b'snap_1'"):
        manifest.decode(manifest.encode(example(), PLAIN), "snap_2", PLAIN)


@pytest.mark.parametrize(("at", "form", "value"), [(60, "<I", MAX_HEAD + 1), (64, "<Q", MAX_BODY + 1), (72, "<Q", MAX_BODY + 1), (72, "<Q", 1 << 63)])  # fmt: skip
def test_lengths_are_capped(at: int, form: str, value: int) -> None:
    parts = ManifestFile.of(manifest.encode(example(), PLAIN))
    with pytest.raises(Damaged, match="more than allowed"):
        decoded(parts.field(at, form, value).data)


def test_a_body_of_another_length_than_it_says() -> None:
    parts = ManifestFile.of(manifest.encode(example(), PLAIN))
    raw = len(zstd.decompress(parts.body))
    for wrong in (raw - 1, raw + 1, 0):
        with pytest.raises(Damaged, match=f"where {wrong} were stored"):
            decoded(parts.field(72, "<Q", wrong).data)
    with pytest.raises(Damaged, match="shorter than its sections"):
        decoded(parts.with_body(bytes(raw - 4)).data)
    with pytest.raises(Damaged, match="longer than its sections"):
        decoded(parts.with_body(zstd.decompress(parts.body) + bytes(4)).data)
    bomb = parts.with_body(bytes(200 << 20)).field(72, "<Q", raw)
    tracemalloc.start()
    try:
        with pytest.raises(Damaged, match=f"where {raw} were stored"):
            decoded(bomb.data)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_pack_that_is_not_in_the_list() -> None:
    parts = ManifestFile.of(manifest.encode(example(), PLAIN))
    for pack in (2, 1 << 30, -2):
        plain = struct.pack("<5i5i", 0, 0, pack, 0, 0, *range(5))
        with pytest.raises(Damaged, match=r"not in its list, in section pages\.img"):
            decoded(parts.with_body(plain).data)


Change = Callable[[dict[str, Any]], None]


def section(n: int, **values: Any) -> Change:
    return lambda head: head["sections"][n].update(values)


def first_pack(*entry: Any) -> Change:
    return lambda head: head["packs"].__setitem__(0, entry)


def without_packs(head: dict[str, Any]) -> None:
    del head["packs"]


CRAFTED: dict[str, Change] = {
    "a way out": section(0, name="../../etc/passwd"),
    "an absolute way out": section(0, name="/etc/passwd"),
    "dots": section(0, name=".."),
    "a hidden name": section(0, name=".x"),
    "no name": section(0, name=""),
    "a NUL": section(0, name="a\0b"),
    "a surrogate": section(0, name="\ud800"),
    "a long name": section(0, name="x" * 300),
    "one name twice": section(3, name="pages.img"),
    "negative bytes": section(0, raw_bytes=-1),
    "bytes without end": section(0, raw_bytes=MAX_SECTION + 1),
    "bytes beyond numbers": section(0, raw_bytes=float("inf")),
    "no number": section(0, raw_bytes=float("nan")),
    "more pages than bytes": section(0, pages=6),
    "pages without end": section(0, pages=1 << 60),
    "frames without end": section(2, frames=[0, 1 << 40]),
    "frames before the first": section(2, frames=[-1, 2]),
    "too few frames": section(2, frames=[3, 1]),
    "a blob in no pack": section(2, pack=2),
    "an empty blob in no pack": section(3, pack=2),
    "a blob before all packs": section(2, pack=-1),
    "a pack elsewhere": first_pack("../x", 1, "ab" * 16),
    "a pack without a name": first_pack("", 1, "ab" * 16),
    "a pack of a number": first_pack(1, 1, "ab" * 16),
    "a pack of no size": first_pack("pk_1", -1, "ab" * 16),
    "a pack of endless size": first_pack("pk_1", float("inf"), "ab" * 16),
    "a short pack": first_pack("pk_1"),
    "no packs at all": without_packs,
    "packs that are none": lambda head: head.update(packs=7),
    "sections that are none": lambda head: head.update(sections={"a": 1}),
    "meta that is none": lambda head: head.update(meta=[1, 2]),
}


@pytest.mark.parametrize("what", list(CRAFTED))
def test_a_head_that_lies_is_refused(what: str) -> None:
    parts = ManifestFile.of(manifest.encode(example(), PLAIN))
    data = parts.edited(CRAFTED[what]).data
    with pytest.raises(Damaged, match="nothing sensible"):
        decoded(data)
    with pytest.raises(Damaged, match="nothing sensible"):
        manifest.decode_head(data, "snap_1")


@pytest.mark.parametrize(
    "head", [b"", b"{}", b"[]", b"7", b"null", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 100_000, b"9" * 5000]
)
def test_a_head_that_is_no_object_is_refused(head: bytes) -> None:
    parts = ManifestFile.of(manifest.encode(example(), PLAIN))
    with pytest.raises(Damaged, match="nothing sensible"):
        decoded(parts.with_head(head).data)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "raw_bytes", "pages", "pack", "frames"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["meta", "packs", "sections"]), st.integers(0, 3), st.sampled_from(["name", "raw_bytes", "pages", "pack", "frames", None]), anything)  # fmt: skip
def test_no_crafted_head_ends_in_anything_but_damage(part: str, at: int, key: str | None, value: Any) -> None:
    head = json.loads(ManifestFile.of(manifest.encode(example(), PLAIN)).head)
    if part == "sections" and key is not None:
        head[part][at][key] = value
    elif part == "packs":
        head[part][at % 2] = value
    else:
        head[part] = value
    try:
        found = decoded(ManifestFile.of(manifest.encode(example(), PLAIN)).with_head(head).data)
    except Damaged:
        return
    assert all(0 <= s.raw_bytes <= MAX_SECTION for s in (*found.pages, *found.blobs))


def test_no_more_is_read_than_a_manifest_may_have(tmp_path: Path) -> None:
    """A sparse file of a terabyte was read into memory."""
    path = tmp_path / "snap_1.manifest"
    path.write_bytes(manifest.encode(example(), PLAIN))
    assert same(decoded(manifest.read(path)), example())
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(Damaged, match=f"has {1 << 40} bytes, which is more than allowed"):
        manifest.read(path)


def test_the_body_takes_its_key() -> None:
    data = manifest.encode(example(), keyring(KEY))
    assert b"snap_1" in data[:MANIFEST_HEADER]
    assert same(decoded(data, keyring(OTHER, KEY)), example())
    for ring in (PLAIN, keyring(OTHER)):
        with pytest.raises(KeyMissing, match=str(keyring(KEY).active)):
            decoded(data, ring)
    parts = ManifestFile.of(data)
    with pytest.raises(Damaged, match="does not open with the key"):
        decoded(ManifestFile(parts.prefix, parts.head, parts.body[:-1] + b"?").data, keyring(KEY))
    short = ManifestFile(parts.prefix, parts.head, b"short").field(64, "<Q", 5)
    with pytest.raises(Damaged, match="does not open with the key"):
        decoded(short.data, keyring(KEY))
