//! What the GPU holds beside weights and cache: the buffers that its backend cuts out of one allocation.
//!
//! Activations are bfloat16, what decides or sums (gate scores, attention parts, logits) is float32.

use engine_spec::{AttentionConfig, ModelConfig, Parallelism, Rank};
use serde::{Deserialize, Serialize};

use crate::weights::ResidentDtype;
use crate::workspace::attention;

/// Positions that one part of a decoded context has (the kernels' fixed split).
const SPLIT_TOKENS: u64 = 512;
/// Room for the parts of attention: with more rows than fit, a step attends to them in turns.
const PARTS_BYTES_MAX: u64 = 256 << 20;
/// Columns that share a scale when activations are fp8.
const QUANT_GROUP: u64 = 128;
/// Rows of the smallest tile of the experts' product.
const TILE_ROWS: u64 = 16;

/// Room for the packed columns of all ranks: with more rows than fit, they are exchanged in turns.
pub const EXCHANGE_BYTES: u64 = 32 << 20;

/// Rows that are sampled at once.
pub const PICK_ROWS_MAX: u32 = 64;
/// Contexts whose tokens, for penalties, are on the device at once.
pub const PICK_CONTEXTS: u32 = 4;
/// Best tokens whose log-probabilities are reported; OpenAI's limit.
pub const PICK_TOP_MAX: u32 = 20;

/// Bytes of each group of buffers of one GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceWorkspace {
    /// Residual, normed input, attention output, MLP output: four of tokens x hidden. With drafts also what the prediction
    /// layer goes on from, and the two halves of its input: three more.
    pub hidden: u64,
    /// Low-rank query, queries, latent queries, latent outputs, values, new cache rows.
    pub attention: u64,
    /// Parts of split contexts and their logarithms: all rows of a step, or at most 256 MiB, but no less than one row.
    pub parts: u64,
    /// Gate scores and choices, the sorted rows, and what the widest MLP or the chosen experts compute.
    pub mlp: u64,
    /// Activations in fp8 with their scales; none when weights are wider.
    pub quantised: u64,
    /// The rows that want logits, and the logits: one per sequence, and one for each of its drafts.
    pub logits: u64,
    /// What sampling takes: adjusted logits and counts of the rows of a turn, their settings, histories, masks and results.
    pub picks: u64,
    /// Tokens, positions, lengths, slots, wanted rows, block tables (a draft is a row with a table); with drafts also the
    /// rows that the prediction layer goes on from.
    pub inputs: u64,
    /// Sine and cosine of every position.
    pub rotary: u64,
    /// What ranks send each other, packed; none where there is one.
    pub exchange: u64,
}

/// Sizes that a step is bounded by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepBounds {
    /// Positions of a sequence.
    pub max_model_len: u32,
    /// Sequences of a step.
    pub max_num_seqs: u32,
    /// Tokens of a step.
    pub max_num_batched_tokens: u32,
    /// Positions per block.
    pub block_size: u32,
    /// Drafts of a sequence; 0 leaves the prediction layer out.
    pub draft_tokens: u32,
}

impl DeviceWorkspace {
    /// Total size.
    pub fn bytes(&self) -> u64 {
        let Self {
            hidden,
            attention,
            parts,
            mlp,
            quantised,
            logits,
            picks,
            inputs,
            rotary,
            exchange,
        } = self;
        let step = hidden + attention + parts + mlp + quantised + logits + picks + inputs;
        step + rotary + exchange
    }
}

/// Buffers on the GPU for steps within `bounds`.
pub fn device_workspace(
    config: &ModelConfig,
    dtype: ResidentDtype,
    parallelism: Parallelism,
    bounds: StepBounds,
) -> DeviceWorkspace {
    let tokens = u64::from(bounds.max_num_batched_tokens);
    let drafting = bounds.draft_tokens > 0;
    // Rows that are sampled, each with a block table.
    let sampled = u64::from(bounds.max_num_seqs) * u64::from(1 + bounds.draft_tokens);
    let positions = u64::from(bounds.max_model_len);
    let blocks = positions.div_ceil(u64::from(bounds.block_size));
    let d = u64::from(config.hidden_size);
    let all = u64::from(config.attention.heads());
    let heads = u64::from(config.attention.heads().div_ceil(parallelism.tensor));
    // A part per split and head, and its logarithm; what goes into the output projection; the low-rank query.
    let (part, values, rank) = match &config.attention {
        AttentionConfig::Latent(a) => (
            u64::from(a.kv_lora_rank) + 1,
            all * u64::from(a.v_head_dim),
            u64::from(a.q_lora_rank.unwrap_or(0)),
        ),
        AttentionConfig::Grouped(a) => {
            let width = u64::from(a.head_dim);
            (width + 1, all * width, 0)
        }
    };
    let per_row = positions.div_ceil(SPLIT_TOKENS) * heads * part * 4;
    let mlp = Inner::of(config, parallelism.tensor);
    let quantised = match dtype {
        ResidentDtype::Float8E4m3(_) => {
            let widest = d.max(rank).max(values);
            tokens * (widest + 4 * widest.div_ceil(QUANT_GROUP)) + tokens * mlp.scales * 4
        }
        ResidentDtype::Bfloat16 | ResidentDtype::Float32 | ResidentDtype::Integer(..) => 0,
    };
    DeviceWorkspace {
        hidden: if drafting { 7 } else { 4 } * tokens * d * 2,
        attention: tokens * attention(&config.attention, parallelism.tensor) * 2,
        parts: (tokens * per_row).min(PARTS_BYTES_MAX).max(per_row),
        mlp: tokens * mlp.per_token + mlp.tables(tokens),
        quantised,
        logits: sampled * (u64::from(config.vocab_size) * 4 + d * 2),
        picks: picks(u64::from(config.vocab_size), sampled, positions),
        inputs: tokens * (3 * 4 + 8 + 4 * u64::from(drafting)) + sampled * 4 * (1 + blocks),
        rotary: positions * u64::from(config.attention.rotated_width()) * 4,
        exchange: u64::from(parallelism.ranks() > 1) * EXCHANGE_BYTES,
    }
}

/// Sampling in turns: by row adjusted logits, counts and a bit for each token, six numbers, top-k, seed, choice and
/// position, borders of history and bias, results; histories and biases of the turn.
fn picks(vocabulary: u64, sampled: u64, positions: u64) -> u64 {
    let rows = sampled.min(PICK_ROWS_MAX.into());
    let row = 8 * vocabulary
        + 4 * vocabulary.div_ceil(32)
        + 6 * 4
        + 4
        + 3 * 8
        + 3 * 4
        + 3 * 4
        + u64::from(PICK_TOP_MAX) * 8;
    rows * row + u64::from(PICK_CONTEXTS) * positions * 4 + 8 * vocabulary + 8
}

/// Inner sizes of MLPs and experts.
struct Inner {
    /// Bytes of a token in the widest MLP or in all its experts.
    per_token: u64,
    /// Scales of a token's products in fp8.
    scales: u64,
    experts: u64,
    top_k: u64,
}

impl Inner {
    fn of(config: &ModelConfig, tensor: u32) -> Self {
        let d = u64::from(config.hidden_size);
        let has_dense = config.moe_layers() < config.layers;
        let dense = u64::from(has_dense) * u64::from(config.intermediate_size);
        let held = |inner: u64| Rank::rows_max(inner, tensor);
        let Some(moe) = &config.moe else {
            return Self {
                per_token: (2 * held(dense) + dense) * 2,
                scales: dense.div_ceil(QUANT_GROUP),
                experts: 0,
                top_k: 0,
            };
        };
        let (experts, top_k) = (
            u64::from(moe.routed_experts),
            u64::from(moe.experts_per_token),
        );
        let routed = u64::from(moe.intermediate_size);
        let shared = routed * u64::from(moe.shared_experts);
        let shared_out = if moe.shared_experts > 0 { d } else { 0 };
        // Gate and up of what the rank computes, the product of all ranks, the output; a dense layer or the shared expert
        // uses the same rows in its turn. All experts that a token chose may be on one rank.
        let gate_up = 2 * (top_k * routed).max(held(dense)).max(held(shared));
        let product = (top_k * routed).max(dense).max(shared);
        let per_token = (gate_up + product + top_k * d + shared_out) * 2;
        // Scores; choice, weight, sorted row and its inverse for each chosen expert.
        let tables = experts * 4 + top_k * 4 * 4;
        Self {
            per_token: per_token + tables,
            scales: (top_k * routed.div_ceil(QUANT_GROUP))
                .max(dense.div_ceil(QUANT_GROUP))
                .max(shared.div_ceil(QUANT_GROUP)),
            experts,
            top_k,
        }
    }

    /// First rows of experts, and the tiles of the experts' product.
    fn tables(&self, tokens: u64) -> u64 {
        if self.experts == 0 {
            return 0;
        }
        let tiles = tokens * self.top_k / TILE_ROWS + self.experts;
        (self.experts + 1) * 4 + tiles * 8
    }
}
