"""What the node asks for in here: connections to ports of the sandbox, and programs beside the agent.

A control message `dial {id, kind, ...}` is answered by a stream of kind "dial" with that id in its meta, once it is known
how it went; with `error` there it ends at once. The stream stays until the node resets it, so a freeze loses nothing: one
that the node has not heard of is announced again, and a dial of an id that is here is not done twice. A new life has
none of the former one's.
"""

from __future__ import annotations

import errno
import os

from rethaw.channel.lean import socket
from rethaw.guest import loop as loops
from rethaw.guest.relay import Relay
from rethaw.guest.wire import Stream, Wire
from rethaw.model.errors import ChannelBroken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Optional

    from rethaw.guest.execs import Program

DIALS = 256  # open at once
_HOSTS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_WAITS = (errno.EINPROGRESS, errno.EAGAIN, errno.EINTR)


class Dials:
    """All that the node asked for. `programs`: those beside the agent, by process id, connected or not."""

    def __init__(self, loop: loops.Loop, wire: Wire) -> None:
        self.loop = loop
        self.wire = wire
        self.open: Dict[str, Any] = {}  # by id: a stream, or a connection that is being made
        self.programs: Dict[int, Program] = {}
        self.env: Dict[str, str] = {}
        self.workdir = "/"

    def take(self, message: Dict[str, Any]) -> None:
        """Raises ChannelBroken for what no node says."""
        ident, kind = message.get("id"), message.get("kind")
        if not isinstance(ident, str) or not 0 < len(ident) <= 64 or kind not in ("port", "exec"):
            raise ChannelBroken(f"malformed dial: {str(message)[:200]}")
        if ident in self.open:
            return
        if len(self.open) >= DIALS:
            Refused(self, ident, f"{DIALS} connections into the session are open, which is the limit", "unavailable")
        elif kind == "port":
            port = message.get("port")
            if type(port) is not int or not 0 < port < 65536:
                raise ChannelBroken(f"malformed dial: the port is {port!r}")
            Port(self, ident, port)
        else:
            from rethaw.guest import execs

            execs.begin(self, ident, message)

    def reaped(self, pid: int, status: int) -> None:
        """A child that is not the agent ended."""
        program = self.programs.pop(pid, None)
        if program is not None:
            program.ended(status)

    def restored(self) -> None:
        """A new life: whoever dialled is gone."""
        for one in list(self.open.values()):
            one.lost()


class Refused(Stream):
    """It could not be done: the stream says why, until the node has heard it."""

    kind = "dial"

    def __init__(self, dials: Dials, ident: str, why: str, code: str, **more: Any) -> None:
        super().__init__()
        self._dials = dials
        self._meta = {"id": ident, "error": why[:1000], "code": code, **more}
        self.out.finish()
        dials.open[ident] = self
        dials.wire.open(self)

    def describe(self) -> Dict[str, Any]:
        return {"kind": self.kind, "meta": self._meta}

    def on_reset(self, why: str) -> None:
        self._dials.open.pop(self._meta["id"], None)

    def on_ack(self, offset: int) -> None:
        return

    def on_accept(self, exchange: str) -> None:
        return

    def on_end(self) -> None:
        return

    def lost(self) -> None:
        self.wire.forget(self)
        self.on_reset("")


class Port(Relay):
    """A connection to a port of the sandbox: IPv4 first, then IPv6."""

    kind = "dial"
    gone = "the program closed the connection"

    def __init__(self, dials: Dials, ident: str, port: int) -> None:
        super().__init__(dials.loop, {"id": ident})
        self._dials = dials
        self._ident = ident
        self._port = port
        self._left = list(_HOSTS)
        self._connecting: Optional[socket.socket] = None
        self._broken = False  # by the program; what it said before still goes to the node
        dials.open[ident] = self
        self._next(errno.ECONNREFUSED)

    def _next(self, error: int) -> None:
        """Try the next address; `error`: how the last one went."""
        while self._left:
            family, host = self._left.pop(0)
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as failed:  # no IPv6 here, say
                error = error or failed.errno or 0
                continue
            sock.setblocking(False)
            found = sock.connect_ex((host, self._port))
            if found == 0 or found in _WAITS:
                self._connecting = sock
                if found:
                    self._loop.watch(sock.fileno(), loops.WRITE, self._made)
                else:
                    self._made(0)
                return
            sock.close()
            error = found if family == socket.AF_INET else error
        self._over()
        why = f"port {self._port} in the sandbox: {os.strerror(error)}"
        if error == errno.ECONNREFUSED:
            why = f"nothing listens on port {self._port} in the sandbox"
        Refused(self._dials, self._ident, why, "port_closed")

    def _made(self, events: int) -> None:
        sock, self._connecting = self._connecting, None
        assert sock is not None
        self._loop.mute(sock.fileno())
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            sock.close()
            self._next(error)
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._take(sock)
        self._dials.wire.open(self)
        self._watch()

    def on_data(self, data: bytes) -> None:
        if self._broken:
            self.took(len(data))
        else:
            super().on_data(data)

    def on_ack(self, offset: int) -> None:
        if self._broken and not self.out.buffer:
            self._broken = False
            super()._hang_up()
        else:
            self._watch()

    def _hang_up(self) -> None:
        if self.out.buffer:
            self._broken = True
            self._out.clear()
            self._close_socket()
        else:
            super()._hang_up()

    def lost(self) -> None:
        if self._connecting is not None:
            self._loop.mute(self._connecting.fileno())
            self._connecting.close()
            self._connecting = None
            self._over()
        else:
            super().lost()

    def _over(self) -> None:
        self._dials.open.pop(self._ident, None)


__all__ = ["DIALS", "Dials", "Port", "Refused"]
