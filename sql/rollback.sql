-- Takes back what a run did to its targets: psql -v run=RUN_ID [-v force=on] -f rollback.sql
-- RUN_ID as in dedup.runs. It shows what will be undone and asks; anything but yes leaves everything as it is.
-- force: rows that somebody changed since are overwritten, rows that other runs rest on are kept for them.
\set ON_ERROR_STOP on
\set AUTOCOMMIT on
\if :{?force}
\else
    \set force off
\endif

\echo 'The run'
SELECT run_id, name, status, owner, started_at, finished_at FROM dedup.runs WHERE run_id = :'run';

\echo 'What will be taken back'
SELECT target, rows_to_delete, rows_to_restore, pg_size_pretty(wal_bytes) AS wal_at_most, estimated FROM dedup.rollback_preview(:'run');

SELECT coalesce(sum(rows_to_delete + rows_to_restore), 0) > dedup.rollback_limit() OR (SELECT status = 'rolling_back' FROM dedup.runs WHERE run_id = :'run') AS in_steps
FROM dedup.rollback_preview(:'run') \gset
\if :in_steps
    \echo 'It will be done in steps, each in a transaction of its own: cut off, it goes on when this script is run again.'
\else
    \echo 'It will be done in one transaction: all of it or nothing.'
\endif
\prompt 'Take it back? Type yes: ' answer
SELECT :'answer' = 'yes' AS confirmed \gset
\if :confirmed
    \if :in_steps
        CALL dedup.rollback_run_in_chunks(:'run', :'force');
    \else
        SELECT status, deleted_count, restored_count, kept_count, left_alone_count, round(seconds::numeric, 1) AS seconds
        FROM dedup.rollback_run(:'run', :'force');
    \endif
    \echo 'Rows that were left alone because somebody changed them since'
    SELECT t.target, l.key, l.reason, l.chunk_id FROM dedup.left_alone AS l JOIN dedup.targets AS t USING (target_id)
    WHERE l.rollback_id = (SELECT max(rollback_id) FROM dedup.rollbacks WHERE run_id = :'run') ORDER BY l.left_alone_id LIMIT 100;
\else
    \echo 'Nothing was changed.'
\endif
