"""What the next snapshots are compared with: their parents' pages, as far as memory goes, or digests of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rethaw.snapshots import decode
from rethaw.snapshots.decode import Packs
from rethaw.snapshots.encode import Known
from rethaw.snapshots.manifest import Ints, Manifest, PackRef
from rethaw.snapshots.pages import Words

_KNOWN = 128  # snapshots; 44 bytes a page each beside their raw pages, which staging counts


class Parents:
    """`remember` and `raw_gone` belong to one thread, `get` and `read_pages` may be called from others."""

    def __init__(self, packs: Packs, pool: Executor) -> None:
        self._packs = packs
        self._pool = pool
        self._known: OrderedDict[str, dict[str, Known]] = OrderedDict()

    def knows(self, snapshot: str) -> bool:
        return snapshot in self._known

    def remember(self, snapshot: str, known: dict[str, Known], *, thin: bool = False) -> None:
        """`thin`: without the pages."""
        self._known[snapshot] = {name: section.thin() for name, section in known.items()} if thin else known
        self._known.move_to_end(snapshot)
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)

    def raw_gone(self, snapshot: str) -> None:
        """Its pages leave memory: from now on their digests are compared."""
        if snapshot in self._known:
            self._known[snapshot] = {name: known.thin() for name, known in self._known[snapshot].items()}

    def get(self, snapshot: str, manifest: Callable[[], Manifest], raw: Path | None) -> dict[str, Known]:
        """By section. `raw`: where its raw sections lie, None: nowhere. Blocking.

        Raises PackDamaged, OSError, and what `manifest` raises.
        """
        known = self._known.get(snapshot)
        if known is None:
            found = manifest()
            return {
                s.name: decode.known(snapshot, found, s, raw and raw / s.name, self._packs, self._pool)
                for s in found.pages
            }
        for section in known.values():
            for ref in section.packs:
                self._packs.get(ref)  # what refers to a lost pack would be lost too
        return known

    def read_pages(self, refs: list[PackRef], pack: Ints, slot: Ints) -> Words:
        return decode.read_pages(refs, pack, slot, self._packs)

    def first_slots(self, ref: PackRef) -> NDArray[np.int64]:
        return self._packs.get(ref).index.first_slot
