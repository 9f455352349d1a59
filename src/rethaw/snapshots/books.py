"""Which snapshots need which packs, and when a pack may go."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Collection, Generator

from rethaw.snapshots.manifest import PackRef


class Books:
    """Of every manifest on disk. A pack goes (`remove_packs`) once no manifest names it and nobody has pinned it. Threads
    may share it: a pin and a removal take turns."""

    def __init__(self, remove_packs: Callable[[Collection[str]], None]) -> None:
        self._remove_packs = remove_packs
        self._lock = threading.Lock()
        self._needs: dict[str, frozenset[str]] = {}  # snapshot -> packs
        self._users: Counter[str] = Counter()  # pack -> manifests and pins
        self._unread: set[str] = set()  # snapshots whose needs are not known: while there are any, no pack goes

    def add(self, snapshot: str, packs: Collection[PackRef]) -> None:
        """The manifest of `snapshot` is on disk. Once only."""
        with self._lock:
            self._unread.discard(snapshot)
            if snapshot not in self._needs:
                self._needs[snapshot] = frozenset(ref.id for ref in packs)
                self._users.update(self._needs[snapshot])

    def remove(self, snapshot: str) -> None:
        """The manifest of `snapshot` is gone."""
        with self._lock:
            self._unread.discard(snapshot)
            packs = self._needs.pop(snapshot, frozenset())
        self._release(packs)

    def unread(self, snapshot: str) -> None:
        """Its manifest is there and does not say what it needs, to this process or for now."""
        with self._lock:
            self._unread.add(snapshot)

    def unsure(self) -> list[str]:
        with self._lock:
            return sorted(self._unread)

    def packs(self) -> list[str]:
        with self._lock:
            return list(self._users)

    def used(self, pack: str) -> bool:
        """Whether something needs it, or may."""
        with self._lock:
            return self._users[pack] > 0 or bool(self._unread)

    def hold(self, pack: str) -> None:
        """It is being written. Until `let_go`."""
        with self._lock:
            self._users[pack] += 1

    def let_go(self, pack: str) -> None:
        self._release([pack])

    @contextlib.contextmanager
    def pinned(self, snapshot: str | None) -> Generator[str | None]:
        """The packs of `snapshot` stay at least as long as this. Gives it back, or None when it is gone already."""
        with self._lock:
            packs = self._needs.get(snapshot or "", frozenset())
            self._users.update(packs)
        try:
            yield snapshot if packs else None
        finally:
            self._release(packs)

    def _release(self, packs: Collection[str]) -> None:
        """Take back one use of each."""
        gone: list[str] = []
        with self._lock:
            for pack in packs:
                self._users[pack] -= 1
                if self._users[pack] <= 0:
                    del self._users[pack]
                    gone.append(pack)
            if not self._unread:  # else `collect` comes back to them
                self._remove_packs(gone)  # under the lock, or a pin could come in between
