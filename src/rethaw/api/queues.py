"""Routes of queues: limits, pausing, who waits."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, StrictInt

from rethaw.api import models
from rethaw.api.rooms import Rooms
from rethaw.model.queue_types import Queue


class QueueBody(BaseModel):
    """What is not there stays as it is; null lifts a limit."""

    model_config = ConfigDict(extra="forbid")

    limit: StrictInt | None = None
    key_limit: StrictInt | None = None
    suspended: Literal["count", "free"] = "count"


class Queues(BaseModel):
    queues: list[Queue]


def router(rooms: Rooms) -> APIRouter:
    api = APIRouter(prefix="/v1/queues", responses=models.ERRORS, tags=["queues"])
    queues = rooms.control.queues

    @api.get("")
    async def find() -> Queues:
        """Those that are set, and those that unfinished sessions are in."""
        return Queues(queues=await queues.every())

    @api.get("/{name}")
    async def show(name: str) -> Queue:
        return await queues.get(name)

    @api.put("/{name}")
    async def set_(name: str, body: QueueBody) -> Queue:
        """Make it, or change it. What runs already goes on."""
        changes: dict[str, Any] = {field: getattr(body, field) for field in body.model_fields_set}
        return await queues.change(name, changes)

    @api.post("/{name}/pause")
    async def pause(name: str, body: models.EmptyBody | None = None) -> Queue:
        """Nothing starts from it until it is resumed."""
        return await queues.change(name, {"paused": True})

    @api.post("/{name}/resume")
    async def resume(name: str, body: models.EmptyBody | None = None) -> Queue:
        return await queues.change(name, {"paused": False})

    @api.delete("/{name}")
    async def remove(name: str) -> Queue:
        """Its limits go."""
        return await queues.remove(name)

    _ = (find, show, set_, pause, resume, remove)
    return api
