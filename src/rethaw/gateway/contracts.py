"""What the gateway asks of the node: the saver's release gate and the supervisor's hooks."""

from __future__ import annotations

from typing import Protocol

from rethaw.model.types import CallAsked, Fence


class ReleaseGate(Protocol):
    """Holds answers back until they are safe. Implemented by the node's saver; one per life of a session."""

    def requested(self, exchange: str) -> None:
        """`exchange` is durable in the log and accepted into guest memory: it wants a snapshot. Never blocks."""
        ...

    async def released(self, exchange: str) -> None:
        """Returns once the first byte of the answer may go to the agent. Asked only for exchanges that were
        `requested` in this life; asked again after each thaw."""
        ...


class Books(Protocol):
    """Asked before a model call of a session with a budget is sent. Implemented by control."""

    async def admit(self, fence: Fence, call: CallAsked) -> str | None:
        """None, or why the call is refused. Raises Fenced when the session is ended for it."""
        ...


class GatewayHooks(Protocol):
    """Told when a session could be frozen and when it must not be. Non-blocking. They stay in force after `detach`
    (a frozen session's answer may come) until the next `attach`."""

    def held(self, exchange: str, until: float) -> None:
        """The provider said "later": the agent may be frozen. `until` is the wall-clock time of the next try."""
        ...

    def answered(self, exchange: str) -> None:
        """The first byte of an answer (or its failure) has come: thaw the agent if it is frozen."""
        ...
