//! Plans of sampling.

use super::{Launch, Unsupported, check, rows_check};

/// Words of a mask row: a bit per token.
pub fn mask_words(vocabulary: usize) -> usize {
    vocabulary.div_ceil(32)
}

fn of(
    operation: &'static str,
    kernel: &'static str,
    rows: usize,
    vocabulary: usize,
    shared_bytes: u32,
) -> Result<Launch, Unsupported> {
    rows_check(operation, "rows", rows)?;
    rows_check(operation, "vocabulary", vocabulary)?;
    Ok(Launch {
        kernel,
        grid: [rows as u32, 1, 1],
        threads: 512,
        shared_bytes,
    })
}

/// Bias, penalties and mask.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn sample_adjust(rows: usize, vocabulary: usize) -> Result<Launch, Unsupported> {
    of("sample_adjust", "sample_adjust_f32", rows, vocabulary, 0)
}

/// The next token of each row.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn sample(rows: usize, vocabulary: usize) -> Result<Launch, Unsupported> {
    of("sample", "sample_f32", rows, vocabulary, 704)
}

/// Log-probabilities of the rows' tokens and of their `top` best ones.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn logprobs(rows: usize, vocabulary: usize, top: usize) -> Result<Launch, Unsupported> {
    check(
        "logprobs",
        "top",
        top,
        top <= 1024 && rows.saturating_mul(top) <= i32::MAX as usize,
        "up to 1024",
    )?;
    of("logprobs", "logprobs_f32", rows, vocabulary, 576)
}
