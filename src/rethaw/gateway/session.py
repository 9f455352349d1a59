"""One session's exchanges, across all of its sandboxes."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractAsyncContextManager

from rethaw.gateway.contracts import GatewayHooks, ReleaseGate
from rethaw.model.ports import GuestStream
from rethaw.model.types import Fence


class SessionGateway:
    """Lives as long as the node knows the session; survives its sandboxes.

    Order of calls in each life: `attach`, `restored` (when from a snapshot, or a fresh boot of an attempt that ran
    before), then after every go(): `hello`, and `handle` for each exchange stream. `settled` around each
    quiesce..go, `flush` before a snapshot commits, `detach` when the sandbox is gone.
    """

    def attach(self, fence: Fence, attempt: int, gate: ReleaseGate, hooks: GatewayHooks) -> None:
        """A new life (boot or restore). Its `handle` calls use this fence, gate and hooks."""
        raise NotImplementedError

    async def restored(self, snapshot: str | None) -> None:
        """Load the tail of the log after `snapshot` (None: the attempt starts from nothing). Before go()."""
        raise NotImplementedError

    def hello(self, exchanges: Collection[str]) -> None:
        """The exchange ids that the newest hello names, before its streams are handled: an exchange missing here
        has lost its client. Optional, but parallel equal requests are told apart by it."""
        raise NotImplementedError

    async def handle(self, stream: GuestStream) -> None:
        """Serve one exchange stream until its answer is delivered whole. Cancelled at each quiesce (and when the guest
        closes the stream); called again with the stream's new object after go(). Raises Fenced when this life is not
        the session's any more: the node then kills the sandbox."""
        raise NotImplementedError

    def settled(self, timeout_s: float = 2.0) -> AbstractAsyncContextManager[None]:
        """`async with gateway.settled(): quiesce, capture, go`. Inside, no exchange is between durable and accepted
        into guest memory, so every exchange at or before the snapshot's `seq` is in the snapshot; new requests wait.
        Raises QuiesceTimeout when a request does not become durable in time."""
        raise NotImplementedError

    async def flush(self) -> None:
        """Return once every response byte received so far, and every event noted so far, is durable in the log."""
        raise NotImplementedError

    def open(self) -> list[str]:
        """Exchanges whose answer is still awaited: not delivered whole, their client still there."""
        raise NotImplementedError

    def held(self) -> bool:
        """Whether something is open and all of it waits for a provider that said "later"."""
        raise NotImplementedError

    async def attempt_ended(self) -> None:
        """The process tree exited: what is left of the tail is orphaned."""
        raise NotImplementedError

    async def detach(self) -> None:
        """The sandbox is gone or frozen. Upstream reading goes on."""
        raise NotImplementedError

    async def close(self) -> None:
        """The session is over: upstream is cancelled after the adopt window, in the background."""
        raise NotImplementedError
