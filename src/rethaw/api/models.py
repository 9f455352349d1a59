"""Shapes of the HTTP API that are not wire types of `rethaw.model.types`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from rethaw.model.types import AgentSpec, Attempt, BudgetSpec, Message, SessionView, SnapshotInfo, Spent, StartOptions


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StartBody(_Body):
    """Start a session. With a `key`, starting again with the same agent and args gives the same session."""

    agent: AgentSpec
    args: dict[str, Any] = Field(default_factory=dict[str, Any])
    key: str | None = None
    options: StartOptions = Field(default_factory=StartOptions)


class CancelBody(_Body):
    now: bool = False  # without the agent's grace period


class CrashBody(_Body):
    what: Literal["sandbox", "node", "db"] = "sandbox"


class ForkBody(_Body):
    """`at`: a SEQ, a snapshot's id or a beginning of one; without it the newest snapshot (a running session takes one)."""

    at: StrictInt | StrictStr | None = None
    n: StrictInt = 1
    redeliver: bool = False  # what came after `at` is delivered again


class RewindBody(_Body):
    to: StrictInt | StrictStr
    redeliver: bool = False


class Forks(BaseModel):
    sessions: list[SessionView]


class EmptyBody(_Body):
    """{}"""


class RetryBody(_Body):
    """`memory_bytes`: what it may use from then on; null: as before."""

    memory_bytes: StrictInt | None = Field(None, ge=1)


class Stats(BaseModel):
    """Counts over the whole session. `snapshots`: ever taken; `stored_bytes`: of those kept."""

    crashes: int
    exchanges: int
    upstream_calls: int
    served_from_log: int
    tokens_not_paid_twice: int
    input_tokens: int
    output_tokens: int
    snapshots: int
    restores: int
    stored_bytes: int


class SessionDetail(SessionView):
    stats: Stats
    attempts: list[Attempt] = []
    budget: BudgetSpec | None = None  # in force
    spent: Spent | None = None


class BudgetBody(_Body):
    """Other limits in place of the session's; those named in `add` are added to what it has."""

    limits: BudgetSpec
    add: list[str] = []


class SessionPage(BaseModel):
    sessions: list[SessionView]
    next: str | None


class OpenWait(BaseModel):
    kind: str  # inbox, signal, timer, exchange, node, person
    name: str | None
    since: str
    wakes_it: str
    deadline: str | None = None


class LastWords(BaseModel):
    """The end of what a failed session's program wrote: at most 10 lines of 2 KiB together. `cut`: there was more."""

    stream: str
    lines: list[str]
    cut: bool


class Why(BaseModel):
    """Waiting for what, since when, what wakes it, the last snapshot, where it would resume."""

    state: str
    desired: str
    reason: str
    detail: str | None
    since: str
    waiting_for: list[OpenWait]
    last_snapshot: dict[str, Any] | None
    would_resume_at: str | None
    last_words: LastWords | None = None


class Messages(BaseModel):
    """`payload` of each: base64 (URL alphabet) of its JSON text, exactly as it was sent."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    messages: list[Message]


class Snapshots(BaseModel):
    snapshots: list[SnapshotInfo]


class SignalGiven(BaseModel):
    signal: str


class Blob(BaseModel):
    digest: str  # sha256 hex


class BlobThere(BaseModel):
    there: bool


class Health(BaseModel):
    ok: bool
    version: str


# For bodies whose payload is taken as raw bytes, so FastAPI does not parse them.
PAYLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["payload"],
                    "properties": {
                        "payload": {"description": "any JSON value; its text is kept exactly"},
                        "idempotency_key": {"type": ["string", "null"]},
                    },
                }
            }
        },
    }
}
ANY_BODY: dict[str, Any] = {
    "requestBody": {"content": {"application/json": {"schema": {"description": "any JSON value"}}}}
}
BLOB_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/gzip": {"schema": {"type": "string", "format": "binary"}}},
    }
}
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "One of our errors",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "error": {
                            "type": "object",
                            "properties": {
                                "code": {"type": "string"},
                                "message": {"type": "string"},
                                "remedy": {"type": ["string", "null"]},
                                "details": {"type": "object"},
                            },
                        }
                    },
                }
            }
        },
    }
}
