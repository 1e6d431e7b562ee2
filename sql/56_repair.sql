-- Repair: chunks with mismatches are done again, and compared again. docs/reconcile.md has the method.

-- Sets the chunks with mismatches back to pending; the run stays halted. Chunks that an earlier repair left undone are among them.
CREATE FUNCTION dedup.begin_repair(run uuid, delete_extra bool DEFAULT false) RETURNS int
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.lock_run(run);
    p dedup.reconciliations;
    n int;
BEGIN
    IF r.status IN ('reconciled', 'done') AND EXISTS (SELECT FROM dedup.reconciliations AS x WHERE x.run_id = run) THEN
        RETURN 0;
    ELSIF r.status <> 'halted' THEN
        RAISE EXCEPTION 'run % is %', run, r.status USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = 'What is repaired is what a reconciliation has found.',
            HINT = CASE WHEN r.status = 'done' THEN format('pg-dedup-migrate reconcile %s', run) ELSE 'A run is reconciled when every chunk of it is verified.' END;
    END IF;
    SELECT x.* INTO p FROM dedup.reconciliations AS x WHERE x.run_id = run AND x.verdict = 'mismatch' ORDER BY x.reconciliation_id DESC LIMIT 1;
    WITH wrong AS (
        SELECT k.chunk_id, c.table_id, t.keyless FROM dedup.reconciled_chunks AS k JOIN dedup.checkpoints AS c ON c.run_id = run AND c.chunk_id = k.chunk_id
            JOIN dedup.run_tables AS t ON t.run_id = run AND t.table_id = c.table_id
        WHERE k.reconciliation_id = p.reconciliation_id AND (c.ordinal <= p.last_ordinal OR c.status <> 'verified')
            AND k.missing_count + k.changed_count + k.surviving_duplicate_count
                + CASE WHEN delete_extra THEN k.extra_count ELSE 0 END + CASE WHEN p.is_strict THEN k.source_changed_count ELSE 0 END > 0
    )
    UPDATE dedup.checkpoints AS c
    SET status = 'pending', attempts = 0, not_before = NULL, written_at = NULL, repair = CASE WHEN delete_extra THEN 'delete_extra' ELSE 'rewrite' END
    -- Positions in a table without a key mean nothing later: all of it is read again.
    WHERE c.run_id = run AND c.status IN ('verified', 'failed', 'pending') AND (c.repair IS NOT NULL
        OR EXISTS (SELECT FROM wrong AS w WHERE w.chunk_id = c.chunk_id OR w.keyless AND w.table_id = c.table_id));
    GET DIAGNOSTICS n = ROW_COUNT;
    PERFORM dedup.log_event(run, NULL, 'repair_started', jsonb_build_object('reconciliation_id', p.reconciliation_id, 'chunks', n, 'delete_extra', delete_extra));
    RETURN n;
END $$;
COMMENT ON FUNCTION dedup.begin_repair(uuid, bool) IS 'sets chunks of a halted run in which mismatches were found back to pending, to be repaired; returns how many';

-- Chunks whose dropped duplicates lost their survivor to the repair are repaired, too. Returns how many; 0: the repair is done.
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
    FOR waiting IN SELECT u FROM dedup.unverified_tables(run) AS u LOOP
        PERFORM dedup.verify_written(run, waiting, true);
    END LOOP;
    IF EXISTS (SELECT FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.status <> 'verified') THEN
        RAISE EXCEPTION 'chunks of run % were not repaired', run USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = (SELECT string_agg(format('chunk %s is %s: %s', c.chunk_id, c.status, coalesce(c.error_message, 'not done')), '; ' ORDER BY c.chunk_no)
                      FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.status <> 'verified'),
            HINT = 'Mend the cause, then repair the run again.';
    END IF;
    WITH lost AS MATERIALIZED (SELECT o.run_id, o.chunk_id FROM dedup.orphans(run) AS o),
    own AS (UPDATE dedup.checkpoints AS c SET status = 'pending', attempts = 0, not_before = NULL, written_at = NULL, repair = 'rewrite'
            FROM lost WHERE lost.run_id = run AND c.run_id = run AND c.chunk_id = lost.chunk_id AND c.status = 'verified' RETURNING 1)
    SELECT (SELECT count(*) FROM own) INTO more;
    IF more = 0 THEN
        SELECT o.other_runs INTO others FROM dedup.reopen_orphans(run) AS o;
        PERFORM dedup.log_event(run, NULL, 'repaired', jsonb_build_object('reopened', others));
    END IF;
    RETURN more;
END $$;
COMMENT ON FUNCTION dedup.finish_repair(uuid) IS 'verifies what repaired chunks put off; sets chunks that lost survivors to the repair back to pending, to be repaired, and returns how many';

CREATE FUNCTION dedup.repair(run uuid, delete_extra bool DEFAULT false) RETURNS int
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    chunk text;
    strictly bool;
    before bigint;
    after bigint;
BEGIN
    PERFORM dedup.must_own(run);
    PERFORM dedup.hold_run(run, true);
    IF EXISTS (SELECT FROM dedup.run_tables AS t WHERE t.run_id = run AND NOT coalesce(t.source_spec ? 'local', false)) THEN
        RAISE EXCEPTION 'run % has sources that this database does not see', run USING ERRCODE = 'feature_not_supported',
            HINT = format('pg-dedup-migrate repair %s repairs it.', run);
    END IF;
    PERFORM dedup.begin_repair(run, delete_extra);
    IF (dedup.run_row(run)).status <> 'halted' THEN
        RETURN 0;
    END IF;
    before := dedup.open_mismatches(run);
    LOOP
        FOR chunk IN SELECT c.chunk_id FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.status = 'pending' ORDER BY c.chunk_no LOOP
            PERFORM dedup.run_chunk(run, chunk);
        END LOOP;
        EXIT WHEN dedup.finish_repair(run) = 0;
    END LOOP;
    SELECT bool_or(x.is_strict) INTO strictly FROM dedup.reconciliations AS x WHERE x.holds = run;
    PERFORM dedup.reconcile(run, strictly, true);
    after := CASE WHEN (dedup.run_row(run)).status = 'halted' THEN dedup.open_mismatches(run) ELSE 0 END;
    RETURN before - after;
END $$;
COMMENT ON FUNCTION dedup.repair(uuid, bool) IS 'sets right what the last reconciliation of a halted run found, and reconciles it again; returns the mismatches that are gone';
