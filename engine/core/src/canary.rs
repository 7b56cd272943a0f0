//! The first answer of a freshly loaded model, decoded before anyone may ask for one.
//!
//! A fixed prompt is decoded greedily twice: alone and in one piece; then in other blocks, its prompt cut in two,
//! beside another sequence. Every logit must be finite and both answers must be the same, which a wrong weight, a
//! wrong block address or a kernel that reads its neighbour's row does not survive. Where drafts are asked for, the
//! prediction layer goes on from the prompt once.

use thiserror::Error;

use crate::batch::{
    Batch, BatchEntry, BlockId, DraftBatch, ExecuteError, Executor, Logits, SequenceId, TokenId,
};
use crate::limits::Limits;
use crate::sampling::argmax;

const PROMPT_LEN: usize = 8;
const ANSWER_LEN: usize = 4;

/// What the canary saw.
#[derive(Clone, Debug, PartialEq)]
pub struct CanaryReport {
    /// The answer.
    pub tokens: Vec<TokenId>,
    /// Largest difference of a logit between the two decodes; 0 for a batch-invariant backend.
    pub deviation: f32,
}

/// Why a model must not be served.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum CanaryError {
    /// The backend failed.
    #[error(transparent)]
    Execute(#[from] ExecuteError),
    /// Rows or columns are missing.
    #[error("the backend gave {rows} rows of {vocabulary} logits")]
    Shape {
        /// Rows it gave.
        rows: usize,
        /// Values in a row.
        vocabulary: usize,
    },
    /// Broken weights or arithmetic.
    #[error("the logit of token {token} at step {step} is not finite")]
    NonFinite {
        /// Whose logit.
        token: TokenId,
        /// In which step.
        step: usize,
    },
    /// All logits are the same: nothing was computed.
    #[error("all logits of step {step} are equal")]
    Flat {
        /// In which step.
        step: usize,
    },
    /// The prediction layer gives no logits that drafts could come from.
    #[error("the prediction layer: {0}")]
    Draft(Box<CanaryError>),
    /// The answer depends on what else is in the batch.
    #[error("the answer is {alone:?} alone but {beside:?} beside another sequence")]
    Differs {
        /// Decoded alone.
        alone: Vec<TokenId>,
        /// Decoded in a batch.
        beside: Vec<TokenId>,
    },
}

struct Run<'a> {
    executor: &'a mut dyn Executor,
    logits: Logits,
    vocabulary: usize,
}

impl Run<'_> {
    /// Executes and returns the last row, checked.
    fn row(&mut self, entries: Vec<BatchEntry>, step: usize) -> Result<Vec<f32>, CanaryError> {
        let batch = Batch { entries };
        let rows = batch.logits_rows();
        self.executor.execute(&batch, &mut self.logits)?;
        if rows == 0 {
            return Ok(Vec::new());
        }
        self.checked_row(rows, step)
    }

    /// Lets the prediction layer go on from an entry that was just executed; `tokens` are its own and the next one.
    fn draft(&mut self, tokens: &[TokenId], blocks: &[BlockId]) -> Result<(), CanaryError> {
        let pass = DraftBatch {
            batch: Batch {
                entries: vec![BatchEntry {
                    start: 0,
                    ..entry(0, tokens, 1..tokens.len(), blocks)
                }],
            },
            rows: vec![0],
        };
        self.executor.draft(&pass, &mut self.logits)?;
        self.checked_row(1, 0)
            .map(|_| ())
            .map_err(|error| CanaryError::Draft(Box::new(error)))
    }

    /// The last of `rows` rows.
    fn checked_row(&self, rows: usize, step: usize) -> Result<Vec<f32>, CanaryError> {
        if (self.logits.rows(), self.logits.vocabulary()) != (rows, self.vocabulary) {
            return Err(CanaryError::Shape {
                rows: self.logits.rows(),
                vocabulary: self.logits.vocabulary(),
            });
        }
        let row = self.logits.row(rows - 1).to_vec();
        if let Some(index) = row.iter().position(|logit| !logit.is_finite()) {
            return Err(CanaryError::NonFinite {
                token: TokenId(index as u32),
                step,
            });
        }
        if self.vocabulary > 1 && row.iter().all(|logit| *logit == row[0]) {
            return Err(CanaryError::Flat { step });
        }
        Ok(row)
    }
}

fn entry(
    sequence: u64,
    tokens: &[TokenId],
    range: std::ops::Range<usize>,
    blocks: &[BlockId],
) -> BatchEntry {
    BatchEntry {
        sequence: SequenceId(u64::MAX - sequence),
        tokens: tokens[range.clone()].to_vec(),
        start: range.start,
        blocks: blocks.to_vec(),
        wants_logits: range.end == tokens.len(),
        drafts: 0,
    }
}

/// Tokens spread over the vocabulary, `salt` apart.
fn prompt(vocabulary: usize, len: usize, salt: usize) -> Vec<TokenId> {
    (0..len)
        .map(|index| TokenId(((index * 7919 + salt * 104_729) % vocabulary) as u32))
        .collect()
}

/// Decodes the canary. Uses the first blocks of the cache, which must not hold anything.
///
/// # Errors
/// See [`CanaryError`].
pub fn run_canary(
    executor: &mut dyn Executor,
    limits: &Limits,
) -> Result<CanaryReport, CanaryError> {
    let vocabulary = limits.vocabulary;
    let answer_len = ANSWER_LEN.min(limits.max_model_len - 1);
    let prompt_len = PROMPT_LEN
        .min(limits.max_model_len - answer_len)
        .min(limits.max_num_batched_tokens);
    let per_sequence = (prompt_len + answer_len).div_ceil(limits.block_size);
    let blocks: Vec<BlockId> = (0..limits.block_count as u32).map(BlockId).collect();
    let mut run = Run {
        executor,
        logits: Logits::default(),
        vocabulary,
    };

    let mut alone = prompt(vocabulary, prompt_len, 1);
    let mut rows = Vec::new();
    let mut done = 0;
    for step in 0..answer_len {
        let batch = vec![entry(0, &alone, done..alone.len(), &blocks[..per_sequence])];
        done = alone.len();
        let row = run.row(batch, step)?;
        alone.push(argmax(&row));
        rows.push(row);
        if step == 0 && limits.draft_tokens > 0 {
            run.draft(&alone, &blocks[..per_sequence])?;
        }
    }

    // The second pass needs room for two; a cache for exactly one sequence repeats the first alone.
    let half = prompt_len / 2;
    let room_for_two = blocks.len() >= 2 * per_sequence
        && limits.max_num_seqs >= 2
        && limits.max_num_batched_tokens >= 2 * prompt_len - half;
    let (own, other) = match room_for_two {
        true => (
            &blocks[per_sequence..2 * per_sequence],
            Some(&blocks[..per_sequence]),
        ),
        false => (&blocks[..per_sequence], None),
    };
    let mut neighbour = prompt(vocabulary, prompt_len, 2);
    let mut beside = prompt(vocabulary, prompt_len, 1);
    if half > 0 {
        run.row(vec![entry(1, &beside, 0..half, own)], 0)?;
    }
    let (mut done, mut neighbour_done) = (half, 0);
    let mut deviation = 0.0f32;
    for (step, expected) in rows.iter().enumerate() {
        let mut batch = Vec::new();
        if let Some(other) = other {
            let range = neighbour_done..neighbour.len();
            batch.push(entry(2, &neighbour, range, other));
            neighbour_done = neighbour.len();
            neighbour.push(TokenId((step % vocabulary) as u32));
        }
        batch.push(entry(1, &beside, done..beside.len(), own));
        done = beside.len();
        let row = run.row(batch, step)?;
        beside.push(argmax(&row));
        for (left, right) in row.iter().zip(expected) {
            deviation = deviation.max((left - right).abs());
        }
    }
    if alone != beside {
        return Err(CanaryError::Differs {
            alone: alone.split_off(prompt_len),
            beside: beside.split_off(prompt_len),
        });
    }
    Ok(CanaryReport {
        tokens: alone.split_off(prompt_len),
        deviation,
    })
}
