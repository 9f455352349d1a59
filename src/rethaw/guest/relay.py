"""A connection in the sandbox joined to a stream, byte for byte both ways. Each direction ends by itself.

It lives through every freeze of one life: what the node has not taken is kept and said again, and the window of what
comes goes on where it was.
"""

from __future__ import annotations

import struct

from rethaw.channel.lean import socket
from rethaw.channel.mux import WINDOW, Receiver
from rethaw.guest import loop as loops
from rethaw.guest.wire import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Optional

AHEAD = 128 << 10  # bytes read from the connection before the node has taken them
READ_SIZE = 65536


class Relay(Stream):
    """Subclasses say what the stream is, and do more with its bytes if they want."""

    gone = "the agent hung up"  # what the node is told when the connection breaks

    def __init__(self, loop: loops.Loop, meta: Dict[str, Any]) -> None:
        super().__init__()
        self.meta = meta
        self._loop = loop
        self._socket: Optional[socket.socket] = None
        self._fd = -1
        self._out = bytearray()
        self._eof = False  # the connection ended its direction
        self._eof_taken = False  # and the node knows
        self._ended = False  # the other side ended its direction
        self._shut = False  # and so the connection was told
        self._draining = False  # refused: what still comes is discarded until it is closed

    # ---- the channel's side

    def describe(self) -> Dict[str, Any]:
        return {
            "kind": self.kind,
            "meta": self.meta,
            "received": self.inp.offset,
            "held": self.inp.held,
            "base": self.out.base,
        }

    def resync(self) -> None:
        self.out.rewind()
        self.inp = Receiver(self.id, self.inp.offset, self.inp.held)

    def on_data(self, data: bytes) -> None:
        self._send(data)

    def on_end(self) -> None:
        if not self._ended:  # the node says it again after a thaw
            self._ended = True
            self._flush()
            self._watch()

    def on_ack(self, offset: int) -> None:
        self._watch()

    def on_accept(self, exchange: str) -> None:
        self._eof_taken = True
        self._done_if()

    def on_reset(self, why: str) -> None:
        self._close(reset=True)

    def lost(self) -> None:
        """A new life: the connection is reset, so that its other end begins anew."""
        if not self._draining:
            self.wire.forget(self)
            self._close(reset=True)

    # ---- the connection's side

    def _take(self, sock: socket.socket) -> None:
        """Serve `sock`, which is ours from now on."""
        self._socket = sock
        self._fd = sock.fileno()

    def _watch(self) -> None:
        if self._socket is None:
            return
        mask = loops.WRITE if self._out else 0
        if self._reading():
            mask |= loops.READ
        self._loop.watch(self._fd, mask, self._event)

    def _reading(self) -> bool:
        return not self._eof and (self._draining or len(self.out.buffer) <= AHEAD)

    def _event(self, events: int) -> None:
        if events & loops.WRITE:
            self._flush()
        if self._socket is not None and events & (loops.READ | loops.GONE):
            if self._reading():
                self._receive()
            elif self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._hang_up()
            elif events & loops.GONE:  # closed, and what it said is not all taken yet
                self._loop.mute(self._fd)
                return
        self._watch()

    def _receive(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            self._hang_up()
            return
        if self._draining:
            if not data:
                self._close()
        elif data:
            self._upward(data)
        else:
            self._eof = True
            self.finish()
            self._done_if()

    def _upward(self, data: bytes) -> None:
        self.say(data)

    def _send(self, data: bytes) -> None:
        self._out += data
        self._flush()
        self._watch()

    def _flush(self) -> None:
        while self._socket is not None and self._out:
            try:
                done = self._socket.send(self._out)
            except BlockingIOError:
                break
            except OSError:
                self._hang_up()
                return
            del self._out[:done]
        if self._draining:
            self._shut_down()
            return
        if len(self._out) <= WINDOW // 2:
            size = self.inp.held - len(self._out)
            if size > 0:
                self.took(size)
        self._done_if()

    def _shut_down(self) -> None:
        """Nothing more comes for the connection: say so once it has everything."""
        if self._socket is not None and not self._out and not self._shut:
            self._shut = True
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError:
                self._hang_up()

    def _done_if(self) -> None:
        if self._ended:
            self._shut_down()
        if self._shut and self._eof:
            self._close_socket()
            if self._eof_taken:
                self.wire.reset(self, "done")
                self._close()

    def _hang_up(self) -> None:
        """The connection broke."""
        if not self._draining:
            self.wire.reset(self, self.gone)
        self._close(reset=True)

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._loop.mute(self._fd)
            self._socket.close()
            self._socket = None

    def _close(self, reset: bool = False) -> None:
        self._over()
        try:
            if self._socket is not None and reset:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            self._close_socket()

    def _over(self) -> None:
        """Nothing is left of it."""
