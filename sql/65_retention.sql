-- What is kept, for how long, and how the rest goes. docs/operations.md has the periods and their reasons.

CREATE FUNCTION dedup.record_archive(run uuid, location text, manifest_sha256 bytea, bytes bigint, began_at timestamptz, run_status text, run_ended_at timestamptz) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    id bigint;
BEGIN
    PERFORM dedup.run_row(run);
    IF octet_length(manifest_sha256) IS DISTINCT FROM 32 THEN
        RAISE EXCEPTION 'an archive is known by the SHA-256 of its manifest' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    INSERT INTO dedup.archives (run_id, location, manifest_sha256, bytes, began_at, run_status, run_ended_at)
    VALUES (run, location, manifest_sha256, bytes, began_at, run_status, run_ended_at) RETURNING archive_id INTO id;
    PERFORM dedup.log_event(run, NULL, 'archived', jsonb_build_object('archive_id', id, 'location', location, 'manifest_sha256', encode(manifest_sha256, 'hex')));
    RETURN id;
END $$;
COMMENT ON FUNCTION dedup.record_archive(uuid, text, bytea, bigint, timestamptz, text, timestamptz) IS 'says that report, events, ledger and quarantine of a run were archived; began_at: what came later is not in it; the run''s status and dedup.ended_at as the archive has them';

CREATE FUNCTION dedup.set_bake_in(run uuid, until timestamptz) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.lock_run(run);
BEGIN
    IF until IS NULL THEN
        RAISE EXCEPTION 'a bake-in needs an end' USING ERRCODE = 'null_value_not_allowed', HINT = '''infinity'' keeps what a rollback needs for good.';
    ELSIF r.bake_in_until < clock_timestamp() THEN
        RAISE EXCEPTION 'the bake-in of run % has ended', run USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = format('It ended at %s; what a rollback needs may be gone.', r.bake_in_until);
    END IF;
    UPDATE dedup.runs AS x SET bake_in_until = until WHERE x.run_id = run;
    PERFORM dedup.log_event(run, NULL, 'bake_in_set', jsonb_build_object('until', until));
END $$;
COMMENT ON FUNCTION dedup.set_bake_in(uuid, timestamptz) IS 'until when a run can be rolled back, as long as it can';

-- Nothing goes of a run that is open, halted or not archived as it ended.
CREATE FUNCTION dedup.why_kept(run uuid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN r.status NOT IN ('done', 'reconciled', 'rolled_back', 'cancelled') THEN format('the run is %s', r.status)
                WHEN EXISTS (SELECT FROM dedup.reconciliations AS c WHERE c.run_id = run AND c.verdict = 'open') THEN 'it is being reconciled'
                WHEN NOT EXISTS (SELECT FROM dedup.archives AS a WHERE a.run_id = run AND a.run_status = r.status AND a.run_ended_at = dedup.ended_at(run)) THEN 'it is not archived: pg-dedup-migrate report RUN --archive DIR' END
    FROM dedup.run_row(run) AS r
$$;
COMMENT ON FUNCTION dedup.why_kept(uuid) IS 'why nothing of a run may be purged; null: what is old enough may';

CREATE FUNCTION dedup.ended_at(run uuid) RETURNS timestamptz
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT greatest(r.finished_at, (SELECT max(b.finished_at) FROM dedup.rollbacks AS b WHERE b.run_id = run), (SELECT max(c.finished_at) FROM dedup.reconciliations AS c WHERE c.run_id = run))
    FROM dedup.runs AS r WHERE r.run_id = run
$$;
COMMENT ON FUNCTION dedup.ended_at(uuid) IS 'when the last thing happened to a run: its end, a rollback, a reconciliation';

-- Where it stands, in the order that it goes in: $1 the run, $2 how long archives are kept.
CREATE FUNCTION dedup.purge_parts(what text, OUT name text, OUT mine text) RETURNS SETOF record
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT p.name, p.mine FROM (VALUES
        (1, 'reconciliations', 'divergences', 'x.run_id = $1'),
        (2, 'reconciliations', 'reconciled_chunks', 'x.reconciliation_id IN (SELECT c.reconciliation_id FROM dedup.reconciliations AS c WHERE c.run_id = $1)'),
        (3, 'before_images', 'before_images', 'x.run_id = $1'),
        (6, 'history', 'left_alone', 'x.run_id = $1'),
        (7, 'history', 'rollback_steps', 'x.rollback_id IN (SELECT b.rollback_id FROM dedup.rollbacks AS b WHERE b.run_id = $1)'),
        (8, 'history', 'quarantine', 'x.run_id = $1'),
        (9, 'history', 'ledger_block', 'x.ordinal IN (SELECT o.ordinal FROM dedup.ordinals AS o WHERE o.run_id = $1)'),
        (10, 'history', 'unchanged_rows', 'x.ordinal IN (SELECT o.ordinal FROM dedup.ordinals AS o WHERE o.run_id = $1)'),
        (11, 'history', 'throughput', 'x.run_id = $1'),
        (12, 'history', 'alert_log', 'x.run_id = $1'),
        (13, 'history', 'processes', 'x.run_id = $1'),
        (14, 'history', 'workers', 'x.run_id = $1'),
        (15, 'history', 'events', 'x.run_id = $1 AND x.kind <> ''purged'''),
        (16, 'history', 'checkpoints', 'x.run_id = $1'),
        (17, 'archives', 'archives', 'x.run_id = $1 AND x.archived_at < clock_timestamp() - $2')) AS p(n, what, name, mine)
    WHERE p.what = purge_parts.what ORDER BY p.n
$$;
COMMENT ON FUNCTION dedup.purge_parts(text) IS 'the tables, and which of their rows, that what a run leaves behind stands in';

CREATE FUNCTION dedup.purge_rows(run uuid, what text, archives interval) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    part record;
    here bigint;
    rows bigint := 0;
BEGIN
    FOR part IN SELECT p.name, p.mine FROM dedup.purge_parts(what) AS p LOOP
        EXECUTE format('SELECT count(*) FROM dedup.%I AS x WHERE %s', part.name, part.mine) INTO here USING run, archives;
        rows := rows + here;
    END LOOP;
    RETURN rows;
END $$;
COMMENT ON FUNCTION dedup.purge_rows(uuid, text, interval) IS 'rows of what a run leaves behind';

-- What is old enough to go, run by run; why it stays, where it does.
CREATE FUNCTION dedup.purgeable(reconciliations interval DEFAULT '7 days', history interval DEFAULT '90 days', archives interval DEFAULT '1 year',
    only_run uuid DEFAULT NULL, OUT run_id uuid, OUT what text, OUT rows bigint, OUT kept_because text) RETURNS SETOF record
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs;
    now_is timestamptz := clock_timestamp();
    ended timestamptz;
    why text;
BEGIN
    FOR r IN SELECT * FROM dedup.runs AS x WHERE only_run IS NULL OR x.run_id = only_run ORDER BY x.created_at LOOP
        run_id := r.run_id;
        ended := dedup.ended_at(r.run_id);
        why := dedup.why_kept(r.run_id);

        what := 'reconciliations';
        rows := CASE WHEN ended < now_is - reconciliations THEN dedup.purge_rows(r.run_id, what, archives) END;
        IF rows > 0 THEN
            kept_because := why;
            RETURN NEXT;
        END IF;

        what := 'before_images';
        rows := CASE WHEN r.bake_in_until < now_is THEN dedup.purge_rows(r.run_id, what, archives) END;
        IF rows > 0 THEN
            kept_because := why;
            RETURN NEXT;
        END IF;

        what := 'history';
        rows := CASE WHEN ended < now_is - history THEN dedup.purge_rows(r.run_id, what, archives) END;
        IF rows > 0 THEN
            kept_because := coalesce(why, CASE WHEN r.bake_in_until >= now_is THEN format('it can be rolled back until %s', r.bake_in_until) END, (
                -- What another run may still take back is kept for those whose records rest on it: by their ledgers.
                SELECT format('run %s, which wrote the same target meanwhile, can still be rolled back', o.run_id) FROM dedup.runs AS o
                WHERE o.run_id <> r.run_id AND o.status NOT IN ('rolled_back', 'created') AND NOT coalesce(o.bake_in_until < now_is, false) AND o.started_at < ended
                    AND EXISTS (SELECT FROM dedup.run_tables AS t JOIN dedup.run_tables AS u USING (target_id) WHERE t.run_id = r.run_id AND u.run_id = o.run_id) LIMIT 1));
            RETURN NEXT;
        END IF;

        what := 'archives';
        rows := dedup.purge_rows(r.run_id, what, archives);
        IF rows > 0 THEN
            -- As long as anything is here that it stands for, it is needed.
            kept_because := CASE WHEN EXISTS (SELECT FROM dedup.checkpoints AS c WHERE c.run_id = r.run_id) THEN 'the run''s history is not purged yet' END;
            RETURN NEXT;
        END IF;
    END LOOP;
END $$;
COMMENT ON FUNCTION dedup.purgeable(interval, interval, interval, uuid) IS 'what of each run is older than it is kept, and why it stays where it does; before images go with the run''s bake-in';

-- One batch; 0: nothing is left.
CREATE FUNCTION dedup.purge_batch(run uuid, what text, archives interval, many int DEFAULT 10000) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    part record;
    gone bigint;
    why text := dedup.why_kept(run);
    r dedup.runs := dedup.run_row(run);
BEGIN
    -- Called by hand it is as careful.
    why := CASE WHEN what = 'archives' THEN CASE WHEN EXISTS (SELECT FROM dedup.checkpoints AS c WHERE c.run_id = run) THEN 'the run''s history is not purged yet' END WHEN why IS NOT NULL THEN why
                WHEN what = 'history' AND r.purged_at IS NULL THEN 'dedup.purge begins with it'
                WHEN what = 'before_images' AND NOT coalesce(r.bake_in_until < clock_timestamp(), false) THEN 'it can be rolled back' END;
    IF why IS NOT NULL THEN
        RAISE EXCEPTION 'nothing of run % may be purged', run USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = why;
    END IF;
    FOR part IN
        SELECT p.name, p.mine FROM dedup.purge_parts(what) AS p
    LOOP
        EXECUTE format('DELETE FROM dedup.%I WHERE ctid = ANY (ARRAY(SELECT x.ctid FROM dedup.%I AS x WHERE %s LIMIT $3))', part.name, part.name, part.mine) USING run, archives, many;
        GET DIAGNOSTICS gone = ROW_COUNT;
        IF gone > 0 THEN
            RETURN gone;
        END IF;
    END LOOP;
    RETURN 0;
END $$;
COMMENT ON FUNCTION dedup.purge_batch(uuid, text, interval, int) IS 'deletes some rows of what a run leaves behind; 0: nothing is left';

-- Marks a run before the first of its rows goes: what would need them refuses from then on.
CREATE FUNCTION dedup.begin_purge(run uuid, what text, reconciliations interval, history interval, archives interval) RETURNS bool
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dedup.lock_run(run);
    PERFORM FROM dedup.purgeable(reconciliations, history, archives, run) AS p WHERE p.what = begin_purge.what AND p.kept_because IS NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF what = 'history' THEN
        UPDATE dedup.runs AS r SET purged_at = clock_timestamp(), bake_in_until = least(r.bake_in_until, clock_timestamp()) WHERE r.run_id = run;
    END IF;
    RETURN true;
END $$;
COMMENT ON FUNCTION dedup.begin_purge(uuid, text, interval, interval, interval) IS 'looks again, with the run locked, whether something of it may go';

CREATE PROCEDURE dedup.purge(dry_run bool DEFAULT false, reconciliations interval DEFAULT '7 days', history interval DEFAULT '90 days', archives interval DEFAULT '1 year')
LANGUAGE plpgsql AS $$
DECLARE
    old record;
    gone bigint;
    batch bigint;
BEGIN
    FOR old IN SELECT p.* FROM dedup.purgeable(reconciliations, history, archives) AS p LOOP
        IF old.kept_because IS NOT NULL THEN
            RAISE NOTICE 'run %: % stay: %', old.run_id, old.what, old.kept_because;
            CONTINUE;
        ELSIF dry_run THEN
            RAISE NOTICE 'run %: % would go, % rows', old.run_id, old.what, old.rows;
            CONTINUE;
        END IF;
        CONTINUE WHEN NOT dedup.begin_purge(old.run_id, old.what, reconciliations, history, archives);
        COMMIT;
        gone := 0;
        LOOP
            batch := dedup.purge_batch(old.run_id, old.what, archives);
            EXIT WHEN batch OPERATOR(pg_catalog.=) 0;
            gone := gone OPERATOR(pg_catalog.+) batch;
            COMMIT;
        END LOOP;
        PERFORM dedup.log_event(old.run_id, NULL, 'purged', pg_catalog.jsonb_build_object('what', old.what, 'rows', gone));
        COMMIT;
        RAISE NOTICE 'run %: % went, % rows', old.run_id, old.what, gone;
    END LOOP;
END $$;
COMMENT ON PROCEDURE dedup.purge(bool, interval, interval, interval) IS 'deletes what is older than it is kept, archived, and of a run that is over, in small transactions; dry_run: only says what';
