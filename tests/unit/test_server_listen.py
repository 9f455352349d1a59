"""The server's own socket."""

from __future__ import annotations

import socket

import pytest

from rethaw.model.errors import Conflict
from rethaw.server.up import _listen  # pyright: ignore[reportPrivateUsage]


def test_answers_on_a_connection_that_is_used_again_took_40_ms() -> None:
    """Head and body go out as two segments, and the second waited for the acknowledgement of the first."""
    with _listen("127.0.0.1", 0) as listening:
        listening.setblocking(True)
        with socket.create_connection(listening.getsockname()[:2], timeout=10):
            accepted, _ = listening.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_address_that_is_taken_is_named() -> None:
    with _listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(Conflict, match=f"127.0.0.1:{port}.*--listen"):
            _listen("127.0.0.1", port)
