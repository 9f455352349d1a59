"""The client that the tools use. It follows the credentials file, since `rethaw up` may write it after we began."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from rethaw.sdk.aclient import AsyncClient
from rethaw.sdk.transport import TIMEOUT_S, Target

_PATIENCE_S = 5.0  # a tool that takes long helps nobody


class Connection:
    def __init__(self) -> None:
        self._client: AsyncClient | None = None
        self._users: dict[AsyncClient, int] = {}

    @property
    def token(self) -> str | None:
        """What the server's clients have to present, as of now."""
        return Target.find(None, None, TIMEOUT_S).token

    @asynccontextmanager
    async def client(self) -> AsyncGenerator[AsyncClient]:
        """Raises InvalidInput for a damaged credentials file."""
        if self._client is None or self._client.target != Target.find(None, None, TIMEOUT_S):
            old, self._client = self._client, AsyncClient(patience=_PATIENCE_S)
            await self._done(old)
        client = self._client
        self._users[client] = self._users.get(client, 0) + 1
        try:
            yield client
        finally:
            self._users[client] -= 1
            if client is not self._client:
                await self._done(client)

    async def _done(self, client: AsyncClient | None) -> None:
        if client is not None and not self._users.get(client):
            self._users.pop(client, None)
            await client.close()

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()
