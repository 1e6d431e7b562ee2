//! Reports and archives: what they say is what the target says, and what is in an archive is what its manifest says.

use std::io::Read;
use std::path::{Path, PathBuf};

use integration::db::Db;
use integration::pair::{DATABASE, Pair};
use integration::sidecar::exit;
use sha2::{Digest, Sha256};

/// A run with duplicates, quarantine and a reconciliation behind it.
pub async fn finished() -> Pair {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO public.items SELECT n, 'item ' || n % 2000 FROM generate_series(1, 3000) AS n; ANALYZE public.items").await;
    pair.target.exec("ALTER TABLE public.items ADD CHECK (body <> 'item 7')").await;
    pair.run(&["public.items"])
        .args(&["--exclude-columns", "public.items:id", "--name", "shop | \"odd\" <name>"])
        .chunk_size("20kB")
        .exits(exit::LEFT_ASIDE)
        .await;
    pair.reconcile().exits(exit::LEFT_ASIDE).await;
    pair
}

/// Writes an archive; answers where it is.
pub async fn archive(pair: &Pair, dir: &Path) -> PathBuf {
    let output = pair
        .sidecar_on_target("report")
        .args(&["last", "--archive", &dir.display().to_string()])
        .exits(exit::DONE)
        .await;
    PathBuf::from(output.stdout.trim())
}

/// Counts as the target has them.
async fn books(db: &Db) -> (i64, i64, i64) {
    (
        db.one("SELECT source_count FROM dedup.progress").await,
        db.one("SELECT duplicate_count FROM dedup.progress").await,
        db.one("SELECT quarantined_count FROM dedup.progress").await,
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_in_every_format() {
    let pair = finished().await;
    let (source, duplicates, quarantined) = books(&pair.target).await;
    assert!(duplicates > 0 && quarantined > 0);
    let report = async |format: &str| {
        pair.sidecar_on_target("report").args(&["last", "--format", format]).exits(exit::DONE).await.stdout
    };
    let json: serde_json::Value = serde_json::from_str(&report("json").await).expect("JSON");
    assert_eq!(json["progress"]["source_count"], source);
    assert_eq!(json["tables"][0]["duplicate_count"], duplicates);
    assert_eq!(json["reconciliations"][0]["verdict"], "clean");
    assert_eq!(json["reconciliations"][0]["source_count"], source);
    assert_eq!(json["quarantine"][0]["records"], quarantined);
    assert_eq!(json["quarantine"][0]["sqlstate"], "23514");
    assert_eq!(json["versions"]["hash"], 1);
    assert!(json["phase_seconds"]["write"].as_f64().is_some_and(|seconds| seconds > 0.0));
    assert!(json["chunk_seconds"].as_array().is_some_and(|chunks| chunks.len() > 2));

    let html = report("html").await;
    for part in [
        "Reconciliation",
        "clean",
        "23514",
        "check_violation",
        "Duplicates by table",
        "Settings",
        "<svg",
        "Time a chunk took",
        "public.items",
    ] {
        assert!(html.contains(part), "no {part} in the HTML report");
    }
    assert!(html.contains("&lt;name&gt;") && !html.contains("<name>"), "a name is not escaped");
    for loads in ["src=", "href=", "@import", "url("] {
        assert!(!html.contains(loads), "the report is not self-contained: {loads}");
    }
    let md = report("md").await;
    for part in ["shop \\| \"odd\"", "## Books", "| 3,000 |", "**clean**", "| 23514 | check_violation |"] {
        assert!(md.contains(part), "no {part} in\n{md}");
    }
}

/// An archive is complete, its manifest true, and the target knows of it.
#[tokio::test(flavor = "multi_thread")]
async fn an_archive() {
    let pair = finished().await;
    let dir = tempfile::tempdir().expect("a folder");
    let place = archive(&pair, dir.path()).await;
    let read = |name: &str| std::fs::read(place.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    let manifest = read("manifest.json");
    let sha256 = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
    let parsed: serde_json::Value = serde_json::from_slice(&manifest).expect("JSON");
    let files = parsed["files"].as_array().expect("files");
    assert_eq!(files.len(), 7);
    for file in files {
        let content = read(file["name"].as_str().expect("a name"));
        assert_eq!(file["sha256"], sha256(&content), "{file}");
        assert_eq!(file["bytes"], content.len(), "{file}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).expect("the folder").count(), 1, "something is left beside it");
    let known: String = pair.target.one("SELECT encode(manifest_sha256, 'hex') FROM dedup.archives").await;
    assert_eq!(known, sha256(&manifest));
    let location: String = pair.target.one("SELECT location FROM dedup.archives").await;
    assert!(location.ends_with(&place.display().to_string()), "{location}");

    let lines = |name: &str| {
        let mut text = String::new();
        flate2::read::GzDecoder::new(&read(name)[..]).read_to_string(&mut text).expect("gzip");
        text.lines().count() as i64 - 1
    };
    let (source, duplicates, quarantined) = books(&pair.target).await;
    assert_eq!(lines("ledger.csv.gz"), duplicates);
    assert_eq!(lines("quarantine.csv.gz"), quarantined);
    assert_eq!(
        lines("checkpoints.csv.gz"),
        pair.target.one::<i64>("SELECT count(*) FROM dedup.checkpoints").await
    );
    let before_it = "SELECT count(*) FROM dedup.events WHERE run_id IS NOT NULL AND kind <> 'archived'";
    assert_eq!(lines("events.csv.gz"), pair.target.one::<i64>(before_it).await);
    assert!(source > 0);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(place.metadata().expect("it").permissions().mode() & 0o777, 0o700);
    }
}

/// Where nothing can be written nothing is recorded.
#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_can_not_be_written() {
    let pair = finished().await;
    let file = tempfile::NamedTempFile::new().expect("a file");
    let dir = file.path().join("below");
    let output = pair
        .sidecar_on_target("report")
        .args(&["last", "--archive", &dir.display().to_string()])
        .exits(exit::ERROR)
        .await;
    output.says("can't write");
    assert_eq!(pair.target.one::<i64>("SELECT count(*) FROM dedup.archives").await, 0);
}

/// What the database makes of times is its own affair: an archive is that of the run as it ended, whatever it is.
#[tokio::test(flavor = "multi_thread")]
async fn an_archive_whatever_the_datestyle() {
    let pair = finished().await;
    for setting in ["datestyle = 'SQL, DMY'", "timezone = 'Asia/Kolkata'"] {
        pair.target.exec(&format!("ALTER DATABASE {DATABASE} SET {setting}")).await;
    }
    let dir = tempfile::tempdir().expect("a folder");
    archive(&pair, dir.path()).await;
    let same = "SELECT a.run_ended_at = dedup.ended_at(a.run_id) FROM dedup.archives AS a";
    assert!(pair.target.one::<bool>(same).await);
}
