"""Files of snapshots, what differs between two, whether one is whole: `model.looking.Looking` over throwaway restores."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable

from rethaw.model.errors import InvalidInput
from rethaw.model.looking import FileChange, FileEntry, Shell, ShellRequest, Verified
from rethaw.model.types import SnapshotInfo
from rethaw.node import compare, peek
from rethaw.node.parts import Parts
from rethaw.node.peek import NodeShell, Throwaways


class NodeLook:
    """One per node. `throwaways` is closed before the node is."""

    def __init__(self, parts: Parts, throwaways: Throwaways) -> None:
        self._parts = parts
        self._throwaways = throwaways

    async def files(self, info: SnapshotInfo, path: bytes, *, deep: bool = False) -> list[FileEntry]:
        async with self._throwaways.reading(info) as box:
            out = await peek.drain(await box.tell("deep" if deep else "files", _absolute(path)))
        return [FileEntry(**line) for line in peek.lines(out)]

    async def content(self, info: SnapshotInfo, path: bytes) -> AsyncIterator[bytes]:
        return await _begun(self._told(info, "content", _absolute(path)))

    async def archive(self, info: SnapshotInfo, path: bytes) -> AsyncIterator[bytes]:
        return await _begun(self._told(info, "archive", _absolute(path)))

    async def _told(self, info: SnapshotInfo, verb: str, path: bytes) -> AsyncIterator[bytes]:
        async with self._throwaways.reading(info) as box:
            async for chunk in peek.stream(await box.tell(verb, path)):
                yield chunk

    async def changes(self, before: SnapshotInfo, after: SnapshotInfo) -> list[FileChange]:
        if before.id == after.id:
            return []
        async with self._throwaways.reading(before) as old, self._throwaways.reading(after) as new:
            found = compare.trees(*await asyncio.gather(self._tree(before, old), self._tree(after, new)))
            unsure = [path for path, doubt in found.items() if doubt.unsure]
            hashes = await asyncio.gather(*(self._hashes(box, unsure) for box in (old, new)))
        return compare.settle(found, dict(zip(unsure, zip(*hashes, strict=True), strict=True)))

    async def _tree(self, info: SnapshotInfo, box: peek.Throwaway) -> compare.Tree:
        """What the snapshot has on top of its image."""
        rootfs = await self._parts.images.rootfs(info.image)
        out = await peek.drain(await box.tell("tree"))
        return await asyncio.to_thread(compare.above, out, rootfs)

    async def _hashes(self, box: peek.Throwaway, paths: Iterable[str]) -> list[str]:
        run = await box.tell("hashes")

        async def feed() -> None:
            for path in paths:
                await run.write(os.fsencode(path) + b"\0")
            run.end_input()

        feeding = asyncio.ensure_future(feed())
        try:
            return (await peek.drain(run)).decode().split()
        finally:
            feeding.cancel()

    async def verify(self, info: SnapshotInfo) -> Verified:
        began = time.monotonic()
        await self._parts.store.verify(info)
        ms = round((time.monotonic() - began) * 1000, 1)
        return Verified(snapshot=info.id, ok=True, bytes=info.stored_bytes, ms=ms)

    async def shell(self, info: SnapshotInfo, request: ShellRequest) -> Shell:
        workdir = await peek.workdir_of(self._parts, info)
        return await NodeShell.start(self._throwaways, info, workdir, request)


def _absolute(path: bytes) -> bytes:
    if b"\0" in path:
        raise InvalidInput("the path has a NUL byte", remedy="no file has one in its name")
    return path if path.startswith(b"/") else b"/" + path


async def _begun(source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """`source` once its first chunk is here: what is wrong with a path is told before anything is sent."""
    first = await anext(source, b"")

    async def whole() -> AsyncIterator[bytes]:
        yield first
        async for chunk in source:
            yield chunk

    return whole()
