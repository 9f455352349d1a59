"""`rethaw`: parse, run one command, turn every error into one line and an exit code. Never a traceback."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

from rethaw import __version__
from rethaw.cli.table import GROUP_HELP, STREAM, group_help, root_help
from rethaw.model.errors import RethawError

_INTERRUPTED = 130
_INTERNAL = 70  # EX_SOFTWARE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain at its exit otherwise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return _INTERRUPTED
    except RethawError as e:
        return _fail(str(e), e.exit_code)
    except Exception as e:
        if os.environ.get("RETHAW_DEBUG"):
            raise
        said = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
        return _fail(f"internal error: {said}; RETHAW_DEBUG=1 shows where", _INTERNAL)


def _run(args: list[str]) -> int:
    if args[:1] == ["help"]:
        args = [*args[1:], "--help"]
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(root_help())
        return 0
    if args[0] == "--version":
        sys.stdout.write(f"{__version__}\n")
        return 0
    if args[0] == "run" or args[:2] == ["schedule", "create"]:
        from rethaw.cli.arguments import asked_about, prepared

        target = asked_about(args[1:]) if args[0] == "run" else None
        if target is not None:
            from rethaw.cli.dryrun import explain, explain_deployed

            sys.stdout.write(explain(target[0]) if target[1] == "file" else explain_deployed(target[0]))
            return 0

        args = prepared(args)
    else:
        from rethaw.cli.mistakes import check_command

        check_command(args)
        if args[1:] in ([], ["-h"], ["--help"]) and args[0] in GROUP_HELP:
            sys.stdout.write(group_help(args[0]))
            return 0
        if args[0] == "cp":
            args = [STREAM if word == "-" else word for word in args]

    if args[0] != "up":
        # Modules make many objects and drop few: looking for garbage takes a tenth of the time of a short command.
        gc.set_threshold(50_000, 20, 20)

    from cyclopts import CycloptsError

    from rethaw.cli.app import build

    try:
        result: object = build()(
            args, exit_on_error=False, print_error=False, result_action="return_value", help_on_error=False
        )
    except CycloptsError as e:
        from rethaw.cli.mistakes import explained

        raise explained(e, args) from e
    return result if isinstance(result, int) else 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"rethaw: {_one_line(message)}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
