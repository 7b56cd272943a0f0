//! Bytes of activations, in the buffers a backend allocates once and then reuses for every step.

use engine_spec::{AttentionConfig, ModelConfig, Parallelism, Rank};
use serde::{Deserialize, Serialize};

/// Elements of every buffer, all float32. A backend allocates exactly these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Workspace {
    /// Residual, normed input, attention output, MLP output: four of tokens x hidden. With drafts also what the
    /// prediction layer goes on from, and the two halves of its input: three more.
    pub hidden: u64,
    /// Low-rank query, queries, latent queries, latent outputs, values, new cache rows; or queries, new
    /// keys and values, outputs of all heads.
    pub attention: u64,
    /// Gate scores, and gate, up and product rows of the widest MLP or of the chosen experts.
    pub mlp: u64,
    /// Logits rows: one per sequence, and one for each of its drafts.
    pub logits: u64,
}

impl Workspace {
    /// Total size in bytes.
    pub fn bytes(&self) -> u64 {
        let Self {
            hidden,
            attention,
            mlp,
            logits,
        } = self;
        (hidden + attention + mlp + logits) * 4
    }
}

/// Buffers on the CPU for steps of at most `max_num_batched_tokens` tokens and `max_num_seqs` sequences with `draft_tokens` drafts
/// each.
pub fn workspace(
    config: &ModelConfig,
    parallelism: Parallelism,
    max_num_seqs: u32,
    max_num_batched_tokens: u32,
    draft_tokens: u32,
) -> Workspace {
    let tokens = u64::from(max_num_batched_tokens);
    let d = u64::from(config.hidden_size);
    let (mut layers, mut moe_layers) = (config.layers, config.moe_layers());
    if draft_tokens > 0 {
        moe_layers += u32::from(config.is_moe_layer(layers));
        layers += 1;
    }
    let streams = if draft_tokens > 0 { 7 } else { 4 };
    // Gate and up rows are the rank's, product rows those of all ranks.
    let mlp = |inner: u32| {
        let inner = u64::from(inner);
        2 * Rank::rows_max(inner, parallelism.tensor) + inner
    };
    let dense = match layers - moe_layers {
        0 => 0,
        _ => mlp(config.intermediate_size),
    };
    let moe = config
        .moe
        .as_ref()
        .filter(|_| moe_layers > 0)
        .map_or(0, |moe| {
            // All experts that a token chose may be on one rank.
            let routed = 3 * u64::from(moe.experts_per_token) * u64::from(moe.intermediate_size);
            let shared = mlp(moe.intermediate_size * moe.shared_experts);
            let rows = u64::from(moe.experts_per_token + moe.shared_experts);
            u64::from(moe.routed_experts) + routed + shared + rows * d
        });
    Workspace {
        hidden: streams * tokens * d,
        attention: tokens * attention(&config.attention, parallelism.tensor),
        mlp: tokens * dense.max(moe),
        logits: u64::from(max_num_seqs)
            * u64::from(1 + draft_tokens)
            * u64::from(config.vocab_size),
    }
}

/// Values per token between the normed input of attention and its output projection: of the rank's heads, and the outputs
/// of all heads, which a rank gets before they are projected back.
pub(crate) fn attention(attention: &AttentionConfig, tensor: u32) -> u64 {
    let all = u64::from(attention.heads());
    let heads = u64::from(attention.heads().div_ceil(tensor));
    match attention {
        AttentionConfig::Latent(a) => {
            let per_head = u64::from(a.qk_head_dim()) + 2 * u64::from(a.kv_lora_rank);
            u64::from(a.q_lora_rank.unwrap_or(0))
                + heads * per_head
                + all * u64::from(a.v_head_dim)
                + u64::from(a.cached_width())
        }
        AttentionConfig::Grouped(a) => {
            let kv_heads = u64::from(a.kv_heads_per_rank(tensor));
            (heads + all + 2 * kv_heads) * u64::from(a.head_dim)
        }
    }
}
