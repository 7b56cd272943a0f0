//! How results are written: as text for people, as JSON or YAML for scripts.

use std::io::Write;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::Serialize;

/// Form of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON value.
    Json,
    /// One YAML document.
    Yaml,
}

/// Writes `value` to standard output; `text` makes the form for people.
///
/// # Errors
/// When standard output cannot be written, unless whoever read it has gone.
pub fn write<T: Serialize>(
    format: Format,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> Result<()> {
    let mut words = match format {
        Format::Text => text(value),
        Format::Json => serde_json::to_string_pretty(value)?,
        Format::Yaml => serde_yaml::to_string(value)?,
    };
    if !words.ends_with('\n') {
        words.push('\n');
    }
    match std::io::stdout().lock().write_all(words.as_bytes()) {
        // `kubectl cachalot … | head` is no mistake.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("standard output"),
    }
}

/// Columns, aligned; the last is not padded. No line ends in blanks.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.push_str(&" ".repeat(width - cell.chars().count() + 3));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
