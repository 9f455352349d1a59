"""The exchanges that a restored agent will ask for again (DESIGN §5, steps 2 and 3)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rethaw.model.enums import ExchangeState
from rethaw.model.types import Exchange, RequestMeta


def answerable(exchange: Exchange) -> bool:
    """Whether there is, or may come, something to serve: one that failed without any answer is simply asked anew."""
    if exchange.state in (ExchangeState.OPEN, ExchangeState.COMPLETE):
        return True
    return exchange.state is ExchangeState.FAILED and exchange.head is not None


class Tail:
    """Each entry is taken at most once, in whatever order the agent comes back."""

    def __init__(self, exchanges: Sequence[Exchange] = (), released: Collection[str] = ()) -> None:
        """`released`: ids whose answer the lost line's agent has seen at least in part."""
        self._entries = {x.id: x for x in exchanges if answerable(x)}
        self._released = frozenset(released)
        self.diverged = False  # said already

    def __contains__(self, exchange: str) -> bool:
        return exchange in self._entries

    def __bool__(self) -> bool:
        """Whether model calls are left."""
        return any(x.meta.model_call for x in self._entries.values())

    def take(self, meta: RequestMeta) -> Exchange | None:
        """The entry that answers `meta`: equal digest, preferably the guest's own id, preferably no error, the oldest."""
        fits = [x for x in self._entries.values() if x.meta.digest == meta.digest]
        if not fits:
            return None
        best = min(fits, key=lambda x: (x.meta.guest_id != meta.guest_id, _rank(x), x.seq))
        return self._entries.pop(best.id)

    def take_own(self, meta: RequestMeta) -> Exchange | None:
        """The entry with this digest and this very guest id."""
        for x in self._entries.values():
            if (x.meta.digest, x.meta.guest_id) == (meta.digest, meta.guest_id):
                return self._entries.pop(x.id)
        return None

    def put_back(self, exchange: Exchange) -> None:
        """It could not be taken after all."""
        self._entries[exchange.id] = exchange

    def drop(self, exchange: str) -> None:
        """Found otherwise (by its id)."""
        self._entries.pop(exchange, None)

    def orphans(self) -> list[str]:
        """Take out the model calls whose answer no agent has seen. Seen ones stay: somebody may still ask for them, and
        paying for them twice would break promise 3."""
        out = [x.id for x in self._entries.values() if x.meta.model_call and x.id not in self._released]
        for exchange in out:
            del self._entries[exchange]
        return out


def _rank(exchange: Exchange) -> int:
    if exchange.state is ExchangeState.FAILED:
        return 2
    return 1 if exchange.head is not None and exchange.head.status >= 400 else 0
