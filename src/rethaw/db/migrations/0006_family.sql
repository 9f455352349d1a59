-- Waits for several things at once, children, and forks that an agent makes of itself.
-- JSON is kept as text (0002_control.sql says why).

ALTER TABLE waits
    ADD COLUMN parts text,                                  -- of kind any and all: {parts, deadlines, until}
    ADD COLUMN part integer,                                -- which of them completed it; kept for a repeat
    ADD COLUMN children text[],                             -- those among them
    ADD COLUMN outcome text;                                -- of a child: {state, reason, detail}
CREATE INDEX waits_children ON waits USING gin (children) WHERE state = 'open' AND children IS NOT NULL;

ALTER TABLE sessions
    ADD COLUMN parent text,                                 -- the session whose agent spawned it
    ADD COLUMN untold boolean NOT NULL DEFAULT false;       -- it has ended, its parent or its children do not know yet
CREATE INDEX sessions_untold ON sessions (id) WHERE untold;

-- Spawned sessions, once a snapshot of the parent that contains the spawn is durable.
CREATE TABLE children (
    child text PRIMARY KEY,
    parent text NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    source text NOT NULL,                                   -- key of its child.spawned event: the guest's call id
    spec text NOT NULL,                                     -- {agent, args}
    state text NOT NULL DEFAULT 'due',                      -- due, running, ended
    outcome text,                                           -- {state, reason, detail}
    result bytea,
    ended_at timestamptz,
    told boolean NOT NULL DEFAULT false                     -- whoever waited for its end was woken
);
CREATE INDEX children_parent ON children (parent, source);
CREATE INDEX children_due ON children (child) WHERE state = 'due';
CREATE INDEX children_ended ON children (child) WHERE state = 'ended' AND NOT told;

-- What parents did to their children beside spawning them, in order.
CREATE TABLE child_acts (
    id text PRIMARY KEY,                                    -- of a message: its id in the child's inbox
    position bigint GENERATED ALWAYS AS IDENTITY,
    parent text NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    child text NOT NULL,
    act text NOT NULL,                                      -- message, cancel
    source text NOT NULL,                                   -- key of the child.told event
    payload bytea,
    done_at timestamptz
);
CREATE INDEX child_acts_source ON child_acts (parent, source);
CREATE INDEX child_acts_due ON child_acts (position) WHERE done_at IS NULL;

-- Forks that agents made of themselves, by the call that did it and the position of the snapshot that they began from.
CREATE TABLE agent_forks (
    session text NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    attempt integer NOT NULL,
    call text NOT NULL,
    fork text NOT NULL UNIQUE,
    line integer NOT NULL,
    seq bigint NOT NULL
);
CREATE INDEX agent_forks_call ON agent_forks (session, attempt, call);
