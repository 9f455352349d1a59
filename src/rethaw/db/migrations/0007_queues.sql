-- How sessions are started and ordered: queues, priorities, delays, tags, schedules.

-- slot: 'waiting' wants one of its queue's, 'held' has one, 'free' wants none: it has ended, or is suspended where that
-- gives it back. The empty queue is that of templates, which no limit counts.
ALTER TABLE session_specs
    ADD COLUMN queue text NOT NULL DEFAULT 'default',
    ADD COLUMN priority integer NOT NULL DEFAULT 0,
    ADD COLUMN concurrency_key text,
    ADD COLUMN not_before timestamptz,                      -- starts no sooner
    ADD COLUMN expires_at timestamptz,                      -- fails if it has not started by then; null once it has
    ADD COLUMN tags text[] NOT NULL DEFAULT '{}',
    ADD COLUMN slot text NOT NULL DEFAULT 'free';
UPDATE session_specs p SET queue = CASE WHEN EXISTS (SELECT 1 FROM templates t WHERE t.session = p.session)
        THEN '' ELSE 'default' END,
    slot = CASE WHEN s.state IN ('completed', 'failed', 'cancelled') THEN 'free'
        WHEN s.state IN ('created', 'queued') THEN 'waiting' ELSE 'held' END
    FROM sessions s WHERE s.id = p.session;
CREATE INDEX session_specs_slot ON session_specs (slot, queue, concurrency_key) WHERE slot <> 'free';
CREATE INDEX session_specs_expires ON session_specs (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX session_specs_tags ON session_specs USING gin (tags);

-- Those that were given a limit or paused; any other name is a queue without limits. Its row's lock is taken to give
-- out a slot.
CREATE TABLE queues (
    name text PRIMARY KEY,
    max_sessions integer,
    max_per_key integer,                                    -- with one concurrency_key
    paused boolean NOT NULL DEFAULT false,
    suspended_count boolean NOT NULL DEFAULT true,          -- suspended sessions keep their slots
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE schedules (
    name text PRIMARY KEY,
    agent text NOT NULL,                                    -- AgentSpec
    args text NOT NULL,                                     -- JSON object
    options text NOT NULL,                                  -- StartOptions
    cron text,                                              -- this, or every_s
    tz text NOT NULL DEFAULT 'UTC',
    every_s double precision,
    catch_up text NOT NULL,                                 -- latest, none, all
    overlap text NOT NULL,                                  -- allow, skip
    paused boolean NOT NULL DEFAULT false,
    anchor timestamptz NOT NULL,                            -- every_s counts from here
    next_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX schedules_next ON schedules (next_at) WHERE NOT paused;

-- What became of each time, in the transaction that moved next_at past it. Old ones are dropped.
CREATE TABLE firings (
    schedule text NOT NULL REFERENCES schedules (name) ON DELETE CASCADE,
    due timestamptz NOT NULL,
    what text NOT NULL,                                     -- started, triggered, skipped, missed, failed
    session text,
    detail text,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (schedule, due)
);
