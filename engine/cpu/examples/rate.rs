//! Tokens per second of a model directory: `cargo run -p engine-cpu --example rate --release -- DIR [THREADS]`.
//!
//! Prefill of prompts in chunks of 512 tokens, then decoding of 1, 4 and 16 sequences at once after a context of 256
//! tokens; the median of five runs. Prints what decoding reads per second, to be held against memory bandwidth. A
//! directory with nothing but a `config.json` is run with random weights.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use engine_core::{Batch, BatchEntry, BlockId, Executor, Logits, SequenceId, TokenId};
use engine_cpu::{CpuExecutor, CpuLimits, Isa};
use engine_load::{Progress, read_config};
use engine_memory::{MemoryRequest, memory_plan};
use engine_spec::{Device, Dtype, Parallelism};

const CHUNK: u32 = 512;
const CONTEXT: usize = 256;
const STEPS: usize = 32;
const SEQUENCES: [usize; 3] = [1, 4, 16];
const RUNS: usize = 5;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let dir = PathBuf::from(arguments.next().ok_or("usage: rate DIR [THREADS]")?);
    let config = read_config(&dir)?;
    let request = MemoryRequest {
        dtype: Dtype::Auto,
        parallelism: Parallelism::default(),
        device: Device::Cpu,
        max_model_len: Some(config.max_positions.min(1024)),
        max_num_seqs: 16,
        block_size: 16,
        max_num_batched_tokens: CHUNK,
        capacity_bytes: None,
    };
    let plan = memory_plan(&config, &request)?;
    let mut limits = CpuLimits::from_plan(&plan, request.max_num_seqs, CHUNK);
    if let Some(threads) = arguments.next() {
        limits.threads = threads.parse()?;
    }
    let started = Instant::now();
    let progress = Progress::default();
    let has_weights = std::fs::read_dir(&dir)?.flatten().any(|file| {
        let name = file.file_name();
        name.to_string_lossy().ends_with(".safetensors")
    });
    let mut executor = if has_weights {
        CpuExecutor::load(&dir, &config, limits, &progress)?
    } else {
        CpuExecutor::dummy(&config, 0, limits, &progress)?
    };
    let held = executor.allocated_bytes();
    println!(
        "{} parameters, {} weight bytes, {:?}, {} threads, {:?}, loaded in {:.2?}",
        config.parameters(),
        held.weights,
        plan.resident,
        limits.threads,
        Isa::best(),
        started.elapsed()
    );
    let vocabulary = config.vocab_size;
    let blocks_each = limits.kv_blocks / 16;
    let entry = |sequence: usize, start: usize, count: usize| BatchEntry {
        sequence: SequenceId(sequence as u64),
        tokens: (start..start + count)
            .map(|position| TokenId((position * 7 + sequence) as u32 % vocabulary))
            .collect(),
        start,
        blocks: (sequence * blocks_each..(sequence + 1) * blocks_each)
            .map(|block| BlockId(block as u32))
            .collect(),
        wants_logits: true,
    };
    let mut logits = Logits::default();
    let mut step = |entries: Vec<BatchEntry>| -> Result<Duration, Failure> {
        let started = Instant::now();
        executor.execute(&Batch { entries }, &mut logits)?;
        Ok(started.elapsed())
    };
    let chunk = CHUNK as usize;
    let prefill = median(|| step(vec![entry(0, 0, chunk)]))?;
    println!(
        "prefill of {chunk} tokens: {:.0} tokens/s",
        chunk as f64 / prefill.as_secs_f64()
    );
    for sequences in SEQUENCES {
        for sequence in 0..sequences {
            step(vec![entry(sequence, 0, CONTEXT)])?;
        }
        let decode = median(|| {
            (0..STEPS).try_fold(Duration::ZERO, |sum, at| {
                let entries = (0..sequences).map(|s| entry(s, CONTEXT + at, 1)).collect();
                Ok(sum + step(entries)?)
            })
        })?;
        let per_step = decode.as_secs_f64() / STEPS as f64;
        let bytes =
            held.weights as f64 * config.active_parameters() as f64 / config.parameters() as f64;
        println!(
            "decode of {sequences:2} sequences: {:.0} tokens/s, {:.0} µs a step, {:.1} GB/s of active weights",
            sequences as f64 / per_step,
            per_step * 1e6,
            bytes / per_step / 1e9
        );
    }
    Ok(())
}

fn median(mut run: impl FnMut() -> Result<Duration, Failure>) -> Result<Duration, Failure> {
    let mut times = Vec::new();
    for _ in 0..RUNS {
        times.push(run()?);
    }
    times.sort();
    Ok(times[RUNS / 2])
}
