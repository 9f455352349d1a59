"""Streams into the guest that the node asks for: one life's connections to ports of its sandbox, and programs in it.

The guest opens the stream once it has done what was asked (`rethaw.guest.dial`). From there on it is a relay like a tunnel
to the outside: bytes are kept on each side until the other has them, so a save is not noticed. They end with the life.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any, Protocol

from rethaw.model.errors import ChannelBroken, Conflict, RethawError, Unavailable, by_code
from rethaw.model.ids import new_id
from rethaw.model.ports import GuestStream
from rethaw.node.joint import Joint, pump

MOST = 256  # open at once in one session
QUIET_S = 60.0  # a connection without a byte for so long is no reason to stay awake
LIMIT = 256 << 10  # bytes in one direction that nobody has taken
_ACTIVE_S = 0.05
_OPEN_S = 30.0


class Owner(Protocol):
    """What dials need of the life they belong to."""

    def active(self) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None: ...


class Pipe:
    """Bytes on their way in this process, one direction."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ended = False
        self._broken: str | None = None
        self._changed = asyncio.Event()

    def write(self, data: bytes) -> None:
        if self._broken is None:
            self._data += data
            self._changed.set()

    def write_eof(self) -> None:
        self._ended = True
        self._changed.set()

    def fail(self, why: str) -> None:
        """What is in it still comes out."""
        if self._broken is None and not self._ended:
            self._broken = why
        self._changed.set()

    async def drain(self) -> None:
        """Until there is room, or nobody reads any more."""
        while len(self._data) > LIMIT and self._broken is None:
            await self._change()

    async def read(self, n: int = -1, /) -> bytes:
        """Up to `n` bytes, b"" at the end. Raises ConnectionResetError."""
        while not self._data:
            if self._broken is not None:
                raise ConnectionResetError(self._broken)
            if self._ended:
                return b""
            await self._change()
        size = len(self._data) if n < 0 else n
        data = bytes(self._data[:size])
        del self._data[:size]
        self._changed.set()
        return data

    @property
    def broken(self) -> str | None:
        return self._broken

    async def _change(self) -> None:
        # One reader and one writer, which never wait at once: one waits for data, the other one for room.
        self._changed.clear()
        await self._changed.wait()


class Dial(Joint):
    """One of them: `model.dialing.Connection`. `opened` resolves with the meta of the guest's stream."""

    def __init__(self, message: dict[str, Any]) -> None:
        super().__init__()
        self.message = message
        self.id: str = message["id"]
        self.kind: str = message["kind"]
        self.opened: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
        self.stream: int | None = None
        self.sent = False
        self.inward = Pipe()
        self.outward = Pipe()
        self.left = asyncio.Event()  # nobody is interested any more

    async def read(self) -> bytes | None:
        try:
            return await self.outward.read(LIMIT) or None
        except ConnectionResetError as error:
            raise ChannelBroken(str(error)) from None

    async def write(self, data: bytes) -> None:
        await self.inward.drain()
        self.put(data)

    def put(self, data: bytes) -> None:
        """Like `write`, whether there is room or not."""
        if self.inward.broken is not None:
            raise ChannelBroken(self.inward.broken)
        self.inward.write(data)

    def end(self) -> None:
        self.inward.write_eof()

    def close(self) -> None:
        self.left.set()
        self.fail("closed on this side")

    def fail(self, why: str) -> None:
        """It broke."""
        self.inward.fail(why)
        self.outward.fail(why)
        if not self.opened.done():
            self.opened.set_exception(ChannelBroken(why))
            self.opened.exception()


class Dials:
    """All of one life. `send` says a control message to the guest."""

    def __init__(self, send: Callable[[dict[str, Any]], Awaitable[None]], owner: Owner) -> None:
        self._send = send
        self._owner = owner
        self._dials: dict[str, Dial] = {}
        self._can = False
        self._closed: str | None = None
        self._opening = 0
        self.served = False  # something was connected to a port
        self.moved = 0.0
        self._active_at = 0.0

    # ------------------------------------------------------------ for those who ask

    async def open(self, kind: str, **more: Any) -> Dial:
        """Raises what the guest says, Unavailable (`sent`: whether it may have been done), Conflict."""
        if self._closed is not None:
            raise Unavailable(self._closed, sent=False)
        if not self._can:
            raise Conflict(
                "the session was frozen by an older Rethaw, whose guest cannot be connected to",
                remedy="rethaw upgrade SESSION starts it anew with its files",
            )
        if len(self._dials) >= MOST:
            raise Unavailable(f"{MOST} connections into the session are open, which is the limit")
        dial = Dial({"id": new_id("d"), "kind": kind, **more})
        self._dials[dial.id] = dial
        self._opening += 1
        self._owner.active()
        try:
            await self._say(dial)
            async with asyncio.timeout(_OPEN_S):
                meta = await dial.opened
        except BaseException as error:
            self._dials.pop(dial.id, None)
            dial.close()
            if isinstance(error, TimeoutError):
                raise Unavailable(f"the sandbox did not answer within {_OPEN_S:g} s", sent=dial.sent) from None
            if isinstance(error, ChannelBroken):
                raise Unavailable(error.message, sent=dial.sent) from None
            raise
        finally:
            self._opening -= 1
        if "error" in meta:
            self._dials.pop(dial.id, None)
            details = {"exit_code": meta["exit"]} if isinstance(meta.get("exit"), int) else {}
            raise _printable_error(str(meta.get("code")), str(meta["error"]), details)
        self.served = self.served or kind == "port"
        self._touch(dial)
        return dial

    async def _say(self, dial: Dial) -> None:
        await self._send(dial.message)
        dial.sent = True

    def idle_since(self, since: float) -> float | None:
        """Since when (monotonic, may lie ahead) nothing of this keeps the session awake that waits since `since`."""
        if self._opening or any(d.kind == "exec" for d in self._dials.values()):
            return None
        return max(since, self.moved + QUIET_S) if self._dials else since

    def quiet(self) -> bool:
        """Whether nothing of this keeps the session awake."""
        since = self.idle_since(0.0)
        return since is not None and since <= time.monotonic()

    # ------------------------------------------------------------ what the guest says

    def hello(self, streams: Collection[int], can_dial: bool) -> None:
        """A thaw: the guest has these streams and no others."""
        self._can = can_dial
        for dial in list(self._dials.values()):
            if dial.stream is not None and dial.stream not in streams:
                self._drop(dial, "the program closed the connection")
            elif dial.stream is None and dial.sent:
                self._owner.spawn(self._again(dial))

    async def _again(self, dial: Dial) -> None:
        """The freeze may have swallowed it; a guest that has done it knows its id."""
        with contextlib.suppress(RethawError):
            if dial.stream is None:
                await self._send(dial.message)

    async def handle(self, stream: GuestStream) -> None:
        """Serve one stream until the guest has done with it or falls quiet (then this is cancelled)."""
        dial = self._dials.get(str(stream.meta.get("id")))
        if dial is None or dial.stream not in (None, stream.id):
            await stream.reset("nobody asked for it")
            return
        dial.stream = stream.id
        if not dial.opened.done():
            dial.opened.set_result(dict(stream.meta))
        if "error" in stream.meta:
            await stream.reset("heard")
            return
        try:
            await self._serve(dial, stream)
        except (asyncio.CancelledError, ChannelBroken):
            if stream.hung_up:
                self._drop(dial, "the program closed the connection")
            raise

    async def _serve(self, dial: Dial, stream: GuestStream) -> None:
        why = dial.misfit(stream)
        if why is None:
            why = await self._pump(dial, stream)
        if why is None and dial.kind == "port":
            await asyncio.get_running_loop().create_future()  # the guest says when it has everything
        self._dials.pop(dial.id, None)
        if why is not None:
            dial.fail(why)
        await stream.reset(why or "done")

    async def _pump(self, dial: Dial, stream: GuestStream) -> str | None:
        """Until both directions have ended (None), or why it is over."""
        pumping = asyncio.create_task(
            pump(dial, stream, dial.inward, lambda: dial.outward, lambda: self._touch(dial), name=dial.id)
        )
        leaving = asyncio.create_task(dial.left.wait())
        try:
            await asyncio.wait({pumping, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if pumping.done() and not pumping.cancelled():
                error = pumping.exception()
                if error is not None and not isinstance(error, OSError):
                    raise error
                return None if error is None else str(error)
            return "the client left"
        finally:
            pumping.cancel()
            leaving.cancel()
            await asyncio.gather(pumping, leaving, return_exceptions=True)

    def _touch(self, dial: Dial) -> None:
        self.moved = dial.moved = now = time.monotonic()
        if now - self._active_at > _ACTIVE_S:
            self._active_at = now
            self._owner.active()

    def _drop(self, dial: Dial, why: str) -> None:
        """The guest has done with it."""
        self._dials.pop(dial.id, None)
        if not (dial.ended and dial.guest_ended):
            dial.fail(why)

    def close(self, why: str) -> None:
        """The life is over, or its program is. The first reason counts."""
        self._closed = self._closed or why
        dials, self._dials = self._dials, {}
        for dial in dials.values():
            dial.fail(self._closed)


def _printable_error(code: str, text: str, details: dict[str, Any]) -> RethawError:
    """What a guest says of a failure, as far as it may say that."""
    text = "".join(c if c.isprintable() else "?" for c in text[:1000])
    kind = by_code(code) if code in ("port_closed", "not_found", "invalid_input", "unavailable") else Unavailable
    made = kind(text, **details)
    assert isinstance(made, RethawError)
    return made
