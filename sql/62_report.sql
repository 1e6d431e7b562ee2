-- A run as one document: what the workers' metrics and page show, and what a report is made of.

-- Bytes read over time, in at most so many steps of at least five seconds: [[seconds since 1970, bytes a second], …].
CREATE FUNCTION dedup.throughput_over_time(run uuid, steps int DEFAULT 240) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH piece AS (
        SELECT p.at, p.bytes FROM dedup.throughput AS p WHERE p.run_id = run
        UNION ALL
        SELECT dedup.five_seconds(c.written_at), c.source_bytes FROM dedup.checkpoints AS c JOIN dedup.run_tables AS t USING (run_id, table_id)
        WHERE c.run_id = run AND c.written_at IS NOT NULL AND t.source_spec ? 'local'
    ), extent AS (
        SELECT min(at) AS first, max(at) AS last, greatest(1, ceil(extract(epoch FROM max(at) - min(at) + interval '5 s') / 5 / steps))::int * 5 AS seconds FROM piece
    ), step AS (
        -- Steps without a piece count, too: nothing was read then.
        SELECT s AS at, e.seconds FROM extent AS e CROSS JOIN LATERAL generate_series(e.first, e.last, make_interval(secs => e.seconds)) AS s
    )
    SELECT coalesce(jsonb_agg(jsonb_build_array(extract(epoch FROM s.at)::bigint, round(coalesce(b.bytes, 0) / s.seconds)) ORDER BY s.at), '[]')
    FROM step AS s LEFT JOIN (SELECT date_bin(make_interval(secs => e.seconds), p.at, e.first) AS at, sum(p.bytes) AS bytes FROM piece AS p CROSS JOIN extent AS e GROUP BY 1) AS b USING (at)
$$;
COMMENT ON FUNCTION dedup.throughput_over_time(uuid, int) IS 'bytes a second that a run read over time: [[seconds since 1970, bytes a second], …]';

-- One letter a chunk in the order of the plan: v verified, w written, s syncing, p pending, f failed. Of a long plan a letter stands for several chunks: the one to look at.
CREATE FUNCTION dedup.chunk_map(run uuid, letters int DEFAULT 2000) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(string_agg(substr('vwpsf', cell.worst, 1), '' ORDER BY cell.n), '')
    FROM (SELECT (c.chunk_no - 1) / w.width AS n, max(CASE WHEN c.status = 'verified' THEN 1 WHEN c.status = 'syncing' AND c.written_at IS NOT NULL THEN 2
                     WHEN c.status = 'pending' THEN 3 WHEN c.status = 'syncing' THEN 4 ELSE 5 END) AS worst
          FROM dedup.checkpoints AS c CROSS JOIN (SELECT greatest(1, ceil(max(x.chunk_no)::float8 / letters))::int AS width FROM dedup.checkpoints AS x WHERE x.run_id = run) AS w
          WHERE c.run_id = run GROUP BY 1) AS cell
$$;
COMMENT ON FUNCTION dedup.chunk_map(uuid, int) IS 'the chunks of a run by state, in the order of the plan: v verified, w written, s syncing, p pending, f failed';

-- Tables are worked on in the order of the plan: what is left of those before comes first.
CREATE FUNCTION dedup.tables_of(run uuid) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(jsonb_agg(to_jsonb(u) - 'rate' - 'bytes_left' || jsonb_build_object('eta_seconds', CASE WHEN u.bytes_left = 0 THEN 0 ELSE round((u.bytes_to_here / u.rate)::numeric) END) ORDER BY u.table_id), '[]')
    FROM (
        SELECT k.*, sum(k.bytes_left) OVER (ORDER BY k.table_id) AS bytes_to_here, (SELECT nullif(dedup.read_rate(run, 600), 0) FROM dedup.runs AS r WHERE r.run_id = run AND r.status = 'running') AS rate
        FROM (
            SELECT t.table_id, t.source, g.target::text AS target, t.content_rule, t.keyless, count(c.chunk_id) AS chunks,
                count(*) FILTER (WHERE c.status = 'verified') AS verified, count(*) FILTER (WHERE c.status = 'syncing') AS syncing,
                count(*) FILTER (WHERE c.status = 'failed') AS failed, count(*) FILTER (WHERE c.status = 'pending') AS pending,
                round((100 * coalesce(sum(coalesce(c.estimated_bytes, 1)) FILTER (WHERE c.written_at IS NOT NULL), 0) / nullif(sum(coalesce(c.estimated_bytes, 1)), 0))::numeric, 1) AS percent,
                coalesce(sum(c.source_count), 0) AS source_count, coalesce(sum(c.inserted_count), 0) AS inserted_count, coalesce(sum(c.updated_count), 0) AS updated_count,
                coalesce(sum(c.unchanged_count), 0) AS unchanged_count, coalesce(sum(c.duplicate_count), 0) AS duplicate_count,
                coalesce(sum(c.quarantined_count), 0) AS quarantined_count, coalesce(sum(c.source_bytes), 0) AS source_bytes,
                coalesce(sum(coalesce(c.estimated_bytes, 1)) FILTER (WHERE c.written_at IS NULL), 0)::float8
                    * coalesce((sum(c.source_bytes) FILTER (WHERE c.written_at IS NOT NULL) / nullif(sum(coalesce(c.estimated_bytes, 1)) FILTER (WHERE c.written_at IS NOT NULL), 0))::float8, 1) AS bytes_left
            FROM dedup.run_tables AS t JOIN dedup.targets AS g USING (target_id) LEFT JOIN dedup.checkpoints AS c USING (run_id, table_id)
            WHERE t.run_id = run GROUP BY t.table_id, t.source, g.target, t.content_rule, t.keyless
        ) AS k
    ) AS u
$$;
COMMENT ON FUNCTION dedup.tables_of(uuid) IS 'the tables of a run with their books and the time until each is done';

CREATE FUNCTION dedup.overview(run uuid) RETURNS jsonb
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT jsonb_build_object(
        'at', clock_timestamp(),
        'run', to_jsonb(r) - 'options' - 'is_held',
        'progress', to_jsonb(p) - 'eta', 'slis', to_jsonb(s) - '{eta,deadline}'::text[],
        'eta_seconds', round(extract(epoch FROM s.eta)), 'deadline', s.deadline, 'seconds_to_deadline', round(extract(epoch FROM s.deadline - clock_timestamp())),
        'tables', dedup.tables_of(run),
        'throughput', dedup.throughput_over_time(run),
        'throttle', coalesce((SELECT to_jsonb(t) - 'controller' FROM dedup.throttle AS t WHERE t.run_id = run), '{"state": "free", "signals": {}}')
            || jsonb_build_object('allowed', dedup.allowed_rate(run)) || CASE WHEN (r.options #>> '{settings,throttle,off}')::bool THEN '{"state": "off"}' ELSE '{}' END::jsonb,
        'processes', (SELECT count(*) FROM dedup.processes AS o WHERE o.run_id = run AND o.reported_at > clock_timestamp() - interval '10 s'),
        'alerts', (SELECT coalesce(jsonb_agg(to_jsonb(a) ORDER BY a.severity, a.since), '[]') FROM dedup.alerts AS a WHERE a.run_id = run),
        'chunk_map', dedup.chunk_map(run),
        'retries', (SELECT count(*) FROM dedup.events AS e WHERE e.run_id = run AND e.kind IN ('chunk_retried', 'lease_expired')),
        'filter', (SELECT to_jsonb(f) FROM dedup.filter_stats() AS f),
        'quarantine', (SELECT coalesce(jsonb_agg(to_jsonb(q) ORDER BY q.records DESC, q.sqlstate, q.reason), '[]')
                       FROM (SELECT x.sqlstate, x.reason, count(*) AS records FROM dedup.quarantine AS x WHERE x.run_id = run GROUP BY 1, 2) AS q))
    FROM dedup.run_row(run) AS r JOIN dedup.progress AS p ON p.run_id = r.run_id JOIN dedup.slis AS s ON s.run_id = r.run_id
$$;
COMMENT ON FUNCTION dedup.overview(uuid) IS 'a run as it is now, as one document: progress, books, speed, throttle, alerts, chunks';

CREATE FUNCTION dedup.report(run uuid) RETURNS jsonb
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT dedup.overview(run) || jsonb_build_object(
        'options', r.options,
        'versions', jsonb_build_object('extension', dedup.version(), 'hash', dedup.content_hash_version(), 'server', current_setting('server_version')),
        'database', current_database(),
        'reconciliations', (SELECT coalesce(jsonb_agg(jsonb_build_object('reconciliation_id', c.reconciliation_id, 'verdict', c.verdict, 'is_strict', c.is_strict, 'sample', c.sample,
                                   'started_at', c.started_at, 'finished_at', c.finished_at, 'released_by', c.released_by, 'chunks', k.chunks, 'source_count', k.source_count, 'present_count', k.present_count,
                                   'duplicate_count', k.duplicate_count, 'quarantined_count', k.quarantined_count, 'missing_count', k.missing_count, 'changed_count', k.changed_count,
                                   'extra_count', k.extra_count, 'surviving_duplicate_count', k.surviving_duplicate_count, 'foreign_count', k.foreign_count, 'source_changed_count', k.source_changed_count)
                                   ORDER BY c.reconciliation_id), '[]')
            FROM dedup.reconciliations AS c CROSS JOIN LATERAL (
                SELECT count(*) AS chunks, sum(x.source_count) AS source_count, sum(x.present_count) AS present_count, sum(x.duplicate_count) AS duplicate_count, sum(x.quarantined_count) AS quarantined_count,
                    sum(x.missing_count) AS missing_count, sum(x.changed_count) AS changed_count, sum(x.extra_count) AS extra_count, sum(x.surviving_duplicate_count) AS surviving_duplicate_count,
                    sum(x.foreign_count) AS foreign_count, sum(x.source_changed_count) AS source_changed_count
                FROM dedup.reconciled_chunks AS x WHERE x.reconciliation_id = c.reconciliation_id) AS k
            WHERE c.run_id = run),
        -- At most a thousand chunks, evenly out of all: [seconds since 1970, seconds that it took].
        'chunk_seconds', (SELECT coalesce(jsonb_agg(jsonb_build_array(round(extract(epoch FROM c.written_at)), round(extract(epoch FROM c.written_at - c.started_at)::numeric, 3)) ORDER BY c.written_at), '[]')
            FROM (SELECT k.written_at, k.started_at, row_number() OVER (ORDER BY k.written_at) AS n, count(*) OVER () AS many FROM dedup.checkpoints AS k WHERE k.run_id = run AND k.written_at IS NOT NULL) AS c
            WHERE c.n % greatest(1, c.many / 1000) = 0),
        'phase_seconds', (SELECT coalesce(jsonb_object_agg(f.phase, f.seconds), '{}')
            FROM (SELECT replace(u.key, '_seconds', '') AS phase, round(sum(u.value::float8)::numeric, 3) AS seconds FROM dedup.checkpoints AS k CROSS JOIN LATERAL jsonb_each_text(k.timings) AS u
                  WHERE k.run_id = run AND u.key LIKE '%\_seconds' GROUP BY 1) AS f),
        'failed_chunks', (SELECT coalesce(jsonb_agg(jsonb_build_object('chunk_id', k.chunk_id, 'attempts', k.attempts, 'sqlstate', k.error_sqlstate, 'message', k.error_message, 'hint', k.error_hint) ORDER BY k.chunk_no), '[]')
            FROM dedup.checkpoints AS k WHERE k.run_id = run AND k.status = 'failed'),
        'alert_log', (SELECT coalesce(jsonb_agg(to_jsonb(a) - 'run_id' ORDER BY a.alert_id), '[]') FROM dedup.alert_log AS a WHERE a.run_id = run),
        'rollbacks', (SELECT coalesce(jsonb_agg(to_jsonb(b) - 'run_id' ORDER BY b.rollback_id), '[]') FROM dedup.rollbacks AS b WHERE b.run_id = run))
    FROM dedup.run_row(run) AS r
$$;
COMMENT ON FUNCTION dedup.report(uuid) IS 'all there is to report of a run, as one document';
