"""What `wait_any` and `wait_all` are for, as an agent names it, and what they bring. Standard library only, Python >= 3.9."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Union

from rethaw.guest import protocol
from rethaw.guest.children import Handle
from rethaw.guest.protocol import Message, Signal
from rethaw.model.durations import Duration, optional_seconds, seconds
from rethaw.model.errors import InvalidInput, WaitTimeout


class Inbox:
    """The session's inbox, as something to wait for: `ctx.inbox`."""

    def __repr__(self) -> str:
        return "Inbox()"


class Timer:
    """A time to wait for, from the beginning of the wait: `ctx.timer("1h")`."""

    def __init__(self, duration: Duration) -> None:
        self.seconds = seconds(duration)

    def __repr__(self) -> str:
        return f"Timer({self.seconds:g})"


if TYPE_CHECKING:
    Thing = Union[Signal, str, Inbox, Timer, Handle]
    Came = Union[Signal, Message, Timer, Handle]


def body(things: Sequence[Thing], timeout: Optional[Duration], *, every: bool = False) -> bytes:
    """The call's arguments. Raises InvalidInput for what cannot be waited for."""
    if not things:
        raise InvalidInput("there is nothing to wait for", remedy="name signals, ctx.inbox, timers or children")
    parts = [_part(thing) for thing in things]
    if every and any(part["kind"] != "child" for part in parts):
        raise InvalidInput("wait_all waits for children only", remedy="wait for other things with wait_any")
    return protocol.to_json({"parts": parts, "timeout_s": optional_seconds(timeout), "all": every}, "the wait")


def _part(thing: Any) -> Dict[str, Any]:
    if isinstance(thing, (Signal, str)):
        name = thing if isinstance(thing, str) else thing.name
        if not name:
            raise InvalidInput(f"{name!r} is not a signal's name", remedy="pass text")
        return {"kind": "signal", "name": name}
    if isinstance(thing, Inbox):
        return {"kind": "inbox"}
    if isinstance(thing, Timer):
        return {"kind": "timer", "seconds": thing.seconds}
    if isinstance(thing, Handle):
        return {"kind": "child", "name": thing.id}
    raise InvalidInput(
        f"{thing!r} cannot be waited for", remedy="use ctx.signal(name), ctx.inbox, ctx.timer(duration) or a child"
    )


def came(ok: bytes, things: Sequence[Thing], timeout: Optional[Duration]) -> Came:
    """The thing that came, of those that were waited for. Raises WaitTimeout."""
    fields, payload, raw = protocol.arrived(ok, f"nothing that was waited for came within {timeout}")
    thing = things[int(fields["part"])]
    if isinstance(thing, Handle):
        thing.ended(fields.get("outcome") or {}, payload)
        return thing
    if isinstance(thing, Timer):
        return thing
    if isinstance(thing, Inbox):
        return Message(payload, fields.get("id"), int(fields.get("number") or 0), raw)
    return Signal(thing if isinstance(thing, str) else thing.name, None, payload, fields.get("id"), raw)


def all_came(ok: bytes, timeout: Optional[Duration]) -> None:
    """Raises WaitTimeout unless all came."""
    if json.loads(ok).get("timeout") is True:
        raise WaitTimeout(f"not all children ended within {timeout}")


class Fork:
    """What `ctx.fork()` returns, in both: `session` is the new session's id, `parent` the one it was forked from.
    `forked`: whether this is the new one."""

    def __init__(self, session: str, parent: str, forked: bool) -> None:
        self.session = session
        self.parent = parent
        self.forked = forked

    def __repr__(self) -> str:
        return f"Fork({self.session!r}, parent={self.parent!r}, forked={self.forked})"


def fork_of(ok: bytes) -> Fork:
    """From the answer. The two share the state of `random` until here: no longer."""
    found = json.loads(ok)
    if found["forked"]:
        protocol.own_random()
    return Fork(str(found["session"]), str(found["parent"]), bool(found["forked"]))


class Messages(List[Dict[str, Any]]):
    """A conversation in a provider's form. `system`: its system prompt, which in the forms "anthropic" and "responses" does
    not stand among the messages, and is a parameter of its own there."""

    system: str = ""
