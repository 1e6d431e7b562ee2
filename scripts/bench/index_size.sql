-- Bytes on disk an entry of the hash index, indexes, free space and dead rows included.
SELECT (pg_total_relation_size('dedup.segment') + pg_total_relation_size('dedup.segment_block'))::float8 / (SELECT sum(entries) FROM dedup.segment);
