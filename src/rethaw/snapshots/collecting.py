"""Removing from a tier what nothing needs any more, while uploads go on, from this node or others.

The tier has no compare-and-swap, so nothing is deleted at once. A collection *condemns*: it writes the names of what it
would delete to `condemned/RANDOM` (JSON: {"names": [...]}). A later collection, `grace_s` after that by the tier's own
clock, deletes of them what still nothing needs, and then the list.

Whoever puts a record keeps to the other half (`uploads`): it looks at `condemned/` first, does not refer to objects that
are named there, and puts the record within half of `grace_s` of that look. So either the look saw the list, or the record
was there before the deletion looks at the records. An object that is not named was deleted before its list was, or
never: after the look, asking for its size says which.

A tier belongs to who claimed it: `owner/ID` is put by the first collection. A node whose disk or database was lost, and
that is started anew, has another id and knows of no snapshot; it must not take for garbage what it is to restore. So a
collection that finds another owner refuses.

Condemned are: records of snapshots that are not live, and objects that no record refers to. A dead snapshot's objects
are garbage only once its record is gone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, cast

from rethaw.model import faults
from rethaw.model.errors import Conflict, ObjectDamaged, ObjectMissing
from rethaw.snapshots import records
from rethaw.snapshots.tiers.base import Found, Tier

log = logging.getLogger("rethaw.snapshots")
FOLDER = "condemned"
OWNER = "owner"
OBJECTS = "objects"
_AT_ONCE = 8
_MAX_LIST = 64 << 20


@dataclass
class Collected:
    """What a collection did. `unreadable`: records that say not what they need; no object is deleted beside them."""

    snapshots: list[str] = field(default_factory=list[str])  # whose records were deleted
    objects: list[str] = field(default_factory=list[str])  # that were deleted
    freed_bytes: int = 0
    condemned: int = 0  # names that the next collection may delete
    unreadable: list[str] = field(default_factory=list[str])


async def condemned(tier: Tier) -> dict[str, tuple[Found, frozenset[str]]]:
    """The lists that are in force, with their names. A damaged one names nothing; who wrote it condemns again."""
    found: dict[str, tuple[Found, frozenset[str]]] = {}
    for entry in await tier.list(FOLDER):
        try:
            text = await tier.get(entry.name, 0, min(entry.size, _MAX_LIST))
            names = frozenset(map(str, cast("dict[str, Any]", json.loads(text))["names"]))
        except (ValueError, KeyError, TypeError, ObjectDamaged) as error:
            log.warning("%s in %s cannot be used: %s", entry.name, tier.label, error)
            names = frozenset[str]()
        except ObjectMissing:
            continue
        found[entry.name] = (entry, names)
    return found


class Collector:
    """Keeps what it learns of records between collections; they do not change. `owner`: an id that stays the same as long
    as the list of live snapshots does not get lost, [A-Za-z0-9_-]."""

    def __init__(self, tier: Tier, grace_s: float, owner: str) -> None:
        self._tier = tier
        self._owner = owner
        self._grace = grace_s
        self._needs: dict[tuple[str, str], frozenset[str]] = {}  # (record, tag) -> objects

    async def collect(self, live: Collection[str]) -> Collected:
        """`live`: every snapshot that exists, or may be uploaded by anybody.

        Raises TierUnavailable (run it again then), Conflict when the tier belongs to another owner.
        """
        await self._claim()
        result = Collected()
        lists = await condemned(self._tier)
        objects = {found.name: found for found in await self._tier.list(OBJECTS)}
        needed, dead = await self._records(live, result)
        named = frozenset[str]().union(*(names for _, names in lists.values()))
        garbage = frozenset[str]() if result.unreadable else frozenset(objects) - needed
        fresh = sorted((garbage | dead) - named)
        if not fresh and not lists:
            return result
        faults.point("collect.condemn")
        # Written even when it is empty: its time is what the tier's clock says now.
        mine = f"{FOLDER}/{os.urandom(10).hex()}"
        await self._tier.put(mine, json.dumps({"names": fresh}).encode())
        result.condemned = len(fresh)
        now = max(found.modified for found in await self._tier.list(FOLDER) if found.name == mine)
        for name, (entry, names) in sorted(lists.items(), key=lambda item: item[1][0].modified):
            if now - entry.modified < self._grace:
                result.condemned += len(names & (garbage | dead))
                continue
            await self._delete(sorted(names & (garbage | dead)), objects, result)
            faults.point("collect.deleted")
            await self._tier.delete(name)  # last: an uploader that does not see it any more finds its objects gone
        if not fresh:
            await self._tier.delete(mine)
        return result

    async def _claim(self) -> None:
        owners = {found.name.removeprefix(f"{OWNER}/") for found in await self._tier.list(OWNER)}
        if not owners:
            await self._tier.put(f"{OWNER}/{self._owner}", b"")
        elif owners != {self._owner}:
            others = ", ".join(f"{OWNER}/{owner}" for owner in sorted(owners - {self._owner}))
            raise Conflict(
                f"nothing is deleted from {self._tier.label}: it belongs to another installation ({others})",
                remedy="use another prefix; or, if that installation is gone for good, delete that object to take over",
                tier=self._tier.label,
            )

    async def _records(self, live: Collection[str], result: Collected) -> tuple[frozenset[str], frozenset[str]]:
        """(objects that records refer to, records of snapshots that are not live)."""
        found = await self._tier.list(records.FOLDER)
        limit = asyncio.Semaphore(_AT_ONCE)

        async def needs(record: Found) -> tuple[tuple[str, str], frozenset[str]]:
            key = (record.name, record.tag)
            known = self._needs.get(key)
            if known is None:
                async with limit:
                    snapshot = record.name.removeprefix(f"{records.FOLDER}/")
                    try:
                        known = (await records.read_header(self._tier, snapshot, record.size)).objects
                    except ObjectMissing:
                        known = frozenset[str]()
                    except ObjectDamaged as error:
                        log.warning("%s", error)
                        result.unreadable.append(snapshot)
                        known = frozenset[str]()
            return key, known

        pairs = await asyncio.gather(*map(needs, found))
        unreadable = {records.name_of(snapshot) for snapshot in result.unreadable}
        self._needs = {key: objects for key, objects in pairs if key[0] not in unreadable}
        alive = {records.name_of(snapshot) for snapshot in live}
        return frozenset[str]().union(*(objects for _, objects in pairs)), frozenset(
            record.name for record in found if record.name not in alive
        )

    async def _delete(self, names: list[str], objects: dict[str, Found], result: Collected) -> None:
        limit = asyncio.Semaphore(_AT_ONCE)

        async def delete(name: str) -> None:
            async with limit:
                await self._tier.delete(name)
            folder, _, rest = name.partition("/")
            if folder == records.FOLDER:
                result.snapshots.append(rest)
            else:
                result.objects.append(name)
                result.freed_bytes += objects[name].size if name in objects else 0

        await asyncio.gather(*map(delete, names))
