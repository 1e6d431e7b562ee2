-- Where the time of the run's chunks went, seconds added up over all workers.
WITH c AS (SELECT extract(epoch FROM verified_at - started_at)::numeric AS total, (timings ->> 'read_seconds')::numeric AS read,
                  (timings ->> 'fold_seconds')::numeric AS fold, (timings ->> 'claim_seconds')::numeric AS claim,
                  (timings ->> 'write_seconds')::numeric AS write FROM dedup.checkpoints)
SELECT round(sum(read), 2), round(sum(fold), 2), round(sum(claim), 2), round(sum(write), 2), round(sum(total - read - claim - write - fold), 2),
       round(sum(total), 2) FROM c;
