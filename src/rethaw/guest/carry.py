"""Fetches files of an earlier snapshot, then becomes the agent: `python3 -m rethaw.guest.carry COMMAND ...`.

The other end is `rethaw.node.carry`. What cannot be written is told on stderr and ends the attempt.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import stat
import sys
import tarfile

from rethaw.guest.context import Context
from rethaw.model.errors import RethawError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, List

REMOVED = ".rethaw-removed"  # equal to rethaw.node.carry.REMOVED


class Pack(io.RawIOBase):
    """The pack as a file, read from the node as it is needed."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self._context = context
        self._offset = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = fetch(self._context, self._offset)[: len(buffer)]
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)


def unpack(source: Any, root: str = "/") -> int:
    """Bring the files of a pack under `root`; how many there were."""
    count = 0
    directories: List[tarfile.TarInfo] = []
    with tarfile.open(fileobj=source, mode="r|") as tar:
        for member in tar:
            if member.name == REMOVED:
                inner = tar.extractfile(member)
                for path in (inner.read() if inner is not None else b"").split(b"\0")[:-1]:
                    remove(os.path.join(root, os.fsdecode(path).lstrip("/")))  # noqa: PTH118
                continue
            target = os.path.join(root, member.name)  # noqa: PTH118
            make_room(target, member)
            if member.isdir():
                os.makedirs(target, exist_ok=True)  # noqa: PTH103
                directories.append(member)
            elif member.issym():
                os.symlink(member.linkname, target)  # noqa: PTH211
                os.lchown(target, member.uid, member.gid)
            else:
                inner = tar.extractfile(member)
                with open(target, "wb") as file:  # noqa: PTH123
                    if inner is not None:
                        shutil.copyfileobj(inner, file, 1 << 18)
                settle(target, member)
            count += 1
    for member in reversed(directories):  # their own times last
        settle(os.path.join(root, member.name), member)  # noqa: PTH118
    return count


def remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)  # noqa: PTH108


def make_room(target: str, member: tarfile.TarInfo) -> None:
    """What the image has in that place goes, unless both are directories."""
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH103, PTH120
        return
    if not (member.isdir() and stat.S_ISDIR(found.st_mode)):
        remove(target)


def settle(target: str, member: tarfile.TarInfo) -> None:
    os.chown(target, member.uid, member.gid)
    os.chmod(target, member.mode)  # noqa: PTH101
    os.utime(target, (member.mtime, member.mtime))


def fetch(context: Context, offset: int) -> bytes:
    answer = json.loads(context.call("carry", json.dumps({"offset": offset}).encode()))
    return base64.b64decode(answer["data"])


def main() -> None:
    command = sys.argv[1:]
    try:
        unpack(io.BufferedReader(Pack(Context()), 384 << 10))
    except (RethawError, OSError, tarfile.TarError) as error:
        print(f"rethaw: the files of the last snapshot could not be brought here: {error}", file=sys.stderr)
        sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"rethaw: {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


if __name__ == "__main__":
    main()
