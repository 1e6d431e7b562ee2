//! Alerts: each one fires in a real run and clears when its cause is gone.

use std::time::Duration;

use integration::cluster::Cluster;
use integration::db::Db;
use integration::pair::Pair;
use integration::sidecar::exit;

/// About so many megabytes in records of 100 bytes.
async fn loaded(megabytes: u32, target_settings: &[&str]) -> Pair {
    let pair = Pair::start_with(target_settings).await;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text)").await;
    pair.source
        .exec(&format!(
            "INSERT INTO public.items SELECT n, rpad(md5(n::text), 90, '.') FROM generate_series(1, {megabytes} * 10000) AS n; ANALYZE public.items"
        ))
        .await;
    pair
}

fn firing(kind: &str) -> String {
    format!("EXISTS (SELECT FROM dedup.alerts WHERE kind = '{kind}')")
}

/// Fired, and is over, as the log of alerts and the audit log have it.
async fn fired_and_cleared(db: &Db, kind: &str) {
    for sql in [
        format!("EXISTS (SELECT FROM dedup.alert_log WHERE kind = '{kind}' AND cleared_at > since)"),
        format!(
            "EXISTS (SELECT FROM dedup.events WHERE kind = 'alert_raised' AND detail ->> 'kind' = '{kind}')"
        ),
        format!(
            "EXISTS (SELECT FROM dedup.events WHERE kind = 'alert_cleared' AND detail ->> 'kind' = '{kind}')"
        ),
    ] {
        db.wait_until(&sql).await;
    }
    assert!(!db.one::<bool>(&format!("SELECT {}", firing(kind))).await);
}

/// What somebody who listens on `dedup_alerts` hears, with psql.
fn listener(cluster: &Cluster, seconds: u32) -> String {
    let wait = format!("SELECT pg_sleep({seconds})");
    // What came meanwhile is printed after the next command.
    let commands = ["-c", "LISTEN dedup_alerts", "-c", &wait, "-c", "SELECT 1"];
    cluster.program("psql", &[&["-X", "-d", integration::pair::DATABASE][..], &commands].concat())
}

/// Too slow for what was wanted, and for its deadline; faster, it is neither.
#[tokio::test(flavor = "multi_thread")]
async fn throughput_and_deadline() {
    let pair = loaded(40, &[]).await;
    let db = &pair.target;
    // 0.28 MB/s are wanted, 0.2 are read: 40 MB would take 200 s.
    let process = pair
        .throttled_run(&["public.items"])
        .args(&["--no-throttle", "--max-rate", "200kB", "--min-throughput", "1GB"])
        .chunk_size("200kB")
        .spawn();
    let started = "EXISTS (SELECT FROM dedup.runs WHERE running_since < now() - interval '50 s')";
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_secs(14)).await;
    }
    db.wait_until(started).await;
    // Not before there is a minute to judge by.
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.alert_log").await, 0);
    db.wait_until(&firing("throughput")).await;
    assert_eq!(db.column("SELECT kind FROM dedup.alerts").await, ["throughput"], "it has no deadline");
    db.exec(
        "SELECT dedup.change_settings(run_id, '{\"alerts\": {\"deadline_seconds\": 150}}') FROM dedup.runs",
    )
    .await;
    db.wait_until(&firing("deadline")).await;
    let severities: Vec<String> = db.column("SELECT severity FROM dedup.alerts").await;
    assert_eq!(severities, ["P1", "P1"]);
    let gbps: f64 = db.one("SELECT migration_throughput_gbps FROM dedup.slis").await;
    assert!((0.0008..0.0024).contains(&gbps), "{gbps} Gbit/s at 0.2 MB/s");
    db.exec("SELECT dedup.set_rate(run_id, 2000000) FROM dedup.runs").await;
    fired_and_cleared(db, "throughput").await;
    let output = process.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
    output.says("alert: P1 throughput").says("alert throughput is over");
    fired_and_cleared(db, "deadline").await;
}

/// A run with mismatches is halted, which is a P1 and told at once; repaired, it is over.
#[tokio::test(flavor = "multi_thread")]
async fn mismatches() {
    let pair = loaded(1, &[]).await;
    let db = &pair.target;
    pair.run(&["public.items"]).exits(exit::DONE).await;
    let cluster = &pair.target_cluster;
    let runtime = tokio::runtime::Handle::current();
    let heard = tokio::task::block_in_place(|| {
        std::thread::scope(|scope| {
            let heard = scope.spawn(|| listener(cluster, 8));
            runtime.block_on(async {
                tokio::time::sleep(Duration::from_secs(1)).await;
                db.exec("DELETE FROM public.items WHERE id = 5").await;
                pair.reconcile().exits(exit::HALTED).await;
            });
            heard.join().expect("psql")
        })
    });
    assert!(heard.contains("\"firing\"") && heard.contains("\"mismatches\""), "{heard}");
    assert_eq!(
        db.column("SELECT severity || ' ' || kind || ' ' || value FROM dedup.alerts").await,
        ["P1 mismatches 1"]
    );
    assert_eq!(db.one::<i64>("SELECT reconciliation_mismatch_count FROM dedup.slis").await, 1);
    pair.repair().exits(exit::DONE).await;
    fired_and_cleared(db, "mismatches").await;
    assert_eq!(db.one::<i64>("SELECT reconciliation_mismatch_count FROM dedup.slis").await, 0);
}

/// Chunks that keep failing raise a P2, and stop the run before it has tried them all in vain; resumed, it goes on where it stopped.
#[tokio::test(flavor = "multi_thread")]
async fn failing_chunks() {
    let pair = loaded(10, &[]).await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE trouble (x int); INSERT INTO trouble VALUES (1); \
         CREATE FUNCTION trouble() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
           IF EXISTS (SELECT FROM trouble) THEN RAISE 'try again' USING ERRCODE = 'serialization_failure'; END IF; RETURN NULL; END $$; \
         CREATE TRIGGER trouble AFTER INSERT ON public.items FOR EACH STATEMENT EXECUTE FUNCTION trouble()",
    )
    .await;
    let process = pair.run(&["public.items"]).chunk_size("100kB").spawn();
    db.wait_until(&firing("chunk_failures")).await;
    db.wait_until(&firing("failing")).await;
    db.wait_until("EXISTS (SELECT FROM dedup.runs WHERE status = 'paused')").await;
    assert!(db.one::<bool>("SELECT chunk_failure_rate > 0.5 FROM dedup.slis").await);
    assert!(db.one::<i64>("SELECT count(*) FROM dedup.checkpoints WHERE status = 'pending'").await > 50);
    db.exec("DELETE FROM trouble; SELECT dedup.resume_run(run_id) FROM dedup.runs").await;
    let output = process.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
    fired_and_cleared(db, "chunk_failures").await;
    fired_and_cleared(db, "failing").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.items").await, 100_000);
}

/// A worker that is stopped in the middle of a chunk is told of; heard again, it is no alert any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_worker() {
    let pair = loaded(2, &[]).await;
    let db = &pair.target;
    let process = pair
        .run(&["public.items"])
        .args(&["--max-rate", "100kB", "--lease-seconds", "60"])
        .chunk_size("1MB")
        .workers(1)
        .spawn();
    db.wait_until("EXISTS (SELECT FROM dedup.checkpoints WHERE status = 'syncing')").await;
    process.stop();
    db.wait_until(
        "EXISTS (SELECT FROM dedup.silent_leases((SELECT run_id FROM dedup.runs)) WHERE chunks > 0)",
    )
    .await;
    // Nobody else works on the run: as cron would have it.
    assert_eq!(db.one::<i64>("SELECT dedup.check_alerts()").await, 1);
    assert_eq!(db.column("SELECT severity || ' ' || kind FROM dedup.alerts").await, ["P2 worker_lost"]);
    process.wake();
    db.exec("SELECT dedup.set_rate(run_id, 100000000) FROM dedup.runs").await;
    fired_and_cleared(db, "worker_lost").await;
    assert_eq!(process.finish().await.code, Some(exit::DONE));
}

/// A filter that is too small for what goes into it.
#[tokio::test(flavor = "multi_thread")]
async fn an_overfull_filter() {
    let pair = Pair::start_with(&["pg_dedup_migrate.filter_size = 1MB"]).await;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, n int)").await;
    pair.source.exec("INSERT INTO public.items SELECT n, n FROM generate_series(1, 2000000) AS n; ANALYZE public.items").await;
    let process = pair.run(&["public.items"]).args(&["--max-rate", "1MB"]).chunk_size("500kB").spawn();
    pair.target.wait_until(&firing("filter_overfull")).await;
    pair.target.exec("SELECT dedup.set_rate(run_id, 100000000) FROM dedup.runs").await;
    assert_eq!(process.finish().await.code, Some(exit::DONE));
    // The run is over, and with it the harm.
    fired_and_cleared(&pair.target, "filter_overfull").await;
}

/// Free bytes where the target's data are.
async fn free_bytes(db: &Db) -> i64 {
    db.one("SELECT min(free_bytes) FROM dedup.disk_space()").await
}

/// A disk that fills up pauses the run before it is full; with room again, and resumed, it goes on.
#[tokio::test(flavor = "multi_thread")]
async fn disk_headroom() {
    const MARGIN: i64 = 3_000_000_000;
    let pair = loaded(4, &[]).await;
    let db = &pair.target;
    let floor = free_bytes(db).await - MARGIN;
    assert!(floor > 2 * MARGIN, "the machine of the tests has too little room: {floor} bytes");
    let process = pair
        .sidecar("run")
        .args(&["--table", "public.items", "--no-throttle", "--max-rate", "300kB"])
        .args(&["--disk-floor", &floor.to_string()])
        .chunk_size("100kB")
        .spawn();
    db.wait_until("EXISTS (SELECT FROM dedup.checkpoints WHERE status = 'verified')").await;
    assert!(!db.one::<bool>(&format!("SELECT {}", firing("disk_headroom"))).await);
    let hog = pair.target_cluster.dir().join("hog");
    let file = std::fs::File::create(&hog).expect("a file");
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 2 * MARGIN as u64).expect("room");
    db.wait_until("EXISTS (SELECT FROM dedup.runs WHERE status = 'paused')").await;
    assert_eq!(db.column("SELECT severity FROM dedup.alerts WHERE kind = 'disk_headroom'").await, ["P1"]);
    // Resumed too early, it is paused again.
    db.exec("SELECT dedup.resume_run(run_id) FROM dedup.runs").await;
    db.wait_until("(SELECT count(*) FROM dedup.events WHERE kind = 'run_stopped') = 2").await;
    drop(file);
    std::fs::remove_file(&hog).expect("the file");
    fired_and_cleared(db, "disk_headroom").await;
    db.exec("SELECT dedup.set_rate(run_id, 100000000), dedup.resume_run(run_id) FROM dedup.runs").await;
    let output = process.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.items").await, 40_000);
}

/// The same where the target database reads its source itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_in_sql() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (id int PRIMARY KEY, body text); CREATE TABLE t (LIKE s INCLUDING ALL); INSERT INTO s SELECT n, md5(n::text) FROM generate_series(1, 5000) AS n; \
         CREATE TABLE room (x int); INSERT INTO room VALUES (1); \
         CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
           IF EXISTS (SELECT FROM room) THEN RAISE 'could not extend file' USING ERRCODE = 'disk_full'; END IF; RETURN NULL; END $$; \
         CREATE TRIGGER fill AFTER INSERT ON t FOR EACH STATEMENT EXECUTE FUNCTION fill()",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('local')::text").await;
    db.exec(&format!("SELECT dedup.add_table('{run}', 'public.s', 't'), dedup.plan_chunks('{run}', 50000)"))
        .await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_eq!(
        db.column(
            "SELECT status || ' ' || severity || ' ' || kind FROM dedup.alerts JOIN dedup.runs USING (run_id)"
        )
        .await,
        ["paused P1 disk_full"]
    );
    assert_eq!(
        db.one::<i64>("SELECT count(*) FROM dedup.checkpoints WHERE status = 'failed' OR attempts > 0").await,
        0
    );
    db.exec(&format!("DELETE FROM room; SELECT dedup.resume_run('{run}')")).await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    fired_and_cleared(db, "disk_full").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM t").await, 5000);
}

/// What a session migrates itself is seen by nobody before it commits: it is neither lost nor slow until its chunk would be late.
#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_in_a_session_of_its_own() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (id int PRIMARY KEY, body text); CREATE TABLE t (LIKE s INCLUDING ALL); INSERT INTO s SELECT n, md5(n::text) FROM generate_series(1, 5000) AS n",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('local')::text").await;
    db.exec(&format!("SELECT dedup.add_table('{run}', 'public.s', 't'), dedup.plan_chunks('{run}', 50000), dedup.resume_run('{run}')")).await;
    let minutes_ago = "UPDATE dedup.runs SET running_since = clock_timestamp() - interval '5 min'";
    db.exec(minutes_ago).await;
    let kinds = format!("SELECT kind FROM dedup.alert_conditions('{run}')");
    assert_eq!(db.column(&kinds).await, ["throughput", "worker_lost"]);
    let session = pair.target_again().await;
    session
        .exec(&format!(
            "BEGIN; SELECT dedup.migrate_chunk('{run}', (SELECT min(chunk_id) FROM dedup.checkpoints))"
        ))
        .await;
    assert_eq!(db.column(&kinds).await, [""; 0]);
    session.exec("COMMIT").await;
    assert_eq!(db.column(&kinds).await, ["throughput", "worker_lost"]);
}

/// What can't be looked at of one run, or of a disk, hides nothing of the others.
#[tokio::test(flavor = "multi_thread")]
async fn one_bad_run_among_others() {
    let pair = loaded(1, &[]).await;
    let db = &pair.target;
    let bad = r#"{"settings": {"alerts": {"deadline_seconds": "x"}}}"#;
    assert_eq!(db.fails(&format!("SELECT dedup.create_run('bad', '{bad}')")).await.0, "22023");
    pair.run(&["public.items"]).exits(exit::DONE).await;
    db.exec("DELETE FROM public.items WHERE id = 1").await;
    pair.reconcile().exits(exit::HALTED).await;
    db.exec(&format!("ALTER TABLE dedup.runs DISABLE TRIGGER check_settings; SELECT dedup.create_run('bad', '{bad}'); DELETE FROM dedup.alert_log")).await;
    assert_eq!(db.one::<i64>("SELECT dedup.check_alerts()").await, 2);
    let firing = db.column("SELECT name || ' ' || kind FROM dedup.alerts ORDER BY kind").await;
    assert_eq!(firing, ["it mismatches", "bad unchecked"]);
    db.exec("UPDATE dedup.runs SET options = '{}' WHERE name = 'bad'").await;
    assert_eq!(db.one::<i64>("SELECT dedup.check_alerts()").await, 1);
}

/// What a strict pass found is not taken back by one that does not ask for it.
#[tokio::test(flavor = "multi_thread")]
async fn mismatches_of_a_strict_pass() {
    let pair = loaded(1, &[]).await;
    let db = &pair.target;
    pair.run(&["public.items"]).exits(exit::DONE).await;
    pair.source.exec("UPDATE public.items SET body = 'later' WHERE id = 1").await;
    pair.reconcile().arg("--strict").exits(exit::HALTED).await;
    pair.reconcile().exits(exit::HALTED).await;
    assert_eq!(db.one::<i64>("SELECT reconciliation_mismatch_count FROM dedup.slis").await, 1);
    let told: String = db.one("SELECT message FROM dedup.alerts WHERE kind = 'mismatches'").await;
    assert!(told.starts_with("1 records"), "{told}");
}

/// A run that is late is late as long as nobody works on it.
#[tokio::test(flavor = "multi_thread")]
async fn late_while_nothing_is_read() {
    let pair = loaded(4, &[]).await;
    let db = &pair.target;
    let process = pair
        .throttled_run(&["public.items"])
        .args(&["--no-throttle", "--max-rate", "20kB", "--deadline", "90s"])
        .chunk_size("10kB")
        .spawn();
    db.wait_until("EXISTS (SELECT FROM dedup.checkpoints WHERE status = 'verified')").await;
    // Settled, as if a minute had gone by.
    db.exec("UPDATE dedup.runs SET running_since = running_since - interval '2 min'").await;
    db.wait_until(&firing("deadline")).await;
    process.kill();
    process.finish().await;
    db.exec("SELECT dedup.pause_run(run_id) FROM dedup.runs; SELECT dedup.resume_run(run_id) FROM dedup.runs; DELETE FROM dedup.throughput").await;
    db.exec("SELECT dedup.check_alerts()").await;
    assert!(db.one::<bool>(&format!("SELECT {}", firing("deadline"))).await);
}

/// A run that ends with failed chunks says so as long as it is one.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_failed() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO public.items SELECT n, 'body ' || n FROM generate_series(1, 100) AS n; ANALYZE public.items").await;
    db.exec("ALTER TABLE public.items ADD CONSTRAINT low CHECK (id < 50)").await;
    pair.run(&["public.items"]).args(&["--error-budget", "0"]).exits(exit::ERROR).await;
    assert_eq!(
        db.column("SELECT severity || ' ' || kind || ': ' || message FROM dedup.alerts").await,
        ["P1 failed: the run ended with 1 failed chunks"]
    );
    db.exec("ALTER TABLE public.items DROP CONSTRAINT low").await;
    pair.resume().exits(exit::DONE).await;
    fired_and_cleared(db, "failed").await;
}

/// A restart takes the connection from every chunk in flight: that is no failure of theirs, and stops no run.
#[tokio::test(flavor = "multi_thread")]
async fn lost_connections_are_no_failures() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO public.items SELECT n, repeat(md5(n::text), 2) FROM generate_series(1, 60000) AS n; ANALYZE public.items").await;
    let running =
        pair.run(&["public.items"]).args(&["--max-rate", "1MB"]).chunk_size("100kB").workers(8).spawn();
    db.wait_until("(SELECT count(*) FROM dedup.checkpoints WHERE status = 'verified') >= 2").await;
    for _ in 0..3 {
        db.exec("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pg-dedup-migrate/writer'").await;
        tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    }
    db.wait_until("(SELECT count(*) FROM dedup.events WHERE kind = 'chunk_retried') >= 3").await;
    assert_eq!(db.one::<i64>("SELECT (dedup.chunk_attempts(run_id)).failed FROM dedup.runs").await, 0);
    let output = running.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
}
