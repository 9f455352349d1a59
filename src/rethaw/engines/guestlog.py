"""What a guest writes to its standard error."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

_LOG_LIMIT = 1 << 20
_TAIL_LIMIT = 4096


class GuestLog:
    """A guest's standard error: the first MiB in a file (made at the first byte), the last 4 KiB in memory."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._written = 0
        self._tail = b""
        self._open = True
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self.drain)

    def drain(self) -> None:
        """Take what is there."""
        while self._open:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.close()
                return
            self._tail = (self._tail + data)[-_TAIL_LIMIT:]
            keep = data[: max(0, _LOG_LIMIT - self._written)]
            if keep:
                with contextlib.suppress(OSError), self._path.open("ab") as file:
                    file.write(keep)
                self._written += len(keep)

    @property
    def tail(self) -> str:
        return self._tail.decode(errors="replace").strip()

    def close(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._fd)
            os.close(self._fd)

    def remove(self) -> None:
        self.close()
        with contextlib.suppress(OSError):
            self._path.unlink()
