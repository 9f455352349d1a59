"""AsyncContext: `Context` for asyncio. Standard library only, Python >= 3.9."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from typing import (
    TYPE_CHECKING,
    Any,
    AsyncIterator,
    Awaitable,
    Callable,
    Dict,
    List,
    Literal,
    Optional,
    Set,
    Tuple,
    TypeVar,
    Union,
    overload,
)

from rethaw.guest import protocol, waiting
from rethaw.guest.children import AsyncChild, checked, spawn_body
from rethaw.guest.context import Context
from rethaw.guest.protocol import Message, Signal
from rethaw.guest.waiting import Fork, Inbox, Messages, Timer, fork_of
from rethaw.model.durations import Duration
from rethaw.model.errors import Unavailable, WaitTimeout

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from rethaw.guest.children import P, Spawnable
    from rethaw.guest.waiting import Thing

R = TypeVar("R")

log = logging.getLogger("rethaw.guest")
_Pair = Tuple[asyncio.StreamReader, asyncio.StreamWriter]


class AsyncContext:
    """A session, seen from inside. Any number of calls may be open at once; cancelling a call's task cancels it."""

    def __init__(self, path: Optional[str] = None) -> None:
        self._path = protocol.socket_path(path)
        self._about = Context(path)
        self._free: List[_Pair] = []
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._tasks: Set[asyncio.Task[None]] = set()

    # ---- who this is: answered by guestd at once, so these do not need to be awaited

    @property
    def session(self) -> str:
        """The session's id. A fork has its own; RETHAW_SESSION in its environment is the one that it was started as."""
        return self._about.session

    @property
    def attempt(self) -> int:
        """Which life of the process tree this is, from 1."""
        return self._about.attempt

    @property
    def args(self) -> Dict[str, Any]:
        """What the session was started with."""
        if protocol.told is not None:
            return dict(protocol.told)
        return self._about.args

    async def ready(self) -> Dict[str, Any]:
        """The program is warm: return what the session was started with. In a template (`rethaw template create`) this is
        where it is frozen, and where each session that is started from it begins. Later calls return the same."""
        if protocol.told is not None:
            return dict(protocol.told)
        if not protocol.in_template():
            return self.args
        if self.fresh or self.attempt > 1:  # the signal may be of a former life
            told = protocol.started(await self.history())
            if told is not None:
                return protocol.begun(told)
        return protocol.begun((await self.wait(protocol.START)).payload)

    @property
    def fresh(self) -> bool:
        """True when an earlier life was abandoned: `history()` has its context, this process has nothing of it."""
        return self._about.fresh

    @property
    def generation(self) -> str:
        """A UUID that changes with each restore."""
        return protocol.generation(self._path)

    @property
    def deadline(self) -> Optional[datetime]:
        """When the session is ended for taking too long (`max_duration`), in UTC; None: never."""
        return self._about.deadline

    @property
    def remaining(self) -> Optional[timedelta]:
        """How much time is left until `deadline`; None: it has none."""
        return protocol.left_until(self.deadline)

    # ---- messages and signals

    async def receive(self, timeout: Optional[Duration] = None) -> Message:
        """The next inbox message; it is consumed. Raises WaitTimeout."""
        return protocol.message_of(await self._call("receive", protocol.wait_body(timeout=timeout)), timeout)

    async def messages(self, idle: Optional[Duration] = None) -> AsyncIterator[Message]:
        """Messages as they come, until none has come for `idle`."""
        while True:
            try:
                message = await self.receive(timeout=idle)
            except WaitTimeout:
                return
            yield message

    async def send(self, payload: Any) -> None:
        """Put a message into the outbox. It is seen outside once a snapshot that contains this moment is durable; at once with
        `durability="relaxed"`."""
        await self._call("send", protocol.payload_body(payload))

    async def signal(self, name: str) -> Signal:
        """A signal to wait for, with `url`: a POST of JSON to it completes it, once."""
        ok = json.loads(await self._call("signal_url", protocol.wait_body(name)))
        return Signal(name, ok.get("url"))

    async def wait(self, name: Union[str, Signal], timeout: Optional[Duration] = None) -> Signal:
        """Until the signal comes. Raises WaitTimeout."""
        wanted = name.name if isinstance(name, Signal) else name
        return protocol.signal_of(await self._call("wait", protocol.wait_body(wanted, timeout)), wanted, timeout)

    async def wait_any(
        self, *things: Union[Thing, Awaitable[Signal]], timeout: Optional[Duration] = None
    ) -> Union[Signal, Message, Timer, AsyncChild[Any]]:
        """Until the first of `things` comes: signals (`ctx.signal(name)`), `ctx.inbox`, `ctx.timer(duration)`, children.
        Returns it: a Signal with its payload, a Message, the Timer, or the child, which has ended then. The others stay as
        they are. Raises WaitTimeout."""
        known = [await thing if inspect.isawaitable(thing) else thing for thing in things]
        return waiting.came(await self._call("wait_any", waiting.body(known, timeout)), known, timeout)

    async def wait_all(self, *children: AsyncChild[Any], timeout: Optional[Duration] = None) -> List[Any]:
        """Until all `children` have ended: what they returned, in order, with a ChildFailed in place of the result of one
        that failed. Raises WaitTimeout."""
        missing = checked(children)
        if missing:
            waiting.all_came(await self._call("wait_any", waiting.body(missing, timeout, every=True)), missing, timeout)
        for child in checked(missing):
            await self.wait_any(child)
        return [child.outcome() for child in children]

    @property
    def inbox(self) -> Inbox:
        """The inbox, for `wait_any`."""
        return Inbox()

    def timer(self, duration: Duration) -> Timer:
        """A time from the beginning of the wait, for `wait_any`."""
        return Timer(duration)

    # ---- other sessions

    @overload
    async def spawn(self, agent: Spawnable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> AsyncChild[R]: ...
    @overload
    async def spawn(self, agent: str, /, **kwargs: Any) -> AsyncChild[Any]: ...
    async def spawn(self, agent: Any, /, *args: Any, **kwargs: Any) -> AsyncChild[Any]:
        """Start a child: an agent of the same file or package with its arguments, or a deployed one by its name. It begins
        to run once a snapshot that contains this moment is durable, and is cancelled when this session fails."""
        ok = json.loads(await self._call("spawn", spawn_body(agent, args, kwargs)))
        return AsyncChild(self, str(ok["child"]), agent)

    def child(self, id: str) -> AsyncChild[Any]:
        """A child that this session spawned earlier, by its id."""
        return AsyncChild(self, id)

    async def fork(self) -> Fork:
        """Take a snapshot and make a new session from it. Returns in both; `.forked` is true in the new one."""
        return fork_of(await self._call("fork", b"{}"))

    # ---- time, events, snapshots

    async def sleep(self, duration: Duration) -> None:
        """Sleep; the session may be suspended meanwhile."""
        await self._call("sleep", protocol.sleep_body(duration))

    async def emit(self, name: str, /, **data: Any) -> None:
        """Add an event to the session's log."""
        await self._call("emit", protocol.emit_body(name, data))

    async def snapshot(self) -> str:
        """Take a snapshot now; returns its id once it is durable. What follows happens after it."""
        return str(json.loads(await self._call("snapshot", b"{}"))["snapshot"])

    @overload
    async def history(self, form: Literal["events"] = "events") -> List[Dict[str, Any]]: ...
    @overload
    async def history(self, form: Literal["openai", "responses", "anthropic"]) -> Messages: ...
    async def history(self, form: str = "events") -> List[Dict[str, Any]]:
        """What happened so far. As "events", oldest first: {seq, type, data, body, at}. As "openai" (Chat Completions),
        "responses" or "anthropic": the conversation of the newest model call and its answer, ready to be sent to that
        provider; its system prompt is in `.system` as well."""
        if form != "events":
            return await self._conversation(form)
        events: List[Dict[str, Any]] = []
        while True:
            after = int(events[-1]["seq"]) if events else 0
            page = json.loads(await self._call("history", protocol.history_body(after)))
            events += page["events"]
            if not page.get("more") or not page["events"]:
                return events

    async def _conversation(self, form: str) -> Messages:
        messages, exchange = Messages(), None
        while True:
            page = json.loads(await self._call("history", protocol.history_body(len(messages), form, exchange)))
            messages += page["messages"]
            messages.system, exchange = page["system"], page["exchange"]
            if not page["more"]:
                return messages

    def on_restore(self, function: Callable[[str], Any]) -> Callable[[str], Any]:
        """Call (and await, when it is a coroutine function) `function(generation)` after each restore. Usable as a
        decorator, where a loop runs."""
        known = self.generation
        task = asyncio.get_running_loop().create_task(self._restores(known, function))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return function

    async def _restores(self, known: str, function: Callable[[str], Any]) -> None:
        pair = await self._connect()
        try:
            # a restore between reading `known` and now is told at once: guestd compares
            await _exchange(pair, "subscribe", protocol.to_json({"generation": known}, "the generation"))
            while True:
                header, body = await _next(pair[0])
                if header.get("event") == "restore":
                    await _run(function, json.loads(body)["generation"])
        except (OSError, ValueError, Unavailable):
            pass
        finally:
            pair[1].close()

    # ---- calls

    async def result(self, value: Any) -> None:
        """What the session's caller gets. The runner of @rethaw.agent functions calls this with their return value."""
        await self._call("result", protocol.result_body(value))

    async def _call(self, op: str, body: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # connections belong to the loop that made them
            self._free = []
            self._loop = loop
        pair = self._free.pop() if self._free else await self._connect()
        try:
            answer = await _exchange(pair, op, body)
        except OSError as error:
            pair[1].close()
            raise Unavailable(f"guestd went away: {error}") from error
        except BaseException:
            pair[1].close()  # its answer would be taken for the next call's; guestd cancels the call
            raise
        self._free.append(pair)
        return protocol.answer_of(answer)

    async def _connect(self) -> _Pair:
        try:
            return await asyncio.open_unix_connection(self._path)
        except OSError:
            protocol.no_guestd(self._path)


async def _exchange(pair: _Pair, op: str, body: bytes) -> bytes:
    pair[1].write(protocol.request(op, 1, body))
    await pair[1].drain()
    while True:
        header, answer = await _next(pair[0])
        if header.get("ref") in (0, 1):
            return answer


async def _next(reader: asyncio.StreamReader) -> Tuple[Dict[str, Any], bytes]:
    try:
        header = json.loads(await reader.readuntil(b"\n"))
        return header, await reader.readexactly(header["len"])
    except (EOFError, asyncio.LimitOverrunError):
        raise Unavailable("guestd closed the connection") from None


async def _run(function: Callable[[str], Any], generation: str) -> None:
    try:
        outcome = function(generation)
        if inspect.isawaitable(outcome):
            await outcome
    except Exception:
        log.exception("on_restore: %r failed", function)
