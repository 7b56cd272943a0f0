//! A model small enough to know the right answer: logits are a pure function of the token history.
//!
//! The history is read back through the block table, from a cache that the toy keeps like a real backend does, so a
//! wrong block, a block shared too early or a block that was handed out twice changes the answer or is caught at once.

#![allow(dead_code, missing_docs)]

use engine_core::{Batch, BatchEntry, ExecuteError, Executor, Logits, StagedWeights, TokenId};

#[derive(Debug)]
pub struct Toy {
    vocabulary: usize,
    block_size: usize,
    /// What was written, and with which weights.
    cache: Vec<Option<(TokenId, u64)>>,
    /// Of which the logits are a function too.
    weights: u64,
    max_tokens: usize,
    max_entries: usize,
}

impl Toy {
    pub fn new(vocabulary: usize, block_size: usize, block_count: usize) -> Self {
        Self {
            vocabulary,
            block_size,
            cache: vec![None; block_size * block_count],
            weights: 0,
            max_tokens: usize::MAX,
            max_entries: usize::MAX,
        }
    }

    /// Refuses batches beyond these sizes.
    pub fn bounded(mut self, max_tokens: usize, max_entries: usize) -> Self {
        (self.max_tokens, self.max_entries) = (max_tokens, max_entries);
        self
    }

    /// With other weights than the usual ones.
    pub fn weighing(mut self, weights: u64) -> Self {
        self.weights = weights;
        self
    }

    /// What the cache holds for an entry that was executed.
    pub fn history(&self, entry: &BatchEntry) -> Option<Vec<TokenId>> {
        (0..entry.end())
            .map(|position| {
                let block = entry.blocks[position / self.block_size].index();
                let (token, weights) =
                    self.cache[block * self.block_size + position % self.block_size]?;
                assert_eq!(weights, self.weights, "keys and values of other weights");
                Some(token)
            })
            .collect()
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
        let refuse = |what: &str| Err(ExecuteError::InvalidBatch(what.to_owned()));
        if batch.token_count() > self.max_tokens || batch.entries.len() > self.max_entries {
            return refuse("it is too large");
        }
        logits.reset(self.vocabulary, batch.logits_rows());
        // All writes come first, as in a layer of a real model; two entries that write one position are a bug.
        let mut written = Vec::new();
        for entry in &batch.entries {
            if entry.tokens.is_empty() || entry.end() > entry.blocks.len() * self.block_size {
                return refuse("an entry has no tokens or too few blocks");
            }
            for (offset, token) in entry.tokens.iter().enumerate() {
                let position = entry.start + offset;
                let block = entry.blocks[position / self.block_size].index();
                let slot = block * self.block_size + position % self.block_size;
                if written.contains(&slot) {
                    return refuse("two tokens in one place");
                }
                written.push(slot);
                self.cache[slot] = Some((*token, self.weights));
            }
        }
        let wanted = batch.entries.iter().filter(|entry| entry.wants_logits);
        for (row, entry) in wanted.enumerate() {
            let Some(history) = self.history(entry) else {
                return refuse("a position was never written");
            };
            logits_of(self.weights, &history, logits.row_mut(row));
        }
        Ok(())
    }

    fn exchange_weights(&mut self, staged: StagedWeights) -> Result<StagedWeights, StagedWeights> {
        let weights = staged.0.downcast::<u64>().map_err(StagedWeights)?;
        let before = std::mem::replace(&mut self.weights, *weights);
        Ok(StagedWeights(Box::new(before)))
    }
}
