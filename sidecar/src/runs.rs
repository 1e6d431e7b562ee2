//! Finding a run by what a person calls it, and checking that both sides fit together.

use uuid::Uuid;

use crate::cli::Verify;
use crate::conn::Session;
use crate::error::{At, Error, Kind, Result, Side};

/// A run as `dedup.runs` has it.
#[derive(Debug, Clone)]
pub struct Run {
    /// Its id.
    pub run_id: Uuid,
    /// Its name.
    pub name: String,
    /// Its status.
    pub status: String,
    /// Leases a chunk may have.
    pub max_attempts: i32,
    /// When what it writes is read back.
    pub verify: Verify,
    /// What the sidecar that created it was told.
    pub settings: serde_json::Value,
}

impl Run {
    /// A number among the settings.
    pub fn setting(&self, name: &str) -> Option<u64> {
        self.settings.get(name)?.as_u64()
    }
}

/// Finds a run by id, by a unique prefix of it, by its name, or the one created last.
pub async fn find(session: &Session, wanted: &str) -> Result<Run> {
    let doing = "looking for the run";
    let rows = session
        .client
        .query(
            "SELECT run_id, name, status, coalesce((options ->> 'max_attempts')::int4, 5), \
                 coalesce(options -> 'settings', '{}'::jsonb), coalesce(options ->> 'verify', 'chunk') = 'end' FROM dedup.runs \
             WHERE CASE WHEN $1 = 'last' THEN created_at = (SELECT max(created_at) FROM dedup.runs) \
                 ELSE name = $1 OR (length($1) >= 4 AND starts_with(run_id::text, lower($1))) END \
             ORDER BY created_at DESC LIMIT 3",
            &[&wanted],
        )
        .await
        .at(session.side, doing)?;
    match rows.as_slice() {
        [] => Err(Error::new(Side::Target, Kind::Refused, format!("there is no run \"{wanted}\""))
            .sqlstate("42704")
            .hint("pg-dedup-migrate status lists the runs")),
        [row] => Ok(Run {
            run_id: row.try_get(0).at(session.side, doing)?,
            name: row.try_get(1).at(session.side, doing)?,
            status: row.try_get(2).at(session.side, doing)?,
            max_attempts: row.try_get(3).at(session.side, doing)?,
            settings: row.try_get(4).at(session.side, doing)?,
            verify: if row.try_get(5).at(session.side, doing)? { Verify::End } else { Verify::Chunk },
        }),
        _ => {
            Err(Error::new(Side::Target, Kind::Refused, format!("more than one run is called \"{wanted}\""))
                .hint("use more of the run's id; pg-dedup-migrate status lists the runs"))
        }
    }
}

/// Refuses another source than the run was planned on.
pub async fn check_source(source: &Session, run: &Run) -> Result<()> {
    let identity = identity(source).await?;
    match run.settings.get("source").and_then(|source| source.as_str()) {
        Some(planned) if planned != identity => Err(Error::refused("this is another source than the run's")
            .detail(format!("the run's is {planned}, this one is {identity}"))),
        _ => Ok(()),
    }
}

/// Refuses a target whose extension is missing, of another version, or hashes otherwise.
pub async fn check_versions(target: &Session) -> Result<String> {
    let doing = "asking for the extension's version";
    let installed = target
        .client
        .query_opt("SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'pg_dedup_migrate'", &[])
        .await
        .at(Side::Target, doing)?;
    if installed.is_none() {
        return Err(Error::new(
            Side::Target,
            Kind::Refused,
            "extension pg_dedup_migrate is not installed in this database",
        )
        .sqlstate("42704")
        .hint("CREATE EXTENSION pg_dedup_migrate; it has to be in shared_preload_libraries too"));
    }
    let row = target
        .client
        .query_one("SELECT dedup.version()::text, dedup.content_hash_version()::int4", &[])
        .await
        .at(Side::Target, doing)?;
    let version: String = row.try_get(0).at(Side::Target, doing)?;
    let encoding: i32 = row.try_get(1).at(Side::Target, doing)?;
    let ours = env!("CARGO_PKG_VERSION");
    if encoding != i32::from(pg_dedup_record::ENCODING_VERSION) {
        return Err(Error::refused(format!(
            "the extension hashes by encoding {encoding}, this program by {}",
            pg_dedup_record::ENCODING_VERSION
        ))
        .hint("install the same version of both"));
    }
    if !compatible(&version, ours) {
        return Err(Error::refused(format!("the extension is version {version}, this program {ours}"))
            .hint("install the same version of both"));
    }
    Ok(version)
}

/// Versions with the same first two numbers speak the same protocol.
fn compatible(theirs: &str, ours: &str) -> bool {
    let series = |version: &str| version.split('.').take(2).map(str::to_owned).collect::<Vec<_>>();
    series(theirs) == series(ours)
}

/// What tells one database from another: the cluster's system identifier, where it may be asked for, and the name.
pub async fn identity(session: &Session) -> Result<String> {
    let database: String = session
        .client
        .query_one("SELECT pg_catalog.current_database()::text", &[])
        .await
        .and_then(|row| row.try_get(0))
        .at(session.side, "asking for the database")?;
    let system = session
        .client
        .query_one("SELECT system_identifier::text FROM pg_catalog.pg_control_system()", &[])
        .await
        .and_then(|row| row.try_get::<_, String>(0));
    Ok(match system {
        Ok(system) => format!("{system}/{database}"),
        Err(_) => format!("-/{database}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patch_versions_go_together() {
        assert!(compatible("0.1.0", "0.1.7"));
        assert!(!compatible("0.2.0", "0.1.0"));
        assert!(!compatible("1.1.0", "0.1.0"));
    }
}
