-- The context log: sessions as far as the log needs them, lines, events, content, requests, responses, erasures.
--
-- Writers go through the functions below: each is one round trip that locks the session's row, checks the generation,
-- drops repeats by key and takes the next seq, all in one transaction. Lock order: session row, then exchange_state row.
--
-- SQLSTATEs raised here: RT001 fenced, RT002 not found, RT003 append-only, RT004 conflict.

CREATE TABLE sessions (
    id          text PRIMARY KEY,
    last_seq    bigint NOT NULL DEFAULT 0,
    generation  text,
    line        int NOT NULL DEFAULT 1,
    attempt     int NOT NULL DEFAULT 0,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 70);

-- A line sees its parent's events up to branch_seq, then its own.
CREATE TABLE lines (
    session     text NOT NULL,
    line        int NOT NULL,
    parent      int,
    branch_seq  bigint NOT NULL,
    why         text NOT NULL,
    snapshot    text,
    opened_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (session, line)
);

-- codec of a bytea: 0 as it is, 1 zstd. size: bytes before compression, 0 with a NULL body means no body.
CREATE TABLE events (
    session     text NOT NULL,
    seq         bigint NOT NULL,
    line        int NOT NULL,
    attempt     int NOT NULL,
    type        text NOT NULL,
    key         text,
    data        jsonb NOT NULL,
    size        int NOT NULL DEFAULT 0,
    codec       smallint NOT NULL DEFAULT 0,
    body        bytea,
    at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (session, seq)
);
ALTER TABLE events ALTER COLUMN body SET STORAGE EXTERNAL;
CREATE INDEX events_key ON events (session, key) WHERE key IS NOT NULL;
CREATE INDEX events_claims ON events (session, (data->>'exchange'))
    WHERE type IN ('exchange.requested', 'exchange.adopted');
CREATE INDEX events_snapshots ON events (session, (data->>'snapshot')) WHERE type = 'snapshot.created';

-- Parts of requests, named by the SHA-256 of their bytes. Per session, so that a session can be erased whole.
CREATE TABLE content (
    session     text NOT NULL,
    digest      bytea NOT NULL,
    size        int NOT NULL,
    codec       smallint NOT NULL,
    data        bytea NOT NULL,
    PRIMARY KEY (session, digest)
);
ALTER TABLE content ALTER COLUMN data SET STORAGE EXTERNAL;

-- A segment expands to the bytes whose SHA-256 is its key: its predecessor's expansion, then its parts (small ones
-- inline, large ones as references into content; packed by rethaw.log.content). Conversations share their predecessors.
CREATE TABLE segments (
    session     text NOT NULL,
    key         bytea NOT NULL,
    prev        bytea,
    size        bigint NOT NULL,
    parts       bytea NOT NULL,
    PRIMARY KEY (session, key)
);

-- What never changes of an exchange. The request is the expansion of head, then chain, then tail.
CREATE TABLE exchanges (
    id             text PRIMARY KEY,
    session        text NOT NULL,
    line           int NOT NULL,
    attempt        int NOT NULL,
    seq            bigint NOT NULL,
    meta           text NOT NULL,
    request_bytes  bigint NOT NULL,
    head           bytea,
    chain          bytea,
    tail           bytea,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX exchanges_session ON exchanges (session, attempt, seq) INCLUDE (line);

-- What does. Small on purpose: it is locked by every append to the response.
CREATE TABLE exchange_state (
    id      text PRIMARY KEY,
    state   text NOT NULL DEFAULT 'open',
    epoch   int NOT NULL DEFAULT 1,
    owner   text,
    usage   text
) WITH (fillfactor = 70);

CREATE TABLE response_heads (
    exchange  text NOT NULL,
    epoch     int NOT NULL,
    session   text NOT NULL,
    head      text NOT NULL,
    PRIMARY KEY (exchange, epoch)
);

-- One row for each batch; lens and ats (microseconds after the head) cut it into the chunks as they arrived.
CREATE TABLE response_chunks (
    exchange  text NOT NULL,
    epoch     int NOT NULL,
    start     bigint NOT NULL,
    session   text NOT NULL,
    size      int NOT NULL,
    codec     smallint NOT NULL,
    data      bytea NOT NULL,
    lens      int[] NOT NULL,
    ats       bigint[] NOT NULL,
    PRIMARY KEY (exchange, epoch, start)
);
ALTER TABLE response_chunks ALTER COLUMN data SET STORAGE EXTERNAL;

-- What is left of an erased session.
CREATE TABLE erasures (
    session     text PRIMARY KEY,
    created_at  timestamptz NOT NULL,
    last_seq    bigint NOT NULL,
    erased_at   timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE VIEW exchange_rows AS
SELECT x.id, x.session, x.attempt, x.line, x.seq, x.meta, x.request_bytes, s.state, s.epoch, s.owner, s.usage,
       (SELECT h.head FROM response_heads h WHERE h.exchange = x.id AND h.epoch = s.epoch) AS head,
       coalesce((SELECT c.start + c.size FROM response_chunks c WHERE c.exchange = x.id AND c.epoch = s.epoch
                 ORDER BY c.start DESC LIMIT 1), 0) AS received
FROM exchanges x JOIN exchange_state s USING (id);


-- ---------------------------------------------------------------- lineage

-- The lines that `p_line` sees, each up to which seq. Takes the least bound on the way, so that a line opened from a
-- point before its parent's own branch sees nothing of that parent.
CREATE FUNCTION rethaw_path(p_session text, p_line int) RETURNS TABLE (line int, upto bigint)
LANGUAGE sql STABLE AS $$
    WITH RECURSIVE p AS (
        SELECT l.line, l.parent, l.branch_seq, 9223372036854775807 AS upto
        FROM lines l WHERE l.session = p_session AND l.line = p_line
        UNION ALL
        SELECT l.line, l.parent, l.branch_seq, least(p.upto, p.branch_seq)
        FROM p JOIN lines l ON l.session = p_session AND l.line = p.parent
    )
    SELECT p.line, p.upto FROM p
$$;

-- Types of event that tell what the world outside the guest did. No rollback of the guest undoes them, so they are on
-- every path. Equal to rethaw.log.lineage.STAYS (a test compares them).
CREATE FUNCTION rethaw_stays(p_type text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT p_type IN (
        'session.created', 'session.state', 'session.crashed', 'line.opened',
        'message.received', 'message.published', 'signal.received',
        'exchange.upstream', 'exchange.completed', 'exchange.failed', 'exchange.held', 'exchange.reissued',
        'exchange.torn', 'exchange.orphaned',
        'snapshot.created', 'snapshot.restored', 'snapshot.failed', 'snapshot.unusable',
        'durability.degraded', 'durability.restored', 'channel.malformed')
$$;


-- ---------------------------------------------------------------- events

-- The first event with this key that is on the path of p_line.
CREATE FUNCTION rethaw_find(p_session text, p_line int, p_key text) RETURNS SETOF events LANGUAGE sql STABLE AS $$
    SELECT e.* FROM events e
    WHERE e.session = p_session AND e.key = p_key
      AND (rethaw_stays(e.type) OR EXISTS (
          SELECT 1 FROM rethaw_path(p_session, p_line) p WHERE p.line = e.line AND e.seq <= p.upto))
    ORDER BY e.seq LIMIT 1
$$;

CREATE FUNCTION rethaw_refuse(p_session text, p_generation text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_generation text;
BEGIN
    SELECT s.generation INTO v_generation FROM sessions s WHERE s.id = p_session;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'session %', p_session USING ERRCODE = 'RT002';
    END IF;
    RAISE EXCEPTION 'session % has generation %, not %', p_session, coalesce(v_generation, 'none'), p_generation
        USING ERRCODE = 'RT001';
END $$;

-- Appends one event. o_repeat: it was there already, then the o_ columns from o_type on hold it.
CREATE FUNCTION rethaw_append_one(
    p_session text, p_generation text, p_type text, p_data text, p_key text, p_size int, p_codec smallint,
    p_body bytea, p_notify boolean,
    OUT o_seq bigint, OUT o_line int, OUT o_attempt int, OUT o_at timestamptz, OUT o_repeat boolean,
    OUT o_type text, OUT o_key text, OUT o_data jsonb, OUT o_size int, OUT o_codec smallint, OUT o_body bytea
) LANGUAGE plpgsql AS $$
DECLARE
    e events;
BEGIN
    o_at := clock_timestamp();
    UPDATE sessions s SET last_seq = s.last_seq + 1
    WHERE s.id = p_session AND (p_generation IS NULL OR s.generation = p_generation)
    RETURNING s.last_seq, s.line, s.attempt INTO o_seq, o_line, o_attempt;
    IF NOT FOUND THEN
        PERFORM rethaw_refuse(p_session, p_generation);
    END IF;
    o_repeat := false;
    IF p_key IS NOT NULL AND EXISTS (SELECT 1 FROM events v WHERE v.session = p_session AND v.key = p_key) THEN
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

-- The same for several, in order.
CREATE FUNCTION rethaw_append(
    p_session text, p_generation text, p_types text[], p_datas text[], p_keys text[], p_sizes int[],
    p_codecs smallint[], p_bodies bytea[], p_notify boolean
) RETURNS TABLE (
    o_seq bigint, o_line int, o_attempt int, o_at timestamptz, o_repeat boolean,
    o_type text, o_key text, o_data jsonb, o_size int, o_codec smallint, o_body bytea
) LANGUAGE plpgsql AS $$
DECLARE
    r record;
BEGIN
    FOR r IN SELECT u.* FROM unnest(p_types, p_datas, p_keys, p_sizes, p_codecs, p_bodies)
             AS u (type, data, key, size, codec, body)
    LOOP
        RETURN QUERY SELECT * FROM rethaw_append_one(
            p_session, p_generation, r.type, r.data, r.key, r.size, r.codec, r.body, p_notify);
    END LOOP;
END $$;


-- ---------------------------------------------------------------- exchanges

CREATE FUNCTION rethaw_begin_exchange(
    p_session text, p_generation text, p_id text, p_key text, p_meta text, p_data text, p_owner text,
    p_request_bytes bigint, p_head bytea, p_chain bytea, p_tail bytea,
    p_digests bytea[], p_sizes int[], p_codecs smallint[], p_contents bytea[],
    p_seg_keys bytea[], p_seg_prevs bytea[], p_seg_sizes bigint[], p_seg_parts bytea[],
    p_upstream text, p_upstream_key text
) RETURNS SETOF exchange_rows LANGUAGE plpgsql AS $$
DECLARE
    a record;
BEGIN
    SELECT * INTO a FROM rethaw_append_one(
        p_session, p_generation, 'exchange.requested', p_data, p_key, 0, 0::smallint, NULL, false);
    IF a.o_repeat THEN
        RETURN QUERY SELECT * FROM exchange_rows WHERE id = a.o_data->>'exchange';
        RETURN;
    END IF;
    INSERT INTO content (session, digest, size, codec, data)
        SELECT p_session, u.* FROM unnest(p_digests, p_sizes, p_codecs, p_contents) u ON CONFLICT DO NOTHING;
    INSERT INTO segments (session, key, prev, size, parts)
        SELECT p_session, u.* FROM unnest(p_seg_keys, p_seg_prevs, p_seg_sizes, p_seg_parts) u ON CONFLICT DO NOTHING;
    INSERT INTO exchanges (id, session, line, attempt, seq, meta, request_bytes, head, chain, tail)
        VALUES (p_id, p_session, a.o_line, a.o_attempt, a.o_seq, p_meta, p_request_bytes, p_head, p_chain, p_tail);
    INSERT INTO exchange_state (id, owner) VALUES (p_id, p_owner);
    IF p_upstream IS NOT NULL THEN
        PERFORM rethaw_append_one(
            p_session, p_generation, 'exchange.upstream', p_upstream, p_upstream_key, 0, 0::smallint, NULL, false);
    END IF;
    RETURN QUERY SELECT * FROM exchange_rows WHERE id = p_id;
END $$;

-- Locks the session's row, checks the generation (when given), locks and returns the exchange's state.
CREATE FUNCTION rethaw_lock_exchange(
    p_exchange text, p_session text, p_generation text,
    OUT o_session text, OUT o_state text, OUT o_epoch int, OUT o_owner text
) LANGUAGE plpgsql AS $$
DECLARE
    v_generation text;
BEGIN
    SELECT x.session INTO o_session FROM exchanges x
    WHERE x.id = p_exchange AND (p_session IS NULL OR x.session = p_session);
    IF NOT FOUND THEN
        RAISE EXCEPTION 'exchange %', p_exchange USING ERRCODE = 'RT002';
    END IF;
    SELECT s.generation INTO v_generation FROM sessions s WHERE s.id = o_session FOR UPDATE;
    IF p_generation IS NOT NULL AND v_generation IS DISTINCT FROM p_generation THEN
        PERFORM rethaw_refuse(o_session, p_generation);
    END IF;
    SELECT s.state, s.epoch, s.owner INTO o_state, o_epoch, o_owner
    FROM exchange_state s WHERE s.id = p_exchange FOR UPDATE;
END $$;

-- p_expected: the epoch that the caller saw. One more, with the caller as owner, means that this call already happened.
CREATE FUNCTION rethaw_take_over(
    p_exchange text, p_session text, p_generation text, p_expected int, p_owner text,
    p_type text, p_data text, p_key text, p_size int, p_codec smallint, p_body bytea
) RETURNS SETOF exchange_rows LANGUAGE plpgsql AS $$
DECLARE
    x record;
BEGIN
    SELECT * INTO x FROM rethaw_lock_exchange(p_exchange, p_session, p_generation);
    IF NOT (x.o_epoch = p_expected + 1 AND x.o_owner IS NOT DISTINCT FROM p_owner) THEN
        IF x.o_epoch <> p_expected THEN
            RAISE EXCEPTION 'exchange % has epoch %, not %', p_exchange, x.o_epoch, p_expected USING ERRCODE = 'RT001';
        END IF;
        IF x.o_state <> 'open' THEN
            RAISE EXCEPTION 'exchange % is %, only an open one can be taken over', p_exchange, x.o_state
                USING ERRCODE = 'RT004';
        END IF;
        UPDATE exchange_state SET epoch = epoch + 1, owner = p_owner WHERE id = p_exchange;
        IF p_type IS NOT NULL THEN
            PERFORM rethaw_append_one(x.o_session, p_generation, p_type, p_data, p_key, p_size, p_codec, p_body, false);
        END IF;
    END IF;
    RETURN QUERY SELECT * FROM exchange_rows WHERE id = p_exchange;
END $$;

-- o_applied false: p_start is not where the log ends; the caller cuts what is there already and comes again.
CREATE FUNCTION rethaw_append_response(
    p_exchange text, p_epoch int, p_head text, p_start bigint, p_size int, p_codec smallint, p_data bytea,
    p_lens int[], p_ats bigint[], OUT o_received bigint, OUT o_applied boolean
) LANGUAGE plpgsql AS $$
DECLARE
    v_epoch int; v_state text; v_session text;
BEGIN
    SELECT s.epoch, s.state, x.session INTO v_epoch, v_state, v_session
    FROM exchange_state s JOIN exchanges x USING (id) WHERE s.id = p_exchange FOR UPDATE OF s;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'exchange %', p_exchange USING ERRCODE = 'RT002';
    END IF;
    IF v_epoch <> p_epoch THEN
        RAISE EXCEPTION 'exchange % has epoch %, not %', p_exchange, v_epoch, p_epoch USING ERRCODE = 'RT001';
    END IF;
    SELECT c.start + c.size INTO o_received FROM response_chunks c
    WHERE c.exchange = p_exchange AND c.epoch = p_epoch ORDER BY c.start DESC LIMIT 1;
    o_received := coalesce(o_received, 0);
    IF v_state NOT IN ('open', 'orphaned') AND p_start + p_size > o_received THEN
        RAISE EXCEPTION 'exchange % is %, its response has ended', p_exchange, v_state USING ERRCODE = 'RT004';
    END IF;
    IF p_head IS NOT NULL THEN
        INSERT INTO response_heads (exchange, epoch, session, head) VALUES (p_exchange, p_epoch, v_session, p_head)
        ON CONFLICT DO NOTHING;
    END IF;
    o_applied := p_start = o_received;
    IF o_applied AND p_size > 0 THEN
        INSERT INTO response_chunks (exchange, epoch, start, session, size, codec, data, lens, ats)
        VALUES (p_exchange, p_epoch, p_start, v_session, p_size, p_codec, p_data, p_lens, p_ats);
        o_received := o_received + p_size;
    END IF;
END $$;

-- An orphaned exchange stays orphaned; what its answer cost is recorded all the same.
CREATE FUNCTION rethaw_finish_exchange(
    p_exchange text, p_epoch int, p_state text, p_usage text,
    p_type text, p_data text, p_key text, p_size int, p_codec smallint, p_body bytea
) RETURNS SETOF exchange_rows LANGUAGE plpgsql AS $$
DECLARE
    x record;
BEGIN
    SELECT * INTO x FROM rethaw_lock_exchange(p_exchange, NULL, NULL);
    IF x.o_epoch <> p_epoch THEN
        RAISE EXCEPTION 'exchange % has epoch %, not %', p_exchange, x.o_epoch, p_epoch USING ERRCODE = 'RT001';
    END IF;
    IF x.o_state = 'open' OR (x.o_state = 'orphaned' AND x.o_owner IS NOT NULL) THEN
        UPDATE exchange_state
        SET state = CASE WHEN state = 'orphaned' THEN state ELSE p_state END, owner = NULL, usage = p_usage
        WHERE id = p_exchange;
        PERFORM rethaw_append_one(x.o_session, NULL, p_type, p_data, p_key, p_size, p_codec, p_body, false);
    ELSIF x.o_state NOT IN (p_state, 'orphaned') THEN
        RAISE EXCEPTION 'exchange % is % already, it cannot become %', p_exchange, x.o_state, p_state
            USING ERRCODE = 'RT004';
    END IF;
    RETURN QUERY SELECT * FROM exchange_rows WHERE id = p_exchange;
END $$;

CREATE FUNCTION rethaw_adopt_exchange(
    p_exchange text, p_session text, p_generation text, p_data text, p_key text
) RETURNS SETOF exchange_rows LANGUAGE plpgsql AS $$
BEGIN
    PERFORM rethaw_lock_exchange(p_exchange, p_session, p_generation);
    PERFORM rethaw_append_one(
        p_session, p_generation, 'exchange.adopted', p_data, p_key, 0, 0::smallint, NULL, false);
    RETURN QUERY SELECT * FROM exchange_rows WHERE id = p_exchange;
END $$;

CREATE FUNCTION rethaw_orphan_exchange(
    p_exchange text, p_session text, p_generation text, p_data text, p_key text
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    x record;
BEGIN
    SELECT * INTO x FROM rethaw_lock_exchange(p_exchange, p_session, p_generation);
    IF x.o_state NOT IN ('orphaned', 'torn') THEN
        UPDATE exchange_state SET state = 'orphaned' WHERE id = p_exchange;
        PERFORM rethaw_append_one(
            p_session, p_generation, 'exchange.orphaned', p_data, p_key, 0, 0::smallint, NULL, false);
    END IF;
END $$;

-- Exchanges of the session's attempt that no event of the path with seq <= p_upto asked for or adopted.
CREATE FUNCTION rethaw_tail(p_session text, p_generation text, p_upto bigint)
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
        SELECT q.line, least(q.upto, p_upto) AS upto FROM rethaw_path(p_session, v_line) q
    ), missing AS MATERIALIZED (
        SELECT x.id FROM exchanges x
        WHERE x.session = p_session AND x.attempt = v_attempt
          AND NOT EXISTS (SELECT 1 FROM p WHERE p.line = x.line AND x.seq <= p.upto)
    )
    SELECT r.* FROM exchange_rows r JOIN missing m ON m.id = r.id
    WHERE r.state NOT IN ('orphaned', 'torn')
      AND NOT EXISTS (
          SELECT 1 FROM events e JOIN p ON p.line = e.line AND e.seq <= p.upto
          WHERE e.session = p_session AND e.data->>'exchange' = r.id
            AND e.type IN ('exchange.requested', 'exchange.adopted'))
    ORDER BY r.seq;
END $$;


-- ---------------------------------------------------------------- append only

-- A tombstone is the only key to deletion, and a tombstone commits only once nothing of its session is left.
CREATE FUNCTION rethaw_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        IF EXISTS (SELECT 1 FROM erasures t WHERE t.session = OLD.session) THEN
            RETURN OLD;
        END IF;
    END IF;
    RAISE EXCEPTION '% is append-only: % refused', TG_TABLE_NAME, TG_OP
        USING ERRCODE = 'RT003', HINT = 'a session can only be erased whole';
END $$;

CREATE FUNCTION rethaw_keep_session() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        IF EXISTS (SELECT 1 FROM erasures t WHERE t.session = OLD.id) THEN
            RETURN OLD;
        END IF;
    END IF;
    RAISE EXCEPTION 'sessions: % refused', TG_OP
        USING ERRCODE = 'RT003', HINT = 'a session can only be erased whole';
END $$;

CREATE FUNCTION rethaw_keep_erasure() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'erasures: % refused', TG_OP USING ERRCODE = 'RT003';
END $$;

CREATE FUNCTION rethaw_whole_erasure() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM sessions s WHERE s.id = NEW.session)
       OR EXISTS (SELECT 1 FROM events e WHERE e.session = NEW.session)
       OR EXISTS (SELECT 1 FROM lines l WHERE l.session = NEW.session)
       OR EXISTS (SELECT 1 FROM content c WHERE c.session = NEW.session)
       OR EXISTS (SELECT 1 FROM segments g WHERE g.session = NEW.session)
       OR EXISTS (SELECT 1 FROM exchanges x WHERE x.session = NEW.session)
    THEN
        RAISE EXCEPTION 'session % is not erased whole', NEW.session USING ERRCODE = 'RT003';
    END IF;
    RETURN NULL;
END $$;

DO $$
DECLARE
    t text;
BEGIN
    FOREACH t IN ARRAY ARRAY['lines', 'events', 'content', 'segments', 'exchanges', 'response_heads', 'response_chunks']
    LOOP
        EXECUTE format('CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON %I
                        FOR EACH ROW EXECUTE FUNCTION rethaw_append_only()', t);
        EXECUTE format('CREATE TRIGGER append_only_truncate BEFORE TRUNCATE ON %I
                        FOR EACH STATEMENT EXECUTE FUNCTION rethaw_append_only()', t);
    END LOOP;
END $$;
CREATE TRIGGER keep_session BEFORE DELETE ON sessions FOR EACH ROW EXECUTE FUNCTION rethaw_keep_session();
CREATE TRIGGER keep_session_truncate BEFORE TRUNCATE ON sessions
    FOR EACH STATEMENT EXECUTE FUNCTION rethaw_keep_session();
CREATE TRIGGER keep_erasure BEFORE UPDATE OR DELETE ON erasures
    FOR EACH ROW EXECUTE FUNCTION rethaw_keep_erasure();
CREATE TRIGGER keep_erasure_truncate BEFORE TRUNCATE ON erasures
    FOR EACH STATEMENT EXECUTE FUNCTION rethaw_keep_erasure();
CREATE CONSTRAINT TRIGGER whole_erasure AFTER INSERT ON erasures DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION rethaw_whole_erasure();

-- Erases a session whole. Rows of other rooms go with it by their foreign keys to sessions (ON DELETE CASCADE).
CREATE FUNCTION rethaw_erase(p_session text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO erasures (session, created_at, last_seq)
        SELECT s.id, s.created_at, s.last_seq FROM sessions s WHERE s.id = p_session FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'session %', p_session USING ERRCODE = 'RT002';
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
