"""A scripted model for tests that are not coroutines: a `ScriptedProvider` with an event loop of its own in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from rethaw.testing.provider import Call, ProviderRequest, Reply, ScriptedProvider
from rethaw.testing.reply import Answer, Script, answer

T = TypeVar("T")
_KEY = "secret-provider-key"  # only the server has it
_STOP_S = 10.0


class ScriptedModel:
    """Speaks OpenAI Chat Completions, OpenAI Responses and Anthropic Messages. Say what it answers with `script`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._script: Script | None = None
        self._left: list[Answer | Script] = []
        self._given: dict[int, tuple[str, Answer | Script]] = {}  # call number -> digest of its request, its reply
        self._from = 0  # calls of earlier tests
        self.provider = ScriptedProvider(self._answer)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scripted-model", daemon=True)
        self._thread.start()
        self._do(self.provider.start())

    # ------------------------------------------------------------ what a test says

    def script(self, *replies: Answer | Script) -> None:
        """What to answer from now on. One function: called for each request (a `ProviderRequest`). Else the replies
        (texts, `Reply`s or functions), one for each call in order; a call that was cut off before its answer was out, and
        is issued again, gets the same reply again. Replaces what was said before."""
        with self._lock:
            alone = replies[0] if len(replies) == 1 else None
            self._script = alone if callable(alone) else None
            self._left = [] if callable(alone) else list(replies)
            self._given = {}

    def fail(self, reply: Reply, *, times: int = 1, when: Callable[[ProviderRequest], bool] = lambda _: True) -> None:
        """The next `times` calls for which `when` holds get `reply` in place of the script's, and take nothing of it:
        `fail(Reply.rate_limited())`."""
        self.provider.fail(reply, times=times, when=when)

    def reset(self) -> None:
        """Forget script and calls."""
        self.script()
        self.provider.disarm()
        self._from = self.provider.count

    # ------------------------------------------------------------ what a test asks

    @property
    def requests(self) -> list[ProviderRequest]:
        """The model calls that arrived, in order."""
        return [c.request for c in self._calls() if c.request is not None]

    @property
    def calls(self) -> int:
        """How many model calls arrived. What a crash does not pay for again does not arrive again."""
        return len(self._calls())

    @property
    def prompts(self) -> list[str]:
        """The last text of each call."""
        return [request.last_text for request in self.requests]

    def _calls(self) -> list[Call]:
        return [c for c in list(self.provider.calls) if c.n > self._from and c.api != "other"]

    # ------------------------------------------------------------ for the server

    def settings(self) -> dict[str, dict[str, Any]]:
        """The tables under [providers] of rethaw.toml."""
        where = {"base_url": self.provider.url, "key": _KEY}
        openai = {**where, "auth": "bearer", "format": "openai"}
        anthropic = {**where, "auth": "x-api-key", "format": "anthropic"}
        return {"openai": openai, "anthropic": anthropic}

    def close(self) -> None:
        self._do(self.provider.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_S)
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    # ------------------------------------------------------------ answering

    async def _answer(self, request: ProviderRequest) -> Reply:
        with self._lock:
            item = self._script or self._next(request)
        found = item(request) if callable(item) else item
        return await answer(lambda _: found, request)

    def _next(self, request: ProviderRequest) -> Answer | Script:
        for call in self.provider.calls:
            digest, given = self._given.get(call.n, ("", ""))
            if digest == request.sha256 and call.ended_at is not None and not call.completed:
                del self._given[call.n]  # its answer never got out whole
                self._given[request.n] = (digest, given)
                return given
        if not self._left:
            said = (
                "no answer is scripted" if not self._given else f"all {len(self._given)} scripted answers are used up"
            )
            return Reply(
                status=400, message=f"{said}, and the agent asks {request.last_text[:80]!r}: see model.script(...)"
            )
        given = self._left.pop(0)
        self._given[request.n] = (request.sha256, given)
        return given
