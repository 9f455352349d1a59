"""Raw sections for a restore, from wherever they are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from rethaw.model.errors import TierUnavailable
from rethaw.model.types import SnapshotInfo
from rethaw.snapshots.lazily import Loaded
from rethaw.snapshots.store import SnapshotStore

log = logging.getLogger("rethaw.node")
_PAUSE_S = (0.5, 30.0)  # first and longest


async def sections(
    store: SnapshotStore, snapshot: SnapshotInfo, lazy: Collection[str], wanted_elsewhere: Callable[[], bool]
) -> Loaded:
    """As `store.load_lazily`. What only the object store has is waited for while that does not answer: going back further, or
    reporting a death each time, would lose more. Raises TierUnavailable once there is something else to do."""
    pause = _PAUSE_S[0]
    while True:
        try:
            return await store.load_lazily(snapshot, lazy)
        except TierUnavailable as error:
            if wanted_elsewhere():
                raise
            log.warning("session %s waits for snapshot %s: %s", snapshot.session, snapshot.id, error)
        await asyncio.sleep(pause)
        pause = min(2 * pause, _PAUSE_S[1])
