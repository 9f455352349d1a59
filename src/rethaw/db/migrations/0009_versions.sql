-- Versions of agents, which of them each attempt of a session runs, and the version of the log's own format.

CREATE TABLE agents (
    name        text PRIMARY KEY,
    pinned      int                                         -- the version that a start by name takes; null: the newest deployed
);

CREATE TABLE agent_versions (
    agent       text NOT NULL REFERENCES agents (name) ON DELETE CASCADE,
    number      int NOT NULL,                               -- 1, 2, ... in order of appearance
    digest      text NOT NULL,                              -- of image, code and everything else in the spec
    spec        text NOT NULL,                              -- AgentSpec
    starting    text NOT NULL DEFAULT '{}',                 -- StartOptions of its newest `deploy`
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    deployed_at timestamptz,                                -- newest `deploy` of it; null: only ever run from a file
    PRIMARY KEY (agent, number),
    UNIQUE (agent, digest)
);

ALTER TABLE session_specs ADD COLUMN version int;           -- of `agent`; null: from before versions were counted

-- What an attempt ran that is not, or may not be, what session_specs has now. Attempts without a row run what that has.
CREATE TABLE attempt_specs (
    session     text NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    attempt     int NOT NULL,
    agent       text NOT NULL,
    version     int,
    PRIMARY KEY (session, attempt)
);

ALTER TABLE sessions ADD COLUMN log_format smallint NOT NULL DEFAULT 1;      -- equal to rethaw.log.FORMAT of who began the session's log
