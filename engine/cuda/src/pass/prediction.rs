//! What the prediction layer needs beside a decoder layer's operations: picking rows, and norms into two halves.
//!
//! Rows of the pass before are picked by an embedding's kernel. [`Slot::Normed`] is free while the layer's input is made,
//! and holds what was picked until it is normed.

use engine_model::{Backend, Norm, PredictionBackend, Slot, WeightId};
use kernels::params::Address;

use super::attention::at;
use super::{Pass, Rows};
use crate::CudaError;

impl PredictionBackend for Pass<'_> {
    fn join(&mut self, token_norm: &Norm, hidden_norm: &Norm) -> Result<(), CudaError> {
        let (previous, width) = self.slot(Slot::Previous);
        let room = self.rows_of(Slot::Previous).room;
        let left = Rows {
            at: previous,
            scales: Address::NULL,
            // Whatever the pass before left is within the buffer.
            count: room,
            stride: width,
            room,
        };
        let picked = self.slot(Slot::Normed);
        self.written(Slot::Normed);
        self.gather(left, self.layout.buffers.sources, self.rows, picked.0)?;
        let (joined, stride) = self.slot(Slot::Joined);
        self.written(Slot::Joined);
        let tokens = self.slot(Slot::Hidden);
        self.norm_rows(token_norm, tokens, Address::NULL, (joined, stride))?;
        let second = (at(joined, width, 2), stride);
        self.norm_rows(hidden_norm, picked, Address::NULL, second)
    }

    fn predict_head(&mut self, norm: &Norm, table: WeightId) -> Result<(), CudaError> {
        if self.wanted == 0 {
            return Ok(());
        }
        self.norm(norm, Slot::Hidden, Slot::Normed)?;
        let left = Rows {
            count: self.wanted,
            ..self.rows_of(Slot::Previous)
        };
        let (all, buffers) = (self.rows_of(Slot::Normed), &self.layout.buffers);
        self.written(Slot::Previous);
        self.gather(all, buffers.wanted, self.wanted, left.at)?;
        self.project(&self.matrix(table), &left)
    }
}
