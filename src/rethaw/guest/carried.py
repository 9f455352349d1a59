"""Files of an earlier life, put where they were before the program starts: `python3 -I -S carried.py COMMAND ARG ...`.

It asks the node for them (rethaw.node.carry) and then becomes the program. What stands in their place is replaced.
"""

# Paths are plain strings here, see daemon.
# ruff: noqa: PTH103, PTH108, PTH112, PTH114, PTH118, PTH120

from __future__ import annotations

import base64
import json
import os
import shutil
import sys

if not __package__:
    here = __file__.rsplit("/", 1)[0]
    sys.path[:] = [here.rsplit("/", 2)[0], *(p for p in sys.path if p != here)]

import tarfile
from typing import Any, Dict, cast

from rethaw.guest import protocol
from rethaw.guest.context import Connection
from rethaw.model.errors import RethawError

ROOT = "/"


class Source:
    """The tar as a file that is read from front to back."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._have = b""
        self._offset = 0
        self._end = False

    def read(self, size: int) -> bytes:
        while len(self._have) < size and not self._end:
            answer = self._connection.call("carried", json.dumps({"offset": self._offset}).encode())
            ok = json.loads(protocol.answer_of(answer))
            data = base64.b64decode(ok["data"])
            self._offset += len(data)
            self._have += data
            self._end = bool(ok["end"])
        out, self._have = self._have[:size], self._have[size:]
        return out


def put(source: Source, root: str = ROOT) -> int:
    """Unpack; how many there were."""
    options: Dict[str, Any] = {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}
    count = 0
    with tarfile.open(fileobj=cast("Any", source), mode="r|") as tar:
        for member in tar:
            path = os.path.join(root, member.name)
            clear(path, member.isdir())
            os.makedirs(os.path.dirname(path), exist_ok=True)
            tar.extract(member, root, numeric_owner=True, **options)
            count += 1
    return count


def clear(path: str, directory: bool) -> None:
    """Make room at `path`; a directory is left for another one."""
    if os.path.isdir(path) and not os.path.islink(path):
        if not directory:
            shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def main() -> int:
    try:
        connection = Connection(protocol.socket_path(None))
        put(Source(connection))
        connection.call("carried", b'{"done": true}')
        connection.close()
    except (OSError, ValueError, tarfile.TarError, RethawError) as error:
        print(f"rethaw: the files of the former life cannot be put back: {error}", file=sys.stderr)
        return 1
    try:
        os.execvp(sys.argv[1], sys.argv[1:])
    except OSError as error:
        print(f"{sys.argv[1]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126


if __name__ == "__main__":
    sys.exit(main())
