"""`Client().templates`: agents kept warm, and sessions started from them without a cold start."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from rethaw.model.durations import Duration, seconds
from rethaw.model.types import AgentSpec, SessionView, Template
from rethaw.sdk.calls import Call, path, session_view, to_json
from rethaw.sdk.starting import Starting, starting

if TYPE_CHECKING:
    from rethaw.sdk.aclient import AsyncClient
    from rethaw.sdk.asession import AsyncSession
    from rethaw.sdk.client import Client
    from rethaw.sdk.session import Session

READY_WITHIN = 300.0
By = Literal["call", "line", "quiet"]


def _template(values: dict[str, Any]) -> Template:
    known = {k: v for k, v in values.items() if k in Template.model_fields}
    return Template.model_validate_json(json.dumps(known))


def _one(body: bytes) -> Template:
    return _template(cast("dict[str, Any]", json.loads(body)))


def _create(name: str, agent: AgentSpec, args: dict[str, Any], by: str | None, within_s: float) -> Call[Template]:
    head = to_json({"name": name, "by": by, "within_s": within_s})[:-1]
    content = head + b',"agent":%b,"args":%b}' % (agent.model_dump_json().encode(), to_json(args, "args"))
    return Call("POST", "/v1/templates", _one, content=content, wait_s=within_s + 90)


def _list() -> Call[list[Template]]:
    return Call("GET", "/v1/templates", lambda b: [_template(row) for row in json.loads(b)["templates"]])


def _start(name: str, args: dict[str, Any], key: str | None, how: Starting) -> Call[SessionView]:
    given = how.wire()
    content = to_json({"args": args, "key": key, **({"options": given} if given else {})}, "args")
    return Call("POST", path("templates", name, "sessions"), session_view, content=content)


def _delete(name: str) -> Call[Template]:
    return Call("DELETE", path("templates", name), _one, wait_s=60)


class Templates:
    """By name."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
        self,
        name: str,
        agent: AgentSpec,
        args: dict[str, Any] | None = None,
        *,
        by: By | None = None,
        within: Duration = READY_WITHIN,
    ) -> Template:
        """Start `agent` and keep it as it is once it is ready: it called `ctx.ready()`, wrote the line `rethaw-ready`, or
        has been quiet for a second (`by`: only that one counts). `args`: what it is warmed with. Asking again with the same is harmless.

        Raises WaitTimeout when it is not ready `within` so long, Conflict when it ended or the name is another's.
        """
        return self._client.run(_create(name, agent, args or {}, by, seconds(within)))

    def list(self) -> list[Template]:
        return self._client.run(_list())

    def start(
        self,
        name: str,
        args: dict[str, Any] | None = None,
        *,
        key: str | None = None,
        queue: str | None = None,
        priority: int | None = None,
        delay: Duration | None = None,
        ttl: Duration | None = None,
        concurrency_key: str | None = None,
        tags: Sequence[str] = (),
    ) -> Session[Any]:
        """A session that goes on where the template stands; its `ctx.ready()` returns `args`. With a `key` that is known
        the existing session comes back. The other options are those of `Sessions.start`. Raises NotFound, Conflict,
        KeyReused."""
        from rethaw.sdk.session import Session

        how = starting(queue=queue, priority=priority, delay=delay, ttl=ttl, concurrency_key=concurrency_key, tags=tags)
        view = self._client.run(_start(name, args or {}, key, how))
        return Session(self._client, view.id, view)

    def delete(self, name: str) -> Template:
        """The name goes at once; its session too, unless others were started from it. Those go on."""
        return self._client.run(_delete(name))


class AsyncTemplates:
    """`Templates` with await."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(
        self,
        name: str,
        agent: AgentSpec,
        args: dict[str, Any] | None = None,
        *,
        by: By | None = None,
        within: Duration = READY_WITHIN,
    ) -> Template:
        """See `Templates.create`."""
        return await self._client.run(_create(name, agent, args or {}, by, seconds(within)))

    async def list(self) -> list[Template]:
        return await self._client.run(_list())

    async def start(
        self,
        name: str,
        args: dict[str, Any] | None = None,
        *,
        key: str | None = None,
        queue: str | None = None,
        priority: int | None = None,
        delay: Duration | None = None,
        ttl: Duration | None = None,
        concurrency_key: str | None = None,
        tags: Sequence[str] = (),
    ) -> AsyncSession[Any]:
        """See `Templates.start`."""
        from rethaw.sdk.asession import AsyncSession

        how = starting(queue=queue, priority=priority, delay=delay, ttl=ttl, concurrency_key=concurrency_key, tags=tags)
        view = await self._client.run(_start(name, args or {}, key, how))
        return AsyncSession(self._client, view.id, view)

    async def delete(self, name: str) -> Template:
        """See `Templates.delete`."""
        return await self._client.run(_delete(name))
