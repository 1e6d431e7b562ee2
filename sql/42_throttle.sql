-- The throttle: what all workers of a run go by. docs/throttle.md has the signals and the rule.

CREATE FUNCTION dedup.set_rate(run uuid, bytes_per_second bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF bytes_per_second <= 0 THEN
        RAISE EXCEPTION 'a rate of % bytes a second is no rate', bytes_per_second USING ERRCODE = 'invalid_parameter_value',
            HINT = format('NULL goes back to what the run was created with; SELECT dedup.pause_run(%L) stops the run.', run);
    END IF;
    PERFORM dedup.run_row(run);
    INSERT INTO dedup.throttle AS t (run_id, cap, changed_at) VALUES (run, bytes_per_second, clock_timestamp())
    ON CONFLICT (run_id) DO UPDATE SET cap = excluded.cap, changed_at = excluded.changed_at;
    PERFORM dedup.log_event(run, NULL, 'rate_set', jsonb_build_object('bytes_per_second', bytes_per_second));
END $$;
COMMENT ON FUNCTION dedup.set_rate(uuid, bigint) IS 'caps the bytes a second that all workers of a run read together, whatever the run was created with; NULL goes back to that';

-- What signals have decided counts as long as somebody goes on deciding.
CREATE FUNCTION dedup.throttle_holds(run uuid) RETURNS dedup.throttle
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT t FROM dedup.throttle AS t JOIN dedup.runs AS r USING (run_id)
    WHERE t.run_id = run AND t.decided_at > clock_timestamp() - interval '1 minute' AND NOT coalesce((r.options #>> '{settings,throttle,off}')::bool, false)
$$;
COMMENT ON FUNCTION dedup.throttle_holds(uuid) IS 'the limits by signals that a run goes by; null: none, or nobody decides any more';

-- Bytes a second that a run may read in all; null: no limit.
CREATE FUNCTION dedup.allowed_rate(run uuid) RETURNS float8
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT least(coalesce((SELECT t.cap FROM dedup.throttle AS t WHERE t.run_id = run), (r.options #>> '{settings,throttle,max_rate}')::bigint), (dedup.throttle_holds(run)).byte_rate)::float8
    FROM dedup.runs AS r WHERE r.run_id = run
$$;
COMMENT ON FUNCTION dedup.allowed_rate(uuid) IS 'bytes a second that all workers of a run may read together; null: no limit';

-- Claims and verification of a chunk would keep a backend busy for a second at a stretch: at a low rate they are drawn out. One backend that does
-- nothing else gets through some 20 MB of narrow records a second, and as much time goes by while the chunk's rows are sent.
CREATE FUNCTION dedup.work_share(run uuid) RETURNS float8
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN rate IS NULL THEN 1 ELSE least(1, greatest(0.02, 2 * rate / 20e6 / greatest(1, least((dedup.throttle_holds(run)).active_chunks,
        (SELECT sum(p.lanes) FROM dedup.processes AS p WHERE p.run_id = run AND p.reported_at > clock_timestamp() - interval '5 s'))))) END
    FROM dedup.allowed_rate(run) AS rate
$$;
COMMENT ON FUNCTION dedup.work_share(uuid) IS 'the share of its time, 0.02 to 1, that a backend is at work in a long step of a run''s chunk; it rests for the remainder';

CREATE FUNCTION dedup.work_share_of_target(target int) RETURNS float8
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(min(dedup.work_share(r.run_id)), 1) FROM dedup.runs AS r
    WHERE r.status = 'running' AND EXISTS (SELECT FROM dedup.run_tables AS t WHERE t.run_id = r.run_id AND t.target_id = target)
$$;
COMMENT ON FUNCTION dedup.work_share_of_target(int) IS 'the least dedup.work_share of the runs that write into a target';

-- A session that migrates a chunk itself does so in one transaction: all that others see of it is this lock.
CREATE FUNCTION dedup.local_lock(run uuid, OUT class int, OUT key int) RETURNS record
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$ SELECT dedup.lock_class() + 1, hashtext(run::text) $$;
COMMENT ON FUNCTION dedup.local_lock(uuid) IS 'the advisory lock that a session holds while it migrates a chunk of the run itself';

CREATE FUNCTION dedup.local_chunks(run uuid, OUT sessions bigint, OUT since timestamptz) RETURNS record
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT count(*), min(a.xact_start) FROM dedup.local_lock(run) AS k JOIN pg_locks AS l
        ON l.locktype = 'advisory' AND l.classid = k.class::bigint::oid AND l.objid = (k.key::bigint & 4294967295)::oid AND l.objsubid = 2 AND l.granted
    LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
    WHERE l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
$$;
COMMENT ON FUNCTION dedup.local_chunks(uuid) IS 'sessions that migrate a chunk of a run themselves now, and since when';

-- Seconds to rest after a chunk that began then, so that the sessions and processes of a run keep to its rate together; ten minutes at most.
CREATE FUNCTION dedup.pause_after(run uuid, chunk text, began timestamptz) RETURNS float8
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(least(600, greatest(0, c.source_bytes * greatest(1, p.busy) / dedup.allowed_rate(run) - extract(epoch FROM clock_timestamp() - began)::float8)), 0)
    FROM dedup.checkpoints AS c
    -- A session that is in a chunk of its own reports when that is done.
    CROSS JOIN (SELECT sum(x.busy) AS busy FROM dedup.processes AS x WHERE x.run_id = run AND x.reported_at > clock_timestamp() - interval '1 min') AS p
    WHERE c.run_id = run AND c.chunk_id = chunk
$$;
COMMENT ON FUNCTION dedup.pause_after(uuid, text, timestamptz) IS 'seconds to rest after a chunk, so that the run keeps to its rate';

CREATE FUNCTION dedup.five_seconds(at timestamptz) RETURNS timestamptz
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$ SELECT date_bin('5 s', at, '2000-01-01Z') $$;
COMMENT ON FUNCTION dedup.five_seconds(timestamptz) IS 'beginning of the five seconds that a time is in, as dedup.throughput counts them';

-- Bytes of the source a second that a run read over the last so many seconds, or since it is running.
CREATE FUNCTION dedup.read_rate(run uuid, seconds float8) RETURNS float8
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT ((SELECT coalesce(sum(p.bytes), 0) FROM dedup.throughput AS p WHERE p.run_id = run AND p.at >= w.since)
            -- What the target database reads itself counts chunk by chunk, when it is written.
            + (SELECT coalesce(sum(c.source_bytes), 0) FROM dedup.checkpoints AS c JOIN dedup.run_tables AS t USING (run_id, table_id)
               WHERE c.run_id = run AND c.written_at >= w.since AND t.source_spec ? 'local'))::float8
        / greatest(1, extract(epoch FROM clock_timestamp() - w.since))::float8
    FROM (SELECT greatest(dedup.five_seconds(clock_timestamp() - make_interval(secs => seconds) + interval '5 s'), dedup.five_seconds(r.running_since)) AS since
          FROM dedup.runs AS r WHERE r.run_id = run) AS w
$$;
COMMENT ON FUNCTION dedup.read_rate(uuid, float8) IS 'bytes a second that a run read over the last so many seconds, or since it is running';

-- A process reports how much it has read and learns how fast it may read on. `turn`: it is to decide about the limits, from this.
CREATE FUNCTION dedup.throttle_report(run uuid, process uuid, lanes int, busy int, read_bytes bigint,
    OUT run_status text, OUT allowed float8, OUT by_signals bool, OUT reason text, OUT turn jsonb) RETURNS record
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.run_row(run);
    t dedup.throttle;
    all_lanes bigint;
    others_busy bigint;
    throughput float8;
    before dedup.processes;
    read_now bigint;
    least_rate float8 := coalesce((r.options #>> '{settings,throttle,min_rate}')::float8, 1e6);
BEGIN
    SELECT * INTO before FROM dedup.processes AS p WHERE p.process_id = process;
    -- Of a process that is new here nobody knows when it read what.
    read_now := greatest(0, throttle_report.read_bytes - coalesce(before.read_bytes, throttle_report.read_bytes));
    INSERT INTO dedup.processes AS p (process_id, run_id, reported_at, lanes, busy, read_bytes, bytes_per_second) VALUES (process, run, clock_timestamp(), throttle_report.lanes, throttle_report.busy, throttle_report.read_bytes, 0)
    ON CONFLICT (process_id) DO UPDATE SET reported_at = excluded.reported_at, lanes = excluded.lanes, busy = excluded.busy, run_id = excluded.run_id, read_bytes = excluded.read_bytes,
        bytes_per_second = read_now / greatest(0.001, extract(epoch FROM excluded.reported_at - p.reported_at)::float8);
    IF read_now > 0 THEN
        INSERT INTO dedup.throughput AS s (run_id, at, process_id, bytes) VALUES (run, dedup.five_seconds(clock_timestamp()), process, read_now)
        ON CONFLICT (run_id, at, process_id) DO UPDATE SET bytes = s.bytes + excluded.bytes;
    END IF;
    SELECT sum(p.lanes), coalesce(sum(p.busy) FILTER (WHERE p.process_id <> process), 0), sum(p.bytes_per_second) INTO all_lanes, others_busy, throughput FROM dedup.processes AS p
    WHERE p.run_id = run AND p.reported_at > clock_timestamp() - interval '5 s';
    run_status := r.status;
    allowed := dedup.allowed_rate(run);
    DELETE FROM dedup.processes AS p WHERE p.run_id = run AND p.reported_at < clock_timestamp() - interval '1 minute';
    by_signals := NOT coalesce((r.options #>> '{settings,throttle,off}')::bool, false);
    IF by_signals THEN
        INSERT INTO dedup.throttle (run_id) SELECT run WHERE NOT EXISTS (SELECT FROM dedup.throttle AS o WHERE o.run_id = run) ON CONFLICT DO NOTHING;
        SELECT * INTO t FROM dedup.throttle AS o
        WHERE o.run_id = run AND (o.decided_at IS NULL OR o.decided_at < clock_timestamp() - interval '0.9 s') AND (o.turn_ends IS NULL OR o.turn_ends < clock_timestamp())
            -- The query is the owner's to ask. As long as nobody can, it is a signal that can't be read.
            AND (r.owner = current_user OR r.options #>> '{settings,throttle,query}' IS NULL OR o.decided_at IS NULL OR o.decided_at < clock_timestamp() - interval '5 s') FOR NO KEY UPDATE SKIP LOCKED;
        IF FOUND THEN
            UPDATE dedup.throttle AS o SET turn_ends = clock_timestamp() + interval '10 s', decided_by = process WHERE o.run_id = run;
            turn := jsonb_build_object('byte_rate', t.byte_rate, 'active_chunks', t.active_chunks, 'controller', t.controller, 'throughput', throughput, 'lanes', all_lanes, 'busy', others_busy + throttle_report.busy,
                'options', coalesce(r.options #> '{settings,throttle}', '{}'));
        END IF;
        SELECT * INTO t FROM dedup.throttle AS o WHERE o.run_id = run;
        reason := (SELECT h.reason FROM dedup.throttle_holds(run) AS h WHERE h.state <> 'free');
        IF coalesce(t.decided_at, t.turn_ends - interval '10 s', CASE WHEN before.process_id IS NOT NULL THEN '-infinity' END::timestamptz) < clock_timestamp() - interval '15 s' THEN
            allowed := least(allowed, least_rate);
            reason := coalesce(format('nobody has decided for %s s how fast it may go', extract(epoch FROM clock_timestamp() - t.decided_at)::bigint), 'nobody can decide how fast it may go');
        END IF;
    END IF;
    -- Whoever has chunks in hand shares it.
    allowed := allowed * greatest(throttle_report.busy, 1) / (others_busy + greatest(throttle_report.busy, 1));
END $$;
COMMENT ON FUNCTION dedup.throttle_report(uuid, uuid, int, int, bigint) IS 'a process says how much it has read and learns the run''s status and its share of the rate; turn: what it is to decide from, about once a second for one of them';

CREATE FUNCTION dedup.throttle_decide(run uuid, process uuid, byte_rate bigint, active_chunks int, state text, reason text, signals jsonb, controller jsonb) RETURNS bool
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old dedup.throttle;
BEGIN
    SELECT * INTO old FROM dedup.throttle AS t WHERE t.run_id = run AND t.decided_by = process FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE dedup.throttle AS t
    SET decided_at = clock_timestamp(), turn_ends = NULL, byte_rate = throttle_decide.byte_rate, active_chunks = throttle_decide.active_chunks, state = throttle_decide.state,
        -- While it recovers: of that which slowed it.
        reason = coalesce(throttle_decide.reason, CASE WHEN throttle_decide.state <> 'free' THEN old.reason END),
        signals = throttle_decide.signals, controller = throttle_decide.controller,
        changed_at = CASE WHEN (old.byte_rate, old.active_chunks) IS DISTINCT FROM (throttle_decide.byte_rate, throttle_decide.active_chunks) THEN clock_timestamp() ELSE old.changed_at END
    WHERE t.run_id = run;
    IF old.state = 'free' AND throttle_decide.state <> 'free' OR old.state <> 'free' AND throttle_decide.state = 'free' THEN
        PERFORM dedup.log_event(run, NULL, CASE throttle_decide.state WHEN 'free' THEN 'throttle_ended' ELSE 'throttle_began' END,
            jsonb_build_object('reason', throttle_decide.reason, 'byte_rate', throttle_decide.byte_rate));
    END IF;
    RETURN true;
END $$;
COMMENT ON FUNCTION dedup.throttle_decide(uuid, uuid, bigint, int, text, text, jsonb, jsonb) IS 'sets the limits of a run, by the process whose turn it is; false: it is somebody else''s by now';

-- What a process of the sidecar does once a second, a session in CALL dedup.migrate_run does between its chunks: it looks at the target, decides if it
-- is its turn, and learns by that how fast it may go on.
CREATE PROCEDURE dedup.look_around(run uuid, process uuid, bytes_per_second float8) LANGUAGE plpgsql AS $$
DECLARE
    began timestamptz;
    unprobed text;
BEGIN
    -- Commits that wait for the disk and write next to nothing, where signals count.
    FOR probe IN 1..CASE WHEN COALESCE(((dedup.run_row(run)).options OPERATOR(pg_catalog.#>>) '{settings,throttle,off}')::pg_catalog.bool, false) THEN 0 ELSE 10 END LOOP
        BEGIN
            PERFORM pg_catalog.set_config('synchronous_commit', 'on', true), pg_catalog.pg_logical_emit_message(true, 'pg_dedup_migrate', '');
        EXCEPTION WHEN OTHERS THEN
            unprobed := SQLERRM;
        END;
        EXIT WHEN unprobed IS NOT NULL;
        began := pg_catalog.clock_timestamp();
        COMMIT;
        PERFORM dedup.commit_took(EXTRACT(epoch FROM pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) began)::pg_catalog.float8 OPERATOR(pg_catalog.*) 1000::pg_catalog.float8);
    END LOOP;
    PERFORM dedup.decide_here(run, process, bytes_per_second, unprobed);
    COMMIT;
END $$;
COMMENT ON PROCEDURE dedup.look_around(uuid, uuid, float8) IS 'between chunks that a session migrates itself: probes the target, and sets the limits of the run if it is this session''s turn';

-- What the target says of itself. A signal that cannot be read says so: {"unknown": why}.
CREATE FUNCTION dedup.target_signals(run uuid) RETURNS jsonb
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    signals jsonb := '{}';
    name text;
    value jsonb;
BEGIN
    FOREACH name IN ARRAY '{target_sessions,target_connections,replication_lag,wal_position,wal_room,wal_kept,disk_room,query}'::text[] LOOP
        BEGIN
            value := CASE name
                WHEN 'target_sessions' THEN dedup.other_sessions()
                WHEN 'target_connections' THEN (SELECT to_jsonb(count(*)::float8 / current_setting('max_connections')::float8) FROM pg_stat_activity WHERE backend_type = 'client backend' OR backend_type IS NULL AND usesysid IS NOT NULL)
                WHEN 'replication_lag' THEN dedup.replication_lag()
                WHEN 'wal_position' THEN to_jsonb(pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0'))
                WHEN 'wal_room' THEN to_jsonb(pg_size_bytes(current_setting('max_wal_size')))
                WHEN 'wal_kept' THEN dedup.wal_kept()
                WHEN 'disk_room' THEN (SELECT jsonb_build_object('place', d.place, 'free_bytes', d.free_bytes, 'total_bytes', d.total_bytes)
                                       FROM dedup.disk_space() AS d ORDER BY d.free_bytes - least(d.total_bytes / 20, 10000000000) LIMIT 1)
                WHEN 'query' THEN dedup.throttle_query(run)
            END;
        EXCEPTION WHEN OTHERS THEN
            value := jsonb_build_object('unknown', dedup.without_values(SQLSTATE, SQLERRM));
        END;
        signals := signals || jsonb_build_object(name, value);
    END LOOP;
    RETURN signals;
END $$;
COMMENT ON FUNCTION dedup.target_signals(uuid) IS 'the signals of the target that a run''s throttle goes by';

-- Sessions at work that are none of this tool's: those to be spared. Whose state may not be seen are counted as unknown.
CREATE FUNCTION dedup.other_sessions() RETURNS jsonb
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN bool_or(a.state IS NULL) THEN '{"unknown": "the state of sessions may not be seen; GRANT pg_read_all_stats"}'
                ELSE to_jsonb(count(*) FILTER (WHERE a.state <> 'idle' OR a.state_change > clock_timestamp() - interval '2 s')) END
    -- Of sessions that may not be seen the kind is hidden, too.
    FROM pg_stat_activity AS a WHERE (a.backend_type = 'client backend' OR a.backend_type IS NULL AND a.usesysid IS NOT NULL) AND a.application_name NOT LIKE 'pg-dedup-migrate/%' AND a.pid <> pg_backend_pid()
$$;
COMMENT ON FUNCTION dedup.other_sessions() IS 'client sessions that were active within two seconds and are none of this tool''s';

-- What receives WAL and replays none (pg_receivewal) is no standby. One that is frozen tells no lag: how far it is behind is seen by the bytes.
CREATE FUNCTION dedup.replication_lag() RETURNS jsonb
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN count(*) = 0 THEN NULL
                WHEN bool_or(s.state IS NULL) THEN '{"unknown": "standbys may not be seen; GRANT pg_monitor"}'
                WHEN bool_or(s.state = 'catchup') THEN '{"bad": "a standby is catching up"}'
                WHEN max(s.behind) > max(s.much) THEN jsonb_build_object('bad', format('a standby is %s behind', pg_size_pretty(max(s.behind))))
                ELSE to_jsonb(coalesce(max(extract(epoch FROM s.replay_lag)), 0)::float8) END
    FROM (SELECT r.state, r.replay_lag, pg_wal_lsn_diff(pg_current_wal_insert_lsn(), r.replay_lsn) AS behind, pg_size_bytes(current_setting('max_wal_size')) / 8 AS much
          FROM pg_stat_replication AS r WHERE r.state IS NULL OR r.state IN ('streaming', 'catchup') AND r.replay_lsn IS NOT NULL) AS s
$$;
COMMENT ON FUNCTION dedup.replication_lag() IS 'seconds that the slowest standby replays behind; null: there is none';

-- What a standby that is away, or an archiver that fails, keeps of the WAL fills the disk however slowly it is written.
CREATE FUNCTION dedup.wal_kept() RETURNS jsonb
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    WITH here AS (SELECT pg_current_wal_insert_lsn() AS lsn, pg_size_bytes(current_setting('wal_segment_size')) AS segment),
    archived AS (
        -- Name of a segment: timeline, then two numbers whose digits are the segment's.
        SELECT (('x' || substr(a.last_archived_wal, 9, 8))::bit(32)::bigint * (4294967296 / h.segment) + ('x' || substr(a.last_archived_wal, 17, 8))::bit(32)::bigint) * h.segment AS position
        FROM pg_stat_archiver AS a CROSS JOIN here AS h WHERE current_setting('archive_mode') <> 'off' AND a.last_archived_wal ~ '^[0-9A-F]{24}'
    ), kept AS (
        SELECT greatest(0, (SELECT max(pg_wal_lsn_diff(h.lsn, s.restart_lsn)) FROM pg_replication_slots AS s), (SELECT pg_wal_lsn_diff(h.lsn, '0/0') - a.position FROM archived AS a))::float8 AS bytes FROM here AS h
    )
    SELECT CASE WHEN current_setting('archive_mode') <> 'off' AND (SELECT a.failed_count > 0 AND a.last_archived_wal IS NULL FROM pg_stat_archiver AS a)
        THEN '{"unknown": "the archiver fails, and nobody knows what it archived last"}'
        ELSE to_jsonb(round((k.bytes / greatest(1, k.bytes + (SELECT min(d.free_bytes) FROM dedup.disk_space() AS d WHERE d.place = 'pg_wal')))::numeric, 6)) END FROM kept AS k
$$;
COMMENT ON FUNCTION dedup.wal_kept() IS 'WAL that replication slots or the archiver keep, as a part of itself and the room that is left on its disk';

-- SQL stored with a run is executed as its owner only.
CREATE FUNCTION dedup.throttle_query(run uuid) RETURNS jsonb
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    query text := (dedup.run_row(run)).options #>> '{settings,throttle,query}';
    value float8;
BEGIN
    IF query IS NULL THEN
        RETURN NULL;
    END IF;
    PERFORM dedup.must_own(run);
    EXECUTE format(E'SELECT (%s\n)::float8', query) INTO value;
    IF value IS NULL THEN
        RETURN '{"unknown": "the query gave no number"}';
    END IF;
    RETURN to_jsonb(value);
END $$;
COMMENT ON FUNCTION dedup.throttle_query(uuid) IS 'the value of the query that a run''s throttle asks, too: above 0 means back off';
