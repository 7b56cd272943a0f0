//! The three clocks of a fleet that is made: until the API server holds all pods, until the last is bound to a node, and
//! until whoever reports on the fleet says that it is ready. All run from the moment it was asked for.

use std::time::{Duration, Instant};

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use tokio::time::timeout_at;

use crate::objects::{count, wait_for, wait_pods};

/// How often it is looked whether all are bound and ready.
const LOOK: Duration = Duration::from_millis(100);

/// What the clocks showed, in seconds; none where patience ended before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Clocks {
    /// Pods that were there when the first clock stopped, or patience ended.
    pub there: f64,
    /// Of those, per second.
    pub pods_per_second: f64,
    /// Until all pods exist.
    pub created: Option<f64>,
    /// Until all are bound.
    pub bound: Option<f64>,
    /// Until all are ready.
    pub ready: Option<f64>,
}

/// Watches the clocks from `start` on, for `patience` at most. `unready` says what is not ready yet.
///
/// # Errors
/// When the API server does not answer, or nothing moves any more.
pub async fn watch<F>(
    pods: &Api<Pod>,
    wanted: u32,
    (start, patience): (Instant, Duration),
    unready: impl FnMut() -> F,
) -> Result<Clocks>
where
    F: Future<Output = Result<Option<String>>>,
{
    let wanted_pods = usize::try_from(wanted)?;
    let created = within(start, patience, wait_pods(pods, wanted_pods)).await?;
    let there = match created {
        Some(_) => f64::from(wanted),
        None => f64::from(u32::try_from(count(pods, &ListParams::default()).await?)?),
    };
    let mut clocks = Clocks {
        there,
        pods_per_second: there / created.unwrap_or(patience.as_secs_f64()),
        created,
        bound: None,
        ready: None,
    };
    if created.is_some() {
        clocks.bound = within(start, patience, wait_none(pods, "spec.nodeName=", "bound")).await?;
    }
    if clocks.bound.is_some() {
        clocks.ready = within(start, patience, wait_for(LOOK, unready)).await?;
    }
    Ok(clocks)
}

/// Seconds from `start` until something has ended; none when patience ends before.
///
/// # Errors
/// Its own.
pub async fn within(
    start: Instant,
    patience: Duration,
    what: impl Future<Output = Result<()>>,
) -> Result<Option<f64>> {
    match timeout_at((start + patience).into(), what).await {
        Ok(ended) => ended.map(|()| Some(start.elapsed().as_secs_f64())),
        Err(_) => Ok(None),
    }
}

/// Waits until no pod has these fields, each of which is not yet something.
async fn wait_none(pods: &Api<Pod>, fields: &str, what: &str) -> Result<()> {
    wait_for(LOOK, || async { some(pods, fields, what).await }).await
}

async fn some(pods: &Api<Pod>, fields: &str, what: &str) -> Result<Option<String>> {
    let left = count(pods, &ListParams::default().fields(fields)).await?;
    Ok((left > 0).then(|| format!("{left} or more pods are not {what}")))
}

/// Which pods do not run yet, in words.
///
/// # Errors
/// When the API server does not answer.
pub async fn not_running(pods: &Api<Pod>) -> Result<Option<String>> {
    some(pods, "status.phase!=Running", "running").await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_stops_when_something_ends_or_patience_does() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
        let (start, patience) = (Instant::now(), Duration::from_millis(20));
        let run = |what: Duration, result: fn() -> Result<()>| {
            runtime.block_on(within(start, patience, async move {
                tokio::time::sleep(what).await;
                result()
            }))
        };
        assert!(run(Duration::ZERO, || Ok(())).expect("no error").is_some());
        let never = Duration::from_secs(600);
        assert_eq!(run(never, || Ok(())).expect("no error"), None);
        let start_now = within(Instant::now(), never, async { anyhow::bail!("broken") });
        assert!(runtime.block_on(start_now).is_err());
    }
}
