//! Connections: how a session is opened, what it sets for itself, and its prepared statements.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use tokio::task::JoinHandle;
use tokio_postgres::config::{ChannelBinding, SslNegotiation, TargetSessionAttrs};
use tokio_postgres::error::{DbError, Severity};
use tokio_postgres::{AsyncMessage, CancelToken, Client, Statement};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::conninfo::{ConnInfo, SslMode};
use crate::error::{At, Error, Kind, Policy, Result, Side};
use crate::tls;

/// What a session is for; it decides application_name and timeouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Reads catalogs and samples; keeps an exported snapshot open.
    Planner,
    /// Reads chunks from the source.
    Reader,
    /// Writes chunks into the target.
    Writer,
    /// Reports signs of life.
    Heartbeat,
    /// Looks at a run: alerts, metrics, the page.
    Observer,
    /// Sets runs up, indexes, finishes, shows.
    Admin,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Planner => "planner",
            Role::Reader => "reader",
            Role::Writer => "writer",
            Role::Heartbeat => "heartbeat",
            Role::Observer => "observer",
            Role::Admin => "admin",
        }
    }

    /// `statement_timeout`, `lock_timeout`, `idle_in_transaction_session_timeout` and `transaction_timeout`, in seconds;
    /// 0 is none. A chunk is bounded; hashing a target that holds rows, or a snapshot's life, is not.
    fn timeouts(self) -> [u32; 4] {
        match self {
            Role::Planner => [0, 60, 0, 0],
            Role::Reader => [7200, 600, 600, 7200],
            Role::Writer => [7200, 600, 600, 7200],
            Role::Heartbeat | Role::Observer => [30, 10, 30, 60],
            Role::Admin => [0, 600, 0, 0],
        }
    }
}

/// In a select list: the statement's commit waits neither for the disk nor for a standby. For what is said again a second later: who does not answer
/// must not hold up signs of life.
pub const UNWAITED: &str = "pg_catalog.set_config('synchronous_commit', 'off', true)";

/// How long a session's end may take.
const GOODBYE: Duration = Duration::from_secs(1);

/// One server and how to reach it.
pub struct Endpoint {
    /// Source or target.
    pub side: Side,
    info: ConnInfo,
    config: tokio_postgres::Config,
    tls: MakeRustlsConnect,
}

impl Endpoint {
    /// Reads a connection string, completed as libpq does it.
    pub fn resolve(side: Side, text: &str) -> Result<Endpoint> {
        let named = |e: Error| e.detail(format!("the {side}'s connection string"));
        let info = ConnInfo::resolve(text).map_err(named)?;
        let config = config_of(&info).map_err(named)?;
        Ok(Endpoint { side, tls: tls::connector(&info).map_err(named)?, config, info })
    }

    /// Where it leads, without anything secret.
    pub fn place(&self) -> String {
        self.info.to_string()
    }

    /// The database's name.
    pub fn database(&self) -> &str {
        self.info.get("dbname").unwrap_or_default()
    }

    /// Opens a session for a role.
    pub async fn connect(&self, role: Role) -> Result<Session> {
        let mut config = self.config.clone();
        config.application_name(format!("pg-dedup-migrate/{}", role.name()));
        let (client, mut connection) = config
            .connect(self.tls.clone())
            .await
            .map_err(|e| Error::driver(self.side, &format!("can't connect to {}", self.info), e))?;
        let side = self.side;
        // On the runtime of whoever connects: a lane's sessions live on its thread.
        let driver = tokio::spawn(async move {
            while let Some(message) = std::future::poll_fn(|context| connection.poll_message(context)).await {
                match message {
                    Ok(AsyncMessage::Notice(notice)) => tell_notice(side, &notice),
                    Ok(_) => {}
                    Err(error) => {
                        tracing::debug!("{side}: connection ended: {error}");
                        break;
                    }
                }
            }
        });
        let session = Session {
            side,
            cancel: client.cancel_token(),
            tls: self.tls.clone(),
            client,
            driver,
            statements: Mutex::default(),
        };
        session.client.batch_execute(&settings(side, role)).await.at(side, "setting up the session")?;
        // Lanes, and whoever waits for them, may have nothing to say for long.
        session
            .set_if_known(&["idle_session_timeout", "transaction_timeout"], &[0, role.timeouts()[3]])
            .await?;
        if role == Role::Writer {
            // COPY's line numbers are read from messages, which may be translated; only superusers may change that,
            // and without it bad rows are found by bisection alone.
            if let Err(error) = session.client.batch_execute("SET lc_messages = 'C'").await {
                if error.is_closed() {
                    return Err(Error::driver(side, "setting up the session", error));
                }
                tracing::debug!("{side}: lc_messages stays as it is");
            }
        }
        Ok(session)
    }

    /// As [`Endpoint::connect`], trying again for about two minutes while the reason may pass: a server that restarts.
    pub async fn connect_patiently(&self, role: Role) -> Result<Session> {
        let pauses = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(250))
            .with_max_delay(Duration::from_secs(15))
            .with_max_times(14)
            .with_jitter();
        (|| self.connect(role))
            .retry(pauses)
            .when(|error| error.policy() == Policy::Retry)
            .notify(|error, pause| tracing::warn!("{error}; next try in {:.1} s", pause.as_secs_f64()))
            .await
    }
}

/// An open session with the statements it has prepared.
pub struct Session {
    /// Source or target.
    pub side: Side,
    /// The driver's client.
    pub client: Client,
    cancel: CancelToken,
    tls: MakeRustlsConnect,
    driver: JoinHandle<()>,
    statements: Mutex<HashMap<String, Statement>>,
}

impl Session {
    /// The statement, prepared once in the session's life.
    pub async fn prepared(&self, sql: &str) -> Result<Statement> {
        let known = self.lock().get(sql).cloned();
        if let Some(statement) = known {
            return Ok(statement);
        }
        let statement = self.client.prepare(sql).await.at(self.side, "preparing a statement")?;
        self.lock().insert(sql.to_owned(), statement.clone());
        Ok(statement)
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Says goodbye to the server before the runtime that the session lives on goes away; best effort.
    pub async fn close(self) {
        let Session { client, driver, .. } = self;
        drop(client);
        if tokio::time::timeout(GOODBYE, driver).await.is_err() {
            tracing::debug!("{}: the connection takes too long to close", self.side);
        }
    }

    /// Ends what the session is doing on the server; best effort, the caller drops the session next.
    pub async fn cancel(&self) {
        if let Err(error) = self.cancel.cancel_query(self.tls.clone()).await {
            tracing::debug!("{}: cancelling: {error}", self.side);
        }
    }

    /// The server's version as a number, like 150004.
    pub async fn version(&self) -> Result<i32> {
        let row = self
            .client
            .query_one("SELECT pg_catalog.current_setting('server_version_num')::int4", &[])
            .await
            .at(self.side, "asking for the version")?;
        row.try_get(0).at(self.side, "asking for the version")
    }

    /// Sets timeouts, in seconds, that only some server versions have.
    async fn set_if_known(&self, names: &[&str], seconds: &[u32]) -> Result<()> {
        let values: Vec<String> = seconds.iter().map(|seconds| format!("{seconds}s")).collect();
        self.client
            .execute(
                "SELECT pg_catalog.set_config(n, v, false) FROM ROWS FROM (unnest($1::text[]), unnest($2::text[])) AS u(n, v) \
                 WHERE pg_catalog.current_setting(n, true) IS NOT NULL",
                &[&names, &values],
            )
            .await
            .at(self.side, "setting up the session")?;
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Statement>> {
        self.statements.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// What the server says beside its answers. Its warnings are for the person who runs this; they may quote a trigger's own words, but no record.
fn tell_notice(side: Side, notice: &DbError) {
    let hint = notice.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
    match notice.parsed_severity() {
        Some(Severity::Warning) => tracing::warn!("{side}: {}{hint}", notice.message()),
        _ => tracing::debug!("{side}: {}", notice.message()),
    }
}

/// Seconds of silence before either end asks whether the other is there, seconds between questions, and questions without an answer that end
/// the connection. The server asks too: what a session holds goes with it soon after its host or the network has gone.
const KEEPALIVE_IDLE: u32 = 30;
const KEEPALIVE_INTERVAL: u32 = 10;
const KEEPALIVE_COUNT: u32 = 6;

/// What every session sets for itself. On the source also what casts to text depend on, so that a chunk's bounds and a
/// transform mean the same in every session; on the target the role's own settings stay, as triggers expect them.
fn settings(side: Side, role: Role) -> String {
    let [statement, lock, idle, _] = role.timeouts();
    let mut sql = format!(
        "SET statement_timeout = '{statement}s'; SET lock_timeout = '{lock}s'; \
         SET idle_in_transaction_session_timeout = '{idle}s'; SET client_encoding = 'UTF8'; \
         SET tcp_keepalives_idle = {KEEPALIVE_IDLE}; SET tcp_keepalives_interval = {KEEPALIVE_INTERVAL}; SET tcp_keepalives_count = {KEEPALIVE_COUNT};"
    );
    if side == Side::Source {
        sql.push_str(
            "SET default_transaction_read_only = on; SET TimeZone = 'UTC'; SET DateStyle = 'ISO, YMD'; \
             SET IntervalStyle = 'postgres'; SET extra_float_digits = 3; SET bytea_output = 'hex'; \
             SET standard_conforming_strings = on;",
        );
    }
    if side == Side::Target && role == Role::Admin {
        // Times go through text and back.
        sql.push_str("SET TimeZone = 'UTC'; SET DateStyle = 'ISO, YMD';");
    }
    if role == Role::Admin {
        // Type and table names are then qualified wherever they have to be.
        sql.push_str("SET search_path = pg_catalog, pg_temp;");
    }
    if role == Role::Writer {
        // Data and checkpoint commit together in one WAL stream: what is lost is lost as a whole and done again.
        sql.push_str("SET synchronous_commit = off;");
    }
    sql
}

fn config_of(info: &ConnInfo) -> Result<tokio_postgres::Config> {
    let mut config = tokio_postgres::Config::new();
    let hosts: Vec<&str> = info.hosts();
    if info.get("host").is_some_and(|host| !host.is_empty()) {
        for host in &hosts {
            config.host(*host);
        }
    }
    if let Some(addresses) = info.get("hostaddr").filter(|a| !a.is_empty()) {
        for address in addresses.split(',') {
            config.hostaddr(address.parse().map_err(|_| Error::usage("hostaddr must be an IP address"))?);
        }
    }
    for port in info.get("port").unwrap_or("5432").split(',') {
        let port = if port.is_empty() { "5432" } else { port };
        config.port(port.parse().map_err(|_| Error::usage("port must be a number up to 65535"))?);
    }
    config.user(info.get("user").unwrap_or_default());
    config.dbname(info.get("dbname").unwrap_or_default());
    if let Some(password) = info.get("password").filter(|p| !p.is_empty()) {
        config.password(password);
    }
    if let Some(options) = info.get("options").filter(|o| !o.is_empty()) {
        config.options(options);
    }
    // libpq pays no heed to sslmode on a Unix socket.
    let only_sockets = info.get("hostaddr").is_none() && hosts.iter().all(|host| host.starts_with('/'));
    config.ssl_mode(match info.ssl_mode()? {
        _ if only_sockets => tokio_postgres::config::SslMode::Disable,
        SslMode::Disable => tokio_postgres::config::SslMode::Disable,
        SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => {
            tokio_postgres::config::SslMode::Require
        }
    });
    match info.get("sslnegotiation").unwrap_or("postgres") {
        "postgres" => {}
        "direct" => {
            config.ssl_negotiation(SslNegotiation::Direct);
        }
        _ => return Err(Error::usage("sslnegotiation must be postgres or direct")),
    }
    match info.get("channel_binding").unwrap_or("prefer") {
        "prefer" => {}
        "disable" => {
            config.channel_binding(ChannelBinding::Disable);
        }
        "require" => {
            config.channel_binding(ChannelBinding::Require);
        }
        _ => return Err(Error::usage("channel_binding must be disable, prefer or require")),
    }
    match info.get("target_session_attrs").unwrap_or("any") {
        "any" | "prefer-standby" => {}
        "read-write" | "primary" => {
            config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        }
        "read-only" | "standby" => {
            config.target_session_attrs(TargetSessionAttrs::ReadOnly);
        }
        _ => return Err(Error::usage("unknown target_session_attrs")),
    }
    // libpq reads 0 as "wait for ever"; a worker must notice a dead host, so an unset value is bounded.
    match info.number::<u64>("connect_timeout")? {
        Some(0) => {}
        seconds => {
            config.connect_timeout(Duration::from_secs(seconds.unwrap_or(30).max(2)));
        }
    }
    if let Some(milliseconds) = info.number::<u64>("tcp_user_timeout")?.filter(|ms| *ms > 0) {
        config.tcp_user_timeout(Duration::from_millis(milliseconds));
    }
    config.keepalives(info.number::<u8>("keepalives")? != Some(0));
    config.keepalives_idle(Duration::from_secs(
        info.number("keepalives_idle")?.unwrap_or(KEEPALIVE_IDLE.into()),
    ));
    config.keepalives_interval(Duration::from_secs(
        info.number("keepalives_interval")?.unwrap_or(KEEPALIVE_INTERVAL.into()),
    ));
    config.keepalives_retries(info.number("keepalives_count")?.unwrap_or(KEEPALIVE_COUNT));
    Ok(config)
}

/// The answer of a query that must have exactly one row; anything else breaks the protocol.
pub fn protocol_error(side: Side, what: impl Into<String>) -> Error {
    Error::new(side, Kind::Protocol, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_reach_the_driver() {
        let info = ConnInfo::parse("host=a,b port=1,2 user=u dbname=d password=p sslmode=verify-ca").unwrap();
        let config = config_of(&info).unwrap();
        assert_eq!(config.get_hosts().len(), 2);
        assert_eq!(config.get_ports(), [1, 2]);
        assert_eq!(config.get_ssl_mode(), tokio_postgres::config::SslMode::Require);
        assert_eq!(config.get_keepalives_idle(), Duration::from_secs(30));
        let socket = ConnInfo::parse("host=/tmp sslmode=require").unwrap();
        assert_eq!(config_of(&socket).unwrap().get_ssl_mode(), tokio_postgres::config::SslMode::Disable);
        assert!(config_of(&ConnInfo::parse("host=a port=x").unwrap()).is_err());
    }

    #[test]
    fn source_sessions_are_read_only_and_writers_commit_asynchronously() {
        assert!(settings(Side::Source, Role::Reader).contains("default_transaction_read_only = on"));
        assert!(!settings(Side::Target, Role::Admin).contains("synchronous_commit"));
        assert!(settings(Side::Target, Role::Writer).contains("synchronous_commit = off"));
    }
}
