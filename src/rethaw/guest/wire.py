"""The guest's end of the channel, and what happens at a thaw.

Guest memory is the truth about every stream: a request is kept until the node accepted it, a call until it is
answered, output until it is acknowledged. So a thaw needs no memory on the node: everything is said again.

Quiescing is sequential code on purpose. Between `quiet` and `go` nothing but stdin is looked at and nothing is
written, whatever happens.
"""

from __future__ import annotations

import os

from rethaw.channel import frames
from rethaw.channel.frames import Decoder, Frame
from rethaw.channel.mux import Mux, Receiver, Sender
from rethaw.guest import loop as loops
from rethaw.model.errors import ChannelBroken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, NoReturn, Optional

READ_SIZE = 65536
MIN_MARKER = 16
CLOSED = "the node closed it"
LOST = 70  # exit status of guestd when the channel is gone (EX_SOFTWARE)


def note(text: str) -> None:
    """One line for the node's log of this sandbox (stderr of PID 1)."""
    try:
        os.write(2, f"guestd: {text}\n".encode("utf-8", "replace"))
    except OSError:  # nobody reads it
        return


class Stream:
    """One stream that this guest opened. Subclasses say what its frames mean."""

    kind = ""

    def __init__(self) -> None:
        self.id = 0
        self.wire: Wire
        self.out = Sender(0, keep=True)
        self.inp = Receiver(0)

    def opened(self, wire: Wire, stream: int) -> None:
        self.wire = wire
        self.id = self.out.stream = self.inp.stream = stream

    def describe(self) -> Dict[str, Any]:
        """The OPEN frame: what the stream is and what of it is here already."""
        return {"kind": self.kind, "meta": {}, "base": self.out.base}

    def resync(self) -> None:
        """A new life of the channel: send again what is kept."""
        self.out.rewind()
        self.inp = Receiver(self.id, self.inp.offset)

    def on_head(self, head: Dict[str, Any]) -> None:
        raise ChannelBroken(f"stream {self.id}: a {self.kind} stream has no head")

    def on_data(self, data: bytes) -> None:
        raise ChannelBroken(f"stream {self.id}: a {self.kind} stream takes no data")

    def on_end(self) -> None:
        raise ChannelBroken(f"stream {self.id}: a {self.kind} stream takes no end")

    def on_accept(self, exchange: str) -> None:
        raise ChannelBroken(f"stream {self.id}: a {self.kind} stream is not accepted")

    def on_ack(self, offset: int) -> None:
        raise ChannelBroken(f"stream {self.id}: a {self.kind} stream is not acknowledged")

    def on_reset(self, why: str) -> None:
        raise NotImplementedError

    # what subclasses do

    def say(self, data: bytes) -> None:
        self.out.write(data)
        self.wire.wake(self.out)

    def finish(self) -> None:
        self.out.finish()
        self.wire.wake(self.out)

    def took(self, size: int) -> None:
        """`size` received bytes went on to their reader."""
        credit = self.inp.consume(size)
        if credit is not None:
            self.wire.send(credit)


class Wire:
    """Streams over two file descriptors."""

    def __init__(self, loop: loops.Loop, read_fd: int, write_fd: int) -> None:
        self._loop = loop
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._decoder = Decoder()
        self._controls = frames.ControlReader()
        self._mux = Mux()
        self._writing = b""
        self._next = 1
        self.reads = 0  # so many times was the channel read
        self.streams: Dict[int, Stream] = {}
        self.on_control: Callable[[Dict[str, Any]], None] = lambda message: None
        self.on_quiet: Callable[[], Dict[str, Any]] = dict
        self.on_go: Callable[[Dict[str, Any]], Dict[str, Any]] = lambda message: {}
        self.on_progress: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        loop.watch(read_fd, loops.READ, self._readable)

    # ---- sending

    def open(self, stream: Stream) -> None:
        stream.opened(self, self._next)
        self._next += 1
        self.streams[stream.id] = stream
        self._announce(stream)
        self.flush()

    def adopt(self, stream: Stream) -> None:
        """A stream that the node dropped is open again; the next hello says so."""
        self.streams[stream.id] = stream

    def forget(self, stream: Stream) -> None:
        """The stream is over."""
        self._mux.drop(stream.out)
        self.streams.pop(stream.id, None)

    def reset(self, stream: Stream, why: str, taken: int = 0) -> None:
        """The stream is over on this side: tell the node. `taken`: bytes of the answer that reached the agent."""
        if self.streams.get(stream.id) is stream:
            self.forget(stream)
            self.send(frames.encode(frames.RESET, stream.id, taken, why.encode("utf-8", "replace")[:1024]))

    def control(self, message: Dict[str, Any]) -> None:
        self.send(frames.encode_control(message))

    def send(self, frame: bytes) -> None:
        self._mux.send(frame)
        self.flush()

    def wake(self, sender: Sender) -> None:
        self._mux.wake(sender)
        self.flush()

    def _announce(self, stream: Stream) -> None:
        self._mux.send(frames.encode_json(frames.OPEN, stream.id, stream.describe()))
        self._mux.wake(stream.out)

    def flush(self) -> None:
        """Write as much as the pipe takes."""
        while self._writing or self._mux.pending:
            if not self._writing:
                self._writing = self._mux.take()
            try:
                done = os.write(self._write_fd, self._writing)
            except BlockingIOError:
                self._loop.watch(self._write_fd, loops.WRITE, self._writable)
                return
            except OSError as error:
                self._lost(CLOSED if isinstance(error, BrokenPipeError) else f"writing: {error}")
            self._writing = self._writing[done:]
        self._loop.mute(self._write_fd)

    def _writable(self, events: int) -> None:
        self.flush()
        self.on_progress()

    # ---- receiving

    def _readable(self, events: int) -> None:
        data = self._read()
        if data is None:
            return
        self._decoder.feed(data)
        self.reads += 1
        try:
            self._dispatch()
        except ChannelBroken as error:
            self._lost(error.message)
        except (ValueError, TypeError) as error:
            self._lost(f"malformed message: {error!r}")

    def _read(self) -> Optional[bytes]:
        try:
            data = os.read(self._read_fd, READ_SIZE)
        except BlockingIOError:
            return None
        except OSError as error:
            self._lost(f"reading: {error}")
        if not data:
            self._lost(CLOSED)
        return data

    def _dispatch(self) -> None:
        while True:
            frame = self._decoder.next()
            if frame is None:
                return
            if frame.kind in (frames.CONTROL, frames.PART):
                message = self._controls.add(frame)
                if message is None:
                    continue
                if message["type"] == "quiesce":
                    self._be_quiet(message)
                else:
                    self.on_control(message)
                continue
            stream = self.streams.get(frame.stream)
            if stream is None:
                if frame.stream >= self._next:
                    raise ChannelBroken(f"malformed {frames.NAMES[frame.kind]} frame: no stream {frame.stream} yet")
                continue  # it ended here while the frame was under way
            self._deliver(stream, frame)

    def _deliver(self, stream: Stream, frame: Frame) -> None:
        if frame.kind == frames.DATA:
            stream.inp.data(frame.offset, len(frame.payload))
            stream.on_data(frame.payload)
        elif frame.kind == frames.CREDIT:
            stream.out.credit(frame.offset)
            self.wake(stream.out)
            self.on_progress()
        elif frame.kind == frames.HEAD:
            stream.on_head(frames.loads(frame.payload, "head"))
        elif frame.kind == frames.END:
            stream.inp.end(frame.offset)
            stream.on_end()
        elif frame.kind == frames.ACK:
            stream.out.forget(frame.offset)
            stream.on_ack(frame.offset)
        elif frame.kind == frames.ACCEPT:
            stream.on_accept(frame.payload.decode("utf-8", "replace"))
        elif frame.kind == frames.RESET:
            self.forget(stream)
            stream.on_reset(frame.payload.decode("utf-8", "replace"))
        else:
            raise ChannelBroken(f"malformed frame: the node does not send {frames.NAMES[frame.kind]}")

    # ---- freezing and thawing

    def _be_quiet(self, message: Dict[str, Any]) -> None:
        """From `quiesce` to `go`. Returns when the guest may run again."""
        marker = _marker(message)
        self._mux.clear()  # whole frames that were not begun: all of it is said again after `go`
        self._write_out(frames.encode_control({"type": "quiet", "marker": marker.hex(), **self.on_quiet()}))
        # --- the engine captures here: this process sleeps in poll() on stdin, and a restored copy of it wakes there
        go = self._wait_for_go(marker)
        about = self.on_go(go)
        self._mux.clear()
        self.hello(go.get("generation"), about)

    def hello(self, generation: Any, about: Dict[str, Any]) -> None:
        """Say which streams are open, then open each of them again."""
        known: List[Stream] = list(self.streams.values())
        self._mux.send(
            frames.encode_control(
                {"type": "hello", "generation": generation, "streams": [s.id for s in known], **about}
            )
        )
        for stream in known:
            stream.resync()
            self._announce(stream)
        self.flush()

    def _write_out(self, last: bytes) -> None:
        data = self._writing + last
        self._writing = b""
        while data:
            try:
                data = data[os.write(self._write_fd, data) :]
            except BlockingIOError:
                loops.wait(self._write_fd, loops.WRITE)
            except OSError as error:
                self._lost(CLOSED if isinstance(error, BrokenPipeError) else f"writing: {error}")
        self._loop.mute(self._write_fd)

    def _wait_for_go(self, marker: bytes) -> Dict[str, Any]:
        """Skip everything up to `marker`, then read `go`. Whatever an older life left in the pipe is skipped with it."""
        held = self._decoder.rest()
        while True:
            at = held.find(marker)
            if at >= 0:
                break
            held = held[-(len(marker) - 1) :] + self._read_more()
        self._decoder = Decoder()
        self._controls = frames.ControlReader()
        self._decoder.feed(held[at + len(marker) :])
        while True:  # a malformed frame here ends this life as anywhere: _dispatch is on the stack
            frame = self._decoder.next()
            if frame is None:
                self._decoder.feed(self._read_more())
                continue
            message = self._controls.add(frame) if frame.kind in (frames.CONTROL, frames.PART) else None
            if message is None and frame.kind == frames.PART:
                continue
            if message is None or message["type"] != "go":
                raise ChannelBroken("malformed thaw: the first frame after the marker is not go")
            return message

    def _read_more(self) -> bytes:
        while True:
            loops.wait(self._read_fd, loops.READ)
            data = self._read()
            if data is not None:
                return data

    def _lost(self, why: str) -> NoReturn:
        """The node is gone or talks nonsense. This life of the session is over: another one has its snapshot."""
        note(f"channel lost: {why}")
        self.on_lost()
        os._exit(LOST)


def _marker(message: Dict[str, Any]) -> bytes:
    value = message.get("marker")
    try:
        marker = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        marker = b""
    if len(marker) < MIN_MARKER:
        raise ChannelBroken(f"malformed quiesce: the marker is {value!r}, {MIN_MARKER} bytes as hex are expected")
    return marker
