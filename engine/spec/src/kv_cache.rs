//! What keys and values are kept as.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Dtype of the KV cache, in vLLM's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvCacheDtype {
    /// As the model computes.
    #[default]
    Auto,
    /// Latents in e4m3 with a float32 scale for each 128 of them; rotated keys in bfloat16.
    Fp8,
}

impl KvCacheDtype {
    /// Whether nothing was asked for.
    pub fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

impl FromStr for KvCacheDtype {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "fp8" => Ok(Self::Fp8),
            other => Err(format!("\"{other}\" is not one of auto, fp8")),
        }
    }
}

impl fmt::Display for KvCacheDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Fp8 => "fp8",
        })
    }
}
