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
mod rope;

use serde::Deserialize;
use serde_json::Value;

use crate::model_config::{
    Architecture, ConfigError, ModelConfig, Packing, StoredDtype, WeightBlocks,
};
use check::{SIZE_MAX, check};
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

/// What `engine pack` left in the config of what it wrote.
fn packing(f: &Fields<'_>) -> Result<Option<Packing>, ConfigError> {
    f.present("cachalot_packed")
        .map(|value| serde_json::from_value(value.clone()))
        .transpose()
        .map_err(|e| ConfigError::Malformed(format!("cachalot_packed: {e}")))
}

#[derive(Deserialize)]
struct Quantization {
    quant_method: String,
    weight_block_size: Option<[u32; 2]>,
    scale_fmt: Option<String>,
}

#[cfg(test)]
mod tests;
