"""An S3 service that is down, slow or broken: a typed error within its time, and all is well once the fault is gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
from tier_fixtures import fresh

from rethaw.model.errors import TierUnavailable
from rethaw.snapshots.tiers.s3 import S3Tier
from rethaw.snapshots.tiers.settings import S3Settings
from rethaw.testing.faultproxy import FAULTS, FaultProxy

MIB = 1 << 20
TIMEOUT_S = 1.5
DATA = bytes(range(256)) * 40
BIG = bytes(20 * MIB)  # more than one request
REASONS = {"slow": "timeout", "403": "credentials"}


@pytest.fixture
def proxy(moto: S3Settings) -> Iterator[FaultProxy]:
    where = urlsplit(moto.endpoint)
    with FaultProxy((str(where.hostname), int(where.port or 0))) as found:
        yield found


@pytest.fixture
def tier(moto: S3Settings, proxy: FaultProxy) -> S3Tier:
    return S3Tier(replace(fresh(moto), endpoint=proxy.url, timeout_s=TIMEOUT_S))


Call = Callable[[S3Tier], Coroutine[Any, Any, Any]]
CALLS: dict[str, Call] = {
    "put": lambda tier: tier.put("a", DATA),
    "put in parts": lambda tier: tier.put("big", BIG),
    "get": lambda tier: tier.get("a", 100, 5000),
    "size": lambda tier: tier.size("a"),
    "list": lambda tier: tier.list(""),
    "delete": lambda tier: tier.delete("b"),
}
# An answer without a body cannot be cut or short.
HARMLESS = {("short", "put"), ("short", "size"), ("short", "delete"), ("cut", "delete")}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_typed_error_within_the_time_and_then_all_is_well(
    tier: S3Tier, proxy: FaultProxy, fault: str, name: str
) -> None:
    await tier.put("a", DATA)
    proxy.fault = fault
    limit = TIMEOUT_S * (3 if name == "put in parts" else 1)
    started = time.monotonic()
    if (fault, name) in HARMLESS:
        await CALLS[name](tier)
    else:
        with pytest.raises(TierUnavailable) as caught:
            await CALLS[name](tier)
        assert tier.label in str(caught.value) and caught.value.remedy
        if name != "put in parts":
            assert caught.value.details["reason"] == REASONS.get(fault, "answer")
    assert time.monotonic() - started < limit + 1.5  # the machine may be busy
    proxy.fault = None
    await CALLS[name](tier)
    assert await tier.get("a", 0, len(DATA)) == DATA


@pytest.mark.parametrize("fault", ["cut", "500", "503"])
@pytest.mark.parametrize("name", ["put", "get", "size"])
async def test_what_passes_is_retried(tier: S3Tier, proxy: FaultProxy, fault: str, name: str) -> None:
    await tier.put("a", DATA)
    proxy.set(fault, times=1)
    await CALLS[name](tier)
    assert proxy.fault is None
    assert await tier.get("a", 0, len(DATA)) == DATA


async def test_a_slow_call_can_be_cancelled(tier: S3Tier, proxy: FaultProxy) -> None:
    await tier.put("a", DATA)
    proxy.fault = "slow"
    task = asyncio.ensure_future(tier.get("a", 0, 1))
    await asyncio.wait([task], timeout=0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_put_that_was_cut_in_its_parts_leaves_nothing_visible(tier: S3Tier, proxy: FaultProxy) -> None:
    await tier.put("a", DATA)
    before = proxy.requests
    task = asyncio.ensure_future(tier.put("big", BIG))
    while proxy.requests < before + 2:  # it has begun to send parts
        await asyncio.wait([task], timeout=0.01)
    proxy.fault = "down"
    with pytest.raises(TierUnavailable):
        await task
    proxy.fault = None
    assert [f.name for f in await tier.list("")] == ["a"]
