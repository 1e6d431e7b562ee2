-- How fast a run goes and how well: what dedup.slis shows and the alerts go by. docs/operations.md explains them.

-- Of the attempts that ended in the last ten minutes. Those that waited for others, for room on a disk, or were interrupted, have not failed; nor have those
-- whose connection was lost: a restart or a failover takes it from all that are in flight. They burn an attempt each all the same.
CREATE FUNCTION dedup.chunk_attempts(run uuid, OUT ended bigint, OUT failed bigint) RETURNS record
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT f.failed + (SELECT count(*) FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.written_at > w.since), f.failed
    FROM (SELECT greatest(clock_timestamp() - interval '10 min', r.running_since) AS since FROM dedup.runs AS r WHERE r.run_id = run) AS w
    CROSS JOIN LATERAL (SELECT count(*) AS failed FROM dedup.events AS e
                        WHERE e.run_id = run AND e.at > w.since AND e.kind IN ('chunk_failed', 'chunk_retried', 'lease_expired')
                            AND NOT coalesce((e.detail ->> 'free')::bool, false)
                            AND (e.kind <> 'chunk_retried' OR e.detail ->> 'sqlstate' !~ '^(08|57P0[123]$)')) AS f
$$;
COMMENT ON FUNCTION dedup.chunk_attempts(uuid) IS 'attempts at chunks that ended in the last ten minutes, or since the run is running, and those of them that failed';

-- A later pass that was not as strict may have found none.
CREATE FUNCTION dedup.held_mismatches(run uuid) RETURNS bigint
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT dedup.mismatches_of(max(x.reconciliation_id)) FROM dedup.reconciliations AS x WHERE x.holds = run
$$;
COMMENT ON FUNCTION dedup.held_mismatches(uuid) IS 'mismatches of the last pass that holds a run; null: none does';

CREATE VIEW dedup.slis AS
SELECT p.run_id, p.name, p.status,
    coalesce(round((dedup.read_rate(p.run_id, 60) * 8 / 1e9)::numeric, 6), 0)::float8 AS migration_throughput_gbps,
    (SELECT count(*) FROM dedup.checkpoints AS c WHERE c.run_id = p.run_id AND c.verified_at > clock_timestamp() - interval '1 min') AS chunk_completion_rate,
    round(p.duplicate_count::numeric / nullif(p.source_count, 0), 6)::float8 AS dedup_ratio,
    CASE WHEN p.status IN ('rolling_back', 'rolled_back') THEN 0 ELSE coalesce(dedup.held_mismatches(p.run_id), dedup.open_mismatches(p.run_id)) END AS reconciliation_mismatch_count,
    CASE WHEN p.status = 'running' THEN round(extract(epoch FROM clock_timestamp()
        - greatest(r.running_since, (SELECT max(c.written_at) FROM dedup.checkpoints AS c WHERE c.run_id = p.run_id))), 3)::float8 END AS checkpoint_lag,
    (SELECT CASE WHEN a.ended > 0 THEN a.failed::float8 / a.ended END FROM dedup.chunk_attempts(p.run_id) AS a) AS chunk_failure_rate,
    p.eta,
    r.started_at + make_interval(secs => (r.options #>> '{settings,alerts,deadline_seconds}')::float8) AS deadline
FROM dedup.progress AS p JOIN dedup.runs AS r USING (run_id);
COMMENT ON VIEW dedup.slis IS 'one row a run: how fast it goes and how well';
COMMENT ON COLUMN dedup.slis.run_id IS 'the run';
COMMENT ON COLUMN dedup.slis.name IS 'its name';
COMMENT ON COLUMN dedup.slis.status IS 'its status';
COMMENT ON COLUMN dedup.slis.migration_throughput_gbps IS 'bits of the source read, in 10^9 a second, over the last minute';
COMMENT ON COLUMN dedup.slis.chunk_completion_rate IS 'chunks verified in the last minute';
COMMENT ON COLUMN dedup.slis.dedup_ratio IS 'part of the records that were dropped as duplicates; null: nothing read yet';
COMMENT ON COLUMN dedup.slis.reconciliation_mismatch_count IS 'mismatches that the last reconciliation found and nobody mended';
COMMENT ON COLUMN dedup.slis.checkpoint_lag IS 'seconds since the last chunk was written, or since the run went on; null: it is not running';
COMMENT ON COLUMN dedup.slis.chunk_failure_rate IS 'part of the attempts at chunks that failed, of those that ended in the last ten minutes; null: none ended';
COMMENT ON COLUMN dedup.slis.eta IS 'time left at the speed of the last ten minutes; null: not running, or nothing read yet';
COMMENT ON COLUMN dedup.slis.deadline IS 'when it is to be done; null: it has no deadline';
