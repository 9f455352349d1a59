"""Snapshot records: what was put is read, and nothing else is believed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rethaw.model.errors import InvalidInput, ObjectDamaged, ObjectMissing
from rethaw.snapshots import records
from rethaw.snapshots.fetching import restore_catalog
from rethaw.snapshots.packing import Extent
from rethaw.snapshots.records import Header, PackPlace
from rethaw.snapshots.tiers.local import LocalTier

PACKS = {
    "p_1": PackPlace(30, (Extent("objects/a", 5, 0, 10), Extent("objects/b", 0, 10, 20))),
    "p_2": PackPlace(0, ()),
}
HEADER = Header("snap_1", b'{"id": "snap_1", "seq": 4}', PACKS)
MANIFEST = bytes(range(256)) * 10


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    return LocalTier(tmp_path / "tier")


async def test_round_trip(tier: LocalTier) -> None:
    data = records.encode(HEADER, MANIFEST)
    await tier.put("snapshots/snap_1", data)
    found = await records.read(tier, "snap_1")
    assert found.header == HEADER and found.manifest == MANIFEST
    assert await records.read_header(tier, "snap_1", len(data)) == HEADER
    assert HEADER.objects == {"objects/a", "objects/b"}


async def test_a_header_that_one_read_does_not_hold(tier: LocalTier) -> None:
    header = Header("snap_1", b'"' + b"x" * 200_000 + b'"', PACKS)
    data = records.encode(header, MANIFEST)
    await tier.put("snapshots/snap_1", data)
    assert await records.read_header(tier, "snap_1", len(data)) == header


def test_the_form_stays_what_it_is() -> None:
    """Records of earlier versions must be readable."""
    data = records.encode(HEADER, b"manifest")
    assert data[:8] == b"RTHWREC1" and data[52:].startswith(b'{"snapshot":"snap_1","info":"{\\"id\\"')
    assert b'"p_1":{"size":30,"extents":[["objects/a",5,0,10],["objects/b",0,10,20]]}' in data
    assert data[-40:-32] == b"manifest"


@given(st.data())
async def test_no_damage_is_believed(data: st.DataObject) -> None:
    import tempfile

    whole = records.encode(HEADER, MANIFEST)
    kind = data.draw(st.sampled_from(["flip", "cut", "more"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    if kind == "flip":
        damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    else:
        damaged = whole[:at] if kind == "cut" else whole + b"x" * (at + 1)
    with tempfile.TemporaryDirectory() as directory:
        tier = LocalTier(Path(directory) / "tier")
        await tier.put("snapshots/snap_1", damaged)
        with pytest.raises(ObjectDamaged, match="snapshots/snap_1") as caught:
            await records.read(tier, "snap_1")
        assert caught.value.details["tier"] == tier.label and caught.value.remedy


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"snapshot":"snap_1"', b'"snapshot":"snap_2"'),
        (b'"size":30', b'"size":31'),
        (b"objects/a", b"obj/../.."),
        (b'["objects/a",5,0,10]', b'["objects/a",5,1,10]'),
        (b'["objects/a",5,0,10]', b'["objects/a",5,0,"x"]'),
        (b'"packs":{', b'"sacks":{'),
        (b'"p_2":{"size":0,"extents":[]}', b'"p_2":["size",0,"extents",[]]'),
    ],
)
async def test_a_header_with_a_right_sum_must_fit_together_too(tier: LocalTier, old: bytes, new: bytes) -> None:
    data = records.encode(HEADER, b"")
    text = data[52:-32].replace(old, new)
    assert text != data[52:-32]
    fixed = data[:8] + len(text).to_bytes(4, "big") + data[12:20] + hashlib.sha256(text).digest()
    await tier.put("snapshots/snap_1", fixed + text + data[-32:])
    with pytest.raises(ObjectDamaged, match="its header is not one"):
        await records.read(tier, "snap_1")


async def test_extents_must_make_up_their_packs() -> None:
    for extents in ((), (Extent("a", 0, 0, 29),), (Extent("a", 0, 0, 20), Extent("b", 0, 10, 20))):
        with pytest.raises(InvalidInput, match="p_1"):
            records.encode(Header("s", b"{}", {"p_1": PackPlace(30, extents)}), b"")


async def test_the_catalog_of_a_tier(tier: LocalTier) -> None:
    assert await restore_catalog(tier) == []
    for n in range(3):
        await tier.put(f"snapshots/snap_{n}", records.encode(Header(f"snap_{n}", b"%d" % n, PACKS), MANIFEST))
    await tier.put("snapshots/snap_1", b"rot")
    await tier.put("objects/x", b"no record")
    found = await restore_catalog(tier)
    assert [listed.snapshot for listed in found] == ["snap_0", "snap_1", "snap_2"]
    assert found[0].header is not None and found[0].header.info == b"0"
    assert found[1].header is None and "snap_1" in str(found[1].error)
    with pytest.raises(ObjectMissing):
        await records.read(tier, "snap_9")
