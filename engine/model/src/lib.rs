//! Model families over a small vocabulary of layers, and the [`Backend`] they run on.
//!
//! A family's file turns a checked [`engine_spec::ModelConfig`] into a [`Model`]: the tensors it expects in the weight
//! files and a list of [`Layer`] descriptors. [`forward`] walks the descriptors and calls the backend; it knows no
//! family. Attention, MLP, residual and cache layout are separate strategy points of every layer, so that a family
//! with other attention or another residual adds a variant instead of a second engine.
//!
//! Invariant: everything here is pure; no tensor data, files, threads or devices.

mod backend;
mod decoder;
mod deepseek_v3;
mod forward;
mod gate;
mod layers;
mod llama;
mod qwen3_moe;
mod rope;
mod tensors;

pub use backend::{Backend, PredictionBackend, Slot};
pub use decoder::Drafting;
pub use forward::{forward, forward_to_draft, predict};
pub use gate::{Choice, Gate, GateScratch};
pub use layers::{
    Attention, GatedMlp, GroupedAttention, HeadNorms, KvLayout, LatentAttention, Layer, Mlp, Model,
    Moe, Norm, Prediction, Projection, Query, Residual,
};
pub use rope::Rope;
pub use tensors::{RowShare, TensorRole, TensorSpec, WeightId};

use engine_spec::{AttentionConfig, ModelConfig, Rank};

/// The layer graph and expected tensors of a model.
pub fn build(config: &ModelConfig) -> Model {
    build_share(config, Drafting::Off, Rank::ALONE)
}

/// The same with its prediction layer, in families that may have one ([`ModelConfig::can_predict`]).
pub fn build_to_draft(config: &ModelConfig) -> Model {
    build_share(config, Drafting::On, Rank::ALONE)
}

/// What `rank` holds of a model. Every matrix is cut by its output rows: attention's by heads, the experts' not at all,
/// since a rank holds whole ones; norms, gates and the projections to what all heads share are on every rank. A sum is
/// then never cut, so that each value is computed by one rank in the order in which one rank alone would.
///
/// The heads must be divisible as the memory plan demands.
pub fn build_share(config: &ModelConfig, drafting: Drafting, rank: Rank) -> Model {
    match (&config.attention, &config.moe) {
        (AttentionConfig::Latent(shape), _) => deepseek_v3::build(config, shape, drafting, rank),
        (AttentionConfig::Grouped(shape), None) => llama::build(config, shape, rank),
        (AttentionConfig::Grouped(shape), Some(moe)) => qwen3_moe::build(config, shape, moe, rank),
    }
}
