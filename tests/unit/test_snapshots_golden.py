"""Snapshots of version 1 load byte for byte, by this store and by a reader made from the documented layout alone; and what
this store writes today is read by that reader too. Who changes the format makes a version 2 and keeps these."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from golden_snapshots import GOLDEN, PARENTS, RINGS, contents
from store_damage import IndexTables, ManifestFile, PackFile, b3
from store_fixtures import MEMORY, Content, home_of, info_of, load, save, store_in

from rethaw.model.errors import KeyMissing
from rethaw.snapshots import manifest, pack
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.pages import PAGE
from rethaw.snapshots.store import SnapshotStore

PAGED = (MEMORY, "second.img", "empty.img")


def expected(kind: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{kind}.json").read_text())


def opened(kind: str, directory: Path, keys: Keyring | None = None) -> SnapshotStore:
    shutil.copytree(GOLDEN / kind, home_of(directory))
    return store_in(directory, keys=keys or RINGS[kind])


def by_hand(home: Path, snapshot: str) -> Content:
    """The sections of a snapshot in clear, with nothing but the layout."""
    data = (home / f"{snapshot}.manifest").read_bytes()
    assert struct.unpack_from("<8sHH8s40s", data) == (b"RTHWMANI", 1, 0, bytes(8), snapshot.encode().ljust(40, b"\0"))
    parts = ManifestFile.of(data)
    head, body = json.loads(parts.head), zstd.decompress(parts.body)
    packs: dict[str, tuple[list[bytes], list[int], IndexTables]] = {}
    for ident, size, index_hash in head["packs"]:
        whole = (home / f"{ident}.pack").read_bytes()
        assert struct.unpack_from("<8sHH8sI40s", whole) == (
            b"RTHWPACK",
            1,
            0,
            bytes(8),
            0,
            ident.encode().ljust(40, b"\0"),
        )
        assert (len(whole), whole[-32:-16].hex()) == (size, index_hash)
        tables = IndexTables.of(PackFile.of(whole).plain)
        frames: list[bytes] = []
        slots: list[bytes] = []
        kinds: list[int] = []
        at = 64
        for length, raw, kind, hashed in zip(tables.lengths, tables.raws, tables.kinds, tables.hashes, strict=True):
            assert b3(whole[at : at + length]) == hashed
            frames.append(zstd.decompress(whole[at : at + length]))
            assert len(frames[-1]) == raw
            if kind < 2:
                slots += [frames[-1][n : n + PAGE] for n in range(0, raw, PAGE)]
                kinds += [kind] * (raw // PAGE)
            at += length
        assert len(slots) == tables.counts[1]
        packs[ident] = (slots, kinds, tables)
        packs[ident + " frames"] = (frames, [], tables)

    def page(number: int, slot: int) -> bytes:
        if number < 0:
            return bytes(PAGE)
        slots, kinds, tables = packs[head["packs"][number][0]]
        if kinds[slot] == 0:
            return slots[slot]
        nth = sum(kinds[:slot])
        base, base_kinds, _ = packs[tables.bases[tables.base_pack[nth]].rstrip(b"\0").decode()]
        assert base_kinds[tables.base_slot[nth]] == 0, "one hop"
        whole = base[tables.base_slot[nth]]
        return bytes(a ^ b for a, b in zip(slots[slot], whole, strict=True))

    out: Content = {}
    at = 0
    for section in head["sections"]:
        if "pages" in section:
            count = section["pages"]
            numbers = struct.unpack_from(f"<{count}i", body, at)
            steps = struct.unpack_from(f"<{count}i", body, at + 4 * count)
            at += 8 * count
            slot, pages = -1, b""
            for number, step in zip(numbers, steps, strict=True):
                slot += step + 1
                pages += page(number, slot)
            out[section["name"]] = pages[: section["raw_bytes"]]
        else:
            first, count = section["frames"]
            frames = packs[head["packs"][section["pack"]][0] + " frames"][0]
            out[section["name"]] = b"".join(frames[first : first + count])
            assert len(out[section["name"]]) == section["raw_bytes"]
    assert at == len(body)
    return out


def test_the_contents_are_those_of_then() -> None:
    for kind in RINGS:
        found = {s: {n: hashlib.sha256(d).hexdigest() for n, d in c.items()} for s, c in contents().items()}
        assert found == expected(kind)["sha256"]


@pytest.mark.parametrize("kind", list(RINGS))
async def test_golden_snapshots_are_loaded(kind: str, tmp_path: Path) -> None:
    store = opened(kind, tmp_path)
    for snapshot, content in contents().items():
        path = f"snapshots/store/{snapshot}.manifest"
        info = info_of(snapshot, PARENTS[snapshot], path, expected(kind)["digests"][snapshot], (), 0, 0)
        assert await load(store, info) == content
        await store.verify(info)
        for number in range(len(content["second.img"]) // PAGE):
            assert store.page(info, "second.img", number) == content["second.img"][number * PAGE :][:PAGE]
    # And they are what new ones are compared with.
    child = await save(store, contents()["snap_g2"], parent="snap_g2", paged=PAGED)
    assert child.stored_bytes < 3000
    await store.delete("snap_g2")
    assert await load(store, child) == contents()["snap_g2"]
    store.close()


def test_golden_sealed_snapshots_take_their_key(tmp_path: Path) -> None:
    with pytest.raises(KeyMissing, match=str(RINGS["sealed"].active)):
        opened("sealed", tmp_path, Keyring())


@pytest.mark.parametrize("snapshot", list(PARENTS))
def test_golden_snapshots_are_read_by_hand(snapshot: str) -> None:
    assert by_hand(GOLDEN / "clear", snapshot) == contents()[snapshot]


async def test_what_is_written_today_is_read_by_hand(tmp_path: Path) -> None:
    """The format did not change under its version."""
    assert (pack.VERSION, manifest.VERSION) == (1, 1)
    store = store_in(tmp_path)
    for snapshot, content in contents().items():
        await save(store, content, snapshot=snapshot, parent=PARENTS[snapshot], paged=PAGED)
    for snapshot, content in contents().items():
        assert by_hand(home_of(tmp_path), snapshot) == content
    store.close()


def test_the_golden_ones_hold_every_kind() -> None:
    kinds: set[int] = set()
    most = 0
    for path in (GOLDEN / "clear").iterdir():
        if path.suffix == ".pack":
            kinds |= set(IndexTables.of(PackFile.of(path.read_bytes()).plain).kinds)
        else:
            most = max(most, len(json.loads(ManifestFile.of(path.read_bytes()).head)["packs"]))
    assert kinds == {0, 1, 2}
    assert most >= 3
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*")) < 200 * 1024
