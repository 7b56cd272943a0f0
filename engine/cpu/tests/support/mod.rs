//! Models of this folder, run the way the engine runs them.

// Not every test file uses every helper; a helper is no test, and may unwrap all the same.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use engine_core::{Batch, BatchEntry, BlockId, Executor, Logits, SequenceId, TokenId};
use engine_cpu::{CpuExecutor, CpuLimits, Isa};
use engine_load::{Progress, read_config};
use engine_memory::{INT4_GROUP, IntegerFormat, IntegerSource, ResidentDtype};
use serde::Deserialize;

/// The random models.
pub const MODELS: [&str; 15] = [
    "v2-lite",
    "v2-groups",
    "v3-groups",
    "v3-mtp",
    "v3-fp8",
    "v31-ue8m0",
    "kimi-k2",
    "qwen2",
    "qwen2-fp8",
    "llama",
    "llama-tied",
    "llama-fp16",
    "qwen3",
    "qwen3-fp32",
    "qwen3-moe",
];

/// Eight-bit weights made at load.
pub const INT8: ResidentDtype = ResidentDtype::Integer(IntegerFormat::Int8, IntegerSource::Load);
/// Four-bit weights made at load.
pub const INT4: ResidentDtype = ResidentDtype::Integer(
    IntegerFormat::Int4 { group: INT4_GROUP },
    IntegerSource::Load,
);

/// Vectors made by `make_golden.py`.
#[derive(Deserialize)]
pub struct Golden {
    #[serde(default)]
    pub sha256: String,
    pub prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
pub struct Prompt {
    pub tokens: Vec<u32>,
    pub positions: Vec<usize>,
    pub logits: Vec<Vec<f32>>,
    #[serde(default)]
    pub greedy: Vec<u32>,
}

pub fn folder(model: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(model)
}

pub fn golden(path: &Path) -> Golden {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

pub fn limits(resident: ResidentDtype) -> CpuLimits {
    CpuLimits {
        resident,
        kv_blocks: 64,
        block_size: 8,
        model_len_max: 256,
        batched_tokens_max: 256,
        sequences_max: 8,
        draft_tokens: 0,
        threads: 2,
        isa: Isa::best(),
    }
}

pub fn load(dir: &Path, limits: CpuLimits) -> CpuExecutor {
    let config = read_config(dir).unwrap();
    CpuExecutor::load(dir, &config, limits, &Progress::default()).unwrap()
}

/// One sequence's next tokens in the given blocks.
pub fn entry(sequence: u64, tokens: &[u32], start: usize, blocks: &[u32]) -> BatchEntry {
    BatchEntry {
        sequence: SequenceId(sequence),
        tokens: tokens.iter().map(|token| TokenId(*token)).collect(),
        start,
        blocks: blocks.iter().map(|block| BlockId(*block)).collect(),
        wants_logits: true,
        drafts: 0,
    }
}

/// Runs a batch and returns its logits rows.
pub fn step(executor: &mut CpuExecutor, entries: Vec<BatchEntry>) -> Vec<Vec<f32>> {
    let mut logits = Logits::default();
    executor.execute(&Batch { entries }, &mut logits).unwrap();
    (0..logits.rows())
        .map(|row| logits.row(row).to_vec())
        .collect()
}

/// Logits after all of `tokens`, as one prefill from position 0.
pub fn prefill(executor: &mut CpuExecutor, tokens: &[u32]) -> Vec<f32> {
    let blocks: Vec<u32> = (0..64).collect();
    step(executor, vec![entry(1, tokens, 0, &blocks)]).remove(0)
}

/// Greedy continuation of `tokens`, one decode step per token.
pub fn greedy(executor: &mut CpuExecutor, tokens: &[u32], count: usize) -> Vec<u32> {
    let blocks: Vec<u32> = (0..executor.limits().kv_blocks as u32).collect();
    let mut row = step(executor, vec![entry(1, tokens, 0, &blocks)]).remove(0);
    let mut found = Vec::new();
    while found.len() < count {
        let token = argmax(&row);
        found.push(token);
        let start = tokens.len() + found.len() - 1;
        if found.len() < count {
            row = step(executor, vec![entry(1, &[token], start, &blocks)]).remove(0);
        }
    }
    found
}

pub fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = index;
        }
    }
    best as u32
}

/// Largest difference, relative to the largest magnitude of the expected row.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let scale = expected
        .iter()
        .fold(0f32, |scale, value| scale.max(value.abs()));
    let worst = found
        .iter()
        .zip(expected)
        .fold(0f32, |worst, (f, e)| worst.max((f - e).abs()));
    worst / scale
}
