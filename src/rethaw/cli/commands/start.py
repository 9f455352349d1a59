"""`rethaw init`: a new project."""

from __future__ import annotations

import re
from pathlib import Path

from rethaw.cli import output
from rethaw.cli.app import Json


def init(directory: Path = Path(), /, *, name: str | None = None, json: Json = False) -> None:
    """Write a new project: an agent, its tests, a README.

    Nothing is overwritten. The tests pass as they are: one calls the function,
    one crashes the agent on a real server and is skipped where none can run.

    For example:
      rethaw init my-agent
      rethaw init --name reviewer

    Parameters
    ----------
    directory:
        Where to; made if it is not there. Without it, here.
    name:
        The agent's name; else the directory's.
    """
    from rethaw.cli.project import write

    derived = re.sub(r"[^A-Za-z0-9._-]+", "-", directory.absolute().name).strip("-._") or "agent"
    written = write(directory, name if name is not None else derived)
    if json:
        output.emit({"files": [str(path) for path in written]})
        return
    for path in written:
        output.data(str(path))
    there = "" if directory == Path() else f"cd {directory} && "
    output.note(f"next: {there}pytest, then see README.md")
