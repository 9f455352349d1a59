"""Write docs/cli.md from the commands' own help. `--check`: only say whether it is up to date.

.venv/bin/python scripts/cli_docs.py [--check]
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from cyclopts import App

from rethaw.cli.app import build
from rethaw.cli.table import GROUPS, Command

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = """# Command line

Data goes to stdout, everything else to stderr. Every command takes `--json` (one JSON value, or one a line) and `--help`.
A SESSION is an id or any unique beginning of one, with or without its `s_`. An error is one line on stderr.

| exit code | means |
|---|---|
| 0 | done; of `run`: the session completed |
| 1 | something failed; of `run`: the session failed or was cancelled (its program's own exit code if it had one) |
| 2 | a value does not fit |
| 3 | the token is missing or wrong |
| 4 | nothing has that name or id, or more than one thing does |
| 5 | the session is in a state that does not allow it, or the key was used with other arguments |
| 6 | the server, or something that it needs, does not answer |
| 7 | a wait ran out of its time |
| 8 | the engine cannot run or failed |
| 9, 10, 11, 12 | image, snapshot, disk space, model provider |
| 130 | Ctrl-C; of `run`: detached, the session goes on |

Which server: `RETHAW_URL` and `RETHAW_TOKEN`, else `~/.config/rethaw/credentials.json`, which `rethaw up` writes for the
person who calls it.
"""


def _doc(text: str) -> tuple[str, dict[str, str]]:
    """A docstring's prose, and its parameters."""
    prose, _, section = inspect.cleandoc(text).partition("\nParameters\n----------\n")
    helps: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            name = line.rstrip(":").strip()
            helps[name] = ""
        elif line.strip():
            helps[name] = f"{helps[name]} {line.strip()}".strip()
    return prose.strip(), helps


def section(app: App, command: Command) -> str:
    """One command."""
    node = app
    for word in command.name.split():
        node = node[word]
    function = node.default_command
    prose, helps = _doc(inspect.getdoc(function) or "")
    text, _, examples = prose.partition("For example:\n")
    also = "".join(f" (also `rethaw {alias}`)" for alias in command.aliases)
    lines = [f"### rethaw {command.name}{also}", "", f"`rethaw {' '.join([command.name, command.form]).strip()}`", ""]
    lines += [text.strip(), "", "```sh", inspect.cleandoc(examples), "```", ""]
    rows: list[str] = []
    for argument in node.assemble_argument_collection():
        if argument.parameter.show is False:
            continue
        names = ", ".join(f"`{name}`" for name in argument.names)
        said = argument.parameter.help or helps.get(argument.field_info.name, "")
        default = argument.field_info.default
        shown = f" Default: {default}." if isinstance(default, (str, int)) and not isinstance(default, bool) else ""
        rows.append(f"| {names} | {said}{shown} |".replace("|--", "| --"))
    return "\n".join([*lines, "| | |", "|---|---|", *rows]) + "\n"


def text() -> str:
    """The whole file."""
    app = build()
    parts = [HEAD]
    for title, commands in GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [section(app, command) for command in commands]
    return "\n".join(parts)


def main(argv: list[str]) -> int:
    wanted = text()
    if argv == ["--check"]:
        if TARGET.read_text(encoding="utf-8") != wanted:
            sys.stderr.write(f"{TARGET} is not up to date; run: make docs\n")
            return 1
        return 0
    TARGET.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
