"""Carries out what control assigns for one session: start, restore, suspend, cancel, kill, crash, snapshot.

Assignments and what the session itself asks for (to be suspended because it waits) go through one queue, one at a time.
Starting and restoring end in the same place: a `Life` that is watched until it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from rethaw.engines.base import Sandbox, SandboxSpec
from rethaw.gateway.gateway import SessionGateway
from rethaw.model import faults
from rethaw.model.enums import EventType, Reason, State
from rethaw.model.errors import (
    Conflict,
    EngineError,
    Fenced,
    ImageError,
    InvalidInput,
    RethawError,
    SnapshotUnusable,
    Unavailable,
)
from rethaw.model.types import AgentSpec, Assignment, Fence, NewEvent, SnapshotInfo, StateChange
from rethaw.node import loading
from rethaw.node.boot import start_config
from rethaw.node.life import Life
from rethaw.node.naps import Stretch
from rethaw.node.parts import Parts

log = logging.getLogger("rethaw.node")
_LOOK_S = 0.25  # CPU time is counted in steps of 10 ms
_BUSY = 0.1  # of one CPU; a guest that only waits uses less than 0.01


@dataclass(frozen=True)
class _Freeze:
    """The session's own wish to be suspended."""

    life: Life
    reason: Reason


class Supervisor:
    """One per session that this node knows. `on_final` is called once the session is over and nothing is left of it."""

    def __init__(self, parts: Parts, session: str, on_final: Callable[[str], None]) -> None:
        self._parts = parts
        self.session = session
        self._on_final = on_final
        self._queue: asyncio.Queue[Assignment | _Freeze] = asyncio.Queue()
        self._life: Life | None = None
        self._gateway: SessionGateway | None = None
        self._fence: Fence | None = None  # of the newest life, also while frozen
        self._frozen_for: Reason | None = None
        self._cancelling = False
        self._stretch: Stretch | None = None  # in which nothing of an agent with naps is seen
        self._reported = State.STARTING
        self._reporting = asyncio.Lock()  # a late "waiting" would undo a "suspending"
        self._changed = asyncio.Event()
        self._seen: set[tuple[str, str]] = set()
        self._tasks = [asyncio.ensure_future(self._run()), asyncio.ensure_future(self._watch())]
        self._ends: set[asyncio.Task[None]] = set()

    @property
    def life(self) -> Life | None:
        return self._life

    def assign(self, assignment: Assignment) -> None:
        """Queue an assignment; one that was taken already is ignored (they are repeated until the state moves)."""
        mark = (assignment.generation, f"{assignment.action}:{assignment.revision}")
        if mark not in self._seen:
            self._seen.add(mark)
            self._queue.put_nowait(assignment)

    async def close(self) -> None:
        """The node stops: let go of the sandbox without a word to control."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._life is not None:
            await self._life.close()
            self._life = None

    # ------------------------------------------------------------ the queue

    async def _run(self) -> None:
        while True:
            item = await self._queue.get()
            try:
                if isinstance(item, _Freeze):
                    await self._freeze(item)
                else:
                    await self._carry_out(item)
            except Fenced as error:
                log.info("session %s: %s", self.session, error)
            except RethawError as error:
                log.warning("session %s: %s: %s", self.session, getattr(item, "action", "suspend"), error)
            except Exception:
                log.exception("session %s: %s failed", self.session, getattr(item, "action", "suspend"))

    async def _carry_out(self, a: Assignment) -> None:
        log.info("session %s: %s (generation %s, attempt %d)", self.session, a.action, a.generation[:8], a.attempt)
        life = self._life
        if a.action in ("start", "restore"):
            self._fence = Fence(session=self.session, generation=a.generation)
            if life is not None:
                await self._drop(life)
            await self._begin(a)
        elif a.action == "suspend":
            if life is not None:
                await self._freeze(_Freeze(life, Reason.REQUESTED))
        elif a.action == "cancel":
            await self._cancel(a, life)
        elif a.action == "kill":
            if life is not None:
                await self._drop(life)
            await self._final(self._fence)
        elif a.action == "crash":
            if life is not None:
                life.sandbox.kill()
        elif a.action == "limits":
            self._session_gateway(a.agent)
        elif life is not None:
            try:
                await life.saver.save("requested")
            except (RethawError, OSError) as error:
                await life.saver.note_failure(error)

    # ------------------------------------------------------------ to life

    async def _begin(self, a: Assignment) -> None:
        fence = Fence(session=self.session, generation=a.generation)
        self._fence, self._frozen_for, self._cancelling = fence, None, False
        started = time.monotonic()
        try:
            if a.action == "start":
                life = await self._boot(a)
                event = NewEvent(
                    type=EventType.ATTEMPT_STARTED,
                    data={
                        "attempt": a.attempt,
                        "fresh": bool(a.boot and a.boot.fresh),
                        "engine": self._parts.engines.of(a.agent.engine).name,
                    },
                    key=f"attempt:{a.generation}",
                )
            else:
                life = await self._restore(a)
                event = NewEvent(
                    type=EventType.SNAPSHOT_RESTORED,
                    data={
                        "snapshot": a.snapshot.id if a.snapshot else None,
                        "generation": a.generation,
                        "resume_ms": round((time.monotonic() - started) * 1000, 2),
                    },
                    key=f"restored:{a.generation}",
                )
        except ImageError as error:
            await self._parts.control.report_death(fence, Reason.IMAGE_FAILED, str(error))
            return
        except SnapshotUnusable as error:
            assert a.snapshot is not None
            await self._parts.control.report_unusable(fence, a.snapshot.id, str(error))
            return
        except EngineError as error:
            if a.snapshot is not None and a.action == "restore":
                await self._parts.control.report_unusable(fence, a.snapshot.id, str(error))
            else:
                await self._parts.control.report_death(fence, Reason.BOOT_FAILED, str(error))
            return
        except Fenced:
            raise
        except Unavailable as error:  # the database's fault, not the agent's
            await self._until_heard(fence, Reason.NODE_LOST, str(error))
            return
        except (RethawError, OSError) as error:
            await self._parts.control.report_death(fence, Reason.BOOT_FAILED, str(error))
            return
        try:
            async with self._reporting:
                await self._parts.control.report(fence, StateChange(state=State.RUNNING, events=(event,)))
                self._reported = State.RUNNING
        except RethawError:
            await self._drop(life)
            raise
        self._changed.set()  # what the restored guest waits for was heard before this life was watched
        faults.point("supervisor.running")

    async def _sandbox_spec(self, agent: AgentSpec, snapshot: SnapshotInfo | None) -> SandboxSpec:
        def progress(line: str) -> None:
            log.info("image of %s: %s", agent.name, line)

        images = self._parts.images
        code = self._parts.data_dir / "code" / f"{agent.code}.tar.gz" if agent.code else None
        if code is not None and not code.exists():
            raise ImageError(f"the code archive {agent.code} is not on this node", remedy="start the agent again")
        if snapshot is not None and (known := await images.rootfs(snapshot.image)) is not None:
            digest, rootfs = snapshot.image, known
        else:
            try:
                built = await images.ensure(agent.image, progress)
            except InvalidInput as error:
                raise ImageError(error.message, remedy=error.remedy) from error
            digest, rootfs = await images.compose(built, code)
        if snapshot is not None and digest != snapshot.image:
            raise SnapshotUnusable(
                f"snapshot {snapshot.id} needs image {snapshot.image[:12]}, this node can only make {digest[:12]}",
                remedy="boot the session fresh",
            )
        return await self._parts.sandbox_spec(digest, rootfs, agent.memory_bytes, agent.pids)

    def _session_gateway(self, agent: AgentSpec) -> SessionGateway:
        if self._gateway is None:
            self._gateway = self._parts.gateway.session(self.session, agent)
        self._gateway.agent = agent  # of another version by now, perhaps
        return self._gateway

    async def _boot(self, a: Assignment) -> Life:
        faults.point("supervisor.boot")
        spec = await self._sandbox_spec(a.agent, None)
        engine = self._parts.engines.of(a.agent.engine)
        sandbox = await engine.boot(spec)
        life = self._new_life(a, sandbox, spec)
        try:
            life.gateway.attach(life.fence, a.attempt, life.saver, self, branch=a.branch)
            await life.gateway.restored(None)
            await life.link.start(await asyncio.to_thread(start_config, a, self._parts.providers, spec.rootfs))
        except BaseException:
            await life.close()
            raise
        self._adopt(life)
        await engine.prepare(spec, self._parts.ahead)
        return life

    async def _restore(self, a: Assignment) -> Life:
        assert a.snapshot is not None
        faults.point("supervisor.restore")
        spec = await self._sandbox_spec(a.agent, a.snapshot)
        engine = self._parts.engines.of(a.snapshot.engine)
        store = self._parts.store
        loaded = await loading.sections(store, a.snapshot, engine.lazy, lambda: not self._queue.empty())
        try:
            faults.point("supervisor.loaded")
            sandbox = await engine.restore(
                spec,
                loaded.sections,
                build=a.snapshot.engine_build,
                cpu=a.snapshot.cpu,
                clock=a.snapshot.clock,
                lazy=loaded.lazy,
            )
        finally:
            loaded.done()
        faults.point("supervisor.restored")
        life = self._new_life(a, sandbox, spec)
        try:
            life.gateway.attach(life.fence, a.attempt, life.saver, self, branch=a.branch)
            await life.gateway.restored(a.snapshot.id)
            await life.link.resume(a.snapshot.resync, a.generation, session=a.session)
        except BaseException:
            await life.close()
            raise
        self._adopt(life)
        await engine.prepare(spec, self._parts.ahead)
        return life

    def _new_life(self, a: Assignment, sandbox: Sandbox, spec: SandboxSpec) -> Life:
        return Life(
            self._parts,
            a,
            sandbox,
            self._session_gateway(a.agent),
            spec.image_digest,
            on_exit=self._exited,
            changed=self._changed.set,
        )

    def _adopt(self, life: Life) -> None:
        self._life = life
        life.watch()
        task = asyncio.ensure_future(self._await_end(life))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def _await_end(self, life: Life) -> None:
        end = await asyncio.shield(life.ended)
        if end is None:
            return
        reason, detail = end
        log.info("session %s: %s: %s", self.session, reason, detail)
        if self._life is life:
            self._life = None
        await life.close()
        if reason is not Reason.FENCED:
            try:
                await self._until_heard(life.fence, reason, detail)
            except Fenced as error:
                log.info("session %s: %s", self.session, error)

    async def _until_heard(self, fence: Fence, reason: Reason, detail: str) -> None:
        while True:
            try:
                await self._parts.control.report_death(fence, reason, detail)
                return
            except Fenced:
                raise
            except RethawError as error:
                log.warning("session %s: report_death: %s", self.session, error)
                await asyncio.sleep(1.0)

    async def _drop(self, life: Life) -> None:
        if self._life is life:
            self._life = None
        await life.close()

    # ------------------------------------------------------------ to sleep

    async def _freeze(self, wish: _Freeze) -> None:
        """Suspend: save, hold the guest quiet, tell control, destroy. A failure or a change of mind lets it run on."""
        life, control = wish.life, self._parts.control
        if life is not self._life or life.ended.done() or not self._still_wanted(wish):
            return
        await self.suspending(life, wish.reason)
        try:
            await life.saver.save("suspend", run_on=False)
        except Fenced:
            life.end(Reason.FENCED, "fenced while suspending")
            return
        except (RethawError, OSError) as error:
            log.warning("session %s: suspending failed, the agent runs on: %s", self.session, error)
            life.active()
            if not life.ended.done():
                await life.saver.note_failure(error)
                await self._report_running(life)
            return
        faults.point("supervisor.suspended")
        try:
            if not self._still_wanted(wish):  # it went on before it was quiet: nothing would wake it
                raise Conflict("what it waited for has come")
            change = StateChange(state=State.SUSPENDED, reason=wish.reason, waits=life.calls.unanswered())
            await control.report(life.fence, change)
        except Conflict as error:
            log.info("session %s: not suspended: %s", self.session, error)
            await life.saver.thaw()
            life.active()
            await self._report_running(life)
            return
        self._frozen_for = wish.reason
        faults.point("supervisor.released")
        life.dials.close("the session was suspended")
        await self._drop(life)
        if wish.reason is Reason.PROVIDER_HOLD and not life.gateway.held():
            await control.wake(life.fence, Reason.PROVIDER_HOLD)

    async def suspending(self, life: Life, reason: Reason) -> None:
        """Tell that it is being suspended, after which nobody tells any more that it waits."""
        async with self._reporting:
            await self._parts.control.report(life.fence, StateChange(state=State.SUSPENDING, reason=reason))
            self._reported = State.SUSPENDING

    def _still_wanted(self, wish: _Freeze) -> bool:
        if wish.reason is Reason.PROVIDER_HOLD:
            return wish.life.gateway.held()
        if wish.reason is Reason.NAP:
            return self._stretch is not None and self._stretch.lasts(wish.life)
        return wish.reason is not Reason.IDLE or wish.life.idle_since() is not None

    async def _report_running(self, life: Life) -> None:
        async with self._reporting:
            if self._life is life and not life.ended.done():
                await self._parts.control.report(life.fence, StateChange(state=State.RUNNING))
                self._reported = State.RUNNING
        self._changed.set()

    async def _watch(self) -> None:
        """A defect must not keep the session awake for ever."""
        while True:
            try:
                await self._watch_idle()
            except Exception:
                log.exception("session %s: its idleness is watched anew", self.session)
                await asyncio.sleep(1.0)

    async def _watch_idle(self) -> None:
        """Reports waiting and running as they alternate, and asks for a freeze when a wait lasts."""
        timing = self._parts.timing
        pause: float | None = None
        busy: float | None = None  # since when it is, after it was told that it waits
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), pause)
            self._changed.clear()
            life, pause = self._life, None
            if life is None or life.ended.done() or life.saver.frozen or self._reported is State.SUSPENDING:
                pause = 0.5 if life is not None else None
                continue
            since, now = life.idle_since(), time.monotonic()
            life.saver.idle = since is not None and since <= now
            state = State.RUNNING
            if since is not None:
                state = State.WAITING if now - since >= timing.wait_report else self._reported
                pause = timing.wait_report
                freeze = life.agent.idle_suspend_s
                if freeze is not None and now - since >= freeze:
                    if await self._computes(life):
                        life.last_active = time.monotonic()
                        pause = max(freeze, _LOOK_S)
                    elif life.idle_since() != since:
                        pause = 0.01
                    else:
                        self._ask_freeze(life, Reason.IDLE)
                        pause = 5.0
                elif state is State.WAITING:
                    pause = None if freeze is None else max(0.01, since + freeze - now)
            elif life.agent.nap_s is not None:
                pause = await self._look_for_nap(life)
            if state is not State.RUNNING or self._reported is not State.WAITING:
                busy = None
            elif now - (busy := busy or now) < timing.run_report:  # what it says first must not wait for this
                pause = busy + timing.run_report - now
                continue
            if state is not self._reported:
                await self._report_quietly(life, state)

    async def _look_for_nap(self, life: Life) -> float:
        """Asks for a nap once nothing of the agent was seen for long enough. Seconds until the next look."""
        if self._stretch is None or not self._stretch.lasts(life):
            self._stretch = Stretch(life)
        left = self._stretch.left(life)
        if left > 0:
            return left
        if self._stretch.computed(life, _BUSY) or await self._computes(life):
            life.last_active = time.monotonic()
            return _LOOK_S
        if self._stretch.lasts(life):
            self._ask_freeze(life, Reason.NAP)
            return 5.0
        return 0.01

    def _ask_freeze(self, life: Life, reason: Reason) -> None:
        """Nothing of the agent was seen for long enough. A key that it was given before that is no reason to wake it."""
        if life.terminal is not None:
            life.terminal.heard()
        self._queue.put_nowait(_Freeze(life, reason))

    async def _computes(self, life: Life) -> bool:
        """Whether the guest is busy beside its waits: a thread may listen for messages while another one runs tests."""
        before, began = life.sandbox.cpu_s(), time.monotonic()
        await asyncio.sleep(_LOOK_S)
        used = life.sandbox.cpu_s() - before
        return used > _BUSY * (time.monotonic() - began)

    async def _report_quietly(self, life: Life, state: State) -> None:
        try:
            async with self._reporting:
                if self._life is life and self._reported in (State.RUNNING, State.WAITING):
                    await self._parts.control.report(life.fence, StateChange(state=state))
                    self._reported = state
                    life.sandbox.rest(state is State.WAITING)
        except Fenced as error:
            life.end(Reason.FENCED, str(error))
        except RethawError as error:
            log.info("session %s: %s", self.session, error)

    # ------------------------------------------------------------ the gateway's hooks

    def held(self, exchange: str, until: float) -> None:
        """The provider said "later": freeze the agent soon, unless an answer comes first."""
        life = self._life
        if life is not None and life.agent.idle_suspend_s is not None and until - time.time() > 0:
            life.spawn(self._freeze_held(life))

    async def _freeze_held(self, life: Life) -> None:
        await asyncio.sleep(self._parts.timing.hold_freeze)
        while life.gateway.held():
            if life.dials.quiet():
                self._queue.put_nowait(_Freeze(life, Reason.PROVIDER_HOLD))
                return
            await asyncio.sleep(self._parts.timing.hold_freeze)

    def answered(self, exchange: str) -> None:
        """A held provider has answered: thaw."""
        if self._frozen_for is Reason.PROVIDER_HOLD and self._fence is not None:
            self._frozen_for = None
            task = asyncio.ensure_future(self._wake(self._fence))
            self._ends.add(task)
            task.add_done_callback(self._ends.discard)

    async def _wake(self, fence: Fence) -> None:
        try:
            await self._parts.control.wake(fence, Reason.PROVIDER_HOLD)
        except RethawError as error:
            log.info("session %s: wake: %s", self.session, error)

    # ------------------------------------------------------------ to an end

    async def _exited(self, life: Life, code: int | None, signal: int | None, detail: str | None) -> None:
        """The agent's process ended by itself."""
        await life.outputs.drained(5.0)
        if life.sandbox.out_of_memory():
            # Not by itself: its death is told by the sandbox's end.
            life.sandbox.kill()
            return
        await life.egress.close("the program ended")
        life.dials.close("the session's program ended")
        await life.gateway.flush()
        await life.gateway.attempt_ended()
        faults.point("supervisor.exited")
        exit_code = code if code is not None else 128 + (signal or 0)
        event = NewEvent(
            type=EventType.ATTEMPT_EXITED,
            data={"exit_code": exit_code, "signal": signal, "detail": detail},
            key=f"exited:{life.attempt}",
        )
        if self._cancelling:
            state, reason = State.CANCELLED, Reason.CANCELLED
        else:
            state = State.COMPLETED if exit_code == 0 else State.FAILED
            reason = Reason.EXITED
            if detail:  # guestd could not run it: 127 when it is not there, 126 for anything else
                reason = Reason.COMMAND_NOT_FOUND if code == 127 else Reason.BOOT_FAILED
        change = StateChange(state=state, reason=reason, detail=detail, exit_code=exit_code, events=(event,))
        await self._parts.control.report(life.fence, change)
        faults.point("supervisor.final")
        life.end(None)
        task = asyncio.ensure_future(self._finish(life))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def _finish(self, life: Life) -> None:
        await self._drop(life)
        await self._final(life.fence)

    async def _final(self, fence: Fence | None) -> None:
        """The life under `fence` was the last one; unless a rewind has begun another meanwhile."""
        if self._fence == fence and self._gateway is not None:
            gateway, self._gateway = self._gateway, None
            await gateway.close()
        if self._fence == fence and self._queue.empty():
            self._on_final(self.session)

    async def _cancel(self, a: Assignment, life: Life | None) -> None:
        if life is None:
            return
        self._cancelling = True
        grace = a.agent.grace_s
        if grace > 0:
            await life.link.signal(15)
            try:
                await asyncio.wait_for(asyncio.shield(life.ended), grace)
                return
            except TimeoutError:
                log.info("session %s: did not end within %.0f s of SIGTERM", self.session, grace)
        change = StateChange(state=State.CANCELLED, reason=Reason.CANCELLED, exit_code=137)
        await self._parts.control.report(life.fence, change)
        await self._drop(life)
        await self._final(life.fence)
