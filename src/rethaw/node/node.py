"""A node: holds the lease, takes assignments, keeps a supervisor for each session, cleans up behind them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path

from rethaw.model.enums import Reason, State
from rethaw.model.errors import Conflict, Fenced, RethawError, SnapshotUnusable
from rethaw.model.ids import new_id
from rethaw.model.types import NodeInfo, StateChange
from rethaw.node.life import Life
from rethaw.node.parts import Parts
from rethaw.node.supervisor import Supervisor

log = logging.getLogger("rethaw.node")
_COLLECT_EVERY = 60.0
_PARTIAL_AGE = 600.0
_SPARE_IMAGES = 16  # beyond those in use; sandboxes created ahead stand on some of them


def node_id(data_dir: Path) -> str:
    """The id of the node that owns `data_dir`; made at first use."""
    path = data_dir / "node-id"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(new_id("n"))
        partial.rename(path)
    return path.read_text().strip()


class Node:
    """`run` returns only by cancellation, or with Fenced when another process took this node's id."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._supervisors: dict[str, Supervisor] = {}
        self._revision = 0
        self.registered = asyncio.Event()

    async def start(self) -> None:
        """Remove what a dead process of this data directory left, then register: from here on sessions may come."""
        parts = self._parts
        await asyncio.to_thread(parts.store.open)
        swept = await parts.engines.sweep_orphans()
        if swept:
            log.info("removed %d sandboxes of an earlier process", swept)
        if parts.store.remote is not None:
            await parts.store.remote.start()
        await parts.gateway.start()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        await parts.control.register_node(
            NodeInfo(
                id=parts.node,
                incarnation=parts.incarnation,
                data_dir=str(parts.data_dir),
                engines=parts.engines.names,
                memory_bytes=memory,
            )
        )
        self.registered.set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._renew())
            group.create_task(self._take())
            group.create_task(self._collect())
            group.create_task(self._offer())

    async def stop(self) -> None:
        """In order: each session is saved and told `node_stopped`, so that it resumes when the node is back."""
        await asyncio.gather(*(self._put_down(s) for s in self._supervisors.values()), return_exceptions=True)
        await self._parts.gateway.close()
        await self._parts.engines.close()
        if self._parts.store.remote is not None:
            await self._parts.store.remote.close()
        await self._parts.store.close_lazy()
        self._parts.store.close()

    async def _put_down(self, supervisor: Supervisor) -> None:
        life = supervisor.life
        try:
            if life is not None and not life.ended.done():
                control = self._parts.control
                await supervisor.suspending(life, Reason.NODE_STOPPED)
                await life.saver.save("suspend", run_on=False)
                waits = life.calls.unanswered()
                change = StateChange(state=State.SUSPENDED, reason=Reason.NODE_STOPPED, waits=waits)
                await control.report(life.fence, change)
        except (RethawError, OSError) as error:
            log.warning("session %s: not suspended: %s; it comes back as after a crash", supervisor.session, error)
        await supervisor.close()

    def life(self, session: str) -> Life | None:
        """The running life of `session`, if it is here."""
        supervisor = self._supervisors.get(session)
        return None if supervisor is None else supervisor.life

    def cpu_s(self, session: str) -> float | None:
        """CPU seconds that the sandbox of `session` has used; None when it has none here."""
        supervisor = self._supervisors.get(session)
        life = supervisor.life if supervisor is not None else None
        return None if life is None else life.sandbox.cpu_s()

    async def usage(self) -> dict[str, tuple[float, int]]:
        """CPU seconds and bytes of memory of each session's sandbox here."""
        boxes = {s.session: s.life.sandbox for s in self._supervisors.values() if s.life is not None}

        def cpu() -> dict[str, float]:
            return {session: box.cpu_s() for session, box in boxes.items()}

        used = await asyncio.to_thread(cpu)
        return {session: (used[session], await box.memory()) for session, box in boxes.items()}

    def crash_sandbox(self, session: str) -> None:
        """SIGKILL the sandbox of `session`. Raises Conflict when it has none here."""
        supervisor = self._supervisors.get(session)
        if supervisor is None or supervisor.life is None:
            raise Conflict(f"session {session} has no running sandbox", remedy="look at its state with rethaw show")
        supervisor.life.sandbox.kill()

    # ------------------------------------------------------------ loops

    async def _renew(self) -> None:
        wait = 1.0
        while True:
            await asyncio.sleep(wait)
            try:
                lease = await self._parts.control.renew_lease(self._parts.node, self._parts.incarnation)
                wait = lease.seconds / 3
            except Fenced:
                raise
            except RethawError as error:
                log.warning("the lease could not be renewed: %s", error)
                wait = 1.0

    async def _take(self) -> None:
        parts = self._parts
        while True:
            try:
                found = await parts.control.assignments(
                    parts.node, parts.incarnation, self._revision, parts.timing.poll
                )
            except Fenced:
                raise
            except RethawError as error:
                log.warning("no assignments: %s", error)
                await asyncio.sleep(1.0)
                continue
            for assignment in found:
                self._revision = max(self._revision, assignment.revision)
                supervisor = self._supervisors.get(assignment.session)
                if supervisor is None:
                    supervisor = Supervisor(parts, assignment.session, self._forget)
                    self._supervisors[assignment.session] = supervisor
                supervisor.assign(assignment)

    def _forget(self, session: str) -> None:
        supervisor = self._supervisors.pop(session, None)
        if supervisor is not None:
            task = asyncio.ensure_future(supervisor.close())
            task.add_done_callback(lambda _: None)

    async def _offer(self) -> None:
        """What an earlier process did not upload: its own list may have been lost with the power."""
        parts = self._parts
        while parts.store.remote is not None:
            try:
                for info in await parts.catalog.not_uploaded(parts.node):
                    with contextlib.suppress(SnapshotUnusable):
                        await parts.store.upload_later(info)
                return
            except (RethawError, OSError) as error:
                log.info("uploads are offered again later: %s", error)
                await asyncio.sleep(_COLLECT_EVERY)

    async def _collect(self) -> None:
        """Snapshots that retention gave up, and files that no row knows (a save that died half-way)."""
        parts = self._parts
        while True:
            await asyncio.sleep(_COLLECT_EVERY)
            try:
                for info in await parts.catalog.superfluous(parts.node):
                    await parts.store.delete(info.id)
                    await parts.catalog.forget(info.id)
                builds, images = await parts.catalog.needed(parts.node)
                lives = {s.life.image for s in self._supervisors.values() if s.life is not None}
                shared = "RETHAW_IMAGES" in os.environ  # then others use that directory too
                if not shared:
                    await parts.images.prune(images | lives, spare=_SPARE_IMAGES)
                await parts.engines.prune(builds, None if shared else images | lives)
                await parts.store.collect(await parts.catalog.ids(parts.node), _PARTIAL_AGE)
            except RethawError as error:
                log.info("nothing collected: %s", error)
