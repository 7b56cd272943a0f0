//! Why a model could not be made ready.

use std::path::PathBuf;

use engine_spec::{ConfigError, ModelFault};
use thiserror::Error;

/// See the variants; [`LoadError::fault`] is the closed reason that conditions and metrics use.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The source names nothing that exists.
    #[error("{0}")]
    NotFound(String),
    /// `config.json` cannot be used.
    #[error("{path}: {source}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ConfigError,
    },
    /// A file is not what its format says.
    #[error("{file}: {problem}")]
    Malformed {
        /// File name.
        file: String,
        /// What was found and expected.
        problem: String,
    },
    /// A tensor or shard is absent.
    #[error("{0}")]
    Missing(String),
    /// Drafts are asked for, and no tensor of a prediction layer is in the files.
    #[error("{0}")]
    NoPredictionLayer(String),
    /// A shard ends early.
    #[error("{file}: {problem}")]
    Truncated {
        /// File name.
        file: String,
        /// How many bytes were found and expected.
        problem: String,
    },
    /// A tensor contradicts the config.
    #[error("{file}: tensor {tensor}: {problem}")]
    Mismatch {
        /// File name.
        file: String,
        /// Tensor name.
        tensor: String,
        /// What was found and expected.
        problem: String,
    },
    /// A local file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// A local file cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// The local disk is full.
    #[error(
        "no space left for {path} ({needed_bytes} bytes still to be written); give the model cache a larger volume"
    )]
    DiskFull {
        /// The file being written.
        path: PathBuf,
        /// What was still missing.
        needed_bytes: u64,
    },
    /// The models in use leave too little of the cache's limit.
    #[error(
        "the model cache holds {in_use} bytes of models in use and {folder} takes {bytes}, its limit is {limit} bytes; raise the limit (--cache-limit), or stop a model on this machine"
    )]
    CacheFull {
        /// What was to be fetched.
        folder: String,
        /// What it takes.
        bytes: u64,
        /// What cannot be removed.
        in_use: u64,
        /// The limit.
        limit: u64,
    },
    /// This user may not write the cache.
    #[error(
        "{path} may not be written by this user; give the cache directory to it (chown 65532:65532 for the images' user)"
    )]
    CacheDenied {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// The hub or object store refused the credentials.
    #[error("{0}")]
    AccessDenied(String),
    /// The hub or object store did not answer as it should, after retries.
    #[error("{0}")]
    Unreachable(String),
    /// What was fetched is not what the server announced.
    #[error("{file}: {problem}")]
    Corrupt {
        /// File name.
        file: String,
        /// Digest or size found and expected.
        problem: String,
    },
    /// The backend could not take the weights.
    #[error("{0}")]
    Backend(String),
}

impl LoadError {
    /// The closed reason; `None` for a failure of this process rather than of the model.
    pub fn fault(&self) -> Option<ModelFault> {
        Some(match self {
            Self::NotFound(_) => ModelFault::ModelNotFound,
            Self::Config {
                source: ConfigError::Unsupported(_),
                ..
            } => ModelFault::UnsupportedArchitecture,
            Self::Config { .. } => ModelFault::ModelConfigInvalid,
            Self::Missing(_) | Self::NoPredictionLayer(_) => ModelFault::WeightsMissing,
            Self::Truncated { .. } => ModelFault::WeightsTruncated,
            Self::Malformed { .. } | Self::Mismatch { .. } | Self::Corrupt { .. } => {
                ModelFault::WeightsMismatch
            }
            Self::DiskFull { .. } | Self::CacheFull { .. } => ModelFault::DiskFull,
            Self::AccessDenied(_) => ModelFault::AccessDenied,
            Self::Unreachable(_) => ModelFault::SourceUnreachable,
            Self::Read { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound => ModelFault::ModelNotFound,
                std::io::ErrorKind::PermissionDenied => ModelFault::AccessDenied,
                _ => return None,
            },
            Self::Write { .. } | Self::CacheDenied { .. } | Self::Backend(_) => return None,
        })
    }

    /// The message with all its causes, on one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let part = error.to_string();
            // Some messages already include their source.
            if !text.contains(&part) {
                text.push_str(": ");
                text.push_str(&part);
            }
            cause = error.source();
        }
        text
    }
}
