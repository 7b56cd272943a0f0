//! What `engine inspect` finds out about a model before anything is planned.
//!
//! The report travels through a pod's termination message, which Kubernetes cuts at 4096 bytes, so
//! [`InspectReport::to_message`] shortens a long error instead of emitting half a JSON document.

use serde::{Deserialize, Serialize};

use crate::model_config::{ModelConfig, StoredDtype};

/// Kubernetes keeps at most this many bytes of a container's termination message.
pub const TERMINATION_MESSAGE_BYTES_MAX: usize = 4096;

/// Why a model cannot be served: a closed set that becomes a condition's reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ModelFault {
    /// The source names nothing that exists.
    ModelNotFound,
    /// `config.json` is missing, malformed or contradicts itself.
    ModelConfigInvalid,
    /// A well-formed config of a family this engine does not serve.
    UnsupportedArchitecture,
    /// A tensor or a shard that the config calls for is absent.
    WeightsMissing,
    /// A shard is shorter than its header says.
    WeightsTruncated,
    /// A tensor has another shape or dtype than the config calls for.
    WeightsMismatch,
    /// The hub or object store did not answer.
    SourceUnreachable,
    /// The hub or object store refused the credentials.
    AccessDenied,
    /// The local disk cannot hold the model.
    DiskFull,
}

impl ModelFault {
    /// The PascalCase word used as a condition reason and a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ModelNotFound => "ModelNotFound",
            Self::ModelConfigInvalid => "ModelConfigInvalid",
            Self::UnsupportedArchitecture => "UnsupportedArchitecture",
            Self::WeightsMissing => "WeightsMissing",
            Self::WeightsTruncated => "WeightsTruncated",
            Self::WeightsMismatch => "WeightsMismatch",
            Self::SourceUnreachable => "SourceUnreachable",
            Self::AccessDenied => "AccessDenied",
            Self::DiskFull => "DiskFull",
        }
    }

    /// True when trying again later may help without anyone changing the model.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::SourceUnreachable | Self::DiskFull)
    }
}

/// All that planning needs to know about a model; the weights themselves stay where they are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelFacts {
    /// The parsed `config.json`.
    pub config: ModelConfig,
    /// Bytes of weight files as stored.
    pub weight_bytes: u64,
    /// Number of parameters in the files, scales not counted.
    pub parameters: u64,
    /// Dtype of the large matrices as stored.
    pub weight_dtype: StoredDtype,
    /// `sha256:…` over tensor names, shapes, dtypes and file sizes.
    pub digest: String,
    /// Number of weight files.
    pub shards: u32,
    /// Number of tensors.
    pub tensors: u32,
}

impl ModelFacts {
    /// Facts derived from a config alone, for planning without touching any weights.
    ///
    /// `digest` is the caller's name for the config's content, such as a hash of its text.
    pub fn from_config(config: ModelConfig, digest: String) -> Self {
        let parameters = config.parameters();
        let weight_dtype = config.stored_dtype;
        let weight_bytes = config.stored_weight_bytes();
        Self {
            config,
            weight_bytes,
            parameters,
            weight_dtype,
            digest,
            shards: 0,
            tensors: 0,
        }
    }
}

/// A fault and its explanation: names the file, the tensor or field, what was found and expected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InspectError {
    /// Closed reason.
    pub reason: ModelFault,
    /// For people.
    pub message: String,
}

/// What an inspection pod writes to its termination message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum InspectReport {
    /// The model can be loaded.
    Facts(Box<ModelFacts>),
    /// It cannot.
    Error(InspectError),
}

impl InspectReport {
    /// The report as JSON of at most [`TERMINATION_MESSAGE_BYTES_MAX`] bytes.
    pub fn to_message(&self) -> String {
        let text = serde_json::to_string(self).unwrap_or_default();
        if text.len() <= TERMINATION_MESSAGE_BYTES_MAX {
            return text;
        }
        let error = match self {
            Self::Error(error) => error.clone(),
            Self::Facts(_) => InspectError {
                reason: ModelFault::ModelConfigInvalid,
                message: "the model's facts do not fit into a termination message".into(),
            },
        };
        let mut message = error.message;
        // Every character may double in size when JSON escapes it; half the limit always fits.
        let mut cut = message.len().min(TERMINATION_MESSAGE_BYTES_MAX / 2 - 128);
        while !message.is_char_boundary(cut) {
            cut -= 1;
        }
        message.truncate(cut);
        message.push('…');
        let short = Self::Error(InspectError {
            reason: error.reason,
            message,
        });
        serde_json::to_string(&short).unwrap_or_default()
    }

    /// Reads a termination message.
    ///
    /// # Errors
    /// When the text is not a report, with the position and the reason.
    pub fn from_message(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_error_is_shortened_to_a_whole_document() {
        let report = InspectReport::Error(InspectError {
            reason: ModelFault::WeightsMissing,
            message: "tensor \"ü\" missing; ".repeat(1000),
        });
        let text = report.to_message();
        assert!(
            text.len() <= TERMINATION_MESSAGE_BYTES_MAX,
            "{}",
            text.len()
        );
        match InspectReport::from_message(&text).unwrap() {
            InspectReport::Error(error) => {
                assert_eq!(error.reason, ModelFault::WeightsMissing);
                assert!(error.message.ends_with('…'));
            }
            InspectReport::Facts(_) => panic!("an error became facts"),
        }
    }
}
