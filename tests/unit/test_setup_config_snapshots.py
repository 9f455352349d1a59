"""The tables [snapshots] and [snapshots.s3], and the environment over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rethaw.model.errors import InvalidInput
from rethaw.server.config import load
from rethaw.server.config_snapshots import SnapshotSettings
from rethaw.snapshots.keys import key_id
from rethaw.snapshots.tiers.settings import S3Settings

MIB = 1 << 20
KEYS = {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "hunter2"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def snapshots(text: str, env: dict[str, str] | None = None) -> SnapshotSettings:
    Path("rethaw.toml").write_text(text)
    return load(env=env or {}).snapshots


def s3(text: str, env: dict[str, str] | None = None) -> S3Settings:
    found = snapshots(f"[snapshots.s3]\n{text}", env).s3
    assert found is not None
    return found


def test_nothing_is_needed() -> None:
    for text in ("", "[snapshots]", "[snapshots.s3]"):
        assert snapshots(text) == SnapshotSettings()
    assert snapshots("", KEYS).s3 is None
    assert SnapshotSettings().keyring({}).active is None


def test_sizes() -> None:
    found = snapshots('[snapshots]\nstaging_bytes = "1.5GiB"\ncache_bytes = 0')
    assert (found.staging_bytes, found.cache_bytes) == (1536 * MIB, 0)
    found = snapshots(
        '[snapshots]\nstaging_bytes = "1GiB"', {"RETHAW_STAGING_BYTES": "67108864", "RETHAW_CACHE_BYTES": "0"}
    )
    assert (found.staging_bytes, found.cache_bytes) == (64 * MIB, 0)


def test_keys_from_files_and_from_the_environment(tmp_path: Path) -> None:
    for name in ("new", "old", "older"):
        (tmp_path / name).write_bytes(name.encode().ljust(32))
    ids = {name: key_id(name.encode().ljust(32)) for name in ("new", "old", "older")}
    text = f'[snapshots]\nencryption_key_file = "{tmp_path}/new"\nold_key_files = ["{tmp_path}/old"]'
    ring = snapshots(text).keyring({})
    assert ring.active == ids["new"] and ring.knows(ids["old"]) and not ring.knows(ids["older"])
    variables = {
        "RETHAW_SNAPSHOT_KEY_FILE": f"{tmp_path}/old",
        "RETHAW_SNAPSHOT_OLD_KEY_FILES": f"{tmp_path}/new:{tmp_path}/older",
    }
    ring = snapshots(text, variables).keyring({})
    assert ring.active == ids["old"] and ring.knows(ids["older"])
    with pytest.raises(InvalidInput, match=r"old_key_files.*absent"):
        snapshots(f'[snapshots]\nold_key_files = ["{tmp_path}/absent"]').keyring({})


def test_a_bucket() -> None:
    assert s3('bucket = "agents"') == S3Settings(bucket="agents")
    found = s3(
        'bucket = "agents"\nendpoint = "http://127.0.0.1:9000/"\nregion = "eu-west-1"\nprefix = "a/b/"\n'
        'access_key_id = "A"\nsecret_access_key = "hunter2"\ntimeout = "500ms"\nlinger = 0'
    )
    assert found == S3Settings("agents", "http://127.0.0.1:9000", "eu-west-1", "a/b", "A", "hunter2", None, 0.5, 0.0)
    assert "hunter2" not in repr(found) and found.label == "S3 bucket agents at http://127.0.0.1:9000"


def test_the_environment_goes_over_the_file() -> None:
    env = {
        "RETHAW_S3_BUCKET": "other",
        "RETHAW_S3_ENDPOINT": "https://h:1",
        "RETHAW_S3_REGION": "r",
        "RETHAW_S3_PREFIX": "p",
        "RETHAW_S3_TIMEOUT": "2s",
        "RETHAW_S3_LINGER": "1m",
        "AWS_SESSION_TOKEN": "T",
        **KEYS,
    }
    text = 'bucket = "agents"\naccess_key_id = "B"\nsecret_access_key = "C"\ntimeout = "9s"'
    assert s3(text, env) == S3Settings("other", "https://h:1", "r", "p", "A", "hunter2", "T", 2.0, 60.0)
    assert s3(text, {"AWS_SESSION_TOKEN": "T"}).session_token is None  # of another pair
    assert s3('bucket = "agents"', {"AWS_DEFAULT_REGION": "x"}).region == "x"
    found = snapshots("", {"RETHAW_S3_BUCKET": "agents"}).s3
    assert found is not None and found.bucket == "agents"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("snapshots = 1", "snapshots is not a table"),
        ("[snapshots]\nstaging = 1", "'staging' in [snapshots] is not a setting; known: cache_bytes"),
        ('[snapshots]\nstaging_bytes = "much"', "snapshots.staging_bytes = 'much' is not a size"),
        ('[snapshots]\nstaging_bytes = "1MiB"', "snapshots.staging_bytes = '1MiB' is too small"),
        ("[snapshots]\ncache_bytes = -1", "snapshots.cache_bytes = -1 is not a size"),
        ("[snapshots]\ncache_bytes = false", "snapshots.cache_bytes = False is not a size"),
        ("[snapshots]\ncache_bytes = 1.5", "snapshots.cache_bytes = 1.5 is not a size"),
        ('[snapshots]\nencryption_key_file = "key"', "snapshots.encryption_key_file = 'key' is not a path"),
        ("[snapshots]\nold_key_files = [1]", "snapshots.old_key_files = 1 is not a path"),
        ("[snapshots]\ns3 = 1", "snapshots.s3 is not a table"),
        ('[snapshots.s3]\nregion = "x"', "[snapshots.s3] names no bucket"),
        ('[snapshots.s3]\nbucket = "A"', "snapshots.s3.bucket = 'A' is not a bucket's name"),
        ("[snapshots.s3]\nbucket = 1", "snapshots.s3.bucket = 1 is not"),
        ('[snapshots.s3]\nbucket = "abc"\nendpoint = "h:1"', "snapshots.s3.endpoint = 'h:1' is not an endpoint"),
        ('[snapshots.s3]\nbucket = "abc"\nendpoint = "http://h/abc"', "snapshots.s3.endpoint"),
        ('[snapshots.s3]\nbucket = "abc"\nprefix = "/x"', "snapshots.s3.prefix = '/x' is not a folder"),
        ('[snapshots.s3]\nbucket = "abc"\nprefix = "a/../b"', "snapshots.s3.prefix"),
        ('[snapshots.s3]\nbucket = "abc"\nregion = "a b"', "snapshots.s3.region = 'a b' is not a region"),
        ('[snapshots.s3]\nbucket = "abc"\ntimeout = "soon"', "snapshots.s3.timeout = 'soon' is not a duration"),
        ('[snapshots.s3]\nbucket = "abc"\ntimeout = 0', "snapshots.s3.timeout = 0 is out of range"),
        ('[snapshots.s3]\nbucket = "abc"\naccess_key_id = "A"', "snapshots.s3.secret_access_key is missing"),
        (
            '[snapshots.s3]\nbucket = "abc"\naccess_key_id = "A"\nsecret_access_key = "hunter2 "',
            "snapshots.s3.secret_access_key is not a key",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_file(text: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        snapshots(text)
    assert str(Path("rethaw.toml").absolute()) in str(caught.value) and said in str(caught.value)
    assert caught.value.remedy and "hunter2" not in str(caught.value)


def test_the_environment_is_named_too() -> None:
    for name in ("RETHAW_S3_ENDPOINT", "RETHAW_S3_TIMEOUT", "RETHAW_STAGING_BYTES", "RETHAW_SNAPSHOT_KEY_FILE"):
        with pytest.raises(InvalidInput, match=rf"{name} \(environment\) = 'x'"):
            snapshots('[snapshots.s3]\nbucket = "abc"', {name: "x"})
    with pytest.raises(InvalidInput, match=r"AWS_SECRET_ACCESS_KEY \(environment\) is missing"):
        snapshots('[snapshots.s3]\nbucket = "abc"', {"AWS_ACCESS_KEY_ID": "A"})
    with pytest.raises(InvalidInput, match="names no bucket"):
        snapshots("", {"RETHAW_S3_ENDPOINT": "http://h"})
