-- Pins: snapshots that retention leaves alone. Uploads: when the object store had one.

ALTER TABLE snapshots
    ADD COLUMN pinned boolean NOT NULL DEFAULT false,
    ADD COLUMN uploaded_ms double precision;                -- from the start of the pause; null: not there (yet)
