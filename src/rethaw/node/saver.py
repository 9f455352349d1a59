"""Takes a session's snapshots: at each model call in the shadow of its latency, and whenever somebody asks.

    quiesce -> capture (and, beside it, the log's position) -> thaw -> compress, sync, verify -> commit the row -> release

The agent stands still only from quiesce to thaw. The saver is also the gate that holds the first byte of every answer
until a snapshot with its request in it is durable (promise 4).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rethaw.engines.base import Capture, Sandbox
from rethaw.gateway.gateway import SessionGateway
from rethaw.model import faults
from rethaw.model.enums import Durability, EventType
from rethaw.model.errors import Fenced, RethawError, Unavailable
from rethaw.model.ids import new_id
from rethaw.model.types import AgentSpec, Fence, NewEvent, SnapshotInfo
from rethaw.node.gate import Gate
from rethaw.node.link import Link
from rethaw.node.outputs import Outputs
from rethaw.node.parts import Parts

log = logging.getLogger("rethaw.node")
# What of a snapshot's row its manifest carries, so that the files alone tell what they are.
_TRAVELS = (
    "id", "session", "parent", "line", "attempt", "seq", "generation", "engine", "engine_build", "cpu", "image", "resync",
    "clock", "output", "why", "paused_ms",
)  # fmt: skip
_POSITION_S = 2.0  # how much longer than the capture the guest may be kept quiet for the log's answer


@dataclass
class _Captured:
    snapshot: str
    seq: int
    resync: str
    output: dict[str, int]
    capture: Capture
    covered: Mapping[str, asyncio.Event]
    started: float
    paused_ms: float


class Saver:
    """One per life of a session. `parent` is the snapshot that this life was restored from; `shared`: it is another
    session's, whose forks may want it in memory still."""

    def __init__(
        self,
        parts: Parts,
        agent: AgentSpec,
        fence: Fence,
        *,
        line: int,
        attempt: int,
        image: str,
        sandbox: Sandbox,
        link: Link,
        gateway: SessionGateway,
        outputs: Outputs,
        parent: str | None,
        shared: bool = False,
    ) -> None:
        self._parts = parts
        self._agent = agent
        self._fence = fence
        self._line = line
        self._attempt = attempt
        self._image = image
        self._sandbox = sandbox
        self._link = link
        self._gateway = gateway
        self._outputs = outputs
        self._parent = parent
        self._gate = Gate()
        self.relaxed = agent.durability is Durability.RELAXED  # nothing waits for a snapshot
        self._gate.open = self.relaxed
        self._lock = asyncio.Lock()
        self._asked: str | None = None
        self._wake = asyncio.Event()
        self._failures = 0
        self._degraded: bool | None = None  # None: the row may say what a former life of the session left there
        self.idle = False  # set by the supervisor: nothing happens in the guest, periodic saves are a waste
        self.saved = parent  # newest snapshot of this life
        self._shared = shared
        self.frozen = False

    # ------------------------------------------------------------ the gate

    def requested(self, exchange: str) -> None:
        """An exchange's request is durable and accepted into guest memory: a snapshot shall hold it."""
        self._gate.requested(exchange)
        self.ask("exchange")

    async def released(self, exchange: str) -> None:
        """Until the first byte of the answer may go to the agent."""
        await self._gate.released(exchange)

    def ask(self, why: str) -> None:
        """Take a snapshot soon."""
        self._asked = self._asked or why
        self._wake.set()

    # ------------------------------------------------------------ the loop

    async def run(self) -> None:
        """Save when asked, and every `snapshot_every_s` without a model call. Ends by cancellation, or by Fenced."""
        every = self._agent.snapshot_every_s
        while True:
            pause = min(every, self._parts.timing.degraded_every) if self._degraded else every
            try:
                await asyncio.wait_for(self._wake.wait(), pause)
            except TimeoutError:
                if self.idle and not self._degraded:  # messages it sent may still wait for a snapshot that works
                    continue
                self._asked = "periodic"
            why, self._asked = self._asked or "requested", None
            self._wake.clear()
            try:
                await self.save(why)
            except Fenced:
                raise
            except (RethawError, OSError) as error:
                if self._link.closed.done():
                    return
                await self._failed(why, error)

    async def _failed(self, why: str, error: Exception) -> None:
        self._failures += 1
        log.warning("session %s: saving failed (%d in a row): %s", self._fence.session, self._failures, error)
        if self._failures >= self._parts.timing.save_attempts:
            if not self._degraded:
                self._degraded = True
                self._gate.give_up()
                await self._tell_degraded(True, str(error))
            return
        await asyncio.sleep(0.1 * 2**self._failures)
        if why != "periodic":
            self.ask(why)

    async def _tell_degraded(self, degraded: bool, detail: str) -> None:
        try:
            await self._parts.control.set_degraded(self._fence, degraded, detail, self._agent.durability)
        except Unavailable as error:
            log.warning("session %s: could not record degraded=%s: %s", self._fence.session, degraded, error)

    # ------------------------------------------------------------ one save

    async def save(self, why: str, *, run_on: bool = True) -> SnapshotInfo:
        """Take a snapshot and commit it. With `run_on=False` the guest stays quiet after a success (then `thaw` it, or
        destroy the sandbox). After a failure it always runs on. Raises EngineError, StorageFull, Fenced, Unavailable...
        """
        async with self._lock:
            snapshot = new_id("snap")
            staged = await self._parts.store.stage(snapshot, await self._sandbox.memory())
            committed = False
            try:
                captured = await self._capture(snapshot, staged, run_on)
                try:
                    info = await self._commit(captured, why)
                except BaseException:
                    if not run_on:
                        await self.thaw()
                    raise
                committed = True
            finally:
                if not committed:
                    self._parts.store.drop_staged(snapshot)
            previous, self.saved = self.saved, snapshot
            self._parent = snapshot
            if previous is not None and not self._shared:
                self._parts.store.drop_staged(previous)
            self._shared = False
            self._parts.store.keep(snapshot)
            self._gate.cover(captured.covered)
            self._failures = 0
            if self._degraded is not False:
                self._degraded = False
                if not self.relaxed:
                    self._gate.close()
                await self._tell_degraded(False, "")
            return info

    async def _capture(self, snapshot: str, staged: Path, run_on: bool) -> _Captured:
        await self._gateway.flush()
        await self._sandbox.precopy(staged)
        async with self._gateway.settled():
            started = time.monotonic()
            faults.point("saver.quiesce")
            quiet = await self._link.quiesce()
            self.frozen = True
            thawed, seq, paused = False, 0, 0.0
            try:
                covered = self._gate.captured()
                output = dict(self._outputs.offsets)  # exact only while the guest is quiet
                faults.point("saver.quiet")
                position = asyncio.ensure_future(self._position())

                async def captured() -> None:
                    nonlocal thawed, seq, paused
                    faults.point("saver.captured")
                    # Before the thaw: what the guest does after it must lie beyond the snapshot's position.
                    seq = await _soon(position)
                    if run_on:
                        await self.thaw()
                        thawed = True
                    paused = (time.monotonic() - started) * 1000
                    faults.point("saver.thawed")

                try:
                    capture = await self._sandbox.capture(staged, captured)
                finally:
                    position.cancel()
                return _Captured(snapshot, seq, quiet.marker, output, capture, covered, started, paused)
            except BaseException:
                if not thawed:
                    await self.thaw()
                raise

    async def _position(self) -> int:
        """The log's position once all that the quiet guest received and sent is durable."""
        await self._gateway.flush()
        return await self._parts.log.last_seq(self._fence.session)

    async def thaw(self) -> None:
        """Let a quiet guest run on. A guest that is gone meanwhile is somebody else's news."""
        try:
            await self._link.go(self._fence.generation)
            self.frozen = False
        except RethawError as error:
            log.info("session %s: could not thaw: %s", self._fence.session, error)

    async def _commit(self, c: _Captured, why: str) -> SnapshotInfo:
        parts = self._parts
        await parts.engines.of(c.capture.engine).keep_build()
        info = SnapshotInfo(
            id=c.snapshot,
            session=self._fence.session,
            parent=self._parent,
            line=self._line,
            attempt=self._attempt,
            seq=c.seq,
            generation=self._fence.generation,
            engine=c.capture.engine,
            engine_build=c.capture.engine_build,
            cpu=c.capture.cpu,
            image=self._image,
            path="",
            digest="",
            sections=(),
            resync=c.resync,
            clock=c.capture.clock,
            output=c.output,
            why=why,
            paused_ms=round(c.paused_ms, 2),
            durable_ms=0.0,
            raw_bytes=0,
            stored_bytes=0,
        )
        meta = info.model_dump(mode="json", include=set(_TRAVELS))
        written = await parts.store.write(c.snapshot, c.capture.sections, c.capture.paged, meta)
        faults.point("saver.stored")
        found = {name: getattr(written, name) for name in ("path", "digest", "sections", "raw_bytes", "stored_bytes")}
        durable_ms = round((time.monotonic() - c.started) * 1000, 2)
        info = info.model_copy(update={**found, "durable_ms": durable_ms})
        if self._agent.durability is Durability.REPLICATED:
            # Before the row: what the row makes visible must survive this node.
            try:
                await parts.store.upload(info)
            except RethawError:
                await parts.store.delete(info.id)
                raise
            info = info.model_copy(update={"uploaded_ms": round((time.monotonic() - c.started) * 1000, 2)})
        faults.point("saver.commit")
        try:
            info = await parts.catalog.commit(self._fence, info)
        except Fenced:
            await parts.store.delete(info.id)
            raise
        faults.point("saver.committed")
        if info.uploaded_ms is None:
            try:
                await parts.store.upload_later(info)
            except OSError as error:  # it is offered again after the next start
                log.warning("snapshot %s does not wait for its upload: %s", info.id, error)
        return info

    async def note_failure(self, error: Exception) -> None:
        """Log a failed save that somebody asked for by name (suspend, snapshot)."""
        event = NewEvent(type=EventType.SNAPSHOT_FAILED, data={"error": str(error)})
        await self._parts.log.append(self._fence, [event])

    async def resync(self) -> None:
        """Have the guest say everything again that it has no answer to, without saving."""
        async with self._lock:
            await self._link.quiesce()
            await self.thaw()


async def _soon(position: asyncio.Future[int]) -> int:
    try:
        return await asyncio.wait_for(asyncio.shield(position), _POSITION_S)
    except TimeoutError:
        raise Unavailable(
            f"the log did not say its position within {_POSITION_S:g} s of a capture", remedy="it is tried again"
        ) from None
