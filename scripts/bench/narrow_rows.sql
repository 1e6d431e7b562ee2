-- :rows records in order of key; every fourth repeats the content of another one anywhere in the table.
ALTER TABLE narrow DROP CONSTRAINT narrow_pkey;
INSERT INTO narrow
SELECT id, hash & 1048575, timestamptz '2024-01-01 00:00:00+00' + content * interval '1 second',
       (hash & 16777215)::numeric / 100, (ARRAY['open', 'paid', 'shipped', 'returned'])[1 + (hash & 3)],
       encode(sha512(content::text::bytea), 'hex') || repeat(substr(md5(content::text), 1, 8), 5)
FROM generate_series(1, :rows) AS id,
     -- The content's number: the record's own, or one that is no multiple of four.
     LATERAL (SELECT CASE WHEN id % 4 <> 0 THEN id
                          ELSE ((hashint8extended(id, 7) & 4611686018427387903) % (:rows / 4)) * 4 + 1 + (hashint8extended(id, 8) & 1) END) AS picked(content),
     LATERAL (SELECT hashint8extended(content, 1)) AS h(hash);
ALTER TABLE narrow ADD PRIMARY KEY (id);
VACUUM (FREEZE, ANALYZE) narrow;
