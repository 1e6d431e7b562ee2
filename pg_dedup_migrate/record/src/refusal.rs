//! Why a target refuses a record, and which errors mean that: one rule for the sidecar and for `migrate_chunk`.

/// Why a record was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// SQLSTATE.
    pub sqlstate: String,
    /// Name of the condition, or `key_collision`, `null_key`.
    pub reason: String,
    /// The target's message.
    pub message: String,
}

impl Refusal {
    /// With the condition's name for a reason.
    pub fn by_target(sqlstate: &str, message: &str) -> Refusal {
        Refusal {
            sqlstate: sqlstate.to_owned(),
            reason: condition_name(sqlstate).to_owned(),
            message: message.to_owned(),
        }
    }

    /// A record whose key another record of this pass has already.
    pub fn key_collision() -> Refusal {
        Refusal {
            sqlstate: "23505".into(),
            reason: "key_collision".into(),
            message: "another record of this pass has the same key and other content".into(),
        }
    }

    pub(crate) fn null_key() -> Refusal {
        Refusal {
            sqlstate: "23502".into(),
            reason: "null_key".into(),
            message: "a key column is null".into(),
        }
    }
}

/// Why a target took back a whole attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedAttempt {
    /// Why.
    pub refusal: Refusal,
    /// Schema and name of the constraint that is violated, where the target says so.
    pub constraint: Option<(String, String)>,
    /// Place of the refused record in the attempt, from 0, where the target names one: a hypothesis.
    pub line: Option<usize>,
}

/// Whether a SQLSTATE is the record's own fault: such a record is quarantined, anything else ends the attempt.
pub fn refuses_record(state: &str) -> bool {
    matches!(state.get(..2), Some("22" | "23" | "44")) || state == "P0001"
}

/// Name of a condition that refuses a record, as PostgreSQL's appendix of error codes has it.
pub fn condition_name(state: &str) -> &'static str {
    match state {
        "22001" => "string_data_right_truncation",
        "22003" => "numeric_value_out_of_range",
        "22007" => "invalid_datetime_format",
        "22008" => "datetime_field_overflow",
        "22021" => "character_not_in_repertoire",
        "22026" => "string_data_length_mismatch",
        "22P02" => "invalid_text_representation",
        "22P03" => "invalid_binary_representation",
        "23001" => "restrict_violation",
        "23502" => "not_null_violation",
        "23503" => "foreign_key_violation",
        "23505" => "unique_violation",
        "23514" => "check_violation",
        "23P01" => "exclusion_violation",
        "44000" => "with_check_option_violation",
        "P0001" => "raise_exception",
        _ if state.starts_with("22") => "data_exception",
        _ if state.starts_with("23") => "integrity_constraint_violation",
        _ => "error",
    }
}
