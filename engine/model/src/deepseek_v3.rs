//! DeepSeek-V2, V2-Lite, V3, R1, V3.1 and checkpoints of their shape.
//!
//! One file serves both architectures: they differ in what the config says (low-rank or full query, gate scoring and
//! selection, shared experts), and in one rule that it does not say, see [`gate`].

use engine_spec::{
    Architecture, GateSelection, MlaConfig, ModelConfig, MoeConfig, Rank, RopeScaling,
};

use crate::decoder::{self, Drafting, gated_mlp, norm};
use crate::gate::Gate;
use crate::layers::{Attention, KvLayout, LatentAttention, Mlp, Model, Moe, Query};
use crate::tensors::{TensorList, TensorRole, WeightId};

/// Epsilon of the norms inside attention: the published code builds them with its norm's default, whatever
/// `rms_norm_eps` says.
const LATENT_NORM_EPSILON: f32 = 1e-6;

/// The graph and tensors of `config`, whose attention is `shape`.
pub(crate) fn build(
    config: &ModelConfig,
    shape: &MlaConfig,
    drafting: Drafting,
    rank: Rank,
) -> Model {
    let drafting = match config.can_predict() {
        true => drafting,
        false => Drafting::Off,
    };
    let model = decoder::build(
        config,
        |prefix, tensors| {
            let attention = attention(config, shape, prefix, tensors);
            let kv = KvLayout::Latent {
                latent: attention.latent,
                rope: attention.rope,
            };
            (Attention::Latent(attention), kv)
        },
        |layer, prefix, tensors| match config.moe.as_ref().filter(|_| config.is_moe_layer(layer)) {
            Some(moe) => Mlp::Moe(experts(config, moe, prefix, tensors)),
            None => {
                let inner = config.intermediate_size;
                Mlp::Dense(gated_mlp(prefix, config.hidden_size, inner, tensors))
            }
        },
        drafting,
        rank,
    );
    let has_bias = config
        .moe
        .as_ref()
        .is_some_and(|moe| moe.selection == GateSelection::BiasedGroups);
    let mut forbidden_suffixes = Vec::new();
    if !has_bias {
        forbidden_suffixes.push((".e_score_correction_bias".into(), "topk_method"));
    }
    if shape.q_lora_rank.is_none() {
        forbidden_suffixes.push((".self_attn.q_a_proj.weight".into(), "q_lora_rank"));
    }
    Model {
        // Prediction layers follow the decoder's in the files, whether or not the config counts them.
        unused_prefixes: (u32::from(model.prediction.is_some())..config.mtp_layers.max(1))
            .map(|extra| format!("model.layers.{}.", config.layers + extra))
            .collect(),
        forbidden_suffixes,
        ..model
    }
}

fn attention(
    config: &ModelConfig,
    shape: &MlaConfig,
    prefix: &str,
    tensors: &mut TensorList,
) -> LatentAttention {
    let hidden = config.hidden_size;
    let held = tensors.rank.share(shape.heads as usize);
    // The rows of the rank's heads.
    let of_heads = |tensors: &mut TensorList, name: &str, width: u32, input: u32| {
        let rows = held.start * width as usize..held.end * width as usize;
        let shape = [shape.heads * width, input];
        tensors.add_rows(
            format!("{prefix}{name}.weight"),
            &shape,
            TensorRole::Matrix,
            rows,
        )
    };
    let query = match shape.q_lora_rank {
        None => Query::Full(of_heads(tensors, "q_proj", shape.qk_head_dim(), hidden)),
        Some(rank) => Query::LowRank {
            down: tensors.matrix(format!("{prefix}q_a_proj.weight"), rank, hidden),
            norm: norm(
                tensors,
                &format!("{prefix}q_a_layernorm"),
                rank,
                LATENT_NORM_EPSILON,
            ),
            up: of_heads(tensors, "q_b_proj", shape.qk_head_dim(), rank),
            rank: rank as usize,
        },
    };
    let latent = shape.kv_lora_rank;
    let per_head = shape.qk_nope_head_dim + shape.v_head_dim;
    let correction = config
        .rope_scaling
        .as_ref()
        .map_or(1.0, RopeScaling::softmax_multiplier);
    LatentAttention {
        query,
        kv_down: tensors.matrix(
            format!("{prefix}kv_a_proj_with_mqa.weight"),
            shape.cached_width(),
            hidden,
        ),
        kv_norm: norm(
            tensors,
            &format!("{prefix}kv_a_layernorm"),
            latent,
            LATENT_NORM_EPSILON,
        ),
        kv_up: of_heads(tensors, "kv_b_proj", per_head, latent),
        output: tensors.split_matrix(
            format!("{prefix}o_proj.weight"),
            hidden,
            shape.heads * shape.v_head_dim,
        ),
        heads: held.len(),
        first_head: held.start,
        all_heads: shape.heads as usize,
        nope: shape.qk_nope_head_dim as usize,
        rope: shape.qk_rope_head_dim as usize,
        value: shape.v_head_dim as usize,
        latent: latent as usize,
        scale: (f64::from(shape.qk_head_dim()).powf(-0.5) * correction) as f32,
    }
}

fn experts(config: &ModelConfig, moe: &MoeConfig, prefix: &str, tensors: &mut TensorList) -> Moe {
    let hidden = config.hidden_size;
    let weight = tensors.add(
        format!("{prefix}gate.weight"),
        &[moe.routed_experts, hidden],
        TensorRole::Precise,
    );
    let bias = (moe.selection == GateSelection::BiasedGroups).then(|| {
        tensors.add(
            format!("{prefix}gate.e_score_correction_bias"),
            &[moe.routed_experts],
            TensorRole::Precise,
        )
    });
    let (first_expert, experts) = decoder::experts(
        prefix,
        moe.routed_experts,
        hidden,
        moe.intermediate_size,
        tensors,
    );
    let shared = (moe.shared_experts > 0).then(|| {
        let inner = moe.intermediate_size * moe.shared_experts;
        gated_mlp(&format!("{prefix}shared_experts."), hidden, inner, tensors)
    });
    Moe {
        gate: gate(config.architecture, moe, weight, bias),
        experts,
        first_expert,
        shared,
    }
}

/// V3 normalises the chosen weights and scales them; V2's published code does one or the other.
fn gate(
    architecture: Architecture,
    moe: &MoeConfig,
    weight: WeightId,
    bias: Option<WeightId>,
) -> Gate {
    let normalise = moe.normalise_weights
        && (architecture == Architecture::DeepseekV3 || moe.experts_per_token > 1);
    let scale = match architecture {
        Architecture::DeepseekV2 if normalise => 1.0,
        _ => moe.routed_scaling as f32,
    };
    Gate {
        weight,
        bias,
        experts: moe.routed_experts as usize,
        top_k: moe.experts_per_token as usize,
        scoring: moe.scoring,
        selection: moe.selection,
        groups: moe.groups as usize,
        groups_per_token: moe.groups_per_token as usize,
        normalise,
        scale,
    }
}
