//! Bytes of weights on each rank.

use engine_spec::{
    AttentionConfig, Device, Dtype, GateSelection, GqaConfig, MlaConfig, ModelConfig, MoeConfig,
    Parallelism, Quantization, Rank, StoredDtype, WeightBlocks,
};
use serde::{Deserialize, Serialize};

use crate::integer::{INT4_GROUP, IntegerFormat, IntegerSource, WHOLE_ROW};

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
    /// Integers with float32 scales; what is not quantised is bfloat16.
    Integer(IntegerFormat, IntegerSource),
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
            Self::Integer(format, _) => format.bytes(rows, columns),
        }
    }

    /// How the embedding is kept where it is not the head too: never in eight bits.
    pub fn embedding(self) -> Self {
        match self {
            Self::Float8E4m3(_) | Self::Integer(..) => Self::Bfloat16,
            other => other,
        }
    }

    /// How the head is kept, and the key-value up-projection: on the GPU its batched products have no eight-bit form,
    /// and on the CPU it is split into parts whose rows are not those that a file's scales belong to.
    pub fn head(self) -> Self {
        match self {
            Self::Float8E4m3(_) | Self::Integer(_, IntegerSource::Files) => Self::Bfloat16,
            Self::Integer(_, made) => Self::Integer(IntegerFormat::Int8, made),
            other => other,
        }
    }

    /// Bytes of one cached value.
    pub fn kv_bytes(self) -> u64 {
        match self {
            Self::Float32 => 4,
            Self::Bfloat16 | Self::Float8E4m3(_) | Self::Integer(..) => 2,
        }
    }
}

/// Rows and columns of a block that the GPU's eight-bit products take.
const DEVICE_BLOCK: u32 = 128;
/// Eight-bit values that a GPU loads at once: inner widths are whole multiples.
const DEVICE_VECTOR: u32 = 16;

/// What `dtype` means for a model on a device.
///
/// The CPU has no eight-bit path yet, so FP8 files are widened to bfloat16 when they are read; a GPU does the same with
/// blocks or widths that its products do not take. float16 does not fit into bfloat16 without loss and is widened to
/// float32 on the CPU; the GPU computes in bfloat16 only.
pub fn resident_dtype(
    dtype: Dtype,
    quantization: Quantization,
    config: &ModelConfig,
    device: Device,
) -> ResidentDtype {
    // What was packed decides where nothing is asked for.
    let (dtype, quantization) = match (dtype, quantization, config.packed) {
        (Dtype::Auto, Quantization::None, Some(packed)) => (packed.dtype, packed.quantization),
        asked => (asked.0, asked.1),
    };
    let format = match quantization {
        Quantization::None => None,
        Quantization::Int8 => Some(IntegerFormat::Int8),
        Quantization::Int4 => Some(IntegerFormat::Int4 { group: INT4_GROUP }),
    };
    if let Some(format) = format {
        return ResidentDtype::Integer(format, IntegerSource::Load);
    }
    if let (Some(stored), Dtype::Auto, Device::Cpu) = (config.integers, dtype, device) {
        let format = match stored.bits {
            4 => IntegerFormat::Int4 {
                group: stored.group.unwrap_or(WHOLE_ROW),
            },
            _ => IntegerFormat::Int8,
        };
        return ResidentDtype::Integer(format, IntegerSource::Files);
    }
    match (dtype, config.stored_dtype, config.weight_blocks, device) {
        (Dtype::Float32, ..) => ResidentDtype::Float32,
        (Dtype::Bfloat16, ..) => ResidentDtype::Bfloat16,
        (Dtype::Auto, StoredDtype::Float8E4m3, Some(blocks), Device::Nvidia)
            if eight_bit_products(config, blocks) =>
        {
            ResidentDtype::Float8E4m3(blocks)
        }
        (Dtype::Auto, _, _, Device::Nvidia) => ResidentDtype::Bfloat16,
        (Dtype::Auto, StoredDtype::Float32 | StoredDtype::Float16, ..) => ResidentDtype::Float32,
        (Dtype::Auto, StoredDtype::Bfloat16 | StoredDtype::Float8E4m3, ..) => {
            ResidentDtype::Bfloat16
        }
    }
}

/// Whether every FP8 matrix has the blocks and widths that the GPU multiplies in eight bits. Gate and up of an MLP lie one
/// after the other there, so an inner width must be whole blocks.
fn eight_bit_products(config: &ModelConfig, blocks: WeightBlocks) -> bool {
    let (rank, values) = match &config.attention {
        AttentionConfig::Latent(a) => (a.q_lora_rank, a.heads * a.v_head_dim),
        AttentionConfig::Grouped(a) => (None, a.heads * a.head_dim),
    };
    let inputs = [config.hidden_size, rank.unwrap_or(DEVICE_VECTOR), values];
    let expert = config.moe.as_ref().map_or(0, |moe| moe.intermediate_size);
    blocks.rows == DEVICE_BLOCK
        && blocks.columns == DEVICE_BLOCK
        && inputs.iter().all(|n| n.is_multiple_of(DEVICE_VECTOR))
        && [config.intermediate_size, expert]
            .iter()
            .all(|n| n.is_multiple_of(DEVICE_BLOCK))
}

/// Bytes of a norm's or gate's weight: the GPU multiplies by bfloat16, the CPU by float32.
fn precise_bytes(device: Device) -> u64 {
    match device {
        Device::Cpu => 4,
        Device::Nvidia => 2,
    }
}

/// Bytes of weights that the fullest rank holds.
///
/// Every matrix is split by the rows that it gives: query and key-value projections by head (a key-value head is copied
/// where there are more ranks than such heads), the others as [`Rank::share_rows`] says. Routed experts are whole.
/// On every rank: norms, the low-rank down-projections, the gate and its bias. Norms, biases and
/// gates are float32.
pub fn weight_bytes_per_rank(
    config: &ModelConfig,
    dtype: ResidentDtype,
    device: Device,
    parallelism: Parallelism,
) -> u64 {
    let precise = precise_bytes(device);
    let tensor = parallelism.tensor;
    let d = u64::from(config.hidden_size);
    let vocab = u64::from(config.vocab_size);
    let table = |dtype: ResidentDtype| dtype.matrix(Rank::rows_max(vocab, tensor), d);
    let embedding = match config.tied_embeddings {
        true => 0,
        false => table(dtype.embedding()),
    };
    let outside = embedding + table(dtype.head()) + d * precise;
    let layer_moe = config
        .moe
        .as_ref()
        .map_or(0, |m| moe_bytes(m, d, dtype, device, parallelism));
    let inner = u64::from(config.intermediate_size);
    let layer_dense = mlp_bytes(d, inner, dtype, tensor);
    let moe = config.moe_layers();
    outside
        + u64::from(config.layers) * attention_bytes(config, dtype, device, tensor)
        + u64::from(moe) * layer_moe
        + u64::from(config.layers - moe) * layer_dense
}

/// Bytes of the prediction layer on the fullest rank: a decoder layer, two norms and the matrix that join a token with a
/// hidden state, and the norm before the head. Embedding and head are the model's own.
pub fn prediction_bytes(
    config: &ModelConfig,
    dtype: ResidentDtype,
    device: Device,
    parallelism: Parallelism,
) -> u64 {
    let tensor = parallelism.tensor;
    let d = u64::from(config.hidden_size);
    let mlp = match config
        .moe
        .as_ref()
        .filter(|_| config.is_moe_layer(config.layers))
    {
        Some(moe) => moe_bytes(moe, d, dtype, device, parallelism),
        None => mlp_bytes(d, u64::from(config.intermediate_size), dtype, tensor),
    };
    attention_bytes(config, dtype, device, tensor)
        + mlp
        + dtype.embedding().matrix(Rank::rows_max(d, tensor), 2 * d)
        + 3 * d * precise_bytes(device)
}

/// Attention of one layer, with the two norms of the residual stream that belong to it.
fn attention_bytes(config: &ModelConfig, dtype: ResidentDtype, device: Device, tensor: u32) -> u64 {
    let precise = precise_bytes(device);
    let d = u64::from(config.hidden_size);
    2 * d * precise
        + match &config.attention {
            AttentionConfig::Latent(mla) => latent_bytes(mla, d, dtype, device, tensor),
            AttentionConfig::Grouped(gqa) => grouped_bytes(gqa, d, dtype, device, tensor),
        }
}

fn grouped_bytes(a: &GqaConfig, d: u64, dtype: ResidentDtype, device: Device, tensor: u32) -> u64 {
    let precise = precise_bytes(device);
    let width = u64::from(a.head_dim);
    let queries = u64::from(a.heads.div_ceil(tensor)) * width;
    let kv = u64::from(a.kv_heads_per_rank(tensor)) * width;
    let biases = if a.qkv_bias { queries + 2 * kv } else { 0 };
    let norms = if a.qk_norm { 2 * width } else { 0 };
    dtype.matrix(queries, d)
        + 2 * dtype.matrix(kv, d)
        + dtype.matrix(Rank::rows_max(d, tensor), u64::from(a.heads) * width)
        + (biases + norms) * precise
}

fn latent_bytes(a: &MlaConfig, d: u64, dtype: ResidentDtype, device: Device, tensor: u32) -> u64 {
    let precise = precise_bytes(device);
    let heads = u64::from(a.heads.div_ceil(tensor));
    let qk = u64::from(a.qk_head_dim());
    let latent = u64::from(a.kv_lora_rank);
    let query = match a.q_lora_rank.map(u64::from) {
        Some(rank) => dtype.matrix(rank, d) + rank * precise + dtype.matrix(heads * qk, rank),
        None => dtype.matrix(heads * qk, d),
    };
    // Per head a transposed key part and a value part.
    let (nope, value) = (u64::from(a.qk_nope_head_dim), u64::from(a.v_head_dim));
    let up = heads * (dtype.head().matrix(latent, nope) + dtype.head().matrix(value, latent));
    query
        + dtype.matrix(u64::from(a.cached_width()), d)
        + up
        + dtype.matrix(Rank::rows_max(d, tensor), u64::from(a.heads) * value)
        + latent * precise
}

fn mlp_bytes(d: u64, inner: u64, dtype: ResidentDtype, tensor: u32) -> u64 {
    2 * dtype.matrix(Rank::rows_max(inner, tensor), d)
        + dtype.matrix(Rank::rows_max(d, tensor), inner)
}

fn moe_bytes(
    moe: &MoeConfig,
    d: u64,
    dtype: ResidentDtype,
    device: Device,
    parallelism: Parallelism,
) -> u64 {
    let precise = precise_bytes(device);
    let routed = u64::from(moe.routed_experts);
    let inner = u64::from(moe.intermediate_size);
    let held = routed.div_ceil(u64::from(parallelism.expert));
    let experts = held * mlp_bytes(d, inner, dtype, 1);
    let shared = match u64::from(moe.shared_experts) {
        0 => 0,
        n => mlp_bytes(d, inner * n, dtype, parallelism.tensor),
    };
    let bias = match moe.selection {
        GateSelection::BiasedGroups => routed * 4,
        GateSelection::Greedy | GateSelection::GroupLimitedGreedy => 0,
    };
    experts + shared + routed * d * precise + bias
}
