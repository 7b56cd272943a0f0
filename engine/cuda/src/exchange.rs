//! What the ranks of a group tell each other in the middle of a pass, by way of host memory.
//!
//! Rows go from the device to pinned memory, over the group's connections, and back, so many at a time. That waits for the
//! stream, so a pass of a rank is not recorded. Invariant: a value is computed by one rank and copied by the others, so
//! that all hold the bytes that one rank alone would hold.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use engine_group::{Columns, Layout, Owners, ProcessGroup};
use engine_spec::Rank;
use kernels::driver::{Arena, Device, DriverError, Staging, Stream};

use crate::CudaError;
use crate::layout::Span;

/// Pinned memory for rows on their way; more for rows that are longer.
const STAGING_BYTES: usize = 8 << 20;

/// The way to the other ranks.
#[derive(Debug)]
pub(crate) struct Exchange {
    group: Arc<dyn ProcessGroup>,
    staging: RefCell<Staging>,
    bytes: usize,
}

/// Rows of a buffer, one after the other.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub span: Span,
    pub count: usize,
    pub row_bytes: usize,
}

/// Who gets the others' rows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum To {
    All,
    Leader,
}

impl Exchange {
    /// For rows of at most `row_bytes`; none where there is nobody else.
    pub fn new(
        device: &Arc<Device>,
        group: Arc<dyn ProcessGroup>,
        row_bytes: usize,
    ) -> Result<Option<Self>, DriverError> {
        if group.rank().is_alone() {
            return Ok(None);
        }
        let bytes = STAGING_BYTES.max(row_bytes);
        Ok(Some(Self {
            group,
            staging: RefCell::new(Staging::new(device, bytes)?),
            bytes,
        }))
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.group.rank()
    }

    /// Fills rows of `columns` values of `element` bytes, which the ranks share by `unit`.
    pub fn columns(
        &self,
        (arena, stream): (&Arena, &Stream),
        span: Span,
        rows: usize,
        columns: usize,
        (unit, element): (usize, usize),
    ) -> Result<(), CudaError> {
        let rows = Rows::new(span, rows, columns * element);
        let layout = |part: Range<usize>| self.of_columns(part.len(), columns, unit, element);
        self.by_rows((arena, stream), rows, To::All, layout)
    }

    /// Fills rank 0's rows of float32 logits.
    pub fn logits(
        &self,
        (arena, stream): (&Arena, &Stream),
        span: Span,
        rows: usize,
        vocabulary: usize,
    ) -> Result<(), CudaError> {
        let rows = Rows::new(span, rows, vocabulary * 4);
        let unit = self.rank().row_unit(vocabulary);
        let layout = |part: Range<usize>| self.of_columns(part.len(), vocabulary, unit, 4);
        self.by_rows((arena, stream), rows, To::Leader, layout)
    }

    /// Fills the rows of the step's `tokens`, which were looked up by the ranks that hold them.
    pub fn embedded(
        &self,
        (arena, stream): (&Arena, &Stream),
        rows: Rows,
        tokens: &[u32],
        vocabulary: usize,
    ) -> Result<(), CudaError> {
        let layout = |part: Range<usize>| {
            let mut owners = Owners::default();
            owners.group(self.rank(), &tokens[part], vocabulary, rows.row_bytes);
            owners
        };
        self.by_rows((arena, stream), rows, To::All, layout)
    }

    /// Fills the sorted rows of all experts; `starts` has the first row of each, and the end.
    pub fn experts(
        &self,
        (arena, stream): (&Arena, &Stream),
        rows: Rows,
        starts: &[u32],
    ) -> Result<(), CudaError> {
        let layout = |part| OfExperts {
            rank: self.rank(),
            starts,
            part,
            row_bytes: rows.row_bytes,
        };
        self.by_rows((arena, stream), rows, To::All, layout)
    }

    fn of_columns(&self, rows: usize, columns: usize, unit: usize, element: usize) -> Columns {
        Columns {
            rank: self.rank(),
            rows,
            columns,
            unit,
            element,
            skip: 0,
            stride: columns * element,
        }
    }

    /// Exchanges as many rows at a time as the pinned memory holds; `layout` says which bytes of them are whose.
    fn by_rows<L: Layout>(
        &self,
        (arena, stream): (&Arena, &Stream),
        rows: Rows,
        to: To,
        layout: impl Fn(Range<usize>) -> L,
    ) -> Result<(), CudaError> {
        let Rows {
            span,
            count,
            row_bytes,
        } = rows;
        let mut staging = self.staging.borrow_mut();
        let turn = (self.bytes / row_bytes.max(1)).max(1);
        for first in (0..count).step_by(turn) {
            let part = first..count.min(first + turn);
            let bytes = part.len() * row_bytes;
            let place = arena.part(span.at + first * row_bytes, bytes)?;
            staging.fetch(stream, arena, place, bytes)?;
            let buffer = &mut staging.fill()?[..bytes];
            match to {
                To::All => self.group.all_gather(buffer, &layout(part))?,
                To::Leader => self.group.gather(buffer, &layout(part))?,
            }
            if to == To::All || self.rank().is_leader() {
                staging.send(stream, arena, place, bytes)?;
            }
        }
        Ok(())
    }
}

impl Rows {
    pub fn new(span: Span, count: usize, row_bytes: usize) -> Self {
        Self {
            span,
            count,
            row_bytes,
        }
    }
}

/// Some of the sorted rows: those of a rank's experts lie together.
struct OfExperts<'a> {
    rank: Rank,
    starts: &'a [u32],
    part: Range<usize>,
    row_bytes: usize,
}

impl Layout for OfExperts<'_> {
    fn piece(&self, rank: usize, index: usize) -> Option<Range<usize>> {
        if index > 0 {
            return None;
        }
        let experts = self.rank.other(rank).share(self.starts.len() - 1);
        let at = |expert: usize| {
            let row = self.starts[expert] as usize;
            (row.clamp(self.part.start, self.part.end) - self.part.start) * self.row_bytes
        };
        Some(at(experts.start)..at(experts.end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_the_sorted_rows_is_shared_among_the_ranks_of_its_experts() {
        let rank = Rank::new(0, 2).expect("a rank");
        // Four experts of 3, 0, 2 and 4 rows: ranks have rows 0 to 3 and 3 to 9.
        let starts = [0, 3, 3, 5, 9];
        let pieces = |part: Range<usize>| {
            let layout = OfExperts {
                rank,
                starts: &starts,
                part,
                row_bytes: 10,
            };
            assert_eq!(layout.piece(0, 1), None);
            [0, 1].map(|rank| layout.piece(rank, 0).expect("one piece"))
        };
        assert_eq!(pieces(0..9), [0..30, 30..90]);
        assert_eq!(pieces(0..2), [0..20, 20..20]);
        assert_eq!(pieces(2..6), [0..10, 10..40]);
        assert_eq!(pieces(6..9), [0..0, 0..30]);
    }
}
