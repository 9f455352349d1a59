"""A node with its files and its uploader, on a tier that counts and can be out of order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from rethaw.model.errors import TierUnavailable
from rethaw.snapshots import records
from rethaw.snapshots.fetching import RemotePacks
from rethaw.snapshots.tiers.base import Found, Source, Tier, source_size
from rethaw.snapshots.uploads import Job, PackFile, Uploader

KIB = 1 << 10
LEAST, MOST = 8 * KIB, 32 * KIB  # a thousandth of the real ones


class Watched:
    """A tier that counts, and that can be out of order."""

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.label = inner.label
        self.puts: list[tuple[str, int]] = []
        self.down = False
        self.gate = asyncio.Event()  # objects wait here
        self.gate.set()

    def _check(self) -> None:
        if self.down:
            raise TierUnavailable("down", remedy="wait", object="x", tier=self.label, reason="answer")

    async def put(self, name: str, data: Source) -> None:
        self._check()
        if name.startswith("objects/"):
            await self.gate.wait()
        await self.inner.put(name, data)
        self.puts.append((name, source_size(data)))

    async def get(self, name: str, offset: int, length: int) -> bytes:
        self._check()
        return await self.inner.get(name, offset, length)

    async def size(self, name: str) -> int:
        self._check()
        return await self.inner.size(name)

    async def list(self, prefix: str) -> Sequence[Found]:
        self._check()
        return await self.inner.list(prefix)

    async def delete(self, name: str) -> None:
        self._check()
        await self.inner.delete(name)

    @property
    def objects(self) -> list[int]:
        """Sizes of the objects that were put, in order."""
        return [size for name, size in self.puts if name.startswith("objects/")]

    @property
    def records(self) -> list[str]:
        return [name.removeprefix("snapshots/") for name, _ in self.puts if name.startswith("snapshots/")]


class Node:
    """A node's files, and its uploader."""

    def __init__(self, home: Path, tier: Tier) -> None:
        self.home = home
        self.tier = Watched(tier)
        self.packs: dict[str, PackFile] = {}
        self.told: list[str] = []

    def pack(self, name: str, size: int) -> PackFile:
        if name not in self.packs:
            path = self.home / "packs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(random.Random(name).randbytes(size))
            self.packs[name] = PackFile(name, path, size)
        return self.packs[name]

    def job(self, snapshot: str, **packs: int) -> Job:
        """With packs of these sizes."""
        manifest = self.home / "manifests" / snapshot
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_bytes(f"manifest of {snapshot}".encode())
        info = json.dumps({"id": snapshot}).encode()
        return Job(snapshot, manifest, tuple(self.pack(n, size) for n, size in packs.items()), info)

    def uploader(self, **options: Any) -> Uploader:
        async def told(snapshot: str, ms: float) -> None:
            assert ms >= 0
            self.told.append(snapshot)

        settings: dict[str, Any] = {
            "linger_s": 0.0,
            "least": LEAST,
            "most": MOST,
            "retry_s": (0.01, 0.05),
            "owner": "us",
        }
        return Uploader(self.tier, self.home / "remote", on_uploaded=told, **settings | options)

    @contextlib.asynccontextmanager
    async def running(self, **options: Any) -> AsyncGenerator[Uploader]:
        uploader = self.uploader(**options)
        await uploader.start()
        try:
            yield uploader
        finally:
            await uploader.close()


async def whole(tier: Tier, *jobs: Job) -> None:
    """The tier alone gives back every byte of these."""
    remote = RemotePacks(tier)
    for job in jobs:
        record = await records.read(tier, job.snapshot)
        assert record.manifest == job.manifest.read_bytes() and record.header.info == job.info
        assert set(record.header.packs) == {pack.id for pack in job.packs}
        for pack in job.packs:
            place, data = record.header.packs[pack.id], pack.path.read_bytes()
            assert place.size == pack.size
            assert await remote.read(place.extents, 0, pack.size) == data
            for offset in (0, pack.size // 3, max(pack.size - 5, 0)):
                assert await remote.read(place.extents, offset, pack.size - offset) == data[offset:]
