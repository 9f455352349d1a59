"""Sandboxes created ahead, by spec."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from rethaw.engines.base import SandboxSpec
from rethaw.model.errors import RethawError

log = logging.getLogger("rethaw.engines")

MAX_AHEAD = 8  # of one spec
MAX_SHELVES = 8  # specs
REFILL_PAUSE_S = 0.3  # whoever has just taken or started one wants the CPU now


class Kept(Protocol):
    def alive(self) -> bool: ...

    def hold(self, held: bool) -> None: ...


S = TypeVar("S", bound=Kept)


@dataclass
class _Shelf(Generic[S]):
    target: int
    ready: deque[S] = field(default_factory=deque[S])
    filling: asyncio.Task[None] | None = None


class Shelves(Generic[S]):
    """`create` makes one, `discard` gets rid of one, `in_background` runs what nobody waits for."""

    def __init__(
        self,
        create: Callable[[SandboxSpec], Awaitable[S]],
        discard: Callable[[S], None],
        in_background: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._create, self._discard, self._in_background = create, discard, in_background
        self._shelves: OrderedDict[SandboxSpec, _Shelf[S]] = OrderedDict()
        self._closed = False

    def prepare(self, spec: SandboxSpec, count: int) -> None:
        """See `engines.base.Engine.prepare`."""
        shelf = self._shelves.setdefault(spec, _Shelf(0))
        self._shelves.move_to_end(spec)
        shelf.target = min(count, MAX_AHEAD)
        if not shelf.target:
            self._drop(spec)
            return
        while len(self._shelves) > MAX_SHELVES:
            self._drop(next(iter(self._shelves)))
        self._fill(spec, shelf)

    def ready(self, spec: SandboxSpec) -> int:
        """How many of `spec` are ready now."""
        shelf = self._shelves.get(spec)
        return sum(sandbox.alive() for sandbox in shelf.ready) if shelf else 0

    def take(self, spec: SandboxSpec) -> S | None:
        """One of them, if there is one; another is made in its place."""
        shelf = self._shelves.get(spec)
        if shelf is None:
            return None
        self._shelves.move_to_end(spec)
        taken: S | None = None
        while shelf.ready and taken is None:
            sandbox = shelf.ready.popleft()
            if sandbox.alive():
                taken = sandbox
                taken.hold(False)
            else:
                self._discard(sandbox)
        self._fill(spec, shelf)
        return taken

    def close(self) -> None:
        self._closed = True
        for spec in list(self._shelves):
            self._drop(spec)

    def _fill(self, spec: SandboxSpec, shelf: _Shelf[S]) -> None:
        if shelf.filling is None or shelf.filling.done():
            shelf.filling = self._in_background(self._filling(spec, shelf))

    async def _filling(self, spec: SandboxSpec, shelf: _Shelf[S]) -> None:
        await asyncio.sleep(REFILL_PAUSE_S)
        while len(shelf.ready) < shelf.target and not self._closed:
            try:
                sandbox = await self._create(spec)
            except (RethawError, OSError) as error:
                log.warning("could not create a sandbox ahead: %s", error)
                return
            if self._closed or len(shelf.ready) >= shelf.target:
                self._discard(sandbox)
            else:
                sandbox.hold(True)
                shelf.ready.append(sandbox)

    def _drop(self, spec: SandboxSpec) -> None:
        shelf = self._shelves.pop(spec)
        shelf.target = 0
        while shelf.ready:
            self._discard(shelf.ready.popleft())
