"""What `rethaw doctor` says of the bucket and of the keys."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tier_fixtures import fresh

from rethaw.server import doctor
from rethaw.server.config import load
from rethaw.server.doctor import Finding
from rethaw.snapshots.keys import key_id
from rethaw.snapshots.tiers.s3 import S3Tier
from rethaw.snapshots.tiers.settings import S3Settings
from rethaw.testing.faultproxy import FaultProxy


@pytest.fixture
def proxy(moto: S3Settings) -> Iterator[FaultProxy]:
    where = urlsplit(moto.endpoint)
    with FaultProxy((str(where.hostname), int(where.port or 0))) as found:
        yield found


async def probed(settings: S3Settings) -> Finding:
    return await doctor.probe_bucket(settings)


async def test_a_bucket_that_works(moto: S3Settings) -> None:
    settings = fresh(moto)
    found = await probed(settings)
    assert found.ok and settings.label in found.said and "put, get and delete in" in found.said
    assert list(await S3Tier(settings).list("")) == []


@pytest.mark.parametrize(
    ("fault", "said"),
    [("down", "does not work"), ("slow", "did not answer within 1 s"), ("403", "refuses the credentials"), ("short", "gave 512 bytes of 1024")],
)  # fmt: skip
async def test_a_bucket_that_does_not(moto: S3Settings, proxy: FaultProxy, fault: str, said: str) -> None:
    proxy.fault = fault
    started = time.monotonic()
    found = await probed(replace(fresh(moto), endpoint=proxy.url, timeout_s=1.0))
    assert not found.ok and said in found.said and found.remedy and not found.needed
    assert time.monotonic() - started < 5


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RETHAW_SNAPSHOT_KEY", raising=False)
    found = doctor._keys(load(env={}))  # pyright: ignore[reportPrivateUsage]
    assert found is None
    key = tmp_path / "key"
    (tmp_path / "rethaw.toml").write_text(f'[snapshots]\nencryption_key_file = "{key}"')
    found = doctor._keys(load(env={}))  # pyright: ignore[reportPrivateUsage]
    assert found is not None and not found.ok and found.needed and str(key) in found.said
    key.write_bytes(bytes(32))
    found = doctor._keys(load(env={}))  # pyright: ignore[reportPrivateUsage]
    assert found == Finding("encryption", True, f"with the key {key_id(bytes(32))}")
