-- Mean seconds of the first and of the last 200 chunks of the only run, in the order they were finished in; how many there were.
SELECT avg(seconds) FILTER (WHERE n <= 200), avg(seconds) FILTER (WHERE n > total - 200), max(total)
FROM (SELECT extract(epoch FROM verified_at - started_at) AS seconds, row_number() OVER (ORDER BY ordinal) AS n, count(*) OVER () AS total
      FROM dedup.checkpoints) AS c;
