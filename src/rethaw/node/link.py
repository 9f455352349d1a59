"""The node's end of the channel to one sandbox.

    new -> start() or resume() -> running -> quiesce() -> quiet -> go() -> running -> ...

Every thaw is a resync: handlers are cancelled at quiesce, and after `go` guestd's hello names its open streams, each of
which is handed over anew with what the guest holds of it. Nothing about streams is remembered here in between.

Control messages to the guest: start{...}, signal{sig}, resize{rows, cols}, kill, ping{n}, dial{id, kind, ...}, quiesce{marker},
go{generation, wall_ns, session?}, crash.
From it: hello{generation, streams, pid, exited}, quiet{marker, exchanges, cursor, pid, exited}, pong{n},
left{exchange, taken}, resized{size}.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from rethaw.channel import frames
from rethaw.channel.frames import ControlReader, Decoder, Frame
from rethaw.channel.mux import Mux
from rethaw.model.errors import ChannelBroken, Conflict, QuiesceTimeout, RethawError, Unavailable
from rethaw.model.ports import GuestStream
from rethaw.node.link_said import (
    MAX_STREAMS,
    Hello,
    QuietState,
    Resized,
    left_of,
    left_one,
    quiet_state,
    resized,
    streams_of,
)
from rethaw.node.link_stream import RELAYS, Stream

log = logging.getLogger("rethaw.node")

MARKER_SIZE = 32
READ_SIZE = 1 << 16
BACKLOG = 1 << 17  # bytes given to the transport and not taken by the pipe, before more is taken from the queue
GO_TIMEOUT_S = 10.0


class Link:
    """One sandbox's channel. `on_stream` runs as one task per stream; it is cancelled when the agent hangs up
    (`stream.hung_up`) and at each quiesce, and may finish what it must in its cleanup: what it then says on its stream
    still reaches the guest. `on_hello` is called before the streams of a hello are handed over. `on_left` gets an
    exchange whose client went away before it had read everything, and how many bytes it had: for one that ended on this
    side meanwhile, `stream.hung_up` cannot say so.
    `on_malformed` gets one line when the guest sent what guestd would not send. `closed` resolves with the reason, once.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_stream: Callable[[GuestStream], Awaitable[None]],
        on_malformed: Callable[[str], None] | None = None,
        on_hello: Callable[[Hello], None] | None = None,
        on_left: Callable[[str, int], None] | None = None,
        on_resized: Callable[[Resized], None] | None = None,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._on_stream = on_stream
        self._on_malformed = on_malformed
        self._on_hello = on_hello
        self._on_left = on_left
        self._on_resized = on_resized
        self._decoder = Decoder()
        self._controls = ControlReader()
        self._mux = Mux()
        self._state = "new"
        self._live = False  # frames of streams count; not between quiesce and hello
        self._streams: dict[int, Stream] = {}
        self._highest = 0
        self._expected: set[int] = set()
        self._left: dict[str, int] = {}
        self._announced: dict[str, Any] | None = None
        self._tasks: dict[asyncio.Task[None], Stream] = {}
        self._marker = b""
        self._generation = ""
        loop = asyncio.get_running_loop()
        self._quiet: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._hello: asyncio.Future[Hello] = loop.create_future()
        self._running = asyncio.Event()
        self._pongs: dict[int, asyncio.Future[None]] = {}
        self._pings = 0
        self._recovery: asyncio.Task[None] | None = None
        self._more = asyncio.Event()
        self.closed: asyncio.Future[ChannelBroken] = loop.create_future()
        self._pump_task = asyncio.create_task(self._pump())
        self._read_task = asyncio.create_task(self._read())

    # ------------------------------------------------------------ life

    async def start(self, config: dict[str, Any], timeout_s: float = GO_TIMEOUT_S) -> Hello:
        """Let a fresh guestd start the agent. `config`: {command, env, workdir, session, attempt, generation,
        boot{args, cursor, fresh}, providers?}. Returns when its process exists (or is known not to: an `exit` call
        follows). Raises ChannelBroken, Unavailable."""
        self._expect("new")
        self._generation = str(config.get("generation", ""))
        return await self._begin(frames.encode_control({**config, "type": "start"}), timeout_s)

    async def resume(
        self, marker: str, generation: str, timeout_s: float = GO_TIMEOUT_S, *, session: str | None = None
    ) -> Hello:
        """Let the guestd of a restored sandbox go on; `marker` is that of its snapshot. `session`: whose it is now, in case
        the snapshot is another one's."""
        self._expect("new")
        self._marker = bytes.fromhex(marker)
        return await self._begin(self._go_bytes(generation, session), timeout_s)

    async def quiesce(self, timeout_s: float = 2.0) -> QuietState:
        """Cancel all handlers and make the guest quiet: all that was said on its streams before is in its memory, and
        from now until `go` neither side writes.

        Raises QuiesceTimeout after `timeout_s`; the guest is then let run on under the same generation, streams are
        handed over again when it answers. Raises ChannelBroken when it is gone."""
        if asyncio.current_task() in self._tasks:
            raise Conflict("quiesce was called by the handler of a stream, which it cancels", remedy="use another task")
        began = time.monotonic()
        if self._recovery is not None and not self._recovery.done():
            await asyncio.wait({self._recovery}, timeout=timeout_s)
            if not self._running.is_set():
                raise QuiesceTimeout("the guest has not come back from the last freeze", remedy="try again later")
        self._expect("running")
        self._state = "quiescing"
        self._running.clear()
        sent = False
        try:
            async with asyncio.timeout(timeout_s):
                await self._cancel_handlers()
                self._drop_relays()
                await self._flushed()
                self._still_open()
                self._forget_streams("the guest is being frozen")
                self._send_quiesce()
                sent = True
                message = await asyncio.shield(self._quiet)
        except BaseException as error:
            if self.closed.done():
                if isinstance(error, asyncio.CancelledError):
                    raise
                raise self.closed.result() from None
            self._recovery = asyncio.create_task(self._recover(sent))
            if isinstance(error, TimeoutError):
                what = "did not answer" if sent else "could not be reached"
                raise QuiesceTimeout(
                    f"the guest {what} within {timeout_s:g} s and was left running", remedy="try again later"
                ) from None
            raise
        self._state = "quiet"
        return quiet_state(message, self._marker, time.monotonic() - began)

    async def go(self, generation: str, timeout_s: float = GO_TIMEOUT_S) -> Hello:
        """Let the quiet guest of this very sandbox run on. Raises ChannelBroken, Unavailable."""
        self._expect("quiet")
        return await self._begin(self._go_bytes(generation), timeout_s)

    async def ping(self, timeout_s: float = 5.0) -> float:
        """Seconds that guestd took to answer. While the guest is quiet, waits until it is not, untimed.
        Raises Unavailable after `timeout_s`, ChannelBroken."""
        await self._until_running()
        self._pings += 1
        number = self._pings
        answer = self._pongs[number] = asyncio.get_running_loop().create_future()
        began = time.monotonic()
        try:
            self._control({"type": "ping", "n": number})
            async with asyncio.timeout(timeout_s):
                await answer
        except TimeoutError:
            if not self._running.is_set():
                return await self.ping(timeout_s)  # frozen in between: the answer was not sent for that reason
            raise Unavailable(f"guestd did not answer a ping within {timeout_s:g} s") from None
        finally:
            self._pongs.pop(number, None)
        return time.monotonic() - began

    async def signal(self, sig: int) -> None:
        """Send a signal to the agent's process group; waits while the guest is quiet."""
        await self._until_running()
        self._control({"type": "signal", "sig": int(sig)})

    async def resize(self, rows: int, cols: int) -> None:
        """The size of the program's terminal; waits while the guest is quiet."""
        await self._until_running()
        self._control({"type": "resize", "rows": rows, "cols": cols})

    async def kill_agent(self) -> None:
        """SIGKILL to every process in the sandbox but guestd; an `exit` call follows."""
        await self._until_running()
        self._control({"type": "kill"})

    async def dial(self, message: dict[str, Any]) -> None:
        """Ask for what `rethaw.guest.dial` gives, by a stream; waits while the guest is quiet."""
        await self._until_running()
        self._control({**message, "type": "dial"})

    async def crash(self) -> None:
        """Tests: guestd dies at once, and the sandbox with it."""
        await self._until_running()
        self._control({"type": "crash"})

    async def close(self) -> None:
        """End the channel and wait for the handlers. guestd ends when its input does."""
        self._break("closed by the node")
        current = asyncio.current_task()
        tasks = [t for t in (*self._tasks, self._recovery, self._pump_task, self._read_task) if t and t is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------ thaw

    def _go_bytes(self, generation: str, session: str | None = None) -> bytes:
        self._generation = generation
        go: dict[str, Any] = {"type": "go", "generation": generation, "wall_ns": time.time_ns()}
        if session is not None:
            go["session"] = session
        return self._marker + frames.encode_control(go)

    async def _begin(self, first: bytes, timeout_s: float) -> Hello:
        self._still_open()
        self._hello = asyncio.get_running_loop().create_future()
        self._state = "thawing"
        self._mux.send(first)
        self._flush()
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wait({self._hello, self.closed}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise Unavailable(f"guestd said no hello within {timeout_s:g} s") from None
        self._still_open()
        return self._hello.result()

    async def _recover(self, sent: bool) -> None:
        """A quiesce failed: let the guest run on as if it had been frozen for a moment."""
        try:
            while self._tasks:  # a handler that is slow to end must not meet its successor
                await asyncio.wait(list(self._tasks))
            self._forget_streams("a freeze was given up")
            if not sent:
                self._mux.clear()
                self._send_quiesce()
            await self._begin(self._go_bytes(self._generation), 3600.0)
        except RethawError as error:
            log.warning("guest not thawed after a failed quiesce: %s", error)

    def _send_quiesce(self) -> None:
        self._marker = secrets.token_bytes(MARKER_SIZE)
        self._quiet = asyncio.get_running_loop().create_future()
        self._control({"type": "quiesce", "marker": self._marker.hex()})

    async def _cancel_handlers(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    def _drop_relays(self) -> None:
        """What goes through them is kept on this side until the guest has it: a freeze does not wait for that."""
        for stream in self._streams.values():
            if stream.kind in RELAYS:
                stream.kill("the guest is being frozen")

    def _forget_streams(self, why: str) -> None:
        self._live = False
        self._expected.clear()
        self._announced = None
        for stream in list(self._streams.values()):
            stream.kill(why)
        self._streams.clear()

    # ------------------------------------------------------------ sending

    def _control(self, message: dict[str, Any]) -> None:
        self._mux.send(frames.encode_control(message))
        self._flush()

    def _flush(self) -> None:
        """Give the transport what it may have now; the pump goes on when that is written."""
        transport = self._writer.transport
        while self._mux.pending and not self.closed.done():
            if transport.get_write_buffer_size() > BACKLOG:
                self._more.set()
                return
            self._writer.write(self._mux.take())

    async def _pump(self) -> None:
        try:
            while True:
                await self._more.wait()
                self._more.clear()
                await self._writer.drain()
                self._flush()
        except (OSError, RuntimeError) as error:
            self._break(f"writing to the guest: {error}")

    async def _flushed(self) -> None:
        """Until the pipe has taken all that was said."""
        transport = self._writer.transport
        while self._mux.pending or transport.get_write_buffer_size():
            self._still_open()
            self._flush()
            await asyncio.sleep(0.0005)

    # ------------------------------------------------------------ receiving

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(READ_SIZE):
                self._decoder.feed(data)
                while (frame := self._decoder.next()) is not None:
                    self._dispatch(frame)
            self._break("the guest's end of the channel closed")
        except ChannelBroken as error:
            log.warning("channel: %s", error)
            self._break(error.message)
            if self._on_malformed is not None:
                self._on_malformed(error.message)
        except OSError as error:
            self._break(f"reading from the guest: {error}")

    def _dispatch(self, frame: Frame) -> None:
        if frame.kind in (frames.CONTROL, frames.PART):
            message = self._controls.add(frame)
            if message is not None:
                self._on_control(message)
            return
        if not self._live:
            return  # said before the freeze: the guest says it again
        if frame.kind == frames.OPEN:
            self._on_open(frame)
            return
        stream = self._streams.get(frame.stream)
        if stream is None:
            if frame.stream > self._highest:
                raise ChannelBroken(f"malformed {frames.NAMES[frame.kind]} frame: no stream {frame.stream} is open")
            return  # it ended on this side while the frame was under way
        if frame.kind == frames.RESET:
            self._hang_up(stream, frame)
        else:
            stream.incoming(frame)

    def _on_control(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "pong":
            answer = self._pongs.get(message["n"]) if isinstance(message.get("n"), int) else None
            if answer is not None and not answer.done():
                answer.set_result(None)
        elif kind == "quiet":
            if not self._quiet.done() and message.get("marker") == self._marker.hex():
                self._quiet.set_result(message)
        elif kind == "hello":
            self._on_hello_message(message)
        elif kind == "left":
            exchange, taken = left_one(message)
            if self._on_left is not None:
                self._on_left(exchange, taken)
        elif kind == "resized":
            size = resized(message)
            if self._on_resized is not None and size is not None:
                self._on_resized(size)
        else:
            raise ChannelBroken(f"malformed control message: a guest does not send {kind[:80]!r}")

    def _on_hello_message(self, message: dict[str, Any]) -> None:
        if self._state != "thawing" or message.get("generation") != self._generation:
            raise ChannelBroken(f"malformed hello: {str(message)[:200]}, while {self._state}")
        self._expected, self._left = streams_of(message), left_of(message)
        self._highest = max(self._expected, default=0)
        self._announced = message
        self._live = True
        self._hello_complete()

    def _on_open(self, frame: Frame) -> None:
        if frame.stream in self._streams or (frame.stream <= self._highest and frame.stream not in self._expected):
            raise ChannelBroken(f"malformed open: stream {frame.stream} was open before")
        if len(self._streams) >= MAX_STREAMS:
            raise ChannelBroken(f"malformed open: more than {MAX_STREAMS} streams")
        stream = Stream.opened(frame, self._mux, self._flush)
        self._streams[stream.id] = stream
        self._highest = max(self._highest, stream.id)
        if self._announced is None:
            self._hand_over(stream)
        else:
            self._expected.discard(stream.id)
            self._hello_complete()

    def _hello_complete(self) -> None:
        """Once all streams of the hello are here: hand them over together."""
        message = self._announced
        if message is None or self._expected:
            return
        self._announced = None
        streams = list(self._streams.values())
        hello = Hello(
            generation=self._generation,
            exchanges=tuple(s.exchange for s in streams if s.exchange is not None),
            left=self._left,
            calls=tuple(str(s.meta.get("id")) for s in streams if s.kind == "call"),
            streams=len(streams),
            tunnels=tuple(s.id for s in streams if s.kind == "tunnel"),
            dials=tuple(s.id for s in streams if s.kind == "dial"),
            can_dial=message.get("dials") is True,
            pid=message["pid"] if isinstance(message.get("pid"), int) else 0,
            exited=message.get("exited") is True,
            size=resized(message),
        )
        if self._on_hello is not None:
            self._on_hello(hello)
        self._state = "running"
        self._running.set()
        for stream in streams:
            self._hand_over(stream)
        if not self._hello.done():
            self._hello.set_result(hello)

    # ------------------------------------------------------------ handlers

    def _hand_over(self, stream: Stream) -> None:
        if self._state == "running":  # else: quiescing, the guest opens it again afterwards
            task = asyncio.create_task(self._handle(stream))
            self._tasks[task] = stream
            task.add_done_callback(self._handled)

    async def _handle(self, stream: Stream) -> None:
        try:
            await self._on_stream(stream)
            why = "its handler ended without an answer"
        except ChannelBroken as error:
            if not stream.hung_up and not self.closed.done() and self._live:
                log.warning("%r: %s", stream, error)
            why = error.message
        except Exception as error:
            log.exception("%r: its handler failed", stream)
            why = f"internal error: {type(error).__name__}"
        if not stream.over and stream.kind in ("exchange", "call", *RELAYS):
            await stream.reset(why)

    def _handled(self, task: asyncio.Task[None]) -> None:
        stream = self._tasks.pop(task, None)
        if stream is not None and stream.over and self._streams.get(stream.id) is stream:
            del self._streams[stream.id]

    def _hang_up(self, stream: Stream, said: Frame) -> None:
        del self._streams[stream.id]
        stream.hang_up(said.payload.decode("utf-8", "replace"), said.offset)
        for task, owner in self._tasks.items():
            if owner is stream:  # soon: a handler that has not begun must not miss that its client left
                asyncio.get_running_loop().call_soon(task.cancel)

    # ------------------------------------------------------------ ends

    def _expect(self, state: str) -> None:
        self._still_open()
        if self._state != state:
            raise Conflict(f"the channel is {self._state}, not {state}")

    def _still_open(self) -> None:
        if self.closed.done():
            raise self.closed.result()

    async def _until_running(self) -> None:
        while not self._running.is_set():
            self._still_open()
            waiter = asyncio.ensure_future(self._running.wait())
            try:
                await asyncio.wait({waiter, self.closed}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiter.cancel()
        self._still_open()

    def _break(self, why: str) -> None:
        if self.closed.done():
            return
        error = ChannelBroken(why)
        self.closed.set_result(error)
        self._state = "closed"
        self._forget_streams(why)
        for future in (self._quiet, *self._pongs.values()):
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: nobody may be waiting
        self._writer.close()
        reading: asyncio.BaseTransport | None = getattr(self._reader, "_transport", None)
        if reading is not None:  # a guest that goes on writing gets EPIPE
            reading.close()


async def open_pipes(read_fd: int, write_fd: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Streams over the node's ends of a sandbox's stdout and stdin. They own the descriptors from now on."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=READ_SIZE * 2)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb", 0))
    protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())
    transport, _ = await loop.connect_write_pipe(lambda: protocol, os.fdopen(write_fd, "wb", 0))
    return reader, asyncio.StreamWriter(transport, protocol, None, loop)
