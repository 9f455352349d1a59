"""The live view of `rethaw top` on this terminal."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Generator

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rethaw.cli.load import COLUMNS, Look, Looks, fitting
from rethaw.cli.output import plain, state_color
from rethaw.model.errors import Unavailable

_KEYS = {"c": "cpu", "m": "memory", "k": "calls", "t": "tokens", "s": "stored", "a": "active"}
_ANSI = {"31": "red", "32": "green", "33": "yellow", "36": "cyan", "": ""}
_AROUND = 4  # lines that are no sessions


def watch(looks: Looks, pause: float) -> None:
    """Until q or Ctrl-C. A server that goes away is waited for. Raises Unavailable when there is none at the beginning."""
    console = Console(highlight=False, legacy_windows=False)
    looks.take()
    trouble = ""
    with _keys() as fd, Live(console=console, screen=True, auto_refresh=False) as live:
        due = time.monotonic() + min(pause, 0.5)
        while True:
            live.update(_screen(looks, trouble, console.width, console.height), refresh=True)
            key = _pressed(fd, max(0.0, due - time.monotonic()))
            if key in ("q", "\x03", "\x04"):
                return
            looks.sort = _KEYS.get(key, looks.sort)
            if time.monotonic() < due:
                continue
            try:
                looks.take()
                trouble = ""
            except Unavailable as error:
                trouble = f"{error.message}; waiting for it to come back"
            due = time.monotonic() + pause


def _screen(looks: Looks, trouble: str, width: int, height: int) -> Group:
    look = looks.now
    room = max(1, height - _AROUND)
    head = Text(plain(trouble), style="red") if trouble else Text(look.head)
    keys = Text("sort: " + "  ".join(f"{k} {name}" for k, name in _KEYS.items()) + "   q end", style="dim")
    for line in (head, keys):
        line.truncate(width, overflow="ellipsis")
    if not look.rows:
        return Group(head, "", Text("no sessions; start one: rethaw run FILE.py", style="dim"), "", keys)
    more = len(look.rows) - room
    left = Text(f"and {more} more" if more > 0 else "", style="dim")
    return Group(head, _table(look, width, room), left, keys)


def _table(look: Look, width: int, room: int) -> Table:
    cells = look.cells()[:room]
    columns = fitting(cells, width)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    for i in columns:
        justify = "right" if COLUMNS[i].right else "left"
        table.add_column(COLUMNS[i].title, justify=justify, no_wrap=True, overflow="ellipsis")
    for row, texts in zip(look.rows, cells, strict=False):
        style = _ANSI.get(state_color(row.load.state.value), "")
        table.add_row(*(Text(texts[i], style=style if COLUMNS[i].title == "STATE" else "") for i in columns))
    return table


@contextlib.contextmanager
def _keys() -> Generator[int | None]:
    """Keys come one by one and are not shown, if they come from a terminal."""
    if not sys.stdin.isatty():
        yield None
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _pressed(fd: int | None, timeout_s: float) -> str:
    """The key that was pressed within that time, "" for none."""
    if fd is None:
        time.sleep(timeout_s)
        return ""
    if not select.select([fd], [], [], timeout_s)[0]:
        return ""
    got = os.read(fd, 1)
    return got.decode(errors="replace") if got else "q"
