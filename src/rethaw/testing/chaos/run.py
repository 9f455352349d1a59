"""One chaos run: start a server and the agent, feed it, kill as planned, wait for its end, gather the record."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import logging
import random
import signal
import tarfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from rethaw.model import errors
from rethaw.testing import processes
from rethaw.testing.chaos import script
from rethaw.testing.chaos.checks import Record, fingerprint
from rethaw.testing.chaos.plan import Hit, Plan
from rethaw.testing.conversation import ProviderRequest
from rethaw.testing.provider import ScriptedProvider
from rethaw.testing.reply import Reply
from rethaw.testing.server import RunningServer

T = TypeVar("T")
_log = logging.getLogger("rethaw.testing")
_AGENT = Path(__file__).with_name("agent.py")
_DOWN = (OSError, errors.Unavailable, errors.RethawError, ValueError, KeyError)
_FINAL = ("completed", "failed", "cancelled")


def code_archive(**files: bytes) -> bytes:
    """A tar.gz of files (name without .py: content), as the SDK uploads an agent's code."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{name}.py")
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


class Run:
    """`plan`: what to do. `timeout_s`: a run that takes longer has failed (it hangs)."""

    def __init__(self, plan: Plan, timeout_s: float = 300.0) -> None:
        self.plan = plan
        self.timeout_s = timeout_s
        self.rng = random.Random(plan.seed + 1)
        self.turn = -1  # newest turn that a call belonged to
        self.session = ""
        self.server_kills = 0
        self.observed: dict[int, str] = {}
        self.outbox_seen: list[list[str]] = []
        self.timeline: list[str] = []
        self._start = time.monotonic()
        self._restarting = asyncio.Lock()
        self._done = asyncio.Event()

    def note(self, text: str) -> None:
        self.timeline.append(f"{time.monotonic() - self._start:6.2f} {text}")
        _log.info("chaos seed %d: %s", self.plan.seed, self.timeline[-1])

    # ------------------------------------------------------------ the run

    async def run(self) -> Record:
        def answer(request: ProviderRequest) -> Reply:
            self.turn = max(self.turn, script.turn_of(request.last_text))
            return script.script(request)

        async with ScriptedProvider(answer) as provider:
            self.provider = provider
            settings = {"base_url": provider.url, "key": "k", "format": "openai", "auth": "bearer"}
            self.server = RunningServer(providers={"openai": settings}, faults=self.plan.fault)
            try:
                record = await self._run()
                record.leftovers = await asyncio.to_thread(self._stop)
                return record
            except BaseException:
                self.note(f"end of the server's log:\n{self.server.log_tail()}")
                raise
            finally:
                await asyncio.to_thread(self.server.close)

    def _stop(self) -> list[str]:
        """Stop the server in good order; what it leaves behind."""
        self.server.stop()
        data = self.server.data_dir
        with contextlib.suppress(errors.Unavailable):
            processes.wait_until(lambda: not processes.mentioning(str(data)), 15, "the last process's end")
        left = [" ".join(processes.command_line(p))[:200] for p in processes.mentioning(str(data))]
        return left + processes.mounts_below(data)

    async def _run(self) -> Record:
        self.note(str(self.plan))
        tasks: set[asyncio.Task[None]] = set()
        try:
            async with asyncio.timeout(self.timeout_s):
                tasks.add(asyncio.create_task(self._keep_up()))
                self.session = await self._beside(tasks, self._insist(self._create))
                self.note(f"session {self.session}")
                tasks |= {asyncio.create_task(job) for job in (self._feed(), self._kill(), self._observe())}
                view = await self._beside(tasks, self._insist(self._ended))
                if self.plan.fault and not self.server_kills:
                    self.note(f"the fault point was not reached: {self.plan.fault}")
                self.note(f"ended {view['state']}")
                self._done.set()
                return await self._record(view)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _beside(self, tasks: set[asyncio.Task[None]], job: Coroutine[Any, Any, T]) -> T:
        """The result of `job`; an error of one of `tasks` if that comes first."""
        wanted = asyncio.create_task(job)
        try:
            while not wanted.done():
                await asyncio.wait({wanted, *tasks}, return_when=asyncio.FIRST_COMPLETED)
                for task in [t for t in tasks if t.done()]:
                    tasks.discard(task)
                    task.result()
            return wanted.result()
        finally:
            wanted.cancel()

    async def _insist(self, call: Callable[[], T]) -> T:
        """`call` in a thread, until the server is there and has nothing against it."""
        while True:
            try:
                return await asyncio.to_thread(call)
            except (errors.InvalidInput, errors.NotFound, errors.KeyReused, errors.Unauthorized):
                raise
            except _DOWN:
                await asyncio.sleep(0.1)

    def _create(self) -> str:
        server, plan = self.server, self.plan
        archive = code_archive(agent=_AGENT.read_bytes())
        digest = server.request("POST", "/v1/blobs", archive)["digest"]
        agent = {
            "name": "chaos",
            "entry": "agent.py::chaos",
            "code": digest,
            "idle_suspend_s": 1.0,
            "memory_bytes": 256 << 20,
        }
        args = {"turns": plan.turns, "die_at": plan.die_at, "die_after": plan.die_after}
        return str(
            server.request("POST", "/v1/sessions", {"agent": agent, "args": args, "key": f"chaos-{plan.seed}"})["id"]
        )

    def _ended(self) -> dict[str, Any]:
        view: dict[str, Any] = self.server.request("GET", f"/v1/sessions/{self.session}")
        if view["state"] not in _FINAL:
            raise errors.Unavailable("not yet")
        return view

    # ------------------------------------------------------------ the world around the agent

    async def _keep_up(self) -> None:
        """Start the server, and again whenever it died."""
        faults = self.plan.fault
        while True:
            if not self.server.running:
                async with self._restarting:
                    if self.server.starts:
                        self.server_kills += 1
                        self.note(f"server is gone, start it again in {self.plan.restart_after_s:.2f} s")
                        await asyncio.sleep(self.plan.restart_after_s)
                        faults = ""
                    self.server.faults = faults
                    try:
                        await asyncio.to_thread(self.server.start)
                    except errors.Unavailable as error:
                        # Killed in the middle of its start: by us or a fault point, that is the game; else say why.
                        if self.server.process is None or self.server.process.returncode != -signal.SIGKILL:
                            raise errors.RethawError(f"{error}\n{self.server.log_tail()}") from error
            await asyncio.sleep(0.02)

    async def _feed(self) -> None:
        """Send messages and signals: some long before the agent asks for them, some while it waits."""
        jobs = [self._signal(turn) for turn in script.signals_needed(self.plan.turns)]
        await asyncio.gather(self._messages(), *jobs)

    async def _moment(self, turn: int) -> None:
        """A random moment near `turn`; the last three cases are while the agent waits for it."""
        lead = self.rng.choice((5, 2, 1, 1, 1))
        delay = self.rng.choice((0.0, 0.3, 1.5, 2.5))
        while self.turn < min(turn - lead, self.plan.turns - 1):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await asyncio.sleep(delay)

    async def _messages(self) -> None:
        for i, turn in enumerate(script.messages_needed(self.plan.turns)):
            await self._moment(turn)
            body = {"payload": {"i": i}, "idempotency_key": f"m{i}"}
            await self._send(f"/v1/sessions/{self.session}/messages", body)

    async def _signal(self, turn: int) -> None:
        await self._moment(turn)
        body = {"payload": {"go": turn}, "idempotency_key": f"go-{turn}"}
        await self._send(f"/v1/sessions/{self.session}/signals/go-{turn}", body)

    async def _send(self, path: str, body: dict[str, Any]) -> None:
        with contextlib.suppress(errors.Conflict):  # the session is over (the agent killed itself)
            await self._insist(lambda: self.server.request("POST", path, body))

    async def _observe(self) -> None:
        """A reader who remembers: what it saw of log and outbox must still be there at the end."""
        while not self._done.is_set():
            await asyncio.sleep(self.rng.uniform(0.2, 2.0))
            with contextlib.suppress(*_DOWN):
                await asyncio.to_thread(self._look)

    def _look(self) -> None:
        for event in self._events():
            self.observed.setdefault(event["seq"], fingerprint(event))
        self.outbox_seen.append([m["id"] for m in self._outbox()])

    def _events(self) -> list[dict[str, Any]]:
        found = self.server.events(self.session, all_lines=True)
        for event in found:
            event["body"] = decoded(event["body"])
        return found

    def _outbox(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.server.request("GET", f"/v1/sessions/{self.session}/outbox?after=0")[
            "messages"
        ]
        return found

    # ------------------------------------------------------------ killing

    async def _kill(self) -> None:
        for hit in self.plan.hits:
            while self.provider.count < hit.after_call:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.sleep(hit.delay_s)
            async with self._restarting if hit.target in ("server", "everything") else contextlib.nullcontext():
                self.note(f"kill {hit.target} (call {self.provider.count}, turn {self.turn})")
                killed = await asyncio.to_thread(self._strike, hit)
                end = time.monotonic() + 10
                while not killed and time.monotonic() < end:  # it is on its way back, or suspended
                    await asyncio.sleep(0.05)
                    killed = await asyncio.to_thread(self._strike, hit)
                self.note(f"killed {killed}")

    def _strike(self, hit: Hit) -> list[int]:
        """SIGKILL; the pids that were there to be killed."""
        if hit.target == "server":
            return [p for p in [self.server.pid] if processes.kill(p)]
        if hit.target == "everything":
            found = [*self.server.processes(), *processes.descendants(self.server.pid)]
            return [p for p in dict.fromkeys(found) if processes.kill(p)]
        if hit.target in ("postgres", "backend"):
            with contextlib.suppress(OSError, ValueError):
                postmaster = self.server.postgres_pid()
                below = processes.descendants(postmaster)[1:]
                chosen = self.rng.choice(below) if hit.target == "backend" and below else postmaster
                return [p for p in [chosen] if processes.kill(p)]
            return []
        sandboxes = self.server.sandboxes()
        if hit.target == "guestd":
            return [box.pid for box in sandboxes if box.kill_guest()]
        return [box.pid for box in sandboxes if processes.kill(box.pid)]

    # ------------------------------------------------------------ the record

    async def _record(self, view: dict[str, Any]) -> Record:
        def gather() -> Record:
            # First: an answer that nobody waits for any more may still come in.
            observed, outbox_seen = dict(self.observed), list(self.outbox_seen)
            events = self._events()
            result = next((e["body"] for e in reversed(events) if e["type"] == "session.result"), None)
            requests: dict[str, str] = {}
            for event in events:
                if event["type"] == "exchange.requested":
                    exchange = event["data"]["exchange"]
                    body = self.server.request("GET", f"/v1/exchanges/{exchange}/request", raw=True)
                    requests[exchange] = hashlib.sha256(body).hexdigest()
            outbox = [{**m, "payload": decoded(m["payload"])} for m in self._outbox()]
            return Record(
                plan=self.plan,
                state=view["state"],
                reason=view["reason"],
                exit_code=view["exit_code"],
                result=result,
                events=events,
                requests=requests,
                calls=[c.sha256 for c in self.provider.calls],
                outbox=outbox,
                observed=observed,
                outbox_seen=outbox_seen,
                server_kills=self.server_kills,
            )

        return await self._insist(gather)


def decoded(body: Any) -> Any:
    """A JSON body as it travels in an event (base64), or as it is."""
    if not isinstance(body, str):
        return body
    try:
        return json.loads(base64.b64decode(body, altchars=b"-_", validate=True))
    except ValueError:
        return body
