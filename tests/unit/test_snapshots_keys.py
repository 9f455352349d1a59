"""Encryption at rest: what was sealed opens with its key only, in its place only."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rethaw.model.errors import InvalidInput, KeyMissing, SnapshotUnusable
from rethaw.snapshots.keys import MAX_FRAMES, OVERHEAD, Keyring, key_id, parse_key

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


@given(st.binary(max_size=1000), st.integers(0, MAX_FRAMES - 1), st.text("abc/_-", min_size=1, max_size=20))
def test_round_trip(data: bytes, frame: int, pack: str) -> None:
    ring = Keyring(KEY)
    sealed = ring.seal(pack, frame, memoryview(data))
    assert len(sealed) == len(data) + OVERHEAD
    assert ring.open(str(ring.active), pack, frame, sealed) == data


def test_the_form_stays_what_it_is() -> None:
    """Packs of earlier versions must open: a sealed frame, recorded."""
    assert key_id(KEY) == "78b8b51ed5c890a1"
    assert Keyring(KEY).seal("p_1", 7, b"frame").hex() == "cc0bfe8242ea74b6bd1f74cb064e28a70e3aad91d7"


def test_after_a_rotation_the_old_key_opens_and_the_new_one_seals() -> None:
    sealed = Keyring(KEY).seal("p", 0, b"x")
    ring = Keyring(OTHER, [KEY])
    assert ring.active == key_id(OTHER) and ring.knows(key_id(KEY))
    assert ring.open(key_id(KEY), "p", 0, sealed) == b"x"
    assert ring.open(key_id(OTHER), "p", 0, ring.seal("p", 0, b"x")) == b"x"


@pytest.mark.parametrize(("pack", "frame"), [("q", 0), ("p", 1)])
def test_a_frame_opens_in_its_place_only(pack: str, frame: int) -> None:
    ring = Keyring(KEY)
    with pytest.raises(SnapshotUnusable, match=f"frame {frame} of pack {pack}"):
        ring.open(key_id(KEY), pack, frame, ring.seal("p", 0, b"x"))


@pytest.mark.parametrize("at", [0, 5, -1])
def test_a_changed_byte_is_found(at: int) -> None:
    ring = Keyring(KEY)
    sealed = bytearray(ring.seal("p", 0, b"some text"))
    sealed[at] ^= 1
    with pytest.raises(SnapshotUnusable, match="damaged"):
        ring.open(key_id(KEY), "p", 0, sealed)
    with pytest.raises(SnapshotUnusable, match="damaged"):
        ring.open(key_id(KEY), "p", 0, b"short")


def test_a_missing_key_is_named_with_its_setting() -> None:
    sealed = Keyring(KEY).seal("p_1", 0, b"x")
    for ring in (Keyring(OTHER), Keyring()):
        with pytest.raises(KeyMissing) as caught:
            ring.open(key_id(KEY), "p_1", 0, sealed)
        assert key_id(KEY) in str(caught.value) and "p_1" in str(caught.value)
        assert "snapshots.old_key_files" in str(caught.value.remedy)
        assert caught.value.details["key"] == key_id(KEY)
    with pytest.raises(KeyMissing, match="encryption_key_file"):
        Keyring().seal("p", 0, b"x")
    assert Keyring().active is None


def test_numbers_beyond_the_nonce_are_refused() -> None:
    for frame in (-1, MAX_FRAMES):
        with pytest.raises(InvalidInput, match=str(frame)):
            Keyring(KEY).seal("p", frame, b"")


@given(st.binary(min_size=32, max_size=32))
def test_keys_as_raw_hex_and_base64(key: bytes) -> None:
    for form in (key, key.hex().encode() + b"\n", base64.b64encode(key), base64.urlsafe_b64encode(key) + b"\n"):
        assert parse_key(form, "here") == key


@pytest.mark.parametrize("data", [b"", b"a" * 31, b"a" * 33, b"0" * 63, b"0" * 65, b"\xff" * 64, b"hunter2"])
def test_what_is_no_key_is_refused_without_being_shown(data: bytes) -> None:
    with pytest.raises(InvalidInput, match="here holds no key") as caught:
        parse_key(data, "here")
    assert "hunter2" not in str(caught.value) and "64 hexadecimal" in str(caught.value.remedy)
    with pytest.raises(InvalidInput):
        Keyring(data)


def test_loading_from_files_and_environment(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "old").write_text(OTHER.hex())
    ring = Keyring.load(tmp_path / "key", [tmp_path / "old"], env={})
    assert ring.active == key_id(KEY) and ring.knows(key_id(OTHER))
    assert KEY.hex() not in repr(ring)
    third = os.urandom(32)
    env = {"RETHAW_SNAPSHOT_KEY": third.hex()}
    assert Keyring.load(tmp_path / "key", env=env).active == key_id(third)
    assert Keyring.load(env={}).active is None
    with pytest.raises(InvalidInput, match="RETHAW_SNAPSHOT_KEY") as caught:
        Keyring.load(env={"RETHAW_SNAPSHOT_KEY": "hunter2"})
    assert "hunter2" not in str(caught.value)
    with pytest.raises(InvalidInput, match=r"encryption_key_file.*absent.*No such file"):
        Keyring.load(tmp_path / "absent", env={})
    with pytest.raises(InvalidInput, match="old_key_files"):
        Keyring.load(old_files=[tmp_path], env={})
