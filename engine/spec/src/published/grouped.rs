//! Qwen2, Llama, Qwen3 and Qwen3-MoE: grouped-query attention, dense or with experts in some layers.

use super::{Fields, Stored, packing, refuse_biases, rope::rope, stored};
use crate::model_config::{
    Architecture, AttentionConfig, ConfigError, GateScoring, GateSelection, GqaConfig, ModelConfig,
    MoeConfig,
};

/// Fields whose default differs between the families' configuration classes in transformers 5.
struct Defaults {
    vocab_size: u32,
    hidden_size: u32,
    intermediate_size: u32,
    layers: u32,
    /// Absent = as many as query heads.
    kv_heads: Option<u32>,
    /// Absent = the hidden size shared out over the heads.
    head_dim: Option<u32>,
    max_positions: u32,
    bos_token: Option<u32>,
    eos_token: Option<u32>,
}

fn defaults(architecture: Architecture) -> Defaults {
    let qwen = Defaults {
        vocab_size: 151_936,
        hidden_size: 4096,
        intermediate_size: 22_016,
        layers: 32,
        kv_heads: Some(32),
        head_dim: None,
        max_positions: 32_768,
        bos_token: None,
        eos_token: None,
    };
    match architecture {
        Architecture::Llama => Defaults {
            vocab_size: 32_000,
            intermediate_size: 11_008,
            kv_heads: None,
            max_positions: 2048,
            bos_token: Some(1),
            eos_token: Some(2),
            ..qwen
        },
        Architecture::Qwen3 => Defaults {
            head_dim: Some(128),
            ..qwen
        },
        Architecture::Qwen3Moe => Defaults {
            hidden_size: 2048,
            intermediate_size: 6144,
            layers: 24,
            kv_heads: Some(4),
            ..qwen
        },
        _ => qwen,
    }
}

pub(super) fn read(architecture: Architecture, f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let defaults = defaults(architecture);
    // Qwen2's class has no such switch: query, key and value have biases, nothing else has.
    if architecture != Architecture::Qwen2 {
        refuse_biases(f)?;
    }
    let hidden_size = f.size("hidden_size", defaults.hidden_size)?;
    let layers = f.size("num_hidden_layers", defaults.layers)?;
    refuse_windows(architecture, layers, f)?;
    let Stored {
        dtype: stored_dtype,
        blocks: weight_blocks,
        integers,
    } = stored(f)?;
    let (rope_theta, rope_scaling) = rope(f)?;
    Ok(ModelConfig {
        architecture,
        vocab_size: f.size("vocab_size", defaults.vocab_size)?,
        hidden_size,
        intermediate_size: f.size("intermediate_size", defaults.intermediate_size)?,
        layers,
        attention: AttentionConfig::Grouped(attention(architecture, &defaults, hidden_size, f)?),
        moe: match architecture {
            Architecture::Qwen3Moe => moe(f)?,
            _ => None,
        },
        rms_norm_eps: f.number("rms_norm_eps", 1e-6)?,
        rope_theta,
        rope_scaling,
        max_positions: f.size("max_position_embeddings", defaults.max_positions)?,
        tied_embeddings: f.flag("tie_word_embeddings", false)?,
        mtp_layers: 0,
        bos_token: f.optional_size("bos_token_id", defaults.bos_token)?,
        eos_tokens: f.integers("eos_token_id", defaults.eos_token)?,
        stored_dtype,
        weight_blocks,
        integers,
        packed: packing(f)?,
    })
}

fn attention(
    architecture: Architecture,
    defaults: &Defaults,
    hidden_size: u32,
    f: &Fields<'_>,
) -> Result<GqaConfig, ConfigError> {
    let heads = f.size("num_attention_heads", 32)?;
    let head_dim = match f.optional_size("head_dim", defaults.head_dim)? {
        Some(width) => width,
        None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            return Err(ConfigError::invalid(
                "num_attention_heads",
                heads,
                format!("must divide hidden_size ({hidden_size}) where head_dim is not given"),
            ));
        }
    };
    Ok(GqaConfig {
        heads,
        kv_heads: f
            .optional_size("num_key_value_heads", defaults.kv_heads)?
            .unwrap_or(heads),
        head_dim,
        qkv_bias: architecture == Architecture::Qwen2,
        qk_norm: matches!(architecture, Architecture::Qwen3 | Architecture::Qwen3Moe),
    })
}

/// Refuses layers that attend to the latest positions only. The published configs carry a window that
/// is switched off, by `use_sliding_window` or by `max_window_layers` at or above the number of layers.
fn refuse_windows(
    architecture: Architecture,
    layers: u32,
    f: &Fields<'_>,
) -> Result<(), ConfigError> {
    let way_out = "layers with a sliding window are not served; only full attention is";
    if let Some(other) = f
        .texts("layer_types")?
        .into_iter()
        .find(|kind| *kind != "full_attention")
    {
        return Err(ConfigError::invalid("layer_types", other, way_out));
    }
    // Llama's class knows none of these fields.
    let switched_on = architecture != Architecture::Llama && f.flag("use_sliding_window", false)?;
    let window = f.optional_size("sliding_window", Some(4096))?;
    let first = match architecture {
        // Its class knows no such limit: the window then holds for all layers.
        Architecture::Qwen3Moe => 0,
        _ => f.size("max_window_layers", 28)?,
    };
    // A list of layer types says it all, and was read above.
    let listed = f.present("layer_types").is_some();
    match window {
        Some(window) if switched_on && !listed && first < layers => {
            Err(ConfigError::invalid("sliding_window", window, way_out))
        }
        _ => Ok(()),
    }
}

fn moe(f: &Fields<'_>) -> Result<Option<MoeConfig>, ConfigError> {
    // transformers 5 writes its attribute's general name.
    let routed_experts = match f.optional_size("num_local_experts", None)? {
        Some(experts) => experts,
        None => f.size("num_experts", 128)?,
    };
    if routed_experts == 0 {
        return Ok(None);
    }
    let layer_frequency = f.size("decoder_sparse_step", 1)?;
    let mut dense_layers = f.integers("mlp_only_layers", None)?;
    dense_layers.sort_unstable();
    dense_layers.dedup();
    Ok(Some(MoeConfig {
        routed_experts,
        shared_experts: 0,
        experts_per_token: f.size("num_experts_per_tok", 8)?,
        intermediate_size: f.size("moe_intermediate_size", 768)?,
        first_dense_layers: 0,
        layer_frequency,
        // The family counts layers from one.
        layer_remainder: layer_frequency.saturating_sub(1),
        dense_layers,
        scoring: GateScoring::Softmax,
        selection: GateSelection::Greedy,
        groups: 1,
        groups_per_token: 1,
        normalise_weights: f.flag("norm_topk_prob", false)?,
        routed_scaling: 1.0,
    }))
}

#[cfg(test)]
pub(super) mod tests;
