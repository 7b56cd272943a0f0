//! The life of a rank that follows rank 0: it answers probes, and computes what it is sent.
//!
//! Invariant: it ends after rank 0, whose running requests need it: at rank 0's word, or when rank 0 is gone. A signal to
//! end is remembered and obeyed then, or when the drain's time is over.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::middleware::from_fn_with_state;
use axum::response::Response;
use engine_group::{Follower, Next};
use engine_spec::StartupPhase;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::error::ApiError;
use crate::http::accept_loop;
use crate::routes::{observe, probe, probes};
use crate::serve::{ServeError, follow_tls_files, watch};
use crate::startup::{LoadFailure, StartupHandle};
use crate::state::{ServerOptions, Shared};
use crate::worker::describe;

/// How long a rank waits for a word before it marks that it is alive.
const TICK: Duration = Duration::from_millis(100);
/// Time for rank 0 to say the last word after a drain.
const LAST_WORD: Duration = Duration::from_secs(5);

/// Loads a rank's share of the model; runs once, on the rank's thread.
pub type RankLoader = Box<dyn FnOnce(&StartupHandle) -> Result<Follower, LoadFailure> + Send>;

/// Follows rank 0 and answers probes on `listener`, until rank 0 ends.
///
/// # Errors
/// The share cannot be loaded, or the ranks cannot go on together; both are visible to probes for
/// [`ServerOptions::failure_linger`] before this returns.
pub async fn serve_rank(
    listener: TcpListener,
    options: ServerOptions,
    loader: RankLoader,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    // Nobody sends commands to a rank that takes no requests.
    let (commands, _) = sync_channel(1);
    let shared = Arc::new(Shared::new(options, commands));
    let (ended, end) = oneshot::channel();
    let worker = shared.clone();
    std::thread::Builder::new()
        .name("rank".to_owned())
        .spawn(move || {
            if run(&worker, loader) {
                // The server may have ended before.
                let _ = ended.send(());
            }
        })
        .map_err(ServeError::Thread)?;
    let (stop, stopped) = oneshot::channel();
    let app = router(shared.clone());
    let http = tokio::spawn(accept_loop(listener, app, shared.clone(), stopped));
    let result = tokio::select! {
        failure = watch(&shared) => Err(failure),
        failure = follow_tls_files(&shared) => Err(failure),
        Ok(()) = end => Ok(()),
        () = outlive(&shared, shutdown) => Ok(()),
    };
    let _ = stop.send(());
    let _ = http.await;
    result
}

/// Waits for the signal to end, and then as long as rank 0 may drain.
async fn outlive(shared: &Shared, shutdown: impl Future<Output = ()>) {
    shutdown.await;
    shared.shutdown.draining.store(true, Ordering::Release);
    if shared.startup.phase() == StartupPhase::Ready {
        tracing::info!("ending after rank 0");
        tokio::time::sleep(shared.options.drain_timeout + LAST_WORD).await;
    }
}

/// Loads and follows; whether it ended in good order.
fn run(shared: &Shared, loader: RankLoader) -> bool {
    let startup = &shared.startup;
    let loaded = catch_unwind(AssertUnwindSafe(|| loader(startup)));
    let loaded = loaded.unwrap_or_else(|panic| {
        Err(LoadFailure {
            reason: "EngineFailed".to_owned(),
            message: format!("the share could not be loaded: {}", describe(&*panic)),
        })
    });
    let mut follower = match loaded {
        Ok(follower) => follower,
        Err(mut failure) => {
            failure.message = shared.failed(failure.message);
            let LoadFailure { reason, message } = &failure;
            tracing::error!(reason, message, "this rank cannot serve");
            startup.fail(failure);
            return false;
        }
    };
    shared.heartbeat.tick();
    startup.enter(StartupPhase::Ready, || (0, 0));
    for (phase, seconds, bytes) in startup.finished() {
        let phase = format!("{phase:?}").to_lowercase();
        shared.metrics.set_startup(&phase, seconds, bytes);
    }
    let ended = catch_unwind(AssertUnwindSafe(|| follow(shared, &mut follower)));
    let failure = match ended {
        Ok(Ok(())) => {
            tracing::info!("rank 0 has ended");
            return true;
        }
        Ok(Err(failure)) => failure,
        Err(panic) => format!("the rank's thread panicked: {}", describe(&*panic)),
    };
    if shared.is_draining() {
        tracing::info!(failure, "rank 0 has ended without a word");
        return true;
    }
    let failure = shared.failed(failure);
    tracing::error!(failure, "this rank cannot go on");
    shared.heartbeat.fail(failure);
    false
}

fn follow(shared: &Shared, follower: &mut Follower) -> Result<(), String> {
    loop {
        shared.heartbeat.tick();
        match follower.next(TICK)? {
            Next::Wait => {}
            Next::End => return Ok(()),
            Next::Step(tokens) => {
                let began = Instant::now();
                shared.heartbeat.begin_step(tokens);
                follower.execute()?;
                shared.heartbeat.end_step(began.elapsed());
            }
        }
    }
}

fn router(shared: Arc<Shared>) -> Router {
    probes(readyz)
        .fallback(elsewhere)
        .layer(from_fn_with_state(shared.clone(), observe))
        .with_state(shared)
}

/// Ready: the group is complete, and every rank has its share in memory.
async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    let report = shared.startup.report();
    let problem = match report.phase {
        StartupPhase::Ready => shared.heartbeat.problem(),
        StartupPhase::Failed => Some(report.message.unwrap_or_default()),
        _ => Some("the ranks are not complete, or not all have their share loaded".to_owned()),
    };
    probe(problem)
}

async fn elsewhere() -> ApiError {
    ApiError::not_this_rank()
}
