"""Routes of agents: versions by name, and another version for a session."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from rethaw.api import models
from rethaw.api.rooms import Rooms
from rethaw.model.errors import InvalidInput, NotFound
from rethaw.model.types import AgentSpec, StartOptions
from rethaw.model.versions import AgentDetail, AgentVersion, Files, Upgraded


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DeployBody(_Body):
    agent: AgentSpec
    starting: StartOptions = Field(default_factory=StartOptions)


class Deployed(BaseModel):
    version: AgentVersion
    new: bool  # not deployed before


class PinBody(_Body):
    """`version`: what a start by name takes from now on; null: what was deployed last."""

    version: StrictInt | None


class Agents(BaseModel):
    agents: list[AgentVersion]


class UpgradeBody(_Body):
    """`to`: a version of the session's agent (null: what a start by name takes), or `agent`: a spec. `from_seq`: go on from
    this event; what came after it is left. `files`: of the last snapshot, or those of the new image alone."""

    to: StrictInt | None = None
    agent: AgentSpec | None = None
    from_seq: StrictInt | None = None
    files: Files = Field("keep")


def router(rooms: Rooms) -> APIRouter:
    api = APIRouter(prefix="/v1", responses=models.ERRORS, tags=["agents"])
    control = rooms.control

    def has_code(agent: AgentSpec) -> None:
        if agent.code is not None and not rooms.has_blob(agent.code):
            raise NotFound(f"there is no code {agent.code}", remedy="upload it to /v1/blobs first")

    @api.post("/agents", status_code=201)
    async def deploy(body: DeployBody, response: Response) -> Deployed:
        """Register a version and let starts by name take it. Repeating it is harmless."""
        has_code(body.agent)
        version, new = await control.versions.deploy(body.agent, body.starting)
        response.status_code = 201 if new else 200
        return Deployed(version=version, new=new)

    @api.get("/agents")
    async def find() -> Agents:
        """The current version of each agent."""
        return Agents(agents=await control.versions.every())

    @api.get("/agents/{name}")
    async def show(name: str) -> AgentDetail:
        return await control.versions.show(name)

    @api.get("/agents/{name}/version")
    async def version(name: str, number: int | None = None) -> AgentVersion:
        """The version `number`, or what a start by name takes."""
        return await control.versions.get(name, number)

    @api.post("/agents/{name}/pin")
    async def pin(name: str, body: PinBody) -> AgentVersion:
        """What a start by name takes from now on."""
        return await control.versions.pin(name, body.version)

    @api.post("/sessions/{session}/upgrade")
    async def upgrade(session: str, body: UpgradeBody) -> Upgraded:
        """Let the session go on with another version of its agent. Answers once its new attempt is on its way."""
        if body.agent is not None and body.to is not None:
            raise InvalidInput("both a version and an agent are given", remedy="give one of them")
        if body.agent is not None:
            has_code(body.agent)
        ident = await control.resolve(session)
        return await control.versions.upgrade(ident, body.agent, body.to, at=body.from_seq, files=body.files)

    unused: Any = (deploy, find, show, version, pin, upgrade)
    _ = unused
    return api
