//! The contract between operator and engine: what a model is, how an engine pod is configured,
//! what it reports, and the exact metric names it exposes.
//!
//! Everything here is plain data plus total functions; nothing reads files, clocks or the
//! environment. Both binaries link this crate, so a field that changes here changes on both sides
//! at once.

pub mod engine_config;
pub mod health;
pub mod inspect;
pub mod kv_cache;
pub mod metrics;
pub mod model_config;
mod published;
pub mod rank;

pub use engine_config::{
    Device, Dtype, EngineConfig, EngineConfigError, ModelSource, NUM_SPECULATIVE_TOKENS_MAX,
    Parallelism, Quantization,
};
pub use health::{EndReport, GpuFault, LoadReport, StartupPhase, StartupReport};
pub use inspect::{InspectError, InspectReport, ModelFacts, ModelFault};
pub use kv_cache::KvCacheDtype;
pub use model_config::{
    Architecture, AttentionConfig, ConfigError, GateScoring, GateSelection, GqaConfig, MlaConfig,
    ModelConfig, MoeConfig, Packing, RopeScaling, StoredDtype, StoredIntegers, WeightBlocks, Yarn,
};
pub use rank::Rank;
