"""Routes of schedules: sessions that start by the clock."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from rethaw.api import models
from rethaw.api.rooms import Rooms
from rethaw.api.warming import Warming
from rethaw.model.errors import NotFound
from rethaw.model.queue_types import Schedule, ScheduleSpec
from rethaw.model.types import SessionView


class ScheduleBody(ScheduleSpec):
    """`replace`: in the place of one of this name that differs."""

    name: str
    replace: bool = False


class Schedules(BaseModel):
    schedules: list[Schedule]


def router(rooms: Rooms, warming: Warming) -> APIRouter:
    api = APIRouter(prefix="/v1/schedules", responses=models.ERRORS, tags=["schedules"])
    schedules = rooms.control.schedules

    @api.post("", status_code=201)
    async def create(body: ScheduleBody) -> Schedule:
        """Start sessions of an agent at certain times. The same again is found, nothing happens."""
        if body.agent.code is not None and not rooms.has_blob(body.agent.code):
            raise NotFound(f"there is no code {body.agent.code}", remedy="upload it to /v1/blobs first")
        given: dict[str, Any] = {field: getattr(body, field) for field in ScheduleSpec.model_fields}
        made = await schedules.create(body.name, ScheduleSpec(**given), replace=body.replace)
        if body.agent.template == "auto":
            warming.begin(body.agent)
        return made

    @api.get("")
    async def find() -> Schedules:
        return Schedules(schedules=await schedules.every())

    @api.get("/{name}")
    async def show(name: str) -> Schedule:
        """With what became of its last times."""
        return await schedules.get(name)

    @api.post("/{name}/pause")
    async def pause(name: str, body: models.EmptyBody | None = None) -> Schedule:
        """Nothing starts until it is resumed, nor for the times that pass till then."""
        return await schedules.pause(name, True)

    @api.post("/{name}/resume")
    async def resume(name: str, body: models.EmptyBody | None = None) -> Schedule:
        return await schedules.pause(name, False)

    @api.post("/{name}/trigger", status_code=201)
    async def trigger(name: str, body: models.EmptyBody | None = None) -> SessionView:
        """A session now, beside its times."""
        return await schedules.trigger(name)

    @api.delete("/{name}")
    async def remove(name: str) -> Schedule:
        """Sessions that it started go on."""
        return await schedules.remove(name)

    _ = (create, find, show, pause, resume, trigger, remove)
    return api
