//! `make bench-engine`: what the CPU engine reaches of what the machine allows, and of what llama.cpp reaches.
//!
//! Everything is measured in one run on one machine: the bounds (read bandwidth, multiply-add rates), our engine on a
//! random checkpoint, and, where `--llama-bench` names it, llama.cpp on a model of the same shape. Each figure is the
//! median of five runs; rows go to a JSON file and, as a table, to the terminal.

mod binary;
mod checkpoint;
mod drafts;
mod engine;
mod llama;
mod machine;
mod scheduler;

use std::path::PathBuf;

use anyhow::Context;
use bench_report::{Report, Row};
use clap::Parser;

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
    #[arg(long, requires = "llama_models")]
    llama_bench: Option<PathBuf>,
    /// Folder with GGUF files of the same shape: model-bf16.gguf, model-q8_0.gguf, model-q4_k_m.gguf.
    #[arg(long)]
    llama_models: Option<PathBuf>,
    /// Measure drafts and nothing else.
    #[arg(long)]
    drafts_only: bool,
    /// The engine's binary, to be measured from outside: its size and its start.
    #[arg(long)]
    engine: Option<PathBuf>,
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
    if arguments.drafts_only {
        let mut report = Report::new("engine-bench --drafts-only", threads);
        drafts::measure(&config, threads, &mut report)?;
        return report.finish(&arguments.out);
    }
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("config.json"), &text)?;
    checkpoint::write(&config, dir.path())?;

    let mut report = Report::new("make bench-engine", threads);
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
    if let Some(operations) = bounds.int8_ops {
        report.push(Row::plain(
            "int8 dot product (VNNI) peak",
            operations / 1e9,
            "GOP/s",
        ));
    }
    report.push(Row::plain(
        "one wait for all threads",
        wait_seconds(threads)? * 1e6,
        "us",
    ));
    report.push(scheduler::row()?);
    if let Some(program) = &arguments.engine {
        let weights = std::fs::metadata(dir.path().join("model.safetensors"))?.len();
        let rows = binary::rows(program, dir.path(), weights, bounds.read_bytes)?;
        rows.into_iter().for_each(|row| report.push(row));
    }
    let ours = engine::measure(&config, dir.path(), threads, &bounds, &mut report)?;
    if let (Some(program), Some(models)) = (&arguments.llama_bench, &arguments.llama_models) {
        for (ours, kind) in ours.iter().zip(["bf16", "q8_0", "q4_k_m"]) {
            let model = models.join(format!("model-{kind}.gguf"));
            let theirs = llama::measure(program, &model, threads)?;
            let against = format!("{} against llama.cpp's {kind}", ours.form);
            for (what, ours, theirs, goal) in [
                ("prefill of 512 tokens", ours.prefill, theirs.prefill, 2.0),
                ("decode of 1 sequence", ours.decode, theirs.decode, 1.5),
            ] {
                let name = format!("{what}, {against}");
                report.push(Row::against(&name, ours, "tokens/s", theirs, Some(goal)));
            }
        }
    }
    drafts::measure(&config, threads, &mut report)?;
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
