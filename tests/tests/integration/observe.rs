//! What a process serves: health, metrics as Prometheus reads them, the page as a browser shows it; and log lines as JSON.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use integration::cluster::Stop;
use integration::http::{free_address, get, try_get};
use integration::pair::Pair;
use integration::sidecar::{Sidecar, exit};

/// A run that takes a while, and where it is served.
async fn served(pair: &Pair) -> (Sidecar, String) {
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text); CREATE TABLE public.\"<b>\" (id int PRIMARY KEY, body text)").await;
    pair.source
        .exec(
            "INSERT INTO public.items SELECT n, rpad((n % 20000)::text, 90, '.') FROM generate_series(1, 60000) AS n; \
             INSERT INTO public.\"<b>\" SELECT n, n::text FROM generate_series(1, 100) AS n; ANALYZE",
        )
        .await;
    let address = free_address();
    let process = pair
        .run(&["public.items", "public.\"<b>\""])
        .args(&[
            "--exclude-columns",
            "public.items:id",
            "--max-rate",
            "150kB",
            "--deadline",
            "1h",
            "--name",
            "shop",
        ])
        .args(&["--metrics-addr", &address])
        .chunk_size("100kB")
        .spawn();
    pair.target.wait_until("(SELECT count(*) FROM dedup.checkpoints WHERE status = 'verified') > 3").await;
    pair.target.wait_until("(SELECT migration_throughput_gbps FROM dedup.slis) > 0.0005").await;
    (process, format!("http://{address}"))
}

async fn finish(pair: &Pair, process: Sidecar) {
    pair.target.exec("SELECT dedup.set_rate(run_id, 100000000) FROM dedup.runs").await;
    let output = process.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
}

/// A sample's value by the beginning of its line.
fn value(metrics: &str, name: &str) -> f64 {
    let line = metrics
        .lines()
        .find(|line| line.starts_with(name))
        .unwrap_or_else(|| panic!("no {name} in\n{metrics}"));
    line.rsplit(' ').next().and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{line}"))
}

/// The figures are those of the views, and a target that is away does not take its worker along.
#[tokio::test(flavor = "multi_thread")]
async fn metrics_and_health() {
    let mut pair = Pair::start().await;
    let (process, url) = served(&pair).await;
    assert_eq!(get(&format!("{url}/healthz")).await, (200, "ok\n".to_owned()));
    assert_eq!(get(&format!("{url}/readyz")).await, (200, "ready\n".to_owned()));
    let (status, metrics) = get(&format!("{url}/metrics")).await;
    assert_eq!(status, 200);
    assert!(metrics.ends_with("# EOF\n"), "{metrics}");
    assert_eq!(value(&metrics, "pg_dedup_migrate_target_up "), 1.0);
    assert!(value(&metrics, "pg_dedup_migrate_migration_throughput_gbps{") > 0.0005);
    assert!(value(&metrics, "pg_dedup_migrate_chunk_completion_rate{") > 3.0);
    assert!(value(&metrics, "pg_dedup_migrate_checkpoint_lag_seconds{") < 30.0);
    assert!(value(&metrics, "pg_dedup_migrate_eta_seconds{") > 1.0);
    assert!((3000.0..3600.0).contains(&value(&metrics, "pg_dedup_migrate_time_to_deadline_seconds{")));
    assert_eq!(value(&metrics, "pg_dedup_migrate_throttle_limit_bytes_per_second{"), 150_000.0);
    assert!((0.0..0.01).contains(&value(&metrics, "pg_dedup_migrate_filter_false_positive_ratio{")));
    for part in [
        "pg_dedup_migrate_build_info{version=",
        "pg_dedup_migrate_run_status{run=\"shop\"",
        "pg_dedup_migrate_records_total{run=\"shop\"",
        "pg_dedup_migrate_source_bytes_total{run=\"shop\"",
        "pg_dedup_migrate_chunks{run=\"shop\"",
        "pg_dedup_migrate_chunk_retries_total{",
        "pg_dedup_migrate_chunk_phase_seconds_bucket{le=\"0.001\",phase=\"read\"}",
        "pg_dedup_migrate_chunk_phase_seconds_count{phase=\"finish\"}",
    ] {
        assert!(metrics.lines().any(|line| line.starts_with(part)), "no {part} in\n{metrics}");
    }

    pair.target_cluster.stop(Stop::Immediate);
    let mut ready = get(&format!("{url}/readyz")).await;
    for _ in 0..100 {
        if ready.0 == 503 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        ready = get(&format!("{url}/readyz")).await;
    }
    assert_eq!(ready.0, 503, "{}", ready.1);
    assert_eq!(get(&format!("{url}/healthz")).await.0, 200);
    assert_eq!(value(&get(&format!("{url}/metrics")).await.1, "pg_dedup_migrate_target_up "), 0.0);
    pair.target_cluster.start_again();
    pair.reconnect_target().await;
    for _ in 0..200 {
        if get(&format!("{url}/readyz")).await.0 == 200 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(get(&format!("{url}/readyz")).await.0, 200);
    finish(&pair, process).await;
    assert!(try_get(&format!("{url}/healthz")).await.is_none(), "it is served on after its end");
}

/// An address that is taken is told before a run is created.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_in_use() {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY)").await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    let output = pair.run(&["public.items"]).args(&["--metrics-addr", &address]).exits(exit::ERROR).await;
    output.says("can't serve metrics").says("--metrics-addr");
    assert_eq!(pair.target.one::<i64>("SELECT count(*) FROM dedup.runs").await, 0);
}

/// What a browser makes of the page: it runs the page's script, which asks again and replaces what is shown.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_in_a_browser() {
    let pair = Pair::start().await;
    let (process, url) = served(&pair).await;
    let page = browse(&format!("{url}/"));
    let rounds: u32 = page
        .split("data-rounds=\"")
        .nth(1)
        .and_then(|rest| rest.split('"').next())
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or_else(|| panic!("never refreshed:\n{page}"));
    assert!(rounds >= 1);
    for part in [
        "shop",
        "running",
        "public.items",
        "Throughput",
        "<svg",
        "MB/s",
        "Throttle",
        "class=\"v\"",
        "class=\"p\"",
        "deadline",
    ] {
        assert!(page.contains(part), "no {part} in\n{page}");
    }
    // A name that looks like a tag is shown, not obeyed.
    assert!(page.contains("&lt;b&gt;") && !page.contains("<b>\""), "{page}");
    assert!(
        !page.contains("http://") || !page.contains("src="),
        "the page loads something from elsewhere:\n{page}"
    );
    finish(&pair, process).await;
}

/// The document that a headless browser has after five seconds.
fn browse(url: &str) -> String {
    let profile = tempfile::tempdir().expect("a folder");
    let output = Command::new("chromium")
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--virtual-time-budget=5000",
            "--timeout=20000",
        ])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(["--dump-dom", url])
        .output()
        .expect("chromium: scripts/test_tools.sh installs it");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn rules() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docker/prometheus").canonicalize().expect("the rules")
}

/// The rules are well formed, and fire and clear on the figures that their own tests make up.
#[test]
fn rules_are_sound() {
    for arguments in [["check", "rules", "rules.yml"], ["test", "rules", "rules.test.yml"]] {
        let output = Command::new("promtool")
            .current_dir(rules())
            .args(arguments)
            .output()
            .expect("promtool: scripts/test_tools.sh installs it");
        let told =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{told}");
    }
}

/// Prometheus itself scrapes a run, evaluates the rules over it, and an alert of the target arrives there and goes again.
#[tokio::test(flavor = "multi_thread")]
async fn prometheus_scrapes_a_run() {
    let pair = Pair::start().await;
    let (process, url) = served(&pair).await;
    let prometheus = Prometheus::start(url.trim_start_matches("http://"));
    prometheus
        .wait_for("pg_dedup_migrate_records_total{outcome=\"duplicate\",table=\"public.items\"}", |n| {
            n >= 0.0
        })
        .await;
    prometheus.wait_for("pg_dedup_migrate_chunk_phase_seconds_count{phase=\"write\"}", |n| n > 0.0).await;
    prometheus
        .wait_for("count by (run) (pg_dedup_migrate_run_status{state=\"running\"})", |n| n == 1.0)
        .await;
    // As if it had gone on like this for a minute.
    pair.target.exec("UPDATE dedup.runs SET running_since = running_since - interval '2 min'").await;
    prometheus.wait_for("ALERTS{alertname=\"DedupMigrateThroughput\",severity=\"P1\"}", |n| n == 1.0).await;
    let unhealthy = prometheus.query("count(up{job=\"pg_dedup_migrate\"} == 0)").await;
    assert_eq!(unhealthy, None, "a scrape failed");
    finish(&pair, process).await;
}

struct Prometheus {
    process: std::process::Child,
    url: String,
    _dir: tempfile::TempDir,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Prometheus {
    fn start(target: &str) -> Prometheus {
        let dir = tempfile::tempdir().expect("a folder");
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}/rules.yml']\n\
             scrape_configs:\n  - job_name: pg_dedup_migrate\n    static_configs: [{{targets: ['{target}']}}]\n",
            rules().display()
        );
        std::fs::write(dir.path().join("prometheus.yml"), config).expect("its configuration");
        let address = free_address();
        let process = Command::new("prometheus")
            .arg(format!("--config.file={}/prometheus.yml", dir.path().display()))
            .arg(format!("--storage.tsdb.path={}/data", dir.path().display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("prometheus: scripts/test_tools.sh installs it");
        Prometheus { process, url: format!("http://{address}"), _dir: dir }
    }

    /// The first value that a query has.
    async fn query(&self, query: &str) -> Option<f64> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let (_, body) = try_get(&format!("{}/api/v1/query?query={encoded}", self.url)).await?;
        let answer: serde_json::Value = serde_json::from_str(&body).ok()?;
        answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()
    }

    async fn wait_for(&self, query: &str, holds: impl Fn(f64) -> bool) {
        let mut last = None;
        for _ in 0..300 {
            last = self.query(query).await;
            if last.is_some_and(&holds) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{query}: {last:?}");
    }
}

/// Every line on standard error is a JSON object, the error at the end, too.
#[tokio::test(flavor = "multi_thread")]
async fn log_lines_as_json() {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY)").await;
    pair.source.exec("INSERT INTO public.items SELECT generate_series(1, 100)").await;
    let done = pair.run(&["public.items"]).args(&["--log-format", "json"]).exits(exit::DONE).await;
    let failed = pair.sidecar_on_target("status").args(&["nobody", "--log-format", "json"]).output().await;
    assert_eq!(failed.code, Some(exit::ERROR));
    for output in [&done, &failed] {
        assert!(!output.stderr.trim().is_empty());
        for line in output.stderr.lines() {
            let line: serde_json::Value =
                serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
            for field in ["timestamp", "level", "message"] {
                assert!(line[field].is_string(), "{line}");
            }
        }
    }
    assert!(failed.stderr.contains("\"sqlstate\":\"42704\""), "{}", failed.stderr);
}

/// Clients that never say what they want take no descriptors from the workers, and `serve` serves a run that nobody works on.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_say_nothing() {
    use std::io::Write;
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY)").await;
    pair.run(&["public.items"]).exits(exit::DONE).await;
    let address = free_address();
    let process = pair.sidecar_on_target("serve").arg("last").args(&["--metrics-addr", &address]).spawn();
    let health = format!("http://{address}/healthz");
    assert_eq!(get(&health).await.0, 200);
    let clients: Vec<std::net::TcpStream> = (0..200)
        .filter_map(|_| {
            let mut client = std::net::TcpStream::connect(&address).ok()?;
            client.write_all(b"GET /metrics HTTP/1.1\r\nHost: ").ok()?;
            Some(client)
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(7)).await;
    // Their time is up.
    assert_eq!(try_get(&health).await.map(|answer| answer.0), Some(200));
    drop(clients);
    let (_, metrics) = get(&format!("http://{address}/metrics")).await;
    let is_done =
        |line: &str| line.contains("run_status") && line.contains("state=\"done\"") && line.ends_with(" 1.0");
    assert!(metrics.lines().any(is_done), "{metrics}");
    process.interrupt();
    assert_eq!(process.finish().await.code, Some(exit::DONE));
}

/// A backend that hangs, as all of them do where a disk does, is not waited for: health is told in time, and new sessions are made.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_hangs() {
    let pair = Pair::start().await;
    let (process, url) = served(&pair).await;
    assert_eq!(get(&format!("{url}/readyz")).await.0, 200);
    let observers =
        "SELECT pid::text FROM pg_stat_activity WHERE application_name = 'pg-dedup-migrate/observer'";
    let hanging = pair.target.column(observers).await;
    assert!(!hanging.is_empty());
    let signal = |signal: &str| {
        let done = Command::new("kill").arg(signal).args(&hanging).status();
        assert!(done.is_ok_and(|status| status.success()), "kill {signal}");
    };
    signal("-STOP");
    for _ in 0..3 {
        let began = Instant::now();
        get(&format!("{url}/readyz")).await;
        assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // Looked at again, by others.
    pair.target
        .wait_until(&format!("EXISTS ({observers} AND pid <> ALL ('{{{}}}'))", hanging.join(",")))
        .await;
    for _ in 0..100 {
        if get(&format!("{url}/readyz")).await.0 == 200 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(get(&format!("{url}/readyz")).await.0, 200);
    signal("-CONT");
    finish(&pair, process).await;
}
