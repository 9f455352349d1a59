-- What a session with a budget has spent: model calls that can change no more, added up, so that a call need not count all
-- those before it (control/budgets.py). Everything in it can be counted again from the log.

CREATE TABLE spent_totals (
    session     text PRIMARY KEY REFERENCES sessions (id) ON DELETE CASCADE,
    upto        bigint NOT NULL,                            -- seq of the newest exchange that it knows
    pending     text[] NOT NULL,                            -- those up to there that may still change: not in the sums
    sums        jsonb NOT NULL                              -- a list, one for each pair of models asked and answering
) WITH (fillfactor = 50);
