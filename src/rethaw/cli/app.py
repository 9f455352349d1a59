"""The cyclopts application, made of `table`. A command's module is loaded when the command is called."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from rethaw.cli.table import COMMANDS, GROUP_HELP

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]
Flag = Parameter(negative="")


def _default(value: object) -> object:
    """What the help says of a default: nothing of False and None, which say nothing."""
    return None if value is False or value is None else value


def build() -> App:
    """All commands, for `rethaw.cli.main` and for tests that look at each."""
    app = App(
        name="rethaw",
        help_format="plaintext",
        version_flags=(),
        help="AI agents that survive anything.",
        default_parameter=Parameter(show_default=_default),
    )
    groups: dict[str, App] = {}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        parent = app
        if group:
            if group not in groups:
                groups[group] = App(name=group, help=GROUP_HELP[group], help_format="plaintext", version_flags=())
                app.command(groups[group])
            parent = groups[group]
        usage = f"Usage: rethaw {command.name} {command.form}".rstrip() + " [OPTIONS]"
        parent.command(
            f"rethaw.cli.commands.{command.where}",
            name=(name, *command.aliases),
            usage=usage,
        )
    return app
