-- Times five claims on each target; lines `claim_new` or `claim_lookup`, microseconds a digest. Variables: digests, keys.
SELECT (filter).warm AS warm FROM (SELECT dedup.filter_stats() AS filter) AS f \gset
\if :warm
\else
\warn the filter is cold: claims would look everything up
\quit
\endif
\set worker '\'00000000-0000-0000-0000-000000000001\''
SELECT dedup.heartbeat(:worker, run) FROM chunk \g /dev/null
-- A lease belongs to the connection that took it.
UPDATE chunk SET chunk_id = l.chunk_id, lease = l.lease
FROM (SELECT c.target, l.* FROM chunk AS c, dedup.lease_chunk(c.run, :worker) AS l) AS l WHERE l.target = chunk.target;
SELECT format('BEGIN; SELECT %L, claim_microseconds(%L, %s, %s, %s); ROLLBACK', metric, target, :digests, keys, round)
FROM (VALUES ('claim_new', 'fresh', 0::bigint), ('claim_lookup', 'filled', :keys)) AS m(metric, target, keys),
     generate_series(1, 5) AS round
ORDER BY metric, round
\gexec
