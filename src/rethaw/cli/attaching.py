"""This terminal, or this stdin, joined to the main program of a session, through its freezes and the server's restarts."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from rethaw.cli import output
from rethaw.cli.screen import RESET, Screen
from rethaw.cli.terminal import raw
from rethaw.model.errors import InvalidInput, RethawError, Unavailable
from rethaw.sdk.terminal import Said, Terminal, Written
from rethaw.sdk.transport import Patience

if TYPE_CHECKING:
    from rethaw.sdk.client import Client

DETACH_KEYS = "ctrl-p,ctrl-q"
_CHUNK = 1 << 15
_AHEAD = 1 << 20  # bytes of it that are read before the program has taken what is before them
_KEPT = 64 << 20  # bytes of a piped stdin that can be given again after a crash
_AHEAD_S = 0.5  # how long the first of the keys to detach is held back for the next


def keys_of(text: str) -> bytes:
    """The bytes of "ctrl-p,ctrl-q"; empty for "none". Raises InvalidInput."""
    if text == "none":
        return b""
    out = bytearray()
    for word in text.split(","):
        name = word.strip().lower()
        if name.startswith("ctrl-") and len(name) == 6 and "@" <= name[5].upper() <= "_":
            out.append(ord(name[5].upper()) ^ 0x40)
        elif len(word.strip()) == 1 and word.strip().isascii():
            out += word.strip().encode()
        else:
            raise InvalidInput(
                f"{word!r} in --detach-keys {text!r} is no key", remedy='use letters and ctrl-LETTER, or "none"'
            )
    return bytes(out)


def size_here() -> tuple[int, int] | None:
    """Rows and columns of this terminal; None where there is none. COLUMNS and LINES may be of another one."""
    for stream in (sys.stdout, sys.stdin, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            size = os.get_terminal_size(stream.fileno())
            if size.lines > 0 and size.columns > 0:
                return size.lines, size.columns
    return None


class Attached:
    """Shows a session's terminal here. `fresh`: it has just been started, and the screen here is left as it is. `hint`:
    what is said in the last row of a screen that was drawn."""

    def __init__(
        self, connection: Client, session: str, *, typing: bool, detach: bytes, fresh: bool = False, hint: str = ""
    ) -> None:
        self._connection = connection
        self._session = session
        self._typing = typing and os.isatty(sys.stdin.fileno())
        self._detach = detach
        self._fresh = fresh
        self._hint = hint
        self._screen: Screen | None = None
        self._terminal: Terminal | None = None
        self._there = threading.Event()  # a connection
        self._detached = threading.Event()
        self._keyboard = False  # whether a program may have asked for other codes of keys
        self._out = sys.stdout.buffer

    def run(self) -> dict[str, Any] | None:
        """Until the session ends: {state, code, reason, detail}. None: somebody has detached. Raises Unavailable when the
        server stays away."""
        sys.stdout.flush()
        own = raw(self._resized) if self._typing else contextlib.nullcontext()
        with own, self._tidy():
            if self._typing:
                threading.Thread(target=self._feed, daemon=True).start()
            patience = Patience(self._connection.patience_s, self._gap)
            while True:
                try:
                    with Terminal(
                        self._connection.target,
                        self._session,
                        size_here() if self._typing else None,
                        typing=self._typing,
                    ) as terminal:
                        self._terminal = terminal
                        self._there.set()
                        return self._show(terminal, patience)
                except Unavailable as error:
                    self._there.clear()
                    if self._detached.is_set() or self._detached.wait(patience.pause(error)):
                        return None
                except KeyboardInterrupt:  # it is for us where no key is the program's
                    return None

    # ------------------------------------------------------------ what is shown

    def _show(self, terminal: Terminal, patience: Patience) -> dict[str, Any] | None:
        while True:
            try:
                got = terminal.read()
            except Unavailable:
                if self._detached.is_set():
                    return None
                raise
            patience.succeeded()
            if isinstance(got, Written):
                if self._screen is not None:
                    self._screen.feed(got.data)
                else:
                    self._write(got.data)
            elif got.kind == "exit":
                return got.fields
            else:
                self._said(got)

    def _said(self, said: Said) -> None:
        fields = said.fields
        if said.kind == "screen":
            self._screen = None if self._fresh else Screen(fields.get("rows") or 24, fields.get("cols") or 80)
            self._fresh = False
        elif said.kind == "size" and self._screen is not None:
            self._screen.resize(fields["rows"], fields["cols"])
        elif said.kind == "shown" and self._screen is not None:
            screen, self._screen = self._screen, None
            here = size_here()
            if here is not None and here != (screen.rows, screen.cols):
                screen.resize(*here)
            self._write(screen.redraw())
            if self._hint and sys.stdout.isatty():
                self._write(f"\x1b7\x1b[999;1H\x1b[7m rethaw: {self._hint} \x1b[m\x1b8".encode())

    def _write(self, data: bytes) -> None:
        self._keyboard = self._keyboard or b"\x1b[>" in data
        self._out.write(data)
        self._out.flush()

    def _gap(self, error: Unavailable) -> None:
        keys = "" if not self._detach else "; the keys to detach work"
        self._write(f"\r\n\x1b[7m rethaw: {error.message}; waiting for it to come back{keys} \x1b[m\r\n".encode())

    @contextlib.contextmanager
    def _tidy(self) -> Generator[None]:
        """Afterwards this terminal is as plain as it was."""
        try:
            yield
        finally:
            here = size_here()
            if here is not None and sys.stdout.isatty():
                keyboard = b"\x1b[<16u\x1b[>4m" if self._keyboard else b""
                with contextlib.suppress(OSError):
                    self._write(b"\x1b7" + RESET + keyboard + b"\x1b8")

    # ------------------------------------------------------------ what is typed

    def _resized(self) -> None:
        size, terminal = size_here(), self._terminal
        if size is not None and terminal is not None and self._there.is_set():
            terminal.resize(*size)

    def _feed(self) -> None:
        """The thread ends with the process."""
        fd, held = sys.stdin.fileno(), b""
        with contextlib.suppress(OSError, ValueError, RethawError):
            while True:
                if not select.select([fd], [], [], _AHEAD_S if held else None)[0]:
                    self._type(held)
                    held = b""
                    continue
                data = os.read(fd, _CHUNK)
                if not data:
                    return
                data, held = held + data, b""
                if self._detach and self._detach in data:
                    self._type(data[: data.index(self._detach)])
                    self._leave()
                    return
                for size in range(min(len(self._detach) - 1, len(data)), 0, -1):
                    if data.endswith(self._detach[:size]):
                        data, held = data[:-size], data[-size:]
                        break
                self._type(data)

    def _type(self, data: bytes) -> None:
        if data:
            self._there.wait()
            terminal = self._terminal
            if terminal is not None:
                terminal.type(data)

    def _leave(self) -> None:
        self._detached.set()
        if self._terminal is not None:
            self._terminal.close()


class Piped:
    """Gives this stdin to a session's program, once and whole, as far as what a crash takes back is still kept here."""

    def __init__(self, connection: Client, session: str) -> None:
        self._connection = connection
        self._session = session
        self._terminal: Terminal | None = None
        self._kept = bytearray()
        self._base = 0  # offset of its first byte
        self._next: int | None = None  # what the program wants; None: it is not there
        self._ended = False
        self._said = threading.Condition()
        self.failed: str | None = None

    def start(self) -> None:
        """In threads that end with the process."""
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._feed, daemon=True).start()

    def _listen(self) -> None:
        patience = Patience(self._connection.patience_s, None)
        while True:
            try:
                with Terminal(self._connection.target, self._session, None) as terminal:
                    self._terminal = terminal
                    while True:
                        got = terminal.read()
                        patience.succeeded()
                        if isinstance(got, Said) and got.kind == "exit":
                            return
                        if isinstance(got, Said) and got.kind == "input":
                            self._wanted(int(got.fields["at"]))
            except Unavailable as error:
                with contextlib.suppress(Unavailable):
                    threading.Event().wait(patience.pause(error))
                    continue
                return
            except RethawError as error:
                self.failed = str(error)
                return

    def _wanted(self, at: int) -> None:
        with self._said:
            if at < self._base:
                self.failed = f"a crash took back what it had read of stdin, and the part from byte {at} on is gone"
                output.note(self.failed)
            self._next = max(at, self._base)
            self._said.notify_all()

    def _read(self) -> None:
        while True:
            with self._said:
                self._said.wait_for(lambda: self._base + len(self._kept) - (self._next or 0) < _AHEAD)
            data = os.read(sys.stdin.fileno(), _CHUNK)
            with self._said:
                self._kept += data
                over = max(0, len(self._kept) - _KEPT)
                del self._kept[:over]
                self._base += over
                self._ended = not data
                self._said.notify_all()
            if not data:
                return

    def _feed(self) -> None:
        told: tuple[int, Terminal | None] | None = None  # of the end
        while True:
            with self._said:
                self._said.wait_for(lambda told=told: self._has_news(told))
                at, terminal, end = self._next or 0, self._terminal, self._base + len(self._kept)
                data = bytes(self._kept[at - self._base : at - self._base + _CHUNK])
            if terminal is None:
                continue
            if data:
                terminal.give(at, data)
            else:
                terminal.end(end)
                told = (at, terminal)
            with self._said:
                if self._next == at:  # else another place is wanted
                    self._next = at + len(data)
                    self._said.notify_all()

    def _has_news(self, told: tuple[int, Terminal | None] | None) -> bool:
        if self._next is None:
            return False
        more = self._next < self._base + len(self._kept)
        return more or (self._ended and told != (self._next, self._terminal))
