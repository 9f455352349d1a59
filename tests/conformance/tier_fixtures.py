"""The tiers that the conformance suite runs on: a directory, moto (an S3 of its own on loopback), and Ceph (`long`)."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

from rethaw.snapshots.tiers.base import Tier
from rethaw.snapshots.tiers.local import LocalTier
from rethaw.snapshots.tiers.s3 import S3Tier
from rethaw.snapshots.tiers.settings import S3Settings
from rethaw.testing.ceph import CephGateway, missing_programs

MakeTier = Callable[[], Tier]
_numbers = itertools.count()


def make_bucket(url: str, key: str, secret: str) -> None:
    client: Any = boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket="agents")
    client.close()


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Settings]:
    """An S3 service with one bucket. It does not check credentials."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        make_bucket(url, "key", "secret")
        yield S3Settings("agents", url, access_key_id="key", secret_access_key="secret")
    finally:
        server.stop()


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Settings]:
    """A real one, which does."""
    if missing := missing_programs():
        pytest.fail(f"{', '.join(missing)} are missing; run: scripts/setup.sh long")
    with CephGateway(tmp_path_factory.mktemp("ceph") / "cluster") as gateway:
        make_bucket(gateway.url, gateway.access_key, gateway.secret_key)
        yield S3Settings(
            "agents", gateway.url, access_key_id=gateway.access_key, secret_access_key=gateway.secret_key, timeout_s=60
        )


def fresh(settings: S3Settings) -> S3Settings:
    """The same bucket, another folder."""
    from dataclasses import replace

    return replace(settings, prefix=f"t/{next(_numbers)}")


@pytest.fixture(params=["local", "moto", pytest.param("ceph", marks=pytest.mark.long)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tier(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Tier:
    """An empty tier."""
    if kind == "local":
        return LocalTier(tmp_path / "tier")
    return S3Tier(fresh(request.getfixturevalue(kind)))
