//! What an engine says about its own progress and load.

use serde::{Deserialize, Serialize};

use crate::inspect::TERMINATION_MESSAGE_BYTES_MAX;

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

/// A GPU at fault in a way that only its repair mends, as the engine on it found out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GpuFault {
    /// As nvidia-smi prints it: `GPU-` or `MIG-`, then five groups of hexadecimal digits.
    pub uuid: String,
    /// Name and code of the error: `CUDA_ERROR_ECC_UNCORRECTABLE (214)`.
    pub error: String,
}

/// What an engine that cannot go on writes to its termination message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndReport {
    /// The GPU that is the cause; absent when none is known to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_fault: Option<GpuFault>,
    /// For people: what failed.
    pub message: String,
}

impl EndReport {
    /// The report as JSON of at most [`TERMINATION_MESSAGE_BYTES_MAX`] bytes.
    pub fn to_message(&self) -> String {
        // JSON may write a character with six times its bytes; an eighth of the limit leaves room for the rest.
        let mut end = self.message.len().min(TERMINATION_MESSAGE_BYTES_MAX / 8);
        while !self.message.is_char_boundary(end) {
            end -= 1;
        }
        let short = Self {
            gpu_fault: self.gpu_fault.clone(),
            message: self.message[..end].to_owned(),
        };
        serde_json::to_string(&short).unwrap_or_default()
    }

    /// Reads a termination message; none when it is something else, such as the end of a log.
    pub fn from_message(text: &str) -> Option<Self> {
        let text = text.trim();
        // Most messages are none: told apart without a parser.
        text.starts_with('{')
            .then(|| serde_json::from_str(text))?
            .ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_of_an_end_is_whole_however_long_its_message_is() {
        let report = EndReport {
            gpu_fault: Some(GpuFault {
                uuid: "GPU-00000000-0000-0000-0000-000000000000".into(),
                error: "CUDA_ERROR_ECC_UNCORRECTABLE (214)".into(),
            }),
            message: "\u{1}ü".repeat(3000),
        };
        let text = report.to_message();
        assert!(text.len() <= TERMINATION_MESSAGE_BYTES_MAX, "{text}");
        let read = EndReport::from_message(&text).expect("a report");
        assert_eq!(read.gpu_fault, report.gpu_fault);
        assert!(report.message.starts_with(&read.message) && !read.message.is_empty());
    }

    #[test]
    fn only_a_report_is_read_as_one() {
        for text in ["", "panicked at 'x'", "{\"level\":\"error\"}", "{"] {
            assert_eq!(EndReport::from_message(text), None, "{text}");
        }
        // Of a version that has more to say.
        let text = r#"{"message":"m","later":1}"#;
        let read = EndReport::from_message(text).expect("a report");
        assert_eq!((read.gpu_fault, read.message.as_str()), (None, "m"));
    }
}
