"""A command line that does not fit, in one line: what is wrong with it, what was probably meant, where to look."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rethaw.cli.table import COMMANDS, GROUP_HELP
from rethaw.model.errors import InvalidInput
from rethaw.model.nearest import nearest

if TYPE_CHECKING:
    from cyclopts import CycloptsError


def check_command(args: list[str]) -> None:
    """Raises InvalidInput when the first words of `args` name no command. Needs no module but the table."""
    first = args[0]
    names = {word for command in COMMANDS for word in (command.name.split()[0], *command.aliases)}
    if first.startswith("-"):
        flags = ("--help", "--version")
        raise InvalidInput(f"there is no option {_shown(first)}", remedy=_meant(first, flags, "", "`rethaw --help`"))
    if first not in names:
        raise InvalidInput(
            f"there is no command {_shown(first)}", remedy=_meant(first, names, "rethaw ", "`rethaw --help`")
        )
    if first not in GROUP_HELP or len(args) < 2 or args[1] in ("-h", "--help"):
        return
    if args[1].startswith("-"):
        raise InvalidInput(f"there is no option {_shown(args[1])}", remedy=f"see `rethaw {first} --help`")
    inner = {command.name.split()[1] for command in COMMANDS if command.name.startswith(f"{first} ")}
    if args[1] not in inner:
        remedy = _meant(args[1], inner, f"rethaw {first} ", f"`rethaw {first} --help`")
        raise InvalidInput(f"there is no command {_shown(f'{first} {args[1]}')}", remedy=remedy)


def explained(error: CycloptsError, args: list[str]) -> InvalidInput:
    """`error` in our words."""
    from cyclopts.exceptions import MissingArgumentError, UnknownOptionError, UnusedCliTokensError

    help_ = f"`{_help_for(args)}`"
    if isinstance(error, UnknownOptionError):
        option = error.token.keyword or error.token.value
        known = [name for a in error.argument_collection if a.parameter.show is not False for name in a.names]
        options = [*dict.fromkeys(name for name in known if name.startswith("-")), "--help"]
        what = "option" if option.startswith("-") else "argument"
        return InvalidInput(f"there is no {what} {_shown(option)}", remedy=_meant(option, options, "", help_))
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return InvalidInput(f"{_shown(error.unused_tokens[0])} is one argument too many", remedy=f"see {help_}")
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.argument.name
        given = any(name == word.split("=")[0] for word in args)
        missing = f"{name} has no value" if given else f"{name if name.startswith('-') else name.upper()} is missing"
        return InvalidInput(missing, remedy=f"see {help_}")
    return InvalidInput(" ".join(str(error).split()).rstrip("."), remedy=f"see {help_}")


def _meant(wanted: str, known: Iterable[str], before: str, otherwise: str) -> str:
    close = nearest(wanted, sorted(known))
    return f"did you mean `{before}{close}`?" if close else f"see {otherwise}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:79]}…")


def _help_for(args: list[str]) -> str:
    names = {name for command in COMMANDS for name in (command.name, *command.aliases)}
    for words in (2, 1):
        if " ".join(args[:words]) in names:
            return f"rethaw {' '.join(args[:words])} --help"
    return "rethaw --help"
