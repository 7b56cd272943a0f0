//! Outputs of two drivers, value by value.

use std::io;

use half::bf16;
use serde_json::{Value, json};

/// What the bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Bf16,
    Float,
    Integer,
    /// Codes and mixed rows: compared as bytes.
    Bytes,
}

impl Kind {
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::Float | Self::Integer => 4,
            Self::Bytes => 1,
        }
    }

    fn code(self) -> u8 {
        self as u8
    }

    fn of(code: u8) -> Option<Self> {
        [Self::Bf16, Self::Float, Self::Integer, Self::Bytes]
            .into_iter()
            .find(|kind| kind.code() == code)
    }

    fn values(self, bytes: &[u8]) -> Vec<f64> {
        match self {
            Self::Bf16 => bytes
                .chunks_exact(2)
                .map(|b| f64::from(bf16::from_le_bytes([b[0], b[1]]).to_f32()))
                .collect(),
            Self::Float => bytes
                .chunks_exact(4)
                .map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                .collect(),
            Self::Integer => bytes
                .chunks_exact(4)
                .map(|b| f64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                .collect(),
            Self::Bytes => bytes.iter().map(|b| f64::from(*b)).collect(),
        }
    }
}

/// One output of one case.
#[derive(Debug)]
pub struct Output {
    pub name: String,
    pub kind: Kind,
    pub bytes: Vec<u8>,
}

/// Name length, name, kind, length, bytes, for each.
pub fn write(path: &str, outputs: &[Output]) -> io::Result<()> {
    let mut all = Vec::new();
    for output in outputs {
        all.extend((output.name.len() as u32).to_le_bytes());
        all.extend(output.name.as_bytes());
        all.push(output.kind.code());
        all.extend((output.bytes.len() as u32).to_le_bytes());
        all.extend(&output.bytes);
    }
    std::fs::write(path, all)
}

fn read(path: &str) -> Result<Vec<Output>, String> {
    let all = std::fs::read(path).map_err(|error| format!("{path}: {error}"))?;
    let mut rest = all.as_slice();
    let mut take = |count: usize| -> Option<&[u8]> {
        let (head, tail) = rest.split_at_checked(count)?;
        rest = tail;
        Some(head)
    };
    let mut outputs = Vec::new();
    let length = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_le_bytes) as usize;
    while let Some(name_length) = take(4).map(length) {
        let mut one = || {
            let name = String::from_utf8(take(name_length)?.to_vec()).ok()?;
            let kind = Kind::of(take(1)?[0])?;
            let count = take(4).map(length)?;
            let bytes = take(count)?.to_vec();
            Some(Output { name, kind, bytes })
        };
        outputs.push(one().ok_or_else(|| format!("{path}: cut short"))?);
    }
    Ok(outputs)
}

/// For each output of `a` the share of values that are the same bits, and the largest difference relative to the largest
/// value; and the names of those that `b` alone has.
pub fn differences(a: &str, b: &str) -> Result<Value, String> {
    let (left, right) = (read(a)?, read(b)?);
    let mut lines = Vec::new();
    for one in &left {
        let Some(other) = right.iter().find(|other| other.name == one.name) else {
            lines.push(json!({"name": one.name, "error": format!("not in {b}")}));
            continue;
        };
        let size = one.kind.bytes();
        let count = one.bytes.len() / size;
        let pairs = one
            .bytes
            .chunks_exact(size)
            .zip(other.bytes.chunks_exact(size));
        let same = pairs.filter(|(x, y)| x == y).count();
        let (x, y) = (one.kind.values(&one.bytes), one.kind.values(&other.bytes));
        let scale = y
            .iter()
            .filter(|v| v.is_finite())
            .fold(0f64, |m, v| m.max(v.abs()));
        let worst = x
            .iter()
            .zip(&y)
            // A value that one has and the other has not is as wrong as can be.
            .map(|(x, y)| match (x.is_nan(), y.is_nan()) {
                (true, true) => 0.0,
                (false, false) if x == y => 0.0,
                (false, false) => (x - y).abs(),
                _ => f64::MAX,
            })
            .fold(0f64, f64::max);
        lines.push(json!({
            "name": one.name, "values": count, "same_bits": same as f64 / count.max(1) as f64,
            "relative_difference": worst / scale.max(f64::MIN_POSITIVE), "exact_kind": one.kind.code() >= 2,
            "same_length": one.bytes.len() == other.bytes.len(),
        }));
    }
    let is_there = |name: &String| left.iter().any(|one| one.name == *name);
    let missing: Vec<&String> = right
        .iter()
        .map(|one| &one.name)
        .filter(|name| !is_there(name))
        .collect();
    Ok(json!({"outputs": lines, "missing": missing}))
}
