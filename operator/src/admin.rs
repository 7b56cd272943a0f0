//! The operator's own HTTP server: `/healthz`, `/readyz`, `/metrics`.
//!
//! Healthy means the controller loop turned lately, so that a stuck process is restarted. Ready means every mirror had
//! its first complete list; an operator that stands by without the lease is ready too.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;

use crate::metrics::Metrics;

/// After so long without a turn of the loop the process counts as stuck.
const STUCK_AFTER: Duration = Duration::from_secs(60);

/// Shared with the controller loop.
#[derive(Clone)]
pub struct Health {
    started: Instant,
    turned_ms: Arc<AtomicU64>,
    waiting_for: Arc<dyn Fn() -> Vec<&'static str> + Send + Sync>,
}

impl Health {
    /// `waiting_for` names the kinds whose first list is not complete.
    pub fn new(waiting_for: impl Fn() -> Vec<&'static str> + Send + Sync + 'static) -> Self {
        Health {
            started: Instant::now(),
            turned_ms: Arc::default(),
            waiting_for: Arc::new(waiting_for),
        }
    }

    /// The controller loop turned.
    pub fn turned(&self) {
        self.turned_ms
            .store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn stuck_for(&self) -> Option<Duration> {
        let turned = Duration::from_millis(self.turned_ms.load(Ordering::Relaxed));
        let silent = self.started.elapsed().saturating_sub(turned);
        (silent > STUCK_AFTER).then_some(silent)
    }
}

#[derive(Clone)]
struct Shared {
    health: Health,
    metrics: Metrics,
    refresh: Arc<dyn Fn() + Send + Sync>,
}

/// Binds the server; `refresh` is called before each exposition.
///
/// # Errors
/// When the address is taken or not ours.
pub async fn bind(
    address: SocketAddr,
    health: Health,
    metrics: Metrics,
    refresh: impl Fn() + Send + Sync + 'static,
) -> Result<(SocketAddr, impl Future<Output = ()>)> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!(
            "--bind is \"{address}\": cannot listen there; choose another port or stop what uses it"
        )
    })?;
    let bound = listener.local_addr().unwrap_or(address);
    let shared = Shared {
        health,
        metrics,
        refresh: Arc::new(refresh),
    };
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(expose))
        .with_state(shared);
    let serve = async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the admin server ended");
        }
    };
    Ok((bound, serve))
}

async fn healthz(State(shared): State<Shared>) -> impl IntoResponse {
    match shared.health.stuck_for() {
        None => (StatusCode::OK, "ok\n".to_string()),
        Some(silent) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!(
                "the controller loop has not turned for {} s\n",
                silent.as_secs()
            ),
        ),
    }
}

async fn readyz(State(shared): State<Shared>) -> impl IntoResponse {
    let waiting = (shared.health.waiting_for)();
    if waiting.is_empty() {
        (StatusCode::OK, "ok\n".to_string())
    } else {
        let text = format!(
            "waiting for the first list of: {}; see the log for refusals\n",
            waiting.join(", ")
        );
        (StatusCode::SERVICE_UNAVAILABLE, text)
    }
}

async fn expose(State(shared): State<Shared>) -> impl IntoResponse {
    (shared.refresh)();
    (
        [(
            header::CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8",
        )],
        shared.metrics.expose(),
    )
}
