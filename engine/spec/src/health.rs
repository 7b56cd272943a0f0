//! What an engine says about its own progress and load.

use serde::{Deserialize, Serialize};

/// Where an engine is between process start and its first answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StartupPhase {
    /// Copying the model from a hub or object store to local disk.
    Fetching,
    /// Reading weights into memory.
    Loading,
    /// Weights are in memory; the canary request is being decoded.
    Warming,
    /// The canary answered as expected; requests are taken.
    Ready,
    /// The engine cannot start; `reason` and `message` say why.
    Failed,
}

/// Body of `GET /startupz`: status 200 once started, 503 before and after a failure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StartupReport {
    /// Current phase.
    pub phase: StartupPhase,
    /// Bytes of weights fetched or read so far in this phase.
    pub bytes_loaded: u64,
    /// Bytes of weights this phase has to move in total; 0 while unknown.
    pub bytes_total: u64,
    /// Mean rate since the phase began, bytes per second.
    pub bytes_per_second: f64,
    /// Seconds until the phase ends at that rate; absent while unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<f64>,
    /// Progress of the phase, 0 to 100.
    pub percent: f64,
    /// Closed, machine-readable reason when `phase` is failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The same for people: what failed and the way out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Body of `GET /load`: what the autoscaler and the drain watch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadReport {
    /// Sequences in the running batch.
    pub running: u32,
    /// Requests admitted but not yet running.
    pub waiting: u32,
    /// Share of KV blocks in use, 0 to 1.
    pub kv_usage: f64,
    /// Tokens the KV cache can hold.
    pub kv_tokens_total: u64,
    /// True after SIGTERM: running requests finish, new ones are refused.
    pub draining: bool,
    /// Prompt tokens processed since start.
    pub prompt_tokens_total: u64,
    /// Tokens generated since start.
    pub generation_tokens_total: u64,
    /// Requests answered since start, whatever the answer was.
    #[serde(default)]
    pub requests_total: u64,
    /// Those of them answered with a status of 500 or above.
    #[serde(default)]
    pub request_errors_total: u64,
    /// Sequences that gave a first token since start.
    #[serde(default)]
    pub first_tokens_total: u64,
    /// Seconds from arrival to the first token, summed over them.
    #[serde(default)]
    pub first_token_seconds_total: f64,
}
