"""The route of `rethaw top`."""

from __future__ import annotations

import os
import time
from typing import Annotated

from fastapi import APIRouter, Query

from rethaw.api import models
from rethaw.api.rooms import Rooms
from rethaw.model.loads import MachineLoad, SessionLoad


def router(rooms: Rooms) -> APIRouter:
    api = APIRouter(prefix="/v1/top", responses=models.ERRORS, tags=["server"])

    @api.get("")
    async def top(limit: Annotated[int, Query(ge=1, le=1000)] = 200, ended: bool = False) -> MachineLoad:
        """What sessions take of their machine right now. Newest first; `ended`: those that have ended too."""
        found, states = await rooms.control.loads(limit, ended)
        used = await rooms.usage() if rooms.usage is not None else {}
        clock = time.monotonic()
        sessions: list[SessionLoad] = []
        for fields in found:
            cpu_s, memory = used.get(fields["id"], (None, None))
            sessions.append(SessionLoad(**fields, cpu_s=cpu_s, memory_bytes=memory))
        return MachineLoad(
            clock_s=clock,
            cpus=os.cpu_count() or 1,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            states=states,
            sessions=sessions,
        )

    _ = top
    return api
