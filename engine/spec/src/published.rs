//! From the spelling of published `config.json` files to a checked [`ModelConfig`].
//!
//! Two forms exist: the one DeepSeek publishes (`rope_scaling`, `scoring_func`, `topk_method`) and
//! the one transformers 5 writes (`rope_parameters`, and every field absent that equals the
//! family's default in transformers). A field that is absent takes that default; a field that is
//! `null` means "none".

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model_config::{
    Architecture, ConfigError, GateScoring, GateSelection, MlaConfig, ModelConfig, MoeConfig,
    RopeScaling, StoredDtype, WeightBlocks,
};

/// Upper bounds that keep every product of sizes within `u64` and refuse absurd files early.
const SIZE_MAX: u32 = 1 << 20;
const VOCAB_MAX: u32 = 1 << 24;
const LAYERS_MAX: u32 = 1024;
const POSITIONS_MAX: u32 = 1 << 24;

pub(crate) fn parse(text: &str) -> Result<ModelConfig, ConfigError> {
    let value: Value =
        serde_json::from_str(text).map_err(|e| ConfigError::Malformed(e.to_string()))?;
    let Value::Object(fields) = value else {
        return Err(ConfigError::Malformed(
            "the document is not an object".into(),
        ));
    };
    let fields = Fields(&fields);
    let family = match fields.text("model_type")?.as_deref() {
        Some("deepseek_v2") => Family::V2,
        // Kimi-K2 publishes the V3 graph under its own name.
        Some("deepseek_v3" | "kimi_k2") => Family::V3,
        Some(other) => return Err(ConfigError::Unsupported(other.into())),
        None => return Err(ConfigError::Missing("model_type")),
    };
    let config = family.read(&fields)?;
    check(&config)?;
    Ok(config)
}

#[derive(Clone, Copy, PartialEq)]
enum Family {
    V2,
    V3,
}

impl Family {
    /// `v2` or `v3`: the defaults of transformers' configuration classes.
    fn default<T>(self, v2: T, v3: T) -> T {
        match self {
            Self::V2 => v2,
            Self::V3 => v3,
        }
    }

    fn read(self, f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
        let heads = f.size("num_attention_heads", self.default(32, 128))?;
        let kv_heads = f.optional_size("num_key_value_heads", Some(heads))?;
        if kv_heads.is_some_and(|n| n != heads) {
            return Err(ConfigError::invalid(
                "num_key_value_heads",
                kv_heads.unwrap_or_default(),
                format!("latent attention has as many as num_attention_heads ({heads})"),
            ));
        }
        for name in ["attention_bias", "mlp_bias"] {
            if f.flag(name, false)? {
                return Err(ConfigError::invalid(
                    name,
                    true,
                    "biases are not served for this family",
                ));
            }
        }
        if let Some(act) = f.text("hidden_act")?.filter(|act| act != "silu") {
            return Err(ConfigError::invalid(
                "hidden_act",
                act,
                "only silu is served",
            ));
        }
        let (stored_dtype, weight_blocks) = stored(f)?;
        let (rope_theta, rope_scaling) = rope(f)?;
        Ok(ModelConfig {
            architecture: self.default(Architecture::DeepseekV2, Architecture::DeepseekV3),
            vocab_size: f.size("vocab_size", self.default(102_400, 129_280))?,
            hidden_size: f.size("hidden_size", self.default(4096, 7168))?,
            intermediate_size: f.size("intermediate_size", self.default(11_008, 18_432))?,
            layers: f.size("num_hidden_layers", self.default(32, 61))?,
            attention: MlaConfig {
                heads,
                q_lora_rank: f.optional_size("q_lora_rank", Some(1536))?,
                kv_lora_rank: f.size("kv_lora_rank", 512)?,
                qk_nope_head_dim: f.size("qk_nope_head_dim", 128)?,
                qk_rope_head_dim: f.size("qk_rope_head_dim", 64)?,
                v_head_dim: f.size("v_head_dim", 128)?,
            },
            moe: self.moe(f)?,
            rms_norm_eps: f.number("rms_norm_eps", 1e-6)?,
            rope_theta,
            rope_scaling,
            max_positions: f.size("max_position_embeddings", self.default(2048, 4096))?,
            tied_embeddings: f.flag("tie_word_embeddings", false)?,
            // transformers 5 leaves the field out at its default of 1 even for files without such
            // a layer; nothing but an explicit number promises one.
            mtp_layers: f.size("num_nextn_predict_layers", 0)?,
            bos_token: f.optional_size("bos_token_id", Some(self.default(1, 0)))?,
            eos_tokens: f.tokens("eos_token_id", self.default(2, 1))?,
            stored_dtype,
            weight_blocks,
        })
    }

    fn moe(self, f: &Fields<'_>) -> Result<Option<MoeConfig>, ConfigError> {
        let Some(routed_experts) =
            f.optional_size("n_routed_experts", Some(self.default(64, 256)))?
        else {
            return Ok(None);
        };
        let scoring = match f.text("scoring_func")?.as_deref() {
            Some("sigmoid") => GateScoring::Sigmoid,
            Some("softmax") => GateScoring::Softmax,
            None => self.default(GateScoring::Softmax, GateScoring::Sigmoid),
            Some(other) => {
                let way_out = "served are sigmoid and softmax";
                return Err(ConfigError::invalid("scoring_func", other, way_out));
            }
        };
        let selection = match f.text("topk_method")?.as_deref() {
            Some("greedy") => GateSelection::Greedy,
            Some("group_limited_greedy") => GateSelection::GroupLimitedGreedy,
            Some("noaux_tc") => GateSelection::BiasedGroups,
            None => self.default(GateSelection::Greedy, GateSelection::BiasedGroups),
            Some(other) => {
                let way_out = "served are greedy, group_limited_greedy and noaux_tc";
                return Err(ConfigError::invalid("topk_method", other, way_out));
            }
        };
        Ok(Some(MoeConfig {
            routed_experts,
            shared_experts: f
                .optional_size("n_shared_experts", Some(self.default(2, 1)))?
                .unwrap_or(0),
            experts_per_token: f
                .optional_size("num_experts_per_tok", self.default(None, Some(8)))?
                .ok_or(ConfigError::Missing("num_experts_per_tok"))?,
            intermediate_size: f.size("moe_intermediate_size", self.default(1407, 2048))?,
            first_dense_layers: f.size("first_k_dense_replace", self.default(0, 3))?,
            layer_frequency: f.size("moe_layer_freq", 1)?,
            scoring,
            selection,
            groups: f
                .optional_size("n_group", self.default(None, Some(8)))?
                .unwrap_or(1),
            groups_per_token: f
                .optional_size("topk_group", self.default(None, Some(4)))?
                .unwrap_or(1),
            normalise_weights: f.flag("norm_topk_prob", self.default(false, true))?,
            routed_scaling: f.number("routed_scaling_factor", self.default(1.0, 2.5))?,
        }))
    }
}

fn stored(f: &Fields<'_>) -> Result<(StoredDtype, Option<WeightBlocks>), ConfigError> {
    // transformers 5 renamed torch_dtype to dtype.
    let (field, name) = match f.text("torch_dtype")? {
        Some(name) => ("torch_dtype", Some(name)),
        None => ("dtype", f.text("dtype")?),
    };
    let plain = match name.as_deref() {
        Some("bfloat16") | None => StoredDtype::Bfloat16,
        Some("float32") => StoredDtype::Float32,
        Some("float16") => StoredDtype::Float16,
        Some(other) => {
            let way_out = "served are bfloat16, float16 and float32";
            return Err(ConfigError::invalid(field, other, way_out));
        }
    };
    let Some(value) = f.present("quantization_config") else {
        return Ok((plain, None));
    };
    let quantization: Quantization = serde_json::from_value(value.clone())
        .map_err(|e| ConfigError::Malformed(format!("quantization_config: {e}")))?;
    if quantization.quant_method != "fp8" {
        return Err(ConfigError::invalid(
            "quantization_config.quant_method",
            quantization.quant_method,
            "served is fp8 with weight_block_size",
        ));
    }
    let [rows, columns] = quantization.weight_block_size.unwrap_or([128, 128]);
    if !(1..=SIZE_MAX).contains(&rows) || !(1..=SIZE_MAX).contains(&columns) {
        return Err(ConfigError::invalid(
            "quantization_config.weight_block_size",
            format!("[{rows}, {columns}]"),
            "both sizes must be positive",
        ));
    }
    let blocks = WeightBlocks {
        rows,
        columns,
        power_of_two: quantization.scale_fmt.as_deref() == Some("ue8m0"),
    };
    Ok((StoredDtype::Float8E4m3, Some(blocks)))
}

#[derive(Deserialize)]
struct Quantization {
    quant_method: String,
    weight_block_size: Option<[u32; 2]>,
    scale_fmt: Option<String>,
}

#[derive(Default, Deserialize)]
struct Rope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    original_max_position_embeddings: Option<u32>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    attention_factor: Option<f64>,
}

fn rope(f: &Fields<'_>) -> Result<(f64, Option<RopeScaling>), ConfigError> {
    let (field, value) = match f.present("rope_parameters") {
        Some(value) => ("rope_parameters", Some(value)),
        None => ("rope_scaling", f.present("rope_scaling")),
    };
    // A file may carry both spellings of the type; serde would call that a duplicate.
    let value = value.cloned().map(|mut value| {
        if let Value::Object(map) = &mut value
            && map.contains_key("rope_type")
        {
            map.remove("type");
        }
        value
    });
    let rope: Rope = match value {
        Some(value) => serde_json::from_value(value)
            .map_err(|e| ConfigError::Malformed(format!("{field}: {e}")))?,
        None => Rope::default(),
    };
    let theta = match rope.rope_theta {
        Some(theta) => theta,
        None => f.number("rope_theta", 10_000.0)?,
    };
    let scaling = match rope.rope_type.as_deref() {
        None | Some("default") => None,
        Some("yarn") => Some(RopeScaling::Yarn {
            factor: rope
                .factor
                .ok_or(ConfigError::Missing("rope_scaling.factor"))?,
            original_max_position: rope.original_max_position_embeddings.ok_or(
                ConfigError::Missing("rope_scaling.original_max_position_embeddings"),
            )?,
            beta_fast: rope.beta_fast.unwrap_or(32.0),
            beta_slow: rope.beta_slow.unwrap_or(1.0),
            mscale: rope.mscale,
            mscale_all_dim: rope.mscale_all_dim,
            attention_factor: rope.attention_factor,
        }),
        Some(other) => {
            let way_out = "served are yarn and default";
            return Err(ConfigError::invalid("rope_scaling.type", other, way_out));
        }
    };
    Ok((theta, scaling))
}

fn check(c: &ModelConfig) -> Result<(), ConfigError> {
    let within = |field: &'static str, value: u32, max: u32| {
        if value == 0 || value > max {
            return Err(ConfigError::invalid(
                field,
                value,
                format!("must be between 1 and {max}"),
            ));
        }
        Ok(())
    };
    within("vocab_size", c.vocab_size, VOCAB_MAX)?;
    within("hidden_size", c.hidden_size, SIZE_MAX)?;
    within("intermediate_size", c.intermediate_size, SIZE_MAX)?;
    within("num_hidden_layers", c.layers, LAYERS_MAX)?;
    within("max_position_embeddings", c.max_positions, POSITIONS_MAX)?;
    within("num_attention_heads", c.attention.heads, 4096)?;
    if let Some(rank) = c.attention.q_lora_rank {
        within("q_lora_rank", rank, SIZE_MAX)?;
    }
    within("kv_lora_rank", c.attention.kv_lora_rank, SIZE_MAX)?;
    within("qk_nope_head_dim", c.attention.qk_nope_head_dim, 4096)?;
    within("qk_rope_head_dim", c.attention.qk_rope_head_dim, 4096)?;
    within("v_head_dim", c.attention.v_head_dim, 4096)?;
    if !c.attention.qk_rope_head_dim.is_multiple_of(2) {
        return Err(ConfigError::invalid(
            "qk_rope_head_dim",
            c.attention.qk_rope_head_dim,
            "must be even: it is rotated in pairs",
        ));
    }
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
    c.moe.as_ref().map_or(Ok(()), check_moe)
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
    let Some(RopeScaling::Yarn {
        factor,
        original_max_position,
        beta_fast,
        beta_slow,
        ..
    }) = &c.rope_scaling
    else {
        return Ok(());
    };
    positive("rope_scaling.factor", *factor)?;
    positive("rope_scaling.beta_fast", *beta_fast)?;
    positive("rope_scaling.beta_slow", *beta_slow)?;
    if *original_max_position == 0 {
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

fn check_moe(moe: &MoeConfig) -> Result<(), ConfigError> {
    let range = |field: &'static str, value: u32, min: u32, max: u32| {
        if (min..=max).contains(&value) {
            return Ok(());
        }
        Err(ConfigError::invalid(
            field,
            value,
            format!("must be between {min} and {max}"),
        ))
    };
    range("n_routed_experts", moe.routed_experts, 1, 65_536)?;
    range("n_shared_experts", moe.shared_experts, 0, 64)?;
    range(
        "num_experts_per_tok",
        moe.experts_per_token,
        1,
        moe.routed_experts,
    )?;
    range("moe_intermediate_size", moe.intermediate_size, 1, SIZE_MAX)?;
    range("moe_layer_freq", moe.layer_frequency, 1, LAYERS_MAX)?;
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

/// Typed access to the document's fields; every error names the field.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    /// The value unless absent or null.
    fn present(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn wrong(field: &str, value: &Value, expected: &str) -> ConfigError {
        let mut found = value.to_string();
        found.truncate(found.char_indices().nth(80).map_or(found.len(), |(i, _)| i));
        ConfigError::Malformed(format!("{field} = {found}: expected {expected}"))
    }

    fn integer(field: &str, value: &Value) -> Result<u32, ConfigError> {
        value
            .as_u64()
            .and_then(|n| u32::try_from(n).ok())
            .ok_or_else(|| Self::wrong(field, value, "an integer from 0 to 4294967295"))
    }

    fn size(&self, field: &str, default: u32) -> Result<u32, ConfigError> {
        match self.present(field) {
            Some(value) => Self::integer(field, value),
            None => Ok(default),
        }
    }

    /// Absent takes the default; null means none.
    fn optional_size(&self, field: &str, default: Option<u32>) -> Result<Option<u32>, ConfigError> {
        match self.0.get(field) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(value) => Self::integer(field, value).map(Some),
        }
    }

    fn number(&self, field: &str, default: f64) -> Result<f64, ConfigError> {
        match self.present(field) {
            Some(value) => value
                .as_f64()
                .ok_or_else(|| Self::wrong(field, value, "a number")),
            None => Ok(default),
        }
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        match self.present(field) {
            Some(value) => value
                .as_bool()
                .ok_or_else(|| Self::wrong(field, value, "true or false")),
            None => Ok(default),
        }
    }

    fn text(&self, field: &str) -> Result<Option<String>, ConfigError> {
        match self.present(field) {
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(value) => Err(Self::wrong(field, value, "a string")),
            None => Ok(None),
        }
    }

    fn tokens(&self, field: &str, default: u32) -> Result<Vec<u32>, ConfigError> {
        match self.0.get(field) {
            None => Ok(vec![default]),
            Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| Self::integer(field, item))
                .collect(),
            Some(value) => Ok(vec![Self::integer(field, value)?]),
        }
    }
}

#[cfg(test)]
mod tests;
