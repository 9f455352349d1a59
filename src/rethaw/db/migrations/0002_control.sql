-- Sessions' control columns, nodes and what they are to do, snapshots, inbox and outbox, waits and signals.
-- JSON is kept as text where it must come back as it was sent: jsonb knows no NUL and no lone surrogates.

ALTER TABLE sessions
    ADD COLUMN agent_name text NOT NULL DEFAULT '',
    ADD COLUMN key text UNIQUE,
    ADD COLUMN memory_bytes bigint NOT NULL DEFAULT 0,
    ADD COLUMN state text NOT NULL DEFAULT 'created',
    ADD COLUMN desired text NOT NULL DEFAULT 'running',
    ADD COLUMN reason text NOT NULL DEFAULT 'none',
    ADD COLUMN detail text,
    ADD COLUMN node text,                                   -- runs it, or is about to
    ADD COLUMN incarnation text,                            -- the life of that node that was asked to
    ADD COLUMN snapshot text,                               -- newest usable of the path
    ADD COLUMN exit_code integer,
    ADD COLUMN degraded boolean NOT NULL DEFAULT false,
    ADD COLUMN updated_at timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN state_since timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN give_up_at timestamptz,                      -- max_duration
    ADD COLUMN cancel_by timestamptz,                       -- a cancelled session's node has until then
    ADD COLUMN wake boolean NOT NULL DEFAULT false,         -- something came while it was being suspended
    ADD COLUMN crashes integer NOT NULL DEFAULT 0,
    ADD COLUMN published_seq bigint NOT NULL DEFAULT 0,     -- effects of the path up to here are visible outside
    ADD COLUMN attempt_line integer NOT NULL DEFAULT 1,     -- where the current attempt began: after this
    ADD COLUMN attempt_seq bigint NOT NULL DEFAULT 0,       --   position of the log
    -- the crash-loop rule's memory (control/crashloop.py)
    ADD COLUMN restored text,                               -- snapshot that the current life came from; null: booted
    ADD COLUMN life_progress integer NOT NULL DEFAULT 0,
    ADD COLUMN loop_level integer NOT NULL DEFAULT 0,
    ADD COLUMN loop_deaths integer NOT NULL DEFAULT 0,
    ADD COLUMN loop_total integer NOT NULL DEFAULT 0,
    ADD COLUMN loop_high integer NOT NULL DEFAULT 0,
    ADD COLUMN loop_line integer,                           -- newest durable position before the first step back
    ADD COLUMN loop_seq bigint,
    ADD COLUMN crash_asked boolean NOT NULL DEFAULT false;  -- a person asked for the next crash

-- Apart from sessions, whose row is written anew by each append to the log.
CREATE TABLE session_specs (
    session text PRIMARY KEY REFERENCES sessions (id) ON DELETE CASCADE,
    agent text NOT NULL,                                    -- AgentSpec
    args text NOT NULL                                      -- JSON object
);

CREATE INDEX sessions_state ON sessions (state);
CREATE INDEX sessions_node ON sessions (node) WHERE node IS NOT NULL;
CREATE INDEX sessions_give_up ON sessions (give_up_at) WHERE give_up_at IS NOT NULL;
CREATE INDEX sessions_cancel_by ON sessions (cancel_by) WHERE cancel_by IS NOT NULL;

CREATE TABLE nodes (
    id text PRIMARY KEY,
    incarnation text NOT NULL,
    info text NOT NULL,
    memory_bytes bigint NOT NULL,
    lease_until timestamptz NOT NULL,
    revision bigint NOT NULL DEFAULT 0,                     -- of its newest assignment
    registered_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE assignments (
    node text NOT NULL,
    revision bigint NOT NULL,
    session text NOT NULL,
    generation text NOT NULL,                               -- of the life it is about
    action text NOT NULL,
    body text NOT NULL,                                     -- Assignment
    at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (node, revision)
);
CREATE INDEX assignments_session ON assignments (session);

-- No reference to sessions: the rows of an erased session stay until its node has deleted the files.
CREATE TABLE snapshots (
    id text PRIMARY KEY,
    session text NOT NULL,
    node text NOT NULL,
    parent text,
    line integer NOT NULL,
    attempt integer NOT NULL,
    seq bigint NOT NULL,
    info text NOT NULL,                                     -- SnapshotInfo
    why text NOT NULL,
    stored_bytes bigint NOT NULL,
    unusable text,
    erased boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX snapshots_session ON snapshots (session, seq);
CREATE INDEX snapshots_node ON snapshots (node);

CREATE TABLE inbox (
    session text NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    number bigint NOT NULL,
    id text NOT NULL UNIQUE,
    payload bytea NOT NULL,
    idempotency_key text,
    at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (session, number),
    UNIQUE (session, idempotency_key)
);

CREATE TABLE outbox (
    session text NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    number bigint NOT NULL,
    id text NOT NULL UNIQUE,
    payload bytea NOT NULL,
    line integer NOT NULL,                                  -- its message.sent event
    seq bigint NOT NULL,
    source text,                                            -- that event's key: the guest's call id
    at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (session, number)
);
CREATE INDEX outbox_source ON outbox (session, source);

CREATE TABLE inbox_moves (                                  -- each message.consumed event
    session text NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    line integer NOT NULL,
    seq bigint NOT NULL,
    number bigint NOT NULL,
    PRIMARY KEY (session, seq)
);

CREATE TABLE signals (
    session text NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    id text PRIMARY KEY,
    position bigint GENERATED ALWAYS AS IDENTITY,           -- order of arrival
    name text NOT NULL,
    payload bytea NOT NULL,
    idempotency_key text,
    for_attempt integer,                                    -- came through the callback address of one wait:
    for_wait text,                                          --   no other may take it
    at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (session, idempotency_key)
);
CREATE INDEX signals_name ON signals (session, name, position);

CREATE TABLE signal_uses (                                  -- a use counts while its event is on the path
    signal text NOT NULL REFERENCES signals (id) ON DELETE CASCADE,
    attempt integer NOT NULL,
    wait text NOT NULL,
    line integer NOT NULL,
    seq bigint NOT NULL,
    PRIMARY KEY (signal, seq)
);

CREATE TABLE waits (
    session text NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    attempt integer NOT NULL,
    id text NOT NULL,
    kind text NOT NULL,
    name text,
    after bigint NOT NULL DEFAULT 0,
    timeout_s double precision,
    state text NOT NULL,                                    -- open, done, cancelled, stale (its line was left)
    opened_at timestamptz NOT NULL DEFAULT now(),
    deadline timestamptz,
    opened_line integer NOT NULL,
    opened_seq bigint NOT NULL,
    done_line integer,                                      -- of wait.completed or wait.cancelled
    done_seq bigint,
    given_at timestamptz,                                   -- its node was told the outcome
    timed_out boolean NOT NULL DEFAULT false,
    number bigint,
    item text,
    payload bytea,
    PRIMARY KEY (session, attempt, id)
);
CREATE INDEX waits_deadline ON waits (deadline) WHERE state = 'open' AND deadline IS NOT NULL;

CREATE TABLE callbacks (
    hash text PRIMARY KEY,                                  -- sha256 of the token; the token itself is nowhere
    session text NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    attempt integer NOT NULL,
    wait text NOT NULL,
    used_at timestamptz
);
