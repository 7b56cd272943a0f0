//! The life of a server: bind, load, serve, drain, end.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use engine_spec::StartupPhase;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::http::accept_loop;
use crate::routes::router;
use crate::startup::{LoadFailure, Loader};
use crate::state::{ServerOptions, Shared};
use crate::worker::{COMMANDS_MAX, run};

/// How often the server looks at health, failure and the end of a drain.
const TICK: Duration = Duration::from_millis(50);
/// Time for aborted requests to be told so.
const ABORT_GRACE: Duration = Duration::from_secs(2);

/// Why a server ended by itself.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The model cannot be served.
    #[error("{}: {}", .0.reason, .0.message)]
    Load(LoadFailure),
    /// The engine's thread could not be started.
    #[error("the engine's thread could not be started: {0}")]
    Thread(#[source] std::io::Error),
    /// The engine's thread ended.
    #[error("{0}")]
    Failed(String),
}

/// Serves a model on `listener` until `shutdown` completes, then drains.
///
/// # Errors
/// The model cannot be loaded, or the engine failed while it served; both are visible to probes for
/// [`ServerOptions::failure_linger`] before this returns.
pub async fn serve(
    listener: TcpListener,
    options: ServerOptions,
    loader: Loader,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let (commands, receiver) = sync_channel(COMMANDS_MAX);
    let shared = Arc::new(Shared::new(options, commands));
    let worker = shared.clone();
    std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || run(&worker, loader, &receiver))
        .map_err(ServeError::Thread)?;
    let (stop, stopped) = oneshot::channel();
    let app = router(shared.clone());
    let http = tokio::spawn(accept_loop(listener, app, shared.clone(), stopped));

    let result = tokio::select! {
        failure = watch(&shared) => Err(failure),
        failure = follow_tls_files(&shared) => Err(failure),
        () = shutdown => {
            drain(&shared).await;
            Ok(())
        }
    };
    // Open responses have ended or were told to; connections get a moment to close.
    let _ = stop.send(());
    let _ = http.await;
    result
}

/// Notices a failed start, a dead thread and a hang; returns only when the server should end.
pub async fn watch(shared: &Shared) -> ServeError {
    let mut failed_since: Option<Instant> = None;
    let mut stalled = false;
    loop {
        tokio::time::sleep(TICK).await;
        let lingered =
            failed_since.is_some_and(|since| since.elapsed() >= shared.options.failure_linger);
        if shared.startup.phase() == StartupPhase::Failed {
            failed_since.get_or_insert_with(Instant::now);
            if lingered {
                let report = shared.startup.report();
                return ServeError::Load(LoadFailure {
                    reason: report.reason.unwrap_or_default(),
                    message: report.message.unwrap_or_default(),
                });
            }
            continue;
        }
        let problem = shared.heartbeat.problem();
        if shared.heartbeat.is_failed() {
            failed_since.get_or_insert_with(Instant::now);
            if lingered {
                return ServeError::Failed(problem.unwrap_or_default());
            }
            continue;
        }
        // A hang ends the requests that wait for it; it may resolve itself, or a liveness probe ends the process.
        if problem.is_some() != stalled {
            stalled = problem.is_some();
            if let Some(problem) = &problem {
                tracing::error!(problem, "the engine hangs");
                shared.metrics.stalls.inc();
            } else {
                tracing::warn!("the engine goes on");
            }
            shared.problem.send_replace(problem);
        }
    }
}

/// Takes over certificates that were rotated; never returns.
pub async fn follow_tls_files(shared: &Shared) -> ServeError {
    let Some(tls) = &shared.options.tls else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(tls.reload_interval()).await;
        let (tls, reloads) = (tls.clone(), &shared.metrics.tls_reloads);
        match tokio::task::spawn_blocking(move || tls.reload()).await {
            Ok(None) => {}
            Ok(Some(Ok(()))) => {
                reloads.with_label_values(&["success"]).inc();
                tracing::info!("the TLS files were read again");
            }
            Ok(Some(Err(error))) => {
                reloads.with_label_values(&["failure"]).inc();
                tracing::warn!(%error, "the TLS files changed and cannot be used; the old ones stay in use");
            }
            Err(error) => tracing::error!(%error, "the TLS files could not be looked at"),
        }
    }
}

/// Takes nothing new and waits for what runs; ends it when the time is over.
async fn drain(shared: &Shared) {
    shared.shutdown.draining.store(true, Ordering::Release);
    let running = shared.in_flight.load(Ordering::Acquire);
    let timeout = shared.options.drain_timeout;
    tracing::info!(running, timeout_seconds = timeout.as_secs(), "draining");
    if wait_until_idle(shared, timeout).await {
        tracing::info!("drained");
        return;
    }
    let running = shared.in_flight.load(Ordering::Acquire);
    tracing::warn!(running, "the drain took too long; what still runs is ended");
    shared.shutdown.aborting.store(true, Ordering::Release);
    wait_until_idle(shared, ABORT_GRACE).await;
}

async fn wait_until_idle(shared: &Shared, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    while shared.in_flight.load(Ordering::Acquire) > 0 {
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(TICK).await;
    }
    true
}
