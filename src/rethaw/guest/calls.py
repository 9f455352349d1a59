"""The Context socket: calls from any process in the sandbox, answered by the node.

On the wire, both ways: one line of JSON with `len`, then that many bytes of JSON.
    {"op": "send", "ref": 1, "len": 20}\\n{"payload":"hello"}      request
    {"ref": 1, "len": 11}\\n{"ok":null}                            answer: {"ok": ...} or {"error": {code, message}}
    {"event": "restore", "len": 19}\\n{"generation":".."}          after a restore, on connections that subscribed,
                                                                with the generation they know as subscribe's body
Many calls may be open on one connection, told apart by `ref`. Closing the connection cancels them.

The inbox cursor and every id are counted here, in guest memory, so they roll back with it.
"""

# Paths are plain strings here: importing pathlib would double the start-up time of PID 1.
# ruff: noqa: PTH101, PTH108

from __future__ import annotations

import os
import time

from rethaw.channel import lean
from rethaw.channel.frames import dumps
from rethaw.channel.lean import cast, socket
from rethaw.guest import loop as loops
from rethaw.guest.wire import Stream, Wire, note

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Set

HEADER_LIMIT = 4096
BODY_LIMIT = 16 << 20
OPS = frozenset(
    (
        "receive",
        "send",
        "emit",
        "signal_url",
        "wait",
        "sleep",
        "snapshot",
        "history",
        "result",
        "consumed",
        "wait_any",
        "spawn",
        "child_send",
        "child_cancel",
        "fork",
        "deadline",
        "carry",
    )
)  # what goes to the node
READ_SIZE = 65536


class Call(Stream):
    """One call to the node. `answered` gets the answer's JSON text."""

    kind = "call"

    def __init__(self, op: str, call: str, body: bytes, answered: Callable[[bytes], None]) -> None:
        super().__init__()
        self.meta: Dict[str, Any] = {"op": op, "id": call}
        self._answered = answered
        self._answer = bytearray()
        self.out.write(body)
        self.out.finish()

    def describe(self) -> Dict[str, Any]:
        return {"kind": self.kind, "meta": self.meta}

    def resync(self) -> None:
        super().resync()
        self._answer.clear()  # half an answer is no answer: the node gives it anew
        self.inp = type(self.inp)(self.id)

    def on_data(self, data: bytes) -> None:
        self._answer += data
        self.took(len(data))

    def on_end(self) -> None:
        self.wire.forget(self)
        self._answered(bytes(self._answer))

    def on_reset(self, why: str) -> None:
        self._answered(error("channel_broken", f"the node dropped the call: {why}"))


class Kept(Call):
    """A call that guestd itself makes and that has to arrive: one that the node drops is made again at the next thaw."""

    def __init__(self, op: str, call: str, body: bytes, dropped: List[Kept]) -> None:
        super().__init__(op, call, body, lambda answer: None)
        self._dropped = dropped

    def on_reset(self, why: str) -> None:
        note(f"the node dropped {self.meta}: {why}")
        self.out.rewind()
        self._dropped.append(self)


def error(code: str, message: str, remedy: Optional[str] = None) -> bytes:
    return dumps({"error": {"code": code, "message": message, "remedy": remedy, "details": {}}})


def _header(line: bytes) -> Optional[Dict[str, Any]]:
    """The header of one request; None when it is malformed."""
    try:
        header = lean.loads(line)
        if isinstance(header["op"], str) and isinstance(header["ref"], int) and isinstance(header["len"], int):
            return cast("Dict[str, Any]", header) if header["len"] >= 0 else None
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    return None


def _parts(args: Dict[str, Any]) -> List[Dict[str, Any]]:
    parts = args.get("parts")
    if not isinstance(parts, list):
        return []
    return [cast("Dict[str, Any]", p) for p in cast("List[Any]", parts) if isinstance(p, dict)]


def _later(args: Dict[str, Any], passed: float) -> Dict[str, Any]:
    """Arguments of a wait that goes on after `passed` seconds."""

    def left(whole: Optional[float]) -> Optional[float]:
        return None if whole is None else max(0.0, whole - passed)

    rest = dict(args, timeout_s=left(args.get("timeout_s")))
    if "parts" in args:
        rest["parts"] = [dict(p, seconds=left(p["seconds"])) if "seconds" in p else p for p in _parts(args)]
    return rest


class Client:
    """One connection to the socket."""

    def __init__(self, calls: Calls, sock: socket.socket) -> None:
        self._calls = calls
        self._socket = sock
        self._fd = sock.fileno()
        self._in = bytearray()
        self._out = bytearray()
        self._header: Optional[Dict[str, Any]] = None
        self.open = True
        self.subscribed = False
        self.pending: Set[Call] = set()
        self._watch()

    def _watch(self) -> None:
        if self.open:
            self._calls.loop.watch(self._fd, loops.READ | (loops.WRITE if self._out else 0), self._event)

    def _event(self, events: int) -> None:
        if events & loops.WRITE:
            self._flush()
        if self.open and events & (loops.READ | loops.GONE):
            try:
                data = self._socket.recv(READ_SIZE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.close()
                return
            self._in += data
            while self.open and self._take():
                pass
        self._watch()

    def _take(self) -> bool:
        header = self._header
        if header is None:
            end = self._in.find(b"\n", 0, HEADER_LIMIT)
            if end < 0:
                if len(self._in) >= HEADER_LIMIT:
                    self._bad(f"a header line is over {HEADER_LIMIT} bytes")
                return False
            line = bytes(self._in[:end])
            del self._in[: end + 1]
            header = _header(line)
            if header is None:
                self._bad(f"malformed header line {line[:80]!r}")
                return False
            if header["len"] > BODY_LIMIT:
                self._bad(f"a body of {header['len']} bytes is over {BODY_LIMIT}")
                return False
            self._header = header
        length: int = header["len"]
        if len(self._in) < length:
            return False
        body = bytes(self._in[:length])
        del self._in[:length]
        self._header = None
        self._calls.request(self, header["op"], header["ref"], body)
        return True

    def _bad(self, why: str) -> None:
        self.answer(0, error("invalid_input", why))
        self.close()

    def answer(self, ref: int, body: bytes) -> None:
        self._send(dumps({"ref": ref, "len": len(body)}) + b"\n" + body)

    def push(self, event: str, body: bytes) -> None:
        self._send(dumps({"event": event, "len": len(body)}) + b"\n" + body)

    def _send(self, data: bytes) -> None:
        if self.open:
            self._out += data
            self._flush()
            self._watch()

    def _flush(self) -> None:
        while self.open and self._out:
            try:
                done = self._socket.send(self._out)
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            del self._out[:done]

    def close(self) -> None:
        if self.open:
            self.open = False
            self._calls.loop.mute(self._fd)
            self._socket.close()
            self._calls.closed(self)


class Calls:
    """The socket's server, and what guestd knows of the session."""

    def __init__(self, loop: loops.Loop, wire: Wire, path: str) -> None:
        self.loop = loop
        self.wire = wire
        self.attempt = 0
        self.cursor = 0
        self.info: Dict[str, Any] = {}
        self._counter = 0
        self._waits: Dict[str, str] = {}  # signal name -> id of the wait whose address was given out
        self._clients: Set[Client] = set()
        self._dropped: List[Kept] = []
        if os.path.lexists(path):
            os.unlink(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(path)
        os.chmod(path, 0o666)  # whichever user the agent runs as: the sandbox is one trust domain
        self._socket.listen(256)
        self._socket.setblocking(False)
        loop.watch(self._socket.fileno(), loops.READ, self._accept)

    def new_id(self) -> str:
        """ "<attempt>.<counter>"."""
        self._counter += 1
        return f"{self.attempt}.{self._counter}"

    def _accept(self, events: int) -> None:
        try:
            sock = lean.accept(self._socket)
        except OSError:
            return
        self._clients.add(Client(self, sock))

    def closed(self, client: Client) -> None:
        self._clients.discard(client)
        for call in list(client.pending):
            self.wire.reset(call, "the agent gave up the call")
        client.pending.clear()

    # ---- guestd's own calls

    def tell(self, op: str, body: Dict[str, Any]) -> None:
        """A call that has to arrive."""
        self.wire.open(Kept(op, self.new_id(), dumps(body), self._dropped))

    def before_hello(self) -> None:
        """A thaw: calls that the node dropped are open again."""
        dropped, self._dropped[:] = list(self._dropped), []
        for call in dropped:
            self.wire.adopt(call)

    def restored(self, generation: str) -> None:
        body = dumps({"generation": generation})
        for client in list(self._clients):
            if client.subscribed:
                client.push("restore", body)

    # ---- calls of the agent

    def request(self, client: Client, op: str, ref: int, body: bytes) -> None:
        if op == "info":
            client.answer(ref, dumps({"ok": self.info}))
        elif op == "subscribe":
            client.subscribed = True
            client.answer(ref, dumps({"ok": {}}))
            now = dumps({"generation": self.info.get("generation")})
            if body not in (now, b""):  # restored between the agent's look at its generation and this call
                client.push("restore", now)
        elif op in ("receive", "wait", "wait_any", "signal_url", "sleep"):
            self._wait(client, op, ref, body)
        elif op == "consumed" or op not in OPS:
            client.answer(ref, error("invalid_input", f"no operation is called {op[:80]!r}"))
        else:
            self._call(client, op, self.new_id(), body, lambda answer: client.answer(ref, answer))

    def _call(self, client: Client, op: str, call: str, body: bytes, answered: Callable[[bytes], None]) -> None:
        def finished(answer: bytes) -> None:
            client.pending.discard(stream)
            if client.open:
                answered(answer)

        stream = Call(op, call, body, finished)
        client.pending.add(stream)
        self.wire.open(stream)

    def _wait(self, client: Client, op: str, ref: int, body: bytes) -> None:
        try:
            args = lean.loads(body or b"{}")
            if not isinstance(args, dict):
                raise ValueError("a JSON object is expected")
        except (ValueError, RecursionError) as problem:
            client.answer(ref, error("invalid_input", f"malformed arguments of {op}: {problem}"))
            return
        self._send_wait(client, op, ref, cast("Dict[str, Any]", args), time.monotonic())

    def _send_wait(self, client: Client, op: str, ref: int, args: Dict[str, Any], began: float) -> None:
        call = self.new_id()
        name = args.get("name")
        wait = args.get("wait") or (self._waits.get(name) if isinstance(name, str) else None) or call
        sent = dict(args, wait=wait)
        if op == "signal_url" and isinstance(name, str):
            self._waits[name] = wait
        if op == "receive":
            sent["after"] = self.cursor
        elif op == "wait_any":
            sent["parts"] = [self._part(part) for part in _parts(args)]

        def answered(answer: bytes) -> None:
            if op == "wait" and isinstance(name, str):
                self._waits.pop(name, None)
            elif op == "wait_any":
                self._took(_parts(args), answer)
            if op in ("receive", "wait_any") and not self._handed_out(answer):
                # another receive took this message meanwhile: ask on, with what is left of the time
                self._send_wait(client, op, ref, _later(args, time.monotonic() - began), time.monotonic())
                return
            client.answer(ref, answer)

        self._call(client, op, call, dumps(sent), answered)

    def _part(self, part: Dict[str, Any]) -> Dict[str, Any]:
        """One of several things to wait for, with what guestd knows of it."""
        if part.get("kind") == "inbox":
            return dict(part, after=self.cursor)
        address = self._waits.get(str(part.get("name"))) if part.get("kind") == "signal" else None
        return dict(part, wait=address) if address is not None else part

    def _took(self, parts: List[Dict[str, Any]], answer: bytes) -> None:
        """The address of a signal that came has had its use."""
        try:
            index: object = lean.loads(answer)["ok"]["part"]
            part = parts[index] if isinstance(index, int) else {}
        except (ValueError, LookupError, TypeError, RecursionError):
            return
        if part.get("kind") == "signal":
            self._waits.pop(str(part.get("name")), None)

    def _handed_out(self, answer: bytes) -> bool:
        """Move the cursor to the message in `answer`, if it holds one. False when that message is taken already."""
        try:
            number: object = lean.loads(answer)["ok"]["number"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return True
        if not isinstance(number, int):
            return True
        if number <= self.cursor:
            return False
        self.cursor = number
        self.tell("consumed", {"number": number})
        return True
