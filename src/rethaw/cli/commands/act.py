"""Commands that do something to a session."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Json
from rethaw.cli.connect import client, until

if TYPE_CHECKING:
    from rethaw.model.errors import SessionFailed
    from rethaw.model.types import SessionView

_WAIT_S = 120.0
Text = Parameter(allow_leading_hyphen=True)
NoWait = Annotated[bool, Parameter(name="--no-wait", negative="", help="Only ask for it, do not wait until it is so.")]


def _print(view: SessionView, json: bool) -> None:
    if json:
        output.emit(view)
    else:
        from rethaw.cli.render import state_text

        output.data(f"{view.id}  {state_text(view)}")


def _stdin_or(text: str) -> str:
    return sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if text == "-" else text


def send(
    session: str,
    text: Annotated[str, Text],
    /,
    *,
    key: str | None = None,
    wait: str | None = None,
    json: Annotated[
        bool, Parameter(name="--json", negative="", help="TEXT is JSON, kept byte for byte; print JSON too.")
    ] = False,
) -> None:
    """Send a message into a session's inbox and print its number.

    With --wait the session's next message is printed instead. Exit code 7 when
    there was none in that time, 1 when the session ended without one.

    For example:
      rethaw send s_06f2 "Go on, and add tests"
      rethaw send s_06f2 --json '{"approved": true}'
      rethaw send s_06f2 "How far are you?" --wait 30s
      cat report.txt | rethaw send s_06f2 -

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    text:
        The message; "-" reads it from stdin.
    key:
        Sending again with the same key sends nothing new.
    wait:
        Wait so long for the next message that the session sends out, and print that.
    """
    from rethaw.cli.attach import text_of
    from rethaw.model.durations import optional_seconds
    from rethaw.model.errors import WaitTimeout

    limit = optional_seconds(wait)
    payload = _stdin_or(text)
    with client() as connection:
        handle = connection.sessions.get(session)
        before = max((m.number for m in handle.outbox()), default=0) if limit is not None else 0
        if json:
            sent = connection.sessions.send_json(handle.id, payload, idempotency_key=key)
        else:
            sent = handle.send(payload, idempotency_key=key)
        if limit is None:
            if json:
                output.emit(sent)
            else:
                output.data(str(sent.number))
            return
        answers = handle.outbox(after=before, wait=limit)
        view = handle.view if answers else connection.sessions.get(handle.id).view
    if not answers and view.state.final:
        raise _over(view)
    if not answers:
        raise WaitTimeout(f"session {handle.id} sent no answer within {wait}", remedy=f"see `rethaw why {handle.id}`")
    for answer in answers:
        if json:
            output.emit(answer)
        else:
            output.data(text_of(answer.raw))


def _over(view: SessionView) -> SessionFailed:
    """It ended, and nobody answers any more."""
    from rethaw.cli.render import state_text
    from rethaw.model.errors import SessionFailed

    ended = state_text(view) + (f": {view.detail}" if view.detail else "")
    what = "show" if view.state.value == "completed" else "why"
    return SessionFailed(f"session {view.id} sent no answer, it is {ended}", remedy=f"see `rethaw {what} {view.id}`")


def signal(
    session: str,
    name: str,
    payload: Annotated[str, Text] = "null",
    /,
    *,
    key: str | None = None,
    text: Annotated[bool, Parameter(name="--text", negative="")] = False,
    json: Json = False,
) -> None:
    """Complete a session's wait for NAME, now or when it opens.

    A PAYLOAD that is JSON is taken as JSON, any other as text.

    For example:
      rethaw signal s_06f2 approval '{"approved": true}'
      rethaw signal s_06f2 approval "yes, but rename it"

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    name:
        What the session waits for; `rethaw why` says it.
    payload:
        What it is told; "-" reads it from stdin.
    key:
        Signalling again with the same key does nothing new.
    text:
        PAYLOAD is text even if it looks like JSON.
    """
    from rethaw.model.errors import InvalidInput
    from rethaw.sdk.calls import checked_json

    given = _stdin_or(payload)
    is_json = not text
    if is_json:
        try:
            checked_json(given)
        except InvalidInput:
            is_json = False
    with client() as connection:
        handle = connection.sessions.get(session)
        if is_json:
            found = connection.sessions.signal_json(handle.id, name, given, idempotency_key=key)
        else:
            found = handle.signal(name, given, idempotency_key=key)
    if json:
        output.emit({"signal": found})
    else:
        output.data(found)


def suspend(session: str, /, *, no_wait: NoWait = False, json: Json = False) -> None:
    """Freeze a session and release its memory. It stays so until `rethaw resume`.

    For example:
      rethaw suspend s_06f2

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    """
    from rethaw.model.errors import Conflict

    with client() as connection:
        view = connection.sessions.suspend(session)
        if not no_wait:
            view = until(
                connection,
                view.id,
                lambda v: v.state.value == "suspended" or v.desired.value != "suspended",
                timeout_s=_WAIT_S,
                what="suspended",
            )
            if view.state.value in ("running", "waiting"):
                raise Conflict(
                    f"session {view.id} was not suspended, it runs on",
                    remedy=f"see `rethaw events {view.id} -t snapshot.failed`",
                )
    _print(view, json)


def resume(session: str, /, *, no_wait: NoWait = False, json: Json = False) -> None:
    """Let a suspended session go on where it was.

    For example:
      rethaw resume s_06f2

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    """
    with client() as connection:
        view = connection.sessions.resume(session)
        if not no_wait:
            view = until(
                connection,
                view.id,
                lambda v: v.state.value in ("running", "waiting"),
                timeout_s=_WAIT_S,
                what="running",
            )
    _print(view, json)


def cancel(
    session: str,
    /,
    *,
    now: Annotated[bool, Parameter(name="--now", negative="")] = False,
    no_wait: NoWait = False,
    json: Json = False,
) -> None:
    """End a session: SIGTERM, its grace period, then SIGKILL.

    Its log and snapshots stay.

    For example:
      rethaw cancel s_06f2
      rethaw cancel s_06f2 --now

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    now:
        SIGKILL at once.
    """
    with client() as connection:
        view = connection.sessions.cancel(session, now=now)
        if not no_wait:
            limit = view.agent.grace_s + _WAIT_S
            view = until(connection, view.id, lambda v: v.state.final, timeout_s=limit, what="ended")
    _print(view, json)


def rm(
    *sessions: str,
    force: Annotated[bool, Parameter(name=("--force", "-f"), negative="")] = False,
    json: Json = False,
) -> int:
    """Erase sessions whole: log, snapshots, messages.

    A tombstone says that they were. Ended or suspended ones only.

    For example:
      rethaw rm s_06f2
      rethaw rm --force s_06f2 s_07aa

    Parameters
    ----------
    sessions:
        Ids or unique beginnings of them.
    force:
        Cancel those that run first.
    """
    from rethaw.model.errors import InvalidInput, RethawError

    if not sessions:
        raise InvalidInput("no session is named", remedy="write rethaw rm SESSION ...")
    code = 0
    with client() as connection:
        for session in sessions:
            try:
                gone = connection.sessions.delete(session, force=force)
            except RethawError as e:
                if len(sessions) == 1:
                    raise
                sys.stdout.flush()
                sys.stderr.write(f"rethaw: {e}\n")
                code = code or e.exit_code
                continue
            if json:
                output.emit(gone)
            else:
                output.data(str(gone.get("id") or gone.get("session") or session))
    return code


def crash(
    session: str,
    what: Literal["sandbox", "node", "db"] = "sandbox",
    /,
    *,
    json: Json = False,
) -> None:
    """Perform a crash, safely.

    SIGKILL to the session's sandbox, to the whole server (node), or to its
    PostgreSQL (db).

    For example:
      rethaw crash s_06f2
      rethaw crash s_06f2 db

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    what:
        What is killed. After "node" start the server again: sudo rethaw up
    """
    from rethaw.model.errors import Unavailable

    with client() as connection:
        handle = connection.sessions.get(session)
        try:
            view = handle.crash(what)
        except Unavailable as e:
            if what == "sandbox" or not e.details.get("sent"):
                raise
            view = handle.view  # it went before it could answer, as asked
    if json:
        output.emit(view)
    else:
        output.data(f"{view.id}  killed its {what}")
    if what == "node":
        output.note("the server is gone; start it again: sudo rethaw up")
    else:
        output.note(f"watch it come back: rethaw events -f {view.id}")
