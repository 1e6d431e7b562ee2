-- Rollback: what a run did to its targets is taken back. docs/rollback.md has the method.

-- Above this, one transaction holds locks and WAL for too long: the rollback is done in chunks.
CREATE FUNCTION dedup.rollback_limit() RETURNS bigint LANGUAGE sql IMMUTABLE AS $$ SELECT 5000000::bigint $$;
COMMENT ON FUNCTION dedup.rollback_limit() IS 'rows that dedup.rollback_run takes back in one transaction at most';

-- By the books, which is cheap, and close: rows that others have changed since are not looked for.
CREATE FUNCTION dedup.rollback_preview(run uuid, chunk text DEFAULT NULL, OUT target regclass, OUT rows_to_delete bigint, OUT rows_to_restore bigint,
    OUT wal_bytes bigint, OUT estimated interval) RETURNS SETOF record
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.run_row(run);
BEGIN
    RETURN QUERY
    -- Rows that were kept for the run when another was rolled back are its own now.
    WITH inherited AS (
        SELECT o.target_id, sum(o.heir_rows)::bigint AS rows FROM dedup.ordinals AS o
        WHERE o.run_id = run AND (chunk IS NULL OR o.chunk_id = chunk) AND o.heir_of IS NOT NULL GROUP BY 1
    ), finished AS (
        SELECT c.* , t.target_id FROM dedup.checkpoints AS c JOIN dedup.run_tables AS t USING (run_id, table_id)
        WHERE c.run_id = run AND (chunk IS NULL OR c.chunk_id = chunk) AND c.written_at IS NOT NULL
            AND NOT EXISTS (SELECT FROM dedup.rollbacks AS b JOIN dedup.rollback_steps AS s USING (rollback_id)
                            WHERE b.run_id = run AND s.ordinal = c.ordinal AND s.undone_at IS NOT NULL)
    ), written AS (
        SELECT f.target_id, sum(f.inserted_count)::bigint + coalesce(max(i.rows), 0) AS inserted,
            extract(epoch FROM max(f.written_at) - min(f.started_at))::float8 AS seconds, sum(f.inserted_count + f.updated_count)::float8 AS records
        FROM finished AS f LEFT JOIN inherited AS i USING (target_id) GROUP BY 1
    ), kept AS (
        SELECT b.target_id, count(*) AS images, coalesce(sum(length(b.image)), 0)::bigint AS bytes FROM dedup.before_images AS b
        WHERE b.run_id = run AND (chunk IS NULL OR b.chunk_id = chunk)
            AND NOT EXISTS (SELECT FROM dedup.rollback_steps AS s WHERE s.ordinal = b.ordinal AND s.undone_at IS NOT NULL) GROUP BY 1
    )
    SELECT g.target, w.inserted, coalesce(k.images, 0),
        -- A record a row deleted, several a row restored, the rows' pages once after a checkpoint, merged index entries once more.
        w.inserted * 60 + coalesce(k.images, 0) * 200 + coalesce(k.bytes, 0) * 2
            + least(pg_table_size(g.target), (w.inserted + coalesce(k.images, 0)) * current_setting('block_size')::bigint)
            + (SELECT coalesce(sum(s.blocks), 0) * current_setting('block_size')::bigint FROM dedup.segment AS s WHERE s.target_id = w.target_id AND s.level > 0)::bigint,
        -- As fast as they were written.
        make_interval(secs => CASE WHEN w.records > 0 THEN w.seconds * (w.inserted + coalesce(k.images, 0)) / w.records ELSE 0 END)
    FROM written AS w JOIN dedup.targets AS g USING (target_id) LEFT JOIN kept AS k USING (target_id) ORDER BY 1;
END $$;
COMMENT ON FUNCTION dedup.rollback_preview(uuid, text) IS 'what a rollback of a run, or of one chunk, would take back, by its books: rows, WAL, time';

-- A rollback and its steps. The chunk's variant is for one transaction with its steps: nothing keeps others away in between.
CREATE FUNCTION dedup.begin_rollback_of(run uuid, chunk text, force bool) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs;
    id bigint;
BEGIN
    PERFORM dedup.end_stale_leases(run);
    r := dedup.lock_run(run);
    PERFORM dedup.must_be_kept(run);
    IF r.status = 'rolling_back' AND chunk IS NULL THEN
        UPDATE dedup.rollbacks AS b SET is_forced = b.is_forced OR force WHERE b.run_id = run AND b.finished_at IS NULL RETURNING b.rollback_id INTO id;
        PERFORM dedup.log_event(run, NULL, 'rollback_resumed', jsonb_build_object('rollback_id', id, 'force', force));
        RETURN id;
    ELSIF r.status IN ('rolled_back', 'rolling_back') THEN
        RAISE EXCEPTION 'run % is %', run, r.status USING ERRCODE = 'object_not_in_prerequisite_state';
    ELSIF chunk IS NOT NULL AND r.status IN ('created', 'running', 'halted') THEN
        RAISE EXCEPTION 'run % is %', run, r.status USING ERRCODE = 'object_not_in_prerequisite_state',
            HINT = CASE r.status WHEN 'running' THEN format('SELECT dedup.pause_run(%L); first: the chunk would be migrated again at once.', run)
                                 WHEN 'halted' THEN format('SELECT * FROM dedup.rollback_run(%L); takes the whole run back.', run)
                                 ELSE 'Nothing was written yet.' END;
    ELSIF chunk IS NOT NULL AND NOT EXISTS (SELECT FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.chunk_id = chunk) THEN
        RAISE EXCEPTION 'run % has no chunk %', run, chunk USING ERRCODE = 'undefined_object',
            HINT = 'SELECT chunk_id FROM dedup.checkpoints lists them.';
    ELSIF r.bake_in_until < clock_timestamp() THEN
        RAISE EXCEPTION 'run % can no longer be rolled back', run USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = format('Its bake-in ended at %s: what it wrote and what stood there before need not be known any more.', r.bake_in_until);
    END IF;
    -- What is not leased yet stays so; what is leased ends first, or finds that its run is no longer open. Before the run is marked: chunks in
    -- flight look at it.
    PERFORM FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.status = 'pending' FOR UPDATE SKIP LOCKED;
    PERFORM FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.status <> 'verified' ORDER BY c.chunk_no FOR UPDATE;
    IF chunk IS NULL THEN
        PERFORM dedup.set_run_status(run, '{created,running,paused,failed,halted,done,reconciled,cancelled}', 'rolling_back', 'run_rolling_back');
    END IF;
    INSERT INTO dedup.rollbacks AS b (run_id, chunk_id, is_forced) VALUES (run, chunk, force) RETURNING b.rollback_id INTO id;
    PERFORM dedup.prepare_rollback(id);
    PERFORM dedup.log_event(run, chunk, 'rollback_started', jsonb_build_object('rollback_id', id, 'force', force, 'from', r.status));
    RETURN id;
END $$;
COMMENT ON FUNCTION dedup.begin_rollback_of(uuid, text, bool) IS 'the work of begin_rollback and rollback_chunk';

-- A hold on a run with mismatches ends by a rollback, not by the word for it.
CREATE FUNCTION dedup.keep_rolled_back() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM dedup.rollbacks AS b WHERE b.run_id = NEW.run_id AND b.chunk_id IS NULL) THEN
        RAISE EXCEPTION 'run % was not rolled back', NEW.run_id USING ERRCODE = 'object_not_in_prerequisite_state', HINT = format('SELECT * FROM dedup.rollback_run(%L);', NEW.run_id);
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION dedup.keep_rolled_back() IS 'trigger: a run is rolled_back by a rollback';
CREATE TRIGGER keep_rolled_back BEFORE UPDATE ON dedup.runs FOR EACH ROW WHEN (NEW.status = 'rolled_back' AND OLD.status <> 'rolled_back') EXECUTE FUNCTION dedup.keep_rolled_back();
ALTER TABLE dedup.runs ENABLE ALWAYS TRIGGER keep_rolled_back;
COMMENT ON TRIGGER keep_rolled_back ON dedup.runs IS 'a run is rolled_back by a rollback';

-- Workers of the run are fenced: the chunks that they are writing are waited for, and none is begun after that.
CREATE FUNCTION dedup.begin_rollback(run uuid, force bool DEFAULT false) RETURNS bigint
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$ SELECT dedup.begin_rollback_of(run, NULL, force) $$;
COMMENT ON FUNCTION dedup.begin_rollback(uuid, bool) IS 'begins to roll a run back, or takes up a rollback that was cut off; one transaction; returns its number';

-- One step in the caller's transaction. Tables that others reference come after those; of one table the newest first.
CREATE FUNCTION dedup.rollback_step(rollback bigint, OUT state text, OUT deleted bigint, OUT restored bigint, OUT left_alone bigint) RETURNS record
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    s dedup.rollback_steps;
    cautious bool := false;
    reason text;
BEGIN
    deleted := 0;
    restored := 0;
    left_alone := 0;
    SELECT x.* INTO s FROM dedup.rollback_steps AS x
    WHERE x.rollback_id = rollback AND x.undone_at IS NULL
        AND NOT EXISTS (SELECT FROM dedup.rollbacks AS b JOIN dedup.run_tables AS t ON t.run_id = b.run_id
                        WHERE b.rollback_id = rollback AND t.depends_on @> ARRAY[x.table_id]
                            AND EXISTS (SELECT FROM dedup.rollback_steps AS d WHERE d.rollback_id = rollback AND d.table_id = t.table_id AND d.undone_at IS NULL))
    ORDER BY x.deferred_at NULLS FIRST, x.ordinal DESC LIMIT 1 FOR UPDATE OF x SKIP LOCKED;
    IF NOT FOUND THEN
        state := CASE WHEN EXISTS (SELECT FROM dedup.rollback_steps AS x WHERE x.rollback_id = rollback AND x.undone_at IS NULL) THEN 'waiting' ELSE 'finished' END;
        RETURN;
    END IF;
    FOR try IN 1 .. 2 LOOP
        BEGIN
            SELECT u.deleted, u.restored, u.left_alone INTO deleted, restored, left_alone FROM dedup.undo_ordinal(rollback, s.ordinal, cautious) AS u;
            IF FOUND THEN
                UPDATE dedup.rollback_steps AS x
                SET undone_at = clock_timestamp(), deleted_count = rollback_step.deleted, restored_count = rollback_step.restored,
                    left_alone_count = rollback_step.left_alone, message = NULL
                WHERE x.rollback_id = rollback AND x.ordinal = s.ordinal;
                state := 'undone';
                RETURN;
            END IF;
            reason := 'a newer change of one of its rows comes first';
            EXIT;
        EXCEPTION
            WHEN serialization_failure THEN
                -- A row is not what was written: each is looked at.
                reason := SQLERRM;
                cautious := true;
            WHEN foreign_key_violation OR unique_violation OR exclusion_violation THEN
                -- What is in the way may be taken back by another step.
                reason := dedup.without_values(SQLSTATE, SQLERRM);
                EXIT;
        END;
    END LOOP;
    UPDATE dedup.rollback_steps AS x SET deferred_at = clock_timestamp(), message = reason WHERE x.rollback_id = rollback AND x.ordinal = s.ordinal;
    deleted := 0;
    restored := 0;
    left_alone := 0;
    state := 'deferred';
END $$;
COMMENT ON FUNCTION dedup.rollback_step(bigint) IS 'takes one finish of a chunk back: undone; deferred, to be tried again after the others; waiting, for steps that others are at; or finished';

CREATE FUNCTION dedup.steps_left(rollback bigint) RETURNS bigint
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$ SELECT count(*) FROM dedup.rollback_steps AS s WHERE s.rollback_id = rollback AND s.undone_at IS NULL $$;
COMMENT ON FUNCTION dedup.steps_left(bigint) IS 'steps of a rollback that are not done yet';

-- Nobody is at a step, and every one has been tried in vain.
CREATE FUNCTION dedup.rollback_stuck(rollback bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    reasons text;
    b dedup.rollbacks;
BEGIN
    SELECT * INTO b FROM dedup.rollbacks AS x WHERE x.rollback_id = rollback;
    SELECT string_agg(DISTINCT format('chunk %s: %s', s.chunk_id, s.message), '; ') INTO reasons
    FROM dedup.rollback_steps AS s WHERE s.rollback_id = rollback AND s.undone_at IS NULL AND s.message IS NOT NULL;
    RAISE EXCEPTION 'the rollback of run % cannot go on', b.run_id USING ERRCODE = 'object_in_use',
        DETAIL = coalesce(reasons, 'Other sessions are at its steps.'),
        HINT = 'Mend what is in the way, then go on with the rollback: what was taken back stays so.';
END $$;
COMMENT ON FUNCTION dedup.rollback_stuck(bigint) IS 'says why a rollback cannot go on';

CREATE FUNCTION dedup.finish_rollback(rollback bigint, OUT run_id uuid, OUT chunk_id text, OUT status text, OUT deleted_count bigint, OUT restored_count bigint,
    OUT kept_count bigint, OUT left_alone_count bigint, OUT seconds float8) RETURNS record
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET synchronous_commit = on AS $$
DECLARE
    b dedup.rollbacks;
BEGIN
    SELECT * INTO b FROM dedup.rollbacks AS x WHERE x.rollback_id = rollback;
    PERFORM dedup.lock_run(b.run_id);
    SELECT * INTO b FROM dedup.rollbacks AS x WHERE x.rollback_id = rollback FOR UPDATE;
    IF EXISTS (SELECT FROM dedup.rollback_steps AS s WHERE s.rollback_id = rollback AND s.undone_at IS NULL) THEN
        RAISE EXCEPTION 'rollback % has steps left', rollback USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    SELECT b.run_id, b.chunk_id, coalesce(sum(s.deleted_count), 0), coalesce(sum(s.restored_count), 0), b.kept_count, coalesce(sum(s.left_alone_count), 0),
        extract(epoch FROM coalesce(b.finished_at, clock_timestamp()) - b.started_at)
    INTO finish_rollback.run_id, finish_rollback.chunk_id, deleted_count, restored_count, finish_rollback.kept_count, left_alone_count, seconds
    FROM dedup.rollback_steps AS s WHERE s.rollback_id = rollback;
    IF b.finished_at IS NULL THEN
        UPDATE dedup.rollbacks AS x SET finished_at = clock_timestamp() WHERE x.rollback_id = rollback;
        IF b.chunk_id IS NULL THEN
            PERFORM dedup.set_run_status(b.run_id, '{rolling_back}', 'rolled_back', 'run_rolled_back');
            DELETE FROM dedup.pass_keys AS k WHERE k.run_id = b.run_id;
            UPDATE dedup.divergences AS d SET state = 'released' WHERE d.run_id = b.run_id AND d.state = 'open';
        ELSE
            -- The chunk is to be done again; a run that has ended waits for somebody to say so.
            UPDATE dedup.checkpoints AS c SET status = 'pending', attempts = 0, not_before = NULL, lease = NULL
            WHERE c.run_id = b.run_id AND c.chunk_id = b.chunk_id;
            PERFORM dedup.forget_books(b.run_id, ARRAY[b.chunk_id]);
            DELETE FROM dedup.quarantine AS q WHERE q.run_id = b.run_id AND q.chunk_id = b.chunk_id;
            DELETE FROM dedup.pass_keys AS k WHERE k.run_id = b.run_id AND k.chunk_id = b.chunk_id;
            IF (dedup.run_row(b.run_id)).status IN ('done', 'reconciled') THEN
                PERFORM dedup.set_run_status(b.run_id, '{done,reconciled}', 'paused', 'run_paused');
            END IF;
        END IF;
        PERFORM dedup.log_event(b.run_id, b.chunk_id, 'rolled_back', jsonb_build_object('rollback_id', rollback, 'deleted', deleted_count,
            'restored', restored_count, 'kept', finish_rollback.kept_count, 'left_alone', left_alone_count));
    END IF;
    status := (dedup.run_row(b.run_id)).status;
END $$;
COMMENT ON FUNCTION dedup.finish_rollback(bigint) IS 'ends a rollback whose steps are all done; answers what it did';

CREATE FUNCTION dedup.roll_back_here(run uuid, chunk text, force bool) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    id bigint;
    did text;
    vain bigint := 0;
BEGIN
    PERFORM dedup.hold_run(run, true);
    id := dedup.begin_rollback_of(run, chunk, force);
    LOOP
        did := (dedup.rollback_step(id)).state;
        EXIT WHEN did = 'finished';
        vain := CASE WHEN did = 'undone' THEN 0 ELSE vain + 1 END;
        IF vain > 0 AND (did = 'waiting' OR vain > dedup.steps_left(id)) THEN
            PERFORM dedup.rollback_stuck(id);
        END IF;
    END LOOP;
    RETURN id;
END $$;
COMMENT ON FUNCTION dedup.roll_back_here(uuid, text, bool) IS 'rolls a run or a chunk back in the caller''s transaction; returns the number of the rollback';

CREATE FUNCTION dedup.rollback_run(run uuid, force bool DEFAULT false, OUT run_id uuid, OUT status text, OUT deleted_count bigint, OUT restored_count bigint,
    OUT kept_count bigint, OUT left_alone_count bigint, OUT seconds float8) RETURNS record
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p record;
    total bigint := 0;
BEGIN
    FOR p IN SELECT * FROM dedup.rollback_preview(run) LOOP
        total := total + p.rows_to_delete + p.rows_to_restore;
        RAISE NOTICE '%: % rows to delete, % to restore, about % of WAL, about % s', p.target, p.rows_to_delete, p.rows_to_restore,
            pg_size_pretty(p.wal_bytes), round(extract(epoch FROM p.estimated), 1);
    END LOOP;
    IF total > dedup.rollback_limit() THEN
        RAISE EXCEPTION 'run % wrote % rows, too many to take back in one transaction', run, total USING ERRCODE = 'program_limit_exceeded',
            DETAIL = format('Up to %s rows are.', dedup.rollback_limit()),
            HINT = format('CALL dedup.rollback_run_in_chunks(%1$L); or pg-dedup-migrate rollback %1$s takes it back in steps, and goes on where it was cut off.', run);
    END IF;
    SELECT f.run_id, f.status, f.deleted_count, f.restored_count, f.kept_count, f.left_alone_count, f.seconds
    INTO rollback_run.run_id, status, deleted_count, restored_count, kept_count, left_alone_count, seconds
    FROM dedup.finish_rollback(dedup.roll_back_here(run, NULL, force)) AS f;
END $$;
COMMENT ON FUNCTION dedup.rollback_run(uuid, bool) IS 'takes back all that a run did, in the caller''s transaction; force: overwrites what others changed since, keeps what other runs rest on for them';

CREATE FUNCTION dedup.rollback_chunk(run uuid, chunk_id text, force bool DEFAULT false, OUT status text, OUT deleted_count bigint, OUT restored_count bigint,
    OUT kept_count bigint, OUT left_alone_count bigint) RETURNS record
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF rollback_chunk.chunk_id IS NULL THEN
        RAISE EXCEPTION 'run % has no chunk NULL', run USING ERRCODE = 'undefined_object';
    END IF;
    SELECT f.status, f.deleted_count, f.restored_count, f.kept_count, f.left_alone_count
    INTO rollback_chunk.status, deleted_count, restored_count, kept_count, left_alone_count
    FROM dedup.finish_rollback(dedup.roll_back_here(run, rollback_chunk.chunk_id, force)) AS f;
END $$;
COMMENT ON FUNCTION dedup.rollback_chunk(uuid, text, bool) IS 'takes back what one chunk did; it is pending again, and its run, if it had ended, paused';

-- Commits after every step. What passes by itself (deadlock, a lock that is held for long) is tried again; whatever ends it, lets go of the run.
CREATE PROCEDURE dedup.rollback_run_in_chunks(run uuid, force bool DEFAULT false) LANGUAGE plpgsql AS $$
DECLARE
    id bigint;
    did record;
    in_all bigint;
    vain bigint := 0;
    failed int := 0;
    told timestamptz := pg_catalog.clock_timestamp();
BEGIN
    PERFORM dedup.hold_run(run);
    BEGIN
        id := dedup.begin_rollback(run, force);
    EXCEPTION WHEN OTHERS THEN
        PERFORM dedup.let_go_of_run(run);
        RAISE;
    END;
    COMMIT;
    in_all := (SELECT pg_catalog.count(*) FROM dedup.rollback_steps AS s WHERE s.rollback_id OPERATOR(pg_catalog.=) id);
    LOOP
        BEGIN
            SELECT * INTO did FROM dedup.rollback_step(id);
            failed := 0;
            vain := CASE WHEN did.state OPERATOR(pg_catalog.=) 'undone' THEN 0 ELSE vain OPERATOR(pg_catalog.+) 1 END;
            IF vain OPERATOR(pg_catalog.>) 0 AND did.state OPERATOR(pg_catalog.<>) 'finished'
                AND vain OPERATOR(pg_catalog.>) ((CASE WHEN did.state OPERATOR(pg_catalog.=) 'waiting' THEN 50 ELSE 0 END) OPERATOR(pg_catalog.+) dedup.steps_left(id)) THEN
                PERFORM dedup.rollback_stuck(id);
            END IF;
        EXCEPTION
            WHEN deadlock_detected OR lock_not_available THEN
                failed := failed OPERATOR(pg_catalog.+) 1;
                IF failed OPERATOR(pg_catalog.>) 5 THEN
                    PERFORM dedup.let_go_of_run(run);
                    RAISE;
                END IF;
            WHEN OTHERS THEN
                PERFORM dedup.let_go_of_run(run);
                RAISE;
        END;
        COMMIT;
        IF failed OPERATOR(pg_catalog.>) 0 THEN
            PERFORM pg_catalog.pg_sleep(0.1);
            CONTINUE;
        END IF;
        EXIT WHEN did.state OPERATOR(pg_catalog.=) 'finished';
        IF did.state OPERATOR(pg_catalog.=) 'waiting' THEN
            PERFORM pg_catalog.pg_sleep(0.1);
        END IF;
        IF pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) told OPERATOR(pg_catalog.>) '10 s'::pg_catalog.interval THEN
            told := pg_catalog.clock_timestamp();
            RAISE NOTICE '% of % steps taken back', in_all OPERATOR(pg_catalog.-) dedup.steps_left(id), in_all;
        END IF;
    END LOOP;
    SELECT * INTO did FROM dedup.finish_rollback(id);
    COMMIT;
    PERFORM dedup.let_go_of_run(run);
    RAISE NOTICE 'run % is %: % rows deleted, % restored, % kept for other runs, % left alone', run, did.status, did.deleted_count, did.restored_count,
        did.kept_count, did.left_alone_count;
END $$;
COMMENT ON PROCEDURE dedup.rollback_run_in_chunks(uuid, bool) IS 'takes back all that a run did, one transaction a step; called again it goes on where it was cut off';
