//! Qwen3 with routed experts: attention of Qwen3, and in most layers a softmax gate over experts, none of them shared.

use engine_spec::{GqaConfig, ModelConfig, MoeConfig, Rank};

use crate::decoder::{self, Drafting, gated_mlp};
use crate::gate::Gate;
use crate::layers::{Mlp, Model, Moe};
use crate::llama::{attention, contradictions};
use crate::tensors::{TensorList, TensorRole};

/// The graph and tensors of `config`, whose attention is `shape` and whose experts are `moe`.
pub(crate) fn build(config: &ModelConfig, shape: &GqaConfig, moe: &MoeConfig, rank: Rank) -> Model {
    let model = decoder::build(
        config,
        |prefix, tensors| attention(config, shape, prefix, tensors),
        |layer, prefix, tensors| {
            if config.is_moe_layer(layer) {
                return Mlp::Moe(experts(config, moe, prefix, tensors));
            }
            let inner = config.intermediate_size;
            Mlp::Dense(gated_mlp(prefix, config.hidden_size, inner, tensors))
        },
        Drafting::Off,
        rank,
    );
    let mut forbidden_suffixes = contradictions(shape);
    // Qwen2-MoE has the same names otherwise.
    for suffix in [
        ".mlp.shared_expert_gate.weight",
        ".mlp.shared_expert.gate_proj.weight",
    ] {
        forbidden_suffixes.push((suffix.into(), "model_type"));
    }
    Model {
        forbidden_suffixes,
        ..model
    }
}

fn experts(config: &ModelConfig, moe: &MoeConfig, prefix: &str, tensors: &mut TensorList) -> Moe {
    let shape = [moe.routed_experts, config.hidden_size];
    let gate = Gate {
        weight: tensors.add(format!("{prefix}gate.weight"), &shape, TensorRole::Precise),
        bias: None,
        experts: moe.routed_experts as usize,
        top_k: moe.experts_per_token as usize,
        scoring: moe.scoring,
        selection: moe.selection,
        groups: moe.groups as usize,
        groups_per_token: moe.groups_per_token as usize,
        normalise: moe.normalise_weights,
        scale: moe.routed_scaling as f32,
    };
    let (first_expert, experts) = decoder::experts(
        prefix,
        moe.routed_experts,
        config.hidden_size,
        moe.intermediate_size,
        tensors,
    );
    Moe {
        gate,
        experts,
        first_expert,
        shared: None,
    }
}
