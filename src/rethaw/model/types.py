"""What travels between rooms and over HTTP. Sizes in bytes, times in seconds, `at` in UTC, unless said otherwise."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from rethaw.model.enums import Desired, Durability, EventType, ExchangeState, Reason, State

MIB = 1 << 20
MESSAGE_LIMIT = 1 * MIB  # one inbox, outbox or signal payload
EXCHANGE_LIMIT = 64 * MIB  # one request or response body


class Wire(BaseModel):
    """Base of all wire types: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")


# ---------------------------------------------------------------- agents and images


class ImageStep(Wire):
    """One thing done to an image, in its order. `blob` is the digest of an uploaded tar.gz, unpacked at `target`."""

    kind: Literal["apt", "pip", "run", "add"]
    words: tuple[str, ...] = ()  # packages, requirements, or one shell command; of "add" the machine it is for, if any
    env: dict[str, str] = Field(default_factory=dict[str, str])  # of "run"
    blob: str | None = None
    target: str | None = None

    def said(self) -> str:
        """For people."""
        if self.kind == "add":
            return f"add {(self.blob or '')[:12]} to {self.target}"
        return f"{self.kind} {' '.join(self.words)}"


class ImageSpec(Wire):
    """What an image is made of: the base with `apt`, then `pip`, then `steps`. Its digest (images.spec_digest) names it;
    equal specs are one image."""

    suite: str = "bookworm"
    apt: tuple[str, ...] = ()  # on top of the base image's packages
    pip: tuple[str, ...] = ()  # requirement specifiers, installed for the image's own python3
    env: dict[str, str] = Field(default_factory=dict[str, str])
    steps: tuple[ImageStep, ...] = ()
    python: str | None = None  # the interpreter that runs the agent; None: the image's own python3

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: SerializerFunctionWrapHandler):  # no return type: the schema stays that of the fields
        """A spec without steps is written as before there were any: sessions and templates are found by these bytes."""
        out = handler(self)
        for name in ("steps", "python"):
            if not out.get(name):
                out.pop(name, None)
        return out


EngineName = Literal["gvisor", "qemu"]


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


class Template(Wire):
    """A warm agent that sessions are forked from. `snapshot` and `ready_by` ("call", "line", "quiet") once it is ready."""

    name: str
    session: str
    snapshot: str | None = None
    ready_by: str | None = None
    created_at: datetime


class Boot(Wire):
    """What a fresh boot is given. `cursor`: inbox messages up to this number are consumed already."""

    args: dict[str, Any]
    cursor: int
    fresh: bool  # true: an earlier attempt or life was abandoned, the log has its context


class Assignment(Wire):
    """One thing a node must do. Idempotent by (session, generation, action); repeated until the state moves on."""

    session: str
    action: Literal["start", "restore", "suspend", "cancel", "kill", "crash", "snapshot"]
    generation: str
    line: int
    attempt: int
    agent: AgentSpec
    boot: Boot | None = None  # with start
    snapshot: SnapshotInfo | None = None  # with restore
    branch: int | None = None  # of a fork, or after a rewind: what is at or before this seq is of the past
    reason: Reason = Reason.NONE
    revision: int  # grows with each new assignment to this node


class WaitSpec(Wire):
    """A wait that the guest opened. `id` is counted in guest memory and scoped by attempt ("2.17").

    Repeated with equal kind, name and timeout it keeps its first deadline; with others the old one is cancelled.
    kind "inbox": `after` is the guest's cursor. kind "timer": `timeout_s` is the time. kind "signal": `name`."""

    id: str
    kind: Literal["inbox", "signal", "timer"]
    name: str | None = None
    after: int = 0
    timeout_s: float | None = None


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
