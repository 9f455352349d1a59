"""Templates that are made by themselves, beside the first session of an agent whose policy wants them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from rethaw.api.rooms import Rooms
from rethaw.api.templates import suspended, until_ready
from rethaw.control.templates import auto_name
from rethaw.model.errors import RethawError
from rethaw.model.types import AgentSpec

log = logging.getLogger("rethaw.api")
_WITHIN_S = 900.0  # an image may have to be built
_AGAIN_S = 600.0  # after a failure


class Warming:
    """Sessions start as ever until a template is ready; one that cannot be made costs nothing but a line in the log."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failed: dict[str, float] = {}  # by name, when

    def begin(self, agent: AgentSpec) -> None:
        """Make the agent's template in the background, unless that is done already or has failed of late."""
        name = auto_name(agent)
        if name in self._tasks or time.monotonic() - self._failed.get(name, -_AGAIN_S) < _AGAIN_S:
            return
        task = self._tasks[name] = asyncio.ensure_future(self._make(name, agent))
        task.add_done_callback(lambda _: self._tasks.pop(name, None))

    async def _make(self, name: str, agent: AgentSpec) -> None:
        control = self._rooms.control
        try:
            template = await control.warm.create(name, agent, {})
            if template.snapshot is None:
                async with asyncio.timeout(_WITHIN_S):
                    await until_ready(self._rooms, template, "call")
                await control.warm.ready(template, await suspended(self._rooms, template.session), "call")
        except (RethawError, TimeoutError) as error:
            log.warning("no template of agent %s: %s", agent.name, error or f"not ready within {_WITHIN_S:g} s")
            self._failed[name] = time.monotonic()
            with contextlib.suppress(RethawError):
                await control.warm.drop(name)
            return
        self._failed.pop(name, None)
        with contextlib.suppress(RethawError):  # then the next version's template sees to them
            await control.warm.drop_outdated(agent)

    async def close(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
