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
from rethaw.model.errors import NotFound, Unavailable

_TIMED_OUT = b'{"timeout":true}'


class Memory:
    """What a local session was given and what it did. Payloads are kept as JSON text, as on the wire."""

    def __init__(self, inbox: Iterable[Any], signals: Mapping[str, Any], args: Mapping[str, Any]) -> None:
        self.inbox: Deque[bytes] = deque(protocol.to_json(payload, "an inbox message") for payload in inbox)
        self.signals = {name: protocol.to_json(payload, f"signal {name!r}") for name, payload in signals.items()}
        self.args = dict(json.loads(protocol.to_json(dict(args), "the arguments")))
        self.outbox: List[Any] = []
        self.events: List[Dict[str, Any]] = []
        self.slept: List[float] = []
        self.value: Any = None
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
        elif op == "signal_url":
            return b'{"url":null}'
        elif op == "snapshot":
            return b'{"snapshot":"snap_local"}'
        elif op == "history":
            after = int(json.loads(body)["after"])
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

    def _note(self, type: str, data: Dict[str, Any], body: Optional[str] = None) -> None:
        at = datetime.now(timezone.utc).isoformat()
        self.events.append({"seq": len(self.events) + 1, "type": type, "data": data, "body": body, "at": at})


class _Local:
    """What both contexts tell."""

    def __init__(
        self,
        *,
        inbox: Iterable[Any] = (),
        signals: Optional[Mapping[str, Any]] = None,
        args: Optional[Mapping[str, Any]] = None,
    ) -> None:
        super().__init__("/nowhere")  # pyright: ignore[reportCallIssue] - a Context's path, which nobody opens
        self._memory = Memory(inbox, signals or {}, args or {})

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
