//! What a rank of a group gets from the others on the way. A rank alone has it already.

use engine_model::Slot;
use engine_spec::rank::ROW_BLOCK;
use kernels::plan::{Format, QUANT_GROUP};

use super::{Matrix, Out, Pass, Rows};
use crate::CudaError;
use crate::exchange::{self, Exchange, Shared};
use crate::layout::Span;

/// Bytes of an activation.
const ELEMENT: usize = 2;

impl Pass<'_> {
    /// `out = rows matrix^T`, whole rows: with the columns of all ranks.
    pub(super) fn whole_product(
        &self,
        matrix: &Matrix,
        rows: &Rows,
        out: Span,
    ) -> Result<(), CudaError> {
        let to = Out::among(self.place(out), matrix, ELEMENT);
        self.product(matrix, rows, to)?;
        self.complete(matrix, out, rows.count, ELEMENT)
    }

    /// The logits, of which rank 0 gets all columns.
    pub(super) fn project(&self, matrix: &Matrix, rows: &Rows) -> Result<(), CudaError> {
        let logits = self.layout.buffers.logits;
        let to = Out::among(self.place(logits), matrix, 4);
        self.wide_product(matrix, rows, to)?;
        match (self.exchange, matrix.share) {
            (Some(exchange), Some(share)) => {
                let shared = Shared {
                    span: logits,
                    count: rows.count,
                    columns: share.of,
                    unit: exchange.rank().row_unit(share.of),
                    element: 4,
                };
                exchange.logits(self.arena, self.stream, shared)
            }
            _ => Ok(()),
        }
    }

    /// Gets the columns of rows that other ranks' shares of `matrix` gave.
    fn complete(
        &self,
        matrix: &Matrix,
        span: Span,
        rows: usize,
        element: usize,
    ) -> Result<(), CudaError> {
        match matrix.share {
            Some(share) => self.columns(span, rows, share.of, element, None),
            None => Ok(()),
        }
    }

    /// The same for columns that are dealt out by `unit`, or as rows of matrices are.
    fn columns(
        &self,
        span: Span,
        rows: usize,
        columns: usize,
        element: usize,
        unit: Option<usize>,
    ) -> Result<(), CudaError> {
        let Some(exchange) = self.exchange else {
            return Ok(());
        };
        let unit = unit.unwrap_or_else(|| exchange.rank().row_unit(columns));
        let shared = Shared {
            span,
            count: rows,
            columns,
            unit,
            element,
        };
        exchange.columns(self.arena, self.stream, shared)
    }

    /// Gets what other ranks' gates gave, in the form that `down` multiplies.
    pub(super) fn complete_products(
        &self,
        gate: &Matrix,
        down: &Matrix,
        rows: usize,
    ) -> Result<(), CudaError> {
        if gate.share.is_none() {
            return Ok(());
        }
        let (inner, buffers) = (down.columns, &self.layout.buffers);
        self.columns(buffers.product, rows, inner, down.format().bytes(), None)?;
        match down.format() {
            Format::Bf16 => Ok(()),
            // Shares are whole blocks, or the model was refused.
            Format::Fp8 => {
                let unit = Some(ROW_BLOCK / QUANT_GROUP);
                self.columns(buffers.product_scales, rows, inner / QUANT_GROUP, 4, unit)
            }
        }
    }

    /// Gets the outputs of other ranks' heads, `width` values each.
    pub(super) fn complete_heads(&self, heads: usize, width: usize) -> Result<(), CudaError> {
        let values = self.span(Slot::Value);
        self.columns(values, self.rows, heads * width, ELEMENT, Some(width))
    }

    /// Gets the rows of tokens that other ranks hold.
    pub(super) fn complete_embedded(&self, table: &Matrix) -> Result<(), CudaError> {
        let (Some(exchange), Some(share)) = (self.exchange, table.share) else {
            return Ok(());
        };
        let hidden = self.span(Slot::Hidden);
        let rows = exchange::Rows::new(hidden, self.rows, table.columns * ELEMENT);
        exchange.embedded((self.arena, self.stream), rows, self.tokens, share.of)
    }

    /// Gets the outputs of other ranks' experts.
    pub(super) fn complete_experts(&self, experts: usize, chosen: usize) -> Result<(), CudaError> {
        let Some(exchange) = self.exchange else {
            return Ok(());
        };
        let at = (self.arena, self.stream);
        exchange.experts(at, self.expert_rows(chosen), || {
            self.starts(experts, chosen)
        })
    }

    /// Sets the rows of other ranks' experts to zeros, and this rank's, where they are added up.
    pub(super) fn clear_experts(&self, chosen: usize) -> Result<(), CudaError> {
        if !self.exchange.is_some_and(Exchange::is_queued) {
            return Ok(());
        }
        let rows = self.expert_rows(chosen);
        let part = self.arena.part(rows.span.at, rows.count * rows.row_bytes)?;
        Ok(self.arena.fill(self.stream, part, 0)?)
    }

    fn expert_rows(&self, chosen: usize) -> exchange::Rows {
        let row_bytes = self.slot(Slot::Hidden).1 * ELEMENT;
        exchange::Rows::new(self.layout.buffers.expert_out, chosen, row_bytes)
    }

    /// The first sorted row of each expert, and the end.
    fn starts(&self, experts: usize, chosen: usize) -> Result<Vec<u32>, CudaError> {
        let mut starts = vec![0u32; experts + 1];
        let offsets = self.layout.buffers.offsets.at;
        let offsets = self.arena.part(offsets, starts.len() * 4)?;
        self.arena.read(self.stream, offsets, &mut starts)?;
        // All ranks sort alike; what a broken device says is not followed out of bounds.
        let is_sorted = starts.is_sorted() && starts.last() == Some(&(chosen as u32));
        match is_sorted {
            true => Ok(starts),
            false => Err(CudaError::Graph("rows that were not sorted by expert")),
        }
    }
}
