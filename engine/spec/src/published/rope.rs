//! The rotary embedding's fields, in both forms.

use serde::Deserialize;
use serde_json::Value;

use super::Fields;
use crate::model_config::{ConfigError, RopeScaling, Yarn};

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
    truncate: Option<bool>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

/// Base and extension of the rotary embedding.
pub(super) fn rope(f: &Fields<'_>) -> Result<(f64, Option<RopeScaling>), ConfigError> {
    let rope = read(f)?;
    let theta = match rope.rope_theta {
        Some(theta) => theta,
        None => f.number("rope_theta", 10_000.0)?,
    };
    let partial = match rope.partial_rotary_factor {
        Some(factor) => factor,
        None => f.number("partial_rotary_factor", 1.0)?,
    };
    if partial != 1.0 {
        return Err(ConfigError::invalid(
            "partial_rotary_factor",
            partial,
            "heads that are rotated in part are not served for this family",
        ));
    }
    Ok((theta, rope.scaling()?))
}

fn read(f: &Fields<'_>) -> Result<Rope, ConfigError> {
    let (field, value) = match f.present("rope_parameters") {
        Some(value) => ("rope_parameters", Some(value)),
        None => ("rope_scaling", f.present("rope_scaling")),
    };
    let Some(mut value) = value.cloned() else {
        return Ok(Rope::default());
    };
    // A file may carry both spellings of the type; serde would call that a duplicate.
    if let Value::Object(map) = &mut value
        && map.contains_key("rope_type")
    {
        map.remove("type");
    }
    serde_json::from_value(value).map_err(|e| ConfigError::Malformed(format!("{field}: {e}")))
}

impl Rope {
    fn scaling(self) -> Result<Option<RopeScaling>, ConfigError> {
        let required = |value: Option<f64>, field| value.ok_or(ConfigError::Missing(field));
        let original = self.original_max_position_embeddings;
        let original_max_position = original.ok_or(ConfigError::Missing(
            "rope_scaling.original_max_position_embeddings",
        ));
        let factor = required(self.factor, "rope_scaling.factor");
        match self.rope_type.as_deref() {
            None | Some("default") => Ok(None),
            Some("yarn") => {
                if self.truncate == Some(false) {
                    let way_out = "YaRN is served with whole corners (true)";
                    let field = "rope_scaling.truncate";
                    return Err(ConfigError::invalid(field, false, way_out));
                }
                Ok(Some(RopeScaling::Yarn(Yarn {
                    factor: factor?,
                    original_max_position: original_max_position?,
                    beta_fast: self.beta_fast.unwrap_or(32.0),
                    beta_slow: self.beta_slow.unwrap_or(1.0),
                    mscale: self.mscale,
                    mscale_all_dim: self.mscale_all_dim,
                    attention_factor: self.attention_factor,
                })))
            }
            Some("llama3") => Ok(Some(RopeScaling::Llama3 {
                factor: factor?,
                low_frequency_factor: required(
                    self.low_freq_factor,
                    "rope_scaling.low_freq_factor",
                )?,
                high_frequency_factor: required(
                    self.high_freq_factor,
                    "rope_scaling.high_freq_factor",
                )?,
                original_max_position: original_max_position?,
            })),
            Some(other) => {
                let way_out = "served are default, yarn and llama3";
                Err(ConfigError::invalid("rope_scaling.type", other, way_out))
            }
        }
    }
}
