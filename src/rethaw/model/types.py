"""What travels between rooms and over HTTP. Sizes in bytes, times in seconds, `at` in UTC, unless said otherwise."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from rethaw.model.enums import Desired, Durability, EventType, ExchangeState, Reason, State
from rethaw.model.image_types import ImageSpec
from rethaw.model.wire import Wire

MIB = 1 << 20
MESSAGE_LIMIT = 1 * MIB  # one inbox, outbox or signal payload
EXCHANGE_LIMIT = 64 * MIB  # one request or response body


# ---------------------------------------------------------------- agents


EngineName = Literal["gvisor", "qemu"]
RetriedOn = Literal["exit", "crash_loop", "out_of_memory"]


def _empty(value: dict[str, Any]) -> bool:
    return not value


def _no(value: object) -> bool:
    return not value


class TerminalSpec(Wire):
    """A terminal as its program first finds it. `kind` is its TERM."""

    rows: int = Field(default=24, ge=1, le=10_000)
    cols: int = Field(default=80, ge=1, le=10_000)
    kind: str = Field(default="xterm-256color", pattern=r"^[A-Za-z0-9][A-Za-z0-9+._-]{0,63}$")


class RetrySpec(Wire):
    """What follows when an attempt fails in a way that is `on` the list: `max` new attempts, the first after `delay_s`, each later one `factor`
    times later than the one before, none later than `max_delay_s`."""

    max: int = 3
    delay_s: float = 1.0
    factor: float = 2.0
    max_delay_s: float = 300.0
    jitter: bool = True  # up to a quarter more or less
    not_on: tuple[int, ...] = ()  # exit statuses that are not tried again
    on: tuple[RetriedOn, ...] = ("exit", "crash_loop")  # of these recovery has given up on the last two
    files: Literal["fresh", "keep"] = "fresh"  # keep: a new attempt begins with the files of the last snapshot
    children: Literal["cancel", "keep"] = "cancel"  # of the attempt that failed


class BudgetSpec(Wire):
    """What a session may spend, over all of its lines and attempts. None: as much as it likes."""

    tokens: int | None = None  # input and output together
    input_tokens: int | None = None
    output_tokens: int | None = None
    money: str | None = None  # a decimal number, in the currency of the price table
    model_calls: int | None = None
    wall_s: float | None = None  # that its agent runs; suspended, queued and recovering it costs nothing


class Spent(Wire):
    """What a session has spent so far, in the measures of BudgetSpec. `uncounted`: calls answered without token counts.
    `unpriced`: a model that the price table does not know."""

    tokens: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    money: str | None = None  # None: no price table, or not every model is in it
    model_calls: int = 0
    wall_s: float = 0.0  # counted for sessions with a budget only
    uncounted: int = 0
    unpriced: str | None = None


class Signature(Wire):
    """What an agent takes and gives, as JSON Schema (see model/signatures.py): `arguments` is an object by name."""

    arguments: dict[str, Any]
    result: dict[str, Any] = Field(default_factory=dict[str, Any])


def _absent(value: object) -> bool:
    return value is None


class AgentSpec(Wire):
    """An agent's definition. `code` is the digest of a tar.gz of files that appear under /app."""

    name: str
    image: ImageSpec = ImageSpec()
    command: tuple[str, ...] = ()  # argv; empty when `entry` is set
    entry: str | None = None  # "agent.py::coder": a Python function in `code`
    code: str | None = None  # sha256 hex of the uploaded archive
    env: dict[str, str] = Field(default_factory=dict[str, str])
    workdir: str = "/"
    memory_bytes: int = 512 * MIB
    pids: int = 1024
    durability: Durability = Durability.LOCAL
    idle_suspend_s: float | None = 20.0  # None: never suspended for waiting
    snapshot_every_s: float = 60.0  # without a model call
    hold_max_s: float = 1800.0
    max_duration_s: float | None = None
    grace_s: float = 10.0  # between SIGTERM and SIGKILL on cancel
    keep_all_s: float = 86_400.0  # every snapshot this young is kept, older ones one an hour ...
    keep_bytes: int = 5 * 1024 * MIB  # ... as long as they add up to no more than this; needed and pinned ones always
    engine: EngineName | None = None  # None: the node's default
    template: Literal["none", "auto"] = "none"  # auto: the first start of it makes a template, later ones begin there
    agents: dict[str, AgentSpec] = Field(default_factory=dict[str, "AgentSpec"], exclude_if=_empty)  # what it may spawn
    retries: RetrySpec | None = None  # None: a program that fails ends its session
    budget: BudgetSpec | None = None
    allow: tuple[str, ...] = ()  # where it may connect to, see model/egress.py; empty: nowhere
    # Arguments are checked against it at a start. None: anything is taken. No part of the version's digest.
    signature: Signature | None = Field(default=None, exclude_if=_absent)
    terminal: TerminalSpec | None = Field(
        default=None, exclude_if=_empty
    )  # its stdin, stdout and stderr are one terminal
    stdin: bool = Field(default=False, exclude_if=_no)  # what is typed for it: keys, or without a terminal a pipe
    # It is suspended for so long when it did nothing for `idle_suspend_s`, whatever it waits for. None: never.
    nap_s: float | None = Field(default=None, exclude_if=_absent)


# ---------------------------------------------------------------- the log


class Fence(Wire):
    """Proof of being the session's current life. Checked in the transaction of each write a node makes."""

    session: str
    generation: str


class NewEvent(Wire):
    """One event to append. `key` makes it idempotent: a second append with a key that is already visible on the
    session's current path (its line and the ancestors' parts of it) returns the first event and writes nothing."""

    type: EventType
    data: dict[str, Any] = Field(default_factory=dict[str, Any])
    body: bytes | None = None
    key: str | None = None


class Event(Wire):
    """One entry of the context log. `session` is the one that wrote it: of a fork's log the shared part is an ancestor's.
    `superseded` is computed by readers: true when the session's current path
    left this event out (it came after the snapshot that a later line was opened from)."""

    session: str
    seq: int
    line: int
    attempt: int
    type: EventType
    data: dict[str, Any]
    body: bytes | None = None
    key: str | None = None
    at: datetime
    superseded: bool = False


class Line(Wire):
    """A line of a session's log. Visible on a path: the parent's events up to `branch_seq`, then its own."""

    line: int
    parent: int | None
    branch_seq: int


# ---------------------------------------------------------------- exchanges


class RequestMeta(Wire):
    """A request without its body. `headers` as received from the agent, order kept, no authorisation."""

    provider: str  # name in the configuration: "openai", "anthropic", ...
    method: str
    path: str  # after the provider prefix, with leading slash, without query
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    digest: str  # identity of DESIGN §5 step 2, sha256 hex
    model_call: bool  # a generation endpoint
    model: str | None = None
    guest_id: str  # the guest's own id of the call, "<attempt>.<counter>": breaks ties only


class CallAsked(Wire):
    """A model call that is about to be sent, as far as a budget asks about it."""

    guest_id: str
    digest: str
    model: str | None = None


class ResponseHead(Wire):
    status: int
    reason: str = ""
    headers: tuple[tuple[str, str], ...] = ()


class Usage(Wire):
    """Token counts as the provider reported them; None where it reported nothing."""

    model: str | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None


class Exchange(Wire):
    """One request and response as the log knows it."""

    id: str
    session: str
    attempt: int
    line: int
    seq: int  # of its exchange.requested event
    meta: RequestMeta
    request_bytes: int
    state: ExchangeState
    epoch: int  # owner epoch: responses are appended under it
    owner: str | None  # process incarnation that holds the upstream connection, None once it ended
    head: ResponseHead | None = None  # durable response head
    received: int = 0  # durable response bytes of the current epoch
    usage: Usage | None = None


class Chunk(Wire):
    """Some bytes of a response and when they arrived, microseconds after the response head."""

    offset: int
    data: bytes
    at_us: int


# ---------------------------------------------------------------- snapshots


class Section(Wire):
    """One named part of a snapshot, as the engine wrote it."""

    name: str
    raw_bytes: int


class SnapshotInfo(Wire):
    """A snapshot's row. `seq`: everything the guest did before the capture is in the log at or before it."""

    id: str
    session: str
    parent: str | None
    line: int
    attempt: int
    seq: int
    generation: str  # of the life that was captured
    engine: str
    engine_build: str  # sha256 of the engine binary
    cpu: str  # digest of the CPU features it needs
    image: str  # image digest
    path: str  # of its manifest, relative to the node's data directory
    digest: str  # hex, of the manifest as committed
    sections: tuple[Section, ...]
    resync: str  # marker that guestd waits for after a thaw, hex
    clock: dict[str, Any] = Field(default_factory=dict[str, Any])  # engine's own notes, e.g. where the clock is kept
    output: dict[str, int] = Field(default_factory=dict[str, int])  # stream name -> bytes durable in the log at capture
    why: str  # "exchange", "periodic", "suspend", "outbox", "requested"
    paused_ms: float
    durable_ms: float  # from the start of the pause to durable, pause included
    raw_bytes: int
    stored_bytes: int  # what it added to the store: pages that others hold already cost nothing
    uploaded_ms: float | None = None  # from the start of the pause until the object store had it; None: not yet
    unusable: str | None = None
    pinned: bool = False  # retention leaves it alone
    created_at: datetime | None = None


# ---------------------------------------------------------------- sessions


class SessionView(Wire):
    """A session as the outside sees it."""

    id: str
    agent: AgentSpec
    key: str | None
    state: State
    desired: Desired
    reason: Reason
    detail: str | None
    generation: str | None
    line: int
    attempt: int
    last_seq: int
    node: str | None
    snapshot: str | None  # newest usable
    exit_code: int | None
    degraded: bool
    created_at: datetime
    updated_at: datetime
    crashes: int = 0
    forked_from: str | None = None  # the session whose log is this one's up to `forked_seq`
    forked_seq: int | None = None
    parent: str | None = None  # the session whose agent spawned it
    deadline: datetime | None = None  # it is ended then (max_duration)
    queue: str = "default"
    priority: int = 0
    concurrency_key: str | None = None
    tags: tuple[str, ...] = ()
    not_before: datetime | None = None  # of a delay
    expires_at: datetime | None = None  # fails if it has not started by then
    retry_at: datetime | None = None  # queued: when the next attempt begins
    version: int | None = None  # of its agent, as counted by the agent's name
    version_digest: str | None = None  # hex


class StartOptions(Wire):
    """How a session is started, apart from what runs. Checked by `rethaw.model.starting`."""

    queue: str = "default"
    priority: int = 0  # higher ones first, then older ones
    delay_s: float | None = None  # from now until it may start
    ttl_s: float | None = None  # from when it may start until it must have
    concurrency_key: str | None = None
    tags: tuple[str, ...] = ()


class Attempt(Wire):
    """One life of the process tree. `how` it ended: "exit code 1", "signal 9", ...; None: it goes on."""

    attempt: int
    started_at: datetime | None = None
    ended_at: datetime | None = None
    how: str | None = None


class Template(Wire):
    """A warm agent that sessions are forked from. `snapshot` and `ready_by` ("call", "line", "quiet") once it is ready."""

    name: str
    session: str
    snapshot: str | None = None
    ready_by: str | None = None
    created_at: datetime


class AgentFork(Wire):
    """What a fork that an agent made of itself is told: `forked` in the new session, not in the one it came from."""

    session: str  # the new one
    parent: str
    forked: bool


class Boot(Wire):
    """What a fresh boot is given. `cursor`: inbox messages up to this number are consumed already."""

    args: dict[str, Any]
    cursor: int
    fresh: bool  # true: an earlier attempt or life was abandoned, the log has its context


class Assignment(Wire):
    """One thing a node must do. Idempotent by (session, generation, action); repeated until the state moves on."""

    session: str
    action: Literal["start", "restore", "suspend", "cancel", "kill", "crash", "snapshot", "limits"]
    generation: str
    line: int
    attempt: int
    agent: AgentSpec
    boot: Boot | None = None  # with start
    snapshot: SnapshotInfo | None = None  # with restore
    files: SnapshotInfo | None = None  # the attempt begins, or began, with the files of this one
    branch: int | None = None  # of a fork, or after a rewind: what is at or before this seq is of the past
    reason: Reason = Reason.NONE
    revision: int  # grows with each new assignment to this node


class WaitPart(Wire):
    """One of the things that a wait of kind "any" or "all" is for. kind "signal": `name`, and as `wait` the id of the wait
    whose address was given out, if any. kind "child": `name` is the session's id."""

    kind: Literal["inbox", "signal", "timer", "child"]
    name: str | None = None
    wait: str | None = None
    after: int = 0
    timeout_s: float | None = None


class WaitSpec(Wire):
    """A wait that the guest opened. `id` is counted in guest memory and scoped by attempt ("2.17").

    Repeated with equal kind, name and timeout it keeps its first deadline; with others the old one is cancelled.
    kind "inbox": `after` is the guest's cursor. kind "timer": `timeout_s` is the time. kind "signal": `name`.
    kind "any": until the first of `parts`, "all": until each of them (children only)."""

    id: str
    kind: Literal["inbox", "signal", "timer", "any", "all"]
    name: str | None = None
    after: int = 0
    timeout_s: float | None = None
    parts: tuple[WaitPart, ...] = ()


class WaitState(Wire):
    """`done` with `timed_out`, or with what arrived. `payload` is JSON text as UTF-8 bytes, kept exactly."""

    id: str
    done: bool
    timed_out: bool = False
    number: int | None = None  # inbox message number
    item: str | None = None  # message or signal id
    name: str | None = None
    payload: bytes | None = None
    url: str | None = None  # one-time callback address of a signal wait
    deadline: datetime | None = None
    part: int | None = None  # kind "any": which of its parts came
    # Of a child: {state, reason, detail}, its result is `payload`. Kind "all": {children: [...]}, and `payload` a list; None
    # when that is too much for one answer.
    outcome: dict[str, Any] | None = None


class Message(Wire):
    """An inbox or outbox message. `payload`: JSON text as UTF-8 bytes."""

    id: str
    number: int
    payload: bytes
    at: datetime


class NodeInfo(Wire):
    id: str
    incarnation: str  # new at each start of the node process
    data_dir: str
    engines: tuple[str, ...]
    memory_bytes: int


class Lease(Wire):
    node: str
    incarnation: str
    seconds: float  # from the moment of the answer


class StateChange(Wire):
    """A node's report. Allowed moves are control's business; `events` are appended in the same transaction.

    `waits`, with SUSPENDED: ids of the waits that the captured guest has no answer to. The move is refused when one of
    them is done. None: the node does not say, and the move is refused when any wait was done about that time."""

    state: State
    reason: Reason = Reason.NONE
    detail: str | None = None
    exit_code: int | None = None
    events: tuple[NewEvent, ...] = ()
    waits: tuple[str, ...] | None = None
