"""Connections of one life of a session to the outside, on the node: each is a tunnel through the channel.

A tunnel outlives the freezes of its life. Its stream is handed over anew after each of them, and what the guest had not
received is still here; what it had not heard to be taken it sends again. It ends with the life at the latest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Collection, Coroutine
from typing import Any, Protocol

from rethaw.model.egress import EgressSettings, host_of, rules_of, why_no_address
from rethaw.model.enums import EventType
from rethaw.model.errors import ChannelBroken, Fenced, RethawError
from rethaw.model.ports import GuestStream, LogSink
from rethaw.model.types import Fence, NewEvent
from rethaw.node.egress_reach import Refused, Resolve, Unreachable, reach
from rethaw.node.joint import Joint, pump

log = logging.getLogger("rethaw.node")

MOST = 256  # open at once in one session
IDLE_S = 600.0  # without a byte in either direction
HALF_S = 120.0  # the same once one end has said all it will
REPEATS_S = 60.0  # the same refusal is one event in that time
NEWS_MOST = 60  # and all refusals and failures together are so many
_ACTIVE_S = 0.05
_LAST_WORDS_S = 1.0


class Owner(Protocol):
    """What egress needs of the life it belongs to."""

    def active(self) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None: ...


class Tunnel(Joint):
    """One connection. `ready` once it is open (`writer`), refused (`answer`: status and text) or over (`over`: why)."""

    def __init__(self, meta: dict[str, object]) -> None:
        super().__init__()
        host, port = meta.get("host"), meta.get("port")
        fits = isinstance(host, str) and type(port) is int and 0 < port < 65536
        self.fits = fits
        self.host = _printable(host) if isinstance(host, str) else ""
        self.port = port if type(port) is int and fits else 0
        self.name = _printable(str(meta.get("id")))
        self.ready = asyncio.Event()
        self.answer: tuple[int, str] | None = None
        self.over: str | None = None
        self.noted = False  # egress.opened is in the log
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter | None = None
        self.whole = False  # both directions came to their end

    @property
    def live(self) -> bool:
        return self.over is None and self.answer is None and not self.whole

    def shut(self) -> None:
        """What was written still goes out, for a while."""
        if self.writer is not None:
            transport, self.writer = self.writer.transport, None
            transport.close()
            if transport.get_write_buffer_size():
                asyncio.get_running_loop().call_later(HALF_S, transport.abort)

    def abort(self) -> None:
        if self.writer is not None:
            self.writer.transport.abort()
            self.writer = None


class Egress:
    """All tunnels of one life. Raises InvalidInput for rules that cannot be understood."""

    def __init__(
        self,
        sink: LogSink,
        fence: Fence,
        allow: Collection[str],
        settings: EgressSettings,
        owner: Owner,
        resolve: Resolve | None = None,
    ) -> None:
        self._sink = sink
        self._fence = fence
        self._rules = rules_of(allow)
        self._settings = settings
        self._owner = owner
        self._resolve = resolve
        self._tunnels: dict[int, Tunnel] = {}
        self._active_at = 0.0
        self._news = News()

    @property
    def busy(self) -> bool:
        """Whether a connection is open, whatever moves in it."""
        return any(tunnel.live for tunnel in self._tunnels.values())

    def hello(self, streams: Collection[int]) -> None:
        """A thaw: the guest has these tunnels and no others."""
        for stream in [s for s in self._tunnels if s not in streams]:
            self._drop(stream, "closed by the agent")

    async def handle(self, stream: GuestStream) -> None:
        """Serve one tunnel until the guest has done with it or falls quiet (then this is cancelled)."""
        tunnel = self._tunnels.get(stream.id)
        if tunnel is None:
            if stream.head_received or stream.base or stream.received:
                await stream.reset("it belongs to a former life of the session")
                return
            if len(self._tunnels) > 4 * MOST:
                # As the next hello would; should the guest still have one of them, it is reset again.
                self._tunnels = {s: t for s, t in self._tunnels.items() if t.over is None}
            tunnel = Tunnel(stream.meta)
            crowded = sum(t.live for t in self._tunnels.values()) >= MOST
            self._tunnels[stream.id] = tunnel
            self._owner.spawn(self._open(tunnel, crowded))
        try:
            await tunnel.ready.wait()
            await self._serve(tunnel, stream)
            if not stream.hung_up and tunnel.over is None:
                await asyncio.get_running_loop().create_future()  # the guest says when it has everything
        except (asyncio.CancelledError, ChannelBroken):
            if stream.hung_up:
                self._drop(stream.id, "closed by the agent")
            raise

    async def looked_up(self, asked: str) -> None:
        """A program wanted the address of a name, and was told that there is none: it did not ask the proxy."""
        try:
            host = host_of(asked)
        except ValueError:
            return  # no rule could name it either
        why, rule = why_no_address(self._rules, self._settings, host)
        await self._tell(NewEvent(type=EventType.EGRESS_REFUSED, data={"host": host, "why": why, "rule": rule}))

    async def close(self, why: str = "the sandbox is gone") -> None:
        """The life is over, or its program is."""
        tunnels, self._tunnels = self._tunnels, {}
        events = self._news.rest()
        for tunnel in tunnels.values():
            tunnel.ready.set()
            if tunnel.live and tunnel.noted:
                events.append(_closed(tunnel, why))
            tunnel.over = tunnel.over or why
            if not tunnel.whole:
                tunnel.abort()
        if events:
            with contextlib.suppress(RethawError, TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._sink.append(self._fence, events)

    # ------------------------------------------------------------ opening

    async def _open(self, tunnel: Tunnel, crowded: bool) -> None:
        try:
            if not tunnel.fits:
                raise Refused("a host and a port are expected", "malformed", status=400)
            if crowded:
                raise Refused(
                    f"{MOST} connections are open in this session, which is the limit; close some",
                    f"{MOST} connections are open",
                    status=503,
                )
            reader, writer, address = await reach(self._rules, self._settings, tunnel.host, tunnel.port, self._resolve)
            tunnel.reader, tunnel.writer = reader, writer
            if tunnel.over is not None:
                tunnel.abort()
                return
            data = {"host": tunnel.host, "port": tunnel.port, "address": str(address), "tunnel": tunnel.name}
            await self._append(NewEvent(type=EventType.EGRESS_OPENED, data=data))
            tunnel.noted = True
            self._moved(tunnel)
            if tunnel.over is not None:  # its agent left meanwhile
                await self._append(_closed(tunnel, tunnel.over))
        except Refused as error:
            tunnel.answer = error.status, error.message
            data = {"host": tunnel.host, "port": tunnel.port, "why": error.why, "rule": error.rule}
            await self._tell(NewEvent(type=EventType.EGRESS_REFUSED, data=data))
        except Unreachable as error:
            tunnel.answer = 502, str(error)
            data = {"host": tunnel.host, "port": tunnel.port, "error": str(error)}
            await self._tell(NewEvent(type=EventType.EGRESS_FAILED, data=data))
        except Fenced:
            tunnel.over = "the session lives elsewhere"
            tunnel.abort()
            raise
        except RethawError as error:
            tunnel.abort()
            tunnel.answer = 502, f"the connection could not be noted in the log: {error}"
        except Exception as error:
            log.exception("session %s: egress to %s:%d", self._fence.session, tunnel.host, tunnel.port)
            tunnel.abort()
            tunnel.answer = 502, f"internal error: {type(error).__name__}"
        finally:
            tunnel.ready.set()

    # ------------------------------------------------------------ open

    async def _serve(self, tunnel: Tunnel, stream: GuestStream) -> None:
        if tunnel.answer is not None:
            status, text = tunnel.answer
            if not stream.head_received:
                await stream.head(status, text, ())
            return
        if tunnel.over is None and (misfit := tunnel.misfit(stream)) is not None:
            self._over(tunnel, misfit)
        if tunnel.over is None:
            if not stream.head_received:
                await stream.head(200, "", ())
            try:
                await pump(
                    tunnel,
                    stream,
                    tunnel.reader,
                    lambda: tunnel.writer,
                    lambda: self._moved(tunnel),
                    name=tunnel.name,
                    idle_s=IDLE_S,
                    half_s=HALF_S,
                )
            except OSError as error:
                self._over(tunnel, error.strerror or str(error) or type(error).__name__)
            else:
                self._whole(tunnel)
        if tunnel.over is not None:
            await stream.reset(tunnel.over)

    def _moved(self, tunnel: Tunnel) -> None:
        tunnel.moved = now = time.monotonic()
        if now - self._active_at > _ACTIVE_S:
            self._active_at = now
            self._owner.active()

    # ------------------------------------------------------------ ends

    def _whole(self, tunnel: Tunnel) -> None:
        """Both directions came to their end."""
        if tunnel.live:
            tunnel.whole = True
            tunnel.shut()
            self._owner.spawn(self._note(_closed(tunnel, None)))

    def _over(self, tunnel: Tunnel, why: str) -> None:
        """It broke, or was given up."""
        if tunnel.live:
            tunnel.over = why
            if tunnel.noted:
                self._owner.spawn(self._note(_closed(tunnel, why)))
            tunnel.kept.clear()
            tunnel.abort()

    def _drop(self, stream: int, why: str) -> None:
        """The guest has done with it."""
        tunnel = self._tunnels.pop(stream, None)
        if tunnel is None:
            return
        if tunnel.ended and tunnel.guest_ended:  # it has done with it, and a freeze came before that was said here
            self._whole(tunnel)
        else:
            self._over(tunnel, why)

    # ------------------------------------------------------------ events

    async def _append(self, *events: NewEvent) -> None:
        await self._sink.append(self._fence, events)

    async def _tell(self, event: NewEvent) -> None:
        """Of a refusal or a failure: not the same one over and over."""
        if (told := self._news.of(event)) is not None:
            await self._note(told)

    async def _note(self, event: NewEvent) -> None:
        try:
            await self._append(event)
        except Fenced:
            raise
        except RethawError as error:
            log.warning("session %s: %s %s is not in the log: %s", self._fence.session, event.type, event.data, error)


class News:
    """Which refusals and failures are told: each once a minute with the number of its repetitions, and not more than
    NEWS_MOST a minute in all."""

    def __init__(self) -> None:
        self._since = -REPEATS_S
        self._told: dict[tuple[object, ...], NewEvent] = {}
        self._more: Counter[tuple[object, ...]] = Counter()
        self._others = 0

    def of(self, event: NewEvent) -> NewEvent | None:
        """The event to append, if any."""
        now, key = time.monotonic(), (event.type, event.data["host"], event.data.get("port"))
        if now - self._since >= REPEATS_S:
            repeats = self._more.pop(key, 0)
            others = self._others + self._more.total()
            self._since, self._others = now, 0
            self._told.clear()
            self._more.clear()
            more = {name: n for name, n in (("repeats", repeats), ("others", others)) if n}
            event = event.model_copy(update={"data": {**event.data, **more}})
        elif key in self._told:
            self._more[key] += 1
            return None
        elif len(self._told) >= NEWS_MOST:
            self._others += 1
            return None
        self._told[key] = event
        return event

    def rest(self) -> list[NewEvent]:
        """Repetitions that nothing has told of yet."""
        told = [(self._told[key], n) for key, n in self._more.items()]
        self._more.clear()
        return [event.model_copy(update={"data": {**event.data, "repeats": n}}) for event, n in told]


def _printable(text: str) -> str:
    """What may stand in the log of what a guest says."""
    return "".join(c if "!" <= c <= "~" else "?" for c in text[:300])


def _closed(tunnel: Tunnel, why: str | None) -> NewEvent:
    data: dict[str, object] = {
        "host": tunnel.host,
        "port": tunnel.port,
        "sent": tunnel.taken,
        "received": tunnel.received,
        "seconds": round(time.monotonic() - tunnel.began, 3),
        "tunnel": tunnel.name,
    }
    if why is not None:
        data["why"] = why
    return NewEvent(type=EventType.EGRESS_CLOSED, data=data)
