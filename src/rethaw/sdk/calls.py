"""Every call of the HTTP API as a value: what to send and how to read the answer. No input or output happens here, so
`Client` and `AsyncClient` share all of it.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast
from urllib.parse import quote

from rethaw.model.errors import InvalidInput, RethawError, Unauthorized, Unavailable, by_code
from rethaw.sdk.listing import Page, Wanted
from rethaw.sdk.sizes import size_bytes
from rethaw.sdk.starting import Starting
from rethaw.sdk.types import Detail, LastWords, Message, OpenWait, Outcome, Stats, Why

if TYPE_CHECKING:
    from rethaw.model.types import AgentSpec, Attempt, BudgetSpec, Event, SessionView, SnapshotInfo, Spent

T = TypeVar("T")
_CHARS = 300  # of a foreign answer quoted in a message


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request. `wait_s`: how long the server may take on purpose, on top of the client's timeout."""

    method: str
    path: str
    read: Callable[[bytes], T]
    params: Mapping[str, str | list[str]] = field(default_factory=dict[str, str | list[str]])
    content: bytes | None = None
    content_type: str = "application/json"
    accept: str = "application/json"
    wait_s: float = 0.0


def to_json(value: Any, what: str = "payload") -> bytes:
    """JSON text of `value` in ASCII, so that every string survives. Raises InvalidInput naming `what`."""
    try:
        return json.dumps(value, allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as e:
        raise InvalidInput(
            f"{what} {value!r:.80} is not JSON ({e})", remedy="pass text, numbers, booleans, None, lists, dictionaries"
        ) from e


def checked_json(text: str | bytes, what: str = "payload") -> bytes:
    """JSON text as given, byte for byte. Raises InvalidInput naming where it is no JSON."""
    try:
        raw = text.encode() if isinstance(text, str) else text
        json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise InvalidInput(f"{what} is not JSON: {e}", remedy="put quotes around text") from e
    return raw


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def error_of(status: int, body: bytes, *, url: str, token_source: str) -> RethawError:
    """The error that the server raised, as the same class."""
    try:
        found = cast("dict[str, Any]", json.loads(body)["error"])
        code, message = str(found["code"]), str(found["message"])
    except (ValueError, KeyError, TypeError):
        text = body[:_CHARS].decode(errors="replace").strip()
        return Unavailable(
            f"{url} answered {status} and not as Rethaw does: {text!r}", remedy="check RETHAW_URL", status_code=status
        )
    details = {str(k): v for k, v in cast("dict[str, Any]", found.get("details") or {}).items()}
    details.pop("remedy", None)
    details.pop("message", None)
    details.pop("self", None)
    cls = cast("type[RethawError]", by_code(code))
    remedy = cast("str | None", found.get("remedy"))
    if cls is Unauthorized:
        remedy = f"{remedy or 'set RETHAW_TOKEN'} (yours: {token_source})"
    error = cls(message, remedy=remedy, **details)
    error.code = code  # kept when this client does not know the code
    return error


def path(*parts: str) -> str:
    """/v1/PART/PART, each escaped. Raises InvalidInput for a part that is empty or would name something else."""
    for part in parts:
        if "/" in part:  # servers take an escaped one for a plain one
            raise InvalidInput(f"{part!r} is not an id or a name, which have no '/'", remedy=_LISTED)
    return "/v1/" + "/".join(_part(part) for part in parts)


_LISTED = "`rethaw ls` lists sessions"


def _part(text: str) -> str:
    if text in ("", ".", ".."):
        raise InvalidInput(f"{text!r} is not an id", remedy=_LISTED)
    return quote(text, safe="")


# ---------------------------------------------------------------- readers


def _nothing(_: bytes) -> None:
    return None


def _raw(body: bytes) -> bytes:
    return body


def _object(body: bytes) -> dict[str, Any]:
    value = json.loads(body)
    if not isinstance(value, dict):
        raise TypeError("not an object")
    return cast("dict[str, Any]", value)


def _known(cls: type[T], values: dict[str, Any]) -> T:
    """`cls` from the fields it knows: a newer server may send more."""
    names = {f.name for f in dataclasses.fields(cast("Any", cls))}
    return cls(**{k: v for k, v in values.items() if k in names})


def _wire(name: str, values: dict[str, Any]) -> Any:
    """The type of that name in `rethaw.model.types`, which are loaded here: a fifth of the time of `rethaw ls` without them."""
    from rethaw.model import types

    cls = getattr(types, name)
    return cls.model_validate_json(json.dumps({k: v for k, v in values.items() if k in cls.model_fields}))


def session_view(body: bytes) -> SessionView:
    return cast("SessionView", _wire("SessionView", _object(body)))


def event(data: bytes | str) -> Event:
    """An event from its JSON."""
    return cast("Event", _wire("Event", cast("dict[str, Any]", json.loads(data))))


def _snapshot(body: bytes) -> SnapshotInfo:
    return cast("SnapshotInfo", _wire("SnapshotInfo", _object(body)))


def _detail(body: bytes) -> Detail:
    values = _object(body)
    stats = _known(Stats, cast("dict[str, Any]", values.get("stats") or {}))
    attempts = [cast("Attempt", _wire("Attempt", one)) for one in values.get("attempts") or ()]
    limits, used = values.get("budget"), values.get("spent")
    return Detail(
        cast("SessionView", _wire("SessionView", values)),
        stats,
        attempts,
        cast("BudgetSpec", _wire("BudgetSpec", limits)) if limits else None,
        cast("Spent", _wire("Spent", used)) if used else None,
    )


def _why(body: bytes) -> Why:
    values = _object(body)
    waits = cast("list[dict[str, Any]]", values.get("waiting_for") or [])
    values["waiting_for"] = [
        OpenWait(
            str(wait.get("kind")),
            cast("str | None", wait.get("name")),
            cast("str | None", wait.get("since")),
            cast("str | None", wait.get("wakes_it")),
        )
        for wait in waits
    ]
    said = cast("dict[str, Any] | None", values.get("last_words"))
    if said is not None:
        lines = [str(line) for line in cast("list[Any]", said.get("lines") or [])]
        values["last_words"] = LastWords(str(said.get("stream")), lines, bool(said.get("cut")))
    return _known(Why, values)


def message(values: dict[str, Any]) -> Message:
    """A message from its wire form (payload: base64 of its JSON text)."""
    at = values.get("at")
    return Message(
        str(values["id"]),
        int(values["number"]),
        base64.urlsafe_b64decode(str(values["payload"]).replace("+", "-").replace("/", "_")),
        datetime.fromisoformat(at) if isinstance(at, str) else None,
    )


def _message(body: bytes) -> Message:
    return message(_object(body))


def _messages(body: bytes) -> list[Message]:
    return [message(m) for m in cast("list[dict[str, Any]]", _object(body)["messages"])]


def _outcome(body: bytes) -> Outcome:
    values = _object(body)
    return Outcome(str(values["state"]), values.get("result"), cast("int | None", values.get("exit_code")))


# ---------------------------------------------------------------- calls


def health() -> Call[dict[str, Any]]:
    return Call("GET", "/healthz", _object)


def put_blob(data: bytes) -> Call[str]:
    return Call(
        "POST", "/v1/blobs", lambda b: str(_object(b)["digest"]), content=data, content_type="application/gzip"
    )  # fmt: skip


def has_blob(digest: str) -> Call[bool]:
    return Call("GET", path("blobs", digest), lambda b: bool(_object(b)["there"]))


def start(agent: AgentSpec, args: dict[str, Any], key: str | None, how: Starting | None = None) -> Call[SessionView]:
    body = b'{"agent":%b,"args":%b' % (agent.model_dump_json().encode(), to_json(args, "args"))
    if how is not None and (given := how.wire()):
        body += b',"options":%b' % to_json(given)
    body += b',"key":%b}' % to_json(key) if key is not None else b"}"
    return Call("POST", "/v1/sessions", session_view, content=body)


def list_sessions(wanted: Wanted, limit: int, cursor: str | None) -> Call[Page]:
    def read(body: bytes) -> Page:
        rows, following = _listed(body)
        return Page([cast("SessionView", _wire("SessionView", row)) for row in rows], following)

    return _list(wanted, limit, cursor, read)


def list_rows(wanted: Wanted, limit: int, cursor: str | None) -> Call[tuple[list[dict[str, Any]], str | None]]:
    """A page of sessions as the server's JSON, and the cursor of the next: for those that cannot wait for the model classes."""
    return _list(wanted, limit, cursor, _listed)


def _listed(body: bytes) -> tuple[list[dict[str, Any]], str | None]:
    values = _object(body)
    return cast("list[dict[str, Any]]", values["sessions"]), cast("str | None", values.get("next"))


def _list(wanted: Wanted, limit: int, cursor: str | None, read: Callable[[bytes], T]) -> Call[T]:
    more = {"limit": str(limit)} if cursor is None else {"limit": str(limit), "cursor": cursor}
    return Call("GET", "/v1/sessions", read, params={**wanted.params, **more})


def get(session: str) -> Call[SessionView]:
    return Call("GET", path("sessions", session), session_view)


def detail(session: str) -> Call[Detail]:
    return Call("GET", path("sessions", session), _detail)


def why(session: str) -> Call[Why]:
    return Call("GET", path("sessions", session, "why"), _why)


def event_params(after: int, types: Sequence[str], all_lines: bool) -> dict[str, str]:
    params = {"after": str(after)}
    if types:
        params["types"] = ",".join(types)
    if all_lines:
        params["all_lines"] = "true"
    return params


def events(session: str, after: int, limit: int, types: Sequence[str], all_lines: bool) -> Call[list[Event]]:
    def read(body: bytes) -> list[Event]:
        return [cast("Event", _wire("Event", row)) for row in _object(body)["events"]]

    params = {**event_params(after, types, all_lines), "limit": str(limit)}
    return Call("GET", path("sessions", session, "events"), read, params=params)


def follow(session: str, types: Sequence[str], all_lines: bool, until_final: bool) -> Call[None]:
    params = event_params(0, types, all_lines)
    params.pop("after")  # each connection says where it goes on
    if until_final:
        params["until_final"] = "1"
    return Call("GET", path("sessions", session, "events"), _nothing, params=params, accept="text/event-stream")


def logs(session: str, stream: str) -> Call[bytes]:
    return Call(
        "GET", path("sessions", session, "logs"), _raw, params={"stream": stream}, accept="application/octet-stream"
    )


def _with_key(payload: bytes, key: str | None) -> bytes:
    return b'{"payload":%b%b}' % (payload, b',"idempotency_key":%b' % to_json(key) if key is not None else b"")


def send(session: str, payload: bytes, key: str | None) -> Call[Message]:
    return Call("POST", path("sessions", session, "messages"), _message, content=_with_key(payload, key))


def signal(session: str, name: str, payload: bytes, key: str | None) -> Call[str]:
    return Call(
        "POST",
        f"{path('sessions', session, 'signals')}/{_part(name)}",
        lambda b: str(_object(b)["signal"]),
        content=_with_key(payload, key),
    )


def inbox(session: str) -> Call[list[Message]]:
    return Call("GET", path("sessions", session, "messages"), _messages)


def outbox(session: str, after: int, wait_s: float) -> Call[list[Message]]:
    params = {"after": str(after), "wait_s": f"{wait_s:g}"}
    return Call("GET", path("sessions", session, "outbox"), _messages, params=params, wait_s=wait_s)


def action(
    session: str, name: Literal["suspend", "resume", "cancel", "crash"], body: dict[str, Any]
) -> Call[SessionView]:
    return Call("POST", path("sessions", session, name), session_view, content=to_json(body))


def fork(session: str, at: int | str | None, n: int, redeliver: bool) -> Call[list[SessionView]]:
    def read(body: bytes) -> list[SessionView]:
        return [cast("SessionView", _wire("SessionView", row)) for row in _object(body)["sessions"]]

    body = {"at": at, "n": n, "redeliver": redeliver}
    return Call("POST", path("sessions", session, "fork"), read, content=to_json(body), wait_s=120)


def rewind(session: str, to: int | str, redeliver: bool) -> Call[SessionView]:
    body = {"to": to, "redeliver": redeliver}
    return Call("POST", path("sessions", session, "rewind"), session_view, content=to_json(body))


def retry(session: str, memory: str | int | None = None) -> Call[SessionView]:
    body = {} if memory is None else {"memory_bytes": size_bytes(memory)}
    return Call("POST", path("sessions", session, "retry"), session_view, content=to_json(body))


def budget(session: str, limits: BudgetSpec, add: Sequence[str]) -> Call[SessionView]:
    body = b'{"limits":%b,"add":%b}' % (limits.model_dump_json(exclude_none=True).encode(), to_json(list(add)))
    return Call("POST", path("sessions", session, "budget"), session_view, content=body)


def snapshot(session: str) -> Call[SnapshotInfo]:
    return Call("POST", path("sessions", session, "snapshots"), _snapshot, content=b"{}", wait_s=60)


def pin(snapshot: str, pinned: bool) -> Call[SnapshotInfo]:
    return Call("POST", path("snapshots", snapshot, "pin"), _snapshot, content=to_json({"pinned": pinned}))


def export(snapshot: str) -> Call[bytes]:
    return Call("GET", path("snapshots", snapshot, "export"), _raw, accept="application/octet-stream", wait_s=600)


def import_() -> Call[SessionView]:
    """Its content is the exported file."""
    kind = "application/octet-stream"
    return Call("POST", path("snapshots", "import"), session_view, content_type=kind, wait_s=600)


def snapshots(session: str) -> Call[list[SnapshotInfo]]:
    def read(body: bytes) -> list[SnapshotInfo]:
        return [cast("SnapshotInfo", _wire("SnapshotInfo", row)) for row in _object(body)["snapshots"]]

    return Call("GET", path("sessions", session, "snapshots"), read)


def result(session: str, wait_s: float) -> Call[Outcome]:
    return Call("GET", path("sessions", session, "result"), _outcome, params={"wait_s": f"{wait_s:g}"}, wait_s=wait_s)


def exchanges(session: str) -> Call[list[dict[str, Any]]]:
    return Call(
        "GET",
        path("sessions", session, "exchanges"),
        lambda b: cast("list[dict[str, Any]]", _object(b)["exchanges"]),
    )


def exchange_bytes(exchange: str, part: Literal["request", "response"]) -> Call[bytes]:
    return Call("GET", path("exchanges", exchange, part), _raw, accept="application/octet-stream")


def delete(session: str, force: bool) -> Call[dict[str, Any]]:
    return Call("DELETE", path("sessions", session), _object, params={"force": "1"} if force else {}, wait_s=60)


def nodes() -> Call[list[dict[str, Any]]]:
    return Call("GET", "/v1/nodes", lambda b: cast("list[dict[str, Any]]", _rows(b, "nodes")))


def doctor() -> Call[list[dict[str, Any]]]:
    return Call(
        "POST", "/v1/doctor", lambda b: cast("list[dict[str, Any]]", _rows(b, "reports")), content=b"{}", wait_s=120
    )


def _rows(body: bytes, name: str) -> Any:
    value: Any = json.loads(body)
    return cast("Any", value if isinstance(value, list) else value[name])
