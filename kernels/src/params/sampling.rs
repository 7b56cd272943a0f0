//! Arguments of the sampling kernels.

use super::{Address, Field, Params, sealed};
use std::mem::size_of;

/// Numbers of a row, in the order of the kernels: temperature, top_p, min_p, presence, frequency, repetition.
pub const SAMPLE_NUMBERS: usize = 6;

params!(
    /// `out` = logits with bias, penalties and mask of each row.
    SampleAdjustParams, 96, {
        /// f32 `[rows, stride]`.
        logits: Address,
        /// f32 `[rows, stride]`.
        out: Address,
        /// u32 `[rows, stride]`, scratch.
        counts: Address,
        /// f32 `[rows, SAMPLE_NUMBERS]`.
        numbers: Address,
        /// i32, of all rows: prompt, output, prompt, output and so on.
        tokens: Address,
        /// i32 `[2 * rows + 1]`: a row's prompt begins at `2 * row`, its output at `2 * row + 1`.
        offsets: Address,
        /// i32, of all rows, each token of a row once.
        bias_tokens: Address,
        /// f32, one for each of those.
        bias: Address,
        /// i32 `[rows + 1]`, or null.
        bias_offsets: Address,
        /// u32 `[rows, mask_stride]`, bit `i % 32` of word `i / 32` allows token i; or null.
        mask: Address,
        /// Rows.
        rows: i32,
        /// Logits per row.
        vocabulary: i32,
        /// Between rows.
        stride: i32,
        /// Between rows of the mask.
        mask_stride: i32,
    }
);

params!(
    /// The next token of each row.
    SampleParams, 56, {
        /// f32 `[rows, stride]`; minus infinity is never drawn.
        logits: Address,
        /// f32 `[rows, SAMPLE_NUMBERS]`.
        numbers: Address,
        /// i32 `[rows]`; 0 keeps all.
        top_k: Address,
        /// i64 `[rows, {seed, choice, position}]`.
        draws: Address,
        /// i32 `[rows]`; -1 when nothing is allowed.
        chosen: Address,
        /// Rows.
        rows: i32,
        /// Logits per row.
        vocabulary: i32,
        /// Between rows.
        stride: i32,
        /// Zero.
        reserved: i32,
    }
);

params!(
    /// Natural log-probabilities of the rows' tokens and of their most probable ones.
    LogprobsParams, 64, {
        /// f32 `[rows, stride]`.
        logits: Address,
        /// i32 `[rows]`.
        tokens: Address,
        /// f32 `[rows]`.
        chosen: Address,
        /// i32 `[rows, top]`, best first; -1 past the vocabulary.
        top_tokens: Address,
        /// f32 `[rows, top]`.
        top_values: Address,
        /// i32 `[rows]`: the first token whose logit is not finite, or -1.
        broken: Address,
        /// Rows.
        rows: i32,
        /// Logits per row.
        vocabulary: i32,
        /// Between rows.
        stride: i32,
        /// How many are reported.
        top: i32,
    }
);
