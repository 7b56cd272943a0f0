//! The header of a safetensors file: what is in it and where.
//!
//! Invariant: a parsed header describes exactly the bytes of its file. Every tensor lies inside the data section, its
//! length is that of its shape and dtype, tensors neither overlap nor leave holes, and the last one ends with the file.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::LoadError;

/// Longest header taken: the reference library's limit.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// The length field in front of the header.
const LENGTH_BYTES: u64 = 8;

/// Element types that weights, or the integers that stand for them, may be stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE binary32.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
    /// FP8 e4m3fn.
    F8E4m3,
    /// Power-of-two scale.
    F8E8m0,
    /// Integer of eight bits, to be multiplied by a scale.
    I8,
    /// Words of 32 bits: several integers, or a shape.
    I32,
}

impl FloatType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::F8E4m3 | Self::F8E8m0 | Self::I8 => 1,
        }
    }

    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "F32" => Self::F32,
            "BF16" => Self::Bf16,
            "F16" => Self::F16,
            "F8_E4M3" => Self::F8E4m3,
            "F8_E8M0" => Self::F8E8m0,
            "I8" => Self::I8,
            "I32" => Self::I32,
            _ => return None,
        })
    }
}

impl fmt::Display for FloatType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F8E4m3 => "F8_E4M3",
            Self::F8E8m0 => "F8_E8M0",
            Self::I8 => "I8",
            Self::I32 => "I32",
        })
    }
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorHeader {
    /// As spelled in the file.
    pub dtype: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// First byte, from the beginning of the file.
    pub begin: usize,
    /// One past the last byte, from the beginning of the file.
    pub end: usize,
}

impl TensorHeader {
    /// The dtype when it is one that weights may have.
    pub fn float_type(&self) -> Option<FloatType> {
        FloatType::parse(&self.dtype)
    }
}

/// All tensors of a file, by name.
pub(crate) type Header = BTreeMap<String, TensorHeader>;

/// Length of the header announced by the first eight bytes of a file of `file_bytes` bytes.
pub(crate) fn header_bytes(file: &str, start: &[u8], file_bytes: u64) -> Result<u64, LoadError> {
    let truncated = |problem| LoadError::Truncated {
        file: file.into(),
        problem,
    };
    let length = start
        .first_chunk::<8>()
        .map(|bytes| u64::from_le_bytes(*bytes))
        .ok_or_else(|| truncated(format!("{file_bytes} bytes, too short for a header")))?;
    if length > HEADER_BYTES_MAX {
        return Err(LoadError::Malformed {
            file: file.into(),
            problem: format!(
                "header length {length} exceeds the limit of {HEADER_BYTES_MAX} bytes; not a safetensors file?"
            ),
        });
    }
    if LENGTH_BYTES + length > file_bytes {
        return Err(truncated(format!(
            "header of {length} bytes in a file of {file_bytes} bytes"
        )));
    }
    Ok(length)
}

/// Reads the header of a whole safetensors file that is in memory: its tensors by name.
///
/// # Errors
/// What the header says and what is there differ; the error names `file`, the tensor and both.
pub fn safetensors_header(
    file: &str,
    bytes: &[u8],
) -> Result<BTreeMap<String, TensorHeader>, LoadError> {
    let file_bytes = bytes.len() as u64;
    let length = header_bytes(file, bytes, file_bytes)?;
    let json = &bytes[LENGTH_BYTES as usize..(LENGTH_BYTES + length) as usize];
    parse(file, json, file_bytes)
}

/// Parses and checks the header `json` of a file of `file_bytes` bytes.
pub(crate) fn parse(file: &str, json: &[u8], file_bytes: u64) -> Result<Header, LoadError> {
    let malformed = |problem: String| LoadError::Malformed {
        file: file.into(),
        problem,
    };
    let raw: RawHeader = serde_json::from_slice(json)
        .map_err(|error| malformed(format!("header is not valid: {error}")))?;
    let data_start = LENGTH_BYTES + json.len() as u64;
    let data_bytes = file_bytes - data_start;
    let mut header = Header::new();
    let mut spans = Vec::with_capacity(raw.0.len());
    for (name, tensor) in raw.0 {
        let [begin, end] = tensor.data_offsets;
        check_length(file, &name, &tensor)?;
        if end > data_bytes {
            return Err(LoadError::Truncated {
                file: file.into(),
                problem: format!(
                    "tensor {name} ends at byte {end} of the data, but only {data_bytes} bytes are there"
                ),
            });
        }
        spans.push((begin, end, name.clone()));
        let found = TensorHeader {
            dtype: tensor.dtype,
            shape: tensor.shape,
            begin: (data_start + begin) as usize,
            end: (data_start + end) as usize,
        };
        if header.insert(name.clone(), found).is_some() {
            return Err(malformed(format!("tensor {name} is listed twice")));
        }
    }
    spans.sort();
    let mut at = 0;
    for (begin, end, name) in spans {
        if begin != at {
            let what = if begin < at {
                "overlaps the tensor before it"
            } else {
                "leaves a hole"
            };
            return Err(malformed(format!(
                "tensor {name} {what}: it begins at byte {begin} of the data, expected {at}"
            )));
        }
        at = end;
    }
    if at != data_bytes {
        return Err(malformed(format!(
            "{} bytes after the last tensor",
            data_bytes - at
        )));
    }
    Ok(header)
}

/// The span must be as long as shape and dtype say, as far as the dtype is known.
fn check_length(file: &str, name: &str, tensor: &RawTensor) -> Result<(), LoadError> {
    let mismatch = |problem| LoadError::Mismatch {
        file: file.into(),
        tensor: name.into(),
        problem,
    };
    let [begin, end] = tensor.data_offsets;
    let Some(found) = end.checked_sub(begin) else {
        return Err(mismatch(format!("ends ({end}) before it begins ({begin})")));
    };
    let Some(dtype) = FloatType::parse(&tensor.dtype) else {
        return Ok(());
    };
    let expected = tensor
        .shape
        .iter()
        .try_fold(dtype.bytes() as u64, |bytes, size| {
            bytes.checked_mul(*size as u64)
        });
    if expected != Some(found) {
        return Err(mismatch(format!(
            "{found} bytes for shape {:?} of {dtype}",
            tensor.shape
        )));
    }
    Ok(())
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// Entries in file order, doubles included, so that doubles can be refused.
struct RawHeader(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
