-- Repair: chunks with mismatches are done again, and compared again. docs/repair.md has the method.

-- Sets the chunks with mismatches back to pending; the run stays halted. Chunks that an earlier repair left undone are among them.
CREATE FUNCTION dedup.begin_repair(run uuid, delete_extra bool DEFAULT false) RETURNS int
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.lock_run(run);
    n int;
BEGIN
    IF r.status IN ('reconciled', 'done') AND EXISTS (SELECT FROM dedup.reconciliations AS x WHERE x.run_id = run) THEN
        RETURN 0;
    ELSIF r.status <> 'halted' THEN
        RAISE EXCEPTION 'run % is %', run, r.status USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = 'What is repaired is what a reconciliation has found.',
            HINT = CASE WHEN r.status = 'done' THEN format('pg-dedup-migrate reconcile %s', run) ELSE 'A run is reconciled when every chunk of it is verified.' END;
    END IF;
    -- Of every pass that holds the run. All of a table without a key is looked at: positions mean nothing later.
    WITH wrong AS (
        SELECT k.chunk_id, k.table_id, bool_or(t.keyless OR k.stands_for_table) AS whole_table
        FROM dedup.reconciliations AS p JOIN dedup.reconciled_chunks AS k USING (reconciliation_id) JOIN dedup.checkpoints AS c ON c.run_id = run AND c.chunk_id = k.chunk_id
            JOIN dedup.run_tables AS t ON t.run_id = run AND t.table_id = k.table_id
        WHERE p.holds = run AND (c.ordinal <= p.last_ordinal OR c.status <> 'verified')
            AND k.missing_count + k.changed_count + k.surviving_duplicate_count
                + CASE WHEN delete_extra THEN k.extra_count ELSE 0 END + CASE WHEN p.is_strict THEN k.source_changed_count ELSE 0 END > 0
        GROUP BY 1, 2
    )
    UPDATE dedup.checkpoints AS c
    SET status = 'pending', attempts = 0, not_before = NULL, written_at = NULL, repair = CASE WHEN delete_extra THEN 'delete_extra' ELSE 'rewrite' END,
        repair_aside = coalesce(c.repair_aside, dedup.aside(run, c.chunk_id))
    WHERE c.run_id = run AND (c.status IN ('verified', 'failed', 'pending') OR c.status = 'syncing' AND c.written_at IS NOT NULL)
        AND (c.repair IS NOT NULL OR c.status <> 'verified' OR c.chunk_id IN (SELECT a.chunk_id FROM dedup.set_aside_by_repair(run, NULL) AS a)
             OR EXISTS (SELECT FROM wrong AS w WHERE w.chunk_id = c.chunk_id OR w.whole_table AND w.table_id = c.table_id));
    GET DIAGNOSTICS n = ROW_COUNT;
    PERFORM dedup.log_event(run, NULL, 'repair_started', jsonb_build_object('chunks', n, 'delete_extra', delete_extra));
    RETURN n;
END $$;
COMMENT ON FUNCTION dedup.begin_repair(uuid, bool) IS 'sets chunks of a halted run in which mismatches were found back to pending, to be repaired; returns how many';

-- What is left to be repaired in turn: rows of a table without a key that were not there when they were looked for, chunks whose dropped duplicates lost
-- their survivor to the repair. Returns the chunks; 0: the repair is done.
CREATE FUNCTION dedup.finish_repair(run uuid) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.lock_run(run);
    waiting int;
    more bigint;
    others uuid[];
BEGIN
    IF r.status <> 'halted' THEN
        RETURN 0;
    END IF;
    IF EXISTS (SELECT FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.status <> 'verified' AND NOT (c.status = 'syncing' AND c.written_at IS NOT NULL)) THEN
        RAISE EXCEPTION 'chunks of run % were not repaired', run USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = (SELECT string_agg(format('chunk %s is %s: %s', c.chunk_id, c.status, coalesce(c.error_message, 'not done')), '; ' ORDER BY c.chunk_no)
                      FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.status IN ('failed', 'pending')),
            HINT = 'Mend the cause, then repair the run again.';
    END IF;
    IF EXISTS (SELECT FROM dedup.set_aside_by_repair(run, NULL)) THEN
        RAISE EXCEPTION 'foreign keys refuse records of run % that are to be repaired', run USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = (SELECT string_agg(DISTINCT format('chunk %s: %s', a.chunk_id, a.reason), '; ') FROM dedup.set_aside_by_repair(run, NULL) AS a),
            HINT = 'Put the rows that they point at in place, then repair the run again.';
    END IF;
    FOR waiting IN SELECT u FROM dedup.unverified_tables(run) AS u LOOP
        PERFORM dedup.verify_written(run, waiting, true);
    END LOOP;
    PERFORM dedup.retract_stale(run);
    WITH lost AS MATERIALIZED (SELECT o.run_id, o.chunk_id FROM dedup.orphans(run) AS o),
    own AS MATERIALIZED (
        SELECT c.chunk_id, c.table_id FROM dedup.checkpoints AS c
        WHERE c.run_id = run AND (c.status = 'failed' OR EXISTS (SELECT FROM lost WHERE lost.run_id = run AND lost.chunk_id = c.chunk_id))
    ), again AS (
        UPDATE dedup.checkpoints AS c SET status = 'pending', attempts = 0, not_before = NULL, written_at = NULL, repair = 'rewrite', repair_aside = coalesce(c.repair_aside, dedup.aside(run, c.chunk_id))
        FROM dedup.run_tables AS t
        WHERE c.run_id = run AND t.run_id = run AND t.table_id = c.table_id
            AND EXISTS (SELECT FROM own WHERE own.chunk_id = c.chunk_id OR t.keyless AND own.table_id = c.table_id) RETURNING 1)
    SELECT (SELECT count(*) FROM again) INTO more;
    IF more = 0 THEN
        SELECT o.other_runs INTO others FROM dedup.reopen_orphans(run) AS o;
        DELETE FROM dedup.pass_keys AS k WHERE k.run_id = run;
        UPDATE dedup.checkpoints AS c SET repair_aside = NULL WHERE c.run_id = run AND c.repair_aside IS NOT NULL;
        PERFORM dedup.log_event(run, NULL, 'repaired', jsonb_build_object('reopened', others));
    END IF;
    RETURN more;
END $$;
COMMENT ON FUNCTION dedup.finish_repair(uuid) IS 'verifies what repaired chunks put off and takes entries without a row out of the index; sets chunks that are to be repaired in turn back to pending, and returns how many';

CREATE FUNCTION dedup.repair(run uuid, delete_extra bool DEFAULT false) RETURNS int
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    chunk text;
    strictly bool;
    before bigint;
    after bigint;
    refused bigint;
    failed text[];
    failures int;
    rounds int := 0;
BEGIN
    PERFORM dedup.must_own(run);
    PERFORM dedup.hold_run(run, true);
    PERFORM dedup.must_see_sources(run, 'pg-dedup-migrate repair %s repairs it.');
    PERFORM dedup.begin_repair(run, delete_extra);
    IF (dedup.run_row(run)).status <> 'halted' THEN
        RETURN 0;
    END IF;
    before := dedup.open_mismatches(run);
    SELECT bool_or(x.is_strict) INTO strictly FROM dedup.reconciliations AS x WHERE x.holds = run;
    LOOP
        -- What fails for want of what another chunk does is tried again after the others, as long as that makes it fewer.
        failures := NULL;
        LOOP
            failed := '{}';
            FOR chunk IN SELECT c.chunk_id FROM dedup.checkpoints AS c JOIN dedup.run_tables AS t USING (run_id, table_id)
                         WHERE c.run_id = run AND c.status = 'pending' ORDER BY cardinality(t.depends_on), c.chunk_no LOOP
                BEGIN
                    PERFORM dedup.run_chunk(run, chunk);
                EXCEPTION WHEN lock_not_available OR foreign_key_violation OR object_not_in_prerequisite_state THEN
                    IF cardinality(failed) + 1 >= failures THEN
                        RAISE;
                    END IF;
                    failed := failed || chunk;
                END;
            END LOOP;
            EXIT WHEN failed = '{}';
            failures := cardinality(failed);
        END LOOP;
        refused := dedup.retry_foreign_keys(run, refused, true);
        CONTINUE WHEN EXISTS (SELECT FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.status = 'pending');
        EXIT WHEN dedup.finish_repair(run) = 0;
        rounds := rounds + 1;
        refused := NULL;
        IF rounds > 10 THEN
            RAISE EXCEPTION 'run % cannot be repaired', run USING ERRCODE = 'object_not_in_prerequisite_state',
                HINT = 'Look for a trigger, rule or application that changes or drops rows of the target.';
        END IF;
    END LOOP;
    PERFORM dedup.reconcile(run, 1.0, strictly, true);
    after := CASE WHEN (dedup.run_row(run)).status = 'halted' THEN dedup.open_mismatches(run) ELSE 0 END;
    RETURN before - after;
END $$;
COMMENT ON FUNCTION dedup.repair(uuid, bool) IS 'sets right what the last reconciliation of a halted run found, and reconciles it again; returns the mismatches that are gone';
