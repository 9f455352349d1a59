"""`Client().queues`: how many sessions run at once, and which wait."""

from __future__ import annotations

import json
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, cast

from rethaw.model.queue_types import Queue
from rethaw.model.starting import check_name
from rethaw.sdk.calls import Call, path, to_json

if TYPE_CHECKING:
    from rethaw.sdk.aclient import AsyncClient
    from rethaw.sdk.client import Client


class Keep(Enum):
    """As it is."""

    KEEP = "keep"


KEEP = Keep.KEEP
Limit = int | None | Keep
Suspended = Literal["count", "free"]


def _queue(values: dict[str, Any]) -> Queue:
    return Queue.model_validate_json(json.dumps({k: v for k, v in values.items() if k in Queue.model_fields}))


def _one(body: bytes) -> Queue:
    return _queue(cast("dict[str, Any]", json.loads(body)))


def _list() -> Call[list[Queue]]:
    return Call("GET", "/v1/queues", lambda b: [_queue(row) for row in json.loads(b)["queues"]])


def _at(name: str, *more: str) -> str:
    return path("queues", check_name("queue", name), *more)


def _set(name: str, limit: Limit, key_limit: Limit, suspended: Suspended | None) -> Call[Queue]:
    changes: dict[str, Any] = {"limit": limit, "key_limit": key_limit, "suspended": suspended or KEEP}
    body = {name: value for name, value in changes.items() if value is not KEEP}
    return Call("PUT", _at(name), _one, content=to_json(body))


class Queues:
    """By name. Any name is a queue; one that nobody has set has no limits."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> list[Queue]:
        """Those that are set and those with unfinished sessions."""
        return self._client.run(_list())

    def get(self, name: str) -> Queue:
        """With the first of those that wait. Raises NotFound."""
        return self._client.run(Call("GET", _at(name), _one))

    def set(
        self, name: str, *, limit: Limit = KEEP, key_limit: Limit = KEEP, suspended: Suspended | None = None
    ) -> Queue:
        """`limit`: so many sessions have a slot at once, None lifts it. `key_limit`: so many with one concurrency key.
        `suspended`: whether suspended sessions "count" (at first), or are "free" and wait for a slot to go on. What is
        not given stays. Sessions that run go on whatever a new limit says."""
        return self._client.run(_set(name, limit, key_limit, suspended))

    def pause(self, name: str) -> Queue:
        """Nothing starts from it until `resume`; what runs goes on."""
        return self._client.run(Call("POST", _at(name, "pause"), _one, content=b"{}"))

    def resume(self, name: str) -> Queue:
        return self._client.run(Call("POST", _at(name, "resume"), _one, content=b"{}"))

    def delete(self, name: str) -> Queue:
        """Forget its limits. Raises NotFound, Conflict while unfinished sessions are in it."""
        return self._client.run(Call("DELETE", _at(name), _one))


class AsyncQueues:
    """`Queues` with await."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[Queue]:
        """See `Queues.list`."""
        return await self._client.run(_list())

    async def get(self, name: str) -> Queue:
        """See `Queues.get`."""
        return await self._client.run(Call("GET", _at(name), _one))

    async def set(
        self, name: str, *, limit: Limit = KEEP, key_limit: Limit = KEEP, suspended: Suspended | None = None
    ) -> Queue:
        """See `Queues.set`."""
        return await self._client.run(_set(name, limit, key_limit, suspended))

    async def pause(self, name: str) -> Queue:
        """See `Queues.pause`."""
        return await self._client.run(Call("POST", _at(name, "pause"), _one, content=b"{}"))

    async def resume(self, name: str) -> Queue:
        return await self._client.run(Call("POST", _at(name, "resume"), _one, content=b"{}"))

    async def delete(self, name: str) -> Queue:
        """See `Queues.delete`."""
        return await self._client.run(Call("DELETE", _at(name), _one))
