//! The `operator` binary: serves ModelDeployments on a Kubernetes cluster.

mod admin;
mod config;
mod controller;
mod memory;
mod metrics;
mod queue;
#[cfg(test)]
mod reference;
mod run;
mod telemetry;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{Arguments, Config};

/// The cachalot operator: serves language models as fleets of replicas, one ModelDeployment each.
#[derive(Parser)]
#[command(name = "operator", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Watch ModelDeployments and make them so.
    Run(Box<Arguments>),
}

fn main() -> ExitCode {
    let Command::Run(arguments) = Cli::parse().command;
    match start(*arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The log may not have started; this line is for whoever typed the command.
            eprintln!("operator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: Arguments) -> anyhow::Result<()> {
    memory::share();
    telemetry::start(&arguments.log_level, arguments.log_format)?;
    let config = Config::try_from(arguments)?;
    // The work is waiting; two threads do it, and each further one costs memory.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let result = runtime.block_on(run::run(config));
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    result
}
