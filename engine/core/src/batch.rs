//! The plain data that one step of the engine hands to a backend, and the trait a backend implements.
//!
//! Invariant: a [`Batch`] says everything the backend needs; the backend keeps no idea of requests, sampling or
//! scheduling. A sequence may appear at most once in a batch. Its `blocks` cover at least `start + tokens.len()`
//! positions, and the key/value entries of positions `0..start` were written by earlier steps (possibly for another
//! sequence that shares the same prefix blocks).
//!
//! Surprise: a decode step and a prefill chunk are the same thing here, an entry with one or with many tokens. What a
//! backend computes for a token must not depend on which of the two it was in, nor on the other entries.

use std::any::Any;
use std::fmt;

use thiserror::Error;

use crate::picking::Picker;

/// A token of the model's vocabulary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(pub u32);

impl TokenId {
    /// The token as an index into a logits row or an embedding table.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// A block of the key/value cache: `block_size` consecutive positions of one or more sequences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

impl BlockId {
    /// The block as an index into the cache; a backend allocates blocks `0..block_count`.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One token stream of one choice of one request. Never reused within a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// The sequences of one forward pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// One entry per sequence, in the order in which logits rows are returned.
    pub entries: Vec<BatchEntry>,
}

impl Batch {
    /// Tokens computed by this pass.
    pub fn token_count(&self) -> usize {
        self.entries.iter().map(|entry| entry.tokens.len()).sum()
    }

    /// Logits rows that this pass must produce.
    pub fn logits_rows(&self) -> usize {
        self.entries.iter().map(BatchEntry::logits_rows).sum()
    }

    /// Whether there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// What a backend has room for: a batch beyond it would make a kernel read or write outside its buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchBounds {
    /// Tokens of a step.
    pub tokens_max: usize,
    /// Logits rows of a step.
    pub logits_rows_max: usize,
    /// Positions of a sequence.
    pub positions_max: usize,
    /// Positions per block.
    pub block_size: usize,
    /// Blocks of the cache.
    pub blocks: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
}

impl BatchBounds {
    /// Checks a batch.
    ///
    /// # Errors
    /// [`ExecuteError::InvalidBatch`] with the first number out of bounds.
    pub fn check(&self, batch: &Batch) -> Result<(), ExecuteError> {
        let invalid = |problem: String| Err(ExecuteError::InvalidBatch(problem));
        let (tokens, limit) = (batch.token_count(), self.tokens_max);
        if tokens > limit {
            return invalid(format!("{tokens} tokens, the limit is {limit}"));
        }
        let (rows, limit) = (batch.logits_rows(), self.logits_rows_max);
        if rows > limit {
            return invalid(format!("{rows} logits rows, the limit is {limit}"));
        }
        for entry in &batch.entries {
            if let Err(problem) = self.check_entry(entry) {
                return invalid(format!("sequence {}: {problem}", entry.sequence.0));
            }
        }
        Ok(())
    }

    fn check_entry(&self, entry: &BatchEntry) -> Result<(), String> {
        let Self {
            positions_max,
            block_size,
            blocks,
            vocabulary,
            ..
        } = *self;
        if entry.tokens.is_empty() {
            return Err("no tokens".into());
        }
        if entry.drafts > 0 && !(entry.wants_logits && entry.drafts < entry.tokens.len()) {
            let (drafts, tokens) = (entry.drafts, entry.tokens.len());
            return Err(format!("{drafts} drafts among {tokens} tokens"));
        }
        let end = entry.start.saturating_add(entry.tokens.len());
        if end > positions_max {
            return Err(format!("{end} positions, the limit is {positions_max}"));
        }
        if entry.blocks.len() * block_size < end {
            let given = entry.blocks.len();
            return Err(format!(
                "{given} blocks of {block_size} do not cover {end} positions"
            ));
        }
        if let Some(block) = entry.blocks.iter().find(|block| block.index() >= blocks) {
            return Err(format!("block {} of {blocks}", block.0));
        }
        match entry
            .tokens
            .iter()
            .find(|token| token.index() >= vocabulary)
        {
            Some(token) => Err(format!("token {token} of a vocabulary of {vocabulary}")),
            None => Ok(()),
        }
    }
}

/// The part of one sequence that one forward pass computes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchEntry {
    /// Whose tokens these are.
    pub sequence: SequenceId,
    /// At least one token.
    pub tokens: Vec<TokenId>,
    /// Position of `tokens[0]`; positions before it are already in the cache.
    pub start: usize,
    /// The whole block table of the sequence: position `p` lives in `blocks[p / block_size]`.
    pub blocks: Vec<BlockId>,
    /// Whether the logits after the last of `tokens` are needed.
    pub wants_logits: bool,
    /// How many of the last of `tokens` are drafts, fewer than all. The logits after each of them and after the token
    /// before them are needed, in this order, and `wants_logits` is set.
    pub drafts: usize,
}

impl BatchEntry {
    /// Logits rows of this entry.
    pub fn logits_rows(&self) -> usize {
        match self.wants_logits {
            true => 1 + self.drafts,
            false => 0,
        }
    }

    /// Positions in the cache after this entry was computed.
    pub fn end(&self) -> usize {
        self.start + self.tokens.len()
    }
}

/// One pass of a model's prediction layer, over positions that the pass before it computed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DraftBatch {
    /// As in a step, but `tokens[i]` is the token that *follows* position `start + i`, and the logits are those of the
    /// token after it. No entry has drafts.
    pub batch: Batch,
    /// By entry: the row of the pass before that its first token goes on from; its further tokens go on from the rows
    /// after it. A step leaves a row for each of its tokens, a drafting pass one for each of its logits rows.
    pub rows: Vec<usize>,
}

impl DraftBatch {
    /// An empty pass.
    pub fn clear(&mut self) {
        self.batch.entries.clear();
        self.rows.clear();
    }

    /// Checks that every entry goes on from rows that are there, `rows_before` of them.
    ///
    /// # Errors
    /// [`ExecuteError::InvalidBatch`] with the first number out of bounds.
    pub fn check(&self, rows_before: usize) -> Result<(), ExecuteError> {
        let (entries, rows) = (self.batch.entries.len(), self.rows.len());
        if entries != rows {
            let problem = format!("{entries} entries go on from {rows} rows");
            return Err(ExecuteError::InvalidBatch(problem));
        }
        for (entry, first) in self.batch.entries.iter().zip(&self.rows) {
            let end = first.saturating_add(entry.tokens.len());
            if end > rows_before || entry.drafts > 0 {
                return Err(ExecuteError::InvalidBatch(format!(
                    "sequence {}: {} drafts, from rows {first} to {end} of {rows_before}",
                    entry.sequence.0, entry.drafts
                )));
            }
        }
        Ok(())
    }
}

/// Logits rows, one for each entry that wants them and one more for each of its drafts, in batch order. The buffer is reused from step to step.
#[derive(Clone, Debug, Default)]
pub struct Logits {
    vocabulary: usize,
    values: Vec<f32>,
}

impl Logits {
    /// An empty buffer that never reallocates up to `rows` rows.
    pub fn with_capacity(vocabulary: usize, rows: usize) -> Self {
        Self {
            vocabulary,
            values: Vec::with_capacity(vocabulary * rows),
        }
    }

    /// Makes room for `rows` rows of `vocabulary` values, all zero. A backend calls this first.
    pub fn reset(&mut self, vocabulary: usize, rows: usize) {
        self.vocabulary = vocabulary;
        self.values.clear();
        self.values.resize(vocabulary * rows, 0.0);
    }

    /// Checks what a backend left.
    pub(crate) fn expect(&self, rows: usize, vocabulary: usize) -> Result<(), ExecuteError> {
        let found = (self.rows(), self.vocabulary);
        if rows > 0 && found != (rows, vocabulary) {
            return Err(ExecuteError::Fatal(format!(
                "it gave {} x {} logits where {rows} x {vocabulary} were wanted",
                found.0, found.1
            )));
        }
        Ok(())
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.values.len().checked_div(self.vocabulary).unwrap_or(0)
    }

    /// Values in a row.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// One row. Panics when `row` is out of range, which is a bug of the caller.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.vocabulary..(row + 1) * self.vocabulary]
    }

    /// One row to write to.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.values[row * self.vocabulary..(row + 1) * self.vocabulary]
    }

    /// All rows, contiguous.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.values
    }
}

/// Why a forward pass did not happen. After an error the backend must still accept the next batch, unless it says
/// that it is [`ExecuteError::Fatal`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExecuteError {
    /// The batch breaks the contract above (a bug of the scheduler): names what.
    #[error("the backend refused a batch: {0}")]
    InvalidBatch(String),
    /// The device, a worker or memory is gone; the engine must not be used any more.
    #[error("the backend failed: {0}")]
    Fatal(String),
}

/// Weights in the form of one backend, in memory and not in use.
pub struct StagedWeights(pub Box<dyn Any + Send>);

impl fmt::Debug for StagedWeights {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("StagedWeights").finish()
    }
}

/// A backend: runs batches against weights and a block cache that it owns.
pub trait Executor: Send {
    /// Values in a logits row.
    fn vocabulary(&self) -> usize;

    /// Computes `batch`, writes keys and values of its tokens into its blocks and the wanted rows into `logits`.
    ///
    /// # Errors
    /// See [`ExecuteError`]. After an error the contents of the blocks of the batch are unspecified.
    fn execute(&mut self, batch: &Batch, logits: &mut Logits) -> Result<(), ExecuteError>;

    /// Runs the prediction layer over `pass`, which goes on from the last call of [`Self::execute`] or of this, and writes
    /// its entries in the layer's own cache.
    ///
    /// # Errors
    /// See [`ExecuteError`]; a backend without such a layer refuses every pass.
    fn draft(&mut self, pass: &DraftBatch, logits: &mut Logits) -> Result<(), ExecuteError> {
        let _ = (pass, logits);
        let problem = "this backend has no prediction layer to draft with".to_owned();
        Err(ExecuteError::InvalidBatch(problem))
    }

    /// Itself, when it can sample where its logits are.
    fn picker(&mut self) -> Option<&mut dyn Picker> {
        None
    }

    /// Called now and then while there is nothing to compute, for a backend that depends on others to see whether they
    /// are there.
    ///
    /// # Errors
    /// [`ExecuteError::Fatal`]: the engine must not be used any more.
    fn idle(&mut self) -> Result<(), ExecuteError> {
        Ok(())
    }

    /// Puts `staged` in the place of the weights in use, between two steps, and gives those back. Moves pointers where
    /// both are in memory that computes, and bytes where one is not. The contents of all blocks are then of other weights.
    ///
    /// # Errors
    /// The backend cannot use them; it gives them back and goes on with what it has. A device that fails on the way has
    /// no whole version: the backend says so at the next step, with [`ExecuteError::Fatal`], and takes no others.
    fn exchange_weights(&mut self, staged: StagedWeights) -> Result<StagedWeights, StagedWeights> {
        Err(staged)
    }
}
