"""`Client().agents`: versions of agents by name. And `Agent.from_name`, and upgrades of sessions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rethaw.model.errors import InvalidInput, NotFound
from rethaw.model.starting import DEFAULT_QUEUE
from rethaw.model.types import AgentSpec
from rethaw.model.versions import FILES, AgentDetail, AgentVersion, Upgraded
from rethaw.sdk.calls import Call, path, to_json
from rethaw.sdk.starting import Starting

if TYPE_CHECKING:
    from rethaw.sdk.aclient import AsyncClient
    from rethaw.sdk.agents import Agent
    from rethaw.sdk.client import Client

TAKES_S = 90.0  # a snapshot is taken before an upgrade


def _wire(cls: Any, values: dict[str, Any]) -> Any:
    return cls.model_validate_json(json.dumps({k: v for k, v in values.items() if k in cls.model_fields}))


def _version(body: bytes) -> AgentVersion:
    return cast("AgentVersion", _wire(AgentVersion, json.loads(body)))


def _deploy(agent: AgentSpec, starting: Starting) -> Call[tuple[AgentVersion, bool]]:
    def read(body: bytes) -> tuple[AgentVersion, bool]:
        values = json.loads(body)
        return cast("AgentVersion", _wire(AgentVersion, values["version"])), bool(values["new"])

    content = b'{"agent":%b,"starting":%b}' % (agent.model_dump_json().encode(), to_json(starting.wire()))
    return Call("POST", path("agents"), read, content=content)


def _list() -> Call[list[AgentVersion]]:
    return Call("GET", path("agents"), lambda b: [_wire(AgentVersion, row) for row in json.loads(b)["agents"]])


def _show(name: str) -> Call[AgentDetail]:
    return Call("GET", path("agents", name), lambda b: cast("AgentDetail", _wire(AgentDetail, json.loads(b))))


def _get(name: str, version: int | None) -> Call[AgentVersion]:
    params = {} if version is None else {"number": str(version)}
    return Call("GET", path("agents", name, "version"), _version, params=params)


def _pin(name: str, version: int | None) -> Call[AgentVersion]:
    return Call("POST", path("agents", name, "pin"), _version, content=to_json({"version": version}))


def upgrade(session: str, to: int | None, agent: AgentSpec | None, from_seq: int | None, files: str) -> Call[Upgraded]:
    """The call of `Sessions.upgrade`."""
    if files not in FILES:
        raise InvalidInput(f"files {files!r} is unknown", remedy=f"use {' or '.join(FILES)}")
    body = to_json({"to": to, "from_seq": from_seq, "files": files})
    if agent is not None:
        body = body[:-1] + b',"agent":%b}' % agent.model_dump_json().encode()
    return Call(
        "POST",
        path("sessions", session, "upgrade"),
        lambda b: cast("Upgraded", _wire(Upgraded, json.loads(b))),
        content=body,
        wait_s=TAKES_S,
    )


def found(agent: Agent[..., Any] | Path | str) -> Agent[..., Any]:
    """An agent as it is, or what a file (FILE.py or FILE.py::NAME) defines."""
    from rethaw.sdk.agents import Agent, find

    if isinstance(agent, Agent):
        return agent
    file, _, name = str(agent).partition("::")
    return find(file, name or None)


def parse(text: str) -> tuple[str, int | None]:
    """NAME or NAME@VERSION. Raises InvalidInput."""
    name, at, version = text.partition("@")
    if not name or (at and not version.isdecimal()):
        raise InvalidInput(f"{text!r} names no agent", remedy="write NAME or NAME@VERSION, like researcher@2")
    return name, int(version) if at else None


class Agents:
    """By name."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def deploy(self, agent: Agent[..., Any] | Path | str) -> tuple[AgentVersion, bool]:
        """Upload and register a version of an agent (or of the one that FILE.py[::NAME] defines): starts by its name take it
        from now on, unless another one is pinned. Whether it was not deployed before."""
        one = found(agent)
        return self._client.run(_deploy(one.uploaded(self._client), one.options.starting))

    def list(self) -> list[AgentVersion]:
        """The current version of each agent, by name."""
        return self._client.run(_list())

    def show(self, name: str) -> AgentDetail:
        """Its versions, newest first, and which sessions run which. Raises NotFound."""
        return self._client.run(_show(name))

    def get(self, name: str, version: int | None = None) -> AgentVersion:
        """`version`, or what a start by name takes. Raises NotFound."""
        return self._client.run(_get(name, version))

    def pin(self, name: str, version: int) -> AgentVersion:
        """Starts by name take `version`, whatever is deployed later."""
        return self._client.run(_pin(name, version))

    def unpin(self, name: str) -> AgentVersion:
        """Starts by name take what was deployed last."""
        return self._client.run(_pin(name, None))


class AsyncAgents:
    """`Agents` with await."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def deploy(self, agent: Agent[..., Any] | Path | str) -> tuple[AgentVersion, bool]:
        """See `Agents.deploy`."""
        one = found(agent)
        return await self._client.run(_deploy(await one.uploaded_async(self._client), one.options.starting))

    async def list(self) -> list[AgentVersion]:
        """See `Agents.list`."""
        return await self._client.run(_list())

    async def show(self, name: str) -> AgentDetail:
        """See `Agents.show`."""
        return await self._client.run(_show(name))

    async def get(self, name: str, version: int | None = None) -> AgentVersion:
        """See `Agents.get`."""
        return await self._client.run(_get(name, version))

    async def pin(self, name: str, version: int) -> AgentVersion:
        """See `Agents.pin`."""
        return await self._client.run(_pin(name, version))

    async def unpin(self, name: str) -> AgentVersion:
        """See `Agents.unpin`."""
        return await self._client.run(_pin(name, None))


def named(name: str, version: int | None) -> Agent[..., Any]:
    """An agent that is known by its name alone: its code and its spec are the server's. See `Agent.from_name`."""
    from rethaw.sdk.agents import Agent, Options

    if not name:
        raise InvalidInput("'' is not an agent's name", remedy="name a deployed agent: `rethaw agent ls`")

    class Named(Agent[..., Any]):
        defined = Starting()

        def uploaded(self, client: Client) -> AgentSpec:
            return self._taken(client.agents.get(name, version))

        async def uploaded_async(self, client: AsyncClient) -> AgentSpec:
            return self._taken(await client.agents.get(name, version))

        def _taken(self, found: AgentVersion) -> AgentSpec:
            """Its spec, with what this start says of retries and of the budget in place of its own."""
            told = found.starting
            self.defined = Starting(
                queue=None if told.queue == DEFAULT_QUEUE else told.queue, priority=told.priority or None,
                delay=told.delay_s, ttl=told.ttl_s, concurrency_key=told.concurrency_key, tags=told.tags,
            )  # fmt: skip
            given = self.options.spec(command=("deployed",))
            changes = {field: getattr(given, field) for field in ("retries", "budget")}
            return found.spec.model_copy(update={k: v for k, v in changes.items() if v is not None})

        @property
        def starting(self) -> Starting:
            """Options of this start over those that it was deployed with; those are known once it is `uploaded`."""
            return self.how.over(self.defined)

        @property
        def file(self) -> Path:
            raise NotFound(f"agent {name!r} is deployed: its file is not here", remedy="import it from its file")

    def deployed(ctx: Any, **arguments: Any) -> Any:
        raise NotFound(
            f"agent {name!r} is deployed: its code is not here", remedy="start() it, or import it from its file"
        )

    deployed.__name__ = deployed.__qualname__ = name
    return Named(deployed, Options(name=name))
