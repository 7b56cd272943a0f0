//! Rows of a benchmark: a figure, what it is held against, and whether the goal is met.

use std::path::Path;

use anyhow::Context;
use serde::Serialize;

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    name: String,
    value: f64,
    unit: String,
    /// What it is held against, in the same unit.
    reference: Option<f64>,
    /// `value / reference`.
    ratio: Option<f64>,
    /// The ratio that is wanted.
    goal: Option<f64>,
    met: Option<bool>,
}

impl Row {
    /// A figure without a reference.
    pub fn plain(name: &str, value: f64, unit: &str) -> Self {
        Self {
            name: name.into(),
            value,
            unit: unit.into(),
            reference: None,
            ratio: None,
            goal: None,
            met: None,
        }
    }

    /// A figure held against another; more is better.
    pub fn against(name: &str, value: f64, unit: &str, reference: f64, goal: Option<f64>) -> Self {
        let ratio = value / reference;
        Self {
            reference: Some(reference),
            ratio: Some(ratio),
            goal,
            met: goal.map(|goal| ratio >= goal),
            ..Self::plain(name, value, unit)
        }
    }
}

/// All rows of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: String,
    command: String,
    commit: String,
    rows: Vec<Row>,
}

impl Report {
    /// A report without rows; prints the head of the table.
    pub fn new(threads: usize) -> Self {
        let machine = format!("{}, {threads} threads", processor());
        println!("{machine}\n");
        println!(
            "{:56} {:>10} {:9} {:>10} {:>7} {:>6}",
            "", "value", "", "reference", "ratio", "goal"
        );
        Self {
            machine,
            command: "make bench-engine".into(),
            commit: commit(),
            rows: Vec::new(),
        }
    }

    /// Keeps a row and prints it.
    pub fn push(&mut self, row: Row) {
        let number = |value: Option<f64>| value.map(short).unwrap_or_default();
        let verdict = match row.met {
            None => "",
            Some(true) => "met",
            Some(false) => "missed",
        };
        println!(
            "{:56} {:>10} {:9} {:>10} {:>7} {:>6} {verdict}",
            row.name,
            short(row.value),
            row.unit,
            number(row.reference),
            row.ratio.map(|r| format!("{r:.2}")).unwrap_or_default(),
            number(row.goal),
        );
        self.rows.push(row);
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(self, path: &Path) -> anyhow::Result<()> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let text = serde_json::to_string_pretty(&self)? + "\n";
        std::fs::write(path, text).with_context(|| format!("--out {}", path.display()))?;
        println!("\nwritten to {}", path.display());
        Ok(())
    }
}

/// Three significant digits.
fn short(value: f64) -> String {
    let digits = if value == 0.0 {
        0
    } else {
        (2.0 - value.abs().log10().floor()).max(0.0) as usize
    };
    format!("{value:.digits$}")
}

fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .map(|rest| rest.trim_matches([' ', '\t', ':']).to_owned())
            .unwrap_or_else(|| "?".into())
    };
    format!(
        "{} (family {}, model {})",
        field("model name"),
        field("cpu family"),
        field("model\t")
    )
}

fn commit() -> String {
    let output = std::process::Command::new("git")
        .args(["describe", "--always", "--dirty"])
        .output();
    output
        .ok()
        .filter(|output| output.status.success())
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_else(|| "unknown".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_met_from_its_ratio_on() {
        let row = |value| Row::against("x", value, "GB/s", 10.0, Some(0.85));
        assert_eq!(row(8.5).met, Some(true));
        assert_eq!(row(8.4).met, Some(false));
        assert_eq!(Row::against("x", 1.0, "GB/s", 10.0, None).met, None);
    }

    #[test]
    fn numbers_have_three_digits() {
        let shown: Vec<String> = [0.0, 0.01234, 1.5, 37.94, 1413.2].map(short).into();
        assert_eq!(shown, ["0", "0.0123", "1.50", "37.9", "1413"]);
    }
}
