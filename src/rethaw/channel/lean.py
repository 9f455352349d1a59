"""Parts of the standard library without what they usually pull in.

`json`, `socket`, `signal`, `collections` and `typing` import `re` and `enum` and cost PID 1 of every sandbox 0.5 MiB of
each first snapshot and two thirds of its start-up time (measured in gVisor: 50 ms of imports become 20). The C modules
under them do the work anyway. Type checkers see the ordinary modules; where the C module of some Python does not fit,
the ordinary one is used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    import socket
    from collections import deque
    from typing import Any, Callable, Tuple, cast
else:
    import _signal as signal
    import _socket as socket
    from _collections import deque

    def cast(kind, value):
        return value


__all__ = ["accept", "cast", "deque", "dumps", "loads", "signal", "socket"]

_SPACE = " \t\r\n"


def accept(listening: socket.socket) -> socket.socket:
    """The next connection, not blocking. Raises OSError."""
    if TYPE_CHECKING:
        return listening.accept()[0]
    fd, _ = listening._accept()
    connection = socket.socket(listening.family, listening.type, listening.proto, fileno=fd)
    connection.setblocking(False)
    return connection


class _Context:
    """What the C scanner asks of a JSONDecoder."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = staticmethod(float)


def _lean() -> Tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    """`dumps` and `loads` over the C parts of `json`, after a try. Raises whatever does not fit."""
    import _json

    scan = _json.make_scanner(cast("Any", _Context()))

    def dumps(value: Any) -> bytes:
        encode = _json.make_encoder(
            {}, _refuse, _json.encode_basestring_ascii, None, ":", ",", False, False, True
        )  # fmt: skip
        return "".join(encode(value, 0)).encode("ascii")

    def loads(text: bytes) -> Any:
        source = text.decode("utf-8", "surrogatepass")
        try:
            value, at = scan(source, _skip(source, 0))
        except StopIteration:
            raise ValueError("a JSON value is expected") from None
        except SystemError:  # Python < 3.12 wants to raise json.JSONDecodeError, and json is not loaded
            raise ValueError("malformed JSON") from None
        if _skip(source, at) != len(source):
            raise ValueError("something follows the JSON value")
        return value

    sample: Any = {"a": [1, -2.5, None, True, "\x00\u00e9\ud800"], "b": {}}
    text = b'{"a":[1,-2.5,null,true,"\\u0000\\u00e9\\ud800"],"b":{}}'
    if dumps(sample) != text or loads(b" " + text + b"\n") != sample:
        raise ValueError("this Python's json differs")
    return dumps, loads


def _ordinary() -> Tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    import json

    def dumps(value: Any) -> bytes:
        return json.dumps(value, separators=(",", ":")).encode("ascii")

    return dumps, json.loads


def _refuse(value: object) -> Any:
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _skip(source: str, at: int) -> int:
    while at < len(source) and source[at] in _SPACE:
        at += 1
    return at


try:
    dumps, loads = _lean()
except Exception:
    dumps, loads = _ordinary()
