//! `make bench-fleet`: how fast the operator plans and acts, beside the limit that a bare client sets.
//!
//! Rows are medians of several runs in one process on one machine. Ratios compare with a reference of the same run, so
//! that a slow machine slows both. Writes `docs/performance/fleet.json`; a run of some parts keeps the rows of the others.

mod beside;
mod churn;
mod clocks;
mod cluster;
mod large;
mod lists;
mod objects;
mod operator;
mod planning;
mod rival_stories;
mod rivals;
mod runs;
mod stories;
mod writes;

use std::path::PathBuf;

use anyhow::{Result, bail};
use bench_report::Report;
use clap::{Parser, ValueEnum};
use cluster::{Found, Part};
use rivals::Given;
use runs::Runs;

/// Measures the operator.
#[derive(Parser)]
#[command(name = "bench-fleet", version, about)]
struct Arguments {
    /// Only the pure part: plans of 10,000 GPUs; no cluster.
    #[arg(long)]
    plans_only: bool,
    /// Replicas of the one model that is created on the control plane.
    #[arg(long, value_name = "NUMBER", default_value_t = 1000)]
    replicas: u32,
    /// Simulated nodes of eight GPUs.
    #[arg(long, value_name = "NUMBER", default_value_t = 1250)]
    nodes: u32,
    /// Runs of all parts, or of one; the median counts. Unless given, large runs once, rival-stories twice, the others five times.
    #[arg(long, value_name = "[PART=]NUMBER", value_delimiter = ',')]
    runs: Vec<runs::Given>,
    /// What is measured on a control plane.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Part::value_variants().to_vec())]
    parts: Vec<Part>,
    /// Another project's controller to hold ours against: kubeai, kthena or aibrix. May be repeated.
    #[arg(long, value_name = "NAME=BINARY")]
    rival: Vec<Given>,
    /// Its custom resource definitions: a file, or a folder of nothing else.
    #[arg(long, value_name = "NAME=PATH")]
    rival_crds: Vec<Given>,
    /// Its version, for the table.
    #[arg(long, value_name = "NAME=TEXT")]
    rival_version: Vec<Given>,
    /// ModelDeployments of the large fleet, over which the operator is restarted.
    #[arg(long, value_name = "NUMBER", default_value_t = 1000)]
    large_models: u32,
    /// Replicas of each of them, of one GPU.
    #[arg(long, value_name = "NUMBER", default_value_t = 10)]
    large_replicas: u32,
    /// The operator's binary; absent: the newest that cargo built.
    #[arg(long, value_name = "FILE")]
    operator: Option<PathBuf>,
    /// Where the figures go.
    #[arg(
        long,
        value_name = "FILE",
        default_value = "docs/performance/fleet.json"
    )]
    out: PathBuf,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let runs = Runs::new(&arguments.runs);
    // Read before anything is measured: a file that is no report is better known now than in an hour.
    let earlier = Report::read(&arguments.out)?;
    let is_whole = !arguments.plans_only
        && Part::value_variants()
            .iter()
            .all(|part| arguments.parts.contains(part));
    let mut found = Found::default();
    let mut rows = planning::rows(arguments.nodes, arguments.replicas, runs.of_others())?;
    if !arguments.plans_only {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let bench = cluster::Bench {
            replicas: arguments.replicas,
            nodes: arguments.nodes,
            runs,
            parts: arguments.parts,
            large: large::Size {
                models: arguments.large_models,
                replicas: arguments.large_replicas,
            },
            operator: arguments.operator,
            rivals: rivals::rivals(
                &arguments.rival,
                &arguments.rival_crds,
                &arguments.rival_version,
            )?,
        };
        found = runtime.block_on(bench.rows())?;
        rows.append(&mut found.rows);
    }
    let Found { failed, times, .. } = found;
    let mut report = Report::new(&command(), std::thread::available_parallelism()?.get());
    rows.into_iter().for_each(|row| report.push(row));
    if let Some(earlier) = earlier
        && !(is_whole && failed.is_empty())
    {
        report.keep(earlier);
    }
    report.finish(&arguments.out)?;
    if !times.is_empty() {
        println!("time taken: {}", times.join(", "));
    }
    if !failed.is_empty() {
        bail!("not measured: {}", failed.join("; "));
    }
    Ok(())
}

/// What makes the figures again.
fn command() -> String {
    let flags: Vec<String> = std::env::args().skip(1).collect();
    match flags.is_empty() {
        true => "make bench-fleet".into(),
        false => format!("make bench-fleet FLAGS=\"{}\"", flags.join(" ")),
    }
}
