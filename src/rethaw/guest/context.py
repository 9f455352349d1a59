"""Context: how an agent talks to Rethaw, from ordinary blocking code. Standard library only, Python >= 3.9."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Callable,
    Dict,
    Iterator,
    List,
    Literal,
    Optional,
    Tuple,
    TypeVar,
    Union,
    overload,
)

from rethaw.guest import protocol, waiting
from rethaw.guest.children import Child, checked, spawn_body
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


class Connection:
    """One connection to guestd, one call at a time."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            protocol.no_guestd(path)
        self._file: BinaryIO = self._socket.makefile("rb")
        self._ref = 0

    def call(self, op: str, body: bytes) -> bytes:
        self._ref += 1
        self._socket.sendall(protocol.request(op, self._ref, body))
        while True:
            header, answer = self.next()
            if header.get("ref") in (self._ref, 0):
                return answer

    def next(self) -> Tuple[Dict[str, Any], bytes]:
        line = self._file.readline()
        if line:
            header: Dict[str, Any] = json.loads(line)
            body = self._file.read(header["len"])
            if len(body) == header["len"]:
                return header, body
        raise Unavailable("guestd closed the connection")

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Context:
    """A session, seen from inside. May be used from several threads and processes of the sandbox at once."""

    def __init__(self, path: Optional[str] = None) -> None:
        self._path = protocol.socket_path(path)
        # Taken from and given back to without a lock: one that another thread held at a fork would stay held in the child.
        self._free: List[Connection] = []
        self._pid = os.getpid()
        self._info: Optional[Dict[str, Any]] = None

    # ---- who this is

    @property
    def session(self) -> str:
        """The session's id. A fork has its own; RETHAW_SESSION in its environment is the one that it was started as."""
        return protocol.session(self._path, str(self._about()["session"]))

    @property
    def attempt(self) -> int:
        """Which life of the process tree this is, from 1."""
        return int(self._about()["attempt"])

    @property
    def args(self) -> Dict[str, Any]:
        """What the session was started with."""
        if protocol.told is not None:
            return dict(protocol.told)
        return dict(self._about()["args"])

    def ready(self) -> Dict[str, Any]:
        """The program is warm: return what the session was started with. In a template (`rethaw template create`) this is
        where it is frozen, and where each session that is started from it begins. Later calls return the same."""
        if protocol.told is not None:
            return dict(protocol.told)
        if not protocol.in_template():
            return self.args
        if self.fresh or self.attempt > 1:  # the signal may be of a former life
            told = protocol.started(self.history())
            if told is not None:
                return protocol.begun(told)
        return protocol.begun(self.wait(protocol.START).payload)

    @property
    def fresh(self) -> bool:
        """True when an earlier life was abandoned: `history()` has its context, this process has nothing of it."""
        return bool(self._about()["fresh"])

    @property
    def generation(self) -> str:
        """A UUID that changes with each restore."""
        return protocol.generation(self._path)

    @property
    def deadline(self) -> Optional[datetime]:
        """When the session is ended for taking too long (`max_duration`), in UTC; None: never."""
        return protocol.deadline_of(self._call("deadline", b"{}"))

    @property
    def remaining(self) -> Optional[timedelta]:
        """How much time is left until `deadline`; None: it has none."""
        return protocol.left_until(self.deadline)

    # ---- messages and signals

    def receive(self, timeout: Optional[Duration] = None) -> Message:
        """The next inbox message; it is consumed. Raises WaitTimeout."""
        return protocol.message_of(self._call("receive", protocol.wait_body(timeout=timeout)), timeout)

    def messages(self, idle: Optional[Duration] = None) -> Iterator[Message]:
        """Messages as they come, until none has come for `idle`."""
        while True:
            try:
                message = self.receive(timeout=idle)
            except WaitTimeout:
                return
            yield message

    def send(self, payload: Any) -> None:
        """Put a message into the outbox. It is seen outside once a snapshot that contains this moment is durable; at once with
        `durability="relaxed"`."""
        self._call("send", protocol.payload_body(payload))

    def signal(self, name: str) -> Signal:
        """A signal to wait for, with `url`: a POST of JSON to it completes it, once."""
        ok = json.loads(self._call("signal_url", protocol.wait_body(name)))
        return Signal(name, ok.get("url"))

    def wait(self, name: Union[str, Signal], timeout: Optional[Duration] = None) -> Signal:
        """Until the signal comes. Raises WaitTimeout."""
        wanted = name.name if isinstance(name, Signal) else name
        return protocol.signal_of(self._call("wait", protocol.wait_body(wanted, timeout)), wanted, timeout)

    def wait_any(self, *things: Thing, timeout: Optional[Duration] = None) -> Union[Signal, Message, Timer, Child[Any]]:
        """Until the first of `things` comes: signals (`ctx.signal(name)`), `ctx.inbox`, `ctx.timer(duration)`, children.
        Returns it: a Signal with its payload, a Message, the Timer, or the child, which has ended then. The others stay as
        they are. Raises WaitTimeout."""
        return waiting.came(self._call("wait_any", waiting.body(things, timeout)), things, timeout)

    def wait_all(self, *children: Child[Any], timeout: Optional[Duration] = None) -> List[Any]:
        """Until all `children` have ended: what they returned, in order, with a ChildFailed in place of the result of one
        that failed. Raises WaitTimeout."""
        missing = checked(children)
        if missing:
            waiting.all_came(self._call("wait_any", waiting.body(missing, timeout, every=True)), missing, timeout)
        for child in checked(missing):
            self.wait_any(child)
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
    def spawn(self, agent: Spawnable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Child[R]: ...
    @overload
    def spawn(self, agent: str, /, **kwargs: Any) -> Child[Any]: ...
    def spawn(self, agent: Any, /, *args: Any, **kwargs: Any) -> Child[Any]:
        """Start a child: an agent of the same file or package with its arguments, or a deployed one by its name. It begins
        to run once a snapshot that contains this moment is durable, and is cancelled when this session fails."""
        ok = json.loads(self._call("spawn", spawn_body(agent, args, kwargs)))
        return Child(self, str(ok["child"]), agent)

    def child(self, id: str) -> Child[Any]:
        """A child that this session spawned earlier, by its id."""
        return Child(self, id)

    def fork(self) -> Fork:
        """Take a snapshot and make a new session from it. Returns in both; `.forked` is true in the new one."""
        return fork_of(self._call("fork", b"{}"))

    # ---- time, events, snapshots

    def sleep(self, duration: Duration) -> None:
        """Sleep; the session may be suspended meanwhile."""
        self._call("sleep", protocol.sleep_body(duration))

    def emit(self, name: str, /, **data: Any) -> None:
        """Add an event to the session's log."""
        self._call("emit", protocol.emit_body(name, data))

    def snapshot(self) -> str:
        """Take a snapshot now; returns its id once it is durable. What follows happens after it."""
        return str(json.loads(self._call("snapshot", b"{}"))["snapshot"])

    @overload
    def history(self, form: Literal["events"] = "events") -> List[Dict[str, Any]]: ...
    @overload
    def history(self, form: Literal["openai", "responses", "anthropic"]) -> Messages: ...
    def history(self, form: str = "events") -> List[Dict[str, Any]]:
        """What happened so far. As "events", oldest first: {seq, type, data, body, at}. As "openai" (Chat Completions),
        "responses" or "anthropic": the conversation of the newest model call and its answer, ready to be sent to that
        provider; its system prompt is in `.system` as well."""
        if form != "events":
            return self._conversation(form)
        events: List[Dict[str, Any]] = []
        while True:
            after = int(events[-1]["seq"]) if events else 0
            page = json.loads(self._call("history", protocol.history_body(after)))
            events += page["events"]
            if not page.get("more") or not page["events"]:
                return events

    def _conversation(self, form: str) -> Messages:
        messages, exchange = Messages(), None
        while True:
            page = json.loads(self._call("history", protocol.history_body(len(messages), form, exchange)))
            messages += page["messages"]
            messages.system, exchange = page["system"], page["exchange"]
            if not page["more"]:
                return messages

    def on_restore(self, function: Callable[[str], Any]) -> Callable[[str], Any]:
        """Call `function(generation)` after each restore, in a thread of its own. Usable as a decorator."""
        known = self.generation
        connection = Connection(self._path)
        connection.call("subscribe", protocol.to_json({"generation": known}, "the generation"))
        thread = threading.Thread(
            target=self._restores, args=(connection, function), name="rethaw-restore", daemon=True
        )
        thread.start()
        return function

    def _restores(self, connection: Connection, function: Callable[[str], Any]) -> None:
        while True:
            try:
                header, body = connection.next()
            except (OSError, ValueError, Unavailable):
                return
            if header.get("event") == "restore":
                try:
                    function(json.loads(body)["generation"])
                except Exception:
                    log.exception("on_restore: %r failed", function)

    # ---- calls

    def result(self, value: Any) -> None:
        """What the session's caller gets. The runner of @rethaw.agent functions calls this with their return value."""
        self._call("result", protocol.result_body(value))

    def call(self, op: str, body: bytes) -> bytes:
        """The JSON text that the node answers to an operation that is no agent's."""
        return self._call(op, body)

    def _about(self) -> Dict[str, Any]:
        if self._info is None:
            self._info = dict(json.loads(self._call("info", b"{}")))
        return self._info

    def _call(self, op: str, body: bytes) -> bytes:
        connection = self._take()
        try:
            answer = connection.call(op, body)
        except OSError as error:
            connection.close()
            raise Unavailable(f"guestd went away: {error}") from error
        except BaseException:
            connection.close()  # its answer would be taken for the next call's; guestd cancels the call
            raise
        if self._pid == os.getpid():
            self._free.append(connection)
        return protocol.answer_of(answer)

    def _take(self) -> Connection:
        if self._pid != os.getpid():  # after a fork: those connections are the parent's
            self._free = []
            self._pid = os.getpid()
        try:
            return self._free.pop()
        except IndexError:
            return Connection(self._path)
