"""Templates as the API asks for them: each call is one transaction (control/templates.py has what happens inside), or two."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from rethaw.control import rows, schedules, sessions, templates
from rethaw.control.policy import Policy
from rethaw.control.wakeups import Transactions
from rethaw.model.errors import Conflict, NotFound
from rethaw.model.ids import new_generation, new_id
from rethaw.model.types import AgentSpec, SessionView, StartOptions, Template


class Warm:
    """By name."""

    def __init__(self, transactions: Transactions, policy: Callable[[], Policy]) -> None:
        self._run = transactions.run
        self._policy = policy

    async def create(self, name: str, agent: AgentSpec, args: dict[str, Any]) -> Template:
        """Begin a template, or find the one that has begun."""
        session = new_id("s")
        return await self._run(lambda conn: templates.create(conn, name, session, agent, args, self._policy()))

    async def ready(self, template: Template, snapshot: str, by: str) -> Template:
        return await self._run(lambda conn: templates.ready(conn, template.name, template.session, snapshot, by))

    async def every(self) -> list[Template]:
        return await self._run(templates.every)

    async def start_auto(
        self, agent: AgentSpec, args: dict[str, Any], key: str | None, options: StartOptions | None = None
    ) -> tuple[SessionView, bool] | None:
        """A session from the agent's own template, and whether it is new; None when there is none to start from."""
        schedules.check_key(key)
        session, generation = new_id("s"), new_generation()
        found = await self._run(
            lambda conn: templates.start_auto(conn, session, generation, agent, args, key, self._policy(), options)
        )
        return None if found is None else (rows.view(found[0]), found[1])

    async def drop_outdated(self, agent: AgentSpec) -> None:
        """Templates of former versions of `agent` go."""
        for name in await self._run(lambda conn: templates.outdated(conn, agent)):
            await self.drop(name)

    async def start(
        self, name: str, payload: bytes, key: str | None, options: StartOptions | None = None
    ) -> tuple[SessionView, bool]:
        """A session forked from a template, and whether it is new."""
        schedules.check_key(key)
        session, generation = new_id("s"), new_generation()
        row, new = await self._run(
            lambda conn: templates.start(conn, name, session, generation, payload, key, self._policy(), options)
        )
        return rows.view(row), new

    async def drop(self, name: str) -> Template:
        """The name goes, and its session unless others were forked from it."""
        gone = await self._run(lambda conn: templates.drop(conn, name))
        with contextlib.suppress(Conflict, NotFound):
            await self._run(lambda conn: sessions.erase(conn, gone.session, True))
        return gone
