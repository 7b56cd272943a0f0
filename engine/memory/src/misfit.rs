//! Why a model cannot be planned, with the numbers and the nearest settings that would fit.

use std::fmt;

use engine_spec::{Architecture, Parallelism, Quantization};

use crate::plan::gib;

/// The nearest changes that would make a model fit; each on its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nearest {
    /// A shorter context that fits with the same ranks.
    pub max_model_len: Option<u32>,
    /// Fewer tokens per step that fit with the same ranks and context.
    pub max_num_batched_tokens: Option<u32>,
    /// More tensor-parallel ranks that fit with the same context.
    pub tensor: Option<u32>,
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ways: Vec<String> = [
            self.max_model_len
                .map(|n| format!("a context of at most {n} tokens")),
            self.max_num_batched_tokens
                .map(|n| format!("at most {n} tokens per step")),
            self.tensor.map(|n| format!("{n} devices per replica")),
        ]
        .into_iter()
        .flatten()
        .collect();
        if ways.is_empty() {
            f.write_str("no setting makes it fit; use devices with more memory")
        } else {
            write!(f, "it would fit with {}", ways.join(", or with "))
        }
    }
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// The context asked for is longer than the model is declared for.
    #[error(
        "maxModelLen = {requested}: the model is declared for {max_positions} positions; ask for at most that"
    )]
    ContextTooLong {
        /// Tokens asked for.
        requested: u32,
        /// The model's own limit.
        max_positions: u32,
    },
    /// The device does not compute in the dtype asked for.
    #[error(
        "dtype = float32: the GPU computes in bfloat16; ask for auto or bfloat16, or for the device cpu"
    )]
    NoArithmetic,
    /// Drafts were asked for of a family that has no prediction layer.
    #[error(
        "numSpeculativeTokens is above 0, but {0} models have no prediction layer (num_nextn_predict_layers of their \
         config.json); leave it out"
    )]
    NoPredictionLayer(Architecture),
    /// A cache in eight bits was asked for where no kernel reads one.
    #[error(
        "kvCacheDtype = fp8: the GPU keeps a cache in eight bits for latent attention with kv_lora_rank 512 and \
         qk_rope_head_dim 64, and {0}; ask for auto"
    )]
    NoFp8Cache(&'static str),
    /// The weights are in the CPU's layout.
    #[error(
        "the model is packed for the CPU; serve it on the device cpu, or give the GPU the files that it was packed from"
    )]
    Packed,
    /// The device does not multiply integers.
    #[error(
        "quantization = {0}: the GPU backend does not multiply integer weights; ask for none, or for the device cpu"
    )]
    NoIntegers(Quantization),
    /// The model cannot be divided that way.
    #[error("parallelism {axis} = {found}: {reason}")]
    Indivisible {
        /// tensor, expert or pipeline.
        axis: &'static str,
        /// The value asked for.
        found: u32,
        /// What it would have to divide.
        reason: String,
    },
    /// Weights and one longest sequence exceed the device.
    #[error(
        "needs {} per device (weights {}, KV cache of one sequence {}, workspace {}, runtime {}) but {} are there; {nearest}",
        gib(*.needed_bytes), gib(*.weights_bytes), gib(*.kv_bytes), gib(*.workspace_bytes), gib(*.runtime_bytes), gib(*.capacity_bytes)
    )]
    DoesNotFit {
        /// Bytes one rank needs at least.
        needed_bytes: u64,
        /// Bytes one device has.
        capacity_bytes: u64,
        /// Part of `needed_bytes`.
        weights_bytes: u64,
        /// Part of `needed_bytes`: one sequence of the longest context.
        kv_bytes: u64,
        /// Part of `needed_bytes`.
        workspace_bytes: u64,
        /// Part of `needed_bytes`.
        runtime_bytes: u64,
        /// Ranks asked for.
        parallelism: Parallelism,
        /// Ways out.
        nearest: Nearest,
    },
}
