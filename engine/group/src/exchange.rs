//! What ranks tell each other between the parts of a step.
//!
//! Each rank leaves its results where one rank alone would, between those of the others, and the group fills in theirs:
//! columns of rows, whole rows, or the rows of its experts. Invariant: a value is computed by one rank and copied by the
//! others, so that all hold the same bytes, those that one rank alone would hold.

use std::ops::Range;

use engine_spec::Rank;

use crate::group::Layout;

/// Rows of which every rank has its share of the columns.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    /// Any rank of the group.
    pub rank: Rank,
    /// Rows.
    pub rows: usize,
    /// Columns of all ranks.
    pub columns: usize,
    /// Columns that are dealt out together: those of a head, or [`Rank::row_unit`] of a matrix' rows.
    pub unit: usize,
    /// Bytes of an element.
    pub element: usize,
    /// Bytes from the buffer's begin to the first row.
    pub skip: usize,
    /// Bytes from one row to the next.
    pub stride: usize,
}

impl Columns {
    fn share(&self, rank: usize) -> Range<usize> {
        let units = self.rank.other(rank).share(self.columns / self.unit);
        units.start * self.unit..units.end * self.unit
    }
}

impl Layout for Columns {
    fn piece(&self, rank: usize, index: usize) -> Option<Range<usize>> {
        if index >= self.rows {
            return None;
        }
        let share = self.share(rank);
        let row = self.skip + index * self.stride;
        Some(row + share.start * self.element..row + share.end * self.element)
    }

    fn bytes(&self, rank: usize) -> usize {
        self.rows * self.share(rank).len() * self.element
    }
}

/// Rows that the ranks which own the step's tokens looked up.
#[derive(Debug, Default)]
pub struct Owners {
    /// Rows, grouped by rank.
    rows: Vec<u32>,
    /// First index in `rows` of each rank, and the end.
    starts: Vec<u32>,
    /// Bytes of a row.
    row_bytes: usize,
}

impl Owners {
    /// Groups the rows of `tokens` by the ranks that own them among the `vocabulary` rows of a table.
    pub fn group(&mut self, rank: Rank, tokens: &[u32], vocabulary: usize, row_bytes: usize) {
        self.row_bytes = row_bytes;
        self.rows.clear();
        self.starts.clear();
        for rank in rank.all() {
            self.starts.push(self.rows.len() as u32);
            let own = rank.share_rows(vocabulary);
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
pub struct ExpertOutputs<'a> {
    /// Any rank of the group.
    pub rank: Rank,
    /// First row of each expert, and the end.
    pub starts: &'a [u32],
    /// Bytes from the buffer's begin to the first row.
    pub skip: usize,
    /// Bytes of a row.
    pub row_bytes: usize,
    /// Where the shared expert's outputs are.
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
