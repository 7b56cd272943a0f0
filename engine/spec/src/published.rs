//! From the spelling of published `config.json` files to a checked [`ModelConfig`].
//!
//! Two forms exist: the one that makers publish (`rope_scaling`, `torch_dtype`, DeepSeek's
//! `scoring_func` and `topk_method`) and the one transformers 5 writes (`rope_parameters`, `dtype`,
//! and fields absent that equal the family's default in transformers). A field that is absent takes
//! that default; a field that is `null` means "none".

mod check;
mod deepseek;
mod fields;
mod grouped;
mod quantization;
mod rope;

use serde_json::Value;

use crate::model_config::{
    Architecture, ConfigError, ModelConfig, Packing, StoredDtype, StoredIntegers, WeightBlocks,
};
use check::check;
use fields::Fields;

pub(crate) fn parse(text: &str) -> Result<ModelConfig, ConfigError> {
    let value: Value =
        serde_json::from_str(text).map_err(|e| ConfigError::Malformed(e.to_string()))?;
    let Value::Object(fields) = value else {
        return Err(ConfigError::Malformed(
            "the document is not an object".into(),
        ));
    };
    let fields = Fields(&fields);
    let name = fields
        .text("model_type")?
        .ok_or(ConfigError::Missing("model_type"))?;
    let architecture = match name.as_str() {
        // Kimi-K2 publishes the V3 graph under its own name.
        "kimi_k2" => Architecture::DeepseekV3,
        name => Architecture::ALL
            .into_iter()
            .find(|architecture| architecture.as_str() == name)
            .ok_or_else(|| ConfigError::Unsupported(name.into()))?,
    };
    if let Some(act) = fields.text("hidden_act")?.filter(|act| act != "silu") {
        let way_out = "only silu is served";
        return Err(ConfigError::invalid("hidden_act", act, way_out));
    }
    let config = match architecture {
        Architecture::DeepseekV2 | Architecture::DeepseekV3 => {
            deepseek::read(architecture, &fields)?
        }
        Architecture::Qwen2
        | Architecture::Llama
        | Architecture::Qwen3
        | Architecture::Qwen3Moe => grouped::read(architecture, &fields)?,
    };
    check(&config)?;
    Ok(config)
}

/// Refuses biases where the family's published models have none.
fn refuse_biases(f: &Fields<'_>) -> Result<(), ConfigError> {
    for name in ["attention_bias", "mlp_bias"] {
        if f.flag(name, false)? {
            return Err(ConfigError::invalid(
                name,
                true,
                "biases are not served for this family",
            ));
        }
    }
    Ok(())
}

/// How the weight files hold the large matrices.
pub(super) struct Stored {
    pub dtype: StoredDtype,
    pub blocks: Option<WeightBlocks>,
    pub integers: Option<StoredIntegers>,
}

fn stored(f: &Fields<'_>) -> Result<Stored, ConfigError> {
    // transformers 5 renamed torch_dtype to dtype.
    let (field, name) = match f.text("torch_dtype")? {
        Some(name) => ("torch_dtype", Some(name)),
        None => ("dtype", f.text("dtype")?),
    };
    let dtype = match name.as_deref() {
        Some("bfloat16") | None => StoredDtype::Bfloat16,
        Some("float32") => StoredDtype::Float32,
        Some("float16") => StoredDtype::Float16,
        Some(other) => {
            let way_out = "served are bfloat16, float16 and float32";
            return Err(ConfigError::invalid(field, other, way_out));
        }
    };
    let plain = Stored {
        dtype,
        blocks: None,
        integers: None,
    };
    let Some(value) = f.present("quantization_config") else {
        return Ok(plain);
    };
    match value.get("quant_method").and_then(Value::as_str) {
        Some("fp8") => quantization::float8(value),
        Some("compressed-tensors") => Ok(Stored {
            integers: Some(quantization::compressed_tensors(value)?),
            ..plain
        }),
        other => Err(ConfigError::invalid(
            "quantization_config.quant_method",
            other.unwrap_or_default(),
            "served are fp8 with weight_block_size, and compressed-tensors",
        )),
    }
}

/// What `engine pack` left in the config of what it wrote.
fn packing(f: &Fields<'_>) -> Result<Option<Packing>, ConfigError> {
    f.present("cachalot_packed")
        .map(|value| serde_json::from_value(value.clone()))
        .transpose()
        .map_err(|e| ConfigError::Malformed(format!("cachalot_packed: {e}")))
}

#[cfg(test)]
mod tests;
