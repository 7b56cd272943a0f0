//! Whole models on a GPU: the part of `make gpu-check` that runs the backend.
//!
//!     gpu-check golden DIR...                 logits and greedy tokens of models with golden vectors, as JSON
//!     gpu-check logits DIR FILE               logits after each prompt of FILE (a JSON list of token lists), as JSON
//!     gpu-check model CONFIG LENGTH BATCH...  decode steps at a context length, as JSON; of a config file's model with random
//!                                             weights, or of the one in a folder
//!     gpu-check write CONFIG DIR              weight files of random values of CONFIG's model
//!     gpu-check start DIR                     times from the driver's opening to the first token of DIR's model, as JSON
//!
//! `KERNELS_DRIVER` names the driver's library; the engine's variables choose kernels, and every answer says which they were.
//! Times are wall clock over whole steps: copies in, graph, logits out.

#![allow(missing_docs)]

mod files;
mod start;

use std::error::Error;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use engine_core::{Batch, BatchEntry, BlockId, Executor, Logits, SequenceId, TokenId, argmax};
use engine_cuda::{
    ATTENTION_VARIABLE, AttentionChoice, CudaExecutor, CudaLimits, Gpu, PRODUCTS_VARIABLE,
};
use engine_load::{Progress, read_config};
use engine_memory::{MemoryRequest, ResidentDtype, memory_plan, resident_dtype};
use engine_spec::{Device, Dtype, KvCacheDtype, ModelConfig, Parallelism, Quantization};
use kernels::driver::{Device as CudaDevice, Driver};
use serde::Deserialize;
use serde_json::{Value, json};

type Outcome = Result<Value, Box<dyn Error>>;

const BLOCK: usize = 16;
/// Steps timed, after two that load code and record the graph.
const STEPS: usize = 20;

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    tokens: Vec<u32>,
    positions: Vec<usize>,
    logits: Vec<Vec<f32>>,
    greedy: Vec<u32>,
}

fn driver() -> Result<Arc<Driver>, Box<dyn Error>> {
    let path = std::env::var_os("KERNELS_DRIVER").map(PathBuf::from);
    Ok(Driver::load(path.as_deref())?)
}

fn gpu_over(device: Arc<CudaDevice>) -> Result<Gpu, Box<dyn Error>> {
    let choice = match std::env::var(ATTENTION_VARIABLE) {
        Ok(text) => text.parse()?,
        Err(_) => AttentionChoice::default(),
    };
    Ok(Gpu::over(device)?.with_attention(choice))
}

fn gpu() -> Result<Gpu, Box<dyn Error>> {
    gpu_over(CudaDevice::open(&driver()?, 0)?)
}

/// Which kernels ran, and why they are not Hopper's where they are not.
fn choices(gpu: &Gpu, executor: &CudaExecutor) -> Value {
    json!({
        "products": gpu.products().to_string(), "fallback": gpu.fallback(), "attention": executor.attention().to_string(),
    })
}

fn entry(sequence: usize, tokens: &[u32], start: usize, first_block: usize) -> BatchEntry {
    let blocks = (start + tokens.len()).div_ceil(BLOCK);
    BatchEntry {
        sequence: SequenceId(sequence as u64),
        tokens: tokens.iter().map(|token| TokenId(*token)).collect(),
        start,
        blocks: (first_block..first_block + blocks)
            .map(|block| BlockId(block as u32))
            .collect(),
        wants_logits: true,
        drafts: 0,
    }
}

fn limits(config: &ModelConfig, length: usize, sequences: usize, tokens: usize) -> CudaLimits {
    let per_sequence = length.div_ceil(BLOCK);
    let heads = config.attention.heads() as usize;
    CudaLimits {
        resident: resident_dtype(Dtype::Auto, Quantization::None, config, Device::Nvidia),
        kv_cache: KvCacheDtype::Auto,
        kv_blocks: per_sequence * sequences,
        block_size: BLOCK,
        model_len_max: length,
        batched_tokens_max: tokens,
        sequences_max: sequences,
        draft_tokens: 0,
        // Room for every row's parts up to a bound; beyond it attention takes turns.
        parts_bytes: (tokens * heads * length.div_ceil(512) * 513 * 4).min(256 << 20),
        graphs: true,
    }
}

fn step(executor: &mut CudaExecutor, entries: Vec<BatchEntry>) -> Result<Logits, Box<dyn Error>> {
    let mut logits = Logits::default();
    executor.execute(&Batch { entries }, &mut logits)?;
    Ok(logits)
}

/// Largest difference, relative to the largest magnitude of the expected row; as large as can be where a value is not finite.
fn relative_error(found: &[f32], expected: &[f32]) -> f32 {
    if found.len() != expected.len() || found.iter().any(|value| !value.is_finite()) {
        return f32::MAX;
    }
    let scale = expected.iter().fold(0f32, |scale, v| scale.max(v.abs()));
    let pairs = found.iter().zip(expected);
    pairs.fold(0f32, |worst, (f, e)| worst.max((f - e).abs())) / scale
}

fn golden(dir: &Path) -> Outcome {
    let config = read_config(dir)?;
    let golden: Golden = serde_json::from_slice(&std::fs::read(dir.join("golden.json"))?)?;
    let limits = limits(&config, 512, 1, 512);
    let gpu = gpu()?;
    let mut executor = CudaExecutor::load(&gpu, dir, &config, limits, &Progress::default())?;
    let (mut errors, mut equal, mut all) = (Vec::new(), 0, 0);
    for prompt in &golden.prompts {
        for (position, expected) in prompt.positions.iter().zip(&prompt.logits) {
            let found = step(
                &mut executor,
                vec![entry(1, &prompt.tokens[..=*position], 0, 0)],
            )?;
            errors.push(relative_error(found.row(0), expected));
        }
        let mut tokens = prompt.tokens.clone();
        let mut start = 0;
        for wanted in &prompt.greedy {
            let found = step(&mut executor, vec![entry(1, &tokens[start..], start, 0)])?;
            start = tokens.len();
            equal += usize::from(argmax(found.row(0)).0 == *wanted);
            all += 1;
            tokens.push(*wanted); // so that one difference is one difference
        }
    }
    let worst = errors.iter().copied().fold(0f32, f32::max);
    let is_narrow = matches!(limits.resident, ResidentDtype::Float8E4m3(_));
    Ok(json!({
        "model": dir, "choices": choices(&gpu, &executor), "fp8_products": is_narrow, "relative_errors": errors,
        "worst": worst, "greedy_equal": equal, "greedy_all": all,
    }))
}

fn logits(dir: &Path, prompts: &Path) -> Outcome {
    let config = read_config(dir)?;
    let prompts: Vec<Vec<u32>> = serde_json::from_slice(&std::fs::read(prompts)?)?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(1);
    let limits = limits(&config, longest, 1, longest);
    let gpu = gpu()?;
    let mut executor = CudaExecutor::load(&gpu, dir, &config, limits, &Progress::default())?;
    let mut rows = Vec::new();
    for tokens in &prompts {
        rows.push(
            step(&mut executor, vec![entry(1, tokens, 0, 0)])?
                .row(0)
                .to_vec(),
        );
    }
    Ok(json!({"model": dir, "choices": choices(&gpu, &executor), "logits": rows}))
}

/// Bytes that a decode step must read: what the plan says the weights take, and each sequence's cache.
fn planned_bytes(
    config: &ModelConfig,
    length: usize,
    batch: usize,
) -> Result<Value, Box<dyn Error>> {
    let plan = memory_plan(
        config,
        &MemoryRequest {
            dtype: Dtype::Auto,
            parallelism: Parallelism::default(),
            device: Device::Nvidia,
            max_model_len: Some(length as u32),
            max_num_seqs: batch as u32,
            block_size: BLOCK as u32,
            max_num_batched_tokens: batch.max(1) as u32,
            capacity_bytes: None,
            quantization: Quantization::None,
            kv_cache: KvCacheDtype::Auto,
            draft_tokens: 0,
        },
    )?;
    Ok(json!({"weights": plan.per_rank.weights_bytes, "kv": plan.per_rank.kv_bytes}))
}

fn model(path: &Path, length: usize, batches: &[usize]) -> Outcome {
    let config = match path.is_dir() {
        true => read_config(path)?,
        false => ModelConfig::from_hf_json(&std::fs::read_to_string(path)?)?,
    };
    let most = batches.iter().copied().max().unwrap_or(1);
    let room = (length + STEPS + 2).next_multiple_of(BLOCK);
    let begin = Instant::now();
    let limits = limits(&config, room, most, most.max(length));
    let gpu = gpu()?;
    let progress = Progress::default();
    let mut executor = match path.is_dir() {
        true => CudaExecutor::load(&gpu, path, &config, limits, &progress)?,
        false => CudaExecutor::dummy(&gpu, &config, 1, limits, &progress)?,
    };
    let loaded = begin.elapsed().as_secs_f64();
    let per_sequence = room.div_ceil(BLOCK);
    let token =
        |sequence: usize, at: usize| ((sequence * 7 + at * 13 + 3) as u32) % config.vocab_size;
    // Every sequence's own context: what was never written may be NaN.
    let begin = Instant::now();
    for sequence in 0..most {
        let tokens: Vec<u32> = (0..length).map(|at| token(sequence, at)).collect();
        step(
            &mut executor,
            vec![entry(sequence, &tokens, 0, sequence * per_sequence)],
        )?;
    }
    let prefill = (most * length) as f64 / begin.elapsed().as_secs_f64();
    let mut lines = Vec::new();
    for &batch in batches {
        let mut times = Vec::new();
        for turn in 0..STEPS + 2 {
            let entries = (0..batch)
                .map(|sequence| {
                    // Each batch begins at the same length again, over what the last one left.
                    let start = length + turn;
                    entry(
                        sequence,
                        &[token(sequence, start)],
                        start,
                        sequence * per_sequence,
                    )
                })
                .collect();
            let begin = Instant::now();
            step(&mut executor, entries)?;
            times.push(begin.elapsed().as_secs_f64());
        }
        let mut times = times.split_off(2);
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        lines.push(json!({
            "batch": batch, "context": length, "step_seconds": median, "tokens_per_second": batch as f64 / median,
            "planned_bytes": planned_bytes(&config, length, batch)?,
        }));
    }
    Ok(
        json!({"config": path, "choices": choices(&gpu, &executor), "load_seconds": loaded,
        "prefill_tokens_per_second": prefill, "decode": lines}),
    )
}

/// Whether a kernel that was tried does not end: [`engine_cuda::CudaError::Hung`], also where a load wrapped it in words.
fn holds_device(error: &dyn Error) -> bool {
    error.to_string().contains(PRODUCTS_VARIABLE)
}

fn run(arguments: &[String]) -> Outcome {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["golden", dirs @ ..] if !dirs.is_empty() => {
            let mut found = Vec::new();
            for dir in dirs {
                // One model's failure is its line, unless it holds the device from the others.
                match golden(Path::new(dir)) {
                    Err(error) if holds_device(&*error) => return Err(error),
                    Err(error) => found.push(json!({"model": dir, "error": error.to_string()})),
                    Ok(line) => found.push(line),
                }
            }
            Ok(found.into())
        }
        ["logits", dir, prompts] => logits(Path::new(dir), Path::new(prompts)),
        ["model", config, length, batches @ ..] if !batches.is_empty() => {
            let batches: Result<Vec<usize>, _> = batches.iter().map(|b| b.parse()).collect();
            model(Path::new(config), length.parse()?, &batches?)
        }
        ["write", config, dir] => files::write(Path::new(config), Path::new(dir)),
        ["start", dir] => start::start(Path::new(dir)),
        _ => Err(
            "usage: gpu-check golden DIR... | logits DIR FILE | model CONFIG LENGTH BATCH... | \
             write CONFIG DIR | start DIR"
                .into(),
        ),
    }
}

fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Err(error) if holds_device(&*error) => {
            // A kernel that does not end would hold a process that ends as others do; one that becomes another program frees
            // the device at once.
            eprintln!("gpu-check: {error}");
            let failed = std::process::Command::new("false").exec();
            eprintln!("gpu-check: false: {failed}");
            std::process::abort()
        }
        Ok(value) => {
            println!("{value:#}");
            std::process::ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("gpu-check: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
