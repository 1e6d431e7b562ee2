-- Sources that the target database sees itself: planning, and migrating without a worker.

-- How a local source is read, in the words that workers use for theirs (docs/protocol.md). Refuses what would be lost or cannot be cast.
CREATE FUNCTION dedup.local_source_spec(source regclass, layout jsonb, filter text, transforms jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    column_name text;
    target_type text;
    base text;
    attribute pg_attribute;
    expression text;
    selects jsonb := '[]';
    keys jsonb := '[]';
    nullable jsonb := '[]';
    key_types jsonb := '[]';
BEGIN
    FOR column_name, target_type IN
        SELECT c ->> 'name', c ->> 'type_name' FROM jsonb_array_elements(layout -> 'columns') WITH ORDINALITY AS u(c, n) ORDER BY n
    LOOP
        SELECT * INTO attribute FROM pg_attribute AS a
        WHERE a.attrelid = source AND a.attname = column_name AND a.attnum > 0 AND NOT a.attisdropped;
        -- Lengths of character and bit types are left to COPY: a cast would truncate silently.
        base := regexp_replace(target_type, '\([0-9, ]+\)', '');
        IF transforms ? column_name THEN
            expression := format('(%s)::%s', transforms ->> column_name, target_type);
        ELSIF NOT FOUND THEN
            RAISE EXCEPTION 'source % has no column %', source, quote_ident(column_name) USING ERRCODE = 'undefined_column',
                HINT = 'Leave the column out with the table option columns, or give it a transform.';
        ELSIF format_type(attribute.atttypid, attribute.atttypmod) = target_type
            OR attribute.atttypid = to_regtype(base) AND (attribute.atttypid IN ('varchar'::regtype, 'bpchar'::regtype, 'bit'::regtype, 'varbit'::regtype)
                                                          OR attribute.atttypid = to_regtype(target_type) AND strpos(target_type, '(') = 0) THEN
            expression := quote_ident(column_name);
        ELSIF to_regtype(base) IN ('varchar'::regtype, 'bpchar'::regtype, 'bit'::regtype, 'varbit'::regtype) THEN
            expression := format('%I::%s', column_name, CASE to_regtype(base) WHEN 'bpchar'::regtype THEN 'pg_catalog.bpchar' WHEN 'bit'::regtype THEN 'pg_catalog."bit"' ELSE base END);
        ELSE
            expression := format('%I::%s', column_name, target_type);
        END IF;
        selects := selects || to_jsonb(expression);
    END LOOP;
    FOR column_name IN SELECT layout #>> ARRAY['columns', k, 'name'] FROM jsonb_array_elements_text(layout -> 'key') WITH ORDINALITY AS u(k, n) ORDER BY n LOOP
        SELECT * INTO attribute FROM pg_attribute AS a
        WHERE a.attrelid = source AND a.attname = column_name AND a.attnum > 0 AND NOT a.attisdropped;
        IF transforms ? column_name OR NOT FOUND THEN
            RAISE EXCEPTION 'the key % cannot be a transform', quote_ident(column_name) USING ERRCODE = 'feature_not_supported';
        END IF;
        keys := keys || to_jsonb(quote_ident(column_name));
        key_types := key_types || to_jsonb(format_type(attribute.atttypid, attribute.atttypmod));
        nullable := nullable || to_jsonb(NOT attribute.attnotnull);
    END LOOP;
    RETURN jsonb_build_object('local', true, 'relation', source::text, 'select', selects, 'key', keys, 'key_types', key_types,
        'key_nullable', nullable, 'where', filter);
END $$;
COMMENT ON FUNCTION dedup.local_source_spec(regclass, jsonb, text, jsonb) IS 'how a source that the target database sees is read';

-- Bounds are stored as texts that mean the same in every session.
CREATE FUNCTION dedup.plan_chunks(run uuid, chunk_bytes bigint DEFAULT 100000000) RETURNS int
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, YMD' SET TimeZone = 'UTC' SET IntervalStyle = 'postgres'
SET extra_float_digits = 3 SET bytea_output = 'hex' AS $$
DECLARE
    r dedup.runs := dedup.lock_run(run);
    t record;
    src regclass;
    spec jsonb;
    keys text;
    key_texts text;
    filter text;
    not_null text;
    total_records bigint;
    total_bytes bigint;
    chunk_count bigint;
    chunks jsonb;
    planned int := 0;
BEGIN
    IF r.status <> 'created' THEN
        RAISE EXCEPTION 'run % is %', run, r.status USING ERRCODE = 'object_not_in_prerequisite_state',
            HINT = 'Chunks are planned before the first one is leased.';
    END IF;
    PERFORM dedup.must_own(run);
    IF coalesce(chunk_bytes, 0) <= 0 THEN
        RAISE EXCEPTION 'chunk_bytes must be positive' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    FOR t IN SELECT x.*, g.target, g.indexed_at FROM dedup.run_tables AS x JOIN dedup.targets AS g USING (target_id)
             WHERE x.run_id = run AND (x.source_spec IS NULL OR x.source_spec ? 'local')
                 AND NOT EXISTS (SELECT FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.table_id = x.table_id) ORDER BY x.table_id
    LOOP
        src := to_regclass(t.source);
        IF src IS NULL THEN
            RAISE EXCEPTION 'source table % does not exist in this database', t.source USING ERRCODE = 'undefined_table',
                HINT = 'Write it with its schema; a table of another server is reached through a foreign table or by pg-dedup-migrate.';
        END IF;
        IF src = t.target THEN
            RAISE EXCEPTION '% is both source and target', src USING ERRCODE = 'invalid_parameter_value';
        END IF;
        spec := dedup.local_source_spec(src, t.layout, t.local_options ->> 'where', coalesce(t.local_options -> 'transforms', '{}'));
        filter := CASE WHEN spec ->> 'where' IS NULL THEN 'true' ELSE format('(%s)', spec ->> 'where') END;
        -- Wrong types and filters are an error now, before a row is written.
        EXECUTE format('SELECT %s FROM %s WHERE %s LIMIT 0',
            (SELECT string_agg(e, ', ' ORDER BY n) FROM jsonb_array_elements_text(spec -> 'select') WITH ORDINALITY AS u(e, n)), src, filter);
        UPDATE dedup.run_tables AS x
        SET source_spec = spec, range_comparable = dedup.range_comparable(x.layout, ARRAY(SELECT jsonb_array_elements_text(spec -> 'key_types')))
        WHERE x.run_id = run AND x.table_id = t.table_id;
        EXECUTE format('SELECT count(*), coalesce(sum(pg_column_size(s.*)), 0) FROM %s AS s WHERE %s', src, filter) INTO total_records, total_bytes;
        chunk_count := greatest(ceil(total_bytes::numeric / chunk_bytes), ceil(total_records / 1e6), 1);
        IF t.keyless THEN
            -- One chunk, one snapshot: chunks are read in transactions of their own, and a row without a key that moves in between would be missed.
            chunks := jsonb_build_array(jsonb_build_object('kind', 'key', 'records', total_records, 'bytes', total_bytes));
        ELSE
            SELECT string_agg(k, ', ' ORDER BY n), string_agg(k || '::text', ', ' ORDER BY n) INTO keys, key_texts
            FROM jsonb_array_elements_text(spec -> 'key') WITH ORDINALITY AS u(k, n);
            -- Records with a null in their key are a chunk of their own: they take no part in the bounds, and the other chunks leave them out.
            SELECT coalesce(string_agg(k || ' IS NOT NULL', ' AND ' ORDER BY n), 'true') INTO not_null
            FROM jsonb_array_elements_text(spec -> 'key') WITH ORDINALITY AS u(k, n) WHERE (spec #>> ARRAY['key_nullable', (n - 1)::text])::bool;
            -- Bounds are keys at equal steps in key order; a key that fills several steps makes one bound.
            EXECUTE format($q$
                WITH numbered AS (SELECT %1$s, row_number() OVER (ORDER BY %1$s) AS dedup_n FROM %2$s WHERE %3$s AND %8$s),
                bound AS (SELECT DISTINCT ON (%1$s) jsonb_build_array(%4$s) AS b, dedup_n FROM numbered
                          WHERE dedup_n > 1 AND (dedup_n - 1) %% %5$s = 0 ORDER BY %1$s, dedup_n),
                edge AS (SELECT b, lead(b) OVER (ORDER BY dedup_n) AS next, row_number() OVER (ORDER BY dedup_n) AS i FROM bound)
                SELECT jsonb_agg(c ORDER BY i) FROM (
                    SELECT 0 AS i, jsonb_build_object('kind', 'key', 'lower', NULL, 'upper', (SELECT b FROM edge WHERE i = 1), 'records', %6$s, 'bytes', %7$s) AS c
                    UNION ALL
                    SELECT i, jsonb_build_object('kind', 'key', 'lower', b, 'upper', next, 'records', %6$s, 'bytes', %7$s) FROM edge) AS all_chunks
                $q$, keys, src, filter, key_texts, greatest(ceil(total_records::numeric / chunk_count), 1), total_records / chunk_count, total_bytes / chunk_count,
                not_null)
            INTO chunks;
            IF spec -> 'key_nullable' @> 'true' THEN
                chunks := chunks || jsonb_build_array(jsonb_build_object('kind', 'null_key', 'records', 0, 'bytes', 0));
            END IF;
        END IF;
        planned := planned + dedup.add_chunks(run, t.table_id, chunks);
        IF t.indexed_at IS NULL THEN
            PERFORM dedup.index_existing(t.target);
        END IF;
    END LOOP;
    RETURN planned;
END $$;
COMMENT ON FUNCTION dedup.plan_chunks(uuid, bigint) IS 'plans every source of a run that this database sees; indexes targets that hold rows; returns the chunks';

-- A lease for this very session. NULL: the chunk is verified already. The run's row comes before the checkpoint's, as everywhere.
CREATE FUNCTION dedup.lease_here(run uuid, chunk text) RETURNS uuid
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.run_row(run);
    c dedup.checkpoints;
    token uuid;
BEGIN
    PERFORM dedup.must_own(run);
    IF r.status IN ('created', 'failed')
        AND EXISTS (SELECT FROM dedup.checkpoints AS x WHERE x.run_id = run AND x.chunk_id = chunk AND x.status IN ('pending', 'failed')) THEN
        PERFORM dedup.set_run_status(run, '{created,failed,running}', 'running', 'run_started');
    END IF;
    SELECT * INTO c FROM dedup.checkpoints AS x WHERE x.run_id = run AND x.chunk_id = chunk FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'run % has no chunk %', run, coalesce(chunk, 'NULL') USING ERRCODE = 'undefined_object',
            HINT = 'SELECT chunk_id FROM dedup.checkpoints lists them; dedup.plan_chunks makes them.';
    END IF;
    IF c.status = 'verified' THEN
        RETURN NULL;
    END IF;
    IF NOT EXISTS (SELECT FROM dedup.run_tables AS t WHERE t.run_id = run AND t.table_id = c.table_id AND t.source_spec ? 'local') THEN
        RAISE EXCEPTION 'the source of chunk % is not visible to this database', chunk USING ERRCODE = 'feature_not_supported',
            HINT = format('pg-dedup-migrate run --resume %s migrates it.', run);
    END IF;
    IF c.status = 'syncing' THEN
        RAISE EXCEPTION 'chunk % is %', chunk, CASE WHEN c.written_at IS NULL THEN 'held by a worker' ELSE 'written and waits for verification' END
            USING ERRCODE = 'object_in_use';
    END IF;
    -- How others know this session while its chunk is not committed.
    PERFORM pg_advisory_xact_lock_shared(k.class, k.key), set_config('application_name', 'pg-dedup-migrate/local', true) FROM dedup.local_lock(run) AS k;
    UPDATE dedup.checkpoints AS x
    SET status = 'syncing', lease = gen_random_uuid(), worker_id = NULL, leased_at = clock_timestamp(), started_at = clock_timestamp(),
        attempts = x.attempts + 1, backend_pid = pg_backend_pid(),
        backend_start = (SELECT a.backend_start FROM pg_stat_get_activity(pg_backend_pid()) AS a),
        error_sqlstate = NULL, error_message = NULL, error_hint = NULL
    WHERE x.run_id = run AND x.chunk_id = chunk RETURNING x.lease INTO token;
    RETURN token;
END $$;
COMMENT ON FUNCTION dedup.lease_here(uuid, text) IS 'leases a chunk to the calling session, inside its transaction';

CREATE FUNCTION dedup.migrate_chunk(run uuid, chunk_id text, OUT status text, OUT source_count bigint, OUT inserted_count bigint, OUT updated_count bigint,
    OUT unchanged_count bigint, OUT duplicate_count bigint, OUT quarantined_count bigint) RETURNS record
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM dedup.run_chunk(run, migrate_chunk.chunk_id);
    SELECT c.status, c.source_count, c.inserted_count, c.updated_count, c.unchanged_count, c.duplicate_count, c.quarantined_count
    INTO status, source_count, inserted_count, updated_count, unchanged_count, duplicate_count, quarantined_count
    FROM dedup.checkpoints AS c WHERE c.run_id OPERATOR(pg_catalog.=) run AND c.chunk_id OPERATOR(pg_catalog.=) migrate_chunk.chunk_id;
END $$;
COMMENT ON FUNCTION dedup.migrate_chunk(uuid, text) IS 'migrates one chunk of a source that this database sees, inside the caller''s transaction; a verified chunk is left alone';

-- Commits after every chunk; a chunk that fails is marked so and does not stop the others. What passes by itself (deadlock, serialization, a lock
-- that is held for long) is tried again; a chunk that a worker took meanwhile is the worker's.
CREATE PROCEDURE dedup.migrate_run(run uuid) LANGUAGE plpgsql AS $$
DECLARE
    chunk text;
    limit_attempts int := COALESCE(((dedup.run_row(run)).options OPERATOR(pg_catalog.->>) 'max_attempts')::pg_catalog.int4, 5);
    attempt int;
    again bool;
    message text;
    state text;
    hint text;
    unreferenced bigint;
    late int;
    began timestamptz;
    speed float8;
    pause float8;
    process uuid := pg_catalog.gen_random_uuid();
    next_look timestamptz;
BEGIN
    PERFORM dedup.must_own(run);
    -- On its own, so that sessions that share the run do not wait for this one's first chunk.
    IF (dedup.run_row(run)).status OPERATOR(pg_catalog.=) ANY ('{created,failed}'::pg_catalog.text[])
        AND EXISTS (SELECT FROM dedup.checkpoints AS c WHERE c.run_id OPERATOR(pg_catalog.=) run AND c.status OPERATOR(pg_catalog.=) 'pending') THEN
        PERFORM dedup.set_run_status(run, '{created,failed,running}', 'running', 'run_started');
        COMMIT;
    END IF;
    PERFORM dedup.warm_filter_once();
    COMMIT;
    CALL dedup.look_around(run, process, 0);
    LOOP
        FOR chunk IN SELECT c.chunk_id FROM dedup.checkpoints AS c JOIN dedup.run_tables AS t USING (run_id, table_id)
                     WHERE c.run_id OPERATOR(pg_catalog.=) run AND c.status OPERATOR(pg_catalog.=) 'pending' AND t.source_spec OPERATOR(pg_catalog.?) 'local'
                     ORDER BY pg_catalog.cardinality(t.depends_on), c.chunk_no
        LOOP
            attempt := 0;
            LOOP
                IF (SELECT r.status FROM dedup.runs AS r WHERE r.run_id OPERATOR(pg_catalog.=) run) OPERATOR(pg_catalog.=) ANY ('{paused,cancelled,halted,rolling_back,rolled_back}'::pg_catalog.text[]) THEN
                    RETURN;
                END IF;
                IF EXISTS (SELECT FROM dedup.rollbacks_in_the_way(run)) THEN
                    RAISE WARNING 'a run is being rolled back from a target of run %', run
                        USING HINT = 'CALL dedup.migrate_run again when the rollback is done.';
                    RETURN;
                END IF;
                attempt := attempt OPERATOR(pg_catalog.+) 1;
                again := false;
                began := pg_catalog.clock_timestamp();
                BEGIN
                    PERFORM dedup.migrate_chunk(run, chunk);
                EXCEPTION WHEN OTHERS THEN
                    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
                    message := dedup.without_values(state, message);
                    again := attempt OPERATOR(pg_catalog.<) limit_attempts AND state OPERATOR(pg_catalog.=) ANY ('{40P01,40001,55P03,55006}'::pg_catalog.text[])
                        AND EXISTS (SELECT FROM dedup.checkpoints AS c WHERE c.run_id OPERATOR(pg_catalog.=) run AND c.chunk_id OPERATOR(pg_catalog.=) chunk
                                    AND c.status OPERATOR(pg_catalog.=) 'pending');
                    IF again THEN
                        PERFORM dedup.log_event(run, chunk, 'chunk_retried', pg_catalog.jsonb_build_object('sqlstate', state, 'message', message));
                    ELSIF state OPERATOR(pg_catalog.=) '53100' THEN
                        -- Not the chunk's fault, and the next one would fare no better.
                        UPDATE dedup.checkpoints AS c SET error_sqlstate = state, error_message = message, error_hint = hint
                        WHERE c.run_id OPERATOR(pg_catalog.=) run AND c.chunk_id OPERATOR(pg_catalog.=) chunk AND c.status OPERATOR(pg_catalog.=) 'pending';
                        PERFORM dedup.pause_run(run);
                        PERFORM dedup.check_alerts(run);
                        RAISE WARNING 'the run is paused: %', message USING HINT = 'Make room, SELECT dedup.resume_run(run) and call dedup.migrate_run again.';
                    ELSE
                        UPDATE dedup.checkpoints AS c SET status = 'failed', attempts = c.attempts OPERATOR(pg_catalog.+) attempt,
                            error_sqlstate = state, error_message = message, error_hint = hint
                        WHERE c.run_id OPERATOR(pg_catalog.=) run AND c.chunk_id OPERATOR(pg_catalog.=) chunk AND c.status OPERATOR(pg_catalog.=) 'pending';
                        IF FOUND THEN
                            PERFORM dedup.log_event(run, chunk, 'chunk_failed', pg_catalog.jsonb_build_object('sqlstate', state, 'message', message));
                        END IF;
                    END IF;
                END;
                COMMIT;
                PERFORM dedup.check_alerts(run, '5 s');
                COMMIT;
                SELECT c.source_bytes OPERATOR(pg_catalog./) greatest(0.001, EXTRACT(epoch FROM pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) began)) INTO speed
                FROM dedup.checkpoints AS c WHERE c.run_id OPERATOR(pg_catalog.=) run AND c.chunk_id OPERATOR(pg_catalog.=) chunk;
                -- A second at a time: the rate may change, the run be paused.
                LOOP
                    IF next_look IS NULL OR next_look OPERATOR(pg_catalog.<) pg_catalog.clock_timestamp() THEN
                        CALL dedup.look_around(run, process, speed);
                        next_look := pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) '1 s'::pg_catalog.interval;
                    END IF;
                    pause := dedup.pause_after(run, chunk, began);
                    EXIT WHEN pause OPERATOR(pg_catalog.<=) 0::pg_catalog.float8
                        OR (SELECT r.status FROM dedup.runs AS r WHERE r.run_id OPERATOR(pg_catalog.=) run) OPERATOR(pg_catalog.<>) 'running';
                    PERFORM pg_catalog.pg_sleep(least(1, pause));
                    COMMIT;
                END LOOP;
                EXIT WHEN NOT again;
                PERFORM pg_catalog.pg_sleep(pg_catalog.random() OPERATOR(pg_catalog.*) 0.2::pg_catalog.float8 OPERATOR(pg_catalog.*) attempt::pg_catalog.float8);
            END LOOP;
        END LOOP;
        unreferenced := dedup.retry_foreign_keys(run, unreferenced, true);
        COMMIT;
        IF dedup.run_state(run) OPERATOR(pg_catalog.=) 'finished' THEN
            FOR late IN SELECT u FROM dedup.unverified_tables(run) AS u LOOP
                PERFORM dedup.verify_written(run, late, true);
                COMMIT;
            END LOOP;
        END IF;
        -- The orphan pass may have opened chunks again, workers may have given some back. What others hold, they end. Two statements: what
        -- the first has opened, only the next one sees.
        state := dedup.complete_run(run);
        EXIT WHEN state OPERATOR(pg_catalog.<>) 'running';
        EXIT WHEN NOT EXISTS (SELECT FROM dedup.checkpoints AS c JOIN dedup.run_tables AS t USING (run_id, table_id)
            WHERE c.run_id OPERATOR(pg_catalog.=) run AND c.status OPERATOR(pg_catalog.=) 'pending' AND t.source_spec OPERATOR(pg_catalog.?) 'local');
        COMMIT;
    END LOOP;
    DELETE FROM dedup.processes AS p WHERE p.process_id OPERATOR(pg_catalog.=) process;
    PERFORM dedup.check_alerts(run);
    COMMIT;
END $$;
COMMENT ON PROCEDURE dedup.migrate_run(uuid) IS 'migrates every chunk of a run whose sources this database sees, one transaction a chunk';
