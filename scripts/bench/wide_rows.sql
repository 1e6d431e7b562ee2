-- :rows documents, no two alike; odd ones do not compress, even ones do.
INSERT INTO wide
SELECT id, 'document ' || id,
       CASE WHEN id % 2 = 1
            THEN (SELECT string_agg(sha512((id || ':' || n)::bytea), '') FROM generate_series(1, 516) AS n)
            ELSE (SELECT string_agg((md5((id || ':' || n)::text) || repeat(' lorem ipsum dolor sit amet', 6))::bytea, '') FROM generate_series(1, 170) AS n) END
FROM generate_series(1, :rows) AS id;
VACUUM (FREEZE, ANALYZE) wide;
