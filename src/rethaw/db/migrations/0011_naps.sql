-- Sessions that policy suspended for a time, because their programs did nothing that can be seen.

ALTER TABLE sessions ADD COLUMN nap_until timestamptz;      -- suspended with reason nap: resumed then at the latest
CREATE INDEX sessions_nap_until ON sessions (nap_until) WHERE nap_until IS NOT NULL;
