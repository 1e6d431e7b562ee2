-- The end of a run.

CREATE FUNCTION dedup.needs_index(run uuid, table_id int) RETURNS bool
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT g.indexed_at IS NULL FROM dedup.run_tables AS t JOIN dedup.targets AS g USING (target_id)
    WHERE t.run_id = run AND t.table_id = needs_index.table_id
$$;
COMMENT ON FUNCTION dedup.needs_index(uuid, int) IS 'were the rows that stand in the target never hashed';

-- Chunks whose losers have no survivor any more are done again, which writes them. Those of other runs have to be done from their own sources,
-- which may not be ours to read: those runs are reopened. Returns the chunks of this run.
CREATE FUNCTION dedup.reopen_orphans(run uuid, OUT own_chunks bigint, OUT other_runs uuid[]) RETURNS record
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- Own ones first: what they write may be what the others miss.
    -- A halted run stays so: its reconciliation finds what it misses, its repair writes it. One that is purged can't be gone on with.
    WITH lost AS MATERIALIZED (SELECT o.run_id, o.chunk_id FROM dedup.orphans(run) AS o JOIN dedup.runs AS r USING (run_id) WHERE r.status <> 'halted' AND r.purged_at IS NULL),
    next AS (SELECT * FROM lost WHERE lost.run_id = run OR NOT EXISTS (SELECT FROM lost AS own WHERE own.run_id = run)),
    opened AS (UPDATE dedup.checkpoints AS c SET status = 'pending', attempts = 0, not_before = NULL, written_at = NULL
               FROM next WHERE c.run_id = next.run_id AND c.chunk_id = next.chunk_id AND c.status = 'verified' RETURNING c.run_id)
    SELECT count(*) FILTER (WHERE opened.run_id = run), array_agg(DISTINCT opened.run_id) FILTER (WHERE opened.run_id <> run)
    INTO own_chunks, other_runs FROM opened;
    IF other_runs IS NOT NULL THEN
        PERFORM dedup.set_run_status(o, '{done,reconciled,running,failed,paused}', 'running', 'run_reopened') FROM unnest(other_runs) AS o;
        PERFORM dedup.log_event(run, NULL, 'orphans_of_other_runs', jsonb_build_object('runs', other_runs));
        RAISE WARNING 'this run replaced the last rows that held contents of records which other runs dropped as duplicates: %', other_runs
            USING HINT = 'Resume those runs (pg-dedup-migrate run --resume), which writes the records, then this one.';
    END IF;
END $$;
COMMENT ON FUNCTION dedup.reopen_orphans(uuid) IS 'sets chunks whose dropped duplicates have no survivor left back to pending, and reopens other runs that have such';

-- Names of a chunk's records in quarantine.
CREATE FUNCTION dedup.aside(run uuid, chunk text) RETURNS uuid[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(array_agg(md5(coalesce(q.record::text, q.source_key, ''))::uuid), '{}') FROM dedup.quarantine AS q WHERE q.run_id = run AND q.chunk_id = chunk
$$;
COMMENT ON FUNCTION dedup.aside(uuid, text) IS 'names of a chunk''s records in quarantine: what a repair found there';

-- What a repair has set aside that was not before. What foreign keys refuse is so for the time being only: other chunks may satisfy it.
CREATE FUNCTION dedup.set_aside_by_repair(run uuid, chunk text, OUT chunk_id text, OUT by_foreign_key bool, OUT reason text) RETURNS SETOF record
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT q.chunk_id, coalesce(q.sqlstate = '23503', false), q.reason || ': ' || dedup.without_values(q.sqlstate, q.message)
    FROM dedup.quarantine AS q JOIN dedup.checkpoints AS c ON c.run_id = q.run_id AND c.chunk_id = q.chunk_id JOIN dedup.runs AS r ON r.run_id = q.run_id
    WHERE q.run_id = run AND (chunk IS NULL OR q.chunk_id = chunk) AND r.status = 'halted' AND c.repair_aside IS NOT NULL
        AND md5(coalesce(q.record::text, q.source_key, ''))::uuid <> ALL (c.repair_aside)
$$;
COMMENT ON FUNCTION dedup.set_aside_by_repair(uuid, text) IS 'records that the repair of a halted run, or of one chunk, has set aside: it must not leave them so';

-- A row may point at one that a chunk wrote later, in its own table or on a cycle: what foreign keys refused is tried again when the other chunks
-- are done, as long as that makes it fewer (`before`: how many it was the last time).
CREATE FUNCTION dedup.retry_foreign_keys(run uuid, before bigint, local bool) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    refused bigint;
    chunks text[];
    run_status text;
BEGIN
    -- Of a halted run too: its chunks are repaired.
    run_status := (dedup.lock_run(run)).status;
    IF run_status NOT IN ('running', 'halted') THEN
        RETURN before;
    END IF;
    -- Only where the referenced table is written by the run, too. Whether that happened before or after the record was refused, nothing tells for
    -- sure: ordinals are drawn before their chunks commit.
    SELECT coalesce(sum(r.records), 0), array_agg(r.chunk_id) INTO refused, chunks
    FROM (SELECT q.chunk_id, t.target_id, count(*) AS records
          FROM dedup.quarantine AS q JOIN dedup.checkpoints AS c ON c.run_id = q.run_id AND c.chunk_id = q.chunk_id
          JOIN dedup.run_tables AS t ON t.run_id = c.run_id AND t.table_id = c.table_id
          WHERE q.run_id = run AND q.sqlstate = '23503' AND (t.source_spec ? 'local') = local GROUP BY 1, 2) AS r
    WHERE EXISTS (
        SELECT FROM dedup.run_tables AS w JOIN dedup.targets AS parent ON parent.target_id = w.target_id JOIN dedup.targets AS child ON child.target_id = r.target_id
        JOIN pg_constraint AS f ON f.contype = 'f'
            AND (f.conrelid = child.target OR f.conrelid IN (SELECT p.relid FROM pg_partition_tree(child.target) AS p))
            AND (f.confrelid = parent.target OR f.confrelid IN (SELECT p.relid FROM pg_partition_tree(parent.target) AS p))
        WHERE w.run_id = run AND EXISTS (SELECT FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.table_id = w.table_id AND c.chunk_id <> r.chunk_id));
    IF refused > 0 AND (before IS NULL OR refused < before) THEN
        UPDATE dedup.checkpoints AS c
        SET status = 'pending', attempts = 0, not_before = NULL, written_at = NULL, repair = CASE WHEN run_status = 'halted' THEN coalesce(c.repair, 'rewrite') END,
            repair_aside = CASE WHEN run_status = 'halted' THEN coalesce(c.repair_aside, dedup.aside(run, c.chunk_id)) END
        WHERE c.run_id = run AND c.chunk_id = ANY (chunks)
            AND (c.status = 'verified' OR c.status = 'syncing' AND c.written_at IS NOT NULL);
        PERFORM dedup.log_event(run, NULL, 'foreign_keys_retried', jsonb_build_object('records', refused, 'chunks', cardinality(chunks)));
    END IF;
    RETURN refused;
END $$;
COMMENT ON FUNCTION dedup.retry_foreign_keys(uuid, bigint, bool) IS 'sets chunks with records that foreign keys refused, and other chunks may have satisfied, back to pending, if those are fewer than before; returns how many they are';

-- Tables of a run with chunks that were written and not read back.
CREATE FUNCTION dedup.unverified_tables(run uuid) RETURNS SETOF int
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT DISTINCT c.table_id FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.status = 'syncing' AND c.written_at IS NOT NULL ORDER BY 1
$$;
COMMENT ON FUNCTION dedup.unverified_tables(uuid) IS 'tables of a run with chunks that were written and wait for verification';

-- A chunk whose rows are not there: it has no books until it is done again.
CREATE FUNCTION dedup.forget_books(run uuid, chunks text[]) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    UPDATE dedup.checkpoints AS c
    SET written_at = NULL, verified_at = NULL, ordinal = NULL, source_count = NULL, inserted_count = NULL, updated_count = NULL,
        unchanged_count = NULL, duplicate_count = NULL, quarantined_count = NULL, checksum = NULL, inserted_checksum = NULL, updated_checksum = NULL,
        unchanged_checksum = NULL, duplicate_checksum = NULL, quarantined_checksum = NULL, written_count = NULL, written_checksum = NULL,
        source_bytes = NULL, source_lsn = NULL, timings = NULL
    WHERE c.run_id = run AND c.chunk_id = ANY (chunks)
$$;
COMMENT ON FUNCTION dedup.forget_books(uuid, text[]) IS 'clears the books of chunks that are to be done again from the start';

CREATE FUNCTION dedup.fail_written(run uuid, chunk text, message text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE dedup.checkpoints AS c SET status = 'failed', error_sqlstate = '23000', error_message = message,
        error_hint = 'Look for a trigger, rule, policy or application that changes or drops rows of the target, then resume the run.'
    WHERE c.run_id = run AND c.chunk_id = chunk;
    PERFORM dedup.forget_books(run, ARRAY[chunk]);
    PERFORM dedup.log_event(run, chunk, 'chunk_failed', jsonb_build_object('sqlstate', '23000', 'message', message));
END $$;
COMMENT ON FUNCTION dedup.fail_written(uuid, text, text) IS 'fails a chunk whose rows were looked for in the end and are not all there';

-- No run is done before every loser whose survivor is gone was written: its chunk is done again, which writes what is left over.
CREATE FUNCTION dedup.complete_run(run uuid) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET synchronous_commit = on AS $$
DECLARE
    old text := (dedup.lock_run(run)).status;
    open_chunks bigint;
    failed_chunks bigint;
    reopened bigint;
    others uuid[];
    waiting int;
BEGIN
    -- What was not read back by its chunk is, now that everything is written.
    IF old IN ('created', 'running', 'failed') AND dedup.run_state(run) = 'finished' THEN
        FOR waiting IN SELECT u FROM dedup.unverified_tables(run) AS u LOOP
            PERFORM dedup.verify_written(run, waiting);
        END LOOP;
    END IF;
    SELECT count(*) FILTER (WHERE c.status IN ('pending', 'syncing')), count(*) FILTER (WHERE c.status = 'failed')
    INTO open_chunks, failed_chunks FROM dedup.checkpoints AS c WHERE c.run_id = run;
    IF old NOT IN ('created', 'running', 'failed') OR open_chunks > 0 THEN
        RETURN old;
    END IF;
    IF failed_chunks = 0 THEN
        SELECT o.own_chunks, o.other_runs INTO reopened, others FROM dedup.reopen_orphans(run) AS o;
        IF reopened > 0 THEN
            PERFORM dedup.log_event(run, NULL, 'orphan_pass', jsonb_build_object('chunks', reopened));
            RETURN dedup.set_run_status(run, '{created,running,failed}', 'running', 'run_resumed');
        END IF;
        IF others IS NOT NULL THEN
            RETURN dedup.set_run_status(run, '{created,running,failed}', 'failed', 'run_finished');
        END IF;
    END IF;
    IF failed_chunks = 0 THEN
        DELETE FROM dedup.pass_keys AS k WHERE k.run_id = run;
    END IF;
    RETURN dedup.set_run_status(run, '{created,running,failed}', CASE WHEN failed_chunks > 0 THEN 'failed' ELSE 'done' END, 'run_finished');
END $$;
COMMENT ON FUNCTION dedup.complete_run(uuid) IS 'ends a run whose chunks are all verified (done) or given up (failed); running: chunks were reopened by the orphan pass';

-- Positions in a table without a key mean nothing under another snapshot: every chunk is done again, and what earlier attempts wrote is found
-- to be there. A worker that still has one of the chunks is fenced by its lease.
CREATE FUNCTION dedup.restart_table(run uuid, table_id int) RETURNS int
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    n int;
BEGIN
    IF (dedup.run_row(run)).status NOT IN ('created', 'running', 'paused', 'failed', 'halted') THEN
        RAISE EXCEPTION 'run % is %', run, (dedup.run_row(run)).status USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    UPDATE dedup.checkpoints AS c SET status = 'pending', attempts = 0, not_before = NULL, lease = NULL,
        repair = CASE WHEN (dedup.run_row(run)).status = 'halted' THEN coalesce(c.repair, 'rewrite') END,
        repair_aside = CASE WHEN (dedup.run_row(run)).status = 'halted' THEN coalesce(c.repair_aside, dedup.aside(run, c.chunk_id)) END
    FROM dedup.run_tables AS t
    WHERE c.run_id = run AND c.table_id = restart_table.table_id AND t.run_id = run AND t.table_id = restart_table.table_id AND t.keyless;
    GET DIAGNOSTICS n = ROW_COUNT;
    PERFORM dedup.forget_books(run, array_agg(c.chunk_id)) FROM dedup.checkpoints AS c
    WHERE c.run_id = run AND c.table_id = restart_table.table_id AND c.status = 'pending';
    PERFORM dedup.log_event(run, NULL, 'table_restarted', jsonb_build_object('table_id', table_id, 'chunks', n));
    RETURN n;
END $$;
COMMENT ON FUNCTION dedup.restart_table(uuid, int) IS 'sets every chunk of a table without a key back to pending; returns how many';

-- One refused record; called inside the chunk's transaction.
CREATE FUNCTION dedup.quarantine_record(run uuid, chunk_id text, source_key bytea, sqlstate text, reason text, message text, record bytea)
RETURNS void LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO dedup.quarantine (run_id, chunk_id, table_id, pass, source_key, sqlstate, reason, message, record)
    SELECT run, quarantine_record.chunk_id, c.table_id, r.pass, dedup.key_text(t.target_id, quarantine_record.source_key), sqlstate, reason, left(message, 2000), record
    FROM dedup.checkpoints AS c JOIN dedup.runs AS r USING (run_id) JOIN dedup.run_tables AS t USING (run_id, table_id)
    WHERE c.run_id = run AND c.chunk_id = quarantine_record.chunk_id
$$;
COMMENT ON FUNCTION dedup.quarantine_record(uuid, text, bytea, text, text, text, bytea) IS 'sets one refused record aside, with why';
