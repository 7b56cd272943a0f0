//! Replacing the weights of a running engine: what serves, what is under way, and who does it.
//!
//! Invariants: one replacement at a time; the weights in use change only on the engine's thread, between two steps, and
//! only for weights that were loaded whole and answered the canary; until then, and after any failure, the old ones
//! serve. Loading runs on a thread of its own beside the engine's.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use engine_core::StagedWeights;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::error::ApiError;
use crate::fields::{Fields, wrong};
use crate::startup::LoadFailure;
use crate::state::{Shared, unix_seconds};
use crate::worker::Command;

/// Which weights.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightsSource {
    /// As `--model`: a path, `file://`, `hf://` or `s3://`.
    pub source: String,
    /// Commit, tag or branch of a hub.
    pub revision: Option<String>,
    /// What `sha256sum *.safetensors | sha256sum` must say; absent takes what is there.
    pub digest: Option<String>,
}

/// Weights in memory and not in use.
#[derive(Debug)]
pub struct LoadedWeights {
    /// In the backend's form.
    pub weights: StagedWeights,
    /// Of the files, as [`WeightsSource::digest`].
    pub digest: String,
}

/// Fetches, verifies and loads weights beside those in use; runs on its own thread.
pub type WeightsLoader =
    Arc<dyn Fn(&WeightsSource, &UpdateHandle) -> Result<LoadedWeights, LoadFailure> + Send + Sync>;

/// Where the weights of a loaded model came from and how others can take their place.
#[derive(Clone)]
pub struct WeightsOrigin {
    /// Of the first weights.
    pub source: WeightsSource,
    /// Loads others, or why that cannot be done.
    pub loader: Result<WeightsLoader, String>,
}

impl fmt::Debug for WeightsOrigin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("WeightsOrigin")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

/// What becomes of sequences that have begun when weights are replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InFlightRule {
    /// They finish with the weights they began with; new ones wait so long.
    Finish,
    /// They begin again with the new weights; streams that have sent something end with an error.
    Restart,
}

/// For the engine's thread.
#[derive(Debug)]
pub struct Replacement {
    pub weights: StagedWeights,
    pub digest: String,
    pub version: u64,
    pub rule: InFlightRule,
    /// The weights that are not needed any more, to be freed elsewhere, or why the new ones are not used.
    pub reply: oneshot::Sender<Result<StagedWeights, String>>,
}

type Bytes = Arc<dyn Fn() -> (u64, u64) + Send + Sync>;

struct Update {
    source: WeightsSource,
    phase: &'static str,
    bytes: Bytes,
    began: Instant,
    failure: Option<LoadFailure>,
}

struct State {
    version: u64,
    digest: Option<String>,
    loaded_at: u64,
    origin: Option<WeightsOrigin>,
    /// Of the replacement under way or the last one.
    update: Option<Update>,
    is_busy: bool,
}

/// What serves and what is under way.
pub struct Weights(Mutex<State>);

impl fmt::Debug for Weights {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Weights").finish()
    }
}

impl Default for Weights {
    fn default() -> Self {
        Self(Mutex::new(State {
            version: 1,
            digest: None,
            loaded_at: 0,
            origin: None,
            update: None,
            is_busy: false,
        }))
    }
}

/// Progress of a replacement.
pub struct UpdateHandle(Arc<Shared>);

impl UpdateHandle {
    /// A new phase begins; `bytes` gives bytes done and bytes in total at any moment.
    pub fn enter(
        &self,
        phase: &'static str,
        bytes: impl Fn() -> (u64, u64) + Send + Sync + 'static,
    ) {
        tracing::info!(phase, "weights are being replaced");
        if let Some(update) = &mut self.0.weights.lock().update {
            update.phase = phase;
            update.bytes = Arc::new(bytes);
        }
    }
}

impl Weights {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first weights serve.
    pub fn begin(&self, origin: WeightsOrigin) {
        let mut state = self.lock();
        state.digest.clone_from(&origin.source.digest);
        state.origin = Some(origin);
        state.loaded_at = unix_seconds();
    }

    /// What `GET /v1/weights` says.
    pub fn report(&self) -> Value {
        let state = self.lock();
        let source = state.origin.as_ref().map(|origin| &origin.source);
        let update = state.update.as_ref().map(|update| {
            let (done, total) = (update.bytes)();
            json!({
                "state": update.phase,
                "source": update.source.source,
                "revision": update.source.revision,
                "bytes_done": done,
                "bytes_total": total,
                "reason": update.failure.as_ref().map(|failure| &failure.reason),
                "message": update.failure.as_ref().map(|failure| &failure.message),
            })
        });
        json!({
            "object": "weights",
            "version": state.version,
            "digest": state.digest,
            "source": source.map(|source| &source.source),
            "revision": source.and_then(|source| source.revision.as_ref()),
            "loaded_at": state.loaded_at,
            "update": update,
        })
    }

    /// Begins a replacement on a thread of its own.
    ///
    /// # Errors
    /// One is under way, or this engine cannot replace weights.
    pub fn replace(
        shared: &Arc<Shared>,
        source: WeightsSource,
        rule: InFlightRule,
    ) -> Result<(), ApiError> {
        let mut state = shared.weights.lock();
        let loader = match state.origin.as_ref().map(|origin| &origin.loader) {
            Some(Ok(loader)) => loader.clone(),
            Some(Err(why)) => return Err(ApiError::not_implemented(why)),
            None => return Err(ApiError::not_implemented("the model is not loaded")),
        };
        if state.is_busy {
            return Err(ApiError::weights_busy());
        }
        state.is_busy = true;
        state.update = Some(Update {
            source: source.clone(),
            phase: "fetching",
            bytes: Arc::new(|| (0, 0)),
            began: Instant::now(),
            failure: None,
        });
        drop(state);
        let own = shared.clone();
        let spawned = std::thread::Builder::new()
            .name("weights".to_owned())
            .spawn(move || replace(&own, &loader, &source, rule));
        if let Err(error) = spawned {
            let failure = failed(format!("no thread could be started: {error}"));
            shared.weights.end(shared, Err(failure));
        }
        Ok(())
    }

    fn end(&self, shared: &Shared, result: Result<(WeightsSource, String), LoadFailure>) {
        let mut state = self.lock();
        state.is_busy = false;
        let State {
            update: Some(update),
            ..
        } = &mut *state
        else {
            return;
        };
        let seconds = update.began.elapsed().as_secs_f64();
        match result {
            Ok((source, digest)) => {
                tracing::info!(
                    source = source.source,
                    digest,
                    seconds,
                    "weights were replaced"
                );
                update.phase = "done";
                state.version += 1;
                shared.metrics.set_weights(state.version, &digest);
                shared.metrics.observe_reload("success", seconds);
                state.digest = Some(digest);
                state.loaded_at = unix_seconds();
                if let Some(origin) = &mut state.origin {
                    origin.source = source;
                }
            }
            Err(failure) => {
                tracing::error!(
                    reason = failure.reason,
                    message = failure.message,
                    "weights were not replaced; the old ones serve"
                );
                update.phase = "failed";
                update.failure = Some(failure);
                shared.metrics.observe_reload("failure", seconds);
            }
        }
    }
}

fn failed(message: String) -> LoadFailure {
    LoadFailure {
        reason: "EngineFailed".to_owned(),
        message,
    }
}

/// One replacement from beginning to end.
fn replace(
    shared: &Arc<Shared>,
    loader: &WeightsLoader,
    source: &WeightsSource,
    rule: InFlightRule,
) {
    let handle = UpdateHandle(shared.clone());
    let loaded = catch_unwind(AssertUnwindSafe(|| loader(source, &handle)));
    let loaded = loaded.unwrap_or_else(|_| Err(failed("loading panicked".to_owned())));
    let result = loaded.and_then(|LoadedWeights { weights, digest }| {
        handle.enter("waiting", || (0, 0));
        let (reply, answer) = oneshot::channel();
        let version = shared.weights.lock().version + 1;
        let command = Command::ReplaceWeights(Box::new(Replacement {
            weights,
            digest: digest.clone(),
            version,
            rule,
            reply,
        }));
        let gone = || failed("the engine has ended".to_owned());
        shared.commands.send(command).map_err(|_| gone())?;
        // The old weights are freed here, not on the engine's thread.
        drop(
            answer
                .blocking_recv()
                .map_err(|_| gone())?
                .map_err(|why| LoadFailure {
                    reason: "CanaryFailed".to_owned(),
                    message: why,
                })?,
        );
        Ok((source.clone(), digest))
    });
    shared.weights.end(shared, result);
}

/// The fields of `POST /v1/weights`.
///
/// # Errors
/// Names the one that is wrong.
pub fn parse(fields: &Fields) -> Result<(WeightsSource, InFlightRule), ApiError> {
    let source = fields.string("source")?.unwrap_or_default();
    if source.is_empty() {
        let message =
            "source is missing; send a path, file://, hf:// or s3:// of weights of the same model";
        return Err(ApiError::invalid("source", message));
    }
    let digest = fields.string("digest")?;
    if let Some(digest) = digest {
        let hex = digest.strip_prefix("sha256:").unwrap_or_default();
        if hex.len() != 64 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(wrong(
                "digest",
                &digest.into(),
                "sha256: and 64 lowercase hex digits",
            ));
        }
    }
    let rule = match fields.string("in_flight")? {
        None | Some("finish") => InFlightRule::Finish,
        Some("restart") => InFlightRule::Restart,
        Some(other) => return Err(wrong("in_flight", &other.into(), "finish or restart")),
    };
    let source = WeightsSource {
        source: source.to_owned(),
        revision: fields.string("revision")?.map(str::to_owned),
        digest: digest.map(str::to_owned),
    };
    Ok((source, rule))
}
