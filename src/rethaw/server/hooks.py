"""What the API may ask of this process itself: crash a part of it, probe its engines."""

from __future__ import annotations

import asyncio
import os
import signal

from rethaw.db.embedded import EmbeddedPostgres
from rethaw.engines.base import ProbeReport
from rethaw.engines.several import Engines
from rethaw.model.errors import Conflict
from rethaw.node.node import Node
from rethaw.server.doctor import Finding, of_report, probe_bucket, recommended
from rethaw.snapshots.tiers.settings import S3Settings

_AFTER_ANSWER_S = 0.2


class Crash:
    """`rethaw crash`: SIGKILL, no warning to anybody."""

    def __init__(self, node: Node, postgres: EmbeddedPostgres | None) -> None:
        self._node = node
        self._postgres = postgres

    async def crash(self, session: str, what: str) -> None:
        """`what`: "sandbox" of the session, "node" (this process, once the answer is out) or "db"."""
        if what == "sandbox":
            self._node.crash_sandbox(session)
        elif what == "node":
            asyncio.get_running_loop().call_later(_AFTER_ANSWER_S, os.kill, os.getpid(), signal.SIGKILL)
        elif self._postgres is None or self._postgres.pid is None:
            raise Conflict("this server does not run its own PostgreSQL", remedy="crash yours by hand")
        else:
            os.kill(self._postgres.pid, signal.SIGKILL)


class Doctor:
    """Probes the engines of a running server by taking a guest through boot, save and restore, and its bucket."""

    def __init__(self, engines: Engines, *, s3: S3Settings | None = None) -> None:
        self._engines = engines
        self._s3 = s3

    async def report(self) -> list[ProbeReport | Finding]:
        reports = [await engine.probe() for engine in self._engines]
        found: list[ProbeReport | Finding] = [of_report(reports[0]), *(of_report(r, needed=False) for r in reports[1:])]
        found.append(recommended(reports))
        return found if self._s3 is None else [*found, await probe_bucket(self._s3)]
