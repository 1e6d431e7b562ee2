//! `/metrics`, `/healthz`, `/readyz`, and `/`, the page.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use super::metrics;
use super::probe::Probe;
use crate::error::{Error, Kind, Result};
use crate::view::overview::Overview;
use crate::view::page;

/// How long the target may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves until aborted.
pub async fn serve(listener: TcpListener, probe: Arc<Probe>) {
    let router = Router::new()
        .route("/", get(whole_page))
        .route("/now", get(content))
        .route("/metrics", get(exposition))
        // The process answers: that is all that a liveness probe may ask, else a target that restarts would take its workers along.
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .with_state(probe);
    if let Err(error) = axum::serve(listener, router).await {
        tracing::warn!("metrics are no longer served: {error}");
    }
}

async fn overview(probe: &Probe) -> Result<Arc<Overview>> {
    tokio::time::timeout(PATIENCE, probe.overview()).await.unwrap_or_else(|_| {
        Err(Error::here(
            Kind::Connection,
            format!("the target gave no answer within {} s", PATIENCE.as_secs()),
        ))
    })
}

async fn whole_page(State(probe): State<Arc<Probe>>) -> Response {
    answer(overview(&probe).await.and_then(|o| page::page(&o)).map(|page| Html(page.into_string())))
}

async fn content(State(probe): State<Arc<Probe>>) -> Response {
    answer(overview(&probe).await.and_then(|o| page::content(&o)).map(|page| Html(page.into_string())))
}

async fn exposition(State(probe): State<Arc<Probe>>) -> Response {
    // A target that is away is a metric, too.
    let overview = overview(&probe).await.ok();
    let text = metrics::exposition(overview.as_deref());
    answer(text.map(|text| ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text)))
}

async fn ready(State(probe): State<Arc<Probe>>) -> Response {
    answer(overview(&probe).await.map(|_| "ready\n"))
}

fn answer(result: Result<impl IntoResponse>) -> Response {
    match result {
        Ok(answer) => answer.into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    }
}
