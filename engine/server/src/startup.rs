//! From process start to the first answer: phases, progress, failure.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use engine_core::{Executor, Limits};
use engine_spec::{StartupPhase, StartupReport};
use engine_text::Text;

use crate::weights::WeightsOrigin;

/// The least time that a step takes, by the bytes of weights that it has to read.
///
/// A token reads the weights that it uses; each further token of a step adds the experts that no token before it chose,
/// as often as an even choice would. Only memory counts: a step of many tokens is bound by arithmetic instead.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roofline {
    /// Bytes that one token reads.
    pub token_bytes: f64,
    /// Bytes that a step reads in which every expert has a token.
    pub all_bytes: f64,
    /// Share of the experts that one token chooses; 1 without experts.
    pub chosen: f64,
    /// Bytes that the device reads in a second.
    pub bytes_per_second: f64,
}

impl Roofline {
    /// Seconds that a step of so many tokens takes at least.
    pub fn seconds(&self, tokens: usize) -> f64 {
        let unread = (1.0 - self.chosen).powi(tokens.saturating_sub(1) as i32);
        let bytes = self.token_bytes + (self.all_bytes - self.token_bytes) * (1.0 - unread);
        bytes / self.bytes_per_second
    }
}

/// A model that is in memory.
pub struct Loaded {
    /// Computes.
    pub executor: Box<dyn Executor>,
    /// Tokenizer and template.
    pub text: Text,
    /// Sizes that `executor` was made for.
    pub limits: Limits,
    /// Where its weights came from, and how others can take their place.
    pub weights: WeightsOrigin,
    /// What its steps are held against, where the device's bandwidth is known.
    pub roofline: Option<Roofline>,
}

/// Why there is no model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadFailure {
    /// Closed, PascalCase.
    pub reason: String,
    /// What failed and the way out.
    pub message: String,
}

/// Loads the model; runs once, on the engine's thread.
pub type Loader = Box<dyn FnOnce(&StartupHandle) -> Result<Loaded, LoadFailure> + Send>;

type Bytes = Arc<dyn Fn() -> (u64, u64) + Send + Sync>;

struct State {
    phase: StartupPhase,
    since: Instant,
    bytes: Bytes,
    failure: Option<LoadFailure>,
    /// Seconds of each phase that ended, and the bytes it moved.
    finished: Vec<(StartupPhase, f64, u64)>,
}

/// Where the engine is on its way; cheap to clone.
#[derive(Clone)]
pub struct StartupHandle {
    state: Arc<Mutex<State>>,
}

impl Default for StartupHandle {
    fn default() -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                phase: StartupPhase::Fetching,
                since: Instant::now(),
                bytes: Arc::new(|| (0, 0)),
                failure: None,
                finished: Vec::new(),
            })),
        }
    }
}

impl StartupHandle {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new phase begins; `bytes` gives bytes done and bytes in total at any moment.
    pub fn enter(
        &self,
        phase: StartupPhase,
        bytes: impl Fn() -> (u64, u64) + Send + Sync + 'static,
    ) {
        let mut state = self.lock();
        if state.phase != phase {
            let seconds = state.since.elapsed().as_secs_f64();
            let done = (state.bytes)().0;
            let previous = state.phase;
            state.finished.push((previous, seconds, done));
            tracing::info!(from = ?previous, to = ?phase, seconds, bytes = done, "startup phase ended");
            state.phase = phase;
            state.since = Instant::now();
        }
        state.bytes = Arc::new(bytes);
    }

    /// The engine will never be ready.
    pub fn fail(&self, failure: LoadFailure) {
        let mut state = self.lock();
        state.phase = StartupPhase::Failed;
        state.failure = Some(failure);
    }

    /// Current phase.
    pub fn phase(&self) -> StartupPhase {
        self.lock().phase
    }

    /// Phases that ended, their seconds and bytes.
    pub fn finished(&self) -> Vec<(StartupPhase, f64, u64)> {
        self.lock().finished.clone()
    }

    /// What `GET /startupz` says.
    pub fn report(&self) -> StartupReport {
        let state = self.lock();
        let (done, total) = match state.phase {
            // The last phase that moved bytes stays visible.
            StartupPhase::Warming | StartupPhase::Ready => {
                let moved = state.finished.iter().map(|(_, _, bytes)| *bytes).max();
                (moved.unwrap_or(0), moved.unwrap_or(0))
            }
            _ => (state.bytes)(),
        };
        let seconds = match state.phase {
            StartupPhase::Warming | StartupPhase::Ready => state
                .finished
                .iter()
                .find(|(_, _, bytes)| *bytes == done)
                .map_or(0.0, |(_, seconds, _)| *seconds),
            _ => state.since.elapsed().as_secs_f64(),
        };
        let rate = if seconds > 0.0 {
            done as f64 / seconds
        } else {
            0.0
        };
        let percent = match state.phase {
            StartupPhase::Ready | StartupPhase::Warming => 100.0,
            _ if total == 0 => 0.0,
            _ => (done as f64 / total as f64 * 100.0).min(100.0),
        };
        let moving = matches!(state.phase, StartupPhase::Fetching | StartupPhase::Loading);
        StartupReport {
            phase: state.phase,
            bytes_loaded: done,
            bytes_total: total,
            bytes_per_second: rate,
            eta_seconds: (moving && total > 0 && rate > 0.0)
                .then(|| total.saturating_sub(done) as f64 / rate),
            percent,
            reason: state.failure.as_ref().map(|failure| failure.reason.clone()),
            message: state
                .failure
                .as_ref()
                .map(|failure| failure.message.clone()),
        }
    }
}

impl std::fmt::Debug for StartupHandle {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_tuple("StartupHandle")
            .field(&self.phase())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_grows_with_the_experts_that_are_read() {
        let roofline = Roofline {
            token_bytes: 10.0,
            all_bytes: 50.0,
            chosen: 0.25,
            bytes_per_second: 10.0,
        };
        assert_eq!(roofline.seconds(1), 1.0);
        assert_eq!(roofline.seconds(2), 2.0);
        assert!((roofline.seconds(1000) - 5.0).abs() < 1e-9);
        let dense = Roofline {
            all_bytes: 10.0,
            chosen: 1.0,
            ..roofline
        };
        assert_eq!(dense.seconds(64), 1.0);
    }

    #[test]
    fn progress_is_reported_in_percent_and_stays_after_the_end() {
        let startup = StartupHandle::default();
        assert_eq!(startup.report().percent, 0.0);
        startup.enter(StartupPhase::Loading, || (50, 200));
        std::thread::sleep(std::time::Duration::from_millis(5));
        let report = startup.report();
        assert_eq!(
            (report.percent, report.bytes_loaded, report.bytes_total),
            (25.0, 50, 200)
        );
        assert!(report.bytes_per_second > 0.0 && report.eta_seconds.is_some());
        startup.enter(StartupPhase::Ready, || (0, 0));
        let report = startup.report();
        assert_eq!(
            (report.percent, report.bytes_loaded, report.eta_seconds),
            (100.0, 50, None)
        );
        startup.fail(LoadFailure {
            reason: "R".into(),
            message: "m".into(),
        });
        assert_eq!(startup.report().reason.as_deref(), Some("R"));
    }
}
