-- Two small targets in this database, `fresh` (stays empty) and `filled` (:keys rows), and a function that times one claim.
SET client_min_messages = warning;
CREATE EXTENSION pg_dedup_migrate;
CREATE TABLE fresh (id bigint PRIMARY KEY, content bigint NOT NULL);
CREATE TABLE filled (id bigint PRIMARY KEY, content bigint NOT NULL);
ALTER TABLE filled DROP CONSTRAINT filled_pkey;
INSERT INTO filled SELECT n, n FROM generate_series(1, :keys) AS n;
ALTER TABLE filled ADD PRIMARY KEY (id);
VACUUM (FREEZE, ANALYZE) filled;

CREATE TABLE chunk (target text PRIMARY KEY, run uuid, chunk_id text, lease uuid);
INSERT INTO chunk (target, run) SELECT target, dedup.create_run(target) FROM unnest('{fresh,filled}'::text[]) AS target;
SELECT dedup.add_table(run, target, target::regclass, NULL, '{content}', '{"source": {}}'),
       dedup.set_source_spec(run, 1, '{"key_types": ["bigint"]}'),
       dedup.add_chunks(run, 1, '[{"kind": "key", "lower": ["0"], "upper": ["1"]}]'),
       dedup.index_existing(target::regclass)
FROM chunk ORDER BY target DESC
\g /dev/null
SELECT dedup.warm_filter() \g /dev/null

-- Microseconds a digest of one claim of `digests` contents, every fourth of which is among the first `keys` when that is
-- not 0, all others never seen before. Nothing but the claim is timed. For a transaction that is rolled back.
CREATE FUNCTION claim_microseconds(of_target text, digests int, keys bigint, round int) RETURNS float8 LANGUAGE plpgsql AS $$
DECLARE
    c chunk := (SELECT c FROM chunk AS c WHERE c.target = of_target);
    never_seen bigint := 1000000000000 + round::bigint * digests;
    packed bytea := (
        SELECT string_agg(digest, '' ORDER BY digest)
        FROM (SELECT DISTINCT dedup.content_hash(CASE WHEN keys > 0 AND n % 4 = 0 THEN 1 + (n::bigint * 7919 + round) * 104729 % keys
                                                      ELSE never_seen + n END) AS digest
              FROM generate_series(1, digests) AS n) AS d);
    verdicts bytea;
    before timestamptz;
    took interval;
    found int;
BEGIN
    PERFORM dedup.begin_chunk(c.run, c.chunk_id, c.lease);
    before := clock_timestamp();
    verdicts := dedup.claim(c.run, c.chunk_id, packed);
    took := clock_timestamp() - before;
    SELECT count(*) INTO found FROM generate_series(0, length(verdicts) - 1) AS i WHERE get_byte(verdicts, i) = 1;
    IF keys = 0 AND found > 0 OR keys > 0 AND found NOT BETWEEN digests / 4 * 0.95 AND digests / 4 THEN
        RAISE EXCEPTION 'of % digests % are duplicates', length(verdicts), found;
    END IF;
    RETURN extract(epoch FROM took) * 1e6 / length(verdicts);
END $$;
