//! The vocabulary that families are written in: plain descriptors of layers.

use engine_spec::Rank;

use crate::Slot;
use crate::gate::Gate;
use crate::rope::Rope;
use crate::tensors::{TensorSpec, WeightId};

/// A whole model, or a rank's share of one: what to load and what to compute.
#[derive(Clone, Debug)]
pub struct Model {
    /// Every tensor the weight files must contain, indexed by [`WeightId`].
    pub tensors: Vec<TensorSpec>,
    /// Whose share of the weights, heads and experts it is.
    pub rank: Rank,
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
    /// The layer that drafts, when it was asked for.
    pub prediction: Option<Prediction>,
}

impl Model {
    /// Float32 values that an activation buffer needs per token of a step.
    pub fn slot_width(&self, slot: Slot) -> usize {
        let of_layer = |layer: &Layer| match slot {
            Slot::Hidden | Slot::Normed | Slot::Attended | Slot::Mixed => self.hidden,
            Slot::Previous => self.prediction.as_ref().map_or(0, |_| self.hidden),
            Slot::Joined => self.prediction.as_ref().map_or(0, |_| 2 * self.hidden),
            _ => match &layer.attention {
                Attention::Latent(attention) => attention.slot_width(slot),
                Attention::Grouped(attention) => attention.slot_width(slot),
            },
        };
        self.cached_layers().map(of_layer).max().unwrap_or(0)
    }

    /// The decoder layers, and the prediction layer's own after them: all that have a cache, in its order.
    pub fn cached_layers(&self) -> impl Iterator<Item = &Layer> {
        let prediction = self.prediction.iter().map(|prediction| &prediction.layer);
        self.layers.iter().chain(prediction)
    }

    /// Float32 values that the widest MLP needs per token between its input and its output.
    pub fn mlp_width(&self) -> usize {
        let of_layer = |layer: &Layer| match &layer.mlp {
            Mlp::Dense(mlp) => mlp.scratch_width(),
            Mlp::Moe(moe) => moe.scratch_width(self.hidden),
        };
        self.cached_layers().map(of_layer).max().unwrap_or(0)
    }
}

/// Multi-token prediction (DeepSeek-V3 report, section 2.2, eq. 21 to 25): from the hidden state at a position and the
/// token that follows it to the logits of the token after that. Embedding and head are the model's own.
///
/// The hidden state is the one that the head sees, after its norm, as in the published engines; the report's figure does
/// not say. Further tokens come from the same layer, applied to what it left before.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// What the names of its tensors begin with.
    pub prefix: String,
    /// Over the token's embedding.
    pub token_norm: Norm,
    /// Over the hidden state.
    pub hidden_norm: Norm,
    /// `[hidden, 2 * hidden]`, over `[token | hidden state]`.
    pub join: WeightId,
    /// A decoder layer with a cache of its own, whose entry at a position is made of the hidden state there.
    pub layer: Layer,
    /// Before the head.
    pub final_norm: Norm,
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
    /// Grouped-query attention.
    Grouped(GroupedAttention),
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
    /// Heads that the rank holds.
    pub heads: usize,
    /// The first of them.
    pub first_head: usize,
    /// Heads of all ranks.
    pub all_heads: usize,
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

    fn slot_width(&self, slot: Slot) -> usize {
        match slot {
            Slot::QueryLatent => match self.query {
                Query::Full(_) => 0,
                Query::LowRank { rank, .. } => rank,
            },
            Slot::Query => self.heads * self.query_width(),
            Slot::AbsorbedQuery | Slot::LatentValue => self.heads * self.latent,
            Slot::Value => self.all_heads * self.value,
            Slot::CacheRow => self.latent + self.rope,
            _ => 0,
        }
    }
}

/// Grouped-query attention: query head `h` attends with key-value head `h / (heads / kv_heads)`.
#[derive(Clone, Debug)]
pub struct GroupedAttention {
    /// `[heads * width, hidden]`.
    pub query: Projection,
    /// `[kv_heads * width, hidden]`.
    pub key: Projection,
    /// `[kv_heads * width, hidden]`.
    pub value: Projection,
    /// Norms of each head's query and key, before they are rotated.
    pub head_norms: Option<HeadNorms>,
    /// `[hidden, heads * width]`.
    pub output: WeightId,
    /// Query heads that the rank holds.
    pub heads: usize,
    /// The first of them.
    pub first_head: usize,
    /// Query heads of all ranks.
    pub all_heads: usize,
    /// Key and value heads that they attend with; divides `heads`. Where ranks are more than such heads, several hold the
    /// same one.
    pub kv_heads: usize,
    /// Width of queries, keys and values per head.
    pub width: usize,
    /// Factor on scores.
    pub scale: f32,
}

impl GroupedAttention {
    /// Query heads that share a key-value head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn slot_width(&self, slot: Slot) -> usize {
        match slot {
            Slot::Query => self.heads * self.width,
            Slot::Value => self.all_heads * self.width,
            Slot::FreshKey | Slot::FreshValue => self.kv_heads * self.width,
            _ => 0,
        }
    }
}

/// `weight · x + bias`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    /// `[out, in]`.
    pub weight: WeightId,
    /// `[out]`.
    pub bias: Option<WeightId>,
}

/// Norms over the width of one head, the same for all heads (Qwen3).
#[derive(Clone, Copy, Debug)]
pub struct HeadNorms {
    /// `[width]`.
    pub query: Norm,
    /// `[width]`.
    pub key: Norm,
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
    /// A key and a value for each key-value head.
    KeyValue {
        /// Key-value heads.
        heads: usize,
        /// Width of a key, and of a value.
        width: usize,
    },
}

impl KvLayout {
    /// Width of a key: of latent attention, the whole row.
    pub fn key_width(self) -> usize {
        match self {
            Self::Latent { latent, rope } => latent + rope,
            Self::KeyValue { width, .. } => width,
        }
    }

    /// Width of a value: of latent attention, the latent.
    pub fn value_width(self) -> usize {
        match self {
            Self::Latent { latent, .. } => latent,
            Self::KeyValue { width, .. } => width,
        }
    }

    /// Values cached per token.
    pub fn width(self) -> usize {
        match self {
            Self::Latent { latent, rope } => latent + rope,
            Self::KeyValue { heads, width } => 2 * heads * width,
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
    /// First column of it that the rank computes.
    pub first: usize,
    /// How many it computes.
    pub held: usize,
}

impl GatedMlp {
    /// Gate and up rows that the rank computes, and product rows of all ranks.
    pub fn scratch_width(&self) -> usize {
        2 * self.held + self.inner
    }
}

/// Mixture of experts.
#[derive(Clone, Debug)]
pub struct Moe {
    /// Chooses experts and their weights.
    pub gate: Gate,
    /// The routed experts that the rank holds, each whole.
    pub experts: Vec<GatedMlp>,
    /// The index of the first one.
    pub first_expert: usize,
    /// Joined shared experts, weight one.
    pub shared: Option<GatedMlp>,
}

impl Moe {
    /// Gate scores; gate, up and product rows of all chosen experts; the chosen experts' outputs.
    pub fn scratch_width(&self, hidden: usize) -> usize {
        let outputs = self.gate.top_k + usize::from(self.shared.is_some());
        let shared = self.shared.as_ref().map_or(0, GatedMlp::scratch_width);
        self.gate.experts + 3 * self.routed_width() + shared + outputs * hidden
    }

    /// Inner values of all chosen experts.
    pub fn routed_width(&self) -> usize {
        self.gate.top_k * self.experts.first().map_or(0, |mlp| mlp.inner)
    }
}

/// Strategy: how an output joins the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residual {
    /// Addition.
    Add,
}
