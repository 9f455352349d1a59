"""Commands for queues: how many sessions run at once, and who is next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Json
from rethaw.cli.connect import client

if TYPE_CHECKING:
    from rethaw.model.queue_types import Queue
    from rethaw.sdk.queues import Limit

Number = Annotated[str | None, Parameter(allow_leading_hyphen=True)]


def ls(*, json: Json = False) -> None:
    """List queues: those with limits, and those that sessions are in.

    RUNNING is how many sessions have a slot, WAITING how many want one now.

    For example:
      rethaw queue ls
    """
    with client() as connection:
        found = connection.queues.list()
    if json:
        output.emit(found)
        return
    output.table(
        ["QUEUE", "LIMIT", "KEY LIMIT", "RUNNING", "WAITING", "DELAYED", "SUSPENDED", ""],
        [
            [
                one.name,
                "-" if one.limit is None else str(one.limit),
                "-" if one.key_limit is None else str(one.key_limit),
                str(one.running),
                str(one.waiting),
                str(one.delayed),
                one.suspended,
                "paused" if one.paused else "",
            ]
            for one in found
        ],
    )


def set_(
    name: str,
    /,
    *,
    limit: Number = None,
    key_limit: Number = None,
    suspended: Literal["count", "free"] | None = None,
    json: Json = False,
) -> None:
    """Limit how many of a queue's sessions run at once.

    What is not given stays as it is. Sessions that run already go on. Any name
    is a queue; without a limit all of it start at once.

    For example:
      rethaw queue set reports --limit 4
      rethaw queue set reports --key-limit 1 --suspended free
      rethaw queue set reports --limit none

    Parameters
    ----------
    name:
        The queue.
    limit:
        So many at once, or "none".
    key_limit:
        So many at once with one concurrency key, or "none".
    suspended:
        "count": suspended sessions keep their slots (so it is at first).
        "free": they give them back, and wait for one to go on.
    """
    from rethaw.model.errors import InvalidInput

    if limit is None and key_limit is None and suspended is None:
        raise InvalidInput("nothing to set is named", remedy="write --limit N, --key-limit N or --suspended free")
    most, key_most = _limit("--limit", limit), _limit("--key-limit", key_limit)
    with client() as connection:
        found = connection.queues.set(name, limit=most, key_limit=key_most, suspended=suspended)
    _said(found, json)


def show(name: str, /, *, json: Json = False) -> None:
    """Show a queue, its limits, and who is next.

    For example:
      rethaw queue show reports

    Parameters
    ----------
    name:
        The queue.
    """
    with client() as connection:
        found = connection.queues.get(name)
    if json:
        output.emit(found)
        return
    rows = [
        ("queue", f"{found.name}{', paused' if found.paused else ''}"),
        ("limit", "none" if found.limit is None else f"{found.limit} at once"),
        ("key limit", "none" if found.key_limit is None else f"{found.key_limit} at once with one key"),
        ("suspended", "keep their slots" if found.suspended == "count" else "give their slots back"),
        ("running", str(found.running)),
        ("waiting", str(found.waiting)),
        ("delayed", str(found.delayed)),
        ("next", " ".join(found.next)),
    ]
    for title, value in rows:
        if value:
            output.data(f"{title:<11} {value}")


def pause(name: str, /, *, json: Json = False) -> None:
    """Start nothing from a queue until it is resumed. What runs goes on.

    For example:
      rethaw queue pause reports

    Parameters
    ----------
    name:
        The queue.
    """
    with client() as connection:
        found = connection.queues.pause(name)
    _said(found, json)


def resume(name: str, /, *, json: Json = False) -> None:
    """Start from a paused queue again.

    For example:
      rethaw queue resume reports

    Parameters
    ----------
    name:
        The queue.
    """
    with client() as connection:
        found = connection.queues.resume(name)
    _said(found, json)


def rm(name: str, /, *, json: Json = False) -> None:
    """Forget a queue's limits. Refused while unfinished sessions are in it.

    For example:
      rethaw queue rm reports

    Parameters
    ----------
    name:
        The queue.
    """
    with client() as connection:
        gone = connection.queues.delete(name)
    _said(gone, json)


def _said(queue: Queue, json: bool) -> None:
    if json:
        output.emit(queue)
    else:
        output.data(queue.name)


def _limit(option: str, text: str | None) -> Limit:
    from rethaw.model.errors import InvalidInput
    from rethaw.sdk.queues import KEEP

    if text is None:
        return KEEP
    if text == "none":
        return None
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 1_000_000:
        raise InvalidInput(f"{option} {text[:40]!r} does not fit", remedy='write a number from 1 on, or "none"')
    return int(text)
