"""Contexts without a sandbox, for a debugger and for unit tests: what would come is given in advance, what goes out is kept.

Standard library only, Python >= 3.9. The calls are those of `Context` and `AsyncContext`; only their answers come from
memory. Nothing is waited for: a wait for what was not given ends at once, by WaitTimeout if it has a timeout.
"""

from __future__ import annotations

import json
from collections import deque
from datetime import datetime, timezone
from typing import Any, Callable, Deque, Dict, Iterable, List, Mapping, Optional

from rethaw.channel.payload import embed, split
from rethaw.guest import protocol, runner
from rethaw.guest.acontext import AsyncContext
from rethaw.guest.context import Context
from rethaw.model import annotations, typed
from rethaw.model.errors import NotFound, RethawError, Unavailable

_TIMED_OUT = b'{"timeout":true}'


class Memory:
    """What a local session was given and what it did. Payloads are kept as JSON text, as on the wire."""

    def __init__(
        self,
        inbox: Iterable[Any],
        signals: Mapping[str, Any],
        args: Mapping[str, Any],
        children: Optional[Mapping[str, Any]] = None,
        messages: Iterable[Dict[str, Any]] = (),
        forked: bool = False,
    ) -> None:
        self.inbox: Deque[bytes] = deque(protocol.to_json(payload, "an inbox message") for payload in inbox)
        self.signals = {name: protocol.to_json(payload, f"signal {name!r}") for name, payload in signals.items()}
        self.args = dict(json.loads(protocol.to_json(dict(args), "the arguments")))
        self.outbox: List[Any] = []
        self.events: List[Dict[str, Any]] = []
        self.slept: List[float] = []
        self.value: Any = None
        self.children = dict(children or {})
        self.spawned: List[Dict[str, Any]] = []
        self.messages = list(messages)
        self.forked = forked
        self._ends: Dict[str, Dict[str, Any]] = {}
        self._received = 0

    def answer(self, op: str, body: bytes) -> bytes:
        """The JSON text of an answer's `ok`. Raises RethawError."""
        if op == "send":
            _, raw = split(body)
            self.outbox.append(json.loads(raw or b"null"))
            self._note("message.sent", {}, (raw or b"null").decode())
        elif op == "emit":
            fields, raw = split(body, "data")
            self._note(str(fields["name"]), json.loads(raw or b"{}"))
        elif op == "result":
            _, raw = split(body, "value")
            self.value = json.loads(raw or b"null")
        elif op == "sleep":
            self.slept.append(float(json.loads(body)["seconds"]))
        elif op == "receive":
            return self._receive(json.loads(body))
        elif op == "wait":
            return self._wait(json.loads(body))
        elif op == "wait_any":
            return self._wait_any(json.loads(body))
        elif op == "spawn":
            return json.dumps({"child": self._spawn(json.loads(split(body)[1] or b"{}"))}).encode()
        elif op in ("child_send", "child_cancel"):
            fields, raw = split(body)
            self._note("child.told", {"child": fields["child"], "act": op[6:]}, raw.decode() if raw else None)
            self._spawned(str(fields["child"]))["sent" if raw else "cancelled"] += [json.loads(raw)] if raw else [True]
        elif op == "fork":
            about = {"session": "s_fork", "parent": "s_local", "forked": self.forked}
            return json.dumps(about).encode()
        elif op == "deadline":
            return b'{"deadline":null}'
        elif op == "signal_url":
            return b'{"url":null}'
        elif op == "snapshot":
            return b'{"snapshot":"snap_local"}'
        elif op == "history":
            asked = json.loads(body)
            after = int(asked["after"])
            if "form" in asked:
                rest = {"system": "", "exchange": None, "more": False}
                return json.dumps({"messages": self.messages[after:], **rest}).encode()
            return json.dumps({"events": self.events[after:], "more": False}).encode()
        elif op == "info":
            about = {"session": "s_local", "attempt": 1, "args": self.args, "fresh": False, "generation": "local"}
            return json.dumps(about).encode()
        else:
            raise NotFound(f"a local session has no operation {op!r}")
        return b"null"

    def _receive(self, wanted: Dict[str, Any]) -> bytes:
        if not self.inbox:
            if wanted.get("timeout_s") is not None:
                return _TIMED_OUT
            raise Unavailable("the local inbox is empty, and nobody will write", remedy="pass more in inbox=[...]")
        raw = self.inbox.popleft()
        self._received += 1
        self._note("message.received", {"number": self._received}, raw.decode())
        return embed({"id": None, "number": self._received}, raw)

    def _wait(self, wanted: Dict[str, Any]) -> bytes:
        name = str(wanted["name"])
        if name not in self.signals:
            if wanted.get("timeout_s") is not None:
                return _TIMED_OUT
            raise Unavailable(
                f"nobody will send the signal {name!r} to a local session", remedy=f"pass signals={{{name!r}: ...}}"
            )
        raw = self.signals.pop(name)
        self._note("signal.received", {"name": name}, raw.decode())
        return embed({"id": None}, raw)

    def _spawn(self, wanted: Dict[str, Any]) -> str:
        name, child = str(wanted["agent"]), f"s_child_{len(self.spawned) + 1}"
        if name not in self.children:
            raise Unavailable(
                f"nobody runs the agent {name!r} for a local session", remedy=f"pass children={{{name!r}: ...}}"
            )
        given = self.children[name]
        self.spawned.append({"id": child, "agent": name, "args": wanted["args"], "sent": [], "cancelled": []})
        self._note("child.spawned", {"child": child, "agent": name})
        self._ends[child] = _end_of(name, given, wanted["args"])
        return child

    def _spawned(self, child: str) -> Dict[str, Any]:
        found = next((one for one in self.spawned if one["id"] == child), None)
        if found is None:
            raise NotFound(f"a local session has no child {child!r}", remedy="use what ctx.spawn(...) gave")
        return found

    def _wait_any(self, wanted: Dict[str, Any]) -> bytes:
        """The first that was given; a timer only when nothing else was. Children have ended when they begin."""
        parts: List[Dict[str, Any]] = wanted["parts"]
        for part in parts:
            if part["kind"] == "child":
                self._spawned(part["name"])
        if wanted.get("all"):
            return b"{}"
        for index, part in enumerate(parts):
            kind = part["kind"]
            if kind == "inbox" and self.inbox:
                return _with(self._receive({}), part=index)
            if kind == "signal" and part["name"] in self.signals:
                return _with(self._wait(part), part=index)
            if kind == "child":
                end = self._ends[part["name"]]
                return embed({"part": index, "outcome": end["outcome"]}, end["value"])
        timers = [(part["seconds"], index) for index, part in enumerate(parts) if part["kind"] == "timer"]
        limit = wanted.get("timeout_s")
        if timers and (limit is None or min(timers)[0] <= limit):
            self.slept.append(min(timers)[0])
            return json.dumps({"part": min(timers)[1]}).encode()
        if limit is not None:
            return _TIMED_OUT
        raise Unavailable("nothing that is waited for will come to a local session", remedy="pass inbox=, signals=")

    def _note(self, type: str, data: Dict[str, Any], body: Optional[str] = None) -> None:
        at = datetime.now(timezone.utc).isoformat()
        self.events.append({"seq": len(self.events) + 1, "type": type, "data": data, "body": body, "at": at})


def _with(ok: bytes, **more: Any) -> bytes:
    fields, raw = split(ok)
    return embed({**fields, **more}, raw if raw is not None else b"null")


def _end_of(name: str, given: Any, args: Dict[str, Any]) -> Dict[str, Any]:
    """How a child ends: with what was given for it; by running that, if it can be."""
    state, detail, value = "completed", None, given
    try:
        if isinstance(given, Exception):
            raise given
        if callable(getattr(given, "function", None)):
            value = LocalContext().run(given, **args)
        elif callable(given):
            value = given(**args)
    except RethawError as error:
        state, detail, value = "failed", str(error), None
    except Exception as error:
        state, detail, value = "failed", f"{type(error).__name__}: {error}", None
    outcome = {"state": state, "reason": "none" if detail is None else "exited", "detail": detail}
    return {"outcome": outcome, "value": protocol.to_json(value, f"the result of {name!r}")}


class _Local:
    """What both contexts tell."""

    def __init__(
        self,
        *,
        inbox: Iterable[Any] = (),
        signals: Optional[Mapping[str, Any]] = None,
        args: Optional[Mapping[str, Any]] = None,
        children: Optional[Mapping[str, Any]] = None,
        messages: Iterable[Dict[str, Any]] = (),
        forked: bool = False,
    ) -> None:
        super().__init__("/nowhere")  # pyright: ignore[reportCallIssue] - a Context's path, which nobody opens
        self._memory = Memory(inbox, signals or {}, args or {}, children, messages, forked)

    @property
    def session(self) -> str:
        return "s_local"

    @property
    def generation(self) -> str:
        return "local"

    @property
    def attempt(self) -> int:
        return 1

    @property
    def fresh(self) -> bool:
        return False

    @property
    def args(self) -> Dict[str, Any]:
        return dict(self._memory.args)

    @property
    def outbox(self) -> List[Any]:
        """What was sent, oldest first."""
        return self._memory.outbox

    @property
    def events(self) -> List[Dict[str, Any]]:
        """As `history()`."""
        return self._memory.events

    @property
    def spawned(self) -> List[Dict[str, Any]]:
        """Each child that was spawned: {id, agent, args, sent, cancelled}."""
        return self._memory.spawned

    @property
    def deadline(self) -> Optional[datetime]:
        return None

    @property
    def slept(self) -> List[float]:
        """Seconds that each `sleep` asked for."""
        return self._memory.slept

    @property
    def value(self) -> Any:
        """What the agent returned, when the runner called it."""
        return self._memory.value

    def on_restore(self, function: Callable[[str], Any]) -> Callable[[str], Any]:
        """Nothing is ever restored here."""
        return function


class LocalContext(_Local, Context):
    """A Context in memory, to call an agent's function with: `coder(LocalContext(inbox=["hi"]), goal="...")`.

    `inbox`: messages that `receive` gives, in order. `signals`: payloads by name, each for one `wait`. `args`: what
    `ctx.args` is. `outbox`, `events` and `slept` (seconds of each sleep, none of which is slept) tell what the agent did.
    `children`: by the name of an agent what its children return: a value, an exception that they fail with, or a function or
    an agent, which is called. `messages`: what `history` gives in a provider's form. `forked`: what `fork` says.
    For what was not given, a wait with a timeout raises WaitTimeout at once, one without Unavailable.
    """

    def run(self, function: Callable[..., Any], **args: Any) -> Any:
        """What the agent's `function` returns, called as in a sandbox: also an `async def`, a class, or a generator, whose
        values go into the outbox. Arguments and result go through JSON, as there."""
        plain = getattr(function, "function", function)
        return self.run_wire(plain, typed.wire_arguments(plain, args, ""))

    def run_wire(self, function: Callable[..., Any], args: Mapping[str, Any]) -> Any:
        """`run` with the arguments as JSON holds them."""
        given = json.loads(protocol.to_json(dict(args), "the arguments"))
        self.result(runner.call(function, self, self._for_async, given))
        return typed.build(self.value, annotations.returned(function)[1], "the agent's result")

    def _for_async(self) -> AsyncLocalContext:
        other = AsyncLocalContext()
        other._memory = self._memory
        return other

    def _call(self, op: str, body: bytes) -> bytes:
        return self._memory.answer(op, body)


class AsyncLocalContext(_Local, AsyncContext):
    """`LocalContext` for `async def` agents."""

    async def _call(self, op: str, body: bytes) -> bytes:
        return self._memory.answer(op, body)


__all__ = ["AsyncLocalContext", "LocalContext"]
