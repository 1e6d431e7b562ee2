//! `/metrics`, `/healthz`, `/readyz`, and `/`, the page.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::metrics;
use super::probe::Probe;
use crate::error::Result;
use crate::view::page;

/// How long a client may take to say what it wants.
const HEADERS: Duration = Duration::from_secs(5);
/// How long it may take to hear the answer.
const WHOLE: Duration = Duration::from_secs(30);
/// Clients at a time: they must not take the descriptors that the workers need.
const CLIENTS: usize = 64;

/// Serves until aborted, one request a connection.
pub async fn serve(listener: TcpListener, probe: Arc<Probe>) {
    let router = router(probe);
    let places = Arc::new(Semaphore::new(CLIENTS));
    // Aborted with this.
    let mut clients = JoinSet::new();
    loop {
        while clients.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else {
            // No descriptor left, or a client that is gone already.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        // Whoever finds no place is closed, and comes again.
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let service = TowerToHyperService::new(router.clone());
        clients.spawn(async move {
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // What goes wrong is the client's.
            let _ = tokio::time::timeout(WHOLE, served).await;
            drop(place);
        });
    }
}

fn router(probe: Arc<Probe>) -> Router {
    Router::new()
        .route("/", get(whole_page))
        .route("/now", get(content))
        .route("/metrics", get(exposition))
        // The process answers: that is all that a liveness probe may ask, else a target that restarts would take its workers along.
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .with_state(probe)
}

async fn whole_page(State(probe): State<Arc<Probe>>) -> Response {
    answer(probe.overview().await.and_then(|o| page::page(&o)).map(|page| Html(page.into_string())))
}

async fn content(State(probe): State<Arc<Probe>>) -> Response {
    answer(probe.overview().await.and_then(|o| page::content(&o)).map(|page| Html(page.into_string())))
}

async fn exposition(State(probe): State<Arc<Probe>>) -> Response {
    // A target that is away is a metric, too.
    let overview = probe.overview().await.ok();
    let text = metrics::exposition(overview.as_deref());
    answer(text.map(|text| ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text)))
}

async fn ready(State(probe): State<Arc<Probe>>) -> Response {
    answer(probe.overview().await.map(|_| "ready\n"))
}

fn answer(result: Result<impl IntoResponse>) -> Response {
    match result {
        Ok(answer) => answer.into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    }
}
