"""`rethaw attach`: back to a session's terminal."""

from __future__ import annotations

from typing import Annotated

from rethaw.cli.app import Flag, Json
from rethaw.cli.connect import client


def attach(
    session: str,
    /,
    *,
    no_stdin: Annotated[bool, Flag] = False,
    detach_keys: str = "ctrl-p,ctrl-q",
    json: Json = False,
) -> int:
    """Come back to the terminal of a session that `rethaw run -t` started.

    The screen is drawn as it is, however often the session was frozen or
    crashed meanwhile. Keys go to the program, Ctrl-C too; Ctrl-P Ctrl-Q leaves
    it as it is. A suspended session is shown without waking it: the first key
    does. The exit code is the program's. Several may be attached at once. One
    that was started without -i takes no keys; Ctrl-C leaves it. With --json
    its output is printed as `rethaw logs -f --json` prints it.

    For example:
      rethaw attach s_06f2
      rethaw attach s_06f2 --no-stdin
      rethaw attach s_06f2 --detach-keys ctrl-a,d

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    no_stdin:
        Look on only. Ctrl-C leaves.
    detach_keys:
        What leaves it, or "none".
    """
    if json:
        from rethaw.cli.commands.watch import logs

        logs(session, follow=True, json=True)
        return 0

    from rethaw.cli import joined

    with client(patient=True) as connection:
        return joined.attach(connection, session, typing=not no_stdin, keys=detach_keys)
