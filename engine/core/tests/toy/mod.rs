//! A model small enough to know the right answer: logits are a pure function of the token history.
//!
//! The history is read back through the block table, from a cache that the toy keeps like a real backend does, so a
//! wrong block, a block shared too early or a block that was handed out twice changes the answer or is caught at once.
//!
//! Its prediction layer is right about two tokens in three. A hidden state is the history it stands for, and the layer caches
//! histories too, so a hidden state of another position or an entry that was made of other tokens is caught.

#![allow(dead_code, missing_docs)]

use engine_core::{
    Batch, BatchEntry, DraftBatch, ExecuteError, Executor, Logits, StagedWeights, TokenId,
};

#[derive(Debug)]
pub struct Toy {
    vocabulary: usize,
    block_size: usize,
    /// What was written, and with which weights.
    cache: Vec<Option<(TokenId, u64)>>,
    /// Of the prediction layer: the history that ends with the token after the position.
    predicted: Vec<Option<Vec<TokenId>>>,
    /// The rows that the last pass left.
    hidden: Vec<Vec<TokenId>>,
    /// Of which the logits are a function too.
    weights: u64,
    max_logits: usize,
    max_tokens: usize,
    max_entries: usize,
}

impl Toy {
    pub fn new(vocabulary: usize, block_size: usize, block_count: usize) -> Self {
        Self {
            vocabulary,
            block_size,
            cache: vec![None; block_size * block_count],
            predicted: vec![None; block_size * block_count],
            hidden: Vec::new(),
            weights: 0,
            max_logits: usize::MAX,
            max_tokens: usize::MAX,
            max_entries: usize::MAX,
        }
    }

    /// Refuses batches beyond these sizes.
    pub fn bounded(mut self, max_tokens: usize, max_entries: usize, drafts: usize) -> Self {
        (self.max_tokens, self.max_entries) = (max_tokens, max_entries);
        self.max_logits = max_entries * (1 + drafts);
        self
    }

    /// With other weights than the usual ones.
    pub fn weighing(mut self, weights: u64) -> Self {
        self.weights = weights;
        self
    }

    fn slot(&self, entry: &BatchEntry, position: usize) -> usize {
        let block = entry.blocks[position / self.block_size].index();
        block * self.block_size + position % self.block_size
    }

    /// What the cache holds of the first `length` positions of an entry that was executed.
    pub fn history(&self, entry: &BatchEntry, length: usize) -> Option<Vec<TokenId>> {
        (0..length)
            .map(|position| {
                let (token, weights) = self.cache[self.slot(entry, position)]?;
                assert_eq!(weights, self.weights, "keys and values of other weights");
                Some(token)
            })
            .collect()
    }

    /// The slots that a batch writes to, each once.
    fn written(&self, batch: &Batch) -> Result<Vec<usize>, ExecuteError> {
        let refuse = |what: &str| Err(ExecuteError::InvalidBatch(what.to_owned()));
        if batch.token_count() > self.max_tokens || batch.entries.len() > self.max_entries {
            return refuse("it is too large");
        }
        if batch.logits_rows() > self.max_logits {
            return refuse("it wants too many rows");
        }
        let mut written = Vec::new();
        for entry in &batch.entries {
            if entry.tokens.is_empty() || entry.end() > entry.blocks.len() * self.block_size {
                return refuse("an entry has no tokens or too few blocks");
            }
            for position in entry.start..entry.end() {
                let slot = self.slot(entry, position);
                if written.contains(&slot) {
                    return refuse("two tokens in one place");
                }
                written.push(slot);
            }
        }
        Ok(written)
    }
}

/// What the prediction layer expects after `history`.
fn predict_after(history: &[TokenId], row: &mut [f32]) {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    for token in history {
        state = mix(state ^ u64::from(token.0));
    }
    logits_after(history, row);
    if state.is_multiple_of(3) {
        row.reverse();
    }
}

/// The toy's logits after `history`.
pub fn logits_after(history: &[TokenId], row: &mut [f32]) {
    logits_of(0, history, row);
}

/// The same with other weights.
pub fn logits_of(weights: u64, history: &[TokenId], row: &mut [f32]) {
    let mut state = 0xcbf2_9ce4_8422_2325u64 ^ weights;
    for token in history {
        state = mix(state ^ u64::from(token.0));
    }
    for (index, logit) in row.iter_mut().enumerate() {
        let bits = mix(state ^ (index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        *logit = (bits >> 40) as f32 / (1u64 << 24) as f32 * 6.0 - 3.0;
    }
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Executor for Toy {
    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn execute(&mut self, batch: &Batch, logits: &mut Logits) -> Result<(), ExecuteError> {
        // All writes come first, as in a layer of a real model; two entries that write one position are a bug.
        let written = self.written(batch)?;
        let tokens = batch.entries.iter().flat_map(|entry| &entry.tokens);
        for (slot, token) in written.into_iter().zip(tokens) {
            self.cache[slot] = Some((*token, self.weights));
        }
        logits.reset(self.vocabulary, batch.logits_rows());
        self.hidden.clear();
        let mut row = 0;
        for entry in &batch.entries {
            for length in entry.start + 1..=entry.end() {
                let Some(history) = self.history(entry, length) else {
                    return Err(ExecuteError::InvalidBatch(
                        "a position was never written".into(),
                    ));
                };
                if length + entry.logits_rows() > entry.end() {
                    logits_of(self.weights, &history, logits.row_mut(row));
                    row += 1;
                }
                self.hidden.push(history);
            }
        }
        Ok(())
    }

    fn draft(&mut self, pass: &DraftBatch, logits: &mut Logits) -> Result<(), ExecuteError> {
        pass.check(self.hidden.len())?;
        let mut written = self.written(&pass.batch)?.into_iter();
        logits.reset(self.vocabulary, pass.batch.logits_rows());
        let mut left = Vec::new();
        for (entry, first) in pass.batch.entries.iter().zip(&pass.rows) {
            let mut history = Vec::new();
            for (offset, token) in entry.tokens.iter().enumerate() {
                history.clone_from(&self.hidden[first + offset]);
                if history.len() != entry.start + offset + 1 {
                    return Err(ExecuteError::InvalidBatch(
                        "a hidden state of elsewhere".into(),
                    ));
                }
                history.push(*token);
                let slot = written.next().unwrap();
                self.predicted[slot] = Some(history.clone());
            }
            for position in 0..entry.end() {
                let cached = self.predicted[self.slot(entry, position)].as_deref();
                if cached != Some(&history[..position + 2]) {
                    let problem = format!("position {position} was made of other tokens");
                    return Err(ExecuteError::InvalidBatch(problem));
                }
            }
            if entry.wants_logits {
                predict_after(&history, logits.row_mut(left.len()));
                left.push(history);
            }
        }
        self.hidden = left;
        Ok(())
    }

    fn exchange_weights(&mut self, staged: StagedWeights) -> Result<StagedWeights, StagedWeights> {
        let weights = staged.0.downcast::<u64>().map_err(StagedWeights)?;
        let before = std::mem::replace(&mut self.weights, *weights);
        Ok(StagedWeights(Box::new(before)))
    }
}
