-- What a DBA looks at.

CREATE VIEW dedup.duplicates AS
SELECT o.run_id, o.chunk_id, t.target, e.source_key, e.content_hash, e.survivor
FROM dedup.ledger_block AS l
JOIN dedup.ordinals AS o USING (ordinal)
JOIN dedup.targets AS t ON t.target_id = l.target_id
CROSS JOIN LATERAL dedup.ledger_entries(l.target_id, l.entries) AS e;
COMMENT ON VIEW dedup.duplicates IS 'the ledger: every dropped duplicate and where its survivor stands';
COMMENT ON COLUMN dedup.duplicates.run_id IS 'the run that dropped it';
COMMENT ON COLUMN dedup.duplicates.chunk_id IS 'the chunk that dropped it';
COMMENT ON COLUMN dedup.duplicates.target IS 'the target that holds its content';
COMMENT ON COLUMN dedup.duplicates.source_key IS 'its key in the source, column=value';
COMMENT ON COLUMN dedup.duplicates.content_hash IS 'its content hash';
COMMENT ON COLUMN dedup.duplicates.survivor IS 'URI of the row that holds its content now';

CREATE VIEW dedup.progress AS
SELECT r.run_id, r.name, r.status, r.started_at,
    c.chunks, c.verified, c.syncing, c.unverified, c.failed, c.pending,
    round((100.0 * c.done_weight / nullif(c.weight, 0))::numeric, 1) AS percent,
    c.source_count, c.inserted_count, c.updated_count, c.unchanged_count, c.duplicate_count, c.quarantined_count, c.source_bytes,
    round((c.source_bytes / nullif(t.seconds, 0) / 1e6)::numeric, 1) AS mb_per_second,
    round((c.source_count / nullif(t.seconds, 0))::numeric) AS records_per_second,
    -- Planned bytes are estimates: what was written so far says how good they are.
    CASE WHEN r.status = 'running'
         THEN make_interval(secs => (c.weight - c.done_weight) * coalesce(c.source_bytes / nullif(c.done_weight, 0), 1) / nullif(dedup.read_rate(r.run_id, 600), 0)) END AS eta
FROM dedup.runs AS r
CROSS JOIN LATERAL (
    SELECT count(*) AS chunks,
        count(*) FILTER (WHERE status = 'verified') AS verified, count(*) FILTER (WHERE status = 'syncing') AS syncing,
        count(*) FILTER (WHERE status = 'syncing' AND written_at IS NOT NULL) AS unverified,
        count(*) FILTER (WHERE status = 'failed') AS failed, count(*) FILTER (WHERE status = 'pending') AS pending,
        coalesce(sum(coalesce(estimated_bytes, 1)), 0)::float8 AS weight,
        coalesce(sum(coalesce(estimated_bytes, 1)) FILTER (WHERE written_at IS NOT NULL), 0)::float8 AS done_weight,
        coalesce(sum(source_count), 0)::bigint AS source_count, coalesce(sum(inserted_count), 0)::bigint AS inserted_count,
        coalesce(sum(updated_count), 0)::bigint AS updated_count, coalesce(sum(unchanged_count), 0)::bigint AS unchanged_count,
        coalesce(sum(duplicate_count), 0)::bigint AS duplicate_count, coalesce(sum(quarantined_count), 0)::bigint AS quarantined_count,
        coalesce(sum(source_bytes), 0)::bigint AS source_bytes, max(written_at) AS last_written
    FROM dedup.checkpoints AS k WHERE k.run_id = r.run_id
) AS c
CROSS JOIN LATERAL (SELECT extract(epoch FROM coalesce(r.finished_at, CASE WHEN r.status = 'running' THEN clock_timestamp() END, c.last_written)
                                   - r.started_at)::float8 AS seconds) AS t;
COMMENT ON VIEW dedup.progress IS 'one row a run: how far it is, its books so far, its speed and what is left';
COMMENT ON COLUMN dedup.progress.run_id IS 'the run';
COMMENT ON COLUMN dedup.progress.name IS 'its name';
COMMENT ON COLUMN dedup.progress.status IS 'its status';
COMMENT ON COLUMN dedup.progress.started_at IS 'when its first chunk was leased';
COMMENT ON COLUMN dedup.progress.chunks IS 'chunks in the plan';
COMMENT ON COLUMN dedup.progress.verified IS 'chunks written, read back and equal';
COMMENT ON COLUMN dedup.progress.syncing IS 'chunks leased, or written and waiting for verification';
COMMENT ON COLUMN dedup.progress.unverified IS 'those of them that are written and wait for verification';
COMMENT ON COLUMN dedup.progress.failed IS 'chunks given up';
COMMENT ON COLUMN dedup.progress.pending IS 'chunks to do';
COMMENT ON COLUMN dedup.progress.percent IS 'part written, by planned bytes';
COMMENT ON COLUMN dedup.progress.source_count IS 'records read by written chunks';
COMMENT ON COLUMN dedup.progress.inserted_count IS 'records written as new rows';
COMMENT ON COLUMN dedup.progress.updated_count IS 'records that replaced a row of the same key';
COMMENT ON COLUMN dedup.progress.unchanged_count IS 'records that stood in the target, equal in every column';
COMMENT ON COLUMN dedup.progress.duplicate_count IS 'records dropped because their content is in the target';
COMMENT ON COLUMN dedup.progress.quarantined_count IS 'records set aside';
COMMENT ON COLUMN dedup.progress.source_bytes IS 'bytes read by written chunks';
COMMENT ON COLUMN dedup.progress.mb_per_second IS 'source megabytes (10^6 bytes) a second since the start';
COMMENT ON COLUMN dedup.progress.records_per_second IS 'records a second since the start';
COMMENT ON COLUMN dedup.progress.eta IS 'time left at the speed of the last ten minutes; null: not running or nothing read yet';

CREATE FUNCTION dedup.index_stats(OUT target regclass, OUT level int, OUT segments bigint, OUT entries bigint, OUT tombstones bigint,
    OUT blocks bigint, OUT bytes bigint, OUT bytes_per_key float8) RETURNS SETOF record
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT t.target, s.level, count(*), sum(s.entries)::bigint, sum(s.tombstones)::bigint, sum(s.blocks)::bigint,
        sum(s.blocks)::bigint * current_setting('block_size')::bigint,
        round(sum(s.blocks)::numeric * current_setting('block_size')::numeric / sum(s.entries), 1)::float8
    FROM dedup.segment AS s JOIN dedup.targets AS t USING (target_id) GROUP BY 1, 2 ORDER BY 1, 2
$$;
COMMENT ON FUNCTION dedup.index_stats() IS 'size of each target''s hash index by level, live blocks only';

-- Blocks are unpacked one by one and sorted by the executor, on disk where they don't fit work_mem. Of each content and key the last word counts.
CREATE FUNCTION dedup.hash_index(target regclass, OUT content_hash bytea, OUT run_id uuid, OUT chunk_id text, OUT target_location_uri text)
RETURNS SETOF record LANGUAGE plpgsql STABLE STRICT SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    -- Refuses on its own, whatever a plan would look at first.
    number int := dedup.indexed_target(target);
BEGIN
    RETURN QUERY SELECT last.content_hash, o.run_id, o.chunk_id, last.target_location_uri
    FROM (
        SELECT DISTINCT ON (e.content_hash, e.target_location_uri) e.*
        FROM dedup.segment AS s JOIN dedup.segment_block AS b USING (segment_id)
        CROSS JOIN LATERAL dedup.segment_entries(number, b.entries) AS e
        WHERE s.target_id = number
        ORDER BY e.content_hash, e.target_location_uri, e.ordinal DESC, e.tombstone
    ) AS last
    LEFT JOIN dedup.ordinals AS o USING (ordinal)
    WHERE NOT last.tombstone
    ORDER BY last.content_hash, last.target_location_uri;
END $$;
COMMENT ON FUNCTION dedup.hash_index(regclass) IS 'every content of a target with the run and chunk that wrote it and its row''s URI, in order of content hash';
