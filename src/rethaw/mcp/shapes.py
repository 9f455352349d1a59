"""What the tools give back. Their JSON schemas are what MCP clients see."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from rethaw.sdk.types import Stats

if TYPE_CHECKING:
    from rethaw.model.types import Event, SessionView, SnapshotInfo
    from rethaw.model.versions import AgentVersion
    from rethaw.sdk.types import Message, Outcome, Why

BODY_CHARS = 4000  # of one event or file that are shown


class SessionInfo(BaseModel):
    """A session as it is now."""

    id: str
    agent: str
    state: str = Field(description="created, queued, starting, running, waiting, suspending, suspended, resuming, "
                                   "recovering, or at the end completed, failed, cancelled")  # fmt: skip
    reason: str
    detail: str | None
    over: bool = Field(description="it has ended")
    key: str | None
    last_seq: int = Field(description="number of its newest event")
    snapshot: str | None = Field(description="its newest snapshot")
    crashes: int
    exit_code: int | None
    forked_from: str | None
    created_at: datetime
    updated_at: datetime

    @classmethod
    def of(cls, view: SessionView) -> SessionInfo:
        return cls(
            id=view.id,
            agent=view.agent.name,
            state=view.state.value,
            reason=view.reason.value,
            detail=view.detail,
            over=view.state.final,
            key=view.key,
            last_seq=view.last_seq,
            snapshot=view.snapshot,
            crashes=view.crashes,
            exit_code=view.exit_code,
            forked_from=view.forked_from,
            created_at=view.created_at,
            updated_at=view.updated_at,
        )


class SessionDetail(BaseModel):
    session: SessionInfo
    stats: Stats = Field(description="what it did and what durability did for it")


class SessionList(BaseModel):
    sessions: list[SessionInfo] = Field(description="newest first")


class Wait(BaseModel):
    kind: str
    name: str | None
    since: str | None
    wakes_it: str | None


class Reasons(BaseModel):
    """Why a session stands where it does."""

    state: str
    reason: str
    detail: str | None
    since: str | None
    waiting_for: list[Wait]
    last_snapshot: Any
    would_resume_at: Any = Field(description="what a crash now would go back to")
    last_words: list[str] = Field(description="of a failed session: the end of what its program wrote")

    @classmethod
    def of(cls, why: Why) -> Reasons:
        waits = [Wait(kind=w.kind, name=w.name, since=w.since, wakes_it=w.wakes_it) for w in why.waiting_for]
        return cls(
            state=why.state,
            reason=why.reason,
            detail=why.detail,
            since=why.since,
            waiting_for=waits,
            last_snapshot=why.last_snapshot,
            would_resume_at=why.would_resume_at,
            last_words=[] if why.last_words is None else why.last_words.lines,
        )


class Sent(BaseModel):
    id: str
    number: int = Field(description="its place in the inbox, from 1")


class Signalled(BaseModel):
    signal: str = Field(description="the signal's id")


class EventInfo(BaseModel):
    seq: int
    line: int
    type: str
    at: datetime
    data: dict[str, Any]
    body: str | None = Field(description="its payload or output as text, cut off when it is long")
    superseded: bool = Field(description="a crash or a rewind took it back")

    @classmethod
    def of(cls, event: Event) -> EventInfo:
        return cls(
            seq=event.seq,
            line=event.line,
            type=event.type.value,
            at=event.at,
            data=event.data,
            body=None if event.body is None else readable(event.body),
            superseded=event.superseded,
        )


class Events(BaseModel):
    events: list[EventInfo]
    next: int = Field(description="pass it as `after` to go on from here")
    state: str
    over: bool = Field(description="it has ended, and nothing will come after this")


class OutputText(BaseModel):
    text: str
    bytes: int = Field(description="how much it wrote so far")
    cut: bool = Field(description="the beginning is left out")


class OutboxMessage(BaseModel):
    number: int
    payload: Any
    at: datetime | None

    @classmethod
    def of(cls, message: Message) -> OutboxMessage:
        return cls(number=message.number, payload=message.payload, at=message.at)


class Outbox(BaseModel):
    messages: list[OutboxMessage]
    next: int = Field(description="pass it as `after` to go on from here")


class ResultNow(BaseModel):
    over: bool = Field(description="false: it goes on, ask again")
    state: str
    result: Any = Field(description="what the agent returned, once it completed")
    exit_code: int | None
    detail: str | None = Field(description="why it ended without a result")

    @classmethod
    def of(cls, view: SessionView, outcome: Outcome) -> ResultNow:
        over = view.state.final
        detail = (view.detail or view.reason.value) if over and view.state.value != "completed" else None
        result = outcome.result if over else None
        return cls(over=over, state=view.state.value, result=result, exit_code=view.exit_code, detail=detail)


class Snapshot(BaseModel):
    id: str
    session: str
    seq: int = Field(description="the event that it belongs to")
    why: str
    paused_ms: float
    stored_bytes: int
    pinned: bool
    created_at: datetime | None

    @classmethod
    def of(cls, info: SnapshotInfo) -> Snapshot:
        return cls(
            id=info.id,
            session=info.session,
            seq=info.seq,
            why=info.why,
            paused_ms=info.paused_ms,
            stored_bytes=info.stored_bytes,
            pinned=info.pinned,
            created_at=info.created_at,
        )


class SnapshotList(BaseModel):
    snapshots: list[Snapshot]


class File(BaseModel):
    path: str
    kind: str
    size: int


class Files(BaseModel):
    files: list[File]
    left_out: int = Field(description="how many more there are")


class FileText(BaseModel):
    text: str
    bytes: int
    cut: bool = Field(description="the end is left out")


class AgentHere(BaseModel):
    file: str = Field(description="pass it to session_start_agent")
    agent: str
    arguments: str
    about: str


class AgentsHere(BaseModel):
    agents: list[AgentHere]


class DeployedAgent(BaseModel):
    name: str
    version: int
    arguments: dict[str, Any] | None = Field(
        description="JSON Schema of what it takes; null: not known, anything is passed on"
    )

    @classmethod
    def of(cls, one: AgentVersion) -> DeployedAgent:
        signature = one.spec.signature
        return cls(name=one.agent, version=one.version, arguments=signature.arguments if signature else None)


class Deployed(BaseModel):
    agents: list[DeployedAgent]


def readable(body: bytes) -> str:
    """Text of a payload for a reader: odd bytes replaced, the rest of a long one counted."""
    text = body[: BODY_CHARS * 4].decode(errors="replace")
    if len(text) <= BODY_CHARS and len(body) <= BODY_CHARS * 4:
        return whole(text)
    return f"{whole(text[:BODY_CHARS])}… ({len(body)} bytes)"


def whole(text: str) -> str:
    """Without lone surrogates, which strict JSON parsers refuse."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def jsonable(value: Any) -> Any:
    """A payload, with every string in it such that any client can read it."""
    return json.loads(whole(json.dumps(value, ensure_ascii=False)))
