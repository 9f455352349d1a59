"""WebSockets to a server."""

from __future__ import annotations

from typing import Any, cast
from urllib.parse import urlsplit

from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from rethaw.sdk import calls
from rethaw.sdk.transport import CONNECT_S, Target

MESSAGE = 1 << 20  # bytes of one, at most


def address_of(target: Target, path: str) -> tuple[str, dict[str, Any]]:
    """Where a WebSocket of the API is, and the arguments with which either of websockets' clients opens it."""
    url = urlsplit(target.url)
    local = url.hostname in ("127.0.0.1", "::1", "localhost")
    return f"{'wss' if url.scheme == 'https' else 'ws'}://{url.netloc}{url.path.rstrip('/')}{path}", {
        "additional_headers": {"Authorization": f"Bearer {target.token}"} if target.token else {},
        "user_agent_header": "rethaw-sdk",
        "compression": None,
        "ping_timeout": None,  # a server whose program does not read answers late
        "close_timeout": 2,
        "proxy": None if local else True,
    }


def dial(target: Target, path: str) -> ClientConnection:
    """A connection to `path`. Raises what the server says in place of it, Unavailable when there is none."""
    address, settings = address_of(target, path)
    open_timeout = CONNECT_S + target.timeout_s
    try:
        opened = cast("Any", connect)(address, open_timeout=open_timeout, max_size=MESSAGE, **settings)
        return opened.__enter__()
    except InvalidStatus as e:
        body = bytes(e.response.body or b"")
        raise calls.error_of(e.response.status_code, body, url=target.url, token_source=target.source) from e
    except (OSError, TimeoutError, InvalidHandshake) as e:
        raise target.nobody(str(e)) from e
