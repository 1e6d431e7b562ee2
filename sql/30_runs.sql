-- Runs and their tables: what a DBA or a worker says before anything is written.

CREATE FUNCTION dedup.log_event(run uuid, chunk_id text, kind text, detail jsonb DEFAULT '{}') RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp
AS $$ INSERT INTO dedup.events (run_id, chunk_id, kind, detail) VALUES (run, chunk_id, kind, detail) $$;
COMMENT ON FUNCTION dedup.log_event(uuid, text, text, jsonb) IS 'adds a line to the audit log';

CREATE FUNCTION dedup.create_run(name text, options jsonb DEFAULT '{}') RETURNS uuid
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    id uuid;
    unknown text;
BEGIN
    IF coalesce(name, '') = '' THEN
        RAISE EXCEPTION 'a run needs a name' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF jsonb_typeof(coalesce(options, '{}')) <> 'object' THEN
        RAISE EXCEPTION 'options of a run must be a JSON object' USING ERRCODE = 'invalid_parameter_value',
            HINT = 'For example: {"lease_seconds": 60, "verify": "end"}.';
    END IF;
    SELECT string_agg(key, ', ' ORDER BY key) INTO unknown
    FROM jsonb_object_keys(coalesce(options, '{}')) AS key
    WHERE key NOT IN ('lease_seconds', 'max_attempts', 'verify', 'sidecar_version', 'settings');
    IF unknown IS NOT NULL THEN
        RAISE EXCEPTION 'unknown run option: %', unknown USING ERRCODE = 'invalid_parameter_value',
            HINT = 'Known are lease_seconds, max_attempts, verify, sidecar_version and settings.';
    END IF;
    SELECT string_agg(key, ', ' ORDER BY key) INTO unknown FROM jsonb_each(coalesce(options, '{}'))
    WHERE key IN ('lease_seconds', 'max_attempts') AND CASE jsonb_typeof(value) WHEN 'number' THEN value <= '0' ELSE true END;
    IF unknown IS NOT NULL THEN
        RAISE EXCEPTION 'must be a positive number: %', unknown USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF coalesce(options ->> 'verify', 'chunk') NOT IN ('chunk', 'end') THEN
        RAISE EXCEPTION 'cannot verify at %', quote_literal(options ->> 'verify') USING ERRCODE = 'invalid_parameter_value',
            HINT = '"verify" is "chunk" (each chunk is read back before it commits) or "end" (each target is scanned when all is written).';
    END IF;
    INSERT INTO dedup.runs (name, options) VALUES (create_run.name, coalesce(create_run.options, '{}')) RETURNING run_id INTO id;
    PERFORM dedup.log_event(id, NULL, 'run_created', jsonb_build_object('name', name, 'options', options));
    RETURN id;
END $$;
COMMENT ON FUNCTION dedup.create_run(text, jsonb) IS 'creates a run; options: lease_seconds (60), max_attempts (5), verify (chunk; end: by scanning the targets when all is written)';

-- The run's row, or a clear error.
CREATE FUNCTION dedup.run_row(run uuid) RETURNS dedup.runs
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs;
BEGIN
    SELECT * INTO r FROM dedup.runs AS x WHERE x.run_id = run;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'run % does not exist', coalesce(run::text, 'NULL') USING ERRCODE = 'undefined_object',
            HINT = 'SELECT run_id, name, status FROM dedup.runs lists them.';
    END IF;
    RETURN r;
END $$;
COMMENT ON FUNCTION dedup.run_row(uuid) IS 'the run, or an error that says how to find one';

CREATE FUNCTION dedup.must_be_kept(run uuid) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.run_row(run);
BEGIN
    IF r.purged_at IS NOT NULL THEN
        RAISE EXCEPTION 'the history of run % was purged', r.run_id USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = format('Since %s nothing is known of its chunks.', r.purged_at), HINT = 'SELECT * FROM dedup.archives names its archives.';
    END IF;
END $$;
COMMENT ON FUNCTION dedup.must_be_kept(uuid) IS 'refuses a run whose history was purged';

-- The same, locked against every change of its status until the transaction ends. Whoever decides by the status reads it here.
-- Order of locks: the run, then (lock_class, 0), then checkpoints.
CREATE FUNCTION dedup.lock_run(run uuid) RETURNS dedup.runs
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs;
BEGIN
    PERFORM dedup.run_row(run);
    SELECT * INTO r FROM dedup.runs AS x WHERE x.run_id = run FOR NO KEY UPDATE;
    RETURN r;
END $$;
COMMENT ON FUNCTION dedup.lock_run(uuid) IS 'the run, locked so that its status stays';

-- SQL that is stored with a run (filters, transforms, the very tables and views it reads) executes as whoever calls: that may only be the role
-- that stored it. Nobody can pass a run on to somebody else; superusers can, which is what a restore does.
CREATE FUNCTION dedup.keep_owner() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
        RETURN NEW;
    ELSIF TG_OP = 'INSERT' THEN
        NEW.owner := current_user;
    ELSIF NEW.owner <> OLD.owner THEN
        RAISE EXCEPTION 'the owner of a run cannot be changed' USING ERRCODE = 'insufficient_privilege';
    ELSIF NEW.owner <> current_user AND NEW.options #> '{settings,throttle,query}' IS DISTINCT FROM OLD.options #> '{settings,throttle,query}' THEN
        RAISE EXCEPTION 'must be owner of run %', OLD.run_id USING ERRCODE = 'insufficient_privilege',
            DETAIL = 'The query of a run''s throttle is executed as its owner.';
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION dedup.keep_owner() IS 'trigger: a run belongs to the role that created it';
CREATE TRIGGER keep_owner BEFORE INSERT OR UPDATE ON dedup.runs FOR EACH ROW EXECUTE FUNCTION dedup.keep_owner();

-- What views and alerts of all runs read of each.
CREATE FUNCTION dedup.check_settings() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    wrong text;
BEGIN
    SELECT string_agg(array_to_string(k.path, '.'), ', ') INTO wrong
    FROM (VALUES ('{throttle,min_rate}'::text[]), ('{throttle,max_rate}'), ('{alerts,deadline_seconds}'), ('{alerts,min_throughput}'), ('{alerts,failure_rate}'), ('{alerts,failure_limit}'),
        ('{alerts,disk_floor}'), ('{bake_in_days}')) AS k(path)
    CROSS JOIN LATERAL (SELECT NEW.options -> 'settings' #> k.path) AS v(value)
    WHERE v.value IS NOT NULL AND CASE jsonb_typeof(v.value) WHEN 'number' THEN v.value < '0' WHEN 'null' THEN false ELSE true END;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'must be a number that is not negative: %', wrong USING ERRCODE = 'invalid_parameter_value';
    ELSIF jsonb_typeof(NEW.options #> '{settings,throttle,off}') NOT IN ('boolean', 'null') THEN
        RAISE EXCEPTION 'must be true or false: throttle.off' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION dedup.check_settings() IS 'trigger: settings of a run are what is read of them later';
CREATE TRIGGER check_settings BEFORE INSERT OR UPDATE OF options ON dedup.runs FOR EACH ROW EXECUTE FUNCTION dedup.check_settings();
COMMENT ON TRIGGER check_settings ON dedup.runs IS 'settings of a run are what is read of them later';

CREATE FUNCTION dedup.keep_stored_sql() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- Workers of other roles may renew how a remote source is read: that is executed by the worker, on the source.
    IF TG_OP = 'UPDATE' AND NEW.run_id = OLD.run_id AND NEW.target_id = OLD.target_id AND NEW.source = OLD.source
        AND NEW.layout = OLD.layout AND NEW.local_options = OLD.local_options
        AND (NEW.source_spec IS NOT DISTINCT FROM OLD.source_spec
             OR NOT coalesce(OLD.source_spec ? 'local', true) AND NOT coalesce(NEW.source_spec ? 'local', true)) THEN
        RETURN NEW;
    END IF;
    IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
        PERFORM dedup.must_own(NEW.run_id);
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION dedup.keep_stored_sql() IS 'trigger: what a run reads is said by its owner';
CREATE TRIGGER keep_stored_sql BEFORE INSERT OR UPDATE ON dedup.run_tables FOR EACH ROW EXECUTE FUNCTION dedup.keep_stored_sql();

-- What an error says without the values it quotes, for checkpoints and events. Messages of class 22 name the offending value, after a colon
-- ("invalid input syntax for type integer: ...") or in quotes ("value ... is out of range"); a function's own words (P0001) can say anything.
-- Workers keep to the same rule for what they report.
CREATE FUNCTION dedup.without_values(sqlstate text, message text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE
        WHEN sqlstate = 'P0001' THEN 'exception raised by a function or trigger'
        WHEN sqlstate NOT LIKE '22%' THEN message
        WHEN strpos(split_part(message, ': ', 1), '"') > 0 THEN 'data exception'
        ELSE split_part(message, ': ', 1) END
$$;
COMMENT ON FUNCTION dedup.without_values(text, text) IS 'an error message without the values that it may quote';

CREATE FUNCTION dedup.must_own(run uuid) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.run_row(run);
BEGIN
    IF r.owner <> current_user THEN
        RAISE EXCEPTION 'must be owner of run %', run USING ERRCODE = 'insufficient_privilege',
            DETAIL = 'The run''s filters, transforms and sources are executed with the privileges of the role that calls.',
            HINT = format('SET ROLE %I;', r.owner);
    END IF;
END $$;
COMMENT ON FUNCTION dedup.must_own(uuid) IS 'refuses every role but the run''s owner, superusers too';

-- A target must commit with us, and we must be able to see what is in it.
CREATE FUNCTION dedup.check_target(target regclass) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    c pg_class;
    leaf record;
BEGIN
    SELECT * INTO c FROM pg_class WHERE oid = target;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'target table does not exist' USING ERRCODE = 'undefined_table';
    END IF;
    IF c.relkind NOT IN ('r', 'p') THEN
        RAISE EXCEPTION '% is not a table', target USING ERRCODE = 'wrong_object_type',
            HINT = 'A target is an ordinary or a partitioned table.';
    END IF;
    IF c.relnamespace IN ('pg_catalog'::regnamespace, 'dedup'::regnamespace, 'information_schema'::regnamespace) THEN
        RAISE EXCEPTION '% is a system table', target USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF c.relrowsecurity AND row_security_active(target) THEN
        RAISE EXCEPTION 'row security is active on %', target USING ERRCODE = 'insufficient_privilege',
            HINT = 'Use a role with BYPASSRLS or the owner: a hidden row cannot be verified.';
    END IF;
    FOR leaf IN
        SELECT k.oid::regclass AS name, k.relkind, k.relpersistence
        FROM (SELECT c.oid AS relid UNION SELECT t.relid FROM pg_partition_tree(target) AS t) AS p JOIN pg_class AS k ON k.oid = p.relid
    LOOP
        IF leaf.relkind = 'f' THEN
            RAISE EXCEPTION '% is a foreign table', leaf.name USING ERRCODE = 'feature_not_supported',
                DETAIL = 'Rows in a foreign table do not commit together with their checkpoint.';
        ELSIF leaf.relpersistence <> 'p' THEN
            RAISE EXCEPTION '% is not a logged table', leaf.name USING ERRCODE = 'feature_not_supported',
                DETAIL = 'An unlogged or temporary table is empty after a crash while its checkpoints are not.',
                HINT = 'ALTER TABLE ... SET LOGGED first.';
        END IF;
    END LOOP;
    IF NOT (has_table_privilege(target, 'SELECT') AND has_table_privilege(target, 'INSERT')
            AND has_table_privilege(target, 'UPDATE') AND has_table_privilege(target, 'DELETE')) THEN
        RAISE EXCEPTION 'permission denied for table %', target USING ERRCODE = 'insufficient_privilege',
            HINT = format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO %I;', target, current_user);
    END IF;
END $$;
COMMENT ON FUNCTION dedup.check_target(regclass) IS 'refuses targets that do not commit with the checkpoint or cannot be read back';

-- The leaf tables of a target with the files they live in, as {"oid": filenode}.
CREATE FUNCTION dedup.leaf_filenodes(target regclass) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(jsonb_object_agg(k.oid::bigint::text, pg_relation_filenode(k.oid)::bigint), '{}')
    FROM (SELECT target::oid AS relid UNION SELECT t.relid FROM pg_partition_tree(target) AS t WHERE t.isleaf) AS p
    JOIN pg_class AS k ON k.oid = p.relid WHERE k.relkind = 'r'
$$;
COMMENT ON FUNCTION dedup.leaf_filenodes(regclass) IS 'leaf tables and their files';

-- The key columns a target can be addressed by: those named, or the primary key, or the narrowest usable unique index.
-- Usable: valid, immediate, neither partial nor on expressions, every column NOT NULL. NULL: there is none.
CREATE FUNCTION dedup.usable_key(target regclass, named text[]) RETURNS text[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT columns FROM (
        SELECT i.indisprimary, i.indnkeyatts, i.indexrelid,
            (SELECT array_agg(a.attname::text ORDER BY k.n) FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n)
             JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum WHERE k.n <= i.indnkeyatts) AS columns,
            (SELECT bool_and(a.attnotnull) FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n)
             JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum WHERE k.n <= i.indnkeyatts) AS not_null
        FROM pg_index AS i
        WHERE i.indrelid = target AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL
    ) AS candidate
    WHERE not_null AND (named IS NULL OR (columns @> named AND columns <@ named))
    ORDER BY indisprimary DESC, indnkeyatts, indexrelid LIMIT 1
$$;
COMMENT ON FUNCTION dedup.usable_key(regclass, text[]) IS 'columns of a valid, immediate, total unique index on NOT NULL columns';

-- The default of DESIGN: only a single surrogate key that no foreign key references is left out of the content.
CREATE FUNCTION dedup.is_surrogate(target regclass, key text) RETURNS bool
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT a.attidentity <> '' OR coalesce(pg_get_expr(d.adbin, d.adrelid) ~ '^(nextval\(|gen_random_uuid\(\)|(public\.)?uuid_generate_v\d)', false)
    FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = target AND a.attname = key
$$;
COMMENT ON FUNCTION dedup.is_surrogate(regclass, text) IS 'is the column an identity, a serial or a generated uuid';

CREATE FUNCTION dedup.is_referenced(target regclass, key text) RETURNS bool
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT EXISTS (SELECT FROM pg_constraint AS c JOIN pg_attribute AS a ON a.attrelid = c.confrelid AND a.attnum = ANY (c.confkey)
                   WHERE c.contype = 'f' AND c.confrelid = target AND a.attname = key)
$$;
COMMENT ON FUNCTION dedup.is_referenced(regclass, text) IS 'does a foreign key point at the column';

-- Entries of different signatures cannot be told to be of one content: an index has one.
CREATE FUNCTION dedup.signature_of(layout jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT jsonb_build_object('encoding_version', layout -> 'encoding_version',
        'content', (SELECT jsonb_agg(jsonb_build_array(layout #> ARRAY['columns', i, 'name'], layout #> ARRAY['columns', i, 'type_name']) ORDER BY n)
                    FROM jsonb_array_elements_text(layout -> 'content') WITH ORDINALITY AS u(i, n)),
        'key', (SELECT coalesce(jsonb_agg(jsonb_build_array(layout #> ARRAY['columns', i, 'name'], layout #> ARRAY['columns', i, 'type_name']) ORDER BY n), '[]')
                FROM jsonb_array_elements_text(layout -> 'key') WITH ORDINALITY AS u(i, n)))
$$;
COMMENT ON FUNCTION dedup.signature_of(jsonb) IS 'what a hash index belongs to: encoding version, content and key columns with their types';

CREATE FUNCTION dedup.add_table(run uuid, source text, target regclass, key_columns text[] DEFAULT NULL, content_columns text[] DEFAULT NULL,
    options jsonb DEFAULT '{}') RETURNS int
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.lock_run(run);
    all_columns text[];
    excluded text[];
    key text[];
    content text[];
    rule text;
    table_layout jsonb;
    sig jsonb;
    t dedup.targets;
    id int;
    other text;
BEGIN
    options := coalesce(options, '{}');
    SELECT string_agg(k, ', ' ORDER BY k) INTO other FROM jsonb_object_keys(options) AS k
    WHERE k NOT IN ('source', 'columns', 'exclude_columns', 'surrogate_key', 'key_referenced', 'keyless', 'where', 'transforms');
    IF other IS NOT NULL THEN
        RAISE EXCEPTION 'unknown table option: %', other USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF r.status <> 'created' THEN
        RAISE EXCEPTION 'run % is %', run, r.status USING ERRCODE = 'object_not_in_prerequisite_state',
            HINT = 'Tables are added before the first chunk is leased.';
    END IF;
    IF coalesce(source, '') = '' THEN
        RAISE EXCEPTION 'the source table is missing' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM dedup.must_own(run);
    PERFORM dedup.check_target(target);
    -- Two runs that name the target at the same time see each other.
    PERFORM pg_advisory_xact_lock(dedup.lock_class(), 0);
    SELECT x.run_id::text INTO other FROM dedup.run_tables AS x JOIN dedup.runs USING (run_id) JOIN dedup.targets AS y USING (target_id)
    WHERE y.target = add_table.target AND x.run_id <> run AND runs.status IN ('created', 'running', 'paused', 'halted', 'failed', 'rolling_back') LIMIT 1;
    IF other IS NOT NULL THEN
        RAISE EXCEPTION 'run % on % is still open', other, target USING ERRCODE = 'object_in_use',
            HINT = CASE (dedup.run_row(other::uuid)).status
                WHEN 'rolling_back' THEN format('Go on with its rollback: pg-dedup-migrate rollback %s.', other)
                WHEN 'halted' THEN format('Reconcile it, or take it back: pg-dedup-migrate rollback %s.', other)
                ELSE format('Resume it: pg-dedup-migrate run --resume %s; or give it up: SELECT dedup.cancel_run(%L).', other, other) END;
    END IF;

    SELECT array_agg(a.attname::text ORDER BY a.attnum) INTO all_columns FROM pg_attribute AS a
    WHERE a.attrelid = target AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '';
    IF options ? 'columns' THEN
        all_columns := ARRAY(SELECT c FROM unnest(all_columns) WITH ORDINALITY AS u(c, n)
                             WHERE c IN (SELECT jsonb_array_elements_text(options -> 'columns')) ORDER BY n);
    END IF;
    IF cardinality(all_columns) IS NULL OR cardinality(all_columns) = 0 THEN
        RAISE EXCEPTION '% has no column to write', target USING ERRCODE = 'invalid_table_definition';
    END IF;
    excluded := ARRAY(SELECT jsonb_array_elements_text(options -> 'exclude_columns'));
    SELECT string_agg(quote_ident(c), ', ') INTO other
    FROM unnest(coalesce(key_columns, '{}') || coalesce(content_columns, '{}') || excluded) AS c WHERE c <> ALL (all_columns);
    IF other IS NOT NULL THEN
        RAISE EXCEPTION 'column % does not exist in % or is generated', other, target USING ERRCODE = 'undefined_column';
    END IF;

    key := dedup.usable_key(target, key_columns);
    IF key IS NULL AND key_columns IS NOT NULL THEN
        RAISE EXCEPTION 'no usable unique index on %(%)', target, array_to_string(key_columns, ', ') USING ERRCODE = 'invalid_table_definition',
            DETAIL = 'A key needs a valid, immediate, total unique index whose columns are NOT NULL.',
            HINT = format('CREATE UNIQUE INDEX CONCURRENTLY ON %s (%s);', target, array_to_string(key_columns, ', '));
    END IF;
    key := CASE WHEN coalesce((options ->> 'keyless')::bool, false) THEN '{}'::text[] ELSE coalesce(key_columns, key, '{}') END;
    IF NOT key <@ all_columns THEN
        RAISE EXCEPTION 'the source does not deliver the key % of %', array_to_string(key, ', '), target USING ERRCODE = 'undefined_column';
    END IF;

    IF content_columns IS NOT NULL THEN
        content := content_columns;
        rule := 'named: ' || array_to_string(content, ', ');
    ELSIF cardinality(excluded) > 0 THEN
        content := ARRAY(SELECT c FROM unnest(all_columns) WITH ORDINALITY AS u(c, n) WHERE c <> ALL (excluded) ORDER BY n);
        rule := 'all but excluded: ' || array_to_string(excluded, ', ');
    ELSIF cardinality(key) = 1 AND cardinality(all_columns) > 1
        AND (dedup.is_surrogate(target, key[1]) OR coalesce((options ->> 'surrogate_key')::bool, false))
        AND NOT (dedup.is_referenced(target, key[1]) OR coalesce((options ->> 'key_referenced')::bool, false)) THEN
        content := ARRAY(SELECT c FROM unnest(all_columns) WITH ORDINALITY AS u(c, n) WHERE c <> key[1] ORDER BY n);
        rule := format('all but the surrogate key %s, which nothing references', key[1]);
    ELSE
        content := all_columns;
        rule := CASE
            WHEN cardinality(key) = 1 AND (dedup.is_surrogate(target, key[1]) OR coalesce((options ->> 'surrogate_key')::bool, false))
                THEN format('all columns: the key %s is referenced by a foreign key; name content columns to fold more', key[1])
            ELSE 'all columns: only the very same record folds; name content columns to fold more' END;
    END IF;
    IF cardinality(content) = 0 THEN
        RAISE EXCEPTION 'no content column is left' USING ERRCODE = 'invalid_parameter_value';
    END IF;

    table_layout := dedup.target_layout(target, all_columns, key, content);
    sig := dedup.signature_of(table_layout);

    SELECT * INTO t FROM dedup.targets AS x WHERE x.target = add_table.target FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO dedup.targets (target, signature, layout, filenodes)
        VALUES (add_table.target, sig, table_layout, dedup.leaf_filenodes(add_table.target)) RETURNING * INTO t;
    ELSIF t.signature <> sig AND EXISTS (SELECT FROM dedup.run_tables AS x WHERE x.run_id = run AND x.target_id = t.target_id) THEN
        RAISE EXCEPTION 'the sources of % need one hash index', target USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = format('Sources before: %s. %s: %s.', t.signature, source, sig),
            HINT = 'Name the same content columns for every source of the target, and deliver them from each.';
    ELSIF NOT EXISTS (SELECT FROM dedup.segment AS s WHERE s.target_id = t.target_id) THEN
        UPDATE dedup.targets AS x SET signature = sig, layout = table_layout, filenodes = dedup.leaf_filenodes(add_table.target), indexed_at = NULL
        WHERE x.target_id = t.target_id;
    ELSIF t.signature <> sig THEN
        RAISE EXCEPTION 'the hash index of % was made for other columns', target USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = format('Index: %s. Run: %s.', t.signature, sig),
            HINT = format('Name the same content columns, or index anew: SELECT dedup.forget_target(%L).', target);
    ELSE
        PERFORM dedup.check_filenodes(t.target_id);
    END IF;

    SELECT coalesce(max(x.table_id), 0) + 1 INTO id FROM dedup.run_tables AS x WHERE x.run_id = run;
    INSERT INTO dedup.run_tables (run_id, table_id, source, target_id, layout, content_rule, keyless, source_spec, local_options)
    VALUES (run, id, source, t.target_id, table_layout, rule, cardinality(key) = 0, options -> 'source',
        jsonb_strip_nulls(jsonb_build_object('where', options -> 'where', 'transforms', options -> 'transforms')));
    PERFORM dedup.order_tables(run);
    PERFORM dedup.log_event(run, NULL, 'table_added', jsonb_build_object('table_id', id, 'source', source, 'target', target::text, 'content_rule', rule));
    RETURN id;
END $$;
COMMENT ON FUNCTION dedup.add_table(uuid, text, regclass, text[], text[], jsonb) IS 'adds a source and target pair to a run; returns its number';

-- Class of this extension's advisory locks: (class, target) guards one hash index, (class, 0) the list of targets.
CREATE FUNCTION dedup.lock_class() RETURNS int LANGUAGE sql IMMUTABLE AS $$ SELECT 1684366693 $$;
COMMENT ON FUNCTION dedup.lock_class() IS 'first key of this extension''s advisory locks';

-- Entries describe rows of certain files; other files mean TRUNCATE, a rewrite, DROP and CREATE, or a restore.
-- A leaf that was added since is remembered from now on: what the run writes into it is described by entries too.
CREATE FUNCTION dedup.refuse_replaced(target_number int) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    t dedup.targets;
    now_nodes jsonb;
    gone text;
BEGIN
    SELECT * INTO t FROM dedup.targets AS x WHERE x.target_id = target_number;
    now_nodes := dedup.leaf_filenodes(t.target);
    -- A leaf that is gone or has another file invalidates entries.
    SELECT string_agg(coalesce(to_regclass(n.key::oid::regclass::text)::text, n.key), ', ') INTO gone
    FROM jsonb_each_text(t.filenodes) AS n WHERE now_nodes ->> n.key IS DISTINCT FROM n.value;
    IF gone IS NOT NULL THEN
        RAISE EXCEPTION 'the rows of % are not those the hash index describes', t.target USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = format('Truncated, rewritten, detached or restored since: %s.', gone),
            HINT = format('SELECT dedup.reindex_target(%1$L) hashes the rows anew; SELECT dedup.forget_target(%1$L) drops the index.%2$s', t.target,
                (SELECT format(' Before that, give up run %1$s: SELECT dedup.cancel_run(%1$L).', min(r.run_id::text))
                 FROM dedup.run_tables AS x JOIN dedup.runs AS r USING (run_id)
                 WHERE x.target_id = target_number AND r.status IN ('running', 'paused', 'failed') HAVING count(*) > 0));
    END IF;
    RETURN now_nodes;
END $$;
COMMENT ON FUNCTION dedup.refuse_replaced(int) IS 'refuses a target whose rows were replaced behind the hash index; returns its leaves and their files';

CREATE FUNCTION dedup.check_filenodes(target_number int) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    now_nodes jsonb := dedup.refuse_replaced(target_number);
BEGIN
    -- What another transaction has added meanwhile stays: its file is the one that its chunk has seen.
    UPDATE dedup.targets AS x SET filenodes = now_nodes || x.filenodes WHERE x.target_id = target_number AND NOT x.filenodes @> now_nodes;
END $$;
COMMENT ON FUNCTION dedup.check_filenodes(int) IS 'refuses a target whose rows were replaced behind the hash index; remembers new leaves';

-- Parents first. Pairs on a cycle of foreign keys do not wait for each other.
CREATE FUNCTION dedup.order_tables(run uuid) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE edge AS (
        SELECT DISTINCT child.table_id AS child, parent.table_id AS parent
        FROM pg_constraint AS c
        JOIN dedup.targets AS ct ON ct.target = c.conrelid JOIN dedup.targets AS pt ON pt.target = c.confrelid
        JOIN dedup.run_tables AS child ON child.run_id = run AND child.target_id = ct.target_id
        JOIN dedup.run_tables AS parent ON parent.run_id = run AND parent.target_id = pt.target_id
        WHERE c.contype = 'f' AND child.target_id <> parent.target_id
    ), reach AS (
        SELECT child, parent FROM edge
        UNION SELECT reach.child, edge.parent FROM reach JOIN edge ON edge.child = reach.parent
    )
    UPDATE dedup.run_tables AS t
    SET depends_on = ARRAY(SELECT e.parent FROM edge AS e WHERE e.child = t.table_id
                           AND NOT EXISTS (SELECT FROM reach AS back WHERE back.child = e.parent AND back.parent = e.child) ORDER BY 1)
    WHERE t.run_id = run
$$;
COMMENT ON FUNCTION dedup.order_tables(uuid) IS 'records which pairs of a run wait for which, from the targets'' foreign keys';

-- Do the key types of a source order values as the target's do? Only built-in types without a collation are sure to.
CREATE FUNCTION dedup.range_comparable(layout jsonb, source_types text[]) RETURNS bool
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT count(*) > 0 AND count(*) = coalesce(cardinality(source_types), 0)
        AND coalesce(bool_and(ty.oid IS NOT NULL AND ty.typcollation = 0 AND ty.typnamespace = 'pg_catalog'::regnamespace
                              AND ty.oid = to_regtype(source_types[u.n::int])), false)
    FROM jsonb_array_elements_text(layout -> 'key') WITH ORDINALITY AS u(i, n)
    LEFT JOIN pg_type AS ty ON ty.oid = to_regtype(layout #>> ARRAY['columns', u.i, 'type_name'])
$$;
COMMENT ON FUNCTION dedup.range_comparable(jsonb, text[]) IS 'do the source''s key types order values as the target''s do';

CREATE FUNCTION dedup.set_source_spec(run uuid, table_id int, spec jsonb) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE dedup.run_tables AS t
    SET source_spec = spec, range_comparable = dedup.range_comparable(t.layout, ARRAY(SELECT jsonb_array_elements_text(spec -> 'key_types')))
    WHERE t.run_id = run AND t.table_id = set_source_spec.table_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'run % has no table %', run, table_id USING ERRCODE = 'undefined_object';
    END IF;
END $$;
COMMENT ON FUNCTION dedup.set_source_spec(uuid, int, jsonb) IS 'stores how workers read a remote source';

CREATE FUNCTION dedup.add_chunks(run uuid, table_id int, chunks jsonb) RETURNS int
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    -- Locked: planners of one run take turns, and chunk numbers follow each other.
    r dedup.runs := dedup.lock_run(run);
    base int;
    n int;
BEGIN
    IF r.status <> 'created' THEN
        RAISE EXCEPTION 'run % is %', run, r.status USING ERRCODE = 'object_not_in_prerequisite_state',
            HINT = 'Chunks are planned before the first one is leased.';
    END IF;
    IF EXISTS (SELECT FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.table_id = add_chunks.table_id) THEN
        RAISE EXCEPTION 'table % of run % is planned already', table_id, run USING ERRCODE = 'duplicate_object';
    END IF;
    SELECT coalesce(max(chunk_no), 0) INTO base FROM dedup.checkpoints AS c WHERE c.run_id = run;
    INSERT INTO dedup.checkpoints (run_id, chunk_id, chunk_no, table_id, range_kind, range_lower, range_upper, estimated_records, estimated_bytes)
    SELECT run, format('%s:%s', table_id, lpad(u.n::text, 6, '0')), base + u.n, table_id, c ->> 'kind',
        CASE WHEN jsonb_typeof(c -> 'lower') = 'array' THEN ARRAY(SELECT jsonb_array_elements_text(c -> 'lower')) END,
        CASE WHEN jsonb_typeof(c -> 'upper') = 'array' THEN ARRAY(SELECT jsonb_array_elements_text(c -> 'upper')) END,
        (c ->> 'records')::bigint, (c ->> 'bytes')::bigint
    FROM jsonb_array_elements(chunks) WITH ORDINALITY AS u(c, n);
    GET DIAGNOSTICS n = ROW_COUNT;
    RETURN n;
END $$;
COMMENT ON FUNCTION dedup.add_chunks(uuid, int, jsonb) IS 'adds the chunks that a worker planned for a remote source';

CREATE FUNCTION dedup.run_state(run uuid, local bool DEFAULT NULL) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN EXISTS (SELECT FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.status IN ('pending', 'syncing') AND c.written_at IS NULL
                                 AND (local IS NULL OR EXISTS (SELECT FROM dedup.run_tables AS t WHERE t.run_id = run AND t.table_id = c.table_id AND coalesce(t.source_spec ? 'local', false) = local)))
                THEN 'open' ELSE 'finished' END
$$;
COMMENT ON FUNCTION dedup.run_state(uuid, bool) IS 'open while a chunk is left to do, else finished; local: of sources that this database sees itself, or of those that workers read';

-- Rows are taken out of a table by one rollback at a time, and nothing is written there meanwhile.
CREATE FUNCTION dedup.run_rolling_back(target_number int) RETURNS uuid
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT r.run_id FROM dedup.runs AS r
    WHERE r.status = 'rolling_back' AND EXISTS (SELECT FROM dedup.run_tables AS t WHERE t.run_id = r.run_id AND t.target_id = target_number) LIMIT 1
$$;
COMMENT ON FUNCTION dedup.run_rolling_back(int) IS 'the run that is being rolled back from a target, if there is one';

CREATE FUNCTION dedup.set_run_status(run uuid, allowed text[], new_status text, event text) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old text;
BEGIN
    old := (dedup.lock_run(run)).status;
    IF old = new_status THEN
        RETURN old;
    ELSIF old <> ALL (allowed) THEN
        RAISE EXCEPTION 'run % is %', run, old USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = format('Only a run that is %s can become %s.', array_to_string(allowed, ' or '), new_status);
    END IF;
    UPDATE dedup.runs AS r SET status = new_status, started_at = CASE WHEN new_status = 'running' THEN coalesce(started_at, clock_timestamp()) ELSE started_at END,
        running_since = CASE WHEN new_status = 'running' THEN clock_timestamp() END,
        finished_at = CASE WHEN new_status IN ('done', 'failed', 'cancelled') THEN clock_timestamp() WHEN new_status IN ('halted', 'reconciled', 'rolling_back', 'rolled_back') THEN finished_at END,
        -- It begins anew whenever the run ends, unless what a rollback needs is gone.
        bake_in_until = CASE WHEN new_status IN ('done', 'failed', 'cancelled') AND NOT (coalesce(bake_in_until < clock_timestamp(), false)
                AND EXISTS (SELECT FROM dedup.events AS e WHERE e.run_id = run AND e.kind = 'purged' AND e.detail ->> 'what' IN ('before_images', 'history')))
            THEN clock_timestamp() + make_interval(days => coalesce((options #>> '{settings,bake_in_days}')::int, 14)) ELSE bake_in_until END
    WHERE r.run_id = run;
    PERFORM dedup.log_event(run, NULL, event, jsonb_build_object('from', old, 'to', new_status));
    RETURN new_status;
END $$;
COMMENT ON FUNCTION dedup.set_run_status(uuid, text[], text, text) IS 'moves a run from one status to another and logs it';

-- What may differ from how a run was created.
CREATE FUNCTION dedup.change_settings(run uuid, changes jsonb) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.lock_run(run);
    settings jsonb := coalesce(r.options -> 'settings', '{}');
BEGIN
    UPDATE dedup.runs AS x SET options = r.options || jsonb_build_object('settings', settings || jsonb_build_object(
        'throttle', coalesce(settings -> 'throttle', '{}') || coalesce(changes -> 'throttle', '{}'),
        'alerts', coalesce(settings -> 'alerts', '{}') || coalesce(changes -> 'alerts', '{}')))
    WHERE x.run_id = run;
    PERFORM dedup.log_event(run, NULL, 'settings_changed', changes);
END $$;
COMMENT ON FUNCTION dedup.change_settings(uuid, jsonb) IS 'changes what a run is throttled by and raises alerts about: {"throttle": {…}, "alerts": {…}}';

CREATE FUNCTION dedup.pause_run(run uuid) RETURNS text LANGUAGE sql SET search_path = pg_catalog, pg_temp
AS $$ SELECT dedup.set_run_status(run, '{created,running}', 'paused', 'run_paused') $$;
COMMENT ON FUNCTION dedup.pause_run(uuid) IS 'no further chunk is leased until resume_run; chunks in flight end';

CREATE FUNCTION dedup.resume_run(run uuid) RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dedup.set_run_status(run, '{created,paused,failed}', 'running', 'run_resumed');
    UPDATE dedup.checkpoints AS c SET status = 'pending', attempts = 0, not_before = NULL WHERE c.run_id = run AND c.status = 'failed';
    RETURN 'running';
END $$;
COMMENT ON FUNCTION dedup.resume_run(uuid) IS 'goes on with a paused or failed run; failed chunks are tried again';

CREATE FUNCTION dedup.cancel_run(run uuid) RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    late int;
BEGIN
    PERFORM dedup.set_run_status(run, '{created,running,paused,failed}', 'cancelled', 'run_cancelled');
    -- What was written stays and is believed: so it is verified now. Chunks in flight are waited for.
    FOR late IN SELECT t.table_id FROM dedup.run_tables AS t JOIN dedup.runs AS r USING (run_id)
                WHERE t.run_id = run AND (t.keyless OR r.options ->> 'verify' = 'end') LOOP
        BEGIN
            PERFORM dedup.verify_written(run, late, true);
        EXCEPTION WHEN object_not_in_prerequisite_state THEN
            -- The target's rows were replaced: nothing of its index is believed before it is made anew.
            PERFORM dedup.log_event(run, NULL, 'not_verified', jsonb_build_object('table_id', late, 'message', SQLERRM));
        END;
    END LOOP;
    PERFORM dedup.reopen_orphans(run);
    DELETE FROM dedup.pass_keys AS k WHERE k.run_id = run;
    RETURN 'cancelled';
END $$;
COMMENT ON FUNCTION dedup.cancel_run(uuid) IS 'gives a run up; what it has written is verified and stays, and runs whose dropped duplicates lost their survivor to it are reopened';
