//! `make bench-engine`: what the CPU engine reaches of what the machine allows, and of what llama.cpp reaches.
//!
//! Everything is measured in one run on one machine: the bounds (read bandwidth, multiply-add rates), our engine on a
//! random checkpoint, and, where `--llama-bench` names it, llama.cpp on a model of the same shape. Each figure is the
//! median of five runs; rows go to a JSON file and, as a table, to the terminal.

mod checkpoint;
mod engine;
mod llama;
mod machine;
mod report;

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use report::{Report, Row};

/// Runs of each measurement.
pub(crate) const RUNS: usize = 5;

/// Measures the CPU engine.
#[derive(Parser)]
struct Arguments {
    /// Shape of the model: a config.json.
    #[arg(long, default_value = "engine/bench/model/config.json")]
    config: PathBuf,
    /// Threads of both engines [default: all that this process may use].
    #[arg(long)]
    threads: Option<usize>,
    /// llama.cpp's llama-bench, to be measured beside.
    #[arg(long, requires = "llama_model")]
    llama_bench: Option<PathBuf>,
    /// A GGUF file of the same shape and element size.
    #[arg(long)]
    llama_model: Option<PathBuf>,
    /// Where the rows go.
    #[arg(long, default_value = "docs/performance/engine.json")]
    out: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let threads = arguments
        .threads
        .unwrap_or_else(engine_cpu::available_threads);
    let text = std::fs::read_to_string(&arguments.config)
        .with_context(|| format!("--config {}", arguments.config.display()))?;
    let config = engine_spec::ModelConfig::from_hf_json(&text)?;
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("config.json"), &text)?;
    checkpoint::write(&config, dir.path())?;

    let mut report = Report::new(threads);
    let bounds = machine::measure(threads);
    report.push(Row::plain(
        "read bandwidth",
        bounds.read_bytes / 1e9,
        "GB/s",
    ));
    report.push(Row::plain(
        "float32 multiply-add peak",
        bounds.f32_flops / 1e9,
        "GFLOP/s",
    ));
    if let Some(flops) = bounds.bf16_flops {
        report.push(Row::plain(
            "bfloat16 dot product peak",
            flops / 1e9,
            "GFLOP/s",
        ));
    }
    report.push(Row::plain(
        "one wait for all threads",
        wait_seconds(threads)? * 1e6,
        "us",
    ));
    let ours = engine::measure(&config, dir.path(), threads, &bounds, &mut report)?;
    if let (Some(program), Some(model)) = (&arguments.llama_bench, &arguments.llama_model) {
        let theirs = llama::measure(program, model, threads)?;
        let prefill = "prefill of 512 tokens, against llama.cpp";
        report.push(Row::against(
            prefill,
            ours.prefill,
            "tokens/s",
            theirs.prefill,
            Some(2.0),
        ));
        let decode = "decode of 1 sequence, against llama.cpp";
        report.push(Row::against(
            decode,
            ours.decode,
            "tokens/s",
            theirs.decode,
            Some(1.5),
        ));
    }
    report.finish(&arguments.out)
}

/// Seconds of a region in which each thread has nothing to do; a step has some ten a layer.
fn wait_seconds(threads: usize) -> anyhow::Result<f64> {
    const REGIONS: u32 = 10_000;
    let mut pool = engine_cpu::Pool::new(threads)?;
    median(|| {
        let started = std::time::Instant::now();
        for _ in 0..REGIONS {
            pool.run(threads.max(2), &|_| ())?;
        }
        Ok(started.elapsed().as_secs_f64() / f64::from(REGIONS))
    })
}

/// The middle one of [`RUNS`] results.
pub(crate) fn median(mut run: impl FnMut() -> anyhow::Result<f64>) -> anyhow::Result<f64> {
    let mut results = (0..RUNS)
        .map(|_| run())
        .collect::<anyhow::Result<Vec<f64>>>()?;
    results.sort_by(f64::total_cmp);
    Ok(results[RUNS / 2])
}
