"""What goes over the Context socket, seen from an agent. See `rethaw.guest.calls` for the other end."""

from __future__ import annotations

import json
import os
from datetime import datetime, timedelta, timezone
from typing import Any, Dict, List, NoReturn, Optional, Tuple, cast

from rethaw.channel.payload import embed, split
from rethaw.model.durations import Duration, optional_seconds, seconds
from rethaw.model.errors import InvalidInput, RethawError, TooLarge, Unavailable, WaitTimeout, by_code

SOCKET = "/run/rethaw/context.sock"
START = "rethaw.start"  # the signal by which a session that was forked from a template gets its arguments
NO_RETRY = "rethaw.no_retry"  # name of the event that says: trying again is of no use
AUTO = "auto."  # begins the names of templates that are made by themselves
MESSAGE_LIMIT = 1 << 20  # MESSAGE_LIMIT of rethaw.model.types, which needs more than the standard library


class Message:
    """One inbox message. `raw` is the JSON text of `payload`, exactly as it was sent."""

    def __init__(self, payload: Any, id: Optional[str], number: int, raw: bytes) -> None:
        self.payload = payload
        self.id = id
        self.number = number
        self.raw = raw

    def __repr__(self) -> str:
        return f"Message({self.number}, {self.payload!r})"


class Signal:
    """A named signal. From `ctx.signal(name)`: not complete, `url` is a one-time address that completes it. From
    `ctx.wait(...)`: complete, with `payload` (and `raw`, its JSON text as it was sent)."""

    def __init__(
        self,
        name: str,
        url: Optional[str] = None,
        payload: Any = None,
        id: Optional[str] = None,
        raw: Optional[bytes] = None,
    ) -> None:
        self.name = name
        self.url = url
        self.payload = payload
        self.id = id
        self.raw = raw

    @property
    def complete(self) -> bool:
        return self.raw is not None

    def __repr__(self) -> str:
        return f"Signal({self.name!r}, {self.payload!r})" if self.complete else f"Signal({self.name!r}, open)"


told: Optional[Dict[str, Any]] = None  # the arguments that a session begun from a template has got


def in_template() -> bool:
    """Whether this program was started to be forked from."""
    return bool(os.environ.get("RETHAW_TEMPLATE"))


def frozen_before_call() -> bool:
    """Whether it is frozen as soon as its function is known, not where it says that it is ready."""
    return os.environ.get("RETHAW_TEMPLATE", "").startswith(AUTO)


def started(history: List[Dict[str, Any]]) -> Optional[Dict[str, Any]]:
    """The arguments that a former life of this session was told, from its events."""
    for event in history:
        if event["type"] == "signal.received" and event["data"].get("name") == START:
            return dict(json.loads(event["body"] or "{}"))
    return None


def begun(args: Any) -> Dict[str, Any]:
    """The arguments of a session that goes on from a template. Its forks share the state of `random`: no longer."""
    global told
    own_random()
    told = dict(args or {})
    return dict(told)


def own_random() -> None:
    """A fork goes on with random numbers of its own."""
    import sys

    if "random" in sys.modules:
        sys.modules["random"].seed()


def socket_path(path: Optional[str] = None) -> str:
    return path or os.environ.get("RETHAW_SOCKET") or SOCKET


def generation(path: str) -> str:
    """The generation of this life: another one after each restore."""
    try:
        with open(os.path.dirname(path) + "/generation", encoding="ascii") as file:  # noqa: PTH120, PTH123
            return file.read().strip()
    except OSError:
        no_guestd(path)


def session(path: str, started_as: str) -> str:
    """The session's id: another one than it was started as, in a fork."""
    try:
        with open(os.path.dirname(path) + "/session", encoding="ascii") as file:  # noqa: PTH120, PTH123
            return file.read().strip() or started_as
    except OSError:
        return started_as  # a snapshot of an older guestd


def no_guestd(path: str) -> NoReturn:
    raise Unavailable(
        f"nothing answers at {path}", remedy="a Context works inside a Rethaw sandbox; use agent.local() elsewhere"
    ) from None


def request(op: str, ref: int, body: bytes) -> bytes:
    return json.dumps({"op": op, "ref": ref, "len": len(body)}).encode("ascii") + b"\n" + body


def to_json(value: Any, what: str) -> bytes:
    """`value` as JSON text. Raises InvalidInput naming what does not fit."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(
            f"{what} is not JSON: {error}",
            remedy="use text, finite numbers, booleans, None, lists and dictionaries with text keys",
        ) from None


def payload_body(payload: Any) -> bytes:
    return embed({}, checked_payload(payload))


def checked_payload(payload: Any) -> bytes:
    """JSON text of a payload. Raises InvalidInput, TooLarge."""
    raw = to_json(payload, "the payload")
    if len(raw) > MESSAGE_LIMIT:
        raise TooLarge(
            f"the payload has {len(raw)} bytes of JSON, at most {MESSAGE_LIMIT} are allowed",
            remedy="put it into a file and send its path",
        )
    return raw


def emit_body(name: str, data: Dict[str, Any]) -> bytes:
    raw = to_json(data, f"the data of {name!r}")
    if len(raw) > MESSAGE_LIMIT:
        raise TooLarge(f"the data of {name!r} has {len(raw)} bytes of JSON, at most {MESSAGE_LIMIT} are allowed")
    return embed({"name": name}, raw, "data")


def result_body(value: Any) -> bytes:
    return embed({}, to_json(value, "the agent's result"), "value")


def wait_body(name: Optional[str] = None, timeout: Optional[Duration] = None) -> bytes:
    args: Dict[str, Any] = {"timeout_s": optional_seconds(timeout)}
    if name is not None:
        if not isinstance(name, str) or not name:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidInput(f"{name!r} is not a signal's name", remedy="pass text")
        args["name"] = name
    return to_json(args, "the wait")


def sleep_body(duration: Duration) -> bytes:
    return to_json({"seconds": seconds(duration)}, "the duration")


FORMS = ("events", "openai", "responses", "anthropic")


def history_body(after: int, form: str = "events", exchange: Optional[str] = None) -> bytes:
    if form not in FORMS:
        raise InvalidInput(f"{form!r} is no form of the history", remedy=f"use one of {', '.join(FORMS)}")
    return to_json({"after": after, **({} if form == "events" else {"form": form, "exchange": exchange})}, "after")


def deadline_of(ok: bytes) -> Optional[datetime]:
    at = json.loads(ok)["deadline"]
    return None if at is None else datetime.fromisoformat(at).astimezone(timezone.utc)


def left_until(deadline: Optional[datetime]) -> Optional[timedelta]:
    return None if deadline is None else max(deadline - datetime.now(timezone.utc), timedelta(0))


def answer_of(body: bytes) -> bytes:
    """The JSON text of the answer's `ok`. Raises the error that the answer carries."""
    fields, ok = split(body, "ok")
    error = fields.get("error")
    if isinstance(error, dict):
        raise _error(cast("Dict[str, Any]", error))
    if ok is None:
        raise RethawError(f"the answer {body[:100]!r} is neither ok nor error")
    return ok


def _error(error: Dict[str, Any]) -> RethawError:
    given: object = error.get("details")
    details = cast("Dict[str, Any]", given) if isinstance(given, dict) else {}
    details = {str(k): v for k, v in details.items() if k not in ("message", "remedy", "self")}
    remedy: object = error.get("remedy")
    made = by_code(str(error.get("code")))(
        str(error.get("message", "")), remedy=remedy if isinstance(remedy, str) else None, **details
    )
    return cast(RethawError, made)


def arrived(ok: bytes, timed_out: str) -> Tuple[Dict[str, Any], Any, bytes]:
    """Fields, payload and its exact text of what a wait brought. Raises WaitTimeout saying `timed_out`."""
    fields, raw = split(ok)
    if fields.get("timeout") is True or fields.get("timed_out") is True:
        raise WaitTimeout(timed_out)
    exact: object = fields.get("raw")
    if isinstance(exact, str):
        raw = exact.encode("utf-8", "surrogatepass")
    text = raw if raw is not None else b"null"
    return fields, json.loads(text.decode("utf-8", "surrogatepass")), text


def message_of(ok: bytes, timeout: Optional[Duration]) -> Message:
    fields, payload, raw = arrived(ok, f"no message came within {timeout}")
    return Message(payload, fields.get("id"), int(fields.get("number") or 0), raw)


def signal_of(ok: bytes, name: str, timeout: Optional[Duration]) -> Signal:
    fields, payload, raw = arrived(ok, f"signal {name!r} did not come within {timeout}")
    return Signal(name, None, payload, fields.get("id"), raw)
