//! What a model is: the shape parameters of its `config.json`, checked once and then trusted.
//!
//! [`ModelConfig::from_hf_json`] is the only way in from outside. A value of this type has passed
//! every consistency rule that needs no tensors, so later stages index with it without checking
//! again. The serialised form is compact on purpose: it travels through a pod's termination message.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::engine_config::{Dtype, Quantization};

/// Families whose layer graph the engine knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// DeepSeek-V2 and V2-Lite.
    DeepseekV2,
    /// DeepSeek-V3, R1, V3.1 and checkpoints of the same shape.
    DeepseekV3,
    /// Qwen2 and Qwen2.5, with the R1 distills made of them.
    Qwen2,
    /// Llama 3 and checkpoints of its shape, with the R1 distills made of them.
    Llama,
    /// Qwen3, dense.
    Qwen3,
    /// Qwen3 with routed experts.
    Qwen3Moe,
}

impl Architecture {
    /// Every family, in the order of the documentation.
    pub const ALL: [Self; 6] = [
        Self::DeepseekV2,
        Self::DeepseekV3,
        Self::Qwen2,
        Self::Llama,
        Self::Qwen3,
        Self::Qwen3Moe,
    ];

    /// `model_type` of the family's `config.json`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::DeepseekV2 => "deepseek_v2",
            Self::DeepseekV3 => "deepseek_v3",
            Self::Qwen2 => "qwen2",
            Self::Llama => "llama",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3_moe",
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Dtype of the large matrices in the weight files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoredDtype {
    /// IEEE binary32.
    Float32,
    /// bfloat16.
    Bfloat16,
    /// IEEE binary16.
    Float16,
    /// FP8 e4m3fn with one scale per block, see [`WeightBlocks`].
    Float8E4m3,
}

impl StoredDtype {
    /// Bytes of one stored element.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Float32 => 4,
            Self::Bfloat16 | Self::Float16 => 2,
            Self::Float8E4m3 => 1,
        }
    }
}

/// Block-wise scales of FP8 weights: `w[i][j] * scale_inv[i / rows][j / columns]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightBlocks {
    /// Output rows that share a scale.
    pub rows: u32,
    /// Input columns that share a scale.
    pub columns: u32,
    /// Scales are powers of two (`scale_fmt: ue8m0`, DeepSeek-V3.1).
    pub power_of_two: bool,
}

/// Integer weights in the files: symmetric, of the format compressed-tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredIntegers {
    /// Four or eight.
    pub bits: u32,
    /// Columns that share a scale; absent = all of a row.
    pub group: Option<u32>,
    /// Several to a 32-bit word, with an offset (`pack-quantized`); else a byte each (`int-quantized`).
    pub packed: bool,
}

/// What `engine pack` was asked for; `cachalot_packed` in the config.json that it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Packing {
    /// Arithmetic.
    pub dtype: Dtype,
    /// Integers.
    pub quantization: Quantization,
}

/// How gate logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateScoring {
    /// Each expert on its own (V3).
    Sigmoid,
    /// Across all experts (V2, Qwen3).
    Softmax,
}

/// How experts are chosen from scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateSelection {
    /// The top-k scores.
    Greedy,
    /// The best groups by their highest score, then the top-k inside them (V2).
    GroupLimitedGreedy,
    /// The best groups by the sum of their two highest biased scores, then the top-k biased
    /// scores; the bias never enters the weights (V3, `noaux_tc`).
    BiasedGroups,
}

/// The mixture-of-experts part of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MoeConfig {
    /// Routed experts per MoE layer.
    pub routed_experts: u32,
    /// Experts that every token uses; stored as one MLP of this many times the expert width.
    pub shared_experts: u32,
    /// Routed experts per token (top-k).
    pub experts_per_token: u32,
    /// Inner width of one expert.
    pub intermediate_size: u32,
    /// Layers before this one have a dense MLP.
    pub first_dense_layers: u32,
    /// From there on, every so many layers is MoE …
    pub layer_frequency: u32,
    /// … namely those whose index leaves this remainder: 0 for DeepSeek, the frequency less one for Qwen.
    pub layer_remainder: u32,
    /// Layers that have a dense MLP all the same, ascending.
    pub dense_layers: Vec<u32>,
    /// Logits to scores.
    pub scoring: GateScoring,
    /// Scores to experts.
    pub selection: GateSelection,
    /// Groups the routed experts are divided into; 1 = no groups.
    pub groups: u32,
    /// Groups a token may use.
    pub groups_per_token: u32,
    /// Divide the chosen weights by their sum.
    pub normalise_weights: bool,
    /// Factor on the routed output.
    pub routed_scaling: f64,
}

/// Extension of the rotary embedding beyond the trained context.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RopeScaling {
    /// YaRN, as DeepSeek parametrises it; Qwen uses a part of the parameters.
    Yarn(Yarn),
    /// Low frequencies are interpolated, with a smooth passage to the kept ones (Llama 3.1).
    #[serde(rename_all = "camelCase")]
    Llama3 {
        /// Context multiplier.
        factor: f64,
        /// Wavelengths longer than `original_max_position` over this are interpolated.
        low_frequency_factor: f64,
        /// Wavelengths shorter than `original_max_position` over this are kept.
        high_frequency_factor: f64,
        /// Context length of pre-training.
        original_max_position: u32,
    },
}

/// Parameters of YaRN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Yarn {
    /// Context multiplier.
    pub factor: f64,
    /// Context length of pre-training.
    pub original_max_position: u32,
    /// Rotations above which a dimension keeps its frequency.
    pub beta_fast: f64,
    /// Rotations below which a dimension is fully interpolated.
    pub beta_slow: f64,
    /// Numerator of the cos/sin multiplier; absent means "not given".
    pub mscale: Option<f64>,
    /// Its denominator, and the softmax scale's correction; absent means "not given".
    pub mscale_all_dim: Option<f64>,
    /// Overrides the cos/sin multiplier.
    pub attention_factor: Option<f64>,
}

impl Yarn {
    /// `0.1 * mscale * ln(factor) + 1` for factors above one (DeepSeek-V3 `inference/model.py`).
    pub fn magnitude(factor: f64, mscale: f64) -> f64 {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * mscale * factor.ln() + 1.0
        }
    }
}

impl RopeScaling {
    /// What cos and sin are multiplied by. YaRN: the ratio of both magnitudes when both are given,
    /// else the plain magnitude (transformers `_compute_yarn_parameters`).
    pub fn cos_sin_multiplier(&self) -> f64 {
        let yarn = match self {
            Self::Yarn(yarn) => yarn,
            Self::Llama3 { .. } => return 1.0,
        };
        if let Some(given) = yarn.attention_factor {
            return given;
        }
        match (yarn.mscale, yarn.mscale_all_dim) {
            (Some(m), Some(all)) if m != 0.0 && all != 0.0 => {
                Yarn::magnitude(yarn.factor, m) / Yarn::magnitude(yarn.factor, all)
            }
            _ => Yarn::magnitude(yarn.factor, 1.0),
        }
    }

    /// What latent attention's softmax scale is multiplied by: the squared magnitude of YaRN's
    /// `mscale_all_dim`. Other attention keeps its scale.
    pub fn softmax_multiplier(&self) -> f64 {
        match self {
            Self::Yarn(yarn) => {
                Yarn::magnitude(yarn.factor, yarn.mscale_all_dim.unwrap_or(0.0)).powi(2)
            }
            Self::Llama3 { .. } => 1.0,
        }
    }
}

/// Attention of every layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum AttentionConfig {
    /// All heads share one cached latent.
    Latent(MlaConfig),
    /// Groups of query heads share a cached key and value head.
    Grouped(GqaConfig),
}

impl AttentionConfig {
    /// Query heads.
    pub fn heads(&self) -> u32 {
        match self {
            Self::Latent(mla) => mla.heads,
            Self::Grouped(gqa) => gqa.heads,
        }
    }

    /// Values of a head, or of the part of it, that carry the position.
    pub fn rotated_width(&self) -> u32 {
        match self {
            Self::Latent(mla) => mla.qk_rope_head_dim,
            Self::Grouped(gqa) => gqa.head_dim,
        }
    }

    /// Parameters of one layer.
    fn parameters(&self, hidden: u64) -> u64 {
        match self {
            Self::Latent(mla) => mla.parameters(hidden),
            Self::Grouped(gqa) => gqa.parameters(hidden),
        }
    }

    /// Those among them that are in norms and biases, which no file holds in eight bits.
    fn vector_parameters(&self) -> u64 {
        match self {
            Self::Latent(mla) => {
                u64::from(mla.q_lora_rank.unwrap_or(0)) + u64::from(mla.kv_lora_rank)
            }
            Self::Grouped(gqa) => gqa.vector_parameters(),
        }
    }
}

/// Multi-head latent attention (DeepSeek-V2 paper, section 2.1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MlaConfig {
    /// Query heads.
    pub heads: u32,
    /// Rank of the query's low-rank projection; absent = one full projection (V2-Lite).
    pub q_lora_rank: Option<u32>,
    /// Width of the cached latent.
    pub kv_lora_rank: u32,
    /// Per-head width without position.
    pub qk_nope_head_dim: u32,
    /// Per-head width that is rotated; shared by all heads on the key side.
    pub qk_rope_head_dim: u32,
    /// Per-head width of values.
    pub v_head_dim: u32,
}

impl MlaConfig {
    /// Query and key width per head.
    pub fn qk_head_dim(&self) -> u32 {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Values cached per token and layer: the latent and the rotated key part.
    pub fn cached_width(&self) -> u32 {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    fn parameters(&self, hidden: u64) -> u64 {
        let [h, kl, nope, rope, v] = [
            self.heads,
            self.kv_lora_rank,
            self.qk_nope_head_dim,
            self.qk_rope_head_dim,
            self.v_head_dim,
        ]
        .map(u64::from);
        let query = match self.q_lora_rank.map(u64::from) {
            Some(ql) => hidden * ql + ql + ql * h * (nope + rope),
            None => hidden * h * (nope + rope),
        };
        query + hidden * (kl + rope) + kl + kl * h * (nope + v) + h * v * hidden
    }
}

/// Grouped-query attention (Ainslie et al. 2023): query head `h` uses key-value head
/// `h / (heads / kv_heads)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GqaConfig {
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Width of queries, keys and values per head.
    pub head_dim: u32,
    /// Query, key and value projections add a bias (Qwen2); the output projection never does.
    pub qkv_bias: bool,
    /// Each head's query and key are normed before they are rotated (Qwen3).
    pub qk_norm: bool,
}

impl GqaConfig {
    /// Values of the keys, or of the values, of one token and layer.
    pub fn kv_width(&self) -> u32 {
        self.kv_heads * self.head_dim
    }

    /// Key-value heads on one of `tensor` ranks: shared out, or copied when there are more ranks.
    pub fn kv_heads_per_rank(&self, tensor: u32) -> u32 {
        self.kv_heads.div_ceil(tensor)
    }

    fn parameters(&self, hidden: u64) -> u64 {
        let queries = u64::from(self.heads * self.head_dim);
        let kv = u64::from(self.kv_width());
        2 * hidden * (queries + kv) + self.vector_parameters()
    }

    fn vector_parameters(&self) -> u64 {
        let queries = u64::from(self.heads * self.head_dim);
        let biases = if self.qkv_bias {
            queries + 2 * u64::from(self.kv_width())
        } else {
            0
        };
        let norms = if self.qk_norm { 2 * self.head_dim } else { 0 };
        biases + u64::from(norms)
    }
}

/// The checked shape of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// Rows of the embedding table.
    pub vocab_size: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Inner width of dense MLPs.
    pub intermediate_size: u32,
    /// Decoder layers, extra prediction layers not counted.
    pub layers: u32,
    /// Attention of every layer.
    pub attention: AttentionConfig,
    /// Mixture of experts; absent = all layers dense.
    pub moe: Option<MoeConfig>,
    /// Epsilon of RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Extension of the rotary embedding.
    pub rope_scaling: Option<RopeScaling>,
    /// Positions the model is declared for, prompt and answer together.
    pub max_positions: u32,
    /// The head shares the embedding's matrix.
    pub tied_embeddings: bool,
    /// Multi-token-prediction layers that follow the decoder layers in the file.
    pub mtp_layers: u32,
    /// Token that begins a sequence, if the family has one.
    pub bos_token: Option<u32>,
    /// Tokens that end an answer.
    pub eos_tokens: Vec<u32>,
    /// Dtype of the large matrices in the file.
    pub stored_dtype: StoredDtype,
    /// Block scales when the matrices are FP8.
    pub weight_blocks: Option<WeightBlocks>,
    /// Integers in the files; head, embedding, gates and norms then have `stored_dtype`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub integers: Option<StoredIntegers>,
    /// How `engine pack` made the weights; they are then in `model.packed`, as the CPU computes with them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packed: Option<Packing>,
}

impl ModelConfig {
    /// Reads a `config.json`: the published form, and the form that transformers 5 writes
    /// (`rope_parameters`; fields left out because they equal the family's default).
    ///
    /// # Errors
    /// Names the field, what was found and what is served.
    pub fn from_hf_json(text: &str) -> Result<Self, ConfigError> {
        crate::published::parse(text)
    }

    /// True when decoder layer `layer` has routed experts.
    pub fn is_moe_layer(&self, layer: u32) -> bool {
        self.moe.as_ref().is_some_and(|moe| {
            layer >= moe.first_dense_layers
                && layer.checked_rem(moe.layer_frequency) == Some(moe.layer_remainder)
                && !moe.dense_layers.contains(&layer)
        })
    }

    /// Whether checkpoints of the family may have a layer that predicts a further token. DeepSeek-V3 says so by
    /// `num_nextn_predict_layers`, and transformers 5 leaves the field out at its default of 1 with or without the layer,
    /// so only the tensors tell.
    pub fn can_predict(&self) -> bool {
        self.architecture == Architecture::DeepseekV3
    }

    /// Number of MoE layers.
    pub fn moe_layers(&self) -> u32 {
        (0..self.layers).filter(|l| self.is_moe_layer(*l)).count() as u32
    }

    /// Parameters of the main model, scales and prediction layers not counted.
    ///
    /// V3: 671 026 419 200; V2: 235 741 434 880; V2-Lite: 15 706 484 224; Llama-3.1-8B: 8 030 261 248;
    /// Qwen3-30B-A3B: 30 532 122 624.
    pub fn parameters(&self) -> u64 {
        let d = u64::from(self.hidden_size);
        let embeddings = u64::from(self.vocab_size) * d * if self.tied_embeddings { 1 } else { 2 };
        let moe_layers = u64::from(self.moe_layers());
        let dense_layers = u64::from(self.layers) - moe_layers;
        let attention = u64::from(self.layers) * (self.attention.parameters(d) + 2 * d);
        let dense = dense_layers * 3 * d * u64::from(self.intermediate_size);
        let moe = self.moe.as_ref().map_or(0, |moe| {
            let expert = 3 * d * u64::from(moe.intermediate_size);
            let routed = u64::from(moe.routed_experts);
            let bias = match moe.selection {
                GateSelection::BiasedGroups => routed,
                _ => 0,
            };
            moe_layers * ((routed + u64::from(moe.shared_experts)) * expert + routed * d + bias)
        });
        embeddings + d + attention + dense + moe
    }

    /// Parameters that one token reads, the embedding table not counted.
    pub fn active_parameters(&self) -> u64 {
        let d = u64::from(self.hidden_size);
        let table = u64::from(self.vocab_size) * d;
        let idle = self.moe.as_ref().map_or(0, |moe| {
            u64::from(self.moe_layers())
                * u64::from(moe.routed_experts - moe.experts_per_token)
                * 3
                * d
                * u64::from(moe.intermediate_size)
        });
        self.parameters() - if self.tied_embeddings { 0 } else { table } - idle
    }

    /// Bytes of the weight files by the config alone: FP8 matrices carry one float32 per block;
    /// embedding, head, norms, biases and gates stay at two bytes.
    pub fn stored_weight_bytes(&self) -> u64 {
        if self.weight_blocks.is_none() && self.integers.is_none() {
            return self.parameters() * self.stored_dtype.bytes();
        }
        let d = u64::from(self.hidden_size);
        let head = u64::from(self.vocab_size) * d * if self.tied_embeddings { 1 } else { 2 };
        let gates = self.moe.as_ref().map_or(0, |moe| {
            u64::from(self.moe_layers()) * u64::from(moe.routed_experts) * d
        });
        let norms = d + u64::from(self.layers) * (2 * d + self.attention.vector_parameters());
        let wide = head + gates + norms;
        let narrow = self.parameters() - wide;
        let scaled = match (self.weight_blocks, self.integers) {
            (Some(blocks), _) => narrow + narrow * 4 / u64::from(blocks.rows * blocks.columns),
            (None, Some(integers)) => {
                // A row's scale is small beside it.
                let scales = integers
                    .group
                    .map_or(0, |group| narrow * 2 / u64::from(group));
                narrow * u64::from(integers.bits) / 8 + scales
            }
            (None, None) => narrow * 2,
        };
        wide * 2 + scaled
    }
}

/// The families, for people.
fn served() -> String {
    let names = Architecture::ALL.map(Architecture::as_str);
    let (last, rest) = names.split_last().unwrap_or((&"", &[]));
    format!("{} and {last}", rest.join(", "))
}

/// Why a `config.json` cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or a field of the wrong type.
    #[error("config.json is malformed: {0}")]
    Malformed(String),
    /// A required field is absent.
    #[error("config.json: field `{0}` is missing")]
    Missing(&'static str),
    /// The family is not served.
    #[error("config.json: model_type \"{0}\" is not served; served are {served}", served = served())]
    Unsupported(String),
    /// A value that no model can have or that this engine does not serve.
    #[error("config.json: {field} = {found}: {expected}")]
    Invalid {
        /// The field as spelled in the file.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would be right.
        expected: String,
    },
}

impl ConfigError {
    pub(crate) fn invalid(
        field: &'static str,
        found: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            field,
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}
