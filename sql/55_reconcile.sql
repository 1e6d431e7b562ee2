-- Reconciliation: the pass around the comparison. docs/reconcile.md has the method.

-- One pass or rollback a run at a time. Held until the transaction ends, or until the session ends or lets go of it.
CREATE FUNCTION dedup.hold_run(run uuid, until_commit bool DEFAULT false) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    name bigint := hashtextextended('dedup ' || (dedup.run_row(run)).run_id::text, 0);
BEGIN
    -- A session that has just gone takes a moment to let go.
    FOR try IN 1 .. 20 LOOP
        IF (CASE WHEN until_commit THEN pg_try_advisory_xact_lock(name) ELSE pg_try_advisory_lock(name) END) THEN
            RETURN;
        END IF;
        PERFORM pg_sleep(0.1);
    END LOOP;
    RAISE EXCEPTION 'another session is reconciling run % or rolling it back', run USING ERRCODE = 'object_in_use',
        HINT = 'Wait for it, or end it: SELECT pid FROM pg_locks WHERE locktype = ''advisory''.';
END $$;
COMMENT ON FUNCTION dedup.hold_run(uuid, bool) IS 'keeps other sessions from reconciling the run or rolling it back until this one, or its transaction, ends';

CREATE FUNCTION dedup.let_go_of_run(run uuid) RETURNS bool LANGUAGE sql SET search_path = pg_catalog, pg_temp
AS $$ SELECT pg_advisory_unlock(hashtextextended('dedup ' || run::text, 0)) $$;
COMMENT ON FUNCTION dedup.let_go_of_run(uuid) IS 'ends what dedup.hold_run began';

-- Highest ordinal of a run's targets, whoever drew it.
CREATE FUNCTION dedup.last_ordinal(run uuid) RETURNS bigint
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(max(o.ordinal), 0) FROM dedup.ordinals AS o WHERE o.target_id IN (SELECT t.target_id FROM dedup.run_tables AS t WHERE t.run_id = run)
$$;
COMMENT ON FUNCTION dedup.last_ordinal(uuid) IS 'highest ordinal of a run''s targets: it grows with everything that is written there';

-- Takes up a pass that was cut off, unless something was written since.
CREATE FUNCTION dedup.begin_reconcile(run uuid, sample float8 DEFAULT 1.0, strict bool DEFAULT false, repaired bool DEFAULT false) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.lock_run(run);
    last bigint := dedup.last_ordinal(run);
    other text;
    id bigint;
BEGIN
    PERFORM dedup.must_be_kept(run);
    IF sample IS NULL OR NOT (sample > 0 AND sample <= 1) THEN
        RAISE EXCEPTION 'a sample of % cannot be drawn', coalesce(sample::text, 'NULL') USING ERRCODE = 'invalid_parameter_value',
            HINT = 'It is a fraction: 0.01 looks at one content in a hundred, 1 at all.';
    ELSIF sample < 1 AND NOT EXISTS (SELECT FROM dedup.run_tables AS t WHERE t.run_id = run AND NOT t.keyless) THEN
        RAISE EXCEPTION 'no table of run % has a key', run USING ERRCODE = 'feature_not_supported',
            DETAIL = 'What is in a sample is fetched by key.', HINT = 'Reconcile the whole run.';
    END IF;
    IF r.status NOT IN ('done', 'reconciled', 'halted') THEN
        RAISE EXCEPTION 'run % is %', run, r.status USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = 'A run is reconciled when every chunk of it is verified.',
            HINT = CASE WHEN r.status IN ('created', 'running', 'paused', 'failed')
                        THEN format('pg-dedup-migrate run --resume %s goes on.', run) ELSE 'Nothing is left to compare.' END;
    END IF;
    IF EXISTS (SELECT FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.status <> 'verified') OR EXISTS (SELECT FROM dedup.set_aside_by_repair(run, NULL)) THEN
        RAISE EXCEPTION 'run % has chunks that are not repaired yet', run USING ERRCODE = 'object_not_in_prerequisite_state',
            HINT = format('pg-dedup-migrate repair %s goes on with it.', run);
    END IF;
    SELECT string_agg(DISTINCT g.target::text, ', ') INTO other FROM dedup.run_tables AS t JOIN dedup.targets AS g USING (target_id)
    WHERE t.run_id = run AND g.signature <> dedup.signature_of(t.layout);
    IF other IS NOT NULL THEN
        RAISE EXCEPTION 'the hash index of % was made for other columns than the run''s', other USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = 'What the run dropped as duplicates cannot be looked up in it.', HINT = 'Reconcile the run that made the index.';
    END IF;
    PERFORM dedup.refuse_replaced(g.target_id) FROM (SELECT DISTINCT t.target_id FROM dedup.run_tables AS t WHERE t.run_id = run) AS g;
    SELECT c.reconciliation_id INTO id FROM dedup.reconciliations AS c
    WHERE c.run_id = run AND c.verdict = 'open' AND c.sample = begin_reconcile.sample AND c.is_strict = begin_reconcile.strict AND c.last_ordinal = last
    ORDER BY c.reconciliation_id DESC LIMIT 1;
    UPDATE dedup.reconciliations AS c SET verdict = 'abandoned', finished_at = clock_timestamp()
    WHERE c.run_id = run AND c.verdict = 'open' AND c.reconciliation_id IS DISTINCT FROM id
        -- A sample is taken while a whole pass waits to be taken up, and the other way round.
        AND (c.last_ordinal <> last OR (c.sample < 1) = (begin_reconcile.sample < 1));
    IF id IS NULL THEN
        INSERT INTO dedup.reconciliations AS c (run_id, sample, is_strict, last_ordinal)
        VALUES (run, begin_reconcile.sample, begin_reconcile.strict, last) RETURNING c.reconciliation_id INTO id;
        IF repaired THEN
            -- Chunks that were found right and not touched since: dedup.recheck_chunks compares their rows with what they were then.
            INSERT INTO dedup.reconciled_chunks
            SELECT copy.*
            FROM dedup.reconciled_chunks AS k JOIN dedup.reconciliations AS x USING (reconciliation_id)
                JOIN dedup.checkpoints AS c ON c.run_id = x.run_id AND c.chunk_id = k.chunk_id
                CROSS JOIN LATERAL jsonb_populate_record(k, jsonb_build_object('reconciliation_id', id)) AS copy
            -- The last verdict: what an earlier pass kept for the end is cleared by a later one.
            WHERE x.reconciliation_id = (SELECT max(y.reconciliation_id) FROM dedup.reconciliations AS y WHERE y.run_id = run AND y.sample = 1 AND y.verdict IN ('clean', 'mismatch'))
                AND x.verdict = 'mismatch' AND x.is_strict >= begin_reconcile.strict AND c.ordinal <= x.last_ordinal AND k.row_checksum IS NOT NULL
                AND k.missing_count + k.changed_count + k.extra_count + k.surviving_duplicate_count + k.foreign_count + k.source_changed_count = 0;
        END IF;
        PERFORM dedup.log_event(run, NULL, 'reconcile_started', jsonb_build_object('reconciliation_id', id, 'sample', sample, 'strict', strict));
    ELSE
        PERFORM dedup.log_event(run, NULL, 'reconcile_resumed', jsonb_build_object('reconciliation_id', id));
    END IF;
    RETURN id;
END $$;
COMMENT ON FUNCTION dedup.begin_reconcile(uuid, float8, bool, bool) IS 'begins a pass over a run whose chunks are all verified, or takes up one that was cut off; sample: the fraction of its contents to look at; repaired: chunks that the pass before found right, and nobody touched since, need not be read from the source again; returns its number';

-- Chunks that a pass has still to compare.
CREATE FUNCTION dedup.chunks_to_reconcile(reconciliation bigint, OUT chunk_id text, OUT table_id int, OUT range_kind text, OUT range_lower text[],
    OUT range_upper text[], OUT local bool, OUT estimated_bytes bigint) RETURNS SETOF record
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT c.chunk_id, c.table_id, c.range_kind, c.range_lower, c.range_upper, t.source_spec ? 'local', coalesce(c.source_bytes, c.estimated_bytes)
    FROM dedup.reconciliations AS p JOIN dedup.checkpoints AS c USING (run_id) JOIN dedup.run_tables AS t USING (run_id, table_id)
    WHERE p.reconciliation_id = reconciliation AND (p.sample = 1 OR NOT t.keyless)
        AND NOT EXISTS (SELECT FROM dedup.reconciled_chunks AS k WHERE k.reconciliation_id = reconciliation AND k.chunk_id = c.chunk_id)
    ORDER BY c.chunk_no
$$;
COMMENT ON FUNCTION dedup.chunks_to_reconcile(bigint) IS 'chunks that a pass has not compared yet';

-- What the source has changed since is a mismatch of a strict pass only.
CREATE FUNCTION dedup.mismatches_of(reconciliation bigint) RETURNS bigint
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT sum(k.missing_count + k.changed_count + k.extra_count + k.surviving_duplicate_count + CASE WHEN p.is_strict THEN k.source_changed_count ELSE 0 END)::bigint
    FROM dedup.reconciliations AS p JOIN dedup.reconciled_chunks AS k USING (reconciliation_id)
    WHERE p.reconciliation_id = reconciliation
$$;
COMMENT ON FUNCTION dedup.mismatches_of(bigint) IS 'mismatches that a pass found; null: it has compared nothing';

CREATE FUNCTION dedup.close_reconcile(reconciliation bigint) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET synchronous_commit = on AS $$
DECLARE
    p dedup.reconciliations;
    r dedup.runs;
    mismatches bigint;
    told jsonb;
    seen_under text;
    result text;
BEGIN
    SELECT * INTO p FROM dedup.reconciliations AS x WHERE x.reconciliation_id = reconciliation;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'reconciliation % does not exist', coalesce(reconciliation::text, 'NULL') USING ERRCODE = 'undefined_object';
    END IF;
    r := dedup.lock_run(p.run_id);
    SELECT * INTO p FROM dedup.reconciliations AS x WHERE x.reconciliation_id = reconciliation FOR NO KEY UPDATE;
    IF p.verdict <> 'open' THEN
        RETURN p.verdict;
    END IF;
    IF EXISTS (SELECT FROM dedup.chunks_to_reconcile(reconciliation)) THEN
        RAISE EXCEPTION 'reconciliation % has chunks left to compare', reconciliation USING ERRCODE = 'object_not_in_prerequisite_state';
    ELSIF p.settled_at IS NULL THEN
        RAISE EXCEPTION 'reconciliation % is not settled', reconciliation USING ERRCODE = 'object_not_in_prerequisite_state',
            HINT = format('SELECT dedup.settle_reconcile(%s);', reconciliation);
    END IF;
    IF r.status NOT IN ('done', 'reconciled', 'halted')
        OR p.last_ordinal <> dedup.last_ordinal(p.run_id) THEN
        UPDATE dedup.reconciliations AS x SET verdict = 'abandoned', finished_at = clock_timestamp() WHERE x.reconciliation_id = reconciliation;
        PERFORM dedup.log_event(p.run_id, NULL, 'reconcile_abandoned', jsonb_build_object('reconciliation_id', reconciliation, 'status', r.status));
        RETURN 'abandoned';
    END IF;
    SELECT dedup.mismatches_of(reconciliation),
        jsonb_build_object('reconciliation_id', reconciliation, 'sample', p.sample, 'source', sum(k.source_count), 'present', sum(k.present_count),
            'duplicate', sum(k.duplicate_count), 'quarantined', sum(k.quarantined_count), 'missing', sum(k.missing_count), 'changed', sum(k.changed_count),
            'extra', sum(k.extra_count), 'surviving_duplicate', sum(k.surviving_duplicate_count), 'foreign', sum(k.foreign_count),
            'source_changed', sum(k.source_changed_count)),
        (SELECT string_agg(t.target_snapshot, ' ' ORDER BY t.last) FROM (SELECT u.target_snapshot, max(u.compared_at) AS last FROM dedup.reconciled_chunks AS u
            WHERE u.reconciliation_id = reconciliation GROUP BY 1) AS t)
    INTO mismatches, told, seen_under FROM dedup.reconciled_chunks AS k WHERE k.reconciliation_id = reconciliation;
    -- Another pass that waits to be taken up keeps what it has.
    DELETE FROM dedup.sampled_keys AS s WHERE s.reconciliation_id IN (SELECT x.reconciliation_id FROM dedup.reconciliations AS x
        WHERE x.run_id = p.run_id AND (x.verdict <> 'open' OR x.reconciliation_id = reconciliation));
    -- After a repair the next pass goes on from what this one found of chunks that are right.
    UPDATE dedup.reconciled_chunks AS k SET seen = NULL, dropped = NULL, sought = NULL FROM dedup.reconciliations AS x
    WHERE x.run_id = p.run_id AND p.sample = 1 AND k.reconciliation_id = x.reconciliation_id AND (x.verdict <> 'open' OR x.reconciliation_id = reconciliation) AND (x.reconciliation_id < reconciliation OR mismatches = 0)
        AND (k.seen IS NOT NULL OR k.dropped IS NOT NULL OR k.sought IS NOT NULL);
    IF mismatches > 0 THEN
        result := 'mismatch';
        -- The run first: a mismatch can only be entered for a run that is held.
        IF r.status <> 'halted' THEN
            PERFORM dedup.set_run_status(p.run_id, '{done,reconciled}', 'halted', 'run_halted');
        END IF;
        UPDATE dedup.reconciliations AS x SET verdict = result, finished_at = clock_timestamp(), target_snapshot = seen_under WHERE x.reconciliation_id = reconciliation;
        -- A sample knows of a part only.
        UPDATE dedup.divergences AS d SET state = 'superseded'
        WHERE d.run_id = p.run_id AND d.state = 'open' AND d.reconciliation_id <> reconciliation AND p.sample = 1;
        PERFORM dedup.log_event(p.run_id, NULL, 'mismatch', told || '{"severity": "P1"}');
    ELSIF p.sample < 1 THEN
        -- It says nothing of what it did not look at: no run is reconciled by it, and no mismatch released.
        result := 'clean';
        UPDATE dedup.reconciliations AS x SET verdict = result, finished_at = clock_timestamp(), target_snapshot = seen_under WHERE x.reconciliation_id = reconciliation;
        PERFORM dedup.log_event(p.run_id, NULL, 'sample_clean', told);
    ELSE
        result := 'clean';
        UPDATE dedup.reconciliations AS x SET verdict = result, finished_at = clock_timestamp(), target_snapshot = seen_under WHERE x.reconciliation_id = reconciliation;
        -- What was asked for strictly is answered strictly.
        UPDATE dedup.reconciliations AS x SET released_by = reconciliation
        WHERE x.run_id = p.run_id AND x.verdict = 'mismatch' AND x.released_by IS NULL AND (p.is_strict OR NOT x.is_strict);
        UPDATE dedup.divergences AS d SET state = 'released' FROM dedup.reconciliations AS x
        WHERE d.run_id = p.run_id AND d.state = 'open' AND x.reconciliation_id = d.reconciliation_id AND x.released_by IS NOT NULL;
        IF r.status <> 'reconciled' AND NOT EXISTS (SELECT FROM dedup.reconciliations AS x WHERE x.holds = p.run_id) THEN
            PERFORM dedup.set_run_status(p.run_id, '{done,halted}', 'reconciled', 'run_reconciled');
        END IF;
        UPDATE dedup.checkpoints AS c SET repair_aside = NULL WHERE c.run_id = p.run_id AND c.repair_aside IS NOT NULL;
        PERFORM dedup.log_event(p.run_id, NULL, 'reconciled', told);
    END IF;
    PERFORM dedup.check_alerts(p.run_id);
    RETURN result;
END $$;
COMMENT ON FUNCTION dedup.close_reconcile(bigint) IS 'gives the verdict of a pass whose chunks are all compared: clean, and the run is reconciled unless it was a sample; mismatch, and it is halted; abandoned, if the run went on meanwhile';

-- What the last verdict over a run was about.
CREATE FUNCTION dedup.open_mismatches(run uuid) RETURNS bigint
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(dedup.mismatches_of(max(x.reconciliation_id)), 0)
    FROM dedup.reconciliations AS x WHERE x.run_id = run AND (x.verdict = 'mismatch' OR x.verdict = 'clean' AND x.sample = 1)
$$;
COMMENT ON FUNCTION dedup.open_mismatches(uuid) IS 'mismatches that the last pass over a run found';

-- `remedy`: a hint with %s for the run.
CREATE FUNCTION dedup.must_see_sources(run uuid, remedy text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM dedup.run_tables AS t WHERE t.run_id = run AND NOT coalesce(t.source_spec ? 'local', false)) THEN
        RAISE EXCEPTION 'run % has sources that this database does not see', run USING ERRCODE = 'feature_not_supported',
            HINT = format(remedy, run);
    END IF;
END $$;
COMMENT ON FUNCTION dedup.must_see_sources(uuid, text) IS 'refuses a run of which only a worker can read every source';

CREATE FUNCTION dedup.reconcile(run uuid, sample float8 DEFAULT 1.0, strict bool DEFAULT false, repaired bool DEFAULT false) RETURNS SETOF dedup.reconciled_chunks
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    id bigint;
BEGIN
    PERFORM dedup.must_own(run);
    PERFORM dedup.hold_run(run, true);
    PERFORM dedup.must_see_sources(run, 'pg-dedup-migrate reconcile %s compares them.');
    id := dedup.begin_reconcile(run, sample, strict, repaired);
    IF sample < 1 THEN
        PERFORM dedup.draw_sample(id);
    ELSE
        PERFORM dedup.recheck_chunks(id);
    END IF;
    -- One statement: every chunk is compared under one snapshot.
    PERFORM dedup.reconcile_local_chunks(id);
    PERFORM dedup.settle_reconcile(id);
    PERFORM dedup.close_reconcile(id);
    RETURN QUERY SELECT k.* FROM dedup.reconciled_chunks AS k WHERE k.reconciliation_id = id ORDER BY k.chunk_id;
END $$;
COMMENT ON FUNCTION dedup.reconcile(uuid, float8, bool, bool) IS 'compares the sources of a run, which this database must see, with their targets, record by record; a run with mismatches is halted, one without is reconciled';
