"""One life of a session on this node: one boot or restore of its sandbox, until that ends one way or another."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from rethaw.engines.base import Sandbox
from rethaw.gateway.gateway import SessionGateway
from rethaw.model.enums import EventType, Reason
from rethaw.model.errors import Fenced, RethawError, Unavailable
from rethaw.model.ports import GuestStream
from rethaw.model.types import MIB, AgentSpec, Assignment, Boot, Fence, NewEvent
from rethaw.node import terminal
from rethaw.node.calls import Calls
from rethaw.node.carry import Carried
from rethaw.node.dials import Dials
from rethaw.node.egress import Egress
from rethaw.node.link import Hello, Link
from rethaw.node.outputs import Outputs
from rethaw.node.parts import Parts
from rethaw.node.saver import Saver

log = logging.getLogger("rethaw.node")
_RESYNC_PAUSE_S = 0.5
_LAST_WORDS_S = 10.0


class Life:
    """Sandbox, channel, gateway, saver and calls under one generation. `ended` resolves once: with (reason, detail)
    when it died, with None when it was let go in order."""

    def __init__(
        self,
        parts: Parts,
        assignment: Assignment,
        sandbox: Sandbox,
        gateway: SessionGateway,
        image: str,
        on_exit: Callable[[Life, int | None, int | None, str | None], Coroutine[Any, Any, None]],
        changed: Callable[[], None],
    ) -> None:
        self.parts = parts
        self.agent: AgentSpec = assignment.agent
        self.fence = Fence(session=assignment.session, generation=assignment.generation)
        self.line = assignment.line
        self.attempt = assignment.attempt
        self.sandbox = sandbox
        self.gateway = gateway
        self.image = image
        self.ended: asyncio.Future[tuple[Reason, str] | None] = asyncio.get_running_loop().create_future()
        self.last_active = time.monotonic()
        self._on_exit = on_exit
        self._changed = changed
        self._tasks: set[asyncio.Task[None]] = set()
        self._exit: asyncio.Task[None] | None = None
        self._resyncing: asyncio.Task[None] | None = None
        snapshot = assignment.snapshot
        self._restored = snapshot.id if snapshot else None  # until the first hello
        self.terminal = self._terminal() if self.agent.terminal is not None or self.agent.stdin else None
        self.outputs = Outputs(
            parts.log,
            self.fence,
            self.attempt,
            snapshot.output if snapshot else {},
            self.active,
            self.terminal.show if self.terminal is not None else None,
        )
        self.egress = Egress(parts.log, self.fence, self.agent.allow, parts.egress, self)
        self.link = Link(
            sandbox.reader,
            sandbox.writer,
            self._on_stream,
            on_malformed=self._on_malformed,
            on_hello=self._on_hello,
            on_left=gateway.left,
            on_resized=self.terminal.resized if self.terminal is not None else None,
        )
        self.dials = Dials(self.link.dial, self)
        if self.terminal is not None:
            self.terminal.joined(self.link)
        self.saver = Saver(
            parts,
            self.agent,
            self.fence,
            line=self.line,
            attempt=self.attempt,
            image=image,
            sandbox=sandbox,
            link=self.link,
            gateway=gateway,
            outputs=self.outputs,
            parent=snapshot.id if snapshot else None,
            shared=snapshot is not None and snapshot.session != assignment.session,
        )
        boot = assignment.boot or Boot(args={}, cursor=0, fresh=False)
        self.calls = Calls(parts, self.fence, self.attempt, boot, self.saver, self)
        if assignment.files is not None:
            self.calls.carried = Carried(parts, assignment.files, self.agent, self.image)

    def _terminal(self) -> terminal.Life:
        keyboard = self.parts.terminals.of(self.fence.session)
        return terminal.Life(
            keyboard, self.parts.log, self.fence, self.agent, self.line, self.attempt, self.active, self.spawn
        )

    def watch(self) -> None:
        """Start the tasks that live as long as the sandbox: death, pings, saves."""
        for work in (self._watch_death(), self._ping(), self._save()):
            self.spawn(work)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, Fenced):
                self.end(Reason.FENCED, str(error))
            else:
                log.error("session %s: %r", self.fence.session, error, exc_info=error)
                self.end(Reason.SANDBOX_DIED, f"internal error: {error}")

    def end(self, reason: Reason | None, detail: str = "") -> None:
        """The life is over; with a reason it died, with None somebody let it go."""
        if not self.ended.done():
            self.ended.set_result(None if reason is None else (reason, detail))

    async def close(self, *, destroy: bool = True) -> None:
        """Stop everything that belongs to this life. Upstream answers keep coming in."""
        self.end(None)
        current = asyncio.current_task()
        tasks = [t for t in self._tasks if t is not current and t is not self._exit]
        for task in tasks:
            task.cancel()
        await self.link.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.egress.close()
        self.dials.close(f"the sandbox is gone: {end[1]}" if (end := self.ended.result()) else "the sandbox is gone")
        if self.terminal is not None:
            self.terminal.close()
        await self.gateway.detach()
        if self.calls.carried is not None:
            await self.calls.carried.close()
        if destroy:
            await self.sandbox.destroy()

    # ------------------------------------------------------------ what the guest says

    def _on_hello(self, hello: Hello) -> None:
        self.gateway.hello(hello.exchanges, hello.left)
        self.calls.still_open(hello.calls)
        self.egress.hello(hello.tunnels)
        self.dials.hello(hello.dials, hello.can_dial)
        if self.terminal is not None:
            self.terminal.resized(hello.size)
        restored, self._restored = self._restored, None
        if restored is not None:
            self.calls.saved_in(restored, hello.calls)

    async def _on_stream(self, stream: GuestStream) -> None:
        try:
            if stream.kind == "exchange":
                self.active()
                await self.gateway.handle(stream)
                self.active()
            elif stream.kind == "call":
                await self.calls.handle(stream)
            elif stream.kind == "tunnel":
                await self.egress.handle(stream)
            elif stream.kind == "dial":
                await self.dials.handle(stream)
            elif stream.kind == "stdin":
                if self.terminal is not None:
                    await self.terminal.serve(stream)
            else:
                await self.outputs.handle(stream)
        except Fenced as error:
            self.end(Reason.FENCED, str(error))
        except Unavailable as error:
            # The database is away for longer than any retry. The guest keeps what it said; a thaw asks for it again.
            log.warning("session %s: %s", self.fence.session, error)
            self._resync()
            await asyncio.get_running_loop().create_future()

    def _resync(self) -> None:
        if self._resyncing is None or self._resyncing.done():
            self._resyncing = asyncio.ensure_future(self._resync_later())
            self._tasks.add(self._resyncing)
            self._resyncing.add_done_callback(self._reap)

    async def _resync_later(self) -> None:
        await asyncio.sleep(_RESYNC_PAUSE_S)
        try:
            await self.saver.resync()
        except RethawError as error:
            if not self.link.closed.done():
                log.warning("session %s: %s", self.fence.session, error)
                self.end(Reason.GUEST_UNRESPONSIVE, str(error))

    def _on_malformed(self, detail: str) -> None:
        self.spawn(self._malformed(detail))

    async def _malformed(self, detail: str) -> None:
        await self.parts.log.append(
            self.fence, [NewEvent(type=EventType.CHANNEL_MALFORMED, data={"detail": detail[:500]})]
        )
        self.end(Reason.CHANNEL_BROKEN, detail)

    async def exited(self, code: int | None, signal: int | None, detail: str | None) -> None:
        # A save cancels the handler that called this; the end of the attempt must be told once and to its end.
        if self._exit is None:
            self._exit = asyncio.ensure_future(self._on_exit(self, code, signal, detail))
        await asyncio.shield(self._exit)

    def active(self) -> None:
        self.last_active = time.monotonic()
        self._changed()

    def waits_changed(self) -> None:
        self._changed()

    async def looked_up(self, host: str) -> None:
        await self.egress.looked_up(host)

    def attend(self) -> None:
        """What the agent waited for has come, and somebody may wait for what it says to that."""
        self.sandbox.attend()

    # ------------------------------------------------------------ idleness

    def idle_since(self) -> float | None:
        """Since when (monotonic, may lie ahead) the agent only waits on what Rethaw can see; None while it does anything else."""
        serves = (
            self.agent.entry is None and self.dials.served and self.agent.nap_s is None
        )  # a program that was connected to waits for the next one
        if self.gateway.open() or not (self.calls.waiting or serves):
            return None
        return self.dials.idle_since(max((self.last_active, *self.calls.waiting.values())))

    def still_since(self) -> float | None:
        """Since when (monotonic, may lie ahead) nothing of the agent was to be seen but what it computes; None while
        something is open that a nap would break, and without naps."""
        if self.agent.nap_s is None or self.calls.waiting or self.gateway.open() or self.egress.busy:
            return None
        return self.dials.idle_since(self.last_active)

    # ------------------------------------------------------------ watching

    async def _save(self) -> None:
        await self.saver.run()

    async def _ping(self) -> None:
        timing = self.parts.timing
        while True:
            await asyncio.sleep(timing.ping_every)
            if self.saver.frozen:
                continue
            try:
                await self.link.ping(timing.ping_timeout)
            except RethawError as error:
                if self.link.closed.done():
                    return  # how it ended is told by who watches the sandbox
                if not self.saver.frozen:
                    self.end(
                        Reason.GUEST_UNRESPONSIVE, f"guestd did not answer for {timing.ping_timeout:.0f} s: {error}"
                    )
                    return

    async def _watch_death(self) -> None:
        gone = asyncio.ensure_future(self.sandbox.wait())
        try:
            await asyncio.wait({gone, self.link.closed}, return_when=asyncio.FIRST_COMPLETED)
            if not gone.done():
                # The channel ended first: usually the sandbox is on its way down and says why in a moment; an emulated
                # machine needs longer for it.
                await asyncio.wait({gone}, timeout=_LAST_WORDS_S)
            if not gone.done():
                why = str(self.link.closed.result())
                self.sandbox.kill()
                self.end(Reason.CHANNEL_BROKEN, why)
                return
            end = gone.result()
            if end.oom:
                limit = self.agent.memory_bytes // MIB
                self.end(Reason.OUT_OF_MEMORY, f"the sandbox went over its memory limit of {limit} MiB")
            else:
                self.end(Reason.SANDBOX_DIED, end.detail)
        finally:
            gone.cancel()
