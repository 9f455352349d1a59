"""Damage to the store's files: every kind is refused by the name of the snapshot and the file, and nothing wrong is ever
handed out. What other snapshots need is not touched by it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from store_damage import MANIFEST_HEADER, ManifestFile, PackFile, boundaries
from store_fixtures import (
    KERNEL,
    KEY,
    MEMORY,
    OTHER,
    Content,
    files,
    heap,
    home_of,
    keyring,
    load,
    noise,
    save,
    store_in,
)

from rethaw.model.errors import KeyMissing, SnapshotUnusable
from rethaw.model.types import SnapshotInfo
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.pack import digest
from rethaw.snapshots.pages import PAGE
from rethaw.snapshots.store import SnapshotStore


@dataclass
class Family:
    """A snapshot and its child, which needs pages, deltas' bases and a blob of two packs."""

    store: SnapshotStore
    directory: Path
    parent: SnapshotInfo
    child: SnapshotInfo
    content: dict[str, Content]

    def fresh(self) -> None:
        """As another process finds it: no open packs, nothing staged."""
        for name in files(self.directory):
            self.store.packs.forget(name.removesuffix(".pack"))
        for info in (self.parent, self.child):
            self.store.drop_staged(info.id)

    @property
    def own(self) -> Path:
        """The pack that the child added."""
        return max(home_of(self.directory).glob("*.pack"))

    @property
    def shared(self) -> Path:
        return min(home_of(self.directory).glob("*.pack"))

    async def refused(self, info: SnapshotInfo, file: Path, *, and_verify: bool = False) -> None:
        self.fresh()
        with pytest.raises(SnapshotUnusable) as caught:
            await self.store.load(info)
        assert info.id in str(caught.value)
        assert file.stem in str(caught.value)
        assert caught.value.details["snapshot"] == info.id
        assert caught.value.details["file"] == file.name
        assert not list(self.store.staging.path.iterdir())
        if and_verify:
            with pytest.raises(SnapshotUnusable, match=file.stem):
                await self.store.verify(info)

    async def loads(self, info: SnapshotInfo) -> None:
        self.fresh()
        assert await load(self.store, info) == self.content[info.id]


async def family(directory: Path, keys: Keyring) -> Family:
    store = store_in(directory, keys=keys)
    first = {MEMORY: heap(1, 20) + noise(1, 4 * PAGE) + bytes(3 * PAGE), KERNEL: b"state" * 900}
    memory = bytearray(first[MEMORY])
    for at in (0, 3 * PAGE, 22 * PAGE):
        memory[at : at + 8] = b"changed!"
    memory += noise(2, 2 * PAGE + 100)
    second = {MEMORY: bytes(memory), KERNEL: b"other" * 900}
    parent = await save(store, first)
    child = await save(store, second, parent=parent.id)
    return Family(store, directory, parent, child, {parent.id: first, child.id: second})


@pytest.fixture(params=["clear", "sealed"])
async def kin(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Family]:
    made = await family(tmp_path, Keyring() if request.param == "clear" else keyring())
    yield made
    made.store.close()


def flips(data: bytes, places: Iterable[int]) -> Iterable[bytes]:
    for at in places:
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        yield bytes(damaged)


async def test_a_flipped_byte_of_a_manifest_is_named(kin: Family) -> None:
    path = kin.store.manifest_path(kin.child.id)
    data = path.read_bytes()
    for damaged in flips(data, [*range(0, MANIFEST_HEADER, 3), *range(MANIFEST_HEADER, len(data), 29)]):
        path.write_bytes(damaged)
        await kin.refused(kin.child, path)
    await kin.loads(kin.parent)
    path.write_bytes(data)
    await kin.loads(kin.child)


async def test_a_flipped_byte_of_its_own_pack_is_named(kin: Family) -> None:
    path = kin.own
    data = path.read_bytes()
    for damaged in flips(
        data, [*range(0, 64, 5), *range(64, len(data) - 48, 211), *range(len(data) - 48, len(data), 5)]
    ):
        path.write_bytes(damaged)
        await kin.refused(kin.child, path)
    await kin.refused(kin.child, path, and_verify=True)
    await kin.loads(kin.parent)
    path.write_bytes(data)
    await kin.loads(kin.child)


async def test_a_flipped_byte_of_a_shared_pack_never_gives_wrong_bytes(kin: Family) -> None:
    """Only frames that the child does not need may be damaged unnoticed; the parent needs all."""
    path = kin.shared
    data = path.read_bytes()
    for damaged in flips(
        data, [*range(0, 64, 9), *range(64, len(data) - 48, 397), *range(len(data) - 48, len(data), 9)]
    ):
        path.write_bytes(damaged)
        await kin.refused(kin.parent, path)
        kin.fresh()
        try:
            assert await load(kin.store, kin.child) == kin.content[kin.child.id]
        except SnapshotUnusable as error:
            assert (kin.child.id, path.name) == (error.details["snapshot"], error.details["file"])


@pytest.mark.parametrize("what", ["own", "shared", "manifest"])
async def test_a_file_that_is_cut_or_longer_or_gone_is_named(kin: Family, what: str) -> None:
    path = {"own": kin.own, "shared": kin.shared, "manifest": kin.store.manifest_path(kin.child.id)}[what]
    data = path.read_bytes()
    cuts = {0, 1, 63, 64, 96, len(data) // 2, len(data) - 48, len(data) - 1}
    if what != "manifest" and kin.store.keys.active is None:
        cuts |= set(boundaries(data))
    for size in sorted(cuts - {len(data)}):
        path.write_bytes(data[:size])
        await kin.refused(kin.child, path)
    for more in (b"\0", data[-48:]):
        path.write_bytes(data + more)
        await kin.refused(kin.child, path)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    await kin.refused(kin.child, path)
    path.unlink()
    await kin.refused(kin.child, path, and_verify=True)
    path.mkdir()
    await kin.refused(kin.child, path, and_verify=True)
    path.rmdir()
    path.symlink_to(path)
    await kin.refused(kin.child, path, and_verify=True)
    path.unlink()
    path.write_bytes(data)
    await kin.loads(kin.child)


async def test_packs_that_changed_places_are_named(kin: Family) -> None:
    own, shared = kin.own, kin.shared
    aside = own.with_suffix(".aside")
    own.rename(aside)
    shared.rename(own)
    aside.rename(shared)
    kin.fresh()
    with pytest.raises(SnapshotUnusable, match=rf"{kin.child.id}: pack ({own.stem}|{shared.stem}) "):
        await kin.store.load(kin.child)
    await kin.refused(kin.parent, shared)


async def test_a_pack_of_the_same_size_and_name_but_another_content_is_named(tmp_path: Path) -> None:
    """All hashes inside it are right; the manifest says that it is another one."""
    kin = await family(tmp_path, Keyring())
    parts = PackFile.of(kin.own.read_bytes())
    frames = bytearray(parts.frames)
    frames[10] ^= 1
    kin.own.write_bytes(PackFile(parts.header, bytes(frames), parts.index, parts.raw, parts.offset).data)
    await kin.refused(kin.child, kin.own)  # its own index names the frame
    header = parts.field(20, "<I", 1)
    kin.own.write_bytes(header.data)
    await kin.refused(kin.child, kin.own)
    kin.store.close()


async def test_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    kin = await family(tmp_path, Keyring())
    path = kin.store.manifest_path(kin.child.id)
    data = path.read_bytes()
    newer = ManifestFile.of(data).field(8, "<H", 9).data
    path.write_bytes(newer)
    kin.fresh()
    with pytest.raises(SnapshotUnusable, match=rf"{path.name} is of version 9, this Rethaw reads version 1"):
        await kin.store.load(kin.child.model_copy(update={"digest": digest(newer).hex()}))
    kin.store.close()


async def test_a_former_snapshot_that_is_damaged_costs_space_not_the_save(kin: Family) -> None:
    kin.fresh()
    kin.own.write_bytes(bytes(kin.own.stat().st_size))
    content = {MEMORY: kin.content[kin.child.id][MEMORY], KERNEL: b"more"}
    info = await save(kin.store, content, parent=kin.child.id)
    assert await load(kin.store, info) == content
    await kin.loads(kin.parent)


# ---------------------------------------------------------------- encryption


async def test_no_content_in_any_file_of_an_encrypted_store(tmp_path: Path) -> None:
    marker, noisy = b"sk-secret-token-of-a-user", noise(5, PAGE)
    content = {MEMORY: marker + noisy[len(marker) :] + noise(6, PAGE), KERNEL: marker + noise(7, 3000)}
    for keys, shown in ((Keyring(), True), (keyring(), False)):
        directory = tmp_path / ("clear" if shown else "sealed")
        directory.mkdir()
        store = store_in(directory, keys=keys)
        info = await save(store, content)
        changed = {MEMORY: content[MEMORY][:PAGE] + marker * 20, KERNEL: b""}
        await save(store, changed, parent=info.id)
        stored = b"".join(p.read_bytes() for p in home_of(directory).iterdir())
        for part in (marker, noisy[1000:1040], noise(6, PAGE)[2000:2040]):  # noise does not compress: it shows in clear
            assert (part in stored) is shown
        if not shown:
            assert b"\x28\xb5\x2f\xfd" not in stored  # no frame of zstd begins anywhere
        store.close()


async def test_keys_that_are_wrong_or_missing_are_named(tmp_path: Path) -> None:
    store = store_in(tmp_path, keys=keyring())
    info = await save(store, {MEMORY: noise(1, 3 * PAGE)})
    store.close()
    for ring in (Keyring(), keyring(OTHER)):
        with pytest.raises(KeyMissing, match=str(keyring().active)):
            store_in(tmp_path, keys=ring)
        store = SnapshotStore(tmp_path, keys=ring)
        store.staging.open()
        with pytest.raises(KeyMissing, match=str(keyring().active)):
            await store.load(info)
        assert not list(store.staging.path.iterdir())
        store.close()


async def test_a_rotated_key(tmp_path: Path) -> None:
    """Old snapshots stay readable with the old key, new pages go under the new one, deltas refer across."""
    old = {MEMORY: heap(1, 40)}
    new = {MEMORY: b"changed!" + old[MEMORY][8:] + noise(3, PAGE)}
    store = store_in(tmp_path, keys=keyring(KEY))
    first = await save(store, old)
    store.close()
    rotated = keyring(OTHER, KEY)
    store = store_in(tmp_path, keys=rotated)
    second = await save(store, new, parent=first.id)
    assert second.stored_bytes < first.stored_bytes / 2
    store.close()
    store = store_in(tmp_path, keys=keyring(OTHER, KEY))
    assert await load(store, first) == old
    assert await load(store, second) == new
    await store.delete(first.id)
    assert await load(store, second) == new
    keys = {path.read_bytes()[12:20].hex() for path in home_of(tmp_path).glob("*.pack")}
    assert keys == {keyring(KEY).active, keyring(OTHER).active}
    store.close()


async def test_a_store_that_became_encrypted_and_clear_again(tmp_path: Path) -> None:
    content: dict[str, Content] = {}
    infos: list[SnapshotInfo] = []
    for n, ring in enumerate((Keyring(), keyring(), Keyring(None, [KEY]))):
        store = store_in(tmp_path, keys=ring)
        data = {MEMORY: bytes([n]) + heap(1, 20)[1:] + noise(n, PAGE)}
        infos.append(await save(store, data, parent=infos[-1].id if infos else None))
        content[infos[-1].id] = data
        for info in infos:
            assert await load(store, info) == content[info.id]
        store.close()


async def test_a_key_that_only_a_former_pack_needs_is_asked_for_at_the_start(tmp_path: Path) -> None:
    """The snapshots of the old key are gone, but newer ones refer to pages under it: found out at the first restore."""
    store = store_in(tmp_path, keys=keyring(KEY))
    first = await save(store, {MEMORY: heap(1, 40)})
    store.close()
    store = store_in(tmp_path, keys=keyring(OTHER, KEY))
    await save(store, {MEMORY: heap(1, 40) + noise(1, PAGE)}, parent=first.id)
    await store.delete(first.id)
    store.close()
    with pytest.raises(KeyMissing, match=str(keyring(KEY).active)):
        store_in(tmp_path, keys=keyring(OTHER))
