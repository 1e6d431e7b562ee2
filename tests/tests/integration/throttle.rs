//! The throttle: a cap from psql, limits that all processes share, signals that slow a run and let it go again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use integration::pair::{DATABASE, Pair};
use integration::sidecar::exit;

/// About 12 MB in 120,000 records.
async fn loaded() -> Pair {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO public.items SELECT n, repeat(md5(n::text), 2) || n FROM generate_series(1, 120000) AS n; ANALYZE public.items").await;
    pair
}

/// `dedup.set_rate` is one cap for all processes, and for the target database's own chunks.
#[tokio::test(flavor = "multi_thread")]
async fn a_cap_is_shared() {
    let pair = loaded().await;
    let db = &pair.target;
    let first = pair.run(&["public.items"]).args(&["--max-rate", "1MB"]).chunk_size("200kB").spawn();
    db.wait_until("EXISTS (SELECT FROM dedup.checkpoints WHERE status = 'verified')").await;
    let run: String = db.one("SELECT run_id::text FROM dedup.runs").await;
    let second = pair.sidecar("work").arg(&run).spawn();
    db.wait_until("(SELECT count(*) FROM dedup.processes WHERE reported_at > now() - interval '2 s') = 2")
        .await;
    let bytes =
        "SELECT coalesce(sum(source_bytes), 0)::int8 FROM dedup.checkpoints WHERE status = 'verified'";
    let read_in_4_seconds = async || {
        let (before, began) = (db.one::<i64>(bytes).await, Instant::now());
        tokio::time::sleep(Duration::from_secs(4)).await;
        (db.one::<i64>(bytes).await - before) as f64 / began.elapsed().as_secs_f64()
    };
    let capped = read_in_4_seconds().await;
    assert!((0.4e6..1.5e6).contains(&capped), "{capped} bytes a second at a cap of 1 MB");
    // Lower, by a DBA: it takes effect within two seconds.
    db.exec(&format!("SELECT dedup.set_rate('{run}', 250000)")).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let lower = read_in_4_seconds().await;
    assert!(lower < 0.5e6, "{lower} bytes a second at a cap of 0.25 MB");
    assert_eq!(db.one::<i64>("SELECT cap FROM dedup.throttle").await, 250_000);
    for (bad, state) in [("0", "22023"), ("-5", "22023")] {
        assert_eq!(db.fails(&format!("SELECT dedup.set_rate('{run}', {bad})")).await.0, state);
    }
    db.exec(&format!("SELECT dedup.set_rate('{run}', NULL); UPDATE dedup.runs SET options = options #- '{{settings,throttle,max_rate}}'")).await;
    for process in [first, second] {
        let output = process.finish().await;
        assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
    }
    // Passes over the run keep to its rate, too.
    db.exec(&format!("SELECT dedup.set_rate('{run}', 4000000)")).await;
    let began = Instant::now();
    pair.reconcile().exits(exit::DONE).await;
    assert!(began.elapsed() > Duration::from_secs(2), "{:?} for 12 MB at 4 MB/s", began.elapsed());
    let began = Instant::now();
    pair.rollback("last").exits(exit::DONE).await;
    assert!(began.elapsed() > Duration::from_millis(1500), "{:?} for 12 MB at 4 MB/s", began.elapsed());
}

/// A run of sources that the target database reads itself keeps to its cap.
#[tokio::test(flavor = "multi_thread")]
async fn a_cap_in_sql() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec("CREATE TABLE s (id int PRIMARY KEY, body text); CREATE TABLE t (LIKE s INCLUDING ALL); INSERT INTO s SELECT n, repeat('x', 90) || n FROM generate_series(1, 20000) AS n").await;
    let run: String = db.one("SELECT dedup.create_run('local')::text").await;
    db.exec(&format!("SELECT dedup.add_table('{run}', 'public.s', 't'), dedup.plan_chunks('{run}', 200000), dedup.set_rate('{run}', 1000000)")).await;
    let began = Instant::now();
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert!(began.elapsed() > Duration::from_millis(1500), "{:?} for 2 MB at 1 MB/s", began.elapsed());
}

/// A cap that is lifted is none for those either who were waiting by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_cap_that_is_lifted() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.wide (id int PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO public.wide SELECT n, repeat(md5(n::text), 4000) FROM generate_series(1, 20) AS n; ANALYZE public.wide").await;
    let running = pair.run(&["public.wide"]).args(&["--max-rate", "1kB"]).spawn();
    db.wait_until("EXISTS (SELECT FROM dedup.processes WHERE read_bytes > 0)").await;
    let began = Instant::now();
    db.exec("SELECT dedup.set_rate(run_id, 100000000) FROM dedup.runs").await;
    let output = running.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
    assert!(
        began.elapsed() < Duration::from_secs(30),
        "{:?}: one record is two minutes at 1 kB/s",
        began.elapsed()
    );
}

/// Beside a load on both servers a run begins gently, moves, and is let go.
#[tokio::test(flavor = "multi_thread")]
async fn beside_a_load_generator() {
    let pair = Arc::new(loaded().await);
    let db = &pair.target;
    // Who looks on is nobody to be spared.
    pair.both("SET application_name = 'pg-dedup-migrate/test'").await;
    for cluster in [&pair.source_cluster, &pair.target_cluster] {
        cluster.program("pgbench", &["-i", "-q", DATABASE]);
    }
    let load = ["-S", "-N"].map(|script| {
        let pair = pair.clone();
        tokio::task::spawn_blocking(move || {
            let cluster = if script == "-S" { &pair.source_cluster } else { &pair.target_cluster };
            cluster.program("pgbench", &["-n", script, "-c", "2", "-R", "50", "-T", "12", DATABASE]);
        })
    });
    db.wait_until("EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'pgbench' AND state_change > now() - interval '1 s')").await;
    let flags = ["--min-rate", "50kB", "--max-rate", "400kB"];
    let mut running =
        pair.throttled_run(&["public.items"]).args(&flags).chunk_size("10kB").workers(2).spawn();
    running.wait_for("others are at work").await;
    db.wait_until("EXISTS (SELECT FROM dedup.checkpoints WHERE status = 'verified') AND (SELECT state FROM dedup.throttle) <> 'free'").await;
    for load in load {
        load.await.unwrap();
    }
    running.wait_for("as fast as it goes again").await;
    db.exec("UPDATE dedup.runs SET options = options #- '{settings,throttle,max_rate}'").await;
    let output = running.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
}

/// Paused, no chunk is begun two seconds later; resumed, one is.
#[tokio::test(flavor = "multi_thread")]
async fn paused_and_resumed() {
    let pair = loaded().await;
    let db = &pair.target;
    let running = pair.run(&["public.items"]).args(&["--max-rate", "1MB"]).chunk_size("100kB").spawn();
    db.wait_until("EXISTS (SELECT FROM dedup.checkpoints WHERE status = 'verified')").await;
    let run: String = db.one("SELECT run_id::text FROM dedup.runs").await;
    db.exec(&format!("SELECT dedup.pause_run('{run}')")).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let leased = "SELECT coalesce(max(leased_at)::text, '') FROM dedup.checkpoints";
    let before: String = db.one(leased).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(db.one::<String>(leased).await, before, "a chunk was leased while the run was paused");
    db.exec(&format!("SELECT dedup.resume_run('{run}'), dedup.set_rate('{run}', NULL); UPDATE dedup.runs SET options = options #- '{{settings,throttle,max_rate}}'")).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_ne!(db.one::<String>(leased).await, before, "no chunk was leased after the run was resumed");
    assert_eq!(running.finish().await.code, Some(exit::DONE));
}

/// A role that may not see other sessions counts them all the same; who is not the owner does not decide by the owner's query.
#[tokio::test(flavor = "multi_thread")]
async fn what_may_not_be_seen() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec("CREATE ROLE loader LOGIN; GRANT USAGE ON SCHEMA dedup TO loader; GRANT EXECUTE ON ALL ROUTINES IN SCHEMA dedup TO loader; \
        GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA dedup TO loader; CREATE TABLE public.items (id int PRIMARY KEY)").await;
    let other = pair.target_again().await;
    other.exec("SELECT 1").await;
    db.exec("SET ROLE loader").await;
    let hidden: String = db.one("SELECT dedup.other_sessions()::text").await;
    assert!(hidden.contains("pg_read_all_stats"), "{hidden}");
    db.exec("RESET ROLE").await;
    let seen: i32 = db.one("SELECT dedup.other_sessions()::text::int").await;
    assert!(seen >= 1, "{seen} sessions");
    let run: String = db
        .one("SELECT dedup.create_run('asks', '{\"settings\": {\"throttle\": {\"query\": \"SELECT 1\"}}}')::text")
        .await;
    let turn =
        format!("SELECT turn IS NOT NULL FROM dedup.throttle_report('{run}', gen_random_uuid(), 1, 0, 0)");
    // The first turn is anybody's, the next one the owner's, until it is clear that none comes.
    assert!(db.one::<bool>(&turn).await);
    let ago = async |seconds: i32| {
        let set = format!(
            "UPDATE dedup.throttle SET turn_ends = NULL, decided_at = clock_timestamp() - interval '{seconds} s'"
        );
        db.exec(&set).await;
    };
    for (role, seconds, is_turn) in [("loader", 2, false), ("postgres", 2, true), ("loader", 6, true)] {
        ago(seconds).await;
        db.exec(&format!("SET ROLE {role}")).await;
        assert_eq!(db.one::<bool>(&turn).await, is_turn, "{role}, {seconds} s");
        // Whoever has the turn has time to decide.
        assert!(!db.one::<bool>(&turn).await);
        db.exec("RESET ROLE").await;
    }
    // Where nobody decides any more nobody knows what is borne.
    ago(20).await;
    let allowed = turn.replace("turn IS NOT NULL", "allowed || ' ' || reason");
    let told: String = db.one(&allowed).await;
    assert!(told.starts_with("1000000 nobody has decided"), "{told}");
    db.exec(&format!("UPDATE dedup.throttle SET byte_rate = 1000, active_chunks = 1 WHERE run_id = '{run}'"))
        .await;
    assert_eq!(db.one::<Option<f64>>(&format!("SELECT dedup.allowed_rate('{run}')")).await, Some(1000.0));
    db.exec("UPDATE dedup.throttle SET decided_at = decided_at - interval '2 min'").await;
    assert_eq!(db.one::<Option<f64>>(&format!("SELECT dedup.allowed_rate('{run}')")).await, None);
}

/// A query of the user's slows the run to its least rate and says why; when it is content again, the run is let go.
#[tokio::test(flavor = "multi_thread")]
async fn a_query_slows_the_run() {
    let pair = loaded().await;
    let db = &pair.target;
    // Not somebody to be spared: how busy the machine of the tests is decides about nothing.
    db.exec("SET application_name = 'pg-dedup-migrate/test'; CREATE TABLE public.busy (busy int); INSERT INTO public.busy VALUES (0)").await;
    let flags =
        ["--throttle-query", "SELECT busy FROM public.busy", "--min-rate", "100kB", "--max-rate", "500kB"];
    let mut running =
        pair.throttled_run(&["public.items"]).args(&flags).chunk_size("100kB").workers(4).spawn();
    db.wait_until("EXISTS (SELECT FROM dedup.checkpoints WHERE status = 'verified')").await;
    db.exec("UPDATE public.busy SET busy = 1").await;
    running.wait_for("slowed to").await;
    // A snapshot of somebody's on the source is looked at, by its age in time and in transactions.
    pair.source.exec("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM public.items LIMIT 1").await;
    db.wait_until("EXISTS (SELECT FROM dedup.throttle WHERE (signals ->> 'snapshot_age')::float8 > 0 AND (signals ->> 'xmin_age')::float8 < 0.5)").await;
    pair.source.exec("COMMIT").await;
    db.wait_until("EXISTS (SELECT FROM dedup.throttle WHERE byte_rate = 100000 AND active_chunks = 1 AND state = 'slowed' AND reason LIKE '%the throttle query says 1%')").await;
    // One chunk at a time.
    let most: i64 = db.one("SELECT count(*) FROM dedup.checkpoints WHERE status = 'syncing' AND leased_at > (SELECT changed_at FROM dedup.throttle)").await;
    assert!(most <= 1, "{most} chunks in work");
    // What can't be read is bad.
    db.exec("ALTER TABLE public.busy RENAME TO gone; UPDATE public.gone SET busy = 0").await;
    db.wait_until(
        "EXISTS (SELECT FROM dedup.throttle WHERE state = 'slowed' AND reason LIKE '%query can''t be read%')",
    )
    .await;
    db.exec("ALTER TABLE public.gone RENAME TO busy").await;
    db.wait_until("EXISTS (SELECT FROM dedup.throttle WHERE state = 'recovering')").await;
    db.wait_until("EXISTS (SELECT FROM dedup.throttle WHERE state = 'free' AND byte_rate IS NULL AND active_chunks IS NULL)").await;
    let events =
        db.column("SELECT kind FROM dedup.events WHERE kind LIKE 'throttle%' ORDER BY event_id").await;
    assert_eq!(events, ["throttle_began", "throttle_ended"]);
    db.exec("UPDATE dedup.runs SET options = options #- '{settings,throttle,max_rate}'").await;
    let output = running.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
    output.says("as fast as it goes again");
}

/// A session that migrates by itself looks at the target between its chunks: it is slowed, says why, and is let go again.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_migrates_by_itself() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "SET application_name = 'pg-dedup-migrate/test'; CREATE TABLE public.busy (busy int); INSERT INTO public.busy VALUES (1); \
         CREATE TABLE public.raw (id int PRIMARY KEY, body text); CREATE TABLE public.items (LIKE public.raw INCLUDING ALL); \
         INSERT INTO public.raw SELECT n, repeat(md5(n::text), 2) || n FROM generate_series(1, 60000) AS n",
    )
    .await;
    let settings =
        r#"{"settings": {"throttle": {"query": "SELECT busy FROM public.busy", "min_rate": 200000}}}"#;
    let run: String = db.one(&format!("SELECT dedup.create_run('here', '{settings}')::text")).await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.raw', 'public.items'), dedup.plan_chunks('{run}', 50000)"
    ))
    .await;
    let verified = "SELECT count(*) FROM dedup.checkpoints WHERE status = 'verified'";
    let sessions: Vec<_> = futures_util::future::join_all((0..2).map(|_| pair.target_again())).await;
    let calls = sessions.into_iter().map(|session| {
        let call = format!("CALL dedup.migrate_run('{run}')");
        tokio::spawn(async move {
            session.exec("SET application_name = 'pg-dedup-migrate/test'").await;
            session.exec(&call).await;
        })
    });
    let calls: Vec<_> = calls.collect();
    db.wait_until("EXISTS (SELECT FROM dedup.throttle WHERE byte_rate = 200000 AND state = 'slowed' AND reason = 'the throttle query says 1')").await;
    db.wait_until(&format!("({verified}) >= 4")).await;
    // Both together keep to it: four chunks a second, and less, since they rest within chunks, too.
    let (before, began) = (db.one::<i64>(verified).await, Instant::now());
    tokio::time::sleep(Duration::from_secs(4)).await;
    let chunks = (db.one::<i64>(verified).await - before) as f64 / began.elapsed().as_secs_f64();
    assert!((0.2..7.0).contains(&chunks), "{chunks} chunks a second");
    db.exec("UPDATE public.busy SET busy = 0").await;
    db.wait_until("EXISTS (SELECT FROM dedup.throttle WHERE byte_rate > 200000 OR byte_rate IS NULL)").await;
    for call in calls {
        call.await.expect("the session migrates");
    }
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.items").await, 60_000);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.processes").await, 0);
}

/// Nothing is bad before it was asked for: a run between quiet servers is not slowed when it begins.
#[tokio::test(flavor = "multi_thread")]
async fn not_slowed_before_signals_are_there() {
    let pair = loaded().await;
    let output = pair.throttled_run(&["public.items"]).exits(exit::DONE).await;
    assert!(!output.describe().contains("can't be read"), "{}", output.describe());
}

/// What a slot whose standby is away keeps of the WAL is a signal, as a part of the disk's room.
#[tokio::test(flavor = "multi_thread")]
async fn wal_that_slots_keep() {
    let pair = Pair::start().await;
    let db = &pair.target;
    let kept = "SELECT dedup.wal_kept()::float8";
    assert_eq!(db.one::<f64>(kept).await, 0.0);
    db.exec("SELECT pg_create_physical_replication_slot('away', true); CREATE TABLE public.much AS SELECT repeat('x', 1000) FROM generate_series(1, 20000)").await;
    let now: f64 = db.one(kept).await;
    assert!(now > 0.0 && now < 0.5, "{now}");
    let told: f64 =
        db.one("SELECT (dedup.target_signals(dedup.create_run('r')) ->> 'wal_kept')::float8").await;
    assert!(told >= now, "{told}");
}

/// Several processes, and a query that takes longer than a turn: it is decided all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_query_that_takes_long() {
    let pair = loaded().await;
    let db = &pair.target;
    db.exec("SET application_name = 'pg-dedup-migrate/test'; CREATE TABLE public.busy (busy int); INSERT INTO public.busy VALUES (0)").await;
    let flags = [
        "--throttle-query",
        "SELECT busy FROM public.busy, pg_sleep(1.5)",
        "--min-rate",
        "50kB",
        "--max-rate",
        "200kB",
    ];
    let first = pair.throttled_run(&["public.items"]).args(&flags).chunk_size("20kB").spawn();
    db.wait_until("EXISTS (SELECT FROM dedup.checkpoints WHERE status = 'verified')").await;
    let run: String = db.one("SELECT run_id::text FROM dedup.runs").await;
    let others: Vec<_> = (0..2).map(|_| pair.sidecar("work").arg(&run).spawn()).collect();
    db.wait_until("(SELECT count(*) FROM dedup.processes WHERE reported_at > now() - interval '2 s') = 3")
        .await;
    db.exec("UPDATE public.busy SET busy = 1").await;
    db.wait_until("EXISTS (SELECT FROM dedup.throttle WHERE state = 'slowed' AND byte_rate = 50000)").await;
    db.exec(
        "UPDATE public.busy SET busy = 0; UPDATE dedup.runs SET options = options #- '{settings,throttle}'",
    )
    .await;
    for process in [first].into_iter().chain(others) {
        let output = process.finish().await;
        assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
    }
}

/// A standby that does not answer holds commits up: that is bad, and does not stop deciding, nor a new cap, nor signs of life.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_does_not_answer() {
    let pair = loaded().await;
    let db = &pair.target;
    let flags = ["--max-rate", "1MB", "--min-rate", "100kB"];
    let mut running = pair.throttled_run(&["public.items"]).args(&flags).chunk_size("100kB").spawn();
    db.wait_until("EXISTS (SELECT FROM dedup.checkpoints WHERE status = 'verified')").await;
    db.exec("SET synchronous_commit = local").await;
    let standbys = async |names: &str| {
        db.exec(&format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'")).await;
        db.exec("SELECT pg_reload_conf()").await;
    };
    standbys("nobody").await;
    db.wait_until(
        "EXISTS (SELECT FROM dedup.throttle WHERE state = 'slowed' AND reason LIKE '%no answer within 5 s%')",
    )
    .await;
    db.exec("SELECT dedup.set_rate(run_id, 70000) FROM dedup.runs").await;
    running.wait_for("slowed to 0.1 MB/s").await;
    db.wait_until("(SELECT max(heartbeat_at) FROM dedup.workers) > clock_timestamp() - interval '3 s'").await;
    standbys("").await;
    db.exec("SELECT dedup.set_rate(run_id, 100000000) FROM dedup.runs; UPDATE dedup.runs SET options = options #- '{settings,throttle}'").await;
    let output = running.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
}

/// An archiver that has failed ever since it was started keeps all WAL, and nobody knows how much that is.
#[tokio::test(flavor = "multi_thread")]
async fn an_archiver_that_never_archived() {
    let pair = Pair::start_with(&["archive_mode = on", "archive_command = 'false'"]).await;
    let db = &pair.target;
    db.exec("SELECT pg_switch_wal()").await;
    db.wait_until("(SELECT failed_count > 0 FROM pg_stat_archiver)").await;
    let kept: String = db.one("SELECT dedup.wal_kept()::text").await;
    assert!(kept.contains("unknown"), "{kept}");
    db.exec("ALTER SYSTEM SET archive_command = 'true'").await;
    db.exec("SELECT pg_reload_conf(), pg_switch_wal()").await;
    db.wait_until("dedup.wal_kept()::text NOT LIKE '%unknown%'").await;
}
