//! What ranks tell each other between the parts of a step.
//!
//! Each rank leaves its results where one rank alone would, between those of the others, and the group fills in theirs:
//! columns of rows, whole rows, or the rows of its experts. Invariant: a value is computed by one rank and copied by the
//! others, so that all hold the same bytes, those that one rank alone would hold.

#![allow(unsafe_code)]

use std::ops::Range;

use engine_group::{GroupError, Layout};
use engine_model::{Slot, WeightId};
use engine_spec::Rank;
use thiserror::Error;

use super::CpuBackend;
use crate::pool::WorkerPanic;

/// Why a step ended early.
#[derive(Debug, Error)]
pub(crate) enum StepError {
    #[error(transparent)]
    Worker(#[from] WorkerPanic),
    #[error(transparent)]
    Group(#[from] GroupError),
}

/// Rows of which every rank has its share of the columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns {
    pub rank: Rank,
    pub rows: usize,
    /// Columns of all ranks.
    pub columns: usize,
    /// Bytes of an element.
    pub element: usize,
    /// Bytes from the buffer's begin to the first row.
    pub skip: usize,
    /// Bytes from one row to the next.
    pub stride: usize,
}

impl Layout for Columns {
    fn piece(&self, rank: usize, index: usize) -> Option<Range<usize>> {
        if index >= self.rows {
            return None;
        }
        let share = self.rank.other(rank).share(self.columns);
        let row = self.skip + index * self.stride;
        Some(row + share.start * self.element..row + share.end * self.element)
    }

    fn bytes(&self, rank: usize) -> usize {
        self.rows * self.rank.other(rank).share(self.columns).len() * self.element
    }
}

/// Rows that the ranks which own the step's tokens looked up.
#[derive(Debug, Default)]
pub(super) struct Owners {
    /// Rows, grouped by rank.
    rows: Vec<u32>,
    /// First index in `rows` of each rank, and the end.
    starts: Vec<u32>,
    /// Bytes of a row.
    row_bytes: usize,
}

impl Owners {
    /// Groups the rows of `tokens` by the ranks that own them among `vocabulary`.
    fn group(&mut self, rank: Rank, tokens: &[u32], vocabulary: usize, row_bytes: usize) {
        self.row_bytes = row_bytes;
        self.rows.clear();
        self.starts.clear();
        for rank in rank.all() {
            self.starts.push(self.rows.len() as u32);
            let own = rank.share(vocabulary);
            let rows = tokens.iter().enumerate();
            let rows = rows.filter(|(_, token)| own.contains(&(**token as usize)));
            self.rows.extend(rows.map(|(row, _)| row as u32));
        }
        self.starts.push(self.rows.len() as u32);
    }
}

impl Layout for Owners {
    fn piece(&self, rank: usize, index: usize) -> Option<Range<usize>> {
        let rows = self.starts[rank] as usize..self.starts[rank + 1] as usize;
        let row = *self.rows[rows].get(index)? as usize;
        Some(row * self.row_bytes..(row + 1) * self.row_bytes)
    }
}

/// What a layer's experts gave: the rows of each rank's routed experts, which lie together, and columns of the shared one.
pub(super) struct ExpertOutputs<'a> {
    pub rank: Rank,
    /// First row of each expert, and the end.
    pub starts: &'a [u32],
    /// Bytes from the buffer's begin to the first row.
    pub skip: usize,
    pub row_bytes: usize,
    pub shared: Option<Columns>,
}

impl Layout for ExpertOutputs<'_> {
    fn piece(&self, rank: usize, index: usize) -> Option<Range<usize>> {
        if index > 0 {
            return self.shared?.piece(rank, index - 1);
        }
        let experts = self.rank.other(rank).share(self.starts.len() - 1);
        let at = |expert: usize| self.skip + self.starts[expert] as usize * self.row_bytes;
        Some(at(experts.start)..at(experts.end))
    }
}

/// The bytes of values.
pub(super) fn bytes_of(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: floats have no padding, and every pattern of bytes is one.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

const FLOAT: usize = size_of::<f32>();

impl CpuBackend {
    /// First column that a product with a tensor's rows has in a slot, and the columns of all ranks where this rank
    /// computes a part of them only.
    pub(super) fn place(&self, weight: WeightId, to: Slot) -> (usize, Option<usize>) {
        match self.shares[weight.index()] {
            Some(share) if to.is_whole() => (share.first, Some(share.of)),
            _ => (0, None),
        }
    }

    /// Fills a slot's first `columns` with those of all ranks, where this one has a part of them.
    pub(super) fn complete(&mut self, to: Slot, columns: Option<usize>) -> Result<(), StepError> {
        let Some(columns) = columns.filter(|_| !self.rank.is_alone()) else {
            return Ok(());
        };
        let buffer = &mut self.slots[to as usize];
        assert!(!buffer.is_rounded, "{to:?} was rounded already");
        let layout = Columns {
            rank: self.rank,
            rows: self.step.tokens.len(),
            columns,
            element: FLOAT,
            skip: 0,
            stride: buffer.width * FLOAT,
        };
        self.group
            .all_gather(bytes_of(&mut buffer.values), &layout)?;
        Ok(())
    }

    /// Looks up the rows of the step's tokens: those of this rank, and by way of the group the others.
    pub(super) fn look_up(&mut self, table: WeightId) -> Result<(), StepError> {
        let matrix = self.weights.matrix(table);
        let share = self.shares[table.index()];
        let own = match share {
            Some(share) => share.first..share.first + matrix.rows,
            None => 0..matrix.rows,
        };
        let hidden = &mut self.slots[Slot::Hidden as usize].values;
        for (row, token) in hidden
            .chunks_exact_mut(matrix.columns)
            .zip(&self.step.tokens)
        {
            let token = *token as usize;
            if own.contains(&token) {
                matrix.read_row(token - own.start, row);
            }
        }
        let Some(share) = share else {
            return Ok(());
        };
        let row_bytes = matrix.columns * FLOAT;
        self.owners
            .group(self.rank, &self.step.tokens, share.of, row_bytes);
        self.group.all_gather(bytes_of(hidden), &self.owners)?;
        Ok(())
    }

    /// Gives rank 0 all columns of the logits.
    pub(super) fn collect_logits(&mut self) -> Result<(), StepError> {
        if self.rank.is_alone() {
            return Ok(());
        }
        let logits = &mut self.step.logits;
        let columns = logits.vocabulary();
        let layout = Columns {
            rank: self.rank,
            rows: logits.rows(),
            columns,
            element: FLOAT,
            skip: 0,
            stride: columns * FLOAT,
        };
        self.group
            .gather(bytes_of(logits.as_mut_slice()), &layout)?;
        Ok(())
    }
}
