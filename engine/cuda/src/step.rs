//! What one step consists of, as the kernels want it.
//!
//! Rows are the step's tokens: first those of sequences that go on by one token and its drafts, which attend together, each
//! with its own block table; then the chunks of prompts, each attending by itself over one table. A row's result does not
//! depend on its place. Invariant: everything is within the bounds that the batch was checked against.

use engine_core::{Batch, BatchEntry, DraftBatch};
use kernels::driver::{Arena, DriverError, Part, Stream};
use kernels::plan;

/// Rows that attend in one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub first: usize,
    pub rows: usize,
    /// Its first block table.
    pub table: usize,
    /// All rows use that one; else row `i` uses table `table + i`.
    pub one_table: bool,
    /// Parts of its longest context.
    pub splits: usize,
}

/// The step's inputs on the host.
#[derive(Debug, Default)]
pub(crate) struct Step {
    pub tokens: Vec<u32>,
    pub positions: Vec<i32>,
    /// Positions that each row attends to.
    pub lengths: Vec<i32>,
    /// Cache row that each row is written to; -1 for padding.
    pub cache_rows: Vec<i64>,
    /// Rows that want logits, in batch order.
    pub wanted: Vec<u32>,
    pub tables: Vec<i32>,
    pub runs: Vec<Run>,
    /// By row, in a drafting pass: the row of the pass before that it goes on from.
    pub sources: Vec<u32>,
    /// By token in batch order: its row.
    pub row_of: Vec<u32>,
    block_size: usize,
    table_length: usize,
    /// Tokens of an entry whose rows attend beside those of others.
    together_max: usize,
}

/// Places of the inputs on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inputs {
    pub tokens: Part,
    pub positions: Part,
    pub lengths: Part,
    pub cache_rows: Part,
    pub wanted: Part,
    pub tables: Part,
    pub sources: Part,
}

impl Step {
    pub fn new(block_size: usize, table_length: usize, draft_tokens: usize) -> Self {
        Self {
            block_size,
            table_length,
            together_max: 1 + draft_tokens,
            ..Self::default()
        }
    }

    /// Rows, padding included.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    pub fn table_length(&self) -> usize {
        self.table_length
    }

    /// Takes a batch that was checked.
    pub fn prepare(&mut self, batch: &Batch) {
        self.tokens.clear();
        self.positions.clear();
        self.lengths.clear();
        self.cache_rows.clear();
        self.tables.clear();
        self.runs.clear();
        self.sources.clear();
        let mut first_rows = vec![0; batch.entries.len()];
        let together_max = self.together_max;
        let together = |entry: &BatchEntry| entry.tokens.len() <= together_max;
        let numbered = || batch.entries.iter().enumerate();
        let mut longest = 0;
        for (index, entry) in numbered().filter(|(_, entry)| together(entry)) {
            first_rows[index] = self.push(entry, entry.tokens.len());
            longest = longest.max(entry.end());
        }
        let rows = self.rows();
        if rows > 0 {
            self.runs.push(Run {
                first: 0,
                rows,
                table: 0,
                one_table: false,
                splits: plan::mla_splits(longest),
            });
        }
        for (index, entry) in numbered().filter(|(_, entry)| !together(entry)) {
            let run = Run {
                first: self.rows(),
                rows: entry.tokens.len(),
                table: self.tables.len() / self.table_length,
                one_table: true,
                splits: plan::mla_splits(entry.end()),
            };
            first_rows[index] = self.push(entry, 1);
            self.runs.push(run);
        }
        self.wanted.clear();
        self.row_of.clear();
        for (entry, first) in batch.entries.iter().zip(first_rows) {
            let end = first + entry.tokens.len() as u32;
            self.wanted.extend(end - entry.logits_rows() as u32..end);
            self.row_of.extend(first..end);
        }
    }

    /// Takes a drafting pass that was checked; `left` has by row of the pass before, as its batch counts them, its place.
    pub fn prepare_draft(&mut self, pass: &DraftBatch, left: &[u32]) {
        self.prepare(&pass.batch);
        self.sources.resize(self.rows(), 0);
        let mut token = 0;
        for (entry, first) in pass.batch.entries.iter().zip(&pass.rows) {
            for offset in 0..entry.tokens.len() {
                self.sources[self.row_of[token] as usize] = left[first + offset];
                token += 1;
            }
        }
    }

    /// Appends an entry's rows and so many copies of its table; its first row.
    fn push(&mut self, entry: &BatchEntry, tables: usize) -> u32 {
        let first = self.rows() as u32;
        for (offset, token) in entry.tokens.iter().enumerate() {
            let position = entry.start + offset;
            let block = entry.blocks[position / self.block_size].index();
            self.tokens.push(token.0);
            self.positions.push(position as i32);
            self.lengths.push(position as i32 + 1);
            self.cache_rows
                .push((block * self.block_size + position % self.block_size) as i64);
        }
        // Blocks beyond the longest context are never looked at.
        let used = entry.blocks.len().min(self.table_length);
        let rest = self.table_length - used;
        for _ in 0..tables {
            self.tables
                .extend(entry.blocks[..used].iter().map(|block| block.0 as i32));
            self.tables.extend(std::iter::repeat_n(0, rest));
        }
        first
    }

    /// Whether all rows attend together.
    pub fn is_one_run(&self) -> bool {
        matches!(self.runs.as_slice(), [run] if !run.one_table)
    }

    /// Whether every sequence goes on by one token and its drafts, and wants the logits after each.
    pub fn is_decode(&self) -> bool {
        self.is_one_run() && self.wanted.len() == self.rows()
    }

    /// Rounds a drafting pass up to `wanted` rows that want logits; those of the added ones are not looked at.
    pub fn pad_wanted(&mut self, wanted: usize) {
        self.wanted.resize(wanted, 0);
    }

    /// Rounds a run up to `rows` rows of `splits` parts: the added ones attend to nothing and are cached nowhere.
    pub fn pad(&mut self, rows: usize, splits: usize) {
        let added = rows - self.rows();
        self.tokens.extend(std::iter::repeat_n(0, added));
        self.positions.extend(std::iter::repeat_n(0, added));
        self.lengths.extend(std::iter::repeat_n(0, added));
        self.cache_rows.extend(std::iter::repeat_n(-1, added));
        self.tables
            .extend(std::iter::repeat_n(0, added * self.table_length));
        if !self.sources.is_empty() {
            self.sources.resize(rows, 0);
        }
        if let Some(run) = self.runs.first_mut() {
            run.rows = rows;
            run.splits = splits;
        }
    }

    /// Queues the copies to the device; tokens count from `first_token`, the first that the embedding has.
    pub fn upload(
        &self,
        arena: &Arena,
        stream: &Stream,
        inputs: &Inputs,
        first_token: u32,
    ) -> Result<(), DriverError> {
        match first_token {
            0 => arena.write(stream, inputs.tokens, &self.tokens)?,
            // Those before it become larger than any vocabulary.
            first => {
                let tokens = self.tokens.iter().map(|token| token.wrapping_sub(first));
                arena.write(stream, inputs.tokens, &tokens.collect::<Vec<u32>>())?;
            }
        }
        arena.write(stream, inputs.positions, &self.positions)?;
        arena.write(stream, inputs.lengths, &self.lengths)?;
        arena.write(stream, inputs.cache_rows, &self.cache_rows)?;
        arena.write(stream, inputs.wanted, &self.wanted)?;
        arena.write(stream, inputs.tables, &self.tables)?;
        arena.write(stream, inputs.sources, &self.sources)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine_core::{BlockId, SequenceId, TokenId};

    fn entry(tokens: &[u32], start: usize, blocks: &[u32], wants_logits: bool) -> BatchEntry {
        BatchEntry {
            sequence: SequenceId(0),
            tokens: tokens.iter().map(|token| TokenId(*token)).collect(),
            start,
            blocks: blocks.iter().map(|block| BlockId(*block)).collect(),
            wants_logits,
            drafts: 0,
        }
    }

    #[test]
    fn decodes_come_first_and_logits_stay_in_batch_order() {
        let mut step = Step::new(4, 3, 0);
        step.prepare(&Batch {
            entries: vec![
                entry(&[7, 8, 9], 3, &[5, 2], true),
                entry(&[1], 8, &[0, 1, 3], true),
                entry(&[4, 6], 0, &[4], false),
            ],
        });
        assert_eq!(step.tokens, [1, 7, 8, 9, 4, 6]);
        assert_eq!(step.positions, [8, 3, 4, 5, 0, 1]);
        assert_eq!(step.lengths, [9, 4, 5, 6, 1, 2]);
        assert_eq!(step.cache_rows, [12, 23, 8, 9, 16, 17]);
        assert_eq!(step.wanted, [3, 0]);
        assert_eq!(step.tables, [0, 1, 3, 5, 2, 0, 4, 0, 0]);
        let runs: Vec<_> = step
            .runs
            .iter()
            .map(|run| (run.first, run.rows, run.table, run.one_table))
            .collect();
        assert_eq!(runs, [(0, 1, 0, false), (1, 3, 1, true), (4, 2, 2, true)]);
        assert!(!step.is_decode());
    }

    #[test]
    fn a_padded_decode_step_writes_and_attends_to_nothing_more() {
        let mut step = Step::new(4, 2, 0);
        step.prepare(&Batch {
            entries: vec![
                entry(&[1], 5, &[3, 1], true),
                entry(&[2], 0, &[0], true),
                entry(&[3], 1, &[2], true),
            ],
        });
        assert!(step.is_decode());
        step.pad(4, 2);
        step.pad_wanted(4);
        assert_eq!(step.tokens, [1, 2, 3, 0]);
        assert_eq!(step.cache_rows, [5, 0, 9, -1]);
        assert_eq!(step.lengths, [6, 1, 2, 0]);
        assert_eq!(step.tables.len(), 8);
        assert_eq!((step.runs[0].rows, step.runs[0].splits), (4, 2));
    }

    #[test]
    fn drafts_are_rows_that_attend_beside_others_and_each_has_a_table() {
        let mut step = Step::new(4, 2, 2);
        let mut verified = entry(&[7, 8, 9], 3, &[3, 1], true);
        verified.drafts = 2;
        let batch = Batch {
            entries: vec![entry(&[1], 5, &[4, 5], true), verified],
        };
        step.prepare(&batch);
        assert!(step.is_decode());
        assert_eq!(step.tokens, [1, 7, 8, 9]);
        assert_eq!(step.lengths, [6, 4, 5, 6]);
        assert_eq!(step.cache_rows, [21, 15, 4, 5]);
        assert_eq!(step.tables, [4, 5, 3, 1, 3, 1, 3, 1]);
        assert_eq!(step.wanted, [0, 1, 2, 3]);
        // Of a longer chunk the last rows only.
        let mut chunk = entry(&[7, 8, 9, 6], 0, &[3], true);
        chunk.drafts = 1;
        step.prepare(&Batch {
            entries: vec![chunk, entry(&[1], 5, &[4, 5], true)],
        });
        assert_eq!(step.tokens, [1, 7, 8, 9, 6]);
        assert_eq!(step.wanted, [3, 4, 0]);
        assert_eq!(step.row_of, [1, 2, 3, 4, 0]);
        assert!(!step.is_decode());
    }

    #[test]
    fn a_drafting_pass_goes_on_from_where_the_rows_of_the_step_were() {
        let mut step = Step::new(4, 2, 1);
        // In the step, a chunk of three lay after a single row.
        let left = [1, 2, 3, 0];
        let batch = Batch {
            entries: vec![
                entry(&[5, 6, 7], 0, &[3], true),
                entry(&[9], 5, &[4, 5], false),
            ],
        };
        let rows = vec![0, 3];
        step.prepare_draft(&DraftBatch { batch, rows }, &left);
        assert_eq!(step.tokens, [9, 5, 6, 7]);
        assert_eq!(step.sources, [0, 1, 2, 3]);
        assert_eq!(step.wanted, [3]);
    }
}
