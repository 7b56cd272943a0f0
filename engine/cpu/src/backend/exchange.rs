//! Exchanges with the other ranks, in the middle of a step; see [`engine_group::Columns`] and its neighbours.

#![allow(unsafe_code)]

use engine_group::{Columns, GroupError};
use engine_model::{Slot, WeightId};
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

    /// Fills a slot's first `columns` with those of all ranks, where this one has a part of a matrix' rows.
    pub(super) fn complete(&mut self, to: Slot, columns: Option<usize>) -> Result<(), StepError> {
        match columns {
            Some(columns) => self.complete_units(to, columns, self.rank.row_unit(columns)),
            None => Ok(()),
        }
    }

    /// The same where columns are dealt out by `unit`.
    pub(super) fn complete_units(
        &mut self,
        to: Slot,
        columns: usize,
        unit: usize,
    ) -> Result<(), StepError> {
        if self.rank.is_alone() {
            return Ok(());
        }
        let buffer = &mut self.slots[to as usize];
        assert!(!buffer.is_rounded, "{to:?} was rounded already");
        let layout = Columns {
            rank: self.rank,
            rows: self.step.tokens.len(),
            columns,
            unit,
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
            unit: self.rank.row_unit(columns),
            element: FLOAT,
            skip: 0,
            stride: columns * FLOAT,
        };
        self.group
            .gather(bytes_of(logits.as_mut_slice()), &layout)?;
        Ok(())
    }
}
