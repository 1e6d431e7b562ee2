-- Procedures that commit as they go: plpgsql without a SET clause, every name qualified.

CREATE PROCEDURE dedup.compact() LANGUAGE plpgsql AS $$
DECLARE
    id int;
BEGIN
    FOR id IN SELECT target_id FROM dedup.targets ORDER BY target_id LOOP
        WHILE dedup.compact_step(id) LOOP
            COMMIT;
        END LOOP;
        COMMIT;
    END LOOP;
END $$;
COMMENT ON PROCEDURE dedup.compact() IS 'merges segments level by level until no level is full, one transaction a merge';
