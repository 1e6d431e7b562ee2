//! What a review found broken once: each of these failed before it was mended.

use std::time::Duration;

use integration::check::{Books, LAST_RUN, assert_books};
use integration::cluster::{Cluster, PRELOAD, Stop};
use integration::db::{Db, describe, sqlstate};
use integration::pair::{DATABASE, Pair};
use integration::sidecar::{Invocation, exit, failpoint};
use tokio::time::sleep;

/// A local run of one table, planned in small chunks; returns its id.
async fn plan(db: &Db, source: &str, target: &str, options: &str) -> String {
    let run: String = db.one("SELECT dedup.create_run('regression')::text").await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.{source}', '{target}', options => '{options}')"
    ))
    .await;
    db.exec(&format!("SELECT dedup.plan_chunks('{run}', 2000)")).await;
    run
}

async fn migrate(db: &Db, source: &str, target: &str) {
    let run = plan(db, source, target, "{}").await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_eq!(
        db.one::<String>(&format!("SELECT status FROM dedup.runs WHERE run_id = '{run}'")).await,
        "done"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_came_later_is_guarded_too() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE raw (id int PRIMARY KEY, body text); INSERT INTO raw SELECT n, 'body ' || n FROM generate_series(1, 400) AS n; \
         CREATE TABLE dst (id int PRIMARY KEY, body text) PARTITION BY RANGE (id); \
         CREATE TABLE dst_1 PARTITION OF dst FOR VALUES FROM (0) TO (1000)",
    )
    .await;
    migrate(db, "raw", "dst").await;
    db.exec(
        "CREATE TABLE dst_2 PARTITION OF dst FOR VALUES FROM (1000) TO (2000); \
         INSERT INTO raw SELECT n, 'body ' || n FROM generate_series(1001, 1400) AS n",
    )
    .await;
    migrate(db, "raw", "dst").await;
    let known = "SELECT count(*) FROM dedup.targets, jsonb_object_keys(filenodes)";
    assert_eq!(db.one::<i64>(known).await, 2);
    db.exec("TRUNCATE dst_2").await;
    let run: String = db.one("SELECT dedup.create_run('after')::text").await;
    let (state, message) = db.fails(&format!("SELECT dedup.add_table('{run}', 'public.raw', 'dst')")).await;
    assert_eq!(state, "55000", "{message}");
    assert!(message.contains("dst_2"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_sql_is_the_owners_alone() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE ROLE alice; CREATE ROLE mallory; GRANT USAGE ON SCHEMA dedup TO alice, mallory; \
         GRANT EXECUTE ON ALL ROUTINES IN SCHEMA dedup TO alice, mallory; \
         GRANT ALL ON ALL TABLES IN SCHEMA dedup TO alice, mallory; GRANT ALL ON ALL SEQUENCES IN SCHEMA dedup TO alice, mallory; \
         GRANT CREATE ON SCHEMA public TO mallory; \
         CREATE TABLE raw (id int PRIMARY KEY, body text); INSERT INTO raw VALUES (1, 'a'); \
         CREATE TABLE dst (id int PRIMARY KEY, body text); GRANT ALL ON raw, dst TO alice, mallory",
    )
    .await;
    let refused = async |sql: &str| {
        let (state, message) = db.fails(sql).await;
        assert_eq!(state, "42501", "{message}");
        message
    };
    // Planning and migrating run the owner's SQL: not even a superuser does that for somebody else.
    db.exec("SET ROLE mallory").await;
    let run: String = db.one("SELECT dedup.create_run('trap')::text").await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.raw', 'dst', options => '{{\"where\": \"id > 0\"}}')"
    ))
    .await;
    db.exec("RESET ROLE").await;
    let message = refused(&format!("SELECT dedup.plan_chunks('{run}')")).await;
    assert!(message.contains("SET ROLE mallory"), "{message}");
    db.exec(&format!("SET ROLE mallory; SELECT dedup.plan_chunks('{run}'); RESET ROLE")).await;
    refused(&format!("SELECT dedup.migrate_chunk('{run}', '1:000001')")).await;
    refused(&format!("CALL dedup.migrate_run('{run}')")).await;
    // Nor can a run be put into somebody else's hands.
    db.exec("SET ROLE mallory").await;
    let owner: String =
        db.one("INSERT INTO dedup.runs (name, owner) VALUES ('forged', 'alice') RETURNING owner::text").await;
    assert_eq!(owner, "mallory");
    refused(&format!("UPDATE dedup.runs SET owner = 'alice' WHERE run_id = '{run}'")).await;
    // Nor can somebody else's run be given other SQL.
    db.exec("SET ROLE alice").await;
    refused(&format!(
        "UPDATE dedup.run_tables SET local_options = '{{\"where\": \"true\"}}' WHERE run_id = '{run}'"
    ))
    .await;
    refused(&format!("UPDATE dedup.run_tables SET source_spec = source_spec || '{{\"where\": \"true\"}}' WHERE run_id = '{run}'"))
        .await;
    refused(&format!("UPDATE dedup.run_tables SET layout = '{{}}' WHERE run_id = '{run}'")).await;
    refused(&format!("SELECT dedup.add_table('{run}', 'public.raw', 'dst')")).await;
    db.exec("SET ROLE mallory").await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    db.exec("RESET ROLE").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dst").await, 1);
}

/// A run of sources that workers read and sources that the target database reads itself: each leaves the other's alone, and whoever is last ends it.
#[tokio::test(flavor = "multi_thread")]
async fn workers_and_the_database_share_a_run() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.far (id int PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO public.far SELECT n, 'far ' || n FROM generate_series(1, 100) AS n").await;
    db.exec("CREATE TABLE near (id int PRIMARY KEY, body text); INSERT INTO near SELECT n, 'near ' || n FROM generate_series(1, 100) AS n").await;
    pair.run(&["public.far"]).args(&["--name", "first"]).exits(exit::DONE).await;
    for workers_first in [true, false] {
        let (near, far) = if workers_first { ("near_1", "far_1") } else { ("near_2", "far_2") };
        db.exec(&format!(
            "CREATE TABLE {near} (LIKE near INCLUDING ALL); CREATE TABLE {far} (LIKE far INCLUDING ALL)"
        ))
        .await;
        let run: String = db
            .one("SELECT dedup.create_run('mixed', options)::text FROM dedup.runs WHERE name = 'first'")
            .await;
        db.exec(&format!(
            "SELECT dedup.add_table('{run}', 'public.near', '{near}'), dedup.add_table('{run}', 'public.far', '{far}', options => '{{\"source\": {{}}}}'); \
             SELECT dedup.set_source_spec('{run}', 2, t.source_spec) FROM dedup.run_tables AS t JOIN dedup.runs USING (run_id) WHERE name = 'first'; \
             SELECT dedup.add_chunks('{run}', 2, '[{{\"kind\": \"key\"}}]'), dedup.plan_chunks('{run}')"
        ))
        .await;
        let count = async |table: &str| db.one::<i64>(&format!("SELECT count(*) FROM {table}")).await;
        let work = || pair.sidecar("work").arg(run.as_str());
        let call = format!("CALL dedup.migrate_run('{run}')");
        if workers_first {
            work().exits(exit::DONE).await.says(&call);
            assert_eq!((count(near).await, count(far).await), (0, 100));
            db.exec(&call).await;
        } else {
            db.exec(&call).await;
            assert_eq!((count(near).await, count(far).await), (100, 0));
            work().exits(exit::DONE).await;
        }
        assert_eq!((count(near).await, count(far).await), (100, 100));
        assert_eq!(
            db.one::<String>(&format!("SELECT status FROM dedup.runs WHERE run_id = '{run}'")).await,
            "done"
        );
        assert_eq!(
            db.one::<i64>(&format!(
                "SELECT count(*) FROM dedup.checkpoints WHERE run_id = '{run}' AND attempts > 1"
            ))
            .await,
            0
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_run_tries_a_deadlock_again() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE raw (id int PRIMARY KEY, body text); INSERT INTO raw SELECT n, 'body ' || n FROM generate_series(1, 20) AS n; \
         CREATE TABLE dst (id int PRIMARY KEY, body text); CREATE SEQUENCE tries; \
         CREATE FUNCTION unlucky() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
           IF nextval('tries') <= 2 THEN RAISE EXCEPTION 'unlucky' USING ERRCODE = 'deadlock_detected'; END IF; RETURN NULL; END $$; \
         CREATE TRIGGER unlucky BEFORE INSERT ON dst FOR EACH STATEMENT EXECUTE FUNCTION unlucky()",
    )
    .await;
    migrate(db, "raw", "dst").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.events WHERE kind = 'chunk_retried'").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_written_chunk_cannot_be_failed() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec("CREATE TABLE raw (body text); INSERT INTO raw VALUES ('a'); CREATE TABLE dst (body text)").await;
    let run = plan(db, "raw", "dst", "{}").await;
    db.exec(&format!("SELECT dedup.migrate_chunk('{run}', '1:000001')")).await;
    let lease: String = db.one("SELECT lease::text FROM dedup.checkpoints WHERE status = 'syncing'").await;
    let answer: String =
        db.one(&format!("SELECT dedup.fail_chunk('{run}', '1:000001', '{lease}', 'XX000', 'late')")).await;
    assert_eq!(answer, "fenced");
}

/// Every refused row costs several attempts, and none of them may keep locks until the chunk ends.
#[tokio::test(flavor = "multi_thread")]
async fn refused_upserts_do_not_fill_the_lock_table() {
    let pair = Pair::start_with(&["max_locks_per_transaction = 10", "max_connections = 20"]).await;
    pair.both("CREATE TABLE public.notes (id int PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO notes SELECT n, 'body ' || n FROM generate_series(1, 1500) AS n").await;
    pair.run(&["public.notes"]).exits(exit::DONE).await;
    let poison = "UPDATE {} SET body = CASE WHEN id % 3 = 0 THEN 'poison ' ELSE 'better ' END || id";
    pair.source.exec(&poison.replace("{}", "notes")).await;
    pair.target
        .exec(
            "ALTER TABLE notes ADD CHECK (body NOT LIKE 'poison%'); CREATE TABLE raw AS TABLE notes; ALTER TABLE raw ADD PRIMARY KEY (id)",
        )
        .await;
    pair.run(&["public.notes"]).exits(exit::LEFT_ASIDE).await;
    let expected = Books { source: 1_500, updated: 1_000, quarantined: 500, ..Books::default() };
    assert_books(&pair.target, expected).await;
    // The same in one SQL call.
    pair.target
        .exec("UPDATE raw SET body = CASE WHEN id % 3 = 0 THEN 'poison ' ELSE 'best ' END || id")
        .await;
    let run = plan(&pair.target, "raw", "notes", "{}").await;
    pair.target.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    let state: Option<String> = pair
        .target
        .one(&format!("SELECT string_agg(error_message, '; ') FROM dedup.checkpoints WHERE run_id = '{run}'"))
        .await;
    assert_eq!(state, None);
    assert_books(&pair.target, expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_with_a_null_in_their_key_are_read_once() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE raw (a int, b int, body text); \
         INSERT INTO raw SELECT n % 20, n, 'body ' || n FROM generate_series(1, 1000) AS n; \
         INSERT INTO raw SELECT n, NULL, 'half ' || n FROM generate_series(0, 19) AS n; \
         INSERT INTO raw SELECT NULL, NULL, 'none ' || n FROM generate_series(1, 300) AS n; \
         CREATE TABLE dst (a int, b int, body text, PRIMARY KEY (a, b))",
    )
    .await;
    let run = plan(db, "raw", "dst", "{}").await;
    let bounds = "SELECT count(*) FROM dedup.checkpoints WHERE NULL = ANY (range_lower) OR array_position(range_lower, NULL) IS NOT NULL";
    assert_eq!(db.one::<i64>(bounds).await, 0);
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_books(db, Books { source: 1_320, inserted: 1_000, quarantined: 320, ..Books::default() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_logical_replication_applies_cools_the_filter() {
    let pair = Pair::start_with(&["wal_level = logical"]).await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE raw (id int PRIMARY KEY, body text); INSERT INTO raw SELECT n, 'body ' || n FROM generate_series(1, 50) AS n; \
         CREATE TABLE dst (id int PRIMARY KEY, body text); CREATE PUBLICATION state FOR TABLE dedup.segment, dedup.segment_block",
    )
    .await;
    let replica = Cluster::start(&[PRELOAD]);
    let copy = Db::connect(&replica, "postgres").await;
    copy.exec("CREATE EXTENSION pg_dedup_migrate").await;
    copy.exec(&format!(
        "CREATE SUBSCRIPTION state CONNECTION 'host={} port={} user=postgres dbname={DATABASE}' PUBLICATION state",
        pair.target_cluster.dir().display(),
        pair.target_cluster.port()
    ))
    .await;
    copy.wait_until("(SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel)").await;
    copy.exec("SELECT dedup.warm_filter()").await;
    assert!(copy.one::<bool>("SELECT warm FROM dedup.filter_stats()").await);
    migrate(db, "raw", "dst").await;
    copy.wait_until("EXISTS (SELECT FROM dedup.segment_block)").await;
    assert!(!copy.one::<bool>("SELECT warm FROM dedup.filter_stats()").await);
    db.exec("SELECT dedup.forget_target('dst')").await;
    copy.wait_until("NOT EXISTS (SELECT FROM dedup.segment_block)").await;
    copy.exec("ALTER SUBSCRIPTION state DISABLE; ALTER SUBSCRIPTION state SET (slot_name = NONE)").await;
}

/// Many open chunks, one table that waits for another: a lease looks at a few of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_does_not_look_at_every_chunk() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE a (id int PRIMARY KEY, body text); CREATE TABLE b (id int PRIMARY KEY, a int REFERENCES a); \
         CREATE TABLE raw_a (LIKE a); CREATE TABLE raw_b (LIKE b)",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('large')::text").await;
    for table in ["a", "b"] {
        db.exec(&format!(
            "SELECT dedup.add_chunks('{run}', dedup.add_table('{run}', 'raw_{table}', '{table}'), \
                (SELECT jsonb_agg(jsonb_build_object('kind', 'key', 'records', 1, 'bytes', 1)) FROM generate_series(1, 50000)))"
        ))
        .await;
    }
    as_workers_read_it(db, &run).await;
    // What the statements before have looked at is counted elsewhere from here on.
    db.exec("SELECT pg_stat_force_next_flush()").await;
    db.exec(&format!(
        "BEGIN; DO $$ BEGIN FOR i IN 1..20 LOOP PERFORM dedup.lease_chunk('{run}', gen_random_uuid()); END LOOP; END $$"
    ))
    .await;
    let looked_at: i64 = db
        .one(
            "SELECT (seq_tup_read + idx_tup_fetch)::int8 FROM pg_stat_xact_user_tables WHERE relid = 'dedup.checkpoints'::regclass",
        )
        .await;
    db.exec("ROLLBACK").await;
    assert!(looked_at < 20 * 100, "20 leases looked at {looked_at} of 100,000 checkpoints");
}

/// Makes the run's tables those that workers read.
async fn as_workers_read_it(db: &Db, run: &str) {
    db.exec(&format!(
        "SELECT dedup.set_source_spec(run_id, table_id, source_spec - 'local') FROM dedup.run_tables WHERE run_id = '{run}'"
    ))
    .await;
}

/// A worker that dies on the same chunk again and again ends in a failed chunk, not in an endless loop.
#[tokio::test(flavor = "multi_thread")]
async fn leases_that_run_out_are_counted() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec("CREATE TABLE raw (id int PRIMARY KEY); INSERT INTO raw VALUES (1); CREATE TABLE dst (id int PRIMARY KEY)").await;
    let run: String = db
        .one("SELECT dedup.create_run('deadly', '{\"lease_seconds\": 0.01, \"max_attempts\": 2}')::text")
        .await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.raw', 'dst'); SELECT dedup.plan_chunks('{run}')"
    ))
    .await;
    as_workers_read_it(db, &run).await;
    let lease = format!("SELECT count(*) FROM dedup.lease_chunk('{run}', gen_random_uuid())");
    for leased in [1, 1, 0] {
        assert_eq!(db.one::<i64>(&lease).await, leased);
        sleep(Duration::from_millis(30)).await;
    }
    assert_eq!(db.one::<String>("SELECT status || attempts FROM dedup.checkpoints").await, "failed2");
}

/// A chunk that somebody still holds is passed by: nobody waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_held_row_does_not_stop_others_from_leasing() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE raw (id int PRIMARY KEY, body text); INSERT INTO raw SELECT n, 'body ' || n FROM generate_series(1, 400) AS n; \
         CREATE TABLE dst (id int PRIMARY KEY, body text)",
    )
    .await;
    let run = plan(db, "raw", "dst", "{}").await;
    as_workers_read_it(db, &run).await;
    db.exec(&format!("UPDATE dedup.runs SET options = '{{\"lease_seconds\": 0.01}}' WHERE run_id = '{run}'"))
        .await;
    let holder = pair.target_again().await;
    let taken: String =
        db.one(&format!("SELECT chunk_id FROM dedup.lease_chunk('{run}', gen_random_uuid())")).await;
    holder.exec(&format!("BEGIN; SELECT FROM dedup.checkpoints WHERE chunk_id = '{taken}' FOR UPDATE")).await;
    sleep(Duration::from_millis(30)).await;
    // The lease's own backend is this one, which nobody ends; the row is somebody else's.
    db.exec("SET lock_timeout = '2s'").await;
    let other: String =
        db.one(&format!("SELECT chunk_id FROM dedup.lease_chunk('{run}', gen_random_uuid())")).await;
    assert_ne!(other, taken);
}

#[tokio::test(flavor = "multi_thread")]
async fn privileges_that_upserts_need_are_asked_for_at_once() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE ROLE loader; GRANT USAGE ON SCHEMA dedup TO loader; GRANT EXECUTE ON ALL ROUTINES IN SCHEMA dedup TO loader; \
         GRANT ALL ON ALL TABLES IN SCHEMA dedup TO loader; GRANT ALL ON ALL SEQUENCES IN SCHEMA dedup TO loader; \
         CREATE TABLE dst (id int PRIMARY KEY); GRANT SELECT, INSERT ON dst TO loader; SET ROLE loader",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('poor')::text").await;
    let (state, message) = db.fails(&format!("SELECT dedup.add_table('{run}', 'public.raw', 'dst')")).await;
    assert_eq!(state, "42501", "{message}");
    assert!(message.contains("GRANT SELECT, INSERT, UPDATE, DELETE ON"), "{message}");
}

/// COPY may write an identity column GENERATED ALWAYS, UPDATE may not: rows go in, and change as long as that column does not.
#[tokio::test(flavor = "multi_thread")]
async fn an_identity_beside_the_key() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE raw (id int PRIMARY KEY, serial int, body text); \
         INSERT INTO raw SELECT n, n + 1000, 'body ' || n FROM generate_series(1, 20) AS n; \
         CREATE TABLE dst (id int PRIMARY KEY, serial int GENERATED ALWAYS AS IDENTITY, body text)",
    )
    .await;
    migrate(db, "raw", "dst").await;
    db.exec("UPDATE raw SET body = 'better'").await;
    migrate(db, "raw", "dst").await;
    assert_eq!(
        db.one::<i64>("SELECT count(*) FROM dst WHERE body = 'better' AND serial = id + 1000").await,
        20
    );
    db.exec("UPDATE raw SET serial = serial + 1").await;
    let run = plan(db, "raw", "dst", "{}").await;
    let (state, message) = db
        .fails(&format!(
            "SELECT dedup.migrate_chunk('{run}', chunk_id) FROM dedup.checkpoints WHERE run_id = '{run}'"
        ))
        .await;
    assert_eq!(state, "428C9", "{message}");
    assert!(message.contains("SET GENERATED BY DEFAULT"), "{message}");
}

/// `run` is gone and the server was restarted: `work` says what it waits for, warms the filter and ends the run.
#[tokio::test(flavor = "multi_thread")]
async fn work_ends_what_run_began() {
    let mut pair = Pair::start().await;
    pair.both("CREATE TABLE public.notes (id int PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO notes SELECT n, 'body ' || n FROM generate_series(1, 3000) AS n").await;
    let run = pair.run(&["public.notes"]).workers(1).chunk_size("10kB").args(&["--lease-seconds", "10"]);
    run.killed_at(&format!("{}@4", failpoint::LEASED)).await;
    let seconds: String = pair.target.one("SELECT options ->> 'lease_seconds' FROM dedup.runs").await;
    assert_eq!(seconds, "10");
    pair.target_cluster.restart(Stop::Fast);
    pair.reconnect_target().await;
    assert!(!pair.target.one::<bool>("SELECT warm FROM dedup.filter_stats()").await);
    let output = pair.sidecar("work").arg("last").exits(exit::DONE).await;
    output.says("the filter was cold").says("gave no heartbeat for");
    assert!(pair.target.one::<bool>("SELECT warm FROM dedup.filter_stats()").await);
    let status: String =
        pair.target.one(&format!("SELECT status FROM dedup.runs WHERE run_id = {LAST_RUN}")).await;
    assert_eq!(status, "done");
    assert_eq!(pair.target.one::<i64>("SELECT count(*) FROM notes").await, 3_000);
}

/// A value that cannot be cast is named by nobody but the session that met it.
#[tokio::test(flavor = "multi_thread")]
async fn values_stay_out_of_messages() {
    let pair = Pair::start().await;
    let raw = "CREATE TABLE public.raw (id int PRIMARY KEY, amount text); \
               INSERT INTO raw SELECT n, n::text FROM generate_series(1, 100) AS n; \
               INSERT INTO raw VALUES (101, 'SECRET'), (102, '99999999999')";
    pair.both(raw).await;
    pair.target.exec("CREATE TABLE public.dst (id int PRIMARY KEY, amount int)").await;
    let output = pair.run(&["public.raw=public.dst"]).exits(exit::ERROR).await;
    output.says("invalid input syntax for type integer");
    assert!(!output.describe().contains("SECRET"), "{}", output.describe());
    let run = plan(&pair.target, "raw", "dst", "{}").await;
    pair.target.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    let told = pair
        .target
        .column("SELECT error_message FROM dedup.checkpoints UNION ALL SELECT detail::text FROM dedup.events")
        .await
        .join("\n");
    assert!(told.contains("invalid input syntax for type integer"), "{told}");
    assert!(!told.contains("SECRET") && !told.contains("99999999999"), "{told}");
}

/// Two runs that are created at the same time cannot both take a target.
#[tokio::test(flavor = "multi_thread")]
async fn two_runs_cannot_take_one_target_at_once() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec("CREATE TABLE raw (id int PRIMARY KEY); CREATE TABLE dst (id int PRIMARY KEY)").await;
    let runs = [
        db.one::<String>("SELECT dedup.create_run('first')::text").await,
        db.one::<String>("SELECT dedup.create_run('second')::text").await,
    ];
    db.exec(&format!("BEGIN; SELECT dedup.add_table('{}', 'public.raw', 'dst')", runs[0])).await;
    let other = pair.target_again().await;
    let add = format!("SELECT dedup.add_table('{}', 'public.raw', 'dst')", runs[1]);
    let second = tokio::spawn(async move { other.try_exec(&add).await });
    let watch = pair.target_again().await;
    watch.wait_until("EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)").await;
    db.exec("COMMIT").await;
    let error = second.await.expect("the session's task").expect_err("both took the target");
    assert_eq!(sqlstate(&error), "55006", "{}", describe(&error));
}

/// The grants that docs/privileges.md lists are enough for a worker, to the end of a run.
#[tokio::test(flavor = "multi_thread")]
async fn the_documented_grants_are_enough() {
    const PRIVILEGES: &str = include_str!("../../../docs/privileges.md");
    let pair = Pair::start().await;
    pair.both("CREATE SCHEMA x; CREATE TABLE x.orders (id serial PRIMARY KEY, body text)").await;
    pair.source
        .exec("INSERT INTO x.orders SELECT n, 'body ' || n % 50 FROM generate_series(1, 100) AS n")
        .await;
    let blocks = |from: &str, to: &str| {
        let part = PRIVILEGES
            .split_once(from)
            .and_then(|(_, rest)| rest.split_once(to))
            .map_or("", |(part, _)| part);
        let sql: Vec<&str> =
            part.split("```sql").skip(1).filter_map(|block| block.split("```").next()).collect();
        assert!(!sql.is_empty(), "no SQL between {from} and {to}");
        sql.join("\n")
    };
    pair.target.exec(&blocks("## A worker", "On the **source**")).await;
    pair.source.exec(&blocks("On the **source**", "\n## ")).await;
    let url = |cluster: &Cluster, role: &str| cluster.url(DATABASE).replace("postgres@", &format!("{role}@"));
    for (name, verify) in [("at once", "chunk"), ("at the end", "end"), ("again", "chunk")] {
        if name == "again" {
            pair.source.exec("UPDATE x.orders SET body = 'revised' WHERE id = 7; UPDATE x.orders SET body = 'body 8' WHERE id = 9").await;
        }
        Invocation::new("run")
            .args(&[
                "--source",
                &url(&pair.source_cluster, "reader"),
                "--target",
                &url(&pair.target_cluster, "loader"),
            ])
            .args(&[
                "--table",
                "x.orders",
                "--content-columns",
                "x.orders:body",
                "--verify",
                verify,
                "--name",
                name,
            ])
            .exits(exit::DONE)
            .await;
    }
    assert_eq!(pair.target.column("SELECT DISTINCT status FROM dedup.runs").await, ["done"]);
    let reconcile = || {
        Invocation::new("reconcile").args(&[
            "last",
            "--source",
            &url(&pair.source_cluster, "reader"),
            "--target",
            &url(&pair.target_cluster, "loader"),
        ])
    };
    reconcile().args(&["--sample", "0.9"]).exits(exit::DONE).await;
    reconcile().exits(exit::DONE).await;
    pair.target.exec("DELETE FROM x.orders WHERE id = 1").await;
    reconcile().exits(exit::HALTED).await;
    let target = url(&pair.target_cluster, "loader");
    let rollback = |run: &str| Invocation::new("rollback").args(&[run, "--yes", "--target", &target]);
    rollback("again").exits(exit::DONE).await;
    rollback("at the end").exits(exit::DONE).await;
    rollback("at once").exits(exit::LEFT_ASIDE).await;
    assert_eq!(pair.target.one::<i64>("SELECT count(*) FROM x.orders").await, 0);
}

/// What the target database reads itself is not a worker's to read: on the source the name is another table, or none.
#[tokio::test(flavor = "multi_thread")]
async fn workers_leave_local_sources_alone() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.old (id int PRIMARY KEY, body text); INSERT INTO public.old SELECT n, 'b' || n FROM generate_series(1, 20) AS n").await;
    pair.source.exec("UPDATE public.old SET body = 'another table'").await;
    db.exec("CREATE TABLE public.items (LIKE public.old INCLUDING ALL)").await;
    let run: String = db.one("SELECT dedup.create_run('local')::text").await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.old', 'public.items'); SELECT dedup.plan_chunks('{run}')"
    ))
    .await;
    pair.sidecar("work").arg("last").exits(exit::ERROR).await.says("migrate_run");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.items").await, 0);
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    let differ = "SELECT count(*) FROM public.items FULL JOIN public.old USING (id, body) WHERE items IS NULL OR old IS NULL";
    assert_eq!(db.one::<i64>(differ).await, 0);
}
