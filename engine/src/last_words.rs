//! What a failed engine leaves behind: its termination message, and in it the GPU that is the cause.
//!
//! Written when the failure is known, not at the end: a liveness probe may end the process meanwhile, and whoever ends it,
//! the message is there.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use engine_cuda::Opened;
use engine_spec::EndReport;

/// Who writes it.
pub struct LastWords {
    opened: Opened,
    file: PathBuf,
}

impl LastWords {
    /// About these GPUs, into this file.
    pub fn new(opened: Opened, file: PathBuf) -> Self {
        Self { opened, file }
    }

    /// Writes why the engine ends; returns it, with the GPU that is the cause if one is.
    pub fn say(&self, failure: String) -> String {
        let gpu_fault = self.opened.fault();
        let message = match &gpu_fault {
            Some(fault) => format!("{} is at fault: {failure}", fault.uuid),
            None => failure,
        };
        let report = EndReport { gpu_fault, message };
        match write(&self.file, &report.to_message()) {
            // Kubernetes makes it; without Kubernetes nobody reads it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(file = %self.file.display(), %error, "the termination message cannot be written");
            }
            Ok(()) => {}
        }
        report.message
    }
}

fn write(file: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).truncate(true).open(file)?;
    file.write_all(text.as_bytes())
}
