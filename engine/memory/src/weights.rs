//! Bytes of weights on each rank.

use engine_spec::{
    AttentionConfig, Device, Dtype, GateSelection, GqaConfig, MlaConfig, ModelConfig, MoeConfig,
    Parallelism, StoredDtype, WeightBlocks,
};
use serde::{Deserialize, Serialize};

/// Dtype of the large matrices while they are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResidentDtype {
    /// Four bytes.
    Float32,
    /// Two bytes.
    Bfloat16,
    /// One byte and a float32 scale per block.
    Float8E4m3(WeightBlocks),
}

impl ResidentDtype {
    /// Bytes of a matrix of `rows` x `columns`.
    fn matrix(self, rows: u64, columns: u64) -> u64 {
        match self {
            Self::Float32 => rows * columns * 4,
            Self::Bfloat16 => rows * columns * 2,
            Self::Float8E4m3(blocks) => {
                let scales = rows.div_ceil(u64::from(blocks.rows))
                    * columns.div_ceil(u64::from(blocks.columns));
                rows * columns + scales * 4
            }
        }
    }

    /// Matrices that are never stored in eight bits: embedding, head, gate.
    fn wide(self) -> Self {
        match self {
            Self::Float8E4m3(_) => Self::Bfloat16,
            other => other,
        }
    }

    /// Bytes of one cached value.
    pub fn kv_bytes(self) -> u64 {
        match self {
            Self::Float32 => 4,
            Self::Bfloat16 | Self::Float8E4m3(_) => 2,
        }
    }
}

/// What `dtype` means for a model on a device.
///
/// The CPU has no eight-bit path yet, so FP8 files are widened to bfloat16 when they are read.
/// float16 does not fit into bfloat16 without loss and is widened to float32.
pub fn resident_dtype(dtype: Dtype, config: &ModelConfig, device: Device) -> ResidentDtype {
    match (dtype, config.stored_dtype, config.weight_blocks, device) {
        (Dtype::Float32, ..) => ResidentDtype::Float32,
        (Dtype::Bfloat16, ..) => ResidentDtype::Bfloat16,
        (Dtype::Auto, StoredDtype::Float8E4m3, Some(blocks), Device::Nvidia) => {
            ResidentDtype::Float8E4m3(blocks)
        }
        (Dtype::Auto, StoredDtype::Float32 | StoredDtype::Float16, ..) => ResidentDtype::Float32,
        (Dtype::Auto, StoredDtype::Bfloat16 | StoredDtype::Float8E4m3, ..) => {
            ResidentDtype::Bfloat16
        }
    }
}

/// Bytes of weights that the fullest rank holds.
///
/// Split by tensor parallelism: query, key-value and output projections by head (a key-value head is
/// copied where there are more ranks than such heads), MLPs by inner width, embedding and head by
/// vocabulary. Split by expert parallelism: whole routed experts.
/// On every rank: norms, the low-rank down-projections, the gate and its bias. Norms, biases and
/// gates are float32.
/// Pipeline ranks hold whole layers; the fullest one is counted.
pub fn weight_bytes_per_rank(
    config: &ModelConfig,
    dtype: ResidentDtype,
    parallelism: Parallelism,
) -> u64 {
    let tp = u64::from(parallelism.tensor);
    let d = u64::from(config.hidden_size);
    let vocab = u64::from(config.vocab_size);
    let tables = if config.tied_embeddings { 1 } else { 2 };
    let outside = tables * dtype.wide().matrix(vocab.div_ceil(tp), d) + d * 4;
    let layers_here = config.layers.div_ceil(parallelism.pipeline);
    let (mut moe, mut dense) = (config.moe_layers(), config.layers - config.moe_layers());
    // The fullest pipeline rank has as many of the heavier layers as fit into its share.
    let layer_moe = config
        .moe
        .as_ref()
        .map_or(0, |m| moe_bytes(m, d, dtype, parallelism));
    let layer_dense = mlp_bytes(d, u64::from(config.intermediate_size), dtype, tp);
    if layer_moe >= layer_dense {
        moe = moe.min(layers_here);
        dense = layers_here - moe;
    } else {
        dense = dense.min(layers_here);
        moe = layers_here - dense;
    }
    outside
        + u64::from(layers_here) * attention_bytes(config, dtype, parallelism.tensor)
        + u64::from(moe) * layer_moe
        + u64::from(dense) * layer_dense
}

/// Attention of one layer, with the two norms of the residual stream that belong to it.
fn attention_bytes(config: &ModelConfig, dtype: ResidentDtype, tensor: u32) -> u64 {
    let d = u64::from(config.hidden_size);
    2 * d * 4
        + match &config.attention {
            AttentionConfig::Latent(mla) => latent_bytes(mla, d, dtype, tensor.into()),
            AttentionConfig::Grouped(gqa) => grouped_bytes(gqa, d, dtype, tensor),
        }
}

fn grouped_bytes(a: &GqaConfig, d: u64, dtype: ResidentDtype, tensor: u32) -> u64 {
    let width = u64::from(a.head_dim);
    let queries = u64::from(a.heads.div_ceil(tensor)) * width;
    let kv = u64::from(a.kv_heads_per_rank(tensor)) * width;
    let biases = if a.qkv_bias { queries + 2 * kv } else { 0 };
    let norms = if a.qk_norm { 2 * width } else { 0 };
    dtype.matrix(queries, d)
        + 2 * dtype.matrix(kv, d)
        + dtype.matrix(d, queries)
        + (biases + norms) * 4
}

fn latent_bytes(a: &MlaConfig, d: u64, dtype: ResidentDtype, tp: u64) -> u64 {
    let heads = u64::from(a.heads).div_ceil(tp);
    let qk = u64::from(a.qk_head_dim());
    let latent = u64::from(a.kv_lora_rank);
    let query = match a.q_lora_rank.map(u64::from) {
        Some(rank) => dtype.matrix(rank, d) + rank * 4 + dtype.matrix(heads * qk, rank),
        None => dtype.matrix(heads * qk, d),
    };
    let per_head = u64::from(a.qk_nope_head_dim + a.v_head_dim);
    query
        + dtype.matrix(u64::from(a.cached_width()), d)
        + dtype.matrix(heads * per_head, latent)
        + dtype.matrix(d, heads * u64::from(a.v_head_dim))
        + latent * 4
}

fn mlp_bytes(d: u64, inner: u64, dtype: ResidentDtype, tp: u64) -> u64 {
    let inner = inner.div_ceil(tp);
    2 * dtype.matrix(inner, d) + dtype.matrix(d, inner)
}

fn moe_bytes(moe: &MoeConfig, d: u64, dtype: ResidentDtype, parallelism: Parallelism) -> u64 {
    let routed = u64::from(moe.routed_experts);
    let inner = u64::from(moe.intermediate_size);
    let tp = u64::from(parallelism.tensor);
    let ep = u64::from(parallelism.expert);
    // With expert parallelism an expert is whole on its rank; without, it is split like an MLP.
    let experts = if ep > 1 {
        routed.div_ceil(ep) * mlp_bytes(d, inner, dtype, 1)
    } else {
        routed * mlp_bytes(d, inner, dtype, tp)
    };
    let shared = match u64::from(moe.shared_experts) {
        0 => 0,
        n => mlp_bytes(d, inner * n, dtype, tp),
    };
    let bias = match moe.selection {
        GateSelection::BiasedGroups => routed * 4,
        GateSelection::Greedy | GateSelection::GroupLimitedGreedy => 0,
    };
    experts + shared + routed * d * 4 + bias
}
