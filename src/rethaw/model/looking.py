"""What the API may ask of a node about snapshots, by looking into throwaway restores of them.

A throwaway is a sandbox without a generation: nothing it says is accepted, it writes nothing to the log, holds no lease
and is destroyed afterwards. Paths are bytes, as the guest's kernel has them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from rethaw.model.types import SnapshotInfo
from rethaw.model.wire import Wire

FileKind = Literal["file", "directory", "link", "fifo", "socket", "device"]
IDLE_S = 900.0  # a shell without a byte either way is ended
IDLE_MAX_S = 86400.0


@dataclass(frozen=True)
class FileEntry:
    """One file. `path` is text, with undecodable bytes as lone surrogates (PEP 383), which wire types refuse. `mtime_ns`
    is since 1970."""

    path: str
    kind: FileKind
    mode: int  # permission bits
    size: int  # of a file, in bytes; 0 of anything else
    mtime_ns: int
    uid: int
    gid: int
    target: str | None = None  # of a link


@dataclass(frozen=True)
class FileChange:
    """One difference. Sizes are None where there is no such file. `what`: which of kind, content, mode, owner, target."""

    path: str
    change: Literal["added", "removed", "changed"]
    kind: FileKind  # of the newer one, of the older one when it is removed
    size_before: int | None = None
    size_after: int | None = None
    what: tuple[str, ...] = ()


class Verified(Wire):
    """Every stored byte of a snapshot was read and checked."""

    snapshot: str
    ok: bool
    bytes: int  # stored
    ms: float


class TerminalSize(Wire):
    columns: int = 80
    rows: int = 24
    kind: str = "xterm-256color"


class ShellRequest(Wire):
    """What to run: `command`, or a shell. Without `terminal` its streams are plain. `idle_s`: at most IDLE_MAX_S."""

    command: tuple[str, ...] = ()
    terminal: TerminalSize | None = None
    idle_s: float = IDLE_S


class Shell(Protocol):
    """A program in a throwaway of its own. `frozen`: how many of the agent's processes stand still beside it."""

    frozen: int

    async def read(self) -> tuple[str, bytes] | None:
        """The next bytes it wrote, with "stdout" or "stderr"; None at its end."""
        ...

    async def write(self, data: bytes) -> None: ...

    def end_input(self) -> None: ...

    def resize(self, columns: int, rows: int) -> None: ...

    async def wait(self) -> tuple[int, str]:
        """Exit code, and why when it did not end by itself."""
        ...

    async def close(self) -> None:
        """Destroy the throwaway."""
        ...


class Looking(Protocol):
    """All raise SnapshotUnusable, StorageFull, EngineError, or Unavailable when too many throwaways are open."""

    async def files(self, info: SnapshotInfo, path: bytes, *, deep: bool = False) -> list[FileEntry]:
        """`path` itself, or what is in it when it is a directory (`deep`: below it as well). Raises NotFound."""
        ...

    async def content(self, info: SnapshotInfo, path: bytes) -> AsyncIterator[bytes]:
        """The bytes of a regular file; links are followed. Raises NotFound, InvalidInput for anything else."""
        ...

    async def archive(self, info: SnapshotInfo, path: bytes) -> AsyncIterator[bytes]:
        """`path` as an uncompressed tar, under its own last name. Raises NotFound, InvalidInput."""
        ...

    async def changes(self, before: SnapshotInfo, after: SnapshotInfo) -> list[FileChange]:
        """What differs between their files, by path. What comes from the images or the kernel is left out."""
        ...

    async def verify(self, info: SnapshotInfo) -> Verified:
        """Read every stored byte. Raises SnapshotUnusable."""
        ...

    async def shell(self, info: SnapshotInfo, request: ShellRequest) -> Shell:
        """Run a program in a throwaway."""
        ...
