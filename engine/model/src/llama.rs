//! Llama, Qwen2 and Qwen3: grouped-query attention and a dense MLP in every layer.
//!
//! One file serves all three: they are one shape with two options, biases on query, key and value (Qwen2) and norms of
//! each head's query and key (Qwen3). Attention and the tensors that contradict the options are shared with
//! [`crate::qwen3_moe`].

use std::ops::Range;

use engine_spec::{GqaConfig, ModelConfig, Rank};

use crate::decoder::{self, Drafting, gated_mlp, norm};
use crate::layers::{Attention, GroupedAttention, HeadNorms, KvLayout, Mlp, Model, Projection};
use crate::tensors::{TensorList, TensorRole};

/// The graph and tensors of `config`, whose attention is `shape`.
pub(crate) fn build(config: &ModelConfig, shape: &GqaConfig, rank: Rank) -> Model {
    let model = decoder::build(
        config,
        |prefix, tensors| attention(config, shape, prefix, tensors),
        |_, prefix, tensors| {
            let inner = config.intermediate_size;
            Mlp::Dense(gated_mlp(prefix, config.hidden_size, inner, tensors))
        },
        Drafting::Off,
        rank,
    );
    Model {
        forbidden_suffixes: contradictions(shape),
        ..model
    }
}

/// Attention of a layer, and what it caches.
pub(crate) fn attention(
    config: &ModelConfig,
    shape: &GqaConfig,
    prefix: &str,
    tensors: &mut TensorList,
) -> (Attention, KvLayout) {
    let hidden = config.hidden_size;
    let (heads, kv_heads, width) = (shape.heads, shape.kv_heads, shape.head_dim);
    let held = tensors.rank.share(heads as usize);
    let held_kv = kv_share(shape, &held);
    let mut projection = |name: &str, heads: u32, held: &Range<usize>| {
        let rows = held.start * width as usize..held.end * width as usize;
        let mut add = |part: &str, shape: &[u32], role| {
            tensors.add_rows(format!("{prefix}{name}.{part}"), shape, role, rows.clone())
        };
        Projection {
            weight: add("weight", &[heads * width, hidden], TensorRole::Matrix),
            bias: shape
                .qkv_bias
                .then(|| add("bias", &[heads * width], TensorRole::Precise)),
        }
    };
    let query = projection("q_proj", heads, &held);
    let key = projection("k_proj", kv_heads, &held_kv);
    let value = projection("v_proj", kv_heads, &held_kv);
    let mut head_norm = |name: &str| {
        let epsilon = config.rms_norm_eps as f32;
        norm(tensors, &format!("{prefix}{name}"), width, epsilon)
    };
    let head_norms = shape.qk_norm.then(|| HeadNorms {
        query: head_norm("q_norm"),
        key: head_norm("k_norm"),
    });
    let attention = GroupedAttention {
        query,
        key,
        value,
        head_norms,
        output: tensors.split_matrix(format!("{prefix}o_proj.weight"), hidden, heads * width),
        heads: held.len(),
        first_head: held.start,
        all_heads: heads as usize,
        kv_heads: held_kv.len(),
        width: width as usize,
        scale: f64::from(width).powf(-0.5) as f32,
    };
    let kv = KvLayout::KeyValue {
        heads: attention.kv_heads,
        width: attention.width,
    };
    (Attention::Grouped(attention), kv)
}

/// The key-value heads that the query heads `held` attend with: a rank's share, or one that several ranks hold.
fn kv_share(shape: &GqaConfig, held: &Range<usize>) -> Range<usize> {
    let group = (shape.heads / shape.kv_heads.max(1)).max(1) as usize;
    held.start / group..held.end.div_ceil(group)
}

/// Suffixes of tensors that a model with other options would have.
pub(crate) fn contradictions(shape: &GqaConfig) -> Vec<(String, &'static str)> {
    let mut found: Vec<(&str, &str)> = vec![
        (".self_attn.o_proj.bias", "attention_bias"),
        (".mlp.gate_proj.bias", "mlp_bias"),
        (".mlp.up_proj.bias", "mlp_bias"),
        (".mlp.down_proj.bias", "mlp_bias"),
    ];
    if !shape.qkv_bias {
        found.extend(
            [".q_proj.bias", ".k_proj.bias", ".v_proj.bias"].map(|bias| (bias, "model_type")),
        );
    }
    if !shape.qk_norm {
        found.extend(
            [".self_attn.q_norm.weight", ".self_attn.k_norm.weight"]
                .map(|norm| (norm, "model_type")),
        );
    }
    found
        .into_iter()
        .map(|(suffix, field)| (suffix.to_owned(), field))
        .collect()
}
