//! What the prediction layer needs beside a decoder layer's operations.

#![allow(unsafe_code)]

use engine_model::{Backend, Norm, PredictionBackend, Slot, WeightId};

use super::{CpuBackend, StepError};
use crate::compute::Shared;
use crate::kernels::RmsNorm;

impl PredictionBackend for CpuBackend {
    fn join(&mut self, token_norm: &Norm, hidden_norm: &Norm) -> Result<(), StepError> {
        let rows = self.rows();
        let (tokens, previous) = (self.wide(Slot::Hidden), self.wide(Slot::Previous));
        let joined = self.fresh(Slot::Joined);
        let of = |norm: &Norm| {
            let weight = self.weights.precise(norm.weight);
            (Shared(weight.as_ptr().cast_mut()), norm.epsilon)
        };
        let norms = [of(token_norm), of(hidden_norm)];
        let (width, sources) = (self.hidden, &self.step.sources);
        // Two tasks a row: the token's half and the hidden state's.
        let kernel = |task: usize| {
            let (row, half) = (task / 2, task % 2);
            let (weight, epsilon) = norms[half];
            RmsNorm {
                input: match half {
                    0 => tokens.row(row),
                    _ => previous.row(sources[row] as usize),
                },
                weight: weight.at(0),
                out: joined.skip(half * width).row(row),
                length: width,
                epsilon,
            }
        };
        // SAFETY: both norms are as wide as the residual stream; each task writes its own half of a row of another slot
        // than it reads, and a source is a row that the pass before left, as the executor checked.
        unsafe { self.compute.kernels(2 * rows, rows * width * 4, &kernel)? };
        Ok(())
    }

    fn predict_head(&mut self, norm: &Norm, table: WeightId) -> Result<(), StepError> {
        self.norm_wanted(norm, Slot::Previous)?;
        self.head(norm, table)
    }
}
