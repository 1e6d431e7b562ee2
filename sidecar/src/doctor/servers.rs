//! What `doctor` looks at on the servers themselves.

use std::collections::HashSet;

use tokio_postgres::SimpleQueryMessage;

use super::pairs::Amount;
use super::{Findings, Level};
use crate::config::Job;
use crate::conn::{Endpoint, Role, Session};
use crate::error::{At, Error, Result, Side};
use crate::plan::MAX_RECORDS;
use crate::worker;

/// Oldest source that is read: `pg_control_system`, `pg_current_wal_lsn`, identity columns.
const OLDEST_SOURCE: i32 = 100_000;
/// Oldest and newest target that the extension is built for.
const TARGETS: std::ops::Range<i32> = 150_000..190_000;

/// The source: version, encoding, standby, connections, large objects.
pub async fn check_source(
    endpoint: &Endpoint,
    source: &Session,
    job: &Job,
    findings: &mut Findings,
) -> Result<()> {
    let version = source.version().await?;
    let level = if version < OLDEST_SOURCE { Level::Blocker } else { Level::Ok };
    findings.add(level, "source", format!("{}, server version {}", endpoint.place(), shown(version)));
    check_encoding(source, findings).await?;
    if flag(source, "SELECT pg_catalog.pg_is_in_recovery()").await? {
        findings
            .add(
                Level::Warning,
                "source",
                "a standby: a chunk's query may be cancelled by recovery conflicts",
            )
            .hint(
                "hot_standby_feedback = on, or max_standby_streaming_delay longer than a chunk takes to read",
            );
    }
    if flag(source, "SELECT EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata)").await? {
        findings.add(
            Level::Warning,
            "source",
            "large objects are not migrated; columns of type oid only name them",
        );
    }
    check_timeouts(endpoint, findings).await?;
    check_sight(source, "source", findings).await?;
    // A reader a lane, a planner each while planning, and one that asks or keeps a snapshot.
    check_connections(source, i64::from(worker::lanes(job.workers)) + 3, findings).await
}

/// The target: version, encoding, standby, preload, connections, timeouts, WAL kept by slots.
pub async fn check_target(
    endpoint: &Endpoint,
    target: &Session,
    job: &Job,
    findings: &mut Findings,
) -> Result<()> {
    let version = target.version().await?;
    let level = if TARGETS.contains(&version) { Level::Ok } else { Level::Blocker };
    findings.add(level, "target", format!("{}, server version {}", endpoint.place(), shown(version)));
    check_encoding(target, findings).await?;
    if flag(target, "SELECT pg_catalog.pg_is_in_recovery()").await? {
        findings.add(Level::Blocker, "target", "a standby can't be written");
    }
    check_preload(target, findings).await?;
    check_settings(target, findings).await?;
    check_timeouts(endpoint, findings).await?;
    check_sight(target, "target", findings).await?;
    // A writer a lane, heartbeat, throttle (two), observer, administration, and a vacuum each at the end when the writers are gone.
    check_connections(target, i64::from(worker::lanes(job.workers)) + 5, findings).await
}

/// Whether the throttle may see who else is at work.
async fn check_sight(session: &Session, place: &'static str, findings: &mut Findings) -> Result<()> {
    let may_see = "SELECT coalesce((SELECT pg_catalog.pg_has_role(oid, 'USAGE') FROM pg_catalog.pg_roles WHERE rolname = 'pg_read_all_stats'), false)";
    if !flag(session, may_see).await? {
        findings
            .add(
                Level::Warning,
                place,
                "sessions, snapshots and standbys of others may not be seen, and what the throttle can't read is bad: a run goes at its least rate",
            )
            .hint("GRANT pg_read_all_stats to the role, or run with --no-throttle");
    }
    Ok(())
}

/// Memory and disk for the size that is planned.
pub async fn check_sizes(
    target: &Session,
    job: &Job,
    amount: &Amount,
    findings: &mut Findings,
) -> Result<()> {
    // 12 bits a key keep the filter's false answers below one in a hundred; a claim takes 16 bytes at a load of at most 7/8.
    let records = amount.records;
    let filter = records * 1.5 / 1e6;
    let index = records * INDEX_BYTES / 1e6;
    let claims = f64::from(job.workers) * (MAX_RECORDS as f64).min(records.max(1.0)) * 16.0 * 8.0 / 7.0 / 1e6;
    findings.add(
        Level::Note,
        "target",
        format!(
            "about {records:.0} records: a filter of at least {filter:.0} MB and {claims:.0} MB for claims are enough, the hash index \
             takes up to {index:.0} MB of disk beside tables, indexes and WAL"
        ),
    );
    let rows = target
        .client
        .query(
            "SELECT name, coalesce(setting, '') || coalesce(unit, '') FROM pg_catalog.pg_settings \
             WHERE name LIKE 'pg\\_dedup\\_migrate.%' OR name IN ('max_wal_size', 'checkpoint_timeout') ORDER BY name",
            &[],
        )
        .await
        .at(target.side, "reading settings")?;
    let settings: Vec<String> = rows
        .iter()
        .map(|row| Ok(format!("{} = {}", row.try_get::<_, String>(0)?, row.try_get::<_, String>(1)?)))
        .collect::<std::result::Result<_, tokio_postgres::Error>>()
        .at(target.side, "reading settings")?;
    findings.add(Level::Note, "target", format!("settings: {}", settings.join(", ")));
    Ok(())
}

/// Bytes that the hash index takes a key, at most.
const INDEX_BYTES: f64 = 56.0;

/// Whether the target has room for what the sources hold: everything new, nothing a duplicate.
pub async fn check_disk(target: &Session, amount: &Amount, findings: &mut Findings) -> Result<()> {
    let doing = "asking for free disk space";
    let rows = match target.client.query("SELECT place, free_bytes FROM dedup.disk_space()", &[]).await {
        Ok(rows) => rows,
        // Such as a role that may not call it.
        Err(error) => {
            findings.add(Level::Note, "target", format!("{}", Error::driver(target.side, doing, error)));
            return Ok(());
        }
    };
    let wal: i64 = target
        .client
        .query_one("SELECT pg_catalog.pg_size_bytes(pg_catalog.current_setting('max_wal_size'))", &[])
        .await
        .and_then(|row| row.try_get(0))
        .at(target.side, doing)?;
    for row in rows {
        let place: String = row.try_get(0).at(target.side, doing)?;
        let free: i64 = row.try_get(1).at(target.side, doing)?;
        let of_tablespace = |name: &str| amount.bytes.get(name).copied().unwrap_or(0.0);
        let needed = match place.as_str() {
            "data directory" => of_tablespace("pg_default") + amount.records * INDEX_BYTES,
            // It may pass max_wal_size for a while, and by far where an archiver or a slot keeps it.
            "pg_wal" => 2.0 * wal as f64,
            other => other.strip_prefix("tablespace ").map_or(0.0, of_tablespace),
        };
        room(&place, free as f64, needed, findings);
    }
    Ok(())
}

fn room(place: &str, free: f64, needed: f64, findings: &mut Findings) {
    let message = |says: &str| format!("{place}: {:.1} GB free, {says} {:.1} GB", free / 1e9, needed / 1e9);
    if free >= needed {
        findings.add(Level::Ok, "target", message("at most needed:"));
    } else {
        findings.add(Level::Warning, "target", message("without duplicates the run takes up to")).hint(
            "make room; a run that meets a full disk pauses, and goes on with --resume when there is room again",
        );
    }
}

/// What bounds a worker's session once it has said what it wants: a pooler or a login trigger may have other ideas.
async fn check_timeouts(endpoint: &Endpoint, findings: &mut Findings) -> Result<()> {
    let role = if endpoint.side == Side::Source { Role::Reader } else { Role::Writer };
    let session = endpoint.connect(role).await?;
    let doing = "looking at timeouts";
    let rows = session
        .client
        .query(
            "SELECT name, setting::int8 * CASE unit WHEN 'ms' THEN 1 ELSE 1000 END FROM pg_catalog.pg_settings \
             WHERE name IN ('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'idle_session_timeout', \
                 'transaction_timeout') ORDER BY name",
            &[],
        )
        .await
        .at(session.side, doing)?;
    let mut short = Vec::new();
    let mut all = Vec::new();
    for row in rows {
        let name: String = row.try_get(0).at(session.side, doing)?;
        let milliseconds: i64 = row.try_get(1).at(session.side, doing)?;
        let shown = format!(
            "{name} = {}",
            if milliseconds == 0 { "0".into() } else { format!("{} s", milliseconds / 1000) }
        );
        if milliseconds > 0 && milliseconds < SHORT_TIMEOUT {
            short.push(shown.clone());
        }
        all.push(shown);
    }
    session.close().await;
    if short.is_empty() {
        findings.add(Level::Ok, endpoint.side, format!("a worker's session: {}", all.join(", ")));
    } else {
        findings
            .add(Level::Warning, endpoint.side, format!("a worker's session keeps {}", short.join(", ")))
            .hint("something undoes what the session sets for itself: a pooler, or a trigger at login");
    }
    Ok(())
}

/// No timeout that a worker's session sets for itself is as short, in ms.
const SHORT_TIMEOUT: i64 = 60_000;

async fn flag(session: &Session, sql: &str) -> Result<bool> {
    session
        .client
        .query_one(sql, &[])
        .await
        .and_then(|row| row.try_get(0))
        .at(session.side, "looking at the server")
}

async fn check_encoding(session: &Session, findings: &mut Findings) -> Result<()> {
    let encoding: String = session
        .client
        .query_one("SELECT pg_catalog.current_setting('server_encoding')", &[])
        .await
        .and_then(|row| row.try_get(0))
        .at(session.side, "asking for the encoding")?;
    if encoding == "SQL_ASCII" {
        findings
            .add(
                Level::Blocker,
                session.side,
                "encoding SQL_ASCII: the bytes of a text have no meaning to hash",
            )
            .hint("use a database with a real encoding");
    }
    Ok(())
}

async fn check_preload(target: &Session, findings: &mut Findings) -> Result<()> {
    let setting =
        target.client.query_one("SELECT pg_catalog.current_setting('shared_preload_libraries')", &[]).await;
    // The setting may be hidden from this role; the extension itself says then what is missing.
    let Ok(libraries) = setting.and_then(|row| row.try_get::<_, String>(0)) else {
        findings.add(Level::Note, "target", "shared_preload_libraries is hidden from this role");
        return Ok(());
    };
    let loaded = libraries.split(',').any(|name| name.trim().trim_matches('"').ends_with("pg_dedup_migrate"));
    if !loaded {
        let list = if libraries.trim().is_empty() { String::new() } else { format!("{libraries}, ") };
        findings.add(Level::Blocker, "target", "pg_dedup_migrate is not preloaded").hint(format!(
            "shared_preload_libraries = '{list}pg_dedup_migrate' in postgresql.conf, then restart"
        ));
    }
    Ok(())
}

/// A session whose backend changes, or is another's, too, shares backends with others: one is asked while the other holds the backend that it got. Asked
/// without prepared statements, which are the first thing that such a pooler breaks.
pub async fn is_shared(endpoint: &Endpoint, session: &Session) -> Result<bool> {
    /// Which backend a pool lends is its own affair: it is asked more than once.
    const ROUNDS: usize = 3;
    let other = endpoint.connect(Role::Admin).await?;
    let command =
        async |sql: &str| other.client.batch_execute(sql).await.at(session.side, "asking for the backend");
    let (mut mine, mut others) = (HashSet::new(), HashSet::new());
    for _ in 0..ROUNDS {
        mine.insert(backend(session).await?);
        command("BEGIN").await?;
        others.insert(backend(&other).await?);
        mine.insert(backend(session).await?);
        command("COMMIT").await?;
    }
    Ok(mine.len() > 1 || others.len() > 1 || !mine.is_disjoint(&others))
}

async fn backend(session: &Session) -> Result<Option<String>> {
    let answer = session.client.simple_query("SELECT pg_catalog.pg_backend_pid()").await;
    let answer = answer.at(session.side, "asking for the backend")?;
    Ok(answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    }))
}

async fn check_connections(session: &Session, needed: i64, findings: &mut Findings) -> Result<()> {
    let doing = "counting connections";
    let row = session
        .client
        .query_one(
            "SELECT pg_catalog.current_setting('max_connections')::int8 \
                 - pg_catalog.current_setting('superuser_reserved_connections')::int8 \
                 - (SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE backend_type = 'client backend'), \
                 (SELECT rolconnlimit::int8 FROM pg_catalog.pg_roles WHERE rolname = current_user)",
            &[],
        )
        .await
        .at(session.side, doing)?;
    let free: i64 = row.try_get(0).at(session.side, doing)?;
    let limit: Option<i64> = row.try_get(1).at(session.side, doing)?;
    let limit = limit.filter(|limit| *limit >= 0).unwrap_or(i64::MAX);
    if free.min(limit) < needed {
        findings
            .add(
                Level::Blocker,
                session.side,
                format!("{needed} connections are needed, {} are free", free.min(limit).max(0)),
            )
            .hint("fewer --workers, a higher max_connections, or a higher limit of the role");
    } else {
        findings.add(Level::Ok, session.side, format!("{needed} connections are needed, {free} are free"));
    }
    Ok(())
}

async fn check_settings(target: &Session, findings: &mut Findings) -> Result<()> {
    for (name, bad) in [("fsync", "off"), ("full_page_writes", "off")] {
        if flag(target, &format!("SELECT pg_catalog.current_setting('{name}') = '{bad}'")).await? {
            findings.add(
                Level::Warning,
                "target",
                format!("{name} is {bad}: a crash can lose what is called verified"),
            );
        }
    }
    if flag(target, "SELECT EXISTS (SELECT FROM pg_catalog.pg_replication_slots WHERE NOT active)").await? {
        findings
            .add(Level::Warning, "target", "an inactive replication slot keeps all WAL that the run writes")
            .hint("drop it, or bound it with max_slot_wal_keep_size");
    }
    Ok(())
}

fn shown(version: i32) -> String {
    if version >= 100_000 {
        format!("{}.{}", version / 10_000, version % 10_000)
    } else {
        version.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_shown_as_people_say_them() {
        assert_eq!(shown(150_004), "15.4");
        assert_eq!(shown(90_624), "90624");
    }

    #[test]
    fn too_little_room_is_told() {
        let mut findings = Findings::default();
        room("data directory", 10e9, 9e9, &mut findings);
        room("pg_wal", 1e9, 2e9, &mut findings);
        let text = findings.text();
        assert!(text.contains("ok       target: data directory: 10.0 GB free"), "{text}");
        assert!(text.contains("warning  target: pg_wal: 1.0 GB free"), "{text}");
    }
}
