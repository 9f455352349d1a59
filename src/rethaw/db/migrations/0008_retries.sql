-- Retries: a new attempt after a failure of the program. Budgets: what a session may spend.

ALTER TABLE sessions
    ADD COLUMN failures integer NOT NULL DEFAULT 0,         -- attempts that the retry policy has answered
    ADD COLUMN retry_at timestamptz,                        -- queued: the next attempt begins then
    ADD COLUMN files_from text,                             -- snapshot whose files the attempt began with; null: fresh
    ADD COLUMN budget text,                                 -- BudgetSpec in place of the agent's own; null: that one
    ADD COLUMN awake_s double precision NOT NULL DEFAULT 0, -- that its agent ran, before state_since
    ADD COLUMN awake_until timestamptz,                     -- its node was seen last then, and came back as another
    ADD COLUMN wall_at timestamptz;                         -- when the wall budget is to be looked at
CREATE INDEX sessions_retry_at ON sessions (retry_at) WHERE retry_at IS NOT NULL;
CREATE INDEX sessions_wall_at ON sessions (wall_at) WHERE wall_at IS NOT NULL;

-- Moves of the cursor back, to a message whose turn did not finish: what was consumed before them counts no more.
ALTER TABLE inbox_moves ADD COLUMN back boolean NOT NULL DEFAULT false;
