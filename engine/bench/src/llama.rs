//! llama.cpp on the same threads, by its own benchmark program.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::RUNS;

/// Tokens per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Theirs {
    /// A prompt of 512 tokens.
    pub prefill: f64,
    /// One sequence, 128 tokens.
    pub decode: f64,
}

/// One entry of `llama-bench --output json`.
#[derive(Deserialize)]
struct Entry {
    n_prompt: u32,
    n_gen: u32,
    samples_ts: Vec<f64>,
}

/// Runs it.
///
/// # Errors
/// When the program fails or prints something else than expected.
pub(crate) fn measure(program: &Path, model: &Path, threads: usize) -> anyhow::Result<Theirs> {
    let output = Command::new(program)
        .arg("--model")
        .arg(model)
        .args(["--n-prompt", "512", "--n-gen", "128", "--output", "json"])
        .args(["--threads", &threads.to_string()])
        .args(["--repetitions", &RUNS.to_string()])
        .output()
        .with_context(|| format!("--llama-bench {}", program.display()))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("llama-bench ended with {}: {}", output.status, words.trim());
    }
    parse(&output.stdout)
}

fn parse(json: &[u8]) -> anyhow::Result<Theirs> {
    let entries: Vec<Entry> =
        serde_json::from_slice(json).context("what llama-bench printed is not understood")?;
    let rate = |prompt: u32, generated: u32| {
        let entry = entries
            .iter()
            .find(|entry| (entry.n_prompt, entry.n_gen) == (prompt, generated))
            .with_context(|| format!("llama-bench has no test of {prompt} and {generated}"))?;
        let mut samples = entry.samples_ts.clone();
        samples.sort_by(f64::total_cmp);
        let middle = samples.get(samples.len() / 2).copied();
        middle.context("llama-bench has no samples")
    };
    Ok(Theirs {
        prefill: rate(512, 0)?,
        decode: rate(0, 128)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_tests_are_found_and_the_middle_sample_counts() {
        let json = br#"[{"n_prompt":512,"n_gen":0,"avg_ts":9.0,"samples_ts":[3.0,1.0,2.0]},
            {"n_prompt":0,"n_gen":128,"samples_ts":[5.0]}]"#;
        let expected = Theirs {
            prefill: 2.0,
            decode: 5.0,
        };
        assert_eq!(parse(json).unwrap(), expected);
        assert!(parse(b"[]").is_err() && parse(b"no").is_err());
    }
}
