//! `engine inspect`: what a model is, without its weights, as the operator reads it.

use std::path::PathBuf;
use std::process::ExitCode;

use engine_load::{FetchSettings, LoadError};
use engine_spec::{InspectError, InspectReport, ModelFault};

use crate::cli::InspectArguments;

/// Writes the report; fails when the model cannot be served or the report cannot be written.
pub fn run(arguments: &InspectArguments) -> ExitCode {
    let report = match inspect(arguments) {
        Ok(facts) => InspectReport::Facts(Box::new(facts)),
        Err(error) => InspectReport::Error(InspectError {
            // What is no fault of the model is a fault of getting at it.
            reason: error.fault().unwrap_or(ModelFault::SourceUnreachable),
            message: error.chain(),
        }),
    };
    let text = report.to_message();
    println!("{text}");
    if let Some(file) = &arguments.output
        && let Err(error) = std::fs::write(file, &text)
    {
        eprintln!(
            "error: --output {} cannot be written: {error}",
            file.display()
        );
        return ExitCode::FAILURE;
    }
    match report {
        InspectReport::Facts(_) => ExitCode::SUCCESS,
        InspectReport::Error(_) => ExitCode::FAILURE,
    }
}

fn inspect(arguments: &InspectArguments) -> Result<engine_spec::ModelFacts, LoadError> {
    // Nothing is kept.
    let settings = FetchSettings::from_lookup(PathBuf::new(), |name| std::env::var(name).ok());
    engine_load::inspect_source(&arguments.model, arguments.revision.as_deref(), &settings)
}
