-- Leases: who works on which chunk. Each of these commits on its own.

CREATE FUNCTION dedup.heartbeat(worker uuid, run uuid, info jsonb DEFAULT '{}') RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO dedup.workers AS w (worker_id, run_id, heartbeat_at, info) VALUES (worker, run, clock_timestamp(), coalesce(info, '{}'))
    ON CONFLICT (worker_id) DO UPDATE SET heartbeat_at = clock_timestamp(), info = excluded.info, run_id = excluded.run_id;
    RETURN (SELECT r.status FROM dedup.runs AS r WHERE r.run_id = run);
END $$;
COMMENT ON FUNCTION dedup.heartbeat(uuid, uuid, jsonb) IS 'a worker''s sign of life; returns the run''s status';

-- A worker that is stopped, not dead, keeps its row locks and claims; only ending its backend frees them.
CREATE FUNCTION dedup.end_stale_leases(run uuid) RETURNS int
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    options jsonb := (dedup.run_row(run)).options;
    lease_time interval := make_interval(secs => coalesce(options ->> 'lease_seconds', '60')::float8);
    limit_attempts int := coalesce((options ->> 'max_attempts')::int, 5);
    stale record;
    ended int := 0;
BEGIN
    FOR stale IN
        SELECT c.chunk_id, c.backend_pid, c.backend_start, c.worker_id, c.lease, c.attempts FROM dedup.checkpoints AS c LEFT JOIN dedup.workers AS w USING (worker_id)
        WHERE c.run_id = run AND c.status = 'syncing' AND c.written_at IS NULL
            AND clock_timestamp() > greatest(c.leased_at, w.heartbeat_at) + lease_time
    LOOP
        PERFORM pg_terminate_backend(a.pid, 5000) FROM pg_stat_activity AS a
        WHERE a.pid = stale.backend_pid AND a.backend_start = stale.backend_start AND a.pid <> pg_backend_pid();
        -- The row is free now, unless the worker finished or somebody else took the chunk over meanwhile. A backend that is not gone yet keeps
        -- it: whoever leases next looks again, nobody waits here.
        PERFORM 1 FROM dedup.checkpoints AS c
        WHERE c.run_id = run AND c.chunk_id = stale.chunk_id AND c.status = 'syncing' AND c.lease = stale.lease AND c.written_at IS NULL
        FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        -- A chunk whose workers die, every time, may be what kills them.
        UPDATE dedup.checkpoints AS c
        SET status = CASE WHEN c.attempts < limit_attempts THEN 'pending' ELSE 'failed' END, not_before = NULL, error_sqlstate = '08006',
            error_message = format('the lease ran out %s times: its workers died or were cut off', c.attempts),
            error_hint = 'look at the workers'' logs and memory, then resume the run'
        WHERE c.run_id = run AND c.chunk_id = stale.chunk_id;
        ended := ended + 1;
        PERFORM dedup.log_event(run, stale.chunk_id, CASE WHEN stale.attempts < limit_attempts THEN 'lease_expired' ELSE 'chunk_failed' END,
            jsonb_build_object('worker', stale.worker_id, 'backend_pid', stale.backend_pid, 'sqlstate', '08006', 'attempts', stale.attempts));
    END LOOP;
    RETURN ended;
END $$;
COMMENT ON FUNCTION dedup.end_stale_leases(uuid) IS 'takes chunks from workers without a heartbeat, ending their backends first; a chunk out of attempts is failed';

-- Leases without a sign of life, for whoever has nothing to do until they run out: how many, how long they have been silent, and how long is left.
CREATE FUNCTION dedup.silent_leases(run uuid, OUT chunks bigint, OUT silent_seconds float8, OUT seconds_left float8) RETURNS record
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT count(*), extract(epoch FROM max(s.silence))::float8, greatest(0, s.lease_seconds - extract(epoch FROM max(s.silence)))::float8
    FROM (SELECT clock_timestamp() - greatest(c.leased_at, w.heartbeat_at) AS silence, coalesce((r.options ->> 'lease_seconds')::float8, 60) AS lease_seconds
          FROM dedup.checkpoints AS c JOIN dedup.runs AS r USING (run_id) LEFT JOIN dedup.workers AS w USING (worker_id)
          WHERE c.run_id = run AND c.status = 'syncing' AND c.written_at IS NULL) AS s
    WHERE s.silence > least(interval '10 s', make_interval(secs => s.lease_seconds / 2)) GROUP BY s.lease_seconds
$$;
COMMENT ON FUNCTION dedup.silent_leases(uuid) IS 'chunks held by workers without a recent heartbeat, and the seconds until the first is free; null: none';

CREATE FUNCTION dedup.rollbacks_in_the_way(run uuid) RETURNS SETOF uuid
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT DISTINCT o FROM dedup.run_tables AS t CROSS JOIN LATERAL dedup.run_rolling_back(t.target_id) AS o
    WHERE t.run_id = run AND o IS NOT NULL
$$;
COMMENT ON FUNCTION dedup.rollbacks_in_the_way(uuid) IS 'runs that are being rolled back from targets of this run';

-- One session is enough; the others go on with a cold filter, which is slower and as exact.
CREATE FUNCTION dedup.warm_filter_once() RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF pg_try_advisory_xact_lock(dedup.lock_class(), -2147483648) THEN
        RETURN dedup.warm_filter();
    END IF;
    RETURN 0;
EXCEPTION WHEN object_not_in_prerequisite_state OR object_in_use THEN
    RAISE WARNING 'the filter stays cold, which is slower: %', SQLERRM;
    RETURN 0;
END $$;
COMMENT ON FUNCTION dedup.warm_filter_once() IS 'warms a cold filter unless another session is at it; returns the entries read';

CREATE FUNCTION dedup.lease_chunk(run uuid, worker uuid, OUT chunk_id text, OUT chunk_no int, OUT table_id int, OUT range_kind text,
    OUT range_lower text[], OUT range_upper text[], OUT lease uuid, OUT attempt int, OUT snapshot text) RETURNS SETOF record
LANGUAGE plpgsql ROWS 1 SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.run_row(run);
    most int;
    ready int[];
    picked dedup.checkpoints;
BEGIN
    IF r.status = 'created' THEN
        PERFORM dedup.set_run_status(run, '{created,running}', 'running', 'run_started');
    ELSIF r.status NOT IN ('running', 'halted') THEN
        RETURN;
    END IF;
    PERFORM dedup.end_stale_leases(run);
    most := (dedup.throttle_holds(run)).active_chunks;
    IF most IS NOT NULL THEN
        -- One after the other: of several that come at once each would count too few.
        PERFORM pg_advisory_xact_lock(hashtextextended('dedup.lease_chunk ' || run, 0));
    END IF;
    -- Of a worker that is silent nobody knows whether it works: its chunk keeps nobody waiting.
    IF most IS NOT NULL AND most <= (SELECT count(*) FROM dedup.checkpoints AS c LEFT JOIN dedup.workers AS w USING (worker_id)
            WHERE c.run_id = run AND c.status = 'syncing' AND c.written_at IS NULL AND greatest(c.leased_at, w.heartbeat_at) > clock_timestamp() - interval '20 s') THEN
        RETURN;
    END IF;
    -- Of sources that the worker reads: tables whose parents are written (a repair also deletes, children first) and that nobody takes rows out of, once a lease and not once a chunk; a scalar look-up a parent, so that an index answers it.
    ready := ARRAY(SELECT t.table_id FROM dedup.run_tables AS t WHERE t.run_id = run AND NOT coalesce(t.source_spec ? 'local', false) AND dedup.run_rolling_back(t.target_id) IS NULL AND (r.status = 'halted' OR NOT EXISTS (SELECT FROM unnest(t.depends_on) AS p(id)
        WHERE (SELECT true FROM dedup.checkpoints AS parent WHERE parent.run_id = run AND parent.table_id = p.id
               AND parent.status IN ('pending', 'syncing') AND parent.written_at IS NULL LIMIT 1))));
    SELECT c.* INTO picked FROM dedup.checkpoints AS c
    WHERE c.run_id = run AND c.status = 'pending' AND c.table_id = ANY (ready) AND (r.status <> 'halted' OR c.repair IS NOT NULL) AND (c.not_before IS NULL OR c.not_before <= clock_timestamp())
    ORDER BY c.chunk_no FOR UPDATE OF c SKIP LOCKED LIMIT 1;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    UPDATE dedup.checkpoints AS c
    SET status = 'syncing', lease = gen_random_uuid(), worker_id = worker, leased_at = clock_timestamp(), started_at = clock_timestamp(),
        attempts = c.attempts + 1, backend_pid = pg_backend_pid(),
        backend_start = (SELECT a.backend_start FROM pg_stat_get_activity(pg_backend_pid()) AS a),
        error_sqlstate = NULL, error_message = NULL, error_hint = NULL
    WHERE c.run_id = run AND c.chunk_id = picked.chunk_id
    RETURNING c.chunk_id, c.chunk_no, c.table_id, c.range_kind, c.range_lower, c.range_upper, c.lease, c.attempts
    INTO chunk_id, chunk_no, table_id, range_kind, range_lower, range_upper, lease, attempt;
    -- Named with every lease: positions belong to the snapshot that the table was planned, or started over, under.
    snapshot := (SELECT t.source_spec ->> 'snapshot' FROM dedup.run_tables AS t WHERE t.run_id = run AND t.table_id = picked.table_id);
    RETURN NEXT;
END $$;
COMMENT ON FUNCTION dedup.lease_chunk(uuid, uuid) IS 'takes the next chunk for a worker, on the connection that will write it; no row: nothing to take now';

-- A retry waits 0.5 s, 1 s, 2 s … up to 30 s, with jitter, and is given up after max_attempts, unless it is free: a full disk, an interrupt and a
-- foreign key that waits for other chunks are not the chunk's fault and burn no attempt. A statement that takes too long is.
CREATE FUNCTION dedup.fail_chunk(run uuid, chunk_id text, lease uuid, sqlstate text, message text, detail text DEFAULT NULL,
    hint text DEFAULT NULL, retry bool DEFAULT false, free bool DEFAULT false) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    limit_attempts int := coalesce(((dedup.run_row(run)).options ->> 'max_attempts')::int, 5);
    new_status text;
BEGIN
    UPDATE dedup.checkpoints AS c
    SET status = CASE WHEN retry AND (c.attempts < limit_attempts OR free) THEN 'pending' ELSE 'failed' END,
        attempts = c.attempts - CASE WHEN retry AND free THEN 1 ELSE 0 END,
        not_before = clock_timestamp() + make_interval(secs => least(30, 0.5 * 2 ^ (c.attempts - 1)) * (0.5 + random())),
        error_sqlstate = fail_chunk.sqlstate, error_message = left(fail_chunk.message, 2000), error_hint = left(fail_chunk.hint, 2000)
    WHERE c.run_id = run AND c.chunk_id = fail_chunk.chunk_id AND c.lease = fail_chunk.lease AND c.status = 'syncing' AND c.written_at IS NULL
    RETURNING c.status INTO new_status;
    IF new_status IS NULL THEN
        RETURN 'fenced';
    END IF;
    PERFORM dedup.log_event(run, chunk_id, CASE new_status WHEN 'failed' THEN 'chunk_failed' ELSE 'chunk_retried' END,
        jsonb_build_object('sqlstate', sqlstate, 'message', left(message, 2000), 'free', free));
    RETURN new_status;
END $$;
COMMENT ON FUNCTION dedup.fail_chunk(uuid, text, uuid, text, text, text, text, bool, bool) IS 'gives a chunk back: pending when it is worth a retry (free: one that burns no attempt), else failed; fenced: it was no longer ours';

CREATE FUNCTION dedup.requeue(run uuid, what text, chunk text DEFAULT NULL) RETURNS int
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.lock_run(run);
    n int;
BEGIN
    IF what IS NULL OR what NOT IN ('failed', 'quarantined') THEN
        RAISE EXCEPTION 'cannot requeue %', coalesce(quote_literal(what), 'NULL') USING ERRCODE = 'invalid_parameter_value',
            HINT = 'What is ''failed'' or ''quarantined''.';
    END IF;
    PERFORM dedup.must_be_kept(run);
    IF r.status NOT IN ('running', 'paused', 'failed', 'done', 'reconciled') THEN
        RAISE EXCEPTION 'run % is %', run, r.status USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    UPDATE dedup.checkpoints AS c SET status = 'pending', attempts = 0, not_before = NULL, written_at = NULL
    WHERE c.run_id = run AND (chunk IS NULL OR c.chunk_id = chunk)
        AND CASE what WHEN 'failed' THEN c.status = 'failed' ELSE c.status = 'verified' AND c.quarantined_count > 0 END;
    GET DIAGNOSTICS n = ROW_COUNT;
    IF n > 0 AND r.status IN ('failed', 'done', 'reconciled') THEN
        PERFORM dedup.set_run_status(run, '{failed,done,reconciled}', 'running', 'run_resumed');
    END IF;
    PERFORM dedup.log_event(run, chunk, 'requeued', jsonb_build_object('what', what, 'chunks', n));
    RETURN n;
END $$;
COMMENT ON FUNCTION dedup.requeue(uuid, text, text) IS 'tries failed chunks, or chunks with quarantined records, again; returns how many';
