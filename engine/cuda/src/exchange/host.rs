//! By way of host memory: from the device to pinned memory, over the group's connections, and back, so many rows at a time.
//! That waits for the stream, so a pass of such a rank is not recorded.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use engine_group::{Columns, Layout, Owners, ProcessGroup};
use engine_spec::Rank;
use kernels::driver::{Arena, Device, DriverError, Staging, Stream};

use super::{Rows, Shared};
use crate::CudaError;

/// Pinned memory for rows on their way; more for rows that are longer.
const STAGING_BYTES: usize = 8 << 20;

/// See the module.
#[derive(Debug)]
pub(super) struct Host {
    staging: RefCell<Staging>,
    bytes: usize,
}

/// Who gets the others' rows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum To {
    All,
    Leader,
}

/// A pass's exchange: the group and the queue.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub group: &'a dyn ProcessGroup,
    pub arena: &'a Arena,
    pub stream: &'a Stream,
}

impl Host {
    /// For rows of at most `row_bytes`.
    pub fn new(device: &Arc<Device>, row_bytes: usize) -> Result<Self, DriverError> {
        let bytes = STAGING_BYTES.max(row_bytes);
        Ok(Self {
            staging: RefCell::new(Staging::new(device, bytes)?),
            bytes,
        })
    }

    pub fn columns(&self, at: At<'_>, shared: Shared) -> Result<(), CudaError> {
        let rank = at.group.rank();
        self.by_rows(at, shared.rows(), To::All, |part| {
            shared.columns(rank, part.len())
        })
    }

    pub fn logits(&self, at: At<'_>, shared: Shared) -> Result<(), CudaError> {
        let rank = at.group.rank();
        self.by_rows(at, shared.rows(), To::Leader, |part| {
            shared.columns(rank, part.len())
        })
    }

    /// Rows of the step's `tokens`, which were looked up by the ranks that hold them.
    pub fn embedded(
        &self,
        at: At<'_>,
        rows: Rows,
        tokens: &[u32],
        vocabulary: usize,
    ) -> Result<(), CudaError> {
        let layout = |part: Range<usize>| {
            let mut owners = Owners::default();
            owners.group(at.group.rank(), &tokens[part], vocabulary, rows.row_bytes);
            owners
        };
        self.by_rows(at, rows, To::All, layout)
    }

    /// Sorted rows of all experts; `starts` has the first row of each, and the end.
    pub fn experts(&self, at: At<'_>, rows: Rows, starts: &[u32]) -> Result<(), CudaError> {
        let layout = |part| OfExperts {
            rank: at.group.rank(),
            starts,
            part,
            row_bytes: rows.row_bytes,
        };
        self.by_rows(at, rows, To::All, layout)
    }

    /// Exchanges as many rows at a time as the pinned memory holds; `layout` says which bytes of them are whose.
    fn by_rows<L: Layout>(
        &self,
        at: At<'_>,
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
            let place = at.arena.part(span.at + first * row_bytes, bytes)?;
            staging.fetch(at.stream, at.arena, place, bytes)?;
            let buffer = &mut staging.fill()?[..bytes];
            match to {
                To::All => at.group.all_gather(buffer, &layout(part))?,
                To::Leader => at.group.gather(buffer, &layout(part))?,
            }
            if to == To::All || at.group.rank().is_leader() {
                staging.send(at.stream, at.arena, place, bytes)?;
            }
        }
        Ok(())
    }
}

impl Shared {
    fn columns(self, rank: Rank, rows: usize) -> Columns {
        Columns {
            rank,
            rows,
            columns: self.columns,
            unit: self.unit,
            element: self.element,
            skip: 0,
            stride: self.columns * self.element,
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
