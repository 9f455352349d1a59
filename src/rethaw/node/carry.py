"""The files of a snapshot for a fresh boot: what the agent had changed, under the same paths.

They are read in a throwaway restore of the snapshot, as one tar, when the new sandbox first asks. It asks before its program
starts (rethaw.guest.carried), with Context calls, so that an engine need not be able to write into a sandbox.

Left out: what came with the image and is as it was, the kernel's and guestd's own, the machine's name, sockets and pipes,
Python's byte code (the new source may be as old and as long as the former), and files that the new code brings. What the
agent had removed of its image is there again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tarfile
from pathlib import Path

from rethaw.model import faults
from rethaw.model.errors import RethawError
from rethaw.model.types import AgentSpec, SnapshotInfo
from rethaw.node import compare, peek
from rethaw.node.parts import Parts
from rethaw.node.peek import Throwaways

log = logging.getLogger("rethaw.node")

CHUNK = 1 << 18  # bytes of the tar in one answer, which guestd holds whole
_KINDS = ("file", "directory", "link")
_OURS = ("/etc/hosts", "/etc/hostname")  # guestd writes them at each boot
_APP = "/app/"


class Carry:
    """The files of one snapshot, for one life. `agent`: whose code they are laid over."""

    def __init__(self, parts: Parts, info: SnapshotInfo, agent: AgentSpec, generation: str) -> None:
        self.info = info
        self._parts = parts
        self._agent = agent
        self._path = _directory(parts) / f"{generation}.tar"
        self._making: asyncio.Task[None] | None = None

    async def read(self, offset: int) -> tuple[bytes, bool]:
        """Up to CHUNK bytes of the tar from `offset`, and whether that was the end. Raises as `Throwaways.open`."""
        failed = self._making is not None and self._making.done() and self._making.exception() is not None
        if self._making is None or failed:
            self._making = asyncio.ensure_future(self._make())
        # Shielded: a save cancels whoever asks, and it asks again.
        await asyncio.shield(self._making)
        return await asyncio.to_thread(self._read, offset)

    def _read(self, offset: int) -> tuple[bytes, bool]:
        with self._path.open("rb") as file:
            file.seek(offset)
            data = file.read(CHUNK)
            return data, file.tell() >= os.fstat(file.fileno()).st_size

    async def _make(self) -> None:
        throwaways = Throwaways(self._parts, limit=1, keep_s=0.0)
        try:
            async with throwaways.reading(self.info) as box:
                rootfs = await self._parts.images.rootfs(self.info.image)
                tree = await asyncio.to_thread(compare.above, await peek.drain(await box.tell("tree")), rootfs)
                paths = await asyncio.to_thread(self._wanted, tree)
                await self._take(box, paths)
        finally:
            await throwaways.close()
        faults.point("carry.made")
        log.info("%d files of snapshot %s, %d bytes", len(paths), self.info.id, self._path.stat().st_size)

    def _wanted(self, tree: compare.Tree) -> list[str]:
        brought = set(_OURS)
        if self._agent.code is not None:
            with tarfile.open(self._parts.data_dir / "code" / f"{self._agent.code}.tar.gz") as code:
                brought |= {_APP + os.path.normpath(member.name) for member in code if not member.isdir()}
        return [
            path
            for path, found in sorted(tree.own.items())
            if found is not None
            and found.kind in _KINDS
            and path not in brought
            and not path.endswith(".pyc")
            and not (path + "/").endswith("/__pycache__/")
        ]

    async def _take(self, box: peek.Throwaway, paths: list[str]) -> None:
        run = await box.tell("take")

        async def feed() -> None:
            for path in paths:
                await run.write(os.fsencode(path) + b"\0")
            run.end_input()

        feeding = asyncio.ensure_future(feed())
        try:
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            with self._path.open("wb") as file:
                async for data in peek.stream(run):
                    await asyncio.to_thread(file.write, data)
        finally:
            feeding.cancel()

    async def close(self) -> None:
        """The life is over, or has all of them. Asked again, it reads them again."""
        making, self._making = self._making, None
        if making is not None:
            making.cancel()
            with contextlib.suppress(asyncio.CancelledError, RethawError, OSError):
                await making
        self._path.unlink(missing_ok=True)


def _directory(parts: Parts) -> Path:
    return parts.data_dir / "run" / "carry"


def sweep(parts: Parts) -> None:
    """What a former process left."""
    for left in _directory(parts).glob("*.tar"):
        left.unlink(missing_ok=True)
