"""A person at a real terminal with the `rethaw` command in it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e_fixtures import SLOWER

from rethaw.cli.screen import Screen
from rethaw.testing.server import RunningServer


class Person:
    """`rethaw ARGS`, or `argv`, in a terminal of its own. `screen` is what it shows, `raw` every byte of it."""

    def __init__(
        self, server: RunningServer, *args: str, rows: int = 24, cols: int = 80, cwd: Path | None = None,
        argv: Sequence[str] = (), env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.screen = Screen(rows, cols)
        self.raw = bytearray()
        self._lock = threading.Condition()
        self._master, slave = pty.openpty()
        self._size(rows, cols)
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        self.process = subprocess.Popen(
            argv or [sys.executable, "-m", "rethaw.cli.main", *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**(env or server.env), "TERM": "xterm-256color"},
            cwd=cwd,
            start_new_session=True,
        )
        threading.Thread(target=self._look, daemon=True).start()

    def __enter__(self) -> Person:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._slave)

    def _look(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:
                return
            with self._lock:
                self.raw += data
                self.screen.feed(data)
                self._lock.notify_all()

    def _size(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def resize(self, rows: int, cols: int) -> None:
        with self._lock:
            self.screen.resize(rows, cols)
        self._size(rows, cols)
        self.process.send_signal(signal.SIGWINCH)  # its terminal is not the controlling one of its session

    def type(self, text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        while data:
            select.select([], [self._master], [])
            data = data[os.write(self._master, data[:4096]) :]

    def enter(self, command: str) -> None:
        """Type a command once the shell's prompt, a "$", is there and nothing behind it."""
        self.until(prompted, "a prompt")
        with self._lock:
            known = len(self.raw)
        self.type(command)
        self.until(lambda _: len(self.raw) > known, "an echo")

    @property
    def text(self) -> list[str]:
        with self._lock:
            return self.screen.text

    def until(self, condition: Callable[[list[str]], Any], what: str = "", timeout_s: float = 60.0) -> None:
        end = time.monotonic() + timeout_s * SLOWER
        with self._lock:
            while not condition(self.screen.text):
                left = end - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"{what or condition} within {timeout_s} s:\n" + "\n".join(self.screen.text))
                self._lock.wait(left)

    def sees(self, line: str, timeout_s: float = 60.0) -> None:
        """Until a line of the screen is `line`."""
        self.until(lambda text: line in text, f"the line {line!r}", timeout_s)

    def shows(self, part: str, timeout_s: float = 60.0) -> None:
        """Until `part` is somewhere on the screen."""
        self.until(lambda text: any(part in line for line in text), repr(part), timeout_s)

    def ended(self, timeout_s: float = 60.0) -> int:
        """Its exit code. Its terminal is as it was."""
        code = self.process.wait(timeout_s * SLOWER)
        now = termios.tcgetattr(self._slave)
        assert now == self.before, (now, self.before)
        return code


def prompted(text: list[str]) -> bool:
    """The last line is a prompt, and nothing more."""
    return [line for line in text if line][-1:] == ["$"]
