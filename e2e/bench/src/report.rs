//! Figures in the form that all benchmarks of the repository share.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// The median.
    pub value: f64,
    /// Its unit.
    pub unit: String,
    /// What it is compared with in the same run; none when it stands alone.
    pub reference: Option<f64>,
    /// Value over reference.
    pub ratio: Option<f64>,
    /// The goal for the ratio where there is one, else for the value; in words.
    pub goal: String,
    /// Whether it is met.
    pub met: bool,
}

#[derive(Serialize)]
struct Report {
    machine: String,
    command: String,
    commit: String,
    rows: Vec<Row>,
}

/// A row whose value must stay below a limit.
pub fn below(name: &str, value: f64, unit: &str, limit: f64) -> Row {
    Row {
        name: name.into(),
        value,
        unit: unit.into(),
        reference: None,
        ratio: None,
        goal: format!("< {limit} {unit}"),
        met: value < limit,
    }
}

/// A row whose value must reach a share of a reference.
pub fn share(name: &str, value: f64, unit: &str, reference: f64, least: f64) -> Row {
    let ratio = value / reference;
    Row {
        name: name.into(),
        value,
        unit: unit.into(),
        reference: Some(reference),
        ratio: Some(ratio),
        goal: format!("ratio >= {least}"),
        met: ratio >= least,
    }
}

/// The value in the middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Writes the report, and the rows as a table for whoever waits.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, rows: Vec<Row>) -> Result<()> {
    for row in &rows {
        let ratio = row
            .ratio
            .map_or(String::new(), |ratio| format!(", ratio {ratio:.3}"));
        let met = if row.met { "met" } else { "MISSED" };
        println!(
            "{}: {:.3} {}{ratio} ({} {met})",
            row.name, row.value, row.unit, row.goal
        );
    }
    let report = Report {
        machine: machine(),
        command: std::env::args()
            .skip(1)
            .fold("bench-fleet".into(), |line, word| line + " " + &word),
        commit: commit(),
        rows,
    };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut text = serde_json::to_string_pretty(&report)?;
    text.push('\n');
    std::fs::write(path, text).with_context(|| path.display().to_string())
}

/// Processor, cores and memory, as Linux tells them.
fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':'))
            .map_or("unknown".into(), |(_, value)| value.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "{}, {cores} cores, memory {}",
        field(&read("/proc/cpuinfo"), "model name"),
        field(&read("/proc/meminfo"), "MemTotal")
    )
}

fn commit() -> String {
    let output = Command::new("git")
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .output();
    output.map_or("unknown".into(), |output| {
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    })
}
