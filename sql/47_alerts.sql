-- What somebody has to look at now. docs/operations.md has the alerts and what to do about each.

-- Conditions that hold now. Nothing here writes.
CREATE FUNCTION dedup.alert_conditions(run uuid, OUT kind text, OUT severity text, OUT value float8, OUT threshold float8, OUT message text, OUT look_at text)
RETURNS SETOF record LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs := dedup.run_row(run);
    settings jsonb := coalesce(r.options #> '{settings,alerts}', '{}');
    s dedup.slis;
    is_settled bool := r.running_since < clock_timestamp() - interval '1 min';
    is_open bool := dedup.run_state(run) = 'open';
    is_late bool;
    attempts record;
    silence record;
    place record;
    here record;
BEGIN
    SELECT * INTO s FROM dedup.slis AS x WHERE x.run_id = run;

    kind := 'mismatches'; severity := 'P1'; value := s.reconciliation_mismatch_count; threshold := 0;
    IF r.status = 'halted' THEN
        message := format('%s records or rows differ between source and target: the run is halted', value);
        look_at := format('SELECT kind, key, chunk_id FROM dedup.divergences WHERE run_id = %L AND state = ''open''; then repair or roll back', run);
        RETURN NEXT;
    END IF;

    kind := 'disk_full'; severity := 'P1'; value := NULL; threshold := NULL;
    IF r.status = 'paused' AND EXISTS (SELECT FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.status IN ('pending', 'failed') AND c.error_sqlstate = '53100') THEN
        message := 'the target''s disk is full: the run is paused';
        look_at := format('SELECT * FROM dedup.disk_space(); make room, then SELECT dedup.resume_run(%L)', run);
        RETURN NEXT;
    END IF;

    -- A repair or a rollback is told of, too, and goes on: it may be what makes room.
    kind := 'disk_headroom'; severity := 'P1';
    IF r.status IN ('running', 'paused', 'halted', 'rolling_back') THEN
        BEGIN
            FOR place IN SELECT d.place, d.free_bytes, f.least_bytes
                         FROM dedup.disk_space() AS d CROSS JOIN LATERAL (SELECT coalesce((settings ->> 'disk_floor')::bigint, least(10000000000, d.total_bytes / 50)) AS least_bytes) AS f
                         WHERE d.free_bytes < f.least_bytes ORDER BY d.free_bytes LIMIT 1 LOOP
                value := place.free_bytes; threshold := place.least_bytes;
                message := format('%s has %s free%s', place.place, pg_size_pretty(place.free_bytes), CASE WHEN r.status IN ('running', 'paused') THEN ': no further chunk is begun' END);
                look_at := format('SELECT * FROM dedup.disk_space(); make room%s', CASE WHEN r.status IN ('running', 'paused') THEN format(', then SELECT dedup.resume_run(%L)', run) END);
                RETURN NEXT;
            END LOOP;
        EXCEPTION WHEN OTHERS THEN
            kind := 'disk_unknown'; value := NULL; threshold := NULL;
            message := format('the room on the target''s disks can''t be read: %s', SQLERRM); look_at := 'SELECT * FROM dedup.disk_space()';
            RETURN NEXT;
        END;
    END IF;

    kind := 'throughput'; severity := 'P1';
    value := s.migration_throughput_gbps * 450; threshold := coalesce((settings ->> 'min_throughput')::float8, 100e9) / 1e9;
    SELECT * INTO here FROM dedup.local_chunks(run);
    -- What a session migrates itself counts when its chunk is done: it is not slow before the largest of them would be.
    IF r.status = 'running' AND is_settled AND is_open AND value < threshold
        AND (here.sessions = 0 OR extract(epoch FROM clock_timestamp() - here.since) > 60 + 3.6e-6 / threshold * (
            SELECT coalesce(max(c.estimated_bytes), 0) FROM dedup.checkpoints AS c JOIN dedup.run_tables AS t USING (run_id, table_id)
            WHERE c.run_id = run AND c.status = 'pending' AND t.source_spec ? 'local')) THEN
        message := format('%s GB an hour over the last minute; %s are wanted', round(value::numeric, 1), round(threshold::numeric, 1));
        look_at := format('SELECT state, reason, cap FROM dedup.throttle WHERE run_id = %L; then the timings of the last chunks in dedup.checkpoints', run);
        RETURN NEXT;
    END IF;

    kind := 'deadline'; severity := 'P1'; value := extract(epoch FROM s.eta);
    threshold := CASE WHEN s.deadline IS NOT NULL THEN greatest(0, extract(epoch FROM s.deadline - clock_timestamp())) END;
    -- While nothing is read nobody knows how long it takes. What was late before is late as long as that is so.
    is_late := r.status = 'running' AND is_settled AND is_open AND (value > threshold OR value IS NULL AND threshold IS NOT NULL)
        OR r.status IN ('running', 'paused', 'failed') AND value IS NULL AND threshold IS NOT NULL
            AND EXISTS (SELECT FROM dedup.alert_log AS a WHERE a.run_id = run AND a.kind = 'deadline' AND a.cleared_at IS NULL);
    IF r.status IN ('created', 'running', 'paused', 'failed') AND clock_timestamp() > s.deadline OR is_late THEN
        message := CASE WHEN threshold = 0 THEN format('it was to be done by %s', s.deadline)
                        WHEN value IS NULL THEN format('nothing is read, and it is to be done in %s', dedup.rough(threshold))
                        ELSE format('it will take %s more, and is to be done in %s', dedup.rough(value), dedup.rough(threshold)) END;
        look_at := format('SELECT * FROM dedup.slis WHERE run_id = %L; more workers, or a higher rate, if source and target bear it', run);
        RETURN NEXT;
    END IF;

    kind := 'chunk_failures'; severity := 'P2';
    SELECT * INTO attempts FROM dedup.chunk_attempts(run);
    value := s.chunk_failure_rate; threshold := coalesce((settings ->> 'failure_rate')::float8, 0.05);
    IF r.status IN ('running', 'paused', 'failed') AND attempts.failed >= 2 AND value > threshold THEN
        message := format('%s of %s attempts at chunks failed in the last ten minutes', attempts.failed, attempts.ended);
        look_at := format('SELECT chunk_id, detail FROM dedup.events WHERE run_id = %L AND kind IN (''chunk_failed'', ''chunk_retried'', ''lease_expired'') ORDER BY at DESC LIMIT 20', run);
        RETURN NEXT;
    END IF;

    kind := 'failing'; severity := 'P1'; threshold := coalesce((settings ->> 'failure_limit')::float8, 0.5);
    IF r.status IN ('running', 'paused') AND attempts.failed >= 10 AND value > threshold THEN
        message := format('%s of %s attempts at chunks failed in the last ten minutes: no further chunk is begun', attempts.failed, attempts.ended);
        look_at := format('SELECT chunk_id, detail FROM dedup.events WHERE run_id = %L AND kind IN (''chunk_failed'', ''chunk_retried'') ORDER BY at DESC LIMIT 20; then SELECT dedup.resume_run(%L)', run, run);
        RETURN NEXT;
    ELSIF r.status = 'paused' THEN
        -- As long as it rests for that, however long ago it was.
        SELECT a.value, a.message, a.look_at INTO value, message, look_at FROM dedup.alert_log AS a WHERE a.run_id = run AND a.kind = 'failing' AND a.cleared_at IS NULL;
        IF FOUND THEN
            RETURN NEXT;
        END IF;
    END IF;

    kind := 'failed'; severity := 'P1'; threshold := NULL;
    IF r.status = 'failed' THEN
        SELECT count(*) INTO value FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.status = 'failed';
        message := format('the run ended with %s failed chunks', value);
        look_at := format('SELECT chunk_id, error_sqlstate, error_message, error_hint FROM dedup.checkpoints WHERE run_id = %L AND status = ''failed''; then resume the run', run);
        RETURN NEXT;
    END IF;

    kind := 'worker_lost'; severity := 'P2';
    SELECT * INTO silence FROM dedup.silent_leases(run);
    value := silence.silent_seconds; threshold := NULL;
    IF r.status = 'running' AND silence.chunks > 0 THEN
        message := format('a worker gave no sign of life for %s s; its chunks go to others in %s s', round(value::numeric), ceil(silence.seconds_left));
        look_at := format('SELECT worker_id, heartbeat_at, info FROM dedup.workers WHERE run_id = %L ORDER BY heartbeat_at', run);
        RETURN NEXT;
    ELSIF r.status = 'running' AND is_settled AND is_open AND here.sessions = 0 THEN
        value := extract(epoch FROM clock_timestamp() - greatest((SELECT max(w.heartbeat_at) FROM dedup.workers AS w WHERE w.run_id = run), (SELECT max(p.reported_at) FROM dedup.processes AS p WHERE p.run_id = run),
                     (SELECT max(c.leased_at) FROM dedup.checkpoints AS c WHERE c.run_id = run AND c.status = 'syncing')));
        IF coalesce(value, 61) > 60 THEN
            message := 'nobody works on the run';
            look_at := format('pg-dedup-migrate work %s, or CALL dedup.migrate_run(%L) for sources that the target database sees', run, run);
            RETURN NEXT;
        END IF;
    END IF;

    kind := 'filter_overfull'; severity := 'P2'; threshold := 0.01;
    IF r.status IN ('running', 'paused') THEN
        SELECT f.predicted_false_positive_rate INTO value FROM dedup.filter_stats() AS f WHERE f.warm;
        IF value > threshold THEN
            message := format('the filter is too small: it sends %s %% of new contents to the index', round((value * 100)::numeric, 1));
            look_at := 'SELECT * FROM dedup.filter_stats(); raise pg_dedup_migrate.filter_size and restart the server when it suits';
            RETURN NEXT;
        END IF;
    END IF;
END $$;
COMMENT ON FUNCTION dedup.alert_conditions(uuid) IS 'what is wrong with a run now';

CREATE FUNCTION dedup.rough(seconds float8) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$ SELECT make_interval(secs => ceil(seconds))::text $$;
COMMENT ON FUNCTION dedup.rough(float8) IS 'a duration in whole seconds';

-- Brings dedup.alerts up to date and tells who listens. What endangers the target or goes nowhere pauses the run.
CREATE FUNCTION dedup.check_alerts(run uuid DEFAULT NULL, unless_within interval DEFAULT '0 s') RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r dedup.runs;
    seen record;
    firing bigint := 0;
    kinds text[];
    conditions jsonb;
    failure text;
BEGIN
    FOR r IN SELECT * FROM dedup.runs AS x WHERE (check_alerts.run IS NULL OR x.run_id = check_alerts.run)
             AND (x.status IN ('created', 'running', 'paused', 'failed', 'halted', 'rolling_back') OR EXISTS (SELECT FROM dedup.alert_log AS a WHERE a.run_id = x.run_id AND a.cleared_at IS NULL))
             AND (x.checked_at IS NULL OR x.checked_at <= clock_timestamp() - unless_within)
             -- One at a time, and nobody waits: whoever holds it checks, or changes what there is to check.
             FOR NO KEY UPDATE SKIP LOCKED LOOP
        kinds := '{}';
        UPDATE dedup.runs AS x SET checked_at = clock_timestamp() WHERE x.run_id = r.run_id;
        -- What can't be looked at of one run must not hide the others.
        conditions := NULL;
        BEGIN
            SELECT coalesce(jsonb_agg(to_jsonb(a)), '[]') INTO conditions FROM dedup.alert_conditions(r.run_id) AS a;
        EXCEPTION WHEN OTHERS THEN
            failure := SQLERRM;
        END;
        FOR seen IN SELECT * FROM jsonb_to_recordset(coalesce(conditions, jsonb_build_array(jsonb_build_object('kind', 'unchecked', 'severity', 'P1',
                        'message', format('the run can''t be checked: %s', failure), 'look_at', format('SELECT * FROM dedup.alert_conditions(%L)', r.run_id)))))
                        AS c(kind text, severity text, value float8, threshold float8, message text, look_at text) LOOP
            kinds := kinds || seen.kind;
            UPDATE dedup.alert_log AS a SET value = seen.value, threshold = seen.threshold, message = seen.message, look_at = seen.look_at
            WHERE a.run_id = r.run_id AND a.kind = seen.kind AND a.cleared_at IS NULL;
            CONTINUE WHEN FOUND;
            INSERT INTO dedup.alert_log (run_id, kind, severity, value, threshold, message, look_at)
            VALUES (r.run_id, seen.kind, seen.severity, seen.value, seen.threshold, seen.message, seen.look_at);
            PERFORM dedup.log_event(r.run_id, NULL, 'alert_raised', to_jsonb(seen));
            PERFORM dedup.tell_alert(r.run_id, seen.kind, seen.severity, 'firing', seen.message);
        END LOOP;
        FOR seen IN UPDATE dedup.alert_log AS a SET cleared_at = clock_timestamp() WHERE a.run_id = r.run_id AND a.cleared_at IS NULL AND a.kind <> ALL (kinds) AND conditions IS NOT NULL RETURNING a.* LOOP
            PERFORM dedup.log_event(r.run_id, NULL, 'alert_cleared', jsonb_build_object('kind', seen.kind, 'since', seen.since));
            PERFORM dedup.tell_alert(r.run_id, seen.kind, seen.severity, 'cleared', seen.message);
        END LOOP;
        IF r.status = 'running' AND kinds && '{disk_headroom,failing}' THEN
            PERFORM dedup.set_run_status(r.run_id, '{running}', 'paused', 'run_stopped');
        END IF;
        firing := firing + cardinality(kinds);
    END LOOP;
    RETURN firing;
END $$;
COMMENT ON FUNCTION dedup.check_alerts(uuid, interval) IS 'brings dedup.alerts up to date for a run, or all, unless somebody has a moment ago, and notifies channel dedup_alerts of changes; pauses a run whose target runs out of disk or whose chunks keep failing; workers call it every few seconds, cron may; returns how many fire';

CREATE FUNCTION dedup.tell_alert(run uuid, kind text, severity text, state text, message text) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp
AS $$ SELECT pg_notify('dedup_alerts', jsonb_build_object('run_id', run, 'kind', kind, 'severity', severity, 'state', state, 'message', left(message, 2000))::text) $$;
COMMENT ON FUNCTION dedup.tell_alert(uuid, text, text, text, text) IS 'tells who listens on dedup_alerts';

CREATE VIEW dedup.alerts AS
SELECT a.severity, a.kind, a.run_id, r.name, a.since, a.message, a.look_at, a.value, a.threshold
FROM dedup.alert_log AS a JOIN dedup.runs AS r USING (run_id) WHERE a.cleared_at IS NULL;
COMMENT ON VIEW dedup.alerts IS 'alerts that fire, as dedup.check_alerts last found them';
COMMENT ON COLUMN dedup.alerts.severity IS 'P1 (now) or P2 (today)';
COMMENT ON COLUMN dedup.alerts.kind IS 'mismatches, disk_full, disk_headroom, disk_unknown, throughput, deadline, failed, failing, chunk_failures, worker_lost, filter_overfull or unchecked';
COMMENT ON COLUMN dedup.alerts.run_id IS 'the run';
COMMENT ON COLUMN dedup.alerts.name IS 'its name';
COMMENT ON COLUMN dedup.alerts.since IS 'when it was first seen';
COMMENT ON COLUMN dedup.alerts.message IS 'what is wrong';
COMMENT ON COLUMN dedup.alerts.look_at IS 'what to look at first';
COMMENT ON COLUMN dedup.alerts.value IS 'what was measured';
COMMENT ON COLUMN dedup.alerts.threshold IS 'what it is held against';
