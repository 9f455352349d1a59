"""This terminal, or these pipes, joined to a program elsewhere: in a throwaway restore, or in a running session."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from rethaw.cli import output
from rethaw.model.errors import RethawError

if TYPE_CHECKING:
    from rethaw.model.looking import TerminalSize
    from rethaw.sdk.client import Client
    from rethaw.sdk.shell import Program

_CHUNK = 1 << 15


def _size() -> os.terminal_size:
    """The terminal's own, whatever COLUMNS and LINES say: they are of another moment, or of another terminal."""
    return os.get_terminal_size(sys.stdout.fileno())


def run(connection: Client, snapshot: str, command: Sequence[str], idle_s: float) -> int:
    """Until it ends; its exit code."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    terminal = size_now() if interactive else None
    with connection.snapshots.shell(snapshot, command, terminal=terminal, idle=idle_s) as shell:
        if interactive and not command:
            output.note(
                f"inside snapshot {shell.snapshot} of session {shell.session}: {shell.frozen} processes stand still, "
                "nothing that you change is kept"
            )
        return join(shell, interactive=interactive)


def size_now() -> TerminalSize:
    """Of this terminal."""
    from rethaw.model.looking import TerminalSize

    size = _size()
    return TerminalSize(columns=size.columns, rows=size.lines, kind=os.environ.get("TERM", "xterm-256color"))


def join(program: Program, *, interactive: bool, feed: bool = True) -> int:
    """This process's streams and the program's, until it ends; its exit code. `feed`: what is typed goes there."""

    def resized() -> None:
        size = _size()
        program.resize(size.columns, size.lines)

    with raw(resized) if interactive else contextlib.nullcontext():
        if feed:
            threading.Thread(target=_feed, args=(program, interactive), daemon=True).start()
        while (got := program.read()) is not None:
            output.raw(got[1], stderr=got[0] == "stderr")
    if program.why:
        output.note(program.why)
    return program.exit_code or 0


def collect(connection: Client, snapshot: str, command: Sequence[str], idle_s: float) -> dict[str, Any]:
    """Its output and exit code as a value; stdin is passed on unless it is a terminal."""
    out = {"stdout": b"", "stderr": b""}
    with connection.snapshots.shell(snapshot, command, idle=idle_s) as shell:
        if sys.stdin.isatty():
            shell.end_input()
        else:
            threading.Thread(target=_feed, args=(shell, False), daemon=True).start()
        while (got := shell.read()) is not None:
            out[got[0]] += got[1]
        texts = {name: data.decode(errors="replace") for name, data in out.items()}
        return {"snapshot": shell.snapshot, **texts, "exit_code": shell.exit_code, "why": shell.why}


def _feed(shell: Program, interactive: bool) -> None:
    """What is typed goes there, until there is no more of it. The thread ends with the process."""
    with contextlib.suppress(OSError, ValueError, RethawError):
        fd = sys.stdin.fileno()
        while shell.exit_code is None:
            if select.select([fd], [], [], 0.5)[0]:
                data = os.read(fd, _CHUNK)
                if not data:
                    break
                shell.write(data)
        if not interactive:
            shell.end_input()


@contextlib.contextmanager
def raw(resized: Callable[[], object]) -> Generator[None]:
    """Each key is the program's own, Ctrl-C too; `resized` is called when this terminal has another size, in a thread of its
    own. The terminal is as it was afterwards, whatever ends this."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    changed = threading.Event()

    def tell() -> None:
        while True:
            changed.wait()
            changed.clear()
            with contextlib.suppress(RethawError, OSError):
                resized()

    def notice(_number: int, _frame: object) -> None:
        changed.set()  # a handler must not send: it may interrupt a send

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)  # so that what follows is done

    threading.Thread(target=tell, daemon=True).start()
    former = [(number, signal.signal(number, notice if number == signal.SIGWINCH else end))
              for number in (signal.SIGWINCH, signal.SIGTERM, signal.SIGHUP)]  # fmt: skip
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        for number, handler in former:
            signal.signal(number, handler)
