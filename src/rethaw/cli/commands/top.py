"""`rethaw top`."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Literal

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Flag, Json
from rethaw.cli.connect import client

_SAMPLE_S = 0.5  # between the two looks that tell how much CPU is used


def top(
    *,
    sort: Literal["cpu", "memory", "calls", "tokens", "stored", "active", "age"] = "cpu",
    ended: Annotated[bool, Flag, Parameter(name=("--all", "-a"))] = False,
    limit: int = 200,
    every: str = "1s",
    once: Annotated[bool, Flag] = False,
    follow: Annotated[bool, Flag, Parameter(name=("--follow", "-f"))] = False,
    json: Json = False,
) -> None:
    """Watch what sessions take of the machine: CPU, memory, calls, storage.

    CPU and MEMORY are of a session's sandbox, engine included; 100 % is one CPU.
    TOKENS are those in and out, STORED is what the kept snapshots added to the
    store, ACTIVE how long ago the log got its newest event. On a terminal it is
    a live view: the keys c m k t s a sort it, q ends it.

    For example:
      rethaw top
      rethaw top --once --sort memory
      rethaw top --json | jq '.sessions[] | {id, cpu_percent, memory_bytes}'

    Parameters
    ----------
    sort:
        What is first: most of it, and of "active" and "age" the newest.
    ended:
        Sessions that have ended too.
    limit:
        Of the newest so many sessions.
    every:
        How long until it looks again.
    once:
        Print one table and end, as it does without a terminal.
    follow:
        With --json: a line for each look, until Ctrl-C.
    """
    from rethaw.cli import load
    from rethaw.model.durations import seconds
    from rethaw.model.errors import InvalidInput

    pause = seconds(every)
    if pause < 0.1:
        raise InvalidInput(f"--every {every!r} is too short", remedy="use 100ms or more")
    if not 1 <= limit <= 1000:
        raise InvalidInput(f"limit {limit} does not fit", remedy="use 1 to 1000")
    if follow and not json:
        raise InvalidInput("--follow is for --json", remedy="leave it out, or add --json")
    with client() as connection:
        looks = load.Looks(lambda: connection.top(limit=limit, ended=ended), sort)
        if sys.stdout.isatty() and not once and not json:
            from rethaw.cli.live import watch

            watch(looks, pause)
            return
        if looks.take().sandboxes:
            time.sleep(_SAMPLE_S)
            looks.take()
        while json:
            output.emit(looks.now.value)
            if not follow:
                return
            time.sleep(pause)
            looks.take()
    now = looks.now
    if not now.rows:
        output.note("no sessions; start one: rethaw run FILE.py")
        return
    cells = now.cells()
    output.note(now.head)
    output.table(
        [column.title for column in load.COLUMNS],
        cells,
        codes=[["", "", output.state_color(row.load.state.value), *[""] * (len(load.COLUMNS) - 3)] for row in now.rows],
    )
