"""Agents' code: a tar.gz under its SHA-256."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from rethaw.model.errors import InvalidInput, StorageFull

_GZIP = b"\x1f\x8b"


async def keep(chunks: AsyncIterator[bytes], directory: Path) -> str:
    """Write the archive to DIRECTORY/SHA256.tar.gz, durably, and return the digest. Raises InvalidInput, StorageFull."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=directory, prefix=".upload-")
    digest, size, head = hashlib.sha256(), 0, b""
    try:
        with os.fdopen(handle, "wb") as file:
            async for chunk in chunks:
                head = (head + chunk)[: len(_GZIP)]
                if not _GZIP.startswith(head):
                    raise InvalidInput("the blob is no tar.gz", remedy="send a gzip-compressed tar archive")
                size += len(chunk)
                digest.update(chunk)
                await asyncio.to_thread(file.write, chunk)
            if size < len(_GZIP):
                raise InvalidInput("the blob is empty", remedy="send a gzip-compressed tar archive")
            await asyncio.to_thread(_sync, file)
        final = directory / f"{digest.hexdigest()}.tar.gz"
        Path(name).rename(final)
        await asyncio.to_thread(_sync_directory, directory)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(
                f"no room for the blob in {directory}", remedy="make room on the server's disk"
            ) from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
    return digest.hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
