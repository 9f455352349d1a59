"""The engines of one node, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rethaw.engines.base import Engine
from rethaw.model.errors import EngineUnusable


class Engines:
    """The first one is for agents that do not say which."""

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._by_name = {engine.name: engine for engine in engines}
        self.default = next(iter(self._by_name.values()))

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._by_name.values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def of(self, name: str | None) -> Engine:
        """The engine `name`; None: the default. Raises EngineUnusable."""
        if name is None:
            return self.default
        found = self._by_name.get(name)
        if found is None:
            raise EngineUnusable(f"this node has no engine {name!r}", remedy=f"use one of {', '.join(self._by_name)}")
        return found

    async def sweep_orphans(self) -> int:
        """See Engine."""
        return sum([await engine.sweep_orphans() for engine in self])

    async def prune(self, builds: set[str], images: set[str] | None) -> None:
        """Remove engine builds and what was made of images that nobody needs. `images` None: others use them too."""
        for engine in self:
            await engine.prune_builds(builds)
            if images is not None:
                await engine.prune_images(images)

    async def close(self) -> None:
        """See Engine."""
        for engine in self:
            await engine.close()
