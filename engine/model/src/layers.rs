//! The vocabulary that families are written in: plain descriptors of layers.

use crate::Slot;
use crate::gate::Gate;
use crate::rope::Rope;
use crate::tensors::{TensorSpec, WeightId};

/// A whole model: what to load and what to compute.
#[derive(Clone, Debug)]
pub struct Model {
    /// Every tensor the weight files must contain, indexed by [`WeightId`].
    pub tensors: Vec<TensorSpec>,
    /// Prefixes of tensors that may be in the files and are not used (multi-token-prediction layers).
    pub unused_prefixes: Vec<String>,
    /// Suffixes of tensors that contradict the config when present, with the config field that says so.
    pub forbidden_suffixes: Vec<(String, &'static str)>,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding and values in a logits row.
    pub vocabulary: usize,
    /// Table of `vocabulary` rows.
    pub embedding: WeightId,
    /// The decoder layers in order.
    pub layers: Vec<Layer>,
    /// Norm before the head.
    pub final_norm: Norm,
    /// Table of `vocabulary` rows; the embedding itself when tied.
    pub head: WeightId,
    /// Rotary embedding of all layers.
    pub rope: Rope,
}

impl Model {
    /// Float32 values that an activation buffer needs per token of a step.
    pub fn slot_width(&self, slot: Slot) -> usize {
        let of_layer = |layer: &Layer| {
            let Attention::Latent(attention) = &layer.attention;
            match slot {
                Slot::Hidden | Slot::Normed | Slot::Attended | Slot::Mixed => self.hidden,
                Slot::QueryLatent => match attention.query {
                    Query::Full(_) => 0,
                    Query::LowRank { rank, .. } => rank,
                },
                Slot::Query => attention.heads * attention.query_width(),
                Slot::AbsorbedQuery | Slot::LatentValue => attention.heads * attention.latent,
                Slot::Value => attention.heads * attention.value,
                Slot::CacheRow => layer.kv.width(),
            }
        };
        self.layers.iter().map(of_layer).max().unwrap_or(0)
    }

    /// Float32 values that the widest MLP needs per token between its input and its output.
    pub fn mlp_width(&self) -> usize {
        let of_layer = |layer: &Layer| match &layer.mlp {
            Mlp::Dense(mlp) => 3 * mlp.inner,
            Mlp::Moe(moe) => moe.scratch_width(self.hidden),
        };
        self.layers.iter().map(of_layer).max().unwrap_or(0)
    }
}

/// One decoder layer.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Before attention.
    pub input_norm: Norm,
    /// How tokens see each other.
    pub attention: Attention,
    /// What attention keeps per token.
    pub kv: KvLayout,
    /// Before the MLP.
    pub mlp_norm: Norm,
    /// How each token is transformed.
    pub mlp: Mlp,
    /// How both outputs join the residual stream.
    pub residual: Residual,
}

/// RMSNorm.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// `[width]`.
    pub weight: WeightId,
    /// Added to the mean square.
    pub epsilon: f32,
}

/// Strategy: attention.
#[derive(Clone, Debug)]
pub enum Attention {
    /// Multi-head latent attention (DeepSeek-V2 paper, section 2.1).
    Latent(LatentAttention),
}

/// Multi-head latent attention: keys and values of all heads are linear maps of one cached latent.
#[derive(Clone, Debug)]
pub struct LatentAttention {
    /// From the normed residual to all heads' queries, each `[nope | rope]`.
    pub query: Query,
    /// `[latent + rope, hidden]`.
    pub kv_down: WeightId,
    /// Over the latent only; the rotated part is not normed.
    pub kv_norm: Norm,
    /// `[heads * (nope + value), latent]`, per head `[nope | value]` rows.
    pub kv_up: WeightId,
    /// `[hidden, heads * value]`.
    pub output: WeightId,
    /// Number of heads.
    pub heads: usize,
    /// Per-head width without position.
    pub nope: usize,
    /// Per-head rotated width.
    pub rope: usize,
    /// Per-head width of values.
    pub value: usize,
    /// Width of the cached latent.
    pub latent: usize,
    /// Factor on scores.
    pub scale: f32,
}

impl LatentAttention {
    /// Per-head width of queries.
    pub fn query_width(&self) -> usize {
        self.nope + self.rope
    }
}

/// How queries come from the normed residual.
#[derive(Clone, Copy, Debug)]
pub enum Query {
    /// One matrix (V2-Lite).
    Full(WeightId),
    /// Down to `rank`, norm, up.
    LowRank {
        /// `[rank, hidden]`.
        down: WeightId,
        /// Over the rank.
        norm: Norm,
        /// `[heads * (nope + rope), rank]`.
        up: WeightId,
        /// Width in between.
        rank: usize,
    },
}

/// Strategy: what a layer caches per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvLayout {
    /// One row `[latent | rotated key]` shared by all heads.
    Latent {
        /// Width of the normed latent.
        latent: usize,
        /// Width of the rotated key.
        rope: usize,
    },
}

impl KvLayout {
    /// Values cached per token.
    pub fn width(self) -> usize {
        match self {
            Self::Latent { latent, rope } => latent + rope,
        }
    }
}

/// Strategy: MLP.
#[derive(Clone, Debug)]
pub enum Mlp {
    /// The same for every token.
    Dense(GatedMlp),
    /// Routed experts, and perhaps one shared by all tokens.
    Moe(Moe),
}

/// `down(silu(gate(x)) * up(x))`.
#[derive(Clone, Copy, Debug)]
pub struct GatedMlp {
    /// `[inner, hidden]`.
    pub gate: WeightId,
    /// `[inner, hidden]`.
    pub up: WeightId,
    /// `[hidden, inner]`.
    pub down: WeightId,
    /// Width in between.
    pub inner: usize,
}

/// Mixture of experts.
#[derive(Clone, Debug)]
pub struct Moe {
    /// Chooses experts and their weights.
    pub gate: Gate,
    /// The routed experts.
    pub experts: Vec<GatedMlp>,
    /// Joined shared experts, weight one.
    pub shared: Option<GatedMlp>,
}

impl Moe {
    /// Gate scores; gate, up and product rows of all chosen experts; the chosen experts' outputs.
    pub fn scratch_width(&self, hidden: usize) -> usize {
        let outputs = self.gate.top_k + usize::from(self.shared.is_some());
        self.gate.experts + 3 * self.inner_width() + outputs * hidden
    }

    /// Inner values of all chosen experts and the shared one.
    pub fn inner_width(&self) -> usize {
        let routed = self.experts.first().map_or(0, |mlp| mlp.inner);
        self.gate.top_k * routed + self.shared.as_ref().map_or(0, |mlp| mlp.inner)
    }
}

/// Strategy: how an output joins the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residual {
    /// Addition.
    Add,
}
