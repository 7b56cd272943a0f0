//! `quantization_config`: FP8 with block scales, and the integer formats of compressed-tensors.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::Stored;
use super::check::SIZE_MAX;
use crate::model_config::{ConfigError, StoredDtype, StoredIntegers, WeightBlocks};

fn read<T: for<'a> Deserialize<'a>>(value: &Value) -> Result<T, ConfigError> {
    serde_json::from_value(value.clone())
        .map_err(|e| ConfigError::Malformed(format!("quantization_config: {e}")))
}

#[derive(Deserialize)]
struct Float8 {
    weight_block_size: Option<[u32; 2]>,
    scale_fmt: Option<String>,
}

/// FP8 e4m3 with a scale for each block.
pub(super) fn float8(value: &Value) -> Result<Stored, ConfigError> {
    let quantization: Float8 = read(value)?;
    let [rows, columns] = quantization.weight_block_size.unwrap_or([128, 128]);
    if !(1..=SIZE_MAX).contains(&rows) || !(1..=SIZE_MAX).contains(&columns) {
        return Err(ConfigError::invalid(
            "quantization_config.weight_block_size",
            format!("[{rows}, {columns}]"),
            "both sizes must be positive",
        ));
    }
    Ok(Stored {
        dtype: StoredDtype::Float8E4m3,
        blocks: Some(WeightBlocks {
            rows,
            columns,
            power_of_two: quantization.scale_fmt.as_deref() == Some("ue8m0"),
        }),
        integers: None,
    })
}

#[derive(Deserialize)]
struct Compressed {
    #[serde(default)]
    format: Option<String>,
    config_groups: BTreeMap<String, Group>,
}

#[derive(Deserialize)]
struct Group {
    #[serde(default)]
    format: Option<String>,
    targets: Vec<String>,
    weights: Option<Arguments>,
    #[serde(default)]
    input_activations: Option<Arguments>,
    #[serde(default)]
    output_activations: Option<Value>,
}

#[derive(Deserialize)]
struct Arguments {
    num_bits: u32,
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default)]
    strategy: Option<String>,
    #[serde(default)]
    group_size: Option<i64>,
    #[serde(default = "yes")]
    symmetric: bool,
    #[serde(default)]
    dynamic: Value,
    #[serde(default)]
    actorder: Value,
}

fn yes() -> bool {
    true
}

fn invalid(field: &str, found: impl std::fmt::Display, way_out: &str) -> ConfigError {
    let field = format!("quantization_config.{field}");
    ConfigError::Malformed(format!("{field} = {found}: {way_out}"))
}

/// Symmetric integers of four or eight bits over all linear maps. Which tensors are left wide is read from the files.
pub(super) fn compressed_tensors(value: &Value) -> Result<StoredIntegers, ConfigError> {
    let Compressed {
        format,
        config_groups,
    } = read(value)?;
    let mut groups = config_groups.into_values();
    let (Some(group), None) = (groups.next(), groups.next()) else {
        return Err(invalid("config_groups", "several", "served is one group"));
    };
    if group.targets != ["Linear"] {
        let found = group.targets.join(", ");
        return Err(invalid("config_groups.targets", found, "served is Linear"));
    }
    let format = group.format.or(format).unwrap_or_default();
    let packed = match format.as_str() {
        "pack-quantized" => true,
        "int-quantized" | "naive-quantized" => false,
        other => {
            let way_out = "served are pack-quantized and int-quantized";
            return Err(invalid("format", other, way_out));
        }
    };
    check_activations(
        group.input_activations.as_ref(),
        group.output_activations.as_ref(),
    )?;
    let Some(weights) = group.weights else {
        return Err(invalid(
            "config_groups.weights",
            "null",
            "they must be integers",
        ));
    };
    integers(&weights, packed)
}

/// The engine quantises activations of each token by itself, symmetrically.
fn check_activations(input: Option<&Arguments>, output: Option<&Value>) -> Result<(), ConfigError> {
    if let Some(input) = input {
        let dynamic = input.dynamic == Value::Bool(true);
        if !dynamic
            || !input.symmetric
            || input.num_bits != 8
            || input.kind.as_deref().unwrap_or("int") != "int"
        {
            let way_out = "served are dynamic symmetric integers of eight bits, or none";
            return Err(invalid(
                "config_groups.input_activations",
                "others",
                way_out,
            ));
        }
    }
    match output {
        None | Some(Value::Null) => Ok(()),
        Some(_) => Err(invalid(
            "config_groups.output_activations",
            "some",
            "served is null",
        )),
    }
}

fn integers(weights: &Arguments, packed: bool) -> Result<StoredIntegers, ConfigError> {
    let field = |name: &str| format!("config_groups.weights.{name}");
    if weights.kind.as_deref().unwrap_or("int") != "int" {
        let found = weights.kind.as_deref().unwrap_or_default();
        return Err(invalid(&field("type"), found, "served is int"));
    }
    if !weights.symmetric {
        let way_out = "served are symmetric weights, which have no zero points";
        return Err(invalid(&field("symmetric"), false, way_out));
    }
    let reordered = weights
        .actorder
        .as_str()
        .filter(|order| !matches!(*order, "weight" | "static"));
    if let Some(order) = reordered {
        let way_out = "columns must be in order (null, weight or static)";
        return Err(invalid(&field("actorder"), order, way_out));
    }
    let bits = weights.num_bits;
    let group = match (weights.strategy.as_deref(), weights.group_size) {
        (None | Some("group"), Some(size)) if size > 0 => Some(size),
        (Some("channel"), _) | (None, _) => None,
        (Some(other), _) => {
            return Err(invalid(
                &field("strategy"),
                other,
                "served are channel and group",
            ));
        }
    };
    let group = match (bits, packed, group) {
        (8, _, None) | (4, true, None) => None,
        (4, true, Some(size)) if size % 8 == 0 && size <= i64::from(SIZE_MAX) => {
            u32::try_from(size).ok()
        }
        (4, true, Some(size)) => {
            return Err(invalid(
                &field("group_size"),
                size,
                "must be a multiple of 8",
            ));
        }
        _ => {
            let way_out =
                "served are 8 bits by channel, and 4 bits by group or channel in pack-quantized";
            let by = group.map_or("channel".into(), |size| format!("groups of {size}"));
            return Err(invalid(
                &field("num_bits"),
                format!("{bits}, by {by}"),
                way_out,
            ));
        }
    };
    Ok(StoredIntegers {
        bits,
        group,
        packed,
    })
}
