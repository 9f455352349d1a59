"""Signed links: whoever has one may speak to one port of one session until it expires, and to nothing else."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from datetime import UTC, datetime

from rethaw.model.errors import Forbidden, InvalidInput

QUERY = "rethaw_link"  # the parameter of the link, and the name of the cookie that follows it
LONGEST_S = 30 * 86400.0


class Links:
    """`key`: of this installation, secret. `public_url`: where others reach the server."""

    def __init__(self, key: bytes, public_url: str) -> None:
        self._key = key
        self._public_url = public_url.rstrip("/")

    def make(self, session: str, port: int, expires_s: float) -> tuple[str, datetime]:
        """The address, and until when it works."""
        if not 1 <= expires_s <= LONGEST_S:
            raise InvalidInput(f"a link cannot live for {expires_s:g} s", remedy="use 1s to 30d")
        until = int(time.time() + expires_s)
        url = f"{self._public_url}/sessions/{session}/ports/{port}/?{QUERY}={self._sign(session, port, until)}"
        return url, datetime.fromtimestamp(until, UTC)

    def left_s(self, session: str, port: int, text: str) -> int:
        """How many seconds `text` still allows for that port. Raises Forbidden."""
        number, _, _ = text.partition(".")
        until = int(number) if number.isascii() and number.isdigit() and len(number) < 16 else 0
        if not hmac.compare_digest(self._sign(session, port, until).encode(), text.encode("utf-8", "surrogatepass")):
            raise Forbidden(f"this link is not for port {port} of session {session}", remedy="rethaw link makes one")
        left = until - time.time()
        if left <= 0:
            raise Forbidden("this link has expired", remedy="rethaw link makes a new one")
        return max(1, int(left))

    def _sign(self, session: str, port: int, until: int) -> str:
        said = f"rethaw link\0{session}\0{port}\0{until}".encode("utf-8", "surrogatepass")
        mark = hmac.digest(self._key, said, hashlib.sha256)
        return f"{until}.{base64.urlsafe_b64encode(mark).decode().rstrip('=')}"
