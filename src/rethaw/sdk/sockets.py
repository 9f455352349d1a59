"""WebSockets to a server."""

from __future__ import annotations

from urllib.parse import urlsplit

from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from rethaw.sdk import calls
from rethaw.sdk.transport import CONNECT_S, Target

MESSAGE = 1 << 20  # bytes of one, at most


def dial(target: Target, path: str) -> ClientConnection:
    """A connection to `path`. Raises what the server says in place of it, Unavailable when there is none."""
    url = urlsplit(target.url)
    local = url.hostname in ("127.0.0.1", "::1", "localhost")
    address = f"{'wss' if url.scheme == 'https' else 'ws'}://{url.netloc}{url.path.rstrip('/')}"
    try:
        return connect(
            address + path,
            additional_headers={"Authorization": f"Bearer {target.token}"} if target.token else {},
            user_agent_header="rethaw-sdk",
            open_timeout=CONNECT_S + target.timeout_s,
            compression=None,
            max_size=MESSAGE,
            close_timeout=2,
            proxy=None if local else True,
        )
    except InvalidStatus as e:
        body = bytes(e.response.body or b"")
        raise calls.error_of(e.response.status_code, body, url=target.url, token_source=target.source) from e
    except (OSError, TimeoutError, InvalidHandshake) as e:
        raise target.nobody(str(e)) from e
