-- What a DBA asks about a run, in plain SQL: psql -v run=RUN_ID [-v key=COLUMN=VALUE] -f reconciliation.sql
-- RUN_ID as in dedup.runs; nothing here changes anything. A key reads as dedup.duplicates and dedup.divergences write it: id=5, or a=1&b=2.
\set ON_ERROR_STOP on
\if :{?key}
\else
    \set key ''
\endif

\echo 'Counts by table: what the source delivered and what became of it'
SELECT t.source, g.target, sum(c.source_count) AS source_count, sum(c.inserted_count) AS inserted, sum(c.updated_count) AS updated,
    sum(c.unchanged_count) AS unchanged, sum(c.duplicate_count) AS duplicate, sum(c.quarantined_count) AS quarantined
FROM dedup.run_tables AS t JOIN dedup.targets AS g USING (target_id) JOIN dedup.checkpoints AS c USING (run_id, table_id)
WHERE t.run_id = :'run' GROUP BY t.table_id, t.source, g.target ORDER BY t.table_id;

\echo 'Rows in the targets now'
SELECT format('SELECT %L AS target, count(*) AS rows FROM %s', g.target, g.target)
FROM dedup.targets AS g WHERE g.target_id IN (SELECT t.target_id FROM dedup.run_tables AS t WHERE t.run_id = :'run') ORDER BY g.target_id \gexec

\echo 'Passes over the run and their verdicts'
SELECT reconciliation_id, verdict, is_strict, started_at, finished_at, released_by, target_snapshot
FROM dedup.reconciliations WHERE run_id = :'run' ORDER BY reconciliation_id;

\echo 'Mismatches by table, last pass'
SELECT t.source, g.target, sum(k.source_count) AS source_count, sum(k.present_count) AS present, sum(k.duplicate_count) AS duplicate,
    sum(k.quarantined_count) AS quarantined, sum(k.missing_count) AS missing, sum(k.changed_count) AS changed, sum(k.extra_count) AS extra,
    sum(k.surviving_duplicate_count) AS surviving_duplicate, sum(k.foreign_count) AS "foreign", sum(k.source_changed_count) AS source_changed
FROM dedup.reconciled_chunks AS k JOIN dedup.run_tables AS t ON t.run_id = :'run' AND t.table_id = k.table_id JOIN dedup.targets AS g USING (target_id)
WHERE k.reconciliation_id = (SELECT max(reconciliation_id) FROM dedup.reconciliations WHERE run_id = :'run')
GROUP BY t.table_id, t.source, g.target ORDER BY t.table_id;

\echo 'What differs, by key, last pass: the first 100'
SELECT d.kind, g.target, coalesce(d.key, 'h:' || encode(d.content_hash, 'hex')) AS key, d.chunk_id, d.state
FROM dedup.divergences AS d JOIN dedup.targets AS g USING (target_id)
WHERE d.reconciliation_id = (SELECT max(reconciliation_id) FROM dedup.reconciliations WHERE run_id = :'run')
ORDER BY d.state, d.divergence_id LIMIT 100;

\echo 'Contents dropped most often, and the row that holds each'
SELECT target, 'h:' || encode(content_hash, 'hex') AS content, count(*) AS dropped, min(survivor) AS survivor
FROM dedup.duplicates WHERE run_id = :'run' GROUP BY target, content_hash ORDER BY dropped DESC, content LIMIT 20;

\echo 'Where the record with this key is: its survivor, if it was dropped'
SELECT target, chunk_id, source_key, survivor FROM dedup.duplicates WHERE run_id = :'run' AND source_key = :'key' ORDER BY target, chunk_id;

\echo 'Books chunk by chunk'
SELECT chunk_id, status, source_count AS source, inserted_count AS inserted, updated_count AS updated, unchanged_count AS unchanged,
    duplicate_count AS duplicate, quarantined_count AS quarantined,
    source_count = inserted_count + updated_count + unchanged_count + duplicate_count + quarantined_count AS balances
FROM dedup.checkpoints WHERE run_id = :'run' ORDER BY chunk_no;
