//! The live page: made here, asked for again every two seconds, no script but that.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::overview::Overview;
use super::{STYLE, parts};
use crate::error::Result;

/// Asks again every two seconds.
const REFRESH: &str = include_str!("refresh.js");

/// The page with what is known now.
pub fn page(overview: &Overview) -> Result<Markup> {
    Ok(html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (overview.run.name) " – pg-dedup-migrate" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                div #stale {}
                main { (content(overview)?) }
                script { (PreEscaped(REFRESH)) }
            }
        }
    })
}

/// What is replaced every two seconds.
pub fn content(overview: &Overview) -> Result<Markup> {
    Ok(html! {
        (parts::head(overview))
        (parts::alerts(overview))
        (parts::throughput(overview)?)
        (parts::tables(&overview.tables))
        (parts::books(&overview.progress))
        (parts::throttle(overview))
        (parts::chunk_map(overview))
        (parts::quarantine(overview))
    })
}
