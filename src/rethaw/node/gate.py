"""Holds answers back until a snapshot with their request in it is durable (promise 4)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping


class Gate:
    """Each request for an exchange has a token. A snapshot covers the tokens that it captured and no later ones: a
    client that gives up and asks again wants a snapshot that holds its second request, too."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Event] = {}
        self.open = False  # nothing is held back

    def requested(self, exchange: str) -> None:
        former = self._waiting.get(exchange)
        self._waiting[exchange] = asyncio.Event()
        if former is not None:
            former.set()  # whoever waits for it looks again

    async def released(self, exchange: str) -> None:
        """Until the first byte of the answer may go to the agent."""
        while not self.open and (token := self._waiting.get(exchange)) is not None:
            await token.wait()

    def captured(self) -> Mapping[str, asyncio.Event]:
        """The tokens of now, while the guest is quiet; for `cover` once the snapshot is durable."""
        return dict(self._waiting)

    def cover(self, captured: Mapping[str, asyncio.Event]) -> None:
        for exchange, token in captured.items():
            if self._waiting.get(exchange) is token:
                del self._waiting[exchange]
                token.set()

    def give_up(self) -> None:
        """Saving keeps failing: nothing is held until the next success."""
        self.open = True
        self.cover(self.captured())

    def close(self) -> None:
        """Saving works again."""
        self.open = False
