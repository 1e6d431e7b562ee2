//! A directory that tells all of a run: its report, its log, its ledger, its quarantine, and a manifest with the SHA-256 of each.
//!
//! It is written beside its final place and renamed when it is complete and on disk: what is there is whole.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::TryStreamExt;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio_postgres::Transaction;
use uuid::Uuid;

use super::Document;
use crate::cli::ReportFormat;
use crate::error::{At, Error, Result, Side};
use crate::runs::Run;
use pg_dedup_record::sql::quote_literal;

/// What was written.
pub struct Archive {
    /// Where.
    pub directory: PathBuf,
    /// Where, for whoever is on another host.
    pub location: String,
    /// SHA-256 of the manifest.
    pub manifest_sha256: Vec<u8>,
    /// Size of all files.
    pub bytes: u64,
}

/// A file of the archive, as the manifest has it.
#[derive(Debug, Serialize)]
struct Entry {
    name: &'static str,
    bytes: u64,
    sha256: String,
}

#[derive(Debug, Serialize)]
struct Manifest<'a> {
    run_id: Uuid,
    name: &'a str,
    status: &'a str,
    as_of: &'a str,
    sidecar_version: &'a str,
    files: &'a [Entry],
}

/// What a directory is called as long as its archive is not complete.
const WRITING: &str = ".writing-";
/// Age of such a directory that nobody writes to any more: each file of an archive is new in it.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

fn io_failed(path: &Path) -> impl Fn(io::Error) -> Error + '_ {
    move |e| Error::refused(format!("can't write {}: {e}", path.display()))
}

/// Removes what archives left that were killed while they were written, long enough ago that nobody writes there any more.
fn remove_abandoned(dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let is_abandoned = entry.file_name().to_string_lossy().starts_with(WRITING)
            && entry.metadata()?.modified()?.elapsed().is_ok_and(|age| age > ABANDONED);
        if is_abandoned {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Writes an archive of a run below a directory.
pub async fn write(
    transaction: &Transaction<'_>,
    run: &Run,
    document: &Document,
    dir: &Path,
) -> Result<Archive> {
    let failed = io_failed(dir);
    std::fs::create_dir_all(dir).map_err(&failed)?;
    remove_abandoned(dir).map_err(&failed)?;
    let place = tempfile::Builder::new().prefix(WRITING).tempdir_in(dir).map_err(&failed)?;
    // It holds refused records: for its owner alone, as long as nobody decides otherwise.
    std::fs::set_permissions(place.path(), Permissions::from_mode(0o700)).map_err(&failed)?;

    let mut files = Vec::new();
    for (name, format) in [
        ("report.html", ReportFormat::Html),
        ("report.json", ReportFormat::Json),
        ("report.md", ReportFormat::Md),
    ] {
        let mut file = Hashed::create(&place.path().join(name)).map_err(&failed)?;
        file.write_all(document.as_text(format)?.as_bytes()).map_err(&failed)?;
        files.push(file.finish(name).map_err(&failed)?);
    }
    let id = quote_literal(&run.run_id.to_string());
    for (name, sql) in [
        (
            "events.csv.gz",
            format!(
                "SELECT event_id, at, kind, chunk_id, actor, detail FROM dedup.events WHERE run_id = {id} ORDER BY event_id"
            ),
        ),
        (
            "ledger.csv.gz",
            format!(
                "SELECT chunk_id, target, source_key, content_hash, survivor FROM dedup.duplicates WHERE run_id = {id}"
            ),
        ),
        (
            "quarantine.csv.gz",
            format!(
                "SELECT chunk_id, source_key, sqlstate, reason, message, record, created_at FROM dedup.quarantine WHERE run_id = {id} ORDER BY quarantine_id"
            ),
        ),
        (
            "checkpoints.csv.gz",
            format!("SELECT * FROM dedup.checkpoints WHERE run_id = {id} ORDER BY chunk_no"),
        ),
    ] {
        files.push(copy(transaction, &sql, place.path(), name).await?);
    }

    let manifest = Manifest {
        run_id: run.run_id,
        name: &run.name,
        status: &document.report.overview.run.status,
        as_of: &document.report.overview.at,
        sidecar_version: env!("CARGO_PKG_VERSION"),
        files: &files,
    };
    let text = serde_json::to_string_pretty(&manifest).map_err(|e| Error::refused(e.to_string()))?;
    let mut file = Hashed::create(&place.path().join("manifest.json")).map_err(&failed)?;
    file.write_all(text.as_bytes()).map_err(&failed)?;
    let manifest_sha256 = file.sha256.clone().finalize().to_vec();
    let bytes = files.iter().map(|entry| entry.bytes).sum::<u64>()
        + file.finish("manifest.json").map_err(&failed)?.bytes;

    let directory = dir.join(directory_name(run, &document.report.overview.at));
    File::open(place.path()).and_then(|dir| dir.sync_all()).map_err(&failed)?;
    let written = place.keep();
    std::fs::rename(&written, &directory).map_err(|e| {
        // What nobody will find is not left lying.
        let _ = std::fs::remove_dir_all(&written);
        failed(e)
    })?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(&failed)?;
    let directory = directory.canonicalize().map_err(&failed)?;
    let host = whoami::hostname().unwrap_or_default();
    Ok(Archive { location: format!("{host}:{}", directory.display()), directory, manifest_sha256, bytes })
}

/// Name, id and time, in letters and of a length that every file system takes.
fn directory_name(run: &Run, at: &str) -> String {
    const NAME_LETTERS: usize = 80;
    let plain = |text: &str| -> String {
        text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect()
    };
    let name: String = plain(&run.name).chars().take(NAME_LETTERS).collect();
    let id = run.run_id.to_string();
    // As many digits of a second as the server prints.
    let time = at.split(['+', 'Z']).next().unwrap_or(at);
    format!("{name}-{}-{}", &id[..8], plain(time))
}

async fn copy(transaction: &Transaction<'_>, sql: &str, place: &Path, name: &'static str) -> Result<Entry> {
    let doing = "reading what is to be archived";
    let path = place.join(name);
    let failed = io_failed(&path);
    let mut gzip = GzEncoder::new(Hashed::create(&path).map_err(&failed)?, Compression::default());
    let copy = format!("COPY ({sql}) TO STDOUT (FORMAT csv, HEADER)");
    let stream = transaction.copy_out(&copy).await.at(Side::Target, doing)?;
    let mut stream = std::pin::pin!(stream);
    while let Some(part) = stream.try_next().await.at(Side::Target, doing)? {
        gzip.write_all(&part).map_err(&failed)?;
    }
    gzip.finish().and_then(|file| file.finish(name)).map_err(&failed)
}

/// A file that knows the SHA-256 of what was written to it.
struct Hashed {
    file: io::BufWriter<File>,
    sha256: Sha256,
    bytes: u64,
}

impl Hashed {
    fn create(path: &Path) -> io::Result<Hashed> {
        Ok(Hashed { file: io::BufWriter::new(File::create_new(path)?), sha256: Sha256::new(), bytes: 0 })
    }

    /// Puts it on disk.
    fn finish(mut self, name: &'static str) -> io::Result<Entry> {
        self.file.flush()?;
        self.file.get_ref().sync_all()?;
        let sha256 = self.sha256.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Entry { name, bytes: self.bytes, sha256 })
    }
}

impl Write for Hashed {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        let written = self.file.write(part)?;
        self.sha256.update(&part[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn only_what_nobody_writes_any_more_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".writing-old", ".writing-new", "archive"] {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("ledger.csv.gz"), "").unwrap();
            if name != ".writing-new" {
                let age = SystemTime::now() - 2 * ABANDONED;
                File::open(&path).unwrap().set_modified(age).unwrap();
            }
        }
        remove_abandoned(dir.path()).unwrap();
        let mut left: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".writing-new", "archive"]);
    }
}
