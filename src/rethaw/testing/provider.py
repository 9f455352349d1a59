"""A model provider that plays a script: OpenAI Chat Completions, OpenAI Responses, Anthropic Messages.

In a test: `async with ScriptedProvider(by_turn(["hello"])) as provider: AsyncOpenAI(base_url=provider.openai_url, ...)`.
As a process: `python -m rethaw.testing.provider --port 9000 --script script.py --journal calls.jsonl`; its first line on
stdout is JSON with the URLs. `GET /_calls` tells the calls so far, `POST /_fail` (JSON: fields of Reply, `times`, and
`path`, `contains` to choose calls; or `{"refuse_s": 2}`) arms failures, `POST /_clear` disarms them.

The journal gets one JSON line, on disk before any answer, for each call whose request was received in full
(`"what": "call"`), and one when it ended (`"what": "end"`).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import gzip
import hashlib
import importlib.util
import json
import logging
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self, cast

from aiohttp import web

from rethaw.model.errors import InvalidInput
from rethaw.testing import services, wire_anthropic, wire_chat, wire_responses
from rethaw.testing.conversation import Api, ProviderRequest, Turn, api_of, turns_of
from rethaw.testing.reply import Answer, Reply, Script, TokenUsage, answer, by_turn, echo, in_order, matching

__all__ = ["Call", "ProviderRequest", "Reply", "Script", "ScriptedProvider", "TokenUsage"]
__all__ += ["by_turn", "echo", "in_order", "load_script", "matching"]

_log = logging.getLogger("rethaw.testing")
_BODY_LIMIT = 256 << 20
_HOLD_S = 0.02  # between two looks at whether an answer may go on


@dataclass
class Call:
    """One call as the provider saw it. `at`, `ended_at`: Unix time. `status` 0: no response head was written."""

    n: int
    api: Api
    path: str
    headers: dict[str, str]
    body: bytes
    json: dict[str, Any]
    at: float
    status: int = 0
    completed: bool = False
    client_gone: bool = False
    ended_at: float | None = None
    request: ProviderRequest | None = None  # as the script saw it

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.body).hexdigest()


@dataclass
class _Armed:
    reply: Reply
    times: int
    when: Callable[[ProviderRequest], bool]


@dataclass
class _Cut(Exception):
    how: str


@dataclass
class ScriptedProvider:
    """`script`: a function of ProviderRequest, or replies to give in order (see `by_turn` for replies that are a pure
    function of the conversation). `port` 0: a free one, kept over stop() and start()."""

    script: Script | Sequence[Answer | Script]
    host: str = "127.0.0.1"
    port: int = 0
    journal: Path | None = None
    calls: list[Call] = field(default_factory=list[Call])

    def __post_init__(self) -> None:
        self._script: Script = self.script if callable(self.script) else in_order(self.script)
        self._armed: list[_Armed] = []
        self._conversations: dict[str, tuple[Turn, ...]] = {}  # what previous_response_id stands for
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._journal: IO[str] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._n = 0
        self._arrived = asyncio.Event()

    # ------------------------------------------------------------ life

    async def start(self) -> Self:
        if self.journal is not None:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            if self.journal.exists():
                with self.journal.open() as lines:
                    self._n = sum(json.loads(line)["what"] == "call" for line in lines)
            self._journal = self.journal.open("a")
        app = web.Application(client_max_size=_BODY_LIMIT)
        app.router.add_get("/_calls", self._show_calls)
        app.router.add_post("/_fail", self._arm)
        app.router.add_post("/_clear", self._clear)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await self._listen()
        return self

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = self._site = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _listen(self) -> None:
        assert self._runner is not None
        self._site = web.TCPSite(self._runner, self.host, self.port, reuse_address=True)
        await self._site.start()
        self.port = int(self._runner.addresses[-1][1])

    async def refuse(self, seconds: float) -> None:
        """Refuse new connections for a while (those that are open go on)."""
        site, self._site = self._site, None
        if site is None or self._runner is None:
            return
        await site.stop()

        async def again() -> None:
            await asyncio.sleep(seconds)
            await self._listen()

        task = asyncio.create_task(again())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------ what tests ask

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def anthropic_url(self) -> str:
        return self.url

    @property
    def count(self) -> int:
        """Calls whose request was received in full, those of earlier runs in the same journal included."""
        return self._n

    def fail(self, reply: Reply, *, times: int = 1, when: Callable[[ProviderRequest], bool] = lambda _: True) -> None:
        """The next `times` calls for which `when` holds get `reply` in place of the script's."""
        self._armed.append(_Armed(reply, times, when))

    def disarm(self) -> None:
        """Forget what `fail` armed."""
        self._armed.clear()

    async def wait_for_calls(self, count: int, timeout_s: float = 30.0) -> None:
        """Return once `count` calls were received. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while self._n < count:
                self._arrived.clear()
                await self._arrived.wait()

    # ------------------------------------------------------------ control

    async def _show_calls(self, _: web.Request) -> web.Response:
        return web.json_response({"count": self._n, "calls": [_summary(c) for c in self.calls]})

    async def _arm(self, request: web.Request) -> web.Response:
        data: dict[str, Any] = await request.json()
        if "refuse_s" in data:
            await self.refuse(float(data["refuse_s"]))
            return web.json_response({"ok": True})
        times, path, contains = int(data.pop("times", 1)), data.pop("path", None), data.pop("contains", None)

        def when(r: ProviderRequest) -> bool:
            return (path is None or str(path) in r.path) and (contains is None or str(contains).encode() in r.body)

        try:
            self.fail(Reply.from_json(data), times=times, when=when)
        except (InvalidInput, TypeError) as e:
            return web.json_response({"error": str(e)}, status=422)
        return web.json_response({"ok": True})

    async def _clear(self, _: web.Request) -> web.Response:
        self.disarm()
        return web.json_response({"ok": True})

    # ------------------------------------------------------------ calls

    async def _serve(self, http: web.Request) -> web.StreamResponse:
        body = await http.read()
        request, call = self._register(http, body)
        try:
            response = await self._respond(http, request, call)
        except _Cut as cut:
            _drop(http, cut.how)
            raise asyncio.CancelledError from None
        except (asyncio.CancelledError, ConnectionError):
            call.client_gone = True
            raise
        finally:
            call.ended_at = time.time()
            self._write({"what": "end", **_summary(call)})
        return response

    def _register(self, http: web.Request, body: bytes) -> tuple[ProviderRequest, Call]:
        api = api_of(http.path)
        try:
            parsed: Any = json.loads(body) if body else {}
        except ValueError:
            parsed = {}
        data = cast(dict[str, Any], parsed) if isinstance(parsed, dict) else {}
        earlier = self._conversations.get(str(data.get("previous_response_id")), ())
        headers = {k.lower(): v for k, v in http.headers.items()}
        self._n += 1
        turns = turns_of(api, data, earlier)
        request = ProviderRequest(self._n, api, http.method, http.path_qs, headers, body, data, turns)
        call = Call(self._n, api, http.path_qs, headers, body, data, time.time(), request=request)
        self.calls.append(call)
        self._write(
            {
                "what": "call",
                **_summary(call),
                "assistant_turns": request.assistant_turns,
                "first_user": request.first_user[:200],
                "body": base64.b64encode(body).decode() if len(body) <= 1 << 20 else None,
            }
        )
        self._arrived.set()
        return request, call

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._journal is None:
            return
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    async def _reply(self, request: ProviderRequest) -> Reply:
        for armed in self._armed:
            if armed.when(request):
                armed.times -= 1
                if armed.times <= 0:
                    self._armed.remove(armed)
                return armed.reply
        if request.api == "other":
            known = services.other(request)
            if known is not None:
                return known
        elif request.method != "POST":
            return Reply(status=405, message="Method not allowed.")
        elif not request.json:
            return Reply(status=400, message="We could not parse the JSON body of your request.")
        elif request.api in ("chat", "messages") and not request.json.get("messages"):
            return Reply(status=400, message="Missing required parameter: 'messages'.")
        return await answer(self._script, request)

    async def _respond(self, http: web.Request, request: ProviderRequest, call: Call) -> web.StreamResponse:
        reply = await self._reply(request)
        key = hashlib.sha256(f"{request.n}:{request.sha256}".encode()).hexdigest()[:24]
        headers = services.headers(request, reply, key)
        if reply.first_byte_s:
            await asyncio.sleep(reply.first_byte_s)
        if reply.hang:
            await asyncio.Event().wait()
        if reply.cut and reply.cut_after == 0:
            raise _Cut(reply.cut)
        if reply.status >= 400:
            body = services.error_body(request, reply, key)
            return await self._whole(http, reply, call, body, {**headers, "content-type": "application/json"})
        if reply.raw is not None:
            return await self._whole(http, reply, call, reply.raw, {**headers, "content-type": reply.content_type})
        wire = {"chat": wire_chat, "responses": wire_responses, "messages": wire_anthropic}.get(request.api)
        if wire is None:
            missing = Reply(status=404, message=f"Invalid URL ({request.method} {request.path})")
            body = services.error_body(request, missing, key)
            return await self._whole(http, missing, call, body, {**headers, "content-type": "application/json"})
        counts = reply.usage or TokenUsage(
            input=max(1, len(request.body) // 4), output=max(1, (len(reply.text) + 40 * len(reply.tool_calls)) // 4)
        )
        created = int(call.at)
        self._remember(request, reply, key)
        if not request.stream:
            body = wire.whole(request, reply, counts, key, created)
            return await self._whole(http, reply, call, body, {**headers, "content-type": "application/json"})
        events = wire.events(request, reply, counts, key, created)
        return await self._stream(http, reply, call, headers, _paced(reply, events, wire.stream_error))

    def _remember(self, request: ProviderRequest, reply: Reply, key: str) -> None:
        if request.api == "responses" and request.json.get("store", True):
            said = Turn("assistant", reply.text)
            kept = tuple(t for t in request.turns if t.role != "system")
            self._conversations[f"resp_{key}"] = (*kept, said)

    async def _whole(
        self, http: web.Request, reply: Reply, call: Call, body: bytes, headers: dict[str, str]
    ) -> web.StreamResponse:
        if reply.gzip and "gzip" in http.headers.get("accept-encoding", ""):
            body = gzip.compress(body, 1, mtime=0)
            headers["content-encoding"] = "gzip"
        headers["content-length"] = str(len(body))
        response = web.StreamResponse(status=reply.status, headers=headers)
        call.status = reply.status
        await response.prepare(http)
        if reply.cut:
            await response.write(body[: len(body) // 2])
            await asyncio.sleep(0.05)  # a reset overtakes bytes that are still in the send buffer
            raise _Cut(reply.cut)
        await response.write(body)
        await response.write_eof()
        call.completed = True
        return response

    async def _stream(
        self,
        http: web.Request,
        reply: Reply,
        call: Call,
        headers: dict[str, str],
        parts: AsyncIterator[bytes | None],
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            status=reply.status,
            headers={**headers, "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"},
        )
        call.status = reply.status
        await response.prepare(http)
        async for data in parts:
            if data is None:
                await asyncio.sleep(0.05)  # a reset overtakes bytes that are still in the send buffer
                raise _Cut(reply.cut or "close")
            await response.write(data)
        await response.write_eof()
        call.completed = True
        return response


async def _paced(
    reply: Reply, events: Iterator[tuple[bool, bytes]], stream_error: Callable[[str], bytes]
) -> AsyncIterator[bytes | None]:
    """The bytes to write, at their times; None where the connection is to be cut."""
    parts = list(events)
    held = next((n for n, (pause, _) in enumerate(parts) if pause), len(parts) - 1)
    for written, (pause, data) in enumerate(parts):
        while written == held and reply.hold is not None and not reply.hold():  # noqa: ASYNC110 - of another thread
            await asyncio.sleep(_HOLD_S)
        if pause and reply.chunk_s:
            await asyncio.sleep(reply.chunk_s)
        if reply.cut and written == reply.cut_after:
            yield data[: len(data) // 2]
            yield None
            return
        if reply.malformed_after == written:
            yield b'data: {"id": "broken, not JSON\n\nevnt no-such-field\ndata\n\n'
        if reply.error_after == written:
            yield stream_error(reply.message or "Overloaded")
            return
        if reply.ragged:
            for i in range(0, len(data), 7):
                yield data[i : i + 7]
                await asyncio.sleep(0)
        else:
            yield data
    if reply.cut:
        yield None


def _drop(http: web.Request, how: str) -> None:
    """End the connection in the middle: with a reset, or as if the server had closed it."""
    transport = http.transport
    if transport is None:
        return
    if how == "rst":
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()


def _summary(call: Call) -> dict[str, Any]:
    return {
        "n": call.n,
        "api": call.api,
        "path": call.path,
        "sha256": call.sha256,
        "bytes": len(call.body),
        "at": call.at,
        "status": call.status,
        "completed": call.completed,
        "client_gone": call.client_gone,
    }


# ---------------------------------------------------------------- as a process


def load_script(name: str) -> Script:
    """`echo`, or `FILE.py` / `FILE.py::NAME` (default name: `script`). Raises InvalidInput."""
    if name == "echo":
        return echo
    file, _, attribute = name.partition("::")
    path = Path(file)
    if not path.is_file():
        raise InvalidInput(f"{name!r} is not a script", remedy="give echo, FILE.py or FILE.py::NAME")
    spec = importlib.util.spec_from_file_location(path.stem + "_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    script: Any = getattr(module, attribute or "script", None)
    if script is None:
        raise InvalidInput(f"{file} has no {attribute or 'script'!r}", remedy="define it, or name another with ::NAME")
    return cast(Script, script) if callable(script) else in_order(cast(list[Answer | Script], script))


async def _main(args: argparse.Namespace) -> None:
    provider = ScriptedProvider(load_script(args.script), args.host, args.port, args.journal)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await provider.start()
    urls = {"url": provider.url, "openai_url": provider.openai_url, "anthropic_url": provider.anthropic_url}
    sys.stdout.write(json.dumps({**urls, "port": provider.port, "pid": os.getpid()}) + "\n")
    sys.stdout.flush()
    await stop.wait()
    await provider.stop()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m rethaw.testing.provider", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--script", default="echo", help="echo, FILE.py or FILE.py::NAME")
    parser.add_argument("--journal", type=Path, default=None)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
