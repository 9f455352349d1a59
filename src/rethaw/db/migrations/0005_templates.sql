-- Names of sessions that are forked at each start.

CREATE TABLE templates (
    name        text PRIMARY KEY,
    session     text NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    snapshot    text,                                       -- null until it is ready
    ready_by    text,                                       -- call, line or quiet
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);
