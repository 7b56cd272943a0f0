//! How one engine process is configured: the file an operator mounts, and the same fields as flags.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::kv_cache::KvCacheDtype;

/// The only version of the file so far.
pub const API_VERSION: &str = "engine.cachalot.dev/v1";

/// Arithmetic the engine is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// The dtype the weights are stored in, as far as the device has it.
    #[default]
    Auto,
    /// Weights and cache in float32.
    Float32,
    /// Weights and cache in bfloat16, sums in float32.
    Bfloat16,
}

impl FromStr for Dtype {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "float32" => Ok(Self::Float32),
            "bfloat16" => Ok(Self::Bfloat16),
            other => Err(format!("\"{other}\" is not one of auto, float32, bfloat16")),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
        })
    }
}

/// Integers that the large matrices are made into when the weights are loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// As they are stored.
    #[default]
    None,
    /// Eight bits, one scale for each output row.
    Int8,
    /// Four bits, one scale for each group of 64 columns; head and key-value up-projection in eight bits.
    Int4,
}

impl Quantization {
    /// Whether weights stay as they are stored.
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }
}

impl FromStr for Quantization {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "int8" => Ok(Self::Int8),
            "int4" => Ok(Self::Int4),
            other => Err(format!("\"{other}\" is not one of none, int8, int4")),
        }
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        })
    }
}

/// Kind of device an engine computes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// Host processors.
    #[default]
    Cpu,
    /// NVIDIA GPUs.
    Nvidia,
}

impl FromStr for Device {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "nvidia" => Ok(Self::Nvidia),
            other => Err(format!("\"{other}\" is not one of cpu, nvidia")),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Nvidia => "nvidia",
        })
    }
}

/// How many ranks share one replica, and along which axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Parallelism {
    /// Ranks that split every matrix.
    pub tensor: u32,
    /// Ranks that split the routed experts; divides `tensor * pipeline` ranks' experts further.
    pub expert: u32,
    /// Ranks that split the layers.
    pub pipeline: u32,
}

impl Default for Parallelism {
    fn default() -> Self {
        Self {
            tensor: 1,
            expert: 1,
            pipeline: 1,
        }
    }
}

impl Parallelism {
    /// Devices of one replica. Tensor and expert parallelism use the same ranks.
    pub fn ranks(self) -> u32 {
        self.tensor.max(self.expert) * self.pipeline
    }
}

/// Where the weights come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelSource {
    /// `file:///dir`, `hf://org/name`, `s3://bucket/prefix` or a plain path.
    pub source: String,
    /// Commit, tag or branch of a hub; absent = its default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// Configuration of `engine serve`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EngineConfig {
    /// [`API_VERSION`].
    pub api_version: String,
    /// Weights.
    pub model: ModelSource,
    /// Name that clients ask for; absent = the last part of the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub served_model_name: Option<String>,
    /// Address to listen on.
    #[serde(default = "default_host")]
    pub host: String,
    /// Port to listen on.
    #[serde(default = "default_port")]
    pub port: u16,
    /// Device to compute on.
    #[serde(default)]
    pub device: Device,
    /// Arithmetic.
    #[serde(default)]
    pub dtype: Dtype,
    /// Integer weights.
    #[serde(default, skip_serializing_if = "Quantization::is_none")]
    pub quantization: Quantization,
    /// What keys and values are kept as.
    #[serde(default, skip_serializing_if = "KvCacheDtype::is_auto")]
    pub kv_cache_dtype: KvCacheDtype,
    /// Ranks.
    #[serde(default)]
    pub parallelism: Parallelism,
    /// Longest prompt plus answer, tokens; absent = what the model is declared for, at most
    /// [`MAX_MODEL_LEN_DEFAULT`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u32>,
    /// Sequences in one batch.
    #[serde(default = "default_max_num_seqs")]
    pub max_num_seqs: u32,
    /// Tokens per KV block.
    #[serde(default = "default_block_size")]
    pub block_size: u32,
    /// Tokens one step may process, prefill chunks and decodes together.
    #[serde(default = "default_max_num_batched_tokens")]
    pub max_num_batched_tokens: u32,
    /// Tokens that the model's prediction layer drafts for each decoding sequence and step; 0 drafts none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub num_speculative_tokens: u32,
    /// Requests that may wait; one more is answered with 429.
    #[serde(default = "default_max_queued_requests")]
    pub max_queued_requests: u32,
    /// Seconds after SIGTERM in which running requests may finish.
    #[serde(default = "default_drain_timeout_seconds")]
    pub drain_timeout_seconds: u32,
    /// Total bytes of the plan this pod was sized by; the engine refuses to start when its own plan
    /// differs, because then one of the two would be wrong about memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub planned_bytes: Option<u64>,
}

/// Context served when neither the user nor the model asks for less, tokens.
pub const MAX_MODEL_LEN_DEFAULT: u32 = 8192;
/// Most drafts of a step: published models are trained to draft one or two, and each further one is accepted less often.
pub const NUM_SPECULATIVE_TOKENS_MAX: u32 = 8;

fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn default_host() -> String {
    "0.0.0.0".into()
}
fn default_port() -> u16 {
    8000
}
fn default_max_num_seqs() -> u32 {
    16
}
fn default_block_size() -> u32 {
    16
}
fn default_max_num_batched_tokens() -> u32 {
    512
}
fn default_max_queued_requests() -> u32 {
    256
}
fn default_drain_timeout_seconds() -> u32 {
    60
}

/// A field of the engine's configuration that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineConfigError {
    /// Not JSON, an unknown field, or a field of the wrong type.
    #[error("engine configuration is malformed: {0}")]
    Malformed(String),
    /// A value outside what is served.
    #[error("engine configuration: {field} = {found}: {expected}")]
    Invalid {
        /// The field's name in the file.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would be right.
        expected: &'static str,
    },
}

impl EngineConfig {
    /// All defaults for a model source.
    pub fn for_source(source: impl Into<String>) -> Self {
        Self {
            api_version: API_VERSION.into(),
            model: ModelSource {
                source: source.into(),
                revision: None,
            },
            served_model_name: None,
            host: default_host(),
            port: default_port(),
            device: Device::default(),
            dtype: Dtype::default(),
            quantization: Quantization::default(),
            kv_cache_dtype: KvCacheDtype::default(),
            parallelism: Parallelism::default(),
            max_model_len: None,
            max_num_seqs: default_max_num_seqs(),
            block_size: default_block_size(),
            max_num_batched_tokens: default_max_num_batched_tokens(),
            num_speculative_tokens: 0,
            max_queued_requests: default_max_queued_requests(),
            drain_timeout_seconds: default_drain_timeout_seconds(),
            planned_bytes: None,
        }
    }

    /// Reads and checks the file an operator mounts.
    ///
    /// # Errors
    /// Names the field, its value and what would be right.
    pub fn from_json(text: &str) -> Result<Self, EngineConfigError> {
        let config: Self =
            serde_json::from_str(text).map_err(|e| EngineConfigError::Malformed(e.to_string()))?;
        config.check()?;
        Ok(config)
    }

    /// The name clients ask for.
    pub fn served_name(&self) -> &str {
        self.served_model_name.as_deref().unwrap_or_else(|| {
            let source = self.model.source.trim_end_matches('/');
            source.rsplit('/').next().unwrap_or(source)
        })
    }

    /// Checks ranges; every path into the engine goes through here.
    ///
    /// # Errors
    /// Names the first field out of range.
    pub fn check(&self) -> Result<(), EngineConfigError> {
        let invalid = |field, found: &dyn ToString, expected| {
            Err(EngineConfigError::Invalid {
                field,
                found: found.to_string(),
                expected,
            })
        };
        if self.api_version != API_VERSION {
            return invalid(
                "apiVersion",
                &self.api_version,
                "must be engine.cachalot.dev/v1",
            );
        }
        if self.model.source.is_empty() {
            return invalid("model.source", &"", "must name a directory or a URI");
        }
        let name = self.served_name();
        if name.is_empty() || name.len() > 256 || name.chars().any(char::is_control) {
            return invalid(
                "servedModelName",
                &name,
                "must be 1 to 256 printable characters",
            );
        }
        if self
            .max_model_len
            .is_some_and(|n| !(2..=1 << 24).contains(&n))
        {
            let found = self.max_model_len.unwrap_or_default();
            return invalid("maxModelLen", &found, "must be between 2 and 16777216");
        }
        if self.dtype == Dtype::Float32 && !self.quantization.is_none() {
            return invalid(
                "quantization",
                &self.quantization,
                "must be none with dtype float32: what is not quantised is bfloat16; ask for dtype auto or bfloat16",
            );
        }
        if !(1..=4096).contains(&self.max_num_seqs) {
            return invalid(
                "maxNumSeqs",
                &self.max_num_seqs,
                "must be between 1 and 4096",
            );
        }
        if !(1..=1024).contains(&self.block_size) {
            return invalid("blockSize", &self.block_size, "must be between 1 and 1024");
        }
        if !(self.max_num_seqs..=1 << 20).contains(&self.max_num_batched_tokens) {
            return invalid(
                "maxNumBatchedTokens",
                &self.max_num_batched_tokens,
                "must be at least maxNumSeqs (one token for each decoding sequence) and at most 1048576",
            );
        }
        if self.num_speculative_tokens > NUM_SPECULATIVE_TOKENS_MAX {
            return invalid(
                "numSpeculativeTokens",
                &self.num_speculative_tokens,
                "must be between 0 (no drafts) and 8",
            );
        }
        if !(1..=1 << 20).contains(&self.max_queued_requests) {
            return invalid(
                "maxQueuedRequests",
                &self.max_queued_requests,
                "must be between 1 and 1048576",
            );
        }
        if !(1..=86_400).contains(&self.drain_timeout_seconds) {
            return invalid(
                "drainTimeoutSeconds",
                &self.drain_timeout_seconds,
                "must be between 1 and 86400",
            );
        }
        let Parallelism {
            tensor,
            expert,
            pipeline,
        } = self.parallelism;
        if [tensor, expert, pipeline]
            .iter()
            .any(|n| !(1..=1024).contains(n))
        {
            let found = format!("tensor {tensor}, expert {expert}, pipeline {pipeline}");
            return invalid("parallelism", &found, "each must be between 1 and 1024");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minimal_file_takes_the_defaults() {
        let text = r#"{"apiVersion":"engine.cachalot.dev/v1","model":{"source":"file:///models/tiny-r1"}}"#;
        let config = EngineConfig::from_json(text).unwrap();
        assert_eq!(config, EngineConfig::for_source("file:///models/tiny-r1"));
        assert_eq!(config.served_name(), "tiny-r1");
    }

    #[test]
    fn mistakes_are_named() {
        for (text, expected) in [
            (
                r#"{"apiVersion":"v9","model":{"source":"x"}}"#,
                "apiVersion = v9",
            ),
            (
                r#"{"apiVersion":"engine.cachalot.dev/v1","model":{"source":"x"},"prot":1}"#,
                "prot",
            ),
            (
                r#"{"apiVersion":"engine.cachalot.dev/v1","model":{"source":""}}"#,
                "model.source",
            ),
            (
                r#"{"apiVersion":"engine.cachalot.dev/v1","model":{"source":"x"},"maxNumSeqs":0}"#,
                "maxNumSeqs = 0",
            ),
            (
                r#"{"apiVersion":"engine.cachalot.dev/v1","model":{"source":"x"},"dtype":"float32","quantization":"int8"}"#,
                "quantization = int8: must be none with dtype float32",
            ),
            (
                r#"{"apiVersion":"engine.cachalot.dev/v1","model":{"source":"x"},"maxNumBatchedTokens":1}"#,
                "maxNumBatchedTokens = 1: must be at least maxNumSeqs",
            ),
            (
                r#"{"apiVersion":"engine.cachalot.dev/v1","model":{"source":"x"},"numSpeculativeTokens":9}"#,
                "numSpeculativeTokens = 9: must be between 0 (no drafts) and 8",
            ),
        ] {
            let message = EngineConfig::from_json(text).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
