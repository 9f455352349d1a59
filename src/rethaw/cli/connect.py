"""The client of a command: errors that say how to start a server, a note when one goes away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rethaw.cli.output import note
from rethaw.model.errors import Unavailable, WaitTimeout

if TYPE_CHECKING:
    from rethaw.model.types import SessionView
    from rethaw.sdk.client import Client

ATTACHED_PATIENCE_S = 3600.0  # somebody is looking on and can press Ctrl-C


def client(*, patient: bool = False) -> Client:
    """A client of the server that the environment or the credentials file names."""
    from rethaw.sdk.client import Client

    def gap(error: Unavailable) -> None:
        note(f"{error.message}; waiting for it to come back (Ctrl-C ends this)")

    return Client(patience=ATTACHED_PATIENCE_S, on_gap=gap) if patient else Client()


def until(
    connection: Client, session: str, reached: Callable[[SessionView], bool], *, timeout_s: float, what: str
) -> SessionView:
    """Ask until `reached`. Raises WaitTimeout naming `what`; a session that ends first is given back as it is."""
    from rethaw.sdk import calls

    end, delay = time.monotonic() + timeout_s, 0.02
    while True:
        view = connection.patient(calls.get(session))
        if reached(view) or view.state.final:
            return view
        if time.monotonic() > end:
            raise WaitTimeout(
                f"session {view.id} is {view.state.value} after {timeout_s:g} s, not {what}",
                remedy=f"see `rethaw why {view.id}`",
            )
        time.sleep(delay)
        delay = min(delay * 1.5, 0.5)
