"""Files of a snapshot for a process that begins anew: what the snapshot has on top of its image, as a tar file.

The snapshot is restored and thrown away, its changed files are packed. The new sandbox fetches the pack piece by piece with
`carry` calls before its agent is started (`rethaw.guest.carry` is the other end); nothing of the memory comes along.
"""

from __future__ import annotations

import asyncio
import base64
import os
import tarfile
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

from rethaw.model import faults
from rethaw.model.types import AgentSpec, SnapshotInfo
from rethaw.node import compare, peek
from rethaw.node.parts import Parts
from rethaw.node.peek import Throwaways

CHUNK = 384 << 10  # of one answer
REMOVED = ".rethaw-removed"  # the first member of a pack: NUL-ended paths that the image has and the snapshot has not
_TAKEN = ("file", "directory", "link")  # of a pipe, a socket or a device nothing can be kept
_APP = "/app/"
# Written by the engine or by guestd at each boot.
_NOT = ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/rethaw")


async def pack(parts: Parts, info: SnapshotInfo, target: BinaryIO, brought: Collection[str] = ()) -> None:
    """Write the files that `info` has on top of its image into `target`, with the paths that it has no more. Of `brought`,
    which the new attempt has of its own, nothing; of Python's byte code neither (its new source may be as old and as long).

    Raises SnapshotUnusable, EngineError, ImageError, StorageFull, Unavailable."""
    throwaways = Throwaways(parts)
    box = await throwaways.open(info)
    try:
        rootfs = await parts.images.rootfs(info.image)
        tree = await asyncio.to_thread(compare.above, await peek.drain(await box.tell("tree")), rootfs)
        skip = {*_NOT, *brought}
        own = {path: found for path, found in sorted(tree.own.items()) if path not in skip and not _bytecode(path)}
        wanted = [path for path, found in own.items() if found is not None and found.kind in _TAKEN]
        removed = [path for path, found in own.items() if found is None]
        run = await box.tell("pack")
        feeding = asyncio.ensure_future(_feed(run, removed, wanted))
        try:
            async for data in peek.stream(run):
                await asyncio.to_thread(target.write, data)
        finally:
            feeding.cancel()
    finally:
        await throwaways.discard(box)


async def _feed(run: Any, removed: list[str], wanted: list[str]) -> None:
    """Both lists, an empty path between them."""
    for paths in (removed, [""], wanted):
        data = b"".join(os.fsencode(path) + b"\0" for path in paths)
        for start in range(0, len(data), 1 << 16):
            await run.write(data[start : start + (1 << 16)])
    run.end_input()


def _bytecode(path: str) -> bool:
    return path.endswith(".pyc") or (path + "/").endswith("/__pycache__/")


class Carried:
    """The pack for one life, which runs `agent` in `image`; made when it is first asked for. It has no name, so nothing is
    left of it after a kill."""

    def __init__(self, parts: Parts, info: SnapshotInfo, agent: AgentSpec, image: str) -> None:
        self.info = info
        self._parts = parts
        self._code = agent.code if image != info.image else None  # other code than the snapshot's
        self._making: asyncio.Task[BinaryIO] | None = None

    async def chunk(self, offset: int) -> dict[str, Any]:
        """The bytes from `offset` on, and how many there are in all."""
        failed = self._making is not None and self._making.done() and self._making.exception() is not None
        if self._making is None or failed:
            # A save cancels whoever asks; the pack goes on being made.
            self._making = asyncio.ensure_future(self._make())
        file = await asyncio.shield(self._making)
        size = os.fstat(file.fileno()).st_size
        data = await asyncio.to_thread(os.pread, file.fileno(), CHUNK, max(0, offset))
        return {"data": base64.b64encode(data).decode(), "size": size}

    async def _make(self) -> BinaryIO:
        directory = self._parts.data_dir / "run"
        file = await asyncio.to_thread(_nameless, directory)
        try:
            brought = await asyncio.to_thread(self._brought)
            await pack(self._parts, self.info, file, brought)
            await asyncio.to_thread(file.flush)
        except BaseException:
            file.close()
            raise
        faults.point("carry.made")
        return file

    def _brought(self) -> set[str]:
        """Paths that the new code has."""
        if self._code is None:
            return set()
        with tarfile.open(self._parts.data_dir / "code" / f"{self._code}.tar.gz") as code:
            return {_APP + os.path.normpath(member.name) for member in code if not member.isdir()}

    async def close(self) -> None:
        if self._making is None:
            return
        self._making.cancel()
        (made,) = await asyncio.gather(self._making, return_exceptions=True)
        if not isinstance(made, BaseException):
            made.close()


def _nameless(directory: Path) -> BinaryIO:
    return tempfile.TemporaryFile(dir=directory)
