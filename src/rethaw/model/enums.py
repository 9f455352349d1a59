"""The closed sets: states, reasons, durability, kinds of event."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Observed state of a session (DESIGN: created -> queued -> starting -> running <-> waiting -> ...)."""

    CREATED = "created"
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    RESUMING = "resuming"
    RECOVERING = "recovering"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (State.COMPLETED, State.FAILED, State.CANCELLED)

    @property
    def on_node(self) -> bool:
        """Whether a sandbox may exist for it."""
        return self in (
            State.STARTING, State.RUNNING, State.WAITING, State.SUSPENDING, State.RESUMING, State.RECOVERING,
        )  # fmt: skip


class Desired(StrEnum):
    """What somebody wants of a session."""

    RUNNING = "running"
    SUSPENDED = "suspended"
    CANCELLED = "cancelled"


class Reason(StrEnum):
    """Why a session is in its state, or why a life of it ended."""

    NONE = "none"
    IDLE = "idle"  # suspended by policy while waiting
    NAP = "nap"  # suspended by policy for a time: it did nothing that can be seen
    REQUESTED = "requested"  # a person asked
    PROVIDER_HOLD = "provider_hold"  # the provider said "later"; frozen meanwhile
    SANDBOX_DIED = "sandbox_died"
    GUEST_UNRESPONSIVE = "guest_unresponsive"
    CHANNEL_BROKEN = "channel_broken"
    NODE_LOST = "node_lost"
    NODE_STOPPED = "node_stopped"  # the server was stopped in order; resumed when it is back
    OUT_OF_MEMORY = "out_of_memory"
    SNAPSHOT_UNUSABLE = "snapshot_unusable"
    CRASH_LOOP = "crash_loop"
    BOOT_FAILED = "boot_failed"
    IMAGE_FAILED = "image_failed"
    COMMAND_NOT_FOUND = "command_not_found"
    EXITED = "exited"  # the program ended by itself; `exit_code` says how
    MAX_DURATION = "max_duration"
    CANCELLED = "cancelled"
    FENCED = "fenced"
    FORKED = "forked"  # a new session from another one's snapshot
    REWOUND = "rewound"  # a person took it back to an older snapshot
    EXPIRED = "expired"  # it had not started when its ttl was over
    RETRY = "retry"  # its program failed; a new attempt begins
    BUDGET_EXCEEDED = "budget_exceeded"  # it has spent what it may
    UPGRADED = "upgraded"  # a person gave it another version of its agent


class Durability(StrEnum):
    """What a released answer survives (promise 4)."""

    LOCAL = "local"
    REPLICATED = "replicated"
    RELAXED = "relaxed"


class ExchangeState(StrEnum):
    """Where one request and response stands. `OPEN` until its response is whole in the log."""

    OPEN = "open"
    COMPLETE = "complete"  # whole response durable, whatever its status
    FAILED = "failed"  # upstream broke; what was received is recorded and passed on as it was
    TORN = "torn"  # upstream lost after the guest already held bytes
    ORPHANED = "orphaned"  # answered, but the agent went another way after a crash


class EventType(StrEnum):
    """Every type of event in the context log. `data` of each is described in docs/concepts.md."""

    SESSION_CREATED = "session.created"
    SESSION_STATE = "session.state"  # {state, reason, detail?}
    SESSION_RESULT = "session.result"  # body: JSON value the agent returned
    SESSION_DIVERGED = "session.diverged"
    SESSION_CRASHED = "session.crashed"  # {reason, detail, generation}
    SESSION_UPGRADED = "session.upgraded"  # the new attempt runs another version {from_version, to_version, at, files?}
    SESSION_FORKED = "session.forked"  # another session begins here {fork, seq, snapshot}
    LINE_OPENED = "line.opened"  # {line, parent, branch_seq, snapshot?, why, seq?}
    ATTEMPT_STARTED = "attempt.started"  # {attempt, fresh, command}
    ATTEMPT_EXITED = "attempt.exited"  # {exit_code, signal?}
    EXCHANGE_REQUESTED = "exchange.requested"  # {exchange, provider, method, path, model?, request_bytes}
    EXCHANGE_UPSTREAM = "exchange.upstream"  # {exchange, epoch, try}: about to send upstream
    EXCHANGE_COMPLETED = "exchange.completed"  # {exchange, status, model, input_tokens, output_tokens, ...}
    EXCHANGE_FAILED = "exchange.failed"  # {exchange, error, possibly_paid}
    EXCHANGE_ADOPTED = "exchange.adopted"  # a repeated request was given an exchange of the tail {exchange, how}
    EXCHANGE_SERVED = "exchange.served"  # answered from the log after a restore {exchange, offset, tokens}
    EXCHANGE_RELEASED = "exchange.released"  # first byte let go to the agent {exchange, snapshot?}
    EXCHANGE_REISSUED = "exchange.reissued"  # upstream cut off by a crash of its node; sent once more
    EXCHANGE_TORN = "exchange.torn"
    EXCHANGE_ORPHANED = "exchange.orphaned"
    EXCHANGE_HELD = "exchange.held"  # provider said later {exchange, status, retry_after}
    MESSAGE_RECEIVED = "message.received"  # into the inbox {message, number}; body: payload
    MESSAGE_CONSUMED = "message.consumed"  # cursor moved {number}
    MESSAGE_SENT = "message.sent"  # outbox, provisional until a snapshot holds it {message, number}; body: payload
    MESSAGE_PUBLISHED = "message.published"  # {message}: visible outside
    CHILD_SPAWNED = "child.spawned"  # created once a snapshot holds it {child, agent}; body: {agent, args}
    CHILD_TOLD = "child.told"  # a message to it or its cancelling {child, act, id}; body: payload
    WAIT_OPENED = "wait.opened"
    WAIT_COMPLETED = "wait.completed"
    WAIT_CANCELLED = "wait.cancelled"
    SIGNAL_RECEIVED = "signal.received"  # {name, signal}; body: payload
    EMITTED = "emitted"  # ctx.emit {name}; body: JSON data
    OUTPUT = "output"  # {stream: stdout|stderr, offset}; body: bytes
    TERMINAL_RESIZED = "terminal.resized"  # {rows, cols, offset}: so from that byte of stdout on
    SNAPSHOT_CREATED = "snapshot.created"  # {snapshot, parent, seq, paused_ms, durable_ms, stored_bytes, why}
    SNAPSHOT_RESTORED = "snapshot.restored"  # {snapshot, generation, resume_ms}
    SNAPSHOT_FAILED = "snapshot.failed"
    SNAPSHOT_UNUSABLE = "snapshot.unusable"
    DURABILITY_DEGRADED = "durability.degraded"
    DURABILITY_RESTORED = "durability.restored"
    CHANNEL_MALFORMED = "channel.malformed"
    RETRY_SCHEDULED = "retry.scheduled"  # {attempt, of, after, at, delay_s}: a new attempt begins
    BUDGET_WARNING = "budget.warning"  # {what, used, limit}: 80 % of it are used, or tokens cannot be counted
    BUDGET_EXCEEDED = "budget.exceeded"  # {what, used, limit, calls}: the session is stopped
    BUDGET_CHANGED = "budget.changed"  # {budget}: a person gave the session another one
    EGRESS_OPENED = "egress.opened"  # {host, port, address, tunnel}
    EGRESS_REFUSED = "egress.refused"  # {host, port?, why, rule?, repeats?, others?}
    EGRESS_FAILED = "egress.failed"  # {host, port, error, repeats?, others?}
    EGRESS_CLOSED = "egress.closed"  # {host, port, sent, received, seconds, tunnel, why?}
