"""Routes of templates: warm one, start sessions from it, list, remove."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from rethaw.api import models
from rethaw.api.rooms import Rooms
from rethaw.control.templates import AUTO, START
from rethaw.model.enums import EventType, ExchangeState, State
from rethaw.model.errors import Conflict, InvalidInput, WaitTimeout
from rethaw.model.types import AgentSpec, SessionView, StartOptions, Template

_LOOK_S = 0.2
_QUIET_S = 1.0
_QUIET_CPU = 0.02  # of one CPU
_SUSPEND_S = 60.0
_LINE = b"rethaw-ready"


class TemplateBody(BaseModel):
    """`by`: what makes it ready, the first of all when not said. `within_s`: it must be ready by then."""

    model_config = ConfigDict(extra="forbid")

    name: str
    agent: AgentSpec
    args: dict[str, Any] = Field(default_factory=dict[str, Any])
    by: Literal["call", "line", "quiet"] | None = None
    within_s: float = Field(300.0, gt=0, le=3600)


class TemplateStart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    args: dict[str, Any] = Field(default_factory=dict[str, Any])
    key: str | None = None
    options: StartOptions = Field(default_factory=StartOptions)


class Templates(BaseModel):
    templates: list[Template]


def router(rooms: Rooms) -> APIRouter:
    api = APIRouter(prefix="/v1/templates", responses=models.ERRORS, tags=["templates"])
    control = rooms.control

    @api.post("", status_code=201)
    async def create(body: TemplateBody) -> Template:
        """Warm an agent and keep it so. Answers when it is ready; asking again goes on with one that was cut off."""
        if body.name.startswith(AUTO):
            raise InvalidInput(
                f"template {body.name[:100]!r}: names that begin with {AUTO!r} are given by the server",
                remedy="choose another",
            )
        rooms.must_have(body.agent)
        template = await control.warm.create(body.name, body.agent, body.args)
        if template.snapshot is not None:
            return template
        try:
            async with asyncio.timeout(body.within_s):
                by = await until_ready(rooms, template, body.by)
        except TimeoutError:
            raise WaitTimeout(
                f"template {body.name} was not ready within {body.within_s:g} s",
                remedy=f"see `rethaw logs {template.session}`; ask again to wait longer",
            ) from None
        return await control.warm.ready(template, await suspended(rooms, template.session), by)

    @api.get("")
    async def find() -> Templates:
        return Templates(templates=await control.warm.every())

    @api.post("/{name}/sessions", status_code=201)
    async def start(name: str, body: TemplateStart, response: Response) -> SessionView:
        """A session that goes on where the template stands."""
        view, new = await control.warm.start(name, json.dumps(body.args).encode(), body.key, body.options)
        response.status_code = 201 if new else 200
        return view

    @api.delete("/{name}")
    async def remove(name: str) -> Template:
        """The name goes. Its session goes too unless others were forked from it."""
        return await control.warm.drop(name)

    _ = (create, find, start, remove)
    return api


async def until_ready(rooms: Rooms, template: Template, by: str | None) -> str:
    """By what the program is ready: "call", "line" or "quiet"."""
    session, after, said = template.session, 0, b""
    quiet = _Quiet(rooms, session)
    while True:
        view = await rooms.control.session(session)
        for event in await rooms.log.read(session, after, 1000, [EventType.WAIT_OPENED, EventType.OUTPUT]):
            after = event.seq
            if event.type is EventType.WAIT_OPENED and event.data.get("name") == START and by in (None, "call"):
                return "call"
            if event.type is EventType.OUTPUT and event.data.get("stream") == "stdout":
                said = (said + (event.body or b""))[-(1 << 16) :]
                if _LINE in said.split(b"\n")[:-1] and by in (None, "line"):
                    return "line"
        if view.state.final:
            raise Conflict(
                f"the program of template {template.name} ended ({view.state.value}) before it was ready",
                remedy=f"see `rethaw logs {session}`",
            )
        if by in (None, "quiet") and (view.state is State.SUSPENDED or await quiet.look(view)):
            return "quiet"
        await asyncio.sleep(_LOOK_S)


class _Quiet:
    """No event, no CPU and no open call for a second."""

    def __init__(self, rooms: Rooms, session: str) -> None:
        self._rooms = rooms
        self._session = session
        self._mark: tuple[int, float, float] | None = None  # last seq, CPU seconds, when

    async def look(self, view: SessionView) -> bool:
        cpu = self._rooms.cpu(self._session) if self._rooms.cpu is not None else None
        if cpu is None or view.state not in (State.RUNNING, State.WAITING):
            self._mark = None
            return False
        now = time.monotonic()
        if self._mark is not None:
            seq, used, since = self._mark
            if view.last_seq == seq and cpu - used <= _QUIET_CPU * max(_QUIET_S, now - since):
                if now - since < _QUIET_S:
                    return False
                calls = await self._rooms.log.list_exchanges(self._session)
                return not any(call.state is ExchangeState.OPEN for call in calls)
        self._mark = (view.last_seq, cpu, now)
        return False


async def suspended(rooms: Rooms, session: str) -> str:
    """Suspend it; the snapshot that it sleeps in."""
    await rooms.control.suspend(session)
    end = time.monotonic() + _SUSPEND_S
    while True:
        view = await rooms.control.session(session)
        if view.state is State.SUSPENDED and view.snapshot is not None:
            return view.snapshot
        if view.state.final or time.monotonic() > end:
            raise Conflict(
                f"session {session} of the template is {view.state.value}, not suspended",
                remedy=f"see `rethaw events {session}`",
            )
        await asyncio.sleep(0.05)
