//! What can go wrong, and the one place that decides what is done about it.
//!
//! An [`Error`] says on which side it happened ([`Side`]), what was being done, the server's SQLSTATE, detail and hint
//! where there are any, and keeps its cause. [`Error::policy`] maps it to a [`Policy`]; nothing else does.

use pg_dedup_record::refusal::{condition_name, refuses_record};
use std::fmt;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Where an error came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The source server.
    Source,
    /// The target server.
    Target,
    /// This process: flags, files, the plan.
    Here,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Source => "source",
            Side::Target => "target",
            Side::Here => "pg-dedup-migrate",
        })
    }
}

/// What kind of error it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Flags or configuration make no sense; exit code 2.
    Usage,
    /// The connection could not be made or was lost.
    Connection,
    /// The server answered with an error; its SQLSTATE is in [`Error::sqlstate`].
    Server,
    /// Something said no to the job as asked for: wrong version, missing table, type without a cast.
    Refused,
    /// The other side broke the protocol, or a stream was malformed.
    Protocol,
    /// A unique violation on the key although the key was absent a moment ago: somebody else wrote it.
    KeyAppeared,
    /// A foreign key is not satisfied yet and other chunks may still satisfy it.
    ForeignKeyLater,
    /// More records refused in one chunk than the error budget allows.
    OverBudget,
    /// The run is halted, because source and target differ.
    Halted,
    /// A person asked to stop.
    Interrupted,
}

/// What is done about an error of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Try again after a pause that grows with the attempts; bounded.
    Retry,
    /// Try again when other chunks are done.
    RetryAfterOthers,
    /// Pause the whole run until somebody has made room; costs no attempt.
    PauseRun,
    /// The chunk is failed with its reason; the others go on.
    FailChunk,
}

/// An error with kind, detail and source. Its text never holds record values or passwords.
#[derive(Debug, thiserror::Error)]
#[error("{side}: {message}")]
pub struct Error {
    /// Where it happened.
    pub side: Side,
    /// What kind it is.
    pub kind: Kind,
    /// One line, in PostgreSQL's style.
    pub message: String,
    /// The server's SQLSTATE.
    pub sqlstate: Option<String>,
    /// More to know.
    pub detail: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of this process.
    pub fn here(kind: Kind, message: impl Into<String>) -> Error {
        Error::new(Side::Here, kind, message)
    }

    /// An error found by this process about one side.
    pub fn new(side: Side, kind: Kind, message: impl Into<String>) -> Error {
        Error { side, kind, message: message.into(), sqlstate: None, detail: None, hint: None, source: None }
    }

    /// Bad flags or configuration.
    pub fn usage(message: impl Into<String>) -> Error {
        Error::here(Kind::Usage, message)
    }

    /// A job that can't be done as asked.
    pub fn refused(message: impl Into<String>) -> Error {
        Error::here(Kind::Refused, message)
    }

    /// Adds what to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Error {
        self.hint = Some(hint.into());
        self
    }

    /// Adds more to know.
    pub fn detail(mut self, detail: impl Into<String>) -> Error {
        self.detail = Some(detail.into());
        self
    }

    /// Sets the SQLSTATE that the chunk's checkpoint will show.
    pub fn sqlstate(mut self, sqlstate: impl Into<String>) -> Error {
        self.sqlstate = Some(sqlstate.into());
        self
    }

    /// Keeps the cause.
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        self.source = Some(source.into());
        self
    }

    /// Makes an error of what the driver said while `doing` something on `side`.
    pub fn driver(side: Side, doing: &str, error: tokio_postgres::Error) -> Error {
        Error::from_driver(side, doing, error, true)
    }

    /// As [`Error::driver`], for statements that read or carry records: a server's message may quote their values, which
    /// [`without_values`] leaves out.
    pub fn record_driver(side: Side, doing: &str, error: tokio_postgres::Error) -> Error {
        Error::from_driver(side, doing, error, false)
    }

    fn from_driver(side: Side, doing: &str, error: tokio_postgres::Error, values_are_safe: bool) -> Error {
        let Some(db) = error.as_db_error() else {
            let kind = if error.is_closed() || is_io(&error) { Kind::Connection } else { Kind::Protocol };
            let cause = std::error::Error::source(&error).map(|s| format!(": {s}")).unwrap_or_default();
            return Error::new(side, kind, format!("{doing}: {error}{cause}")).because(error);
        };
        let state = db.code().code();
        let message = if values_are_safe { db.message().to_owned() } else { without_values(db) };
        let mut told = Error::new(side, Kind::Server, format!("{doing}: {message}")).sqlstate(state);
        if values_are_safe {
            told.detail = db.detail().map(str::to_owned);
        }
        if values_are_safe || !refuses_record(state) {
            told.hint = db.hint().map(str::to_owned);
        }
        // A prepared statement that is gone, or there twice.
        if matches!(state, "26000" | "42P05") {
            told = told.hint(format!("does a connection pooler share sessions? {NO_POOLER}"));
        }
        if values_are_safe {
            told.source = Some(Box::new(error));
        }
        told
    }

    /// What is to be done about it when it ends the attempt at a chunk.
    pub fn policy(&self) -> Policy {
        match self.kind {
            Kind::Connection | Kind::KeyAppeared | Kind::Interrupted => Policy::Retry,
            Kind::ForeignKeyLater => Policy::RetryAfterOthers,
            Kind::Usage | Kind::Refused | Kind::Halted | Kind::Protocol | Kind::OverBudget => {
                Policy::FailChunk
            }
            Kind::Server => policy_of_sqlstate(self.sqlstate.as_deref().unwrap_or("XX000")),
        }
    }

    /// The SQLSTATE to record: the server's, or the class that fits.
    pub fn state(&self) -> &str {
        match (&self.sqlstate, self.kind) {
            (Some(state), _) => state,
            (None, Kind::Connection) => "08006",
            (None, Kind::Protocol) => "08P01",
            (None, Kind::Interrupted) => "57014",
            (None, Kind::KeyAppeared) => "23505",
            (None, Kind::ForeignKeyLater) => "23503",
            (None, Kind::OverBudget) => "54000",
            (None, Kind::Halted) => "55000",
            (None, Kind::Usage | Kind::Refused | Kind::Server) => "XX000",
        }
    }

    /// Exit code of a process that ends with this error.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Usage => 2,
            Kind::Interrupted => 130,
            Kind::Halted => 4,
            _ => 1,
        }
    }

    /// The error as several lines for a person: message, SQLSTATE, detail, hint.
    pub fn report(&self) -> String {
        let mut text = format!("error: {self}");
        if let Some(state) = &self.sqlstate {
            text.push_str(&format!(" (SQLSTATE {state})"));
        }
        for (label, value) in [("detail", &self.detail), ("hint", &self.hint)] {
            if let Some(value) = value {
                text.push_str(&format!("\n{label}: {value}"));
            }
        }
        text
    }
}

/// Retry policy of a SQLSTATE. Classes 08 (connection), 40 (rollback: deadlock, serialization), 53 (resources) and 57
/// (intervention, shutdown) pass; so do 55P03 (lock timeout), 25006 (read only: fail-over) and 25P03/25P04 (timeouts).
pub fn policy_of_sqlstate(state: &str) -> Policy {
    match state {
        "53100" => Policy::PauseRun,
        "55P03" | "25006" | "25P03" | "25P04" => Policy::Retry,
        _ => match state.get(..2) {
            Some("08" | "40" | "53" | "57") => Policy::Retry,
            _ => Policy::FailChunk,
        },
    }
}

/// A server's message without the values that it may quote; the rule of `dedup.without_values` in the extension. Messages of class 22
/// name the offending value after a colon ("invalid input syntax for type integer: …") or in quotes ("value … is out of
/// range"), and a function's own words (P0001) can say anything: then condition and names are told instead.
pub fn without_values(db: &tokio_postgres::error::DbError) -> String {
    sayable(db.code().code(), db.message()).map_or_else(|| describe(db), str::to_owned)
}

/// The part of a message before any value; `None`: no such part.
fn sayable<'m>(state: &str, message: &'m str) -> Option<&'m str> {
    match state {
        "P0001" => None,
        _ if !state.starts_with("22") => Some(message),
        _ => message.split(": ").next().filter(|head| !head.contains('"')),
    }
}

/// Condition and names of a server error, without its values.
pub fn describe(db: &tokio_postgres::error::DbError) -> String {
    let mut text = condition_name(db.code().code()).replace('_', " ");
    for (label, value) in [
        ("table", db.table()),
        ("column", db.column()),
        ("constraint", db.constraint()),
        ("type", db.datatype()),
    ] {
        if let Some(value) = value {
            text.push_str(&format!(", {label} \"{value}\""));
        }
    }
    text
}

fn is_io(error: &tokio_postgres::Error) -> bool {
    std::iter::successors(std::error::Error::source(error), |e| e.source())
        .any(|e| e.downcast_ref::<std::io::Error>().is_some())
}

/// What to do about a pooler.
pub const NO_POOLER: &str = "connect to the server itself, or use a pool in session mode";

/// Says on which side and while doing what a driver's error happened.
pub trait At<T> {
    /// For statements whose messages hold no record values.
    fn at(self, side: Side, doing: &str) -> Result<T>;
    /// For statements that carry records.
    fn with_records(self, side: Side, doing: &str) -> Result<T>;
}

impl<T> At<T> for std::result::Result<T, tokio_postgres::Error> {
    fn at(self, side: Side, doing: &str) -> Result<T> {
        self.map_err(|error| Error::driver(side, doing, error))
    }

    fn with_records(self, side: Side, doing: &str) -> Result<T> {
        self.map_err(|error| Error::record_driver(side, doing, error))
    }
}

impl From<pg_dedup_record::fold::FoldError> for Error {
    fn from(error: pg_dedup_record::fold::FoldError) -> Self {
        use pg_dedup_record::fold::FoldError;
        let side = match &error {
            FoldError::Stream(_) => Side::Source,
            FoldError::Verdicts { .. } => Side::Target,
            FoldError::Key(_) | FoldError::Undecided => {
                return Error::here(Kind::Protocol, error.to_string());
            }
        };
        Error::new(side, Kind::Protocol, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transient_states_retry_and_the_rest_fail() {
        for state in
            ["08006", "40001", "40P01", "53300", "53400", "57P01", "57014", "55P03", "25006", "25P03"]
        {
            assert_eq!(policy_of_sqlstate(state), Policy::Retry, "{state}");
        }
        assert_eq!(policy_of_sqlstate("53100"), Policy::PauseRun);
        for state in ["22003", "23505", "42P01", "42501", "55006", "55000", "XX000", "", "4"] {
            assert_eq!(policy_of_sqlstate(state), Policy::FailChunk, "{state}");
        }
    }

    #[test]
    fn only_four_classes_refuse_a_record() {
        for state in ["22001", "23503", "44000", "P0001"] {
            assert!(refuses_record(state), "{state}");
        }
        for state in ["P0002", "P0000", "42501", "40P01", "53100", "21000", ""] {
            assert!(!refuses_record(state), "{state}");
        }
    }

    #[test]
    fn kinds_have_policies_and_exit_codes() {
        assert_eq!(Error::here(Kind::KeyAppeared, "x").policy(), Policy::Retry);
        assert_eq!(Error::here(Kind::ForeignKeyLater, "x").policy(), Policy::RetryAfterOthers);
        assert_eq!(Error::here(Kind::OverBudget, "x").policy(), Policy::FailChunk);
        assert_eq!(Error::here(Kind::Server, "x").sqlstate("53100").policy(), Policy::PauseRun);
        assert_eq!(Error::usage("x").exit_code(), 2);
        assert_eq!(Error::refused("x").exit_code(), 1);
        assert_eq!(Error::here(Kind::Interrupted, "x").exit_code(), 130);
    }

    #[test]
    fn values_are_not_repeated() {
        let state = "22P02";
        assert_eq!(
            sayable(state, "invalid input syntax for type integer: \"SECRET\""),
            Some("invalid input syntax for type integer")
        );
        assert_eq!(sayable("22003", "value \"99999999999\" is out of range for type integer"), None);
        assert_eq!(sayable("22003", "integer out of range"), Some("integer out of range"));
        assert_eq!(sayable("22021", "invalid byte sequence for encoding \"UTF8\": 0xff"), None);
        assert_eq!(sayable("P0001", "SECRET"), None);
        assert_eq!(sayable("42P01", "relation \"t\" does not exist"), Some("relation \"t\" does not exist"));
    }

    #[test]
    fn a_report_has_one_line_a_part() {
        let error = Error::refused("no such table").sqlstate("42P01").detail("d").hint("h");
        assert_eq!(
            error.report(),
            "error: pg-dedup-migrate: no such table (SQLSTATE 42P01)\ndetail: d\nhint: h"
        );
    }
}
