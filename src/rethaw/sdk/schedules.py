"""`Client().schedules`: sessions that start by the clock."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from rethaw.model.durations import Duration, optional_seconds
from rethaw.model.errors import InvalidInput
from rethaw.model.queue_types import Schedule
from rethaw.model.starting import check_name
from rethaw.model.types import AgentSpec, SessionView
from rethaw.sdk.agents import Agent
from rethaw.sdk.calls import Call, path, session_view, to_json
from rethaw.sdk.starting import Starting, starting

if TYPE_CHECKING:
    from rethaw.sdk.aclient import AsyncClient
    from rethaw.sdk.asession import AsyncSession
    from rethaw.sdk.client import Client
    from rethaw.sdk.session import Session

CatchUp = Literal["latest", "none", "all"]
Overlap = Literal["allow", "skip"]


def _schedule(values: dict[str, Any]) -> Schedule:
    return Schedule.model_validate_json(json.dumps({k: v for k, v in values.items() if k in Schedule.model_fields}))


def _one(body: bytes) -> Schedule:
    return _schedule(cast("dict[str, Any]", json.loads(body)))


def _list() -> Call[list[Schedule]]:
    return Call("GET", "/v1/schedules", lambda b: [_schedule(row) for row in json.loads(b)["schedules"]])


def _at(name: str, *more: str) -> str:
    return path("schedules", check_name("schedule", name), *more)


def _post(name: str, what: str) -> Call[Schedule]:
    return Call("POST", _at(name, what), _one, content=b"{}")


def _trigger(name: str) -> Call[SessionView]:
    return Call("POST", _at(name, "trigger"), session_view, content=b"{}")


class _Plan:
    """What `create` was given, checked: `code` to upload, and the call."""

    def __init__(
        self,
        name: str,
        agent: AgentSpec | Agent[..., Any],
        args: dict[str, Any],
        cron: str | None,
        every: Duration | None,
        more: dict[str, Any],
        how: Starting,
    ) -> None:
        check_name("schedule", name)
        if (cron is None) == (every is None):
            said = "when it is due is not said" if cron is None else "it is said twice when it is due"
            raise InvalidInput(said, remedy='give either cron or every, not both (--cron "0 9 * * 1-5", --every 15m)')
        self.blobs: list[tuple[str, bytes]] = []
        if isinstance(agent, Agent):
            args, how = agent.arguments(**args), how.over(agent.starting)
            agent, self.blobs = agent.everything()
        when: dict[str, Any] = {"cron": cron, "every_s": optional_seconds(every), **more}
        head = to_json({"name": name, "options": how.wire(), **when})[:-1]
        content = head + b',"agent":%b,"args":%b}' % (agent.model_dump_json().encode(), to_json(args, "args"))
        self.call = Call("POST", "/v1/schedules", _one, content=content)


class Schedules:
    """By name."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
        self,
        name: str,
        agent: AgentSpec | Agent[..., Any],
        args: dict[str, Any] | None = None,
        *,
        cron: str | None = None,
        every: Duration | None = None,
        tz: str = "UTC",
        catch_up: CatchUp = "latest",
        overlap: Overlap = "allow",
        replace: bool = False,
        queue: str | None = None,
        priority: int | None = None,
        delay: Duration | None = None,
        ttl: Duration | None = None,
        concurrency_key: str | None = None,
        tags: Sequence[str] = (),
    ) -> Schedule:
        """Start `agent` with `args` at the times of `cron` in time zone `tz`, or `every` so often. An Agent's code is
        uploaded as it is now. The same again changes nothing.

        `catch_up`: of the times that passed while no server ran, start the "latest", "all" or "none". `overlap`: "skip"
        leaves out a time while a session of an earlier one goes on. `replace`: in the place of one of this name that
        differs. The other options are those of `Sessions.start`; each session has the tag "schedule:NAME" as well.

        Raises InvalidInput naming the cron line or the zone, Conflict when the name belongs to another."""
        plan = _Plan(
            name, agent, args or {}, cron, every,
            {"tz": tz, "catch_up": catch_up, "overlap": overlap, "replace": replace},
            starting(
                queue=queue, priority=priority, delay=delay, ttl=ttl, concurrency_key=concurrency_key, tags=tags
            ),
        )  # fmt: skip
        for digest, data in plan.blobs:
            if not self._client.blobs.has(digest):
                self._client.blobs.put(data)
        return self._client.run(plan.call)

    def list(self) -> list[Schedule]:
        """Each with what became of its last time."""
        return self._client.run(_list())

    def get(self, name: str) -> Schedule:
        """With what became of its last ten times. Raises NotFound."""
        return self._client.run(Call("GET", _at(name), _one))

    def pause(self, name: str) -> Schedule:
        """Nothing starts until `resume`; what is missed meanwhile is not caught up."""
        return self._client.run(_post(name, "pause"))

    def resume(self, name: str) -> Schedule:
        return self._client.run(_post(name, "resume"))

    def trigger(self, name: str) -> Session[Any]:
        """A session now, beside its times and whatever its overlap says."""
        from rethaw.sdk.session import Session

        view = self._client.run(_trigger(name))
        return Session(self._client, view.id, view)

    def delete(self, name: str) -> Schedule:
        """Sessions that it started go on."""
        return self._client.run(Call("DELETE", _at(name), _one))


class AsyncSchedules:
    """`Schedules` with await."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(
        self,
        name: str,
        agent: AgentSpec | Agent[..., Any],
        args: dict[str, Any] | None = None,
        *,
        cron: str | None = None,
        every: Duration | None = None,
        tz: str = "UTC",
        catch_up: CatchUp = "latest",
        overlap: Overlap = "allow",
        replace: bool = False,
        queue: str | None = None,
        priority: int | None = None,
        delay: Duration | None = None,
        ttl: Duration | None = None,
        concurrency_key: str | None = None,
        tags: Sequence[str] = (),
    ) -> Schedule:
        """See `Schedules.create`."""
        plan = _Plan(
            name, agent, args or {}, cron, every,
            {"tz": tz, "catch_up": catch_up, "overlap": overlap, "replace": replace},
            starting(
                queue=queue, priority=priority, delay=delay, ttl=ttl, concurrency_key=concurrency_key, tags=tags
            ),
        )  # fmt: skip
        for digest, data in plan.blobs:
            if not await self._client.blobs.has(digest):
                await self._client.blobs.put(data)
        return await self._client.run(plan.call)

    async def list(self) -> list[Schedule]:
        """See `Schedules.list`."""
        return await self._client.run(_list())

    async def get(self, name: str) -> Schedule:
        """See `Schedules.get`."""
        return await self._client.run(Call("GET", _at(name), _one))

    async def pause(self, name: str) -> Schedule:
        """See `Schedules.pause`."""
        return await self._client.run(_post(name, "pause"))

    async def resume(self, name: str) -> Schedule:
        return await self._client.run(_post(name, "resume"))

    async def trigger(self, name: str) -> AsyncSession[Any]:
        """See `Schedules.trigger`."""
        from rethaw.sdk.asession import AsyncSession

        view = await self._client.run(_trigger(name))
        return AsyncSession(self._client, view.id, view)

    async def delete(self, name: str) -> Schedule:
        """See `Schedules.delete`."""
        return await self._client.run(Call("DELETE", _at(name), _one))
