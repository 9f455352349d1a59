"""What both clients do alike: where the server is, request headers, errors of the connection, how long to keep trying."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2

from rethaw.model.errors import Unavailable
from rethaw.sdk.calls import Call
from rethaw.sdk.credentials import Credentials, checked_url, load

if TYPE_CHECKING:
    from rethaw.model.types import SessionView

CONNECT_S = 5.0
TIMEOUT_S = 30.0  # for one answer
PATIENCE_S = 60.0  # how long streams and waits outlast a server that is away
POLL_S = 25.0  # one long poll; below what proxies commonly cut
QUIET_S = 90.0  # a stream silent for so long is opened anew

OnGap = Callable[[Unavailable], None]


@dataclass(frozen=True)
class Target:
    """A server and how to speak to it."""

    url: str
    token: str | None
    source: str
    timeout_s: float
    named: str = field(default="the url argument", compare=False)  # what says the URL; empty: nothing does

    @classmethod
    def find(cls, url: str | None, token: str | None, timeout_s: float) -> Target:
        """What was given, else the environment, else the credentials file."""
        found = load() if url is None or token is None else Credentials()
        if url is not None:
            url = checked_url(url, "url")
            if token is None and found.url == url:
                token = found.token
            return cls(url, token, "the token argument" if token else found.source, timeout_s)
        source = "the token argument" if token else found.source
        return cls(found.url, token or found.token, source, timeout_s, found.named)

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of either httpx2 client. A proxy of the environment is not for this machine."""
        local = urlsplit(self.url).hostname in ("127.0.0.1", "::1", "localhost")
        headers = {"user-agent": "rethaw-sdk"}
        if self.token:
            headers["authorization"] = f"Bearer {self.token}"
        out: dict[str, Any] = {"base_url": self.url, "headers": headers, "trust_env": not local}
        if local and self.url.startswith("http:"):
            out["verify"] = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used; loading certificates takes 30 ms
        return out

    def request(self, call: Call[Any]) -> dict[str, Any]:
        """Keyword arguments of `request`."""
        headers = {"accept": call.accept}
        if call.content is not None:
            headers["content-type"] = call.content_type
        return {
            "method": call.method,
            "url": call.path,
            "params": call.params or None,  # {} would drop what the path has
            "content": call.content,
            "headers": headers,
            "timeout": httpx2.Timeout(self.timeout_s + call.wait_s, connect=CONNECT_S),
        }

    def stream_request(self, call: Call[Any], after: int) -> dict[str, Any]:
        """Keyword arguments of `stream` for the events after `after`."""
        out = self.request(call)
        out["headers"]["last-event-id"] = str(after)
        out["params"] = {**call.params, "after": str(after)}
        out["timeout"] = httpx2.Timeout(self.timeout_s, connect=CONNECT_S, read=QUIET_S)
        return out

    def unavailable(self, error: httpx2.HTTPError) -> Unavailable:
        """The connection's error in our words. `details["sent"]`: whether the server may have got the request."""
        if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)):
            return self.nobody(str(error))
        if isinstance(error, httpx2.TimeoutException):
            return Unavailable(
                f"{self.url} did not answer in time", remedy="try again; see the server's log", sent=True
            )
        return Unavailable(
            f"the connection to {self.url} broke ({type(error).__name__})", remedy="try again", sent=True
        )

    def nobody(self, why: str = "") -> Unavailable:
        """Nobody listens there."""
        if "[SSL" in why:
            return Unavailable(
                f"{self.url} cannot be spoken to: {why}", remedy="check https and the certificate", sent=False
            )
        if not self.named:
            return Unavailable(
                f"no Rethaw server is set, and none answers at {self.url}",
                remedy="start one with `sudo rethaw up`, or set RETHAW_URL and RETHAW_TOKEN",
                sent=False,
            )
        by_file = f" (which {self.named} names)" if self.named.endswith(".json") else ""
        return Unavailable(
            f"no Rethaw server answers at {self.url}{by_file}",
            remedy="start it with `sudo rethaw up`, or set RETHAW_URL to where it is",
            sent=False,
        )


class Patience:
    """How long to go on without a server: `pause()` gives the next wait, and raises once it took too long."""

    def __init__(self, limit_s: float, on_gap: OnGap | None) -> None:
        self._limit_s = limit_s
        self._on_gap = on_gap
        self._since: float | None = None
        self._delay = 0.1

    def succeeded(self) -> None:
        self._since, self._delay = None, 0.1

    def pause(self, error: Unavailable) -> float:
        now = time.monotonic()
        if self._since is None:
            self._since = now
            if self._on_gap is not None:
                self._on_gap(error)
        if now - self._since > self._limit_s:
            raise error
        delay, self._delay = self._delay, min(self._delay * 2, 2.0)
        return delay


def failure(view: SessionView) -> Exception:
    """The error of a session that ended without a result."""
    from rethaw.model.errors import SessionFailed

    said = view.detail or view.reason.value
    return SessionFailed(
        f"session {view.id} {view.state.value}: {said}",
        remedy=f"see `rethaw why {view.id}`",
        session=view.id,
        state=view.state.value,
        reason=view.reason.value,
        exit_code=view.exit_code,
    )
