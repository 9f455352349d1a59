"""`Client().snapshots`: what is in a snapshot, what differs between two, whether one is whole, a shell inside.

A SNAPSHOT is an id or a unique beginning of one, or a session's, whose newest snapshot is meant then.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import httpx2

from rethaw.model.durations import Duration, seconds
from rethaw.model.errors import Conflict, InvalidInput, NotFound
from rethaw.model.looking import IDLE_S, FileEntry, ShellRequest, TerminalSize, Verified
from rethaw.model.types import SnapshotInfo
from rethaw.sdk import calls, looking
from rethaw.sdk.calls import Call
from rethaw.sdk.looking import Difference

if TYPE_CHECKING:
    from rethaw.sdk.aclient import AsyncClient
    from rethaw.sdk.client import Client
    from rethaw.sdk.session import Session
    from rethaw.sdk.shell import Shell


class Snapshots:
    """Nothing here changes a session or its log. Raises SnapshotUnusable naming what is damaged, NotFound."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def files(self, snapshot: str, path: str | bytes = "/", *, deep: bool = False) -> list[FileEntry]:
        """The file at `path`, or what is in that directory; `deep`: below it as well."""
        return self._client.run(looking.files(snapshot, path, deep))

    def read(self, snapshot: str, path: str | bytes) -> bytes:
        """A regular file's bytes."""
        return b"".join(self.content(snapshot, path))

    def content(self, snapshot: str, path: str | bytes) -> Iterator[bytes]:
        """A regular file's bytes, as they come."""
        return self._stream(looking.content(snapshot, path))

    def get(self, snapshot: str, path: str | bytes, target: Path) -> list[str]:
        """Copy a file or directory out of it to `target`, which must not exist. Returns what was left out, with why."""
        chunks = self._stream(looking.archive(snapshot, path))
        try:
            return looking.unpack(cast("IO[bytes]", _Reader(chunks)), target)
        finally:
            chunks.close()

    def verify(self, snapshot: str) -> Verified:
        """Read and check every stored byte. Raises SnapshotUnusable naming snapshot and file."""
        return self._client.run(looking.verify(snapshot))

    def pin(self, snapshot: str, pinned: bool = True) -> SnapshotInfo:
        """Keep it whatever retention says, or (False) no longer."""
        return self._client.run(calls.pin(snapshot, pinned))

    def export(self, snapshot: str, target: Path) -> int:
        """Write it and all that a restore needs into the file `target`, which must not exist, not encrypted; its bytes."""
        chunks = self._stream(calls.export(snapshot))
        size = 0
        try:
            first = next(chunks, b"")
            with target.open("xb") as out:
                os.fchmod(out.fileno(), 0o600)
                for chunk in itertools.chain([first], chunks):
                    size += out.write(chunk)
        except FileExistsError as error:
            raise Conflict(f"{str(target)!r} exists already", remedy="name another file, or remove it first") from error
        except OSError as error:
            raise InvalidInput(f"{str(target)!r} cannot be written: {error.strerror}") from error
        finally:
            chunks.close()
        return size

    def import_file(self, source: Path) -> Session[Any]:
        """A new session, suspended at the snapshot in the exported file `source`. Raises InvalidInput when the file is
        damaged, EngineMismatch or ImageError when it does not fit the server."""
        call = calls.import_()
        request = self._client.target.request(call)
        try:
            with source.open("rb") as f:
                request["content"] = iter(lambda: f.read(1 << 20), b"")
                response = self._client.http.request(**request)
        except OSError as error:
            raise InvalidInput(f"{str(source)!r} cannot be read: {error.strerror}", remedy="name a file") from error
        except httpx2.HTTPError as e:
            raise self._client.target.unavailable(e) from e
        if response.status_code >= 400:
            where = {"url": self._client.url, "token_source": self._client.target.source}
            raise calls.error_of(response.status_code, response.content, **where)
        view = call.read(response.content)
        return self._client.sessions.get(view.id)

    def every(self, name: str | None = None) -> list[SnapshotInfo]:
        """All snapshots of the session that `name` begins, of every session without one."""
        if name is not None:
            return self._client.sessions.snapshots(name)
        found: list[SnapshotInfo] = []
        for view in self._client.sessions.list(limit=1 << 30):
            try:
                found += self._client.sessions.snapshots(view.id)
            except NotFound:  # erased meanwhile
                continue
        return found

    def diff(self, before: str, after: str, *, files: bool = True) -> Difference:
        """What changed from `before` to `after`: files (unless switched off, which is quicker), events, model calls."""
        return self._client.run(looking.diff(before, after, files))

    def shell(
        self,
        snapshot: str,
        command: Sequence[str] = (),
        *,
        terminal: TerminalSize | None = None,
        idle: Duration = IDLE_S,
    ) -> Shell:
        """Run `command` (or a shell) in a throwaway restore, in which the agent's processes stand still. With
        `terminal` on one of that size. `idle`: it is ended after so long without a byte either way."""
        from rethaw.sdk.shell import Shell

        request = ShellRequest(command=tuple(command), terminal=terminal, idle_s=seconds(idle))
        return Shell(self._client.target, snapshot, request)

    def _stream(self, call: Call[bytes]) -> _Stream:
        return _Stream(self._client, call)


class _Stream(Iterator[bytes]):
    """The bytes of an answer. What is wrong is raised at the first one, or where it was cut off."""

    def __init__(self, client: Client, call: Call[bytes]) -> None:
        self._source = self._chunks(client, call)

    def __next__(self) -> bytes:
        return next(self._source)

    def close(self) -> None:
        self._source.close()

    def _chunks(self, client: Client, call: Call[bytes]) -> Generator[bytes]:
        try:
            with client.http.stream(**client.target.request(call)) as response:
                if response.status_code >= 400:
                    body = response.read()
                    raise calls.error_of(response.status_code, body, url=client.url, token_source=client.target.source)
                yield from response.iter_bytes()
        except httpx2.HTTPError as e:
            raise client.target.unavailable(e) from e


class _Reader:
    """`read` over chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = b""

    def read(self, size: int) -> bytes:
        while len(self._left) < size:
            more = next(self._chunks, None)
            if more is None:
                break
            self._left += more
        out, self._left = self._left[:size], self._left[size:]
        return out


class AsyncSnapshots:
    """`Snapshots` with await. Archives, exported files and shells are of the blocking client alone."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def files(self, snapshot: str, path: str | bytes = "/", *, deep: bool = False) -> list[FileEntry]:
        """The file at `path`, or what is in that directory; `deep`: below it as well."""
        return await self._client.run(looking.files(snapshot, path, deep))

    async def read(self, snapshot: str, path: str | bytes) -> bytes:
        """A regular file's bytes."""
        return await self._client.run(looking.content(snapshot, path))

    async def pin(self, snapshot: str, pinned: bool = True) -> SnapshotInfo:
        """Keep it whatever retention says, or (False) no longer."""
        return await self._client.run(calls.pin(snapshot, pinned))

    async def verify(self, snapshot: str) -> Verified:
        """Read and check every stored byte. Raises SnapshotUnusable naming snapshot and file."""
        return await self._client.run(looking.verify(snapshot))

    async def diff(self, before: str, after: str, *, files: bool = True) -> Difference:
        """What changed from `before` to `after`: files (unless switched off, which is quicker), events, model calls."""
        return await self._client.run(looking.diff(before, after, files))
