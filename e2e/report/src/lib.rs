//! Figures of a benchmark in the one form that all of the repository share: a value, what it is held against, and whether
//! the goal is met.
//!
//! Invariant: `met` follows from the numbers of its own row, so nobody has to believe it. A row without a goal is a figure
//! and no more.

use std::fmt;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// What a goal is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Of {
    /// The value itself.
    Value,
    /// Value over reference.
    Ratio,
}

/// What is wanted of a row.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Goal {
    /// Of which number.
    pub of: Of,
    /// It must not be below this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub least: Option<f64>,
    /// It must not be above this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most: Option<f64>,
}

/// Where a figure is from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Processor, threads or cores, memory.
    pub machine: String,
    /// What makes it again.
    pub command: String,
    /// The tree that was measured.
    pub commit: String,
    /// The day.
    pub date: String,
}

/// Between which numbers the runs were.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// The least of them.
    pub least: f64,
    /// The most.
    pub most: f64,
    /// How many.
    pub runs: usize,
}

/// What several runs measured, or one number alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    /// The median.
    pub value: f64,
    /// Where there was more than one run.
    pub spread: Option<Spread>,
}

impl From<f64> for Figure {
    fn from(value: f64) -> Self {
        Self {
            value,
            spread: None,
        }
    }
}

impl FromIterator<f64> for Figure {
    fn from_iter<I: IntoIterator<Item = f64>>(runs: I) -> Self {
        let runs: Vec<f64> = runs.into_iter().collect();
        let spread = (runs.len() > 1).then(|| Spread {
            least: runs.iter().copied().fold(f64::INFINITY, f64::min),
            most: runs.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            runs: runs.len(),
        });
        Self {
            value: median(runs),
            spread,
        }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = short(self.value);
        match self.spread {
            Some(Spread { least, most, .. }) => {
                write!(to, "{value} ({} to {})", short(least), short(most))
            }
            None => write!(to, "{value}"),
        }
    }
}

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// The median of the runs.
    pub value: f64,
    /// Between which numbers the runs were, where there was more than one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread: Option<Spread>,
    /// Its unit.
    pub unit: String,
    /// What it is held against in the same run, in the same unit.
    pub reference: Option<f64>,
    /// Between which numbers the runs of the reference were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference_spread: Option<Spread>,
    /// `value / reference`.
    pub ratio: Option<f64>,
    /// What is wanted.
    pub goal: Option<Goal>,
    /// Whether it is met.
    pub met: Option<bool>,
    /// Where it is from, if not from the run that wrote the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
}

impl Row {
    /// A figure alone.
    pub fn plain(name: &str, figure: impl Into<Figure>, unit: &str) -> Self {
        let Figure { value, spread } = figure.into();
        Self {
            name: name.into(),
            value,
            spread,
            unit: unit.into(),
            reference: None,
            reference_spread: None,
            ratio: None,
            goal: None,
            met: None,
            origin: None,
        }
    }

    /// A figure held against another, of which it should reach at least a share.
    pub fn against(
        name: &str,
        figure: impl Into<Figure>,
        unit: &str,
        reference: impl Into<Figure>,
        least: Option<f64>,
    ) -> Self {
        let goal = least.map(|least| Goal {
            of: Of::Ratio,
            least: Some(least),
            most: None,
        });
        Self::plain(name, figure, unit)
            .beside(reference.into())
            .with(goal)
    }

    /// A figure that must not be above a limit.
    pub fn below(name: &str, figure: impl Into<Figure>, unit: &str, most: f64) -> Self {
        Self::plain(name, figure, unit).with(Some(Goal {
            of: Of::Value,
            least: None,
            most: Some(most),
        }))
    }

    /// A figure that must not be above what the machine makes it, which is its reference.
    pub fn within(name: &str, value: f64, unit: &str, reference: f64) -> Self {
        let row = Self::plain(name, value, unit).beside(reference.into());
        row.with(Some(Goal {
            of: Of::Ratio,
            least: None,
            most: Some(1.0),
        }))
    }

    fn beside(mut self, reference: Figure) -> Self {
        self.reference = Some(reference.value);
        self.reference_spread = reference.spread;
        self.ratio = Some(self.value / reference.value);
        self
    }

    fn with(mut self, goal: Option<Goal>) -> Self {
        self.goal = goal;
        self.met = self.verdict();
        self
    }

    /// What `met` must be by the other fields.
    pub fn verdict(&self) -> Option<bool> {
        let goal = self.goal?;
        let number = match goal.of {
            Of::Value => self.value,
            Of::Ratio => self.ratio?,
        };
        let (least, most) = (
            goal.least.unwrap_or(f64::MIN),
            goal.most.unwrap_or(f64::MAX),
        );
        Some((least..=most).contains(&number))
    }

    fn goal_in_words(&self) -> String {
        let Some(goal) = self.goal else {
            return String::new();
        };
        let (sign, limit) = match (goal.least, goal.most) {
            (Some(least), _) => (">=", least),
            (None, most) => ("<=", most.unwrap_or(f64::MAX)),
        };
        let verdict = match self.met {
            Some(true) => "met",
            _ => "missed",
        };
        match goal.of {
            Of::Value => format!("{sign} {} {}, {verdict}", short(limit), self.unit),
            Of::Ratio => format!("ratio {sign} {}, {verdict}", short(limit)),
        }
    }
}

/// All rows of a run, and those of earlier runs that it did not make again.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// Where its rows are from.
    #[serde(flatten)]
    pub origin: Origin,
    /// The figures.
    pub rows: Vec<Row>,
}

impl Report {
    /// A report without rows, to be made again by `command`; prints the head of the table.
    pub fn new(command: &str, threads: usize) -> Self {
        let machine = machine(threads);
        println!("{machine}\n");
        println!(
            "{:72} {:>24} {:9} {:>24} {:>7}  goal",
            "", "median (least to most)", "", "reference", "ratio"
        );
        Self {
            origin: Origin {
                machine,
                command: command.into(),
                commit: said("git", &["describe", "--always", "--dirty", "--abbrev=12"]),
                date: said("date", &["--utc", "+%F"]),
            },
            rows: Vec::new(),
        }
    }

    /// What an earlier run wrote; none where there is no file.
    ///
    /// # Errors
    /// When the file is no report.
    pub fn read(path: &Path) -> anyhow::Result<Option<Self>> {
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text.with_context(|| format!("--out {}", path.display()))?,
        };
        let report = serde_json::from_str(&text).with_context(|| {
            format!(
                "--out {}: not a report of this form; remove it or name another file",
                path.display()
            )
        })?;
        Ok(Some(report))
    }

    /// Keeps those rows of `earlier` that this run has not made, each with where it is from.
    pub fn keep(&mut self, earlier: Self) {
        let Self { origin, rows } = earlier;
        for mut row in rows {
            if self.rows.iter().all(|made| made.name != row.name) {
                row.origin.get_or_insert_with(|| origin.clone());
                self.rows.push(row);
            }
        }
    }

    /// Keeps a row and prints it.
    pub fn push(&mut self, row: Row) {
        let shown = |value, spread| Figure { value, spread }.to_string();
        println!(
            "{:72} {:>24} {:9} {:>24} {:>7}  {}",
            row.name,
            shown(row.value, row.spread),
            row.unit,
            row.reference
                .map(|reference| shown(reference, row.reference_spread))
                .unwrap_or_default(),
            row.ratio
                .map(|ratio| format!("{ratio:.2}"))
                .unwrap_or_default(),
            row.goal_in_words(),
        );
        self.rows.push(row);
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(self, path: &Path) -> anyhow::Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let text = serde_json::to_string_pretty(&self)? + "\n";
        std::fs::write(path, text).with_context(|| format!("--out {}", path.display()))?;
        println!("\nwritten to {}", path.display());
        Ok(())
    }
}

/// The value in the middle, or between the two that are.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let (half, is_even) = (values.len() / 2, values.len().is_multiple_of(2));
    match (half.checked_sub(1), is_even) {
        (None, true) => f64::NAN,
        (Some(before), true) => f64::midpoint(values[before], values[half]),
        (_, false) => values[half],
    }
}

/// Three significant digits.
fn short(value: f64) -> String {
    let digits = if value == 0.0 {
        0
    } else {
        (2.0 - value.abs().log10().floor()).clamp(0.0, 12.0) as usize
    };
    format!("{value:.digits$}")
}

/// Processor and memory, as Linux tells them.
fn machine(threads: usize) -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.trim_start().starts_with(':'))
        });
        line.and_then(|line| line.split_once(':'))
            .map_or("unknown".into(), |(_, value)| value.trim().to_owned())
    };
    let processor = read("/proc/cpuinfo");
    format!(
        "{} (family {}, model {}), {threads} threads, memory {}",
        field(&processor, "model name"),
        field(&processor, "cpu family"),
        field(&processor, "model"),
        field(&read("/proc/meminfo"), "MemTotal"),
    )
}

/// What a program prints; `unknown` when it fails.
fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output
        .ok()
        .filter(|output| output.status.success())
        .map_or("unknown".into(), |output| {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_met_from_their_limits_on() {
        let share = |value| Row::against("x", value, "GB/s", 10.0, Some(0.85)).met;
        assert_eq!((share(8.5), share(8.4)), (Some(true), Some(false)));
        assert_eq!(Row::against("x", 1.0, "GB/s", 10.0, None).met, None);
        let limit = |value| Row::below("x", value, "ms", 100.0).met;
        assert_eq!((limit(100.0), limit(100.1)), (Some(true), Some(false)));
        let bound = |value| Row::within("x", value, "s", 2.0).met;
        assert_eq!((bound(2.0), bound(2.1)), (Some(true), Some(false)));
        assert_eq!(Row::below("x", f64::NAN, "ms", 1.0).met, Some(false));
    }

    #[test]
    fn goals_are_told_in_words() {
        let row = Row::against("x", 8.4, "GB/s", 10.0, Some(0.85));
        assert_eq!(row.goal_in_words(), "ratio >= 0.850, missed");
        assert_eq!(
            Row::below("x", 4.0, "ms", 100.0).goal_in_words(),
            "<= 100 ms, met"
        );
        let shown: Vec<String> = [0.0, 0.01234, 1.5, 37.94, 1413.2].map(short).into();
        assert_eq!(shown, ["0", "0.0123", "1.50", "37.9", "1413"]);
    }

    #[test]
    fn a_row_tells_between_which_numbers_its_runs_were() {
        let runs = Figure::from_iter([3.0, 1.0, 2.5]);
        assert_eq!(runs.to_string(), "2.50 (1.00 to 3.00)");
        assert_eq!(Figure::from_iter([3.0]), Figure::from(3.0));
        assert_eq!(
            Figure::from_iter([3.0, 1.0]).to_string(),
            "2.00 (1.00 to 3.00)"
        );
        assert!(median(Vec::new()).is_nan());
        let row = Row::against("x", runs, "s", Figure::from_iter([10.0, 20.0, 10.0]), None);
        let spread = |least, most| {
            let runs = 3;
            Some(Spread { least, most, runs })
        };
        assert_eq!(row.spread, spread(1.0, 3.0));
        assert_eq!(row.reference_spread, spread(10.0, 20.0));
        assert_eq!((row.value, row.ratio), (2.5, Some(0.25)));
        let text = serde_json::to_string(&row).expect("json");
        assert_eq!(serde_json::from_str::<Row>(&text).expect("a row"), row);
        // What was written before rows had a spread.
        let old = r#"{"name":"x","value":1.0,"unit":"s","reference":null,"ratio":null,"goal":null,"met":null}"#;
        let old: Row = serde_json::from_str(old).expect("a row");
        assert_eq!(old, Row::plain("x", 1.0, "s"));
    }

    fn report(commit: &str, rows: &[(&str, f64)]) -> Report {
        let rows = rows
            .iter()
            .map(|(name, value)| Row::plain(name, *value, "s"));
        Report {
            origin: Origin {
                machine: "a machine".into(),
                command: "make x".into(),
                commit: commit.into(),
                date: "2026-01-01".into(),
            },
            rows: rows.collect(),
        }
    }

    #[test]
    fn rows_that_a_run_did_not_make_stay_with_where_they_are_from() {
        let folder = std::env::temp_dir().join(format!("report-{}", std::process::id()));
        let file = folder.join("report.json");
        assert!(Report::read(&file).expect("no file").is_none());
        let mut report_of_two = report("two", &[("a", 2.0), ("b", 2.0)]);
        report_of_two.keep(report("one", &[("b", 1.0), ("c", 1.0)]));
        report_of_two.finish(&file).expect("written");
        let mut report_of_three = report("three", &[("a", 3.0)]);
        report_of_three.keep(Report::read(&file).expect("a report").expect("a file"));
        let seen = report_of_three.rows.iter().map(|row| {
            let commit = row.origin.as_ref().map(|origin| origin.commit.as_str());
            (row.name.as_str(), row.value, commit)
        });
        let wanted = [
            ("a", 3.0, None),
            ("b", 2.0, Some("two")),
            ("c", 1.0, Some("one")),
        ];
        assert_eq!(seen.collect::<Vec<_>>(), wanted);
        std::fs::write(&file, "{}").expect("written");
        let why = format!("{:#}", Report::read(&file).expect_err("not a report"));
        assert!(
            why.contains("report.json: not a report of this form; remove it"),
            "{why}"
        );
        std::fs::remove_dir_all(folder).expect("removed");
    }

    /// What is published has this form, and its verdicts follow from its numbers.
    #[test]
    fn the_published_figures_have_this_form() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/performance");
        for name in ["engine.json", "fleet.json", "rivals.json"] {
            let text = std::fs::read_to_string(folder.join(name)).expect("a report");
            let report: Report =
                serde_json::from_str(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(
                report.origin.command.starts_with("make "),
                "{name}: {}",
                report.origin.command
            );
            assert!(!report.rows.is_empty(), "{name} has no rows");
            for row in report.rows {
                assert_eq!(row.met, row.verdict(), "{name}: {}", row.name);
                let inside = |value: f64, spread: Option<Spread>| {
                    spread.is_none_or(|s| s.least <= value && value <= s.most && s.runs > 1)
                };
                assert!(
                    inside(row.value, row.spread)
                        && row
                            .reference
                            .is_none_or(|of| inside(of, row.reference_spread)),
                    "{name}: {}",
                    row.name
                );
                let ratio = row.reference.map(|reference| row.value / reference);
                let off = row.ratio.zip(ratio).map_or(0.0, |(a, b)| (a - b).abs());
                assert!(
                    row.ratio.is_some() == ratio.is_some() && off < 1e-9,
                    "{name}: {}",
                    row.name
                );
            }
        }
    }
}
