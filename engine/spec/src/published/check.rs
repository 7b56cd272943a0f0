//! Rules that every config has to keep, whatever its family.

use crate::model_config::{
    Architecture, AttentionConfig, ConfigError, GateSelection, ModelConfig, MoeConfig, RopeScaling,
};

/// Upper bounds that keep every product of sizes within `u64` and refuse absurd files early.
pub(super) const SIZE_MAX: u32 = 1 << 20;
const VOCAB_MAX: u32 = 1 << 24;
const LAYERS_MAX: u32 = 1024;
const POSITIONS_MAX: u32 = 1 << 24;
const HEADS_MAX: u32 = 4096;
const HEAD_WIDTH_MAX: u32 = 4096;
/// Experts of one token; published models use up to 22.
const CHOSEN_EXPERTS_MAX: u32 = 1024;
/// Parameters of all routed experts: a thousand times the largest published model's.
const ROUTED_PARAMETERS_MAX: u128 = 1 << 50;
/// Keeps a model's facts within a pod's termination message.
const DENSE_LAYERS_MAX: usize = 256;

/// Checks what no reader of a family has checked yet.
pub(super) fn check(c: &ModelConfig) -> Result<(), ConfigError> {
    within("vocab_size", c.vocab_size, VOCAB_MAX)?;
    within("hidden_size", c.hidden_size, SIZE_MAX)?;
    within("intermediate_size", c.intermediate_size, SIZE_MAX)?;
    within("num_hidden_layers", c.layers, LAYERS_MAX)?;
    within("max_position_embeddings", c.max_positions, POSITIONS_MAX)?;
    check_attention(&c.attention)?;
    if c.mtp_layers > 16 {
        return Err(ConfigError::invalid(
            "num_nextn_predict_layers",
            c.mtp_layers,
            "at most 16",
        ));
    }
    positive("rms_norm_eps", c.rms_norm_eps)?;
    positive("rope_theta", c.rope_theta)?;
    check_rope(c)?;
    check_tokens(c)?;
    c.moe.as_ref().map_or(Ok(()), |moe| check_moe(c, moe))
}

fn within(field: &'static str, value: u32, max: u32) -> Result<(), ConfigError> {
    range(field, value, 1, max)
}

fn range(field: &'static str, value: u32, min: u32, max: u32) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    let expected = format!("must be between {min} and {max}");
    Err(ConfigError::invalid(field, value, expected))
}

/// A width that is rotated in pairs.
fn even(field: &'static str, value: u32) -> Result<(), ConfigError> {
    if value.is_multiple_of(2) {
        return Ok(());
    }
    let expected = "must be even: it is rotated in pairs";
    Err(ConfigError::invalid(field, value, expected))
}

/// The width of all heads together.
fn joined(heads: u32, width: u32) -> Result<(), ConfigError> {
    if heads * width <= SIZE_MAX {
        return Ok(());
    }
    let expected = format!(
        "heads of width {width} must be at most {} in number",
        SIZE_MAX / width
    );
    Err(ConfigError::invalid("num_attention_heads", heads, expected))
}

fn check_attention(attention: &AttentionConfig) -> Result<(), ConfigError> {
    within("num_attention_heads", attention.heads(), HEADS_MAX)?;
    match attention {
        AttentionConfig::Latent(mla) => {
            if let Some(rank) = mla.q_lora_rank {
                within("q_lora_rank", rank, SIZE_MAX)?;
            }
            within("kv_lora_rank", mla.kv_lora_rank, SIZE_MAX)?;
            within("qk_nope_head_dim", mla.qk_nope_head_dim, HEAD_WIDTH_MAX)?;
            within("qk_rope_head_dim", mla.qk_rope_head_dim, HEAD_WIDTH_MAX)?;
            within("v_head_dim", mla.v_head_dim, HEAD_WIDTH_MAX)?;
            even("qk_rope_head_dim", mla.qk_rope_head_dim)?;
            joined(mla.heads, mla.qk_head_dim().max(mla.v_head_dim))
        }
        AttentionConfig::Grouped(gqa) => {
            within("num_key_value_heads", gqa.kv_heads, HEADS_MAX)?;
            within("head_dim", gqa.head_dim, HEAD_WIDTH_MAX)?;
            even("head_dim", gqa.head_dim)?;
            joined(gqa.heads, gqa.head_dim)?;
            if gqa.heads.is_multiple_of(gqa.kv_heads) {
                return Ok(());
            }
            let expected = format!("must divide num_attention_heads ({})", gqa.heads);
            Err(ConfigError::invalid(
                "num_key_value_heads",
                gqa.kv_heads,
                expected,
            ))
        }
    }
}

fn positive(field: &'static str, value: f64) -> Result<(), ConfigError> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(ConfigError::invalid(
        field,
        value,
        "must be a positive number",
    ))
}

fn check_rope(c: &ModelConfig) -> Result<(), ConfigError> {
    let original_max_position = match &c.rope_scaling {
        None => return Ok(()),
        Some(RopeScaling::Yarn(yarn)) => {
            positive("rope_scaling.factor", yarn.factor)?;
            positive("rope_scaling.beta_fast", yarn.beta_fast)?;
            positive("rope_scaling.beta_slow", yarn.beta_slow)?;
            yarn.original_max_position
        }
        Some(RopeScaling::Llama3 {
            factor,
            low_frequency_factor,
            high_frequency_factor,
            original_max_position,
        }) => {
            positive("rope_scaling.factor", *factor)?;
            positive("rope_scaling.low_freq_factor", *low_frequency_factor)?;
            positive("rope_scaling.high_freq_factor", *high_frequency_factor)?;
            if high_frequency_factor <= low_frequency_factor {
                return Err(ConfigError::invalid(
                    "rope_scaling.high_freq_factor",
                    high_frequency_factor,
                    format!("must be above low_freq_factor ({low_frequency_factor})"),
                ));
            }
            *original_max_position
        }
    };
    if original_max_position == 0 {
        return Err(ConfigError::invalid(
            "rope_scaling.original_max_position_embeddings",
            0,
            "must be positive",
        ));
    }
    Ok(())
}

fn check_tokens(c: &ModelConfig) -> Result<(), ConfigError> {
    let fields = [("bos_token_id", c.bos_token)]
        .into_iter()
        .chain(c.eos_tokens.iter().map(|t| ("eos_token_id", Some(*t))));
    for (field, token) in fields {
        if let Some(token) = token.filter(|t| *t >= c.vocab_size) {
            return Err(ConfigError::invalid(
                field,
                token,
                format!("must be below vocab_size ({})", c.vocab_size),
            ));
        }
    }
    Ok(())
}

fn check_moe(c: &ModelConfig, moe: &MoeConfig) -> Result<(), ConfigError> {
    let [experts, frequency] = match c.architecture {
        Architecture::Qwen3Moe => ["num_experts", "decoder_sparse_step"],
        _ => ["n_routed_experts", "moe_layer_freq"],
    };
    range(experts, moe.routed_experts, 1, 65_536)?;
    range("n_shared_experts", moe.shared_experts, 0, 64)?;
    range(
        "num_experts_per_tok",
        moe.experts_per_token,
        1,
        moe.routed_experts.min(CHOSEN_EXPERTS_MAX),
    )?;
    range("moe_intermediate_size", moe.intermediate_size, 1, SIZE_MAX)?;
    let routed: u128 = [
        c.layers,
        moe.routed_experts,
        3,
        c.hidden_size,
        moe.intermediate_size,
    ]
    .into_iter()
    .map(u128::from)
    .product();
    if routed > ROUTED_PARAMETERS_MAX {
        return Err(ConfigError::invalid(
            experts,
            moe.routed_experts,
            format!(
                "the experts would have {routed} parameters; at most {ROUTED_PARAMETERS_MAX} are served"
            ),
        ));
    }
    range(frequency, moe.layer_frequency, 1, LAYERS_MAX)?;
    if moe.dense_layers.len() > DENSE_LAYERS_MAX {
        return Err(ConfigError::invalid(
            "mlp_only_layers",
            format!("{} layers", moe.dense_layers.len()),
            format!("must be at most {DENSE_LAYERS_MAX}"),
        ));
    }
    if let Some(layer) = moe.dense_layers.iter().find(|layer| **layer >= c.layers) {
        return Err(ConfigError::invalid(
            "mlp_only_layers",
            layer,
            format!("must be below num_hidden_layers ({})", c.layers),
        ));
    }
    range("n_group", moe.groups, 1, moe.routed_experts)?;
    range("topk_group", moe.groups_per_token, 1, moe.groups)?;
    if !moe.routed_experts.is_multiple_of(moe.groups) {
        return Err(ConfigError::invalid(
            "n_group",
            moe.groups,
            format!("must divide n_routed_experts ({})", moe.routed_experts),
        ));
    }
    let reachable = moe.routed_experts / moe.groups * moe.groups_per_token;
    if moe.selection != GateSelection::Greedy && moe.experts_per_token > reachable {
        return Err(ConfigError::invalid(
            "num_experts_per_tok",
            moe.experts_per_token,
            format!("topk_group leaves only {reachable} experts to choose from"),
        ));
    }
    positive("routed_scaling_factor", moe.routed_scaling)
}
