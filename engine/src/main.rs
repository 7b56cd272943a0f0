//! The `engine` binary: serve a model, inspect one, plan its memory, pack its weights.
//!
//! Wiring only: what is decided is decided in the crates below; here the environment, files, clocks and signals enter.

mod bandwidth;
mod cli;
mod companions;
mod configure;
mod device;
mod dummy;
mod inspect;
mod last_words;
mod load;
mod mapping;
mod pack;
mod plan;
mod ranks;
#[cfg(test)]
mod reference;
mod serve;
mod telemetry;
mod weights;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    mapping::watch();
    let cli = cli::Cli::parse();
    let result = match cli.command {
        cli::Command::Serve(arguments) => serve::run(*arguments),
        cli::Command::Inspect(arguments) => return inspect::run(&arguments),
        cli::Command::Plan(arguments) => plan::run(&arguments),
        cli::Command::Pack(arguments) => pack::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
