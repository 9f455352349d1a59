"""Context calls of the guest: each is one `call` stream, JSON in, JSON out, repeated by the guest until answered.

A call's id ("<attempt>.<counter>") comes from guest memory, so a call that is repeated after a thaw or a restore is the
same call: every operation here is idempotent by it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, Protocol

from rethaw.channel.payload import embed, split
from rethaw.model.enums import EventType
from rethaw.model.errors import Fenced, InvalidInput, NotFound, RethawError, StorageFull, TooLarge, Unavailable
from rethaw.model.ids import new_id
from rethaw.model.ports import GuestStream
from rethaw.model.types import MESSAGE_LIMIT, AgentFork, Boot, Event, Fence, NewEvent, WaitPart, WaitSpec, WaitState
from rethaw.node import history
from rethaw.node.carry import Carried
from rethaw.node.parts import Parts
from rethaw.node.saver import Saver

log = logging.getLogger("rethaw.node")
_BODY_LIMIT = MESSAGE_LIMIT + 64 * 1024  # payload plus the call around it
_WAITS = {"receive", "wait", "wait_any", "sleep"}
_PAYLOADS = {"emit": "data", "result": "value"}  # the member whose exact text is kept; "payload" elsewhere
_RAW = "\0raw"  # where that text stands in a parsed call; only ours is of type bytes


class Owner(Protocol):
    """What calls need of the life they belong to."""

    async def exited(self, code: int | None, signal: int | None, detail: str | None) -> None: ...

    def active(self) -> None: ...

    def waits_changed(self) -> None: ...

    async def looked_up(self, host: str) -> None: ...

    def attend(self) -> None: ...


Body = dict[str, Any]


class Calls:
    """Answers Context calls of one life. `waiting`: open waits by call id and since when (monotonic seconds)."""

    def __init__(self, parts: Parts, fence: Fence, attempt: int, boot: Boot, saver: Saver, owner: Owner) -> None:
        self._parts = parts
        self._fence = fence
        self._attempt = attempt
        self._boot = boot
        self._saver = saver
        self._owner = owner
        self.carried: Carried | None = None  # files that this attempt begins with
        self._snapshots: dict[str, asyncio.Future[str]] = {}
        self._forks: dict[str, asyncio.Future[AgentFork]] = {}
        self._saved: dict[str, str] = {}
        self.waiting: dict[str, float] = {}
        self._wait_ids: dict[str, str] = {}
        self._ops: dict[str, Callable[[str, Body], Awaitable[Any]]] = {
            "info": self._info,
            "receive": self._receive,
            "consumed": self._consumed,
            "send": self._send,
            "emit": self._emit,
            "wait": self._wait,
            "wait_any": self._wait_any,
            "spawn": self._spawn,
            "child_send": self._child_send,
            "child_cancel": self._child_cancel,
            "fork": self._fork,
            "deadline": self._deadline,
            "signal_url": self._signal_url,
            "sleep": self._sleep,
            "snapshot": self._snapshot,
            "history": self._history,
            "result": self._result,
            "exit": self._exit,
            "lookup": self._lookup,
            "carry": self._carry,
        }

    async def handle(self, stream: GuestStream) -> None:
        """Serve one call stream; cancelled when the guest falls quiet, and called again after the thaw."""
        op, call = str(stream.meta.get("op")), str(stream.meta.get("id"))
        try:
            try:
                result = await self._dispatch(op, call, await stream.read_all(_BODY_LIMIT))
                answer = embed({}, result if isinstance(result, bytes) else json.dumps(result).encode(), "ok")
            except TooLarge as error:
                raise TooLarge(
                    f"{op}: the payload is over {MESSAGE_LIMIT} bytes",
                    remedy="put it in a file and send its path",
                ) from error
        except asyncio.CancelledError:
            if stream.hung_up:
                await self._given_up(call)
            raise
        except RethawError as error:
            if error.code in ("fenced", "unavailable"):
                raise
            said = {"code": error.code, "message": str(error), "details": error.details}
            answer = json.dumps({"error": said}, default=str).encode()
        await stream.write(answer)
        await stream.end()
        self._done(call)

    async def _dispatch(self, op: str, call: str, raw: bytes) -> Any:
        handler = self._ops.get(op)
        if handler is None:
            raise InvalidInput(f"{op!r} is no Context call", remedy=f"use one of {', '.join(self._ops)}")
        body, payload = split(raw or b"{}", _PAYLOADS.get(op, "payload"))
        if payload is not None:
            if len(payload) > MESSAGE_LIMIT:
                raise TooLarge(f"{op}: a payload of {len(payload)} bytes")
            body[_RAW] = payload
        if op in _WAITS:
            self.waiting.setdefault(call, time.monotonic())
            self._wait_ids[call] = _wait_id(call, body)
            self._owner.waits_changed()
        else:
            self._owner.active()
        try:
            return await handler(call, body)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"{op}: {type(error).__name__}: {error}", remedy="see docs/concepts.md") from error

    def still_open(self, calls: Collection[str]) -> None:
        """A thaw: these calls have no answer yet. One that was given up just before the freeze is not waited for."""
        for call in [c for c in self.waiting if c not in calls]:
            self._done(call)

    async def _given_up(self, call: str) -> None:
        """Nobody in the guest waits for this call any more (a task was cancelled, a process died)."""
        wait = self._wait_ids.get(call)
        self._done(call)
        if wait is not None:
            try:
                await self._parts.control.cancel_wait(self._fence, self._attempt, wait)
            except RethawError as error:
                log.info("session %s: wait %s not cancelled: %s", self._fence.session, wait, error)

    def unanswered(self) -> tuple[str, ...]:
        """Wait ids that the guest has no answer to; exact while it is quiet."""
        return tuple(self._wait_ids[call] for call in self.waiting)

    def _done(self, call: str) -> None:
        if self.waiting.pop(call, None) is not None:
            self._wait_ids.pop(call, None)
            self._owner.active()
            self._owner.waits_changed()

    # ------------------------------------------------------------ operations

    async def _info(self, call: str, body: Body) -> Any:
        return {
            "session": self._fence.session,
            "attempt": self._attempt,
            "generation": self._fence.generation,
            "args": self._boot.args,
            "cursor": self._boot.cursor,
            "fresh": self._boot.fresh,
        }

    async def _append(self, event: NewEvent) -> Event:
        return (await self._parts.log.append(self._fence, [event]))[0]

    async def _send(self, call: str, body: Body) -> Any:
        data = {"message": new_id("m")}
        sent = NewEvent(type=EventType.MESSAGE_SENT, data=data, body=_payload(body), key=f"send:{call}")
        if self._saver.relaxed:
            return {"message": (await self._parts.control.publish(self._fence, sent)).data["message"]}
        event = await self._append(sent)
        self._saver.ask("outbox")
        return {"message": event.data["message"]}

    async def _emit(self, call: str, body: Body) -> Any:
        await self._append(
            NewEvent(
                type=EventType.EMITTED,
                data={"name": str(body.get("name", ""))},
                body=_payload(body),
                key=f"emit:{call}",
            )
        )
        return {}

    async def _result(self, call: str, body: Body) -> Any:
        await self._append(NewEvent(type=EventType.SESSION_RESULT, body=_payload(body), key=f"result:{call}"))
        return {}

    async def _consumed(self, call: str, body: Body) -> Any:
        await self._parts.control.consume(self._fence, self._attempt, int(body["number"]))
        return {}

    async def _lookup(self, call: str, body: Body) -> Any:
        await self._owner.looked_up(str(body["host"]))
        return {}

    async def _deadline(self, call: str, body: Body) -> Any:
        at = (await self._parts.control.session(self._fence.session)).deadline
        return {"deadline": None if at is None else at.isoformat()}

    async def _history(self, call: str, body: Body) -> Any:
        if body.get("form") is not None:
            return await history.page(self._parts.log, self._fence, body)
        after, limit = int(body.get("after", 0)), min(int(body.get("limit", 200)), 500)
        events = await self._parts.log.read(self._fence.session, after=after, limit=limit)
        return {
            "events": [
                {
                    "seq": e.seq,
                    "type": e.type.value,
                    "data": e.data,
                    "body": e.body.decode("utf-8", "replace") if e.body and len(e.body) <= MESSAGE_LIMIT else None,
                    "at": e.at.isoformat(),
                }
                for e in events
            ],
            "more": len(events) == limit,
        }

    def saved_in(self, snapshot: str, calls: Iterable[str]) -> None:
        """`calls` were open when `snapshot`, which this life was restored from, was taken: to a `snapshot` among them it
        is the answer."""
        self._saved = dict.fromkeys(calls, snapshot)

    async def _snapshot(self, call: str, body: Body) -> Any:
        if call in self._saved:
            return {"snapshot": self._saved[call]}
        done = self._snapshots.get(call)
        if done is None:
            # The save makes the guest quiet, which cancels this very handler: it goes on under its own name.
            done = asyncio.ensure_future(self._save())
            self._snapshots[call] = done
        return {"snapshot": await asyncio.shield(done)}

    async def _save(self) -> str:
        return (await self._saver.save("requested")).id

    # ------------------------------------------------------------ other sessions

    async def _spawn(self, call: str, body: Body) -> Any:
        wanted = json.loads(_payload(body))
        child = await self._parts.control.spawn(
            self._fence, self._attempt, call, str(wanted["agent"]), dict(wanted["args"])
        )
        self._saver.ask("spawn")
        return {"child": child}

    async def _child_send(self, call: str, body: Body) -> Any:
        payload = _payload(body)
        await self._parts.control.tell_child(self._fence, self._attempt, call, str(body["child"]), "message", payload)
        self._saver.ask("child")
        return {}

    async def _child_cancel(self, call: str, body: Body) -> Any:
        await self._parts.control.tell_child(self._fence, self._attempt, call, str(body["child"]), "cancel", None)
        self._saver.ask("child")
        return {}

    async def _fork(self, call: str, body: Body) -> Any:
        made = self._forks.get(call)
        if made is None or (made.done() and (made.cancelled() or made.exception() is not None)):
            # As with `_snapshot`: the save cancels this handler. The call is open in the snapshot, so both sides ask again.
            made = self._forks[call] = asyncio.ensure_future(self._fork_self(call))
        return (await asyncio.shield(made)).model_dump()

    async def _fork_self(self, call: str) -> AgentFork:
        control = self._parts.control
        known = await control.forked(self._fence, self._attempt, call)
        if known is not None:
            return known
        snapshot = self._saved.get(call) or (await self._saver.save("fork")).id
        return await control.fork_self(self._fence, self._attempt, call, snapshot)

    # ------------------------------------------------------------ waits

    async def _until(self, spec: WaitSpec) -> WaitState:
        control = self._parts.control
        state = await control.open_wait(self._fence, self._attempt, spec)
        while not state.done:
            state = await control.poll_wait(self._fence, self._attempt, spec.id, self._parts.timing.poll)
        self._owner.attend()
        return state

    async def _receive(self, call: str, body: Body) -> Any:
        state = await self._until(
            WaitSpec(id=_wait_id(call, body), kind="inbox", after=int(body["after"]), timeout_s=_seconds(body))
        )
        return _arrived(state)

    async def _wait(self, call: str, body: Body) -> Any:
        state = await self._until(
            WaitSpec(id=_wait_id(call, body), kind="signal", name=str(body["name"]), timeout_s=_seconds(body))
        )
        return _arrived(state)

    async def _wait_any(self, call: str, body: Body) -> Any:
        parts = tuple(_part(part) for part in body["parts"])
        kind = "all" if body.get("all") else "any"
        state = await self._until(WaitSpec(id=_wait_id(call, body), kind=kind, parts=parts, timeout_s=_seconds(body)))
        return _arrived(state)

    async def _sleep(self, call: str, body: Body) -> Any:
        spec = WaitSpec(id=_wait_id(call, body), kind="timer", timeout_s=float(body["seconds"]))
        await self._until(spec)
        return {}

    async def _signal_url(self, call: str, body: Body) -> Any:
        spec = WaitSpec(id=_wait_id(call, body), kind="signal", name=str(body["name"]), timeout_s=_seconds(body))
        state = await self._parts.control.open_wait(self._fence, self._attempt, spec)
        return {"url": state.url}

    async def _carry(self, call: str, body: Body) -> Any:
        if self.carried is None:
            raise NotFound("this attempt begins with the files of its image")
        try:
            return await self.carried.chunk(int(body["offset"]))
        except (StorageFull, Unavailable) as error:
            raise Unavailable(str(error)) from error  # not the snapshot's fault: asked again
        except (RethawError, OSError) as error:
            log.warning("session %s: files of snapshot %s: %s", self._fence.session, self.carried.info.id, error)
            await self._parts.control.report_unusable(self._fence, self.carried.info.id, str(error))
            raise Fenced("the attempt begins again without these files") from error

    async def _exit(self, call: str, body: Body) -> Any:
        code, signal = body.get("code"), body.get("signal")
        detail = body.get("error")
        await self._owner.exited(
            int(code) if code is not None else None,
            int(signal) if signal is not None else None,
            str(detail) if detail else None,
        )
        return {}


def _part(body: Body) -> WaitPart:
    seconds = body.get("seconds")
    return WaitPart(
        kind=body["kind"],
        name=body.get("name"),
        wait=body.get("wait"),
        after=int(body.get("after") or 0),
        timeout_s=None if seconds is None else float(seconds),
    )


def _wait_id(call: str, body: Body) -> str:
    return str(body.get("wait") or call)


def _seconds(body: Body) -> float | None:
    value = body.get("timeout_s")
    return None if value is None else float(value)


def _payload(body: Body) -> bytes:
    """The exact JSON text of the call's payload."""
    raw = body.get(_RAW)
    return raw if isinstance(raw, bytes) else b"null"


def _arrived(state: WaitState) -> Any:
    if state.timed_out:
        return {"timeout": True}
    fields: Body = {"number": state.number, "id": state.item, "name": state.name}
    if state.part is not None or state.outcome is not None:
        fields |= {"part": state.part, "outcome": state.outcome}
    return embed(fields, state.payload if state.payload is not None else b"null")
