-- Forks and rewinds. A fork's log is its parent's up to a position, by reference, then its own.
--
-- A session's log is virtual: events of its ancestors, each up to where it was left (rethaw_ancestry), then its own, with
-- one counting of seq and of lines through all of them: a fork's first seq and first line follow those of its parent at
-- the position forked from. So a seq or a line number means one thing within a session's log, whoever's rows it is in.

ALTER TABLE sessions
    ADD COLUMN forked_from text,
    ADD COLUMN fork_seq bigint NOT NULL DEFAULT 0,          -- the parent's log counts up to here
    ADD COLUMN first_line int NOT NULL DEFAULT 1,
    ADD COLUMN branch_after bigint,                         -- newest fork or rewind: the log's end at that time
    ADD COLUMN inbox_base bigint NOT NULL DEFAULT 0,        -- numbers up to here are the ancestors'
    ADD COLUMN outbox_base bigint NOT NULL DEFAULT 0,
    ADD COLUMN high_attempt int NOT NULL DEFAULT 0;         -- attempts up to here may have been, though a rewind left them
CREATE INDEX sessions_forked_from ON sessions (forked_from) WHERE forked_from IS NOT NULL;

-- parent_session: of the line `parent`, null for the line's own session. The from_ columns: the line was opened by a fork
-- or a rewind; of what was before it (up to opened_after) it knows line from_line as it was at from_seq, nothing more.
ALTER TABLE lines
    ADD COLUMN parent_session text,
    ADD COLUMN from_session text,
    ADD COLUMN from_line int,
    ADD COLUMN from_seq bigint,
    ADD COLUMN opened_after bigint;

-- Where in the log each came in, so that a fork knows what was there already.
ALTER TABLE inbox ADD COLUMN seq bigint NOT NULL DEFAULT 0;
ALTER TABLE signals ADD COLUMN seq bigint NOT NULL DEFAULT 0;
UPDATE inbox i SET seq = e.seq FROM events e
    WHERE e.session = i.session AND e.type = 'message.received' AND e.data->>'message' = i.id;
UPDATE signals s SET seq = e.seq FROM events e
    WHERE e.session = s.session AND e.type = 'signal.received' AND e.data->>'signal' = s.id;

ALTER TABLE signal_uses ADD COLUMN session text REFERENCES sessions (id) ON DELETE CASCADE;
UPDATE signal_uses u SET session = s.session FROM signals s WHERE s.id = u.signal;
ALTER TABLE signal_uses ALTER COLUMN session SET NOT NULL;
ALTER TABLE signal_uses DROP CONSTRAINT signal_uses_pkey;
ALTER TABLE signal_uses ADD PRIMARY KEY (signal, session, seq);

-- Every message.sent event that an outbox message came from: a line that was left keeps its own.
CREATE TABLE outbox_places (
    session text NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    message text NOT NULL,
    number bigint NOT NULL,
    line integer NOT NULL,
    seq bigint NOT NULL,
    PRIMARY KEY (session, seq)
);
INSERT INTO outbox_places (session, message, number, line, seq) SELECT session, id, number, line, seq FROM outbox;


-- ---------------------------------------------------------------- lineage

-- The session (depth 0) and those it was forked from, each up to the last seq that belongs to the session's log.
CREATE FUNCTION rethaw_ancestry(p_session text) RETURNS TABLE (session text, upto bigint, depth int)
LANGUAGE sql STABLE ROWS 2 AS $$
    WITH RECURSIVE a AS (
        SELECT s.id, 9223372036854775807 AS upto, 0 AS depth, s.forked_from, s.fork_seq
        FROM sessions s WHERE s.id = p_session
        UNION ALL
        SELECT s.id, least(a.upto, a.fork_seq), a.depth + 1, s.forked_from, s.fork_seq
        FROM a JOIN sessions s ON s.id = a.forked_from
    )
    SELECT a.id, a.upto, a.depth FROM a
$$;

-- The session, itself or an ancestor, whose line it is.
CREATE FUNCTION rethaw_owner(p_session text, p_line int) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT a.session FROM rethaw_ancestry(p_session) a JOIN sessions s ON s.id = a.session
    WHERE s.first_line <= p_line ORDER BY a.depth LIMIT 1
$$;

-- As before, through the ancestors.
DROP FUNCTION rethaw_path(text, int);
CREATE FUNCTION rethaw_path(p_session text, p_line int) RETURNS TABLE (session text, line int, upto bigint)
LANGUAGE sql STABLE ROWS 4 AS $$
    WITH RECURSIVE p AS (
        SELECT l.session, l.line, coalesce(l.parent_session, l.session) AS parent_session, l.parent, l.branch_seq,
               9223372036854775807 AS upto
        FROM lines l WHERE l.session = rethaw_owner(p_session, p_line) AND l.line = p_line
        UNION ALL
        SELECT l.session, l.line, coalesce(l.parent_session, l.session), l.parent, l.branch_seq,
               least(p.upto, p.branch_seq)
        FROM p JOIN lines l ON l.session = p.parent_session AND l.line = p.parent
    )
    SELECT p.session, p.line, p.upto FROM p
$$;

-- What belongs to the past of p_line whatever line it was on: (after, upto] of each session. Messages, signals and
-- recorded answers outside of it came after the position that a fork or rewind went back to. The newest comes first; its
-- upto has no end, that of the others ends where they were left.
CREATE FUNCTION rethaw_spans(p_session text, p_line int) RETURNS TABLE (session text, after bigint, upto bigint)
LANGUAGE plpgsql STABLE ROWS 2 AS $$
DECLARE
    b record;
BEGIN
    session := rethaw_owner(p_session, p_line);
    upto := 9223372036854775807;
    LOOP
        SELECT l.* INTO b FROM lines l
        WHERE l.session = rethaw_spans.session AND l.line <= p_line AND l.from_seq IS NOT NULL
        ORDER BY l.line DESC LIMIT 1;
        IF NOT FOUND THEN
            after := 0;
            RETURN NEXT;
            RETURN;
        END IF;
        after := b.opened_after;
        IF after < upto THEN
            RETURN NEXT;
        END IF;
        upto := least(upto, b.from_seq);
        p_line := b.from_line;
        session := coalesce(b.from_session, session);
    END LOOP;
END $$;


-- ---------------------------------------------------------------- events

-- Equal to rethaw.log.lineage.STAYS (a test compares them).
CREATE OR REPLACE FUNCTION rethaw_stays(p_type text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT p_type IN (
        'session.created', 'session.state', 'session.crashed', 'session.forked', 'line.opened',
        'message.received', 'message.published', 'signal.received',
        'exchange.upstream', 'exchange.completed', 'exchange.failed', 'exchange.held', 'exchange.reissued',
        'exchange.torn', 'exchange.orphaned',
        'snapshot.created', 'snapshot.restored', 'snapshot.failed', 'snapshot.unusable',
        'durability.degraded', 'durability.restored', 'channel.malformed')
$$;

CREATE OR REPLACE FUNCTION rethaw_find(p_session text, p_line int, p_key text) RETURNS SETOF events
LANGUAGE sql STABLE AS $$
    SELECT e.* FROM rethaw_ancestry(p_session) a
    JOIN events e ON e.session = a.session AND e.key = p_key AND e.seq <= a.upto
    WHERE rethaw_stays(e.type) OR EXISTS (
          SELECT 1 FROM rethaw_path(p_session, p_line) p
          WHERE p.session = e.session AND p.line = e.line AND e.seq <= p.upto)
    ORDER BY e.seq LIMIT 1
$$;

-- As before; a key is looked for in a fork's ancestors, too.
CREATE OR REPLACE FUNCTION rethaw_append_one(
    p_session text, p_generation text, p_type text, p_data text, p_key text, p_size int, p_codec smallint,
    p_body bytea, p_notify boolean,
    OUT o_seq bigint, OUT o_line int, OUT o_attempt int, OUT o_at timestamptz, OUT o_repeat boolean,
    OUT o_type text, OUT o_key text, OUT o_data jsonb, OUT o_size int, OUT o_codec smallint, OUT o_body bytea
) LANGUAGE plpgsql AS $$
DECLARE
    e events;
    v_fork boolean;
BEGIN
    o_at := clock_timestamp();
    UPDATE sessions s SET last_seq = s.last_seq + 1
    WHERE s.id = p_session AND (p_generation IS NULL OR s.generation = p_generation)
    RETURNING s.last_seq, s.line, s.attempt, s.forked_from IS NOT NULL INTO o_seq, o_line, o_attempt, v_fork;
    IF NOT FOUND THEN
        PERFORM rethaw_refuse(p_session, p_generation);
    END IF;
    o_repeat := false;
    IF p_key IS NOT NULL
       AND (v_fork OR EXISTS (SELECT 1 FROM events v WHERE v.session = p_session AND v.key = p_key)) THEN
        SELECT * INTO e FROM rethaw_find(p_session, o_line, p_key);
        IF e.seq IS NOT NULL THEN
            UPDATE sessions SET last_seq = last_seq - 1 WHERE id = p_session;
            o_seq := e.seq; o_line := e.line; o_attempt := e.attempt; o_at := e.at; o_repeat := true;
            o_type := e.type; o_key := e.key; o_data := e.data;
            o_size := e.size; o_codec := e.codec; o_body := e.body;
            RETURN;
        END IF;
    END IF;
    INSERT INTO events (session, seq, line, attempt, type, key, data, size, codec, body, at)
    VALUES (p_session, o_seq, o_line, o_attempt, p_type, p_key, p_data::jsonb, p_size, p_codec, p_body, o_at);
    IF p_notify THEN
        PERFORM pg_notify('rethaw_log', p_session);
    END IF;
END $$;


-- ---------------------------------------------------------------- exchanges

-- How an exchange of the past stood where a fork or rewind left it: open, complete, failed, torn or orphaned. 'own' for
-- one of the present. No row for one that the session's line never knew.
CREATE FUNCTION rethaw_stood(p_session text, p_exchange text) RETURNS SETOF text LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN w.upto = 9223372036854775807 THEN 'own' ELSE coalesce((
        SELECT CASE e.type WHEN 'exchange.completed' THEN 'complete' WHEN 'exchange.failed' THEN 'failed'
                           WHEN 'exchange.torn' THEN 'torn' ELSE 'orphaned' END
        FROM events e
        WHERE e.session = x.session AND e.seq > x.seq AND e.seq <= w.upto AND e.data->>'exchange' = x.id
          AND e.type IN ('exchange.completed', 'exchange.failed', 'exchange.torn', 'exchange.orphaned')
        ORDER BY e.seq LIMIT 1), 'open') END
    FROM sessions s, exchanges x, rethaw_spans(s.id, s.line) w
    WHERE s.id = p_session AND x.id = p_exchange
      AND w.session = x.session AND x.seq > w.after AND x.seq <= w.upto
$$;

-- An exchange of an ancestor is only read: it has ended, and its row is the ancestor's.
CREATE OR REPLACE FUNCTION rethaw_adopt_exchange(
    p_exchange text, p_session text, p_generation text, p_data text, p_key text
) RETURNS SETOF exchange_rows LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT 1 FROM exchanges x WHERE x.id = p_exchange AND x.session <> p_session
                   AND EXISTS (SELECT 1 FROM rethaw_stood(p_session, p_exchange))) THEN
        PERFORM rethaw_lock_exchange(p_exchange, p_session, p_generation);
    END IF;
    PERFORM rethaw_append_one(
        p_session, p_generation, 'exchange.adopted', p_data, p_key, 0, 0::smallint, NULL, false);
    RETURN QUERY SELECT * FROM exchange_rows WHERE id = p_exchange;
END $$;

-- As before. Of the past only what was answered where it was left: what was open there is to be issued anew.
CREATE OR REPLACE FUNCTION rethaw_tail(p_session text, p_generation text, p_upto bigint)
RETURNS SETOF exchange_rows LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_generation text; v_line int; v_attempt int;
BEGIN
    SELECT s.generation, s.line, s.attempt INTO v_generation, v_line, v_attempt FROM sessions s WHERE s.id = p_session;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'session %', p_session USING ERRCODE = 'RT002';
    END IF;
    IF v_generation IS DISTINCT FROM p_generation THEN
        PERFORM rethaw_refuse(p_session, p_generation);
    END IF;
    RETURN QUERY
    WITH p AS MATERIALIZED (
        SELECT q.session, q.line, least(q.upto, p_upto) AS upto FROM rethaw_path(p_session, v_line) q
    ), missing AS MATERIALIZED (
        SELECT x.id, w.upto < 9223372036854775807 AS past
        FROM rethaw_spans(p_session, v_line) w JOIN exchanges x ON x.session = w.session
        WHERE x.attempt = v_attempt AND x.seq > w.after AND x.seq <= w.upto
          AND NOT EXISTS (SELECT 1 FROM p WHERE p.session = x.session AND p.line = x.line AND x.seq <= p.upto)
    )
    SELECT r.id, r.session, r.attempt, r.line, r.seq, r.meta, r.request_bytes,
           CASE WHEN m.past THEN stood.state ELSE r.state END, r.epoch, r.owner, r.usage, r.head, r.received
    FROM exchange_rows r JOIN missing m ON m.id = r.id
    LEFT JOIN LATERAL (SELECT t AS state FROM rethaw_stood(p_session, r.id) t WHERE m.past) stood ON true
    WHERE (CASE WHEN m.past THEN stood.state IN ('complete', 'failed') ELSE r.state NOT IN ('orphaned', 'torn') END)
      AND NOT EXISTS (
          SELECT 1 FROM p JOIN events e ON e.session = p.session AND e.line = p.line AND e.seq <= p.upto
          WHERE e.data->>'exchange' = r.id AND e.type IN ('exchange.requested', 'exchange.adopted'))
    ORDER BY r.seq;
END $$;


-- ---------------------------------------------------------------- erasure

-- As before, but for sessions that others still read.
CREATE OR REPLACE FUNCTION rethaw_erase(p_session text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_forks text;
BEGIN
    INSERT INTO erasures (session, created_at, last_seq)
        SELECT s.id, s.created_at, s.last_seq FROM sessions s WHERE s.id = p_session FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'session %', p_session USING ERRCODE = 'RT002';
    END IF;
    SELECT string_agg(f.id, ', ') INTO v_forks FROM sessions f WHERE f.forked_from = p_session;
    IF v_forks IS NOT NULL THEN
        RAISE EXCEPTION 'session % is read by its forks %: erase them first', p_session, v_forks USING ERRCODE = 'RT004';
    END IF;
    -- First, since appends to a response hold the lock on its row.
    DELETE FROM exchange_state s USING exchanges x WHERE x.session = p_session AND s.id = x.id;
    DELETE FROM response_chunks c USING exchanges x WHERE x.session = p_session AND c.exchange = x.id;
    DELETE FROM response_heads h USING exchanges x WHERE x.session = p_session AND h.exchange = x.id;
    DELETE FROM exchanges WHERE session = p_session;
    DELETE FROM segments WHERE session = p_session;
    DELETE FROM content WHERE session = p_session;
    DELETE FROM events WHERE session = p_session;
    DELETE FROM lines WHERE session = p_session;
    DELETE FROM sessions WHERE id = p_session;
    PERFORM pg_notify('rethaw_log', p_session);
END $$;
