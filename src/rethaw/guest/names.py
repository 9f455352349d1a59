"""A name server on loopback that knows no name, so that a lookup is answered at once and the node hears of it.

A sandbox has no network, and its /etc/resolv.conf names no server: then a resolver asks 127.0.0.1. What goes
through the proxy asks for no address; who does has left the proxy out, or has been given none.
"""

from __future__ import annotations

import time

from rethaw.channel.lean import socket
from rethaw.guest.loop import READ
from rethaw.guest.wire import note

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, List, Optional, Tuple

    from rethaw.guest.loop import Loop

PORT = 53
_LIMIT = 512  # bytes of a question; more is not needed for a name
_AGAIN_S, _MOST = 60.0, 60  # a name is told once in that time, and so many names
_HEADER = 12
_ADDRESSES = (1, 28)  # A, AAAA
_NO_SUCH_NAME = 3
_OURS = ("localhost", "arpa")  # and what is below them


class Names:
    """`tell(name)` is called for a name whose address a program wants. `port` 0 takes a free one; where the port is
    taken nothing is answered."""

    def __init__(self, loop: Loop, port: int, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told: Dict[str, float] = {}
        self.port: Optional[int] = None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        try:
            self._socket.bind(("127.0.0.1", port))
        except OSError as error:
            note(f"names are not answered: port {port}: {error}")
            self._socket.close()
            return
        self.port = self._socket.getsockname()[1]
        loop.watch(self._socket.fileno(), READ, self._asked)

    def _asked(self, events: int) -> None:
        try:
            packet, client = self._socket.recvfrom(_LIMIT)
        except OSError:
            return
        found = question(packet)
        if found is None:
            return
        name, kind, end = found
        try:
            self._socket.sendto(refusal(packet, end), client)
        except OSError as error:
            note(f"a name was not answered: {error}")  # it is asked for again
        if kind in _ADDRESSES:
            self._heard(name)

    def _heard(self, name: str) -> None:
        now = time.monotonic()
        self._told = {one: at for one, at in self._told.items() if now - at < _AGAIN_S}
        if name.rpartition(".")[2] in _OURS or name == socket.gethostname().lower():
            return
        if name not in self._told and len(self._told) < _MOST:
            self._told[name] = now
            self._tell(name)


def question(packet: bytes) -> Optional[Tuple[str, int, int]]:
    """The name (lower case, without its last dot) and the type that a DNS query (RFC 1035) asks for, and where the question
    ends. None for anything but one plain question."""
    if len(packet) < _HEADER or packet[2] & 0xF8 or packet[4:6] != b"\0\1":
        return None
    labels: List[bytes] = []
    at = _HEADER
    while at < len(packet) and 0 < packet[at] < 64:
        labels.append(packet[at + 1 : at + 1 + packet[at]])
        at += 1 + packet[at]
    if not labels or at + 5 > len(packet) or packet[at]:
        return None
    name = b".".join(labels).decode("ascii", "replace").lower()
    return name, packet[at + 1] << 8 | packet[at + 2], at + 5


def refusal(packet: bytes, end: int) -> bytes:
    """The answer that there is no such name."""
    flags = bytes((0x80 | packet[2] & 0x01, 0x80 | _NO_SUCH_NAME))
    return packet[:2] + flags + b"\0\1\0\0\0\0\0\0" + packet[_HEADER:end]
