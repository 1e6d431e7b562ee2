//! `doctor`: everything that can be known before anything is written, and what to change.
//!
//! [`servers`] looks at both servers, [`pairs`] at each pair of tables. Pairs are tried out in a transaction of the target
//! that is rolled back, so the extension's own checks speak too.

mod pairs;
mod servers;

use serde::Serialize;

use crate::config::Job;
use crate::conn::{Endpoint, Role, Session};
use crate::error::{Error, NO_POOLER, Result, Side};
use crate::summary::{print_json, print_text};
use crate::{runs, setup};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Good to know.
    Note,
    /// Works, but somebody should look at it.
    Warning,
    /// A run would be refused or would fail.
    Blocker,
}

/// One thing found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad.
    pub level: Level,
    /// What it is about: a side or a table.
    pub subject: String,
    /// What was found.
    pub message: String,
    /// What to change.
    pub hint: Option<String>,
}

/// What was found so far.
#[derive(Debug, Default)]
pub struct Findings {
    all: Vec<Finding>,
}

impl Findings {
    /// Adds a finding.
    pub fn add(&mut self, level: Level, subject: impl ToString, message: impl Into<String>) -> &mut Finding {
        self.all.push(Finding { level, subject: subject.to_string(), message: message.into(), hint: None });
        let last = self.all.len() - 1;
        &mut self.all[last]
    }

    /// Adds an error as a blocker.
    pub fn blocker(&mut self, subject: impl ToString, error: &Error) {
        let mut message = error.to_string();
        if let Some(detail) = &error.detail {
            message.push_str(&format!("; {detail}"));
        }
        self.add(Level::Blocker, subject, message).hint.clone_from(&error.hint);
    }

    fn blockers(&self) -> usize {
        self.all.iter().filter(|finding| finding.level == Level::Blocker).count()
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for finding in &self.all {
            let level = match finding.level {
                Level::Ok => "ok",
                Level::Note => "note",
                Level::Warning => "warning",
                Level::Blocker => "BLOCKER",
            };
            text.push_str(&format!("{level:<8} {}: {}\n", finding.subject, finding.message));
            if let Some(hint) = &finding.hint {
                text.push_str(&format!("         -> {hint}\n"));
            }
        }
        match self.blockers() {
            0 => text.push_str("nothing is in the way\n"),
            n => text.push_str(&format!("{n} to be changed before a run\n")),
        }
        text
    }
}

impl Finding {
    /// Adds what to change.
    pub fn hint(&mut self, hint: impl Into<String>) {
        self.hint = Some(hint.into());
    }
}

/// Looks at everything; exit code 1 when something is in the way.
pub async fn doctor(job: &Job) -> Result<u8> {
    let mut findings = Findings::default();
    let source = connect(job, Side::Source, &mut findings).await;
    let target = connect(job, Side::Target, &mut findings).await;
    if let Some((endpoint, session)) = &source {
        servers::check_source(endpoint, session, job, &mut findings).await?;
    }
    let mut usable = false;
    if let Some((endpoint, session)) = &target {
        servers::check_target(endpoint, session, job, &mut findings).await?;
        match runs::check_versions(session).await {
            Ok(version) => {
                usable = true;
                findings.add(
                    Level::Ok,
                    "target",
                    format!(
                        "extension {version}, program {}, hash encoding {}",
                        env!("CARGO_PKG_VERSION"),
                        pg_dedup_record::ENCODING_VERSION
                    ),
                );
            }
            Err(error) => findings.blocker("target", &error),
        }
    }
    if let (Some((_, source)), Some((_, target))) = (&source, &target) {
        match setup::named_tables(job, source).await {
            Ok(names) => {
                let amount = pairs::check(job, &names, source, target, usable, &mut findings).await?;
                servers::check_sizes(target, job, &amount, &mut findings).await?;
                if usable {
                    servers::check_disk(target, &amount, &mut findings).await?;
                }
            }
            Err(error) => findings.blocker("tables", &error),
        }
    }
    if job.json {
        print_json(&serde_json::json!({"blockers": findings.blockers(), "findings": findings.all}))?;
    } else {
        print_text(&findings.text());
    }
    Ok(u8::from(findings.blockers() > 0))
}

async fn connect(job: &Job, side: Side, findings: &mut Findings) -> Option<(Endpoint, Session)> {
    let text = if side == Side::Source { &job.source } else { &job.target };
    let connected = async {
        let endpoint = Endpoint::resolve(side, text)?;
        let session = endpoint.connect(Role::Admin).await?;
        let is_shared = servers::is_shared(&endpoint, &session).await?;
        Ok::<_, Error>((endpoint, session, is_shared))
    };
    match connected.await {
        Ok((endpoint, session, false)) => Some((endpoint, session)),
        // Nothing else can be asked through it.
        Ok(_) => {
            findings
                .add(Level::Blocker, side, "a connection pooler shares backends between sessions")
                .hint(NO_POOLER);
            None
        }
        Err(error) => {
            findings.blocker(side, &error);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_read_well() {
        let mut findings = Findings::default();
        findings.add(Level::Ok, "target", "fine");
        findings.add(Level::Blocker, "public.t", "has no columns").hint("add some");
        let text = findings.text();
        assert!(text.contains("BLOCKER  public.t: has no columns\n         -> add some\n"), "{text}");
        assert!(text.ends_with("1 to be changed before a run\n"));
        assert_eq!(serde_json::to_value(&findings.all[1]).unwrap()["level"], "blocker");
    }
}
