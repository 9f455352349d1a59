"""What the node's side may ask of the control side. `log` and `control` implement these in one process; an HTTP
client will implement them for a node elsewhere. Every call is a coroutine and may be repeated after a lost answer.

All raise `Fenced` when the generation (or an exchange's epoch) is not current, and `Unavailable` when the database
has not answered for 30 s (implementations retry until then, with backoff; every write is idempotent).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from rethaw.model.enums import Durability, EventType, ExchangeState, Reason
from rethaw.model.image_types import ImageBuilt, ImageDetail, ImageInfo, ImageRemoved, ImageSpec
from rethaw.model.types import (  # fmt: skip
    AgentFork,
    AgentSpec,
    Assignment,
    CallAsked,
    Chunk,
    Event,
    Exchange,
    Fence,
    Lease,
    NewEvent,
    NodeInfo,
    RequestMeta,
    ResponseHead,
    SessionView,
    SnapshotInfo,
    StateChange,
    Usage,
    WaitSpec,
    WaitState,
)


class LogSink(Protocol):
    """The context log, as a node writes and reads it."""

    async def append(self, fence: Fence, events: Sequence[NewEvent]) -> list[Event]:
        """One transaction: lock the session row, check the generation, insert with gapless seq. Order kept."""
        ...

    async def last_seq(self, session: str) -> int: ...

    async def begin_exchange(
        self, fence: Fence, meta: RequestMeta, body: bytes, owner: str, *, upstream: bool = False
    ) -> Exchange:
        """Make a request durable: content parts, exchange row (OPEN, epoch 1, owned by `owner`), exchange.requested.
        A call that the path holds already (same guest id and digest) is returned as it stands.
        `upstream`: the first exchange.upstream {exchange, epoch, try} in the same transaction.
        """
        ...

    async def stood(self, fence: Fence, exchange: str) -> ExchangeState | None:
        """How an exchange of the past (of an ancestor, or of before a rewind) stood where the session left it; None for
        one of the present. Raises NotFound for one that the session's line never knew."""
        ...

    async def adopt_exchange(self, fence: Fence, exchange: str, guest_id: str, how: str) -> Exchange:
        """The current line takes exchange `exchange` of the tail as its own: event exchange.adopted {how}. One of an
        ancestor is read only."""
        ...

    async def take_over(self, fence: Fence, exchange: str, owner: str, event: NewEvent | None = None) -> Exchange:
        """Become the owner of an OPEN exchange whose former owner is gone: epoch + 1, received bytes of the former
        epoch are no longer current. `event` (reissued, torn, ...) is appended in the same transaction."""
        ...

    async def append_response(
        self, exchange: str, epoch: int, head: ResponseHead | None, chunks: Sequence[Chunk]
    ) -> int:
        """Make response bytes durable under the owner epoch (not the generation). Returns durable length. Idempotent
        by offset. Works whatever state the session is in."""
        ...

    async def finish_exchange(
        self, exchange: str, epoch: int, state: ExchangeState, usage: Usage | None, event: NewEvent
    ) -> Exchange:
        """The response is whole (COMPLETE) or broke (FAILED, TORN): close the row, append `event` to the session's
        current line. Under the epoch, not the generation. Idempotent."""
        ...

    async def orphan_exchange(self, fence: Fence, exchange: str) -> None:
        """Mark ORPHANED, with its event."""
        ...

    async def exchange(self, exchange: str) -> Exchange: ...

    async def read_response(self, exchange: str, offset: int = 0, limit: int = 1 << 20) -> list[Chunk]:
        """Durable response bytes of the current epoch from `offset`, cut at about `limit` bytes."""
        ...

    async def read_request(self, exchange: str) -> bytes:
        """The exact request body."""
        ...

    async def tail(self, fence: Fence, snapshot: str | None) -> list[Exchange]:
        """Exchanges of this attempt that nothing on the path up to the snapshot asked for or adopted (with None:
        nothing at all of this attempt is on the path), oldest first, ORPHANED and TORN ones left out. These answer
        requests that the restored agent sends again."""
        ...

    async def read(
        self, session: str, after: int = 0, limit: int = 1000, types: Sequence[EventType] | None = None
    ) -> list[Event]:
        """Events of the session's current path with seq > after, oldest first."""
        ...

    def follow(self, session: str, after: int = 0, *, path_only: bool = True) -> AsyncIterator[Event]:
        """Events from `after` on, for ever."""
        ...


class SnapshotCatalog(Protocol):
    """The rows of snapshots. Files are the node's."""

    async def commit(self, fence: Fence, info: SnapshotInfo) -> SnapshotInfo:
        """The snapshot is durable on disk: insert the row, append snapshot.created, publish every outbox message
        (and other provisional effect) of the path with seq <= info.seq. One transaction."""
        ...

    async def get(self, snapshot: str) -> SnapshotInfo: ...

    async def list(self, session: str) -> list[SnapshotInfo]: ...

    async def mark_unusable(self, fence: Fence, snapshot: str, why: str) -> None:
        """Logged as snapshot.unusable; never chosen again."""
        ...

    async def uploaded(self, snapshot: str, after_ms: float) -> None:
        """The object store has it, `after_ms` after it was durable on its node."""
        ...

    async def superfluous(self, node: str) -> list[SnapshotInfo]:
        """Snapshots of this node that retention no longer needs; their rows go once `forget` is called."""
        ...

    async def forget(self, snapshot: str) -> None: ...

    async def not_uploaded(self, node: str) -> list[SnapshotInfo]:
        """Snapshots of this node that the object store may not have, oldest first."""
        ...

    async def ids(self, node: str) -> set[str]:
        """Every snapshot of this node that has a row: its files are to stay."""
        ...

    async def needed(self, node: str) -> tuple[set[str], set[str]]:
        """(engine builds, images) that snapshots of this node need: both are kept as long as the snapshots."""
        ...


class ControlPlane(Protocol):
    """Sessions, waits and leases, as a node sees them."""

    async def register_node(self, info: NodeInfo) -> Lease:
        """A new incarnation: every session that the former one ran is recovering from now on."""
        ...

    async def renew_lease(self, node: str, incarnation: str) -> Lease:
        """Raises Fenced when another incarnation took over."""
        ...

    async def assignments(self, node: str, incarnation: str, after: int, timeout_s: float) -> list[Assignment]:
        """Assignments with revision > after; waits up to `timeout_s` for the first."""
        ...

    async def session(self, session: str) -> SessionView: ...

    async def report(self, fence: Fence, change: StateChange) -> SessionView:
        """Move the observed state. A move to SUSPENDED is refused (Conflict) when a wait of the session completed
        meanwhile or somebody wants it running: the node then lets the guest go on."""
        ...

    async def report_death(self, fence: Fence, reason: Reason, detail: str) -> None:
        """The sandbox is gone. Control opens a new line and generation and assigns a restore (crash-loop rule: parent,
        then fresh boot, then failed), or ends the session."""
        ...

    async def report_unusable(self, fence: Fence, snapshot: str, detail: str) -> None:
        """A restore could not use `snapshot`: mark it, go on with its parent, or boot fresh."""
        ...

    async def wake(self, fence: Fence, reason: Reason) -> None:
        """Something a suspended session waits for on this node has come (a held provider answered): resume it."""
        ...

    async def open_wait(self, fence: Fence, attempt: int, spec: WaitSpec) -> WaitState: ...

    async def poll_wait(self, fence: Fence, attempt: int, wait: str, timeout_s: float) -> WaitState:
        """The wait's state once done, or after `timeout_s`."""
        ...

    async def cancel_wait(self, fence: Fence, attempt: int, wait: str) -> None: ...

    async def spawn(self, fence: Fence, attempt: int, call: str, agent: str, args: dict[str, Any]) -> str:
        """A child of the session, by the name of an agent; its id. It begins to exist once a snapshot that contains this
        moment is durable. Raises NotFound, InvalidInput."""
        ...

    async def tell_child(
        self,
        fence: Fence,
        attempt: int,
        call: str,
        child: str,
        act: Literal["message", "cancel"],
        payload: bytes | None,
    ) -> None:
        """Send to a child, or cancel it; done like `spawn` once a snapshot holds it. Raises NotFound."""
        ...

    async def forked(self, fence: Fence, attempt: int, call: str) -> AgentFork | None:
        """What became of the call by which an agent forks itself; None: nothing yet."""
        ...

    async def fork_self(self, fence: Fence, attempt: int, call: str, snapshot: str) -> AgentFork:
        """Fork the session from `snapshot`, which has the call open. Once for each call on the path."""
        ...

    async def consume(self, fence: Fence, attempt: int, number: int) -> None:
        """The guest's inbox cursor moved to `number`: event message.consumed."""
        ...

    async def admit(self, fence: Fence, call: CallAsked) -> str | None:
        """Asked before a model call of a session with a budget goes upstream: None, or why it is refused. Raises Fenced
        when the session's budget is used up: it is ended."""
        ...

    async def publish(self, fence: Fence, sent: NewEvent) -> Event:
        """Append a message.sent and make it visible outside at once, whatever a crash may take back (durability
        "relaxed")."""
        ...

    async def agent_of(self, session: str, attempt: int) -> AgentSpec:
        """What that attempt of the session runs or ran. Raises NotFound."""
        ...

    async def set_degraded(self, fence: Fence, degraded: bool, detail: str, durability: Durability) -> None:
        """Saving keeps failing, or works again: row flag and event."""
        ...


class Images(Protocol):
    """The images of a node."""

    async def build(self, spec: ImageSpec, progress: Callable[[str], None] | None = None) -> ImageBuilt:
        """Build what is missing of it; `progress` is told each line. Raises InvalidInput, ImageError with the last lines of
        the step that failed."""
        ...

    async def list(self) -> list[ImageInfo]:
        """What is there, the last used first."""
        ...

    def digest(self, spec: ImageSpec) -> str:
        """That names the image."""
        ...

    async def find(self, digest: str) -> ImageDetail:
        """By the beginning of a digest, without who uses it. Raises NotFound, InvalidInput."""
        ...

    async def remove(self, digest: str) -> ImageRemoved:
        """An image and the trees that only it stands on, or one tree. The caller has made sure that nobody needs it."""
        ...


class Carrier(Protocol):
    """Snapshots into and out of one file, on a node."""

    async def export(self, info: SnapshotInfo, described: dict[str, Any], target: Path) -> None:
        """Write `info`, what a restore needs and what is said of its session ({agent, args}) into `target`."""
        ...

    async def take_in(self, snapshot: str, source: Path) -> tuple[SnapshotInfo, AgentSpec, dict[str, Any], str]:
        """Add what `source` holds to the store as `snapshot`: its row, agent, arguments and the session it came from.

        Raises InvalidInput for a damaged file, EngineMismatch and ImageError naming what does not fit here."""
        ...


# ---- the channel's node end, as node and gateway use it (implemented by node.link over channel)


class GuestStream(Protocol):
    """One stream that the guest opened, as it stands after the newest go(). After every thaw each open stream is
    handed over anew; the former object is dead and its calls raise ChannelBroken."""

    id: int
    kind: str  # "exchange", "call", "tunnel", "stdin", "stdout", "stderr"
    meta: dict[
        str, object
    ]  # exchange: {provider, method, path, query, headers, guest_id}; call: {op, id}; tunnel: {host, port, id}
    exchange: str | None  # the exchange id told to the guest by accept(), if any
    received: int  # response bytes that the guest holds already
    head_received: bool  # whether the guest holds the response head
    base: int  # offset of the first byte that read() gives (stdout, stderr, tunnel)
    over: bool  # nothing more comes or goes
    hung_up: bool  # the agent closed its end; the handler was cancelled for that, and nobody waits for an answer
    taken: int  # response bytes that the agent had surely read when it hung up

    @property
    def confirmed(self) -> int:
        """Response bytes that the guest has surely received; what was written beyond may have to be written again."""
        ...

    async def read(self) -> bytes | None:
        """The next bytes from the guest in order (see `base`), None at its end."""
        ...

    def tap(self, shown: Callable[[int, bytes], None]) -> None:
        """Give `shown` what comes, with its offset, as soon as it comes; `read` gives it as well. stdout, stderr."""
        ...

    async def read_all(self, limit: int) -> bytes:
        """The whole body (exchange not yet accepted, call). Raises TooLarge."""
        ...

    async def accept(self, exchange: str) -> None:
        """Tell the guest that its request is durable as `exchange`: it need not keep the body. Of a tunnel: that its end
        was taken."""
        ...

    async def ack(self, offset: int) -> None:
        """stdout, stderr, tunnel: bytes before `offset` are safe on this side, the guest may forget them."""
        ...

    async def head(self, status: int, reason: str, headers: Sequence[tuple[str, str]]) -> None: ...

    async def write(self, data: bytes) -> None:
        """Response bytes that follow `received`, waiting for credit."""
        ...

    def offer(self, data: bytes) -> bool:
        """Like `write`, at once; False, and nothing is taken, when that would have to wait or raise."""
        ...

    async def end(self) -> None: ...

    async def reset(self, why: str) -> None:
        """Break the agent's connection."""
        ...
