//! A process's place among those that serve one replica together.
//!
//! Invariant: the shares of all ranks are consecutive, cover everything, and differ by one at most (rows of matrices by
//! [`ROW_BLOCK`]); the first rank's is never the smaller one, so what is planned for it is enough for all.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Most ranks of a replica: each talks to every other.
pub const WORLD_SIZE_MAX: u32 = 64;

/// Rows of a matrix that are not cut apart where it has enough: a block of FP8 weights has one scale.
pub const ROW_BLOCK: usize = 128;
/// The same of smaller matrices: values that a GPU's thread stores at once.
pub const ROW_VECTOR: usize = 8;

/// One of the ranks of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rank {
    index: u32,
    count: u32,
}

impl Rank {
    /// The only rank.
    pub const ALONE: Self = Self { index: 0, count: 1 };

    /// Rank `index` of `count`; `None` where there is no such rank, or more than [`WORLD_SIZE_MAX`].
    pub fn new(index: u32, count: u32) -> Option<Self> {
        (index < count && count <= WORLD_SIZE_MAX).then_some(Self { index, count })
    }

    /// From 0.
    pub fn index(self) -> usize {
        self.index as usize
    }

    /// How many there are.
    pub fn count(self) -> usize {
        self.count as usize
    }

    /// Whether there is no other.
    pub fn is_alone(self) -> bool {
        self.count == 1
    }

    /// Whether it takes the requests and leads the others.
    pub fn is_leader(self) -> bool {
        self.index == 0
    }

    /// Another rank of the same replica.
    pub fn other(self, index: usize) -> Self {
        Self {
            index: index as u32,
            ..self
        }
    }

    /// All ranks of the replica, this one included.
    pub fn all(self) -> impl Iterator<Item = Self> {
        (0..self.count).map(move |index| Self { index, ..self })
    }

    /// Which of `total` things are this rank's.
    pub fn share(self, total: usize) -> Range<usize> {
        let (each, more) = (total / self.count(), total % self.count());
        let first = |index: usize| index * each + index.min(more);
        first(self.index())..first(self.index() + 1)
    }

    /// Rows that are dealt out together when a matrix of `rows` is shared.
    pub fn row_unit(self, rows: usize) -> usize {
        let is_enough = |unit: &usize| rows.is_multiple_of(*unit) && rows / unit >= self.count();
        let mut units = [ROW_BLOCK, ROW_VECTOR].into_iter();
        units.find(is_enough).unwrap_or(1)
    }

    /// Which of a matrix' rows are this rank's.
    pub fn share_rows(self, rows: usize) -> Range<usize> {
        let unit = self.row_unit(rows);
        let units = self.share(rows / unit);
        units.start * unit..units.end * unit
    }

    /// The most rows of a matrix that one of `count` ranks holds.
    pub fn rows_max(rows: u64, count: u32) -> u64 {
        let first = Self {
            index: 0,
            count: count.max(1),
        };
        let rows = usize::try_from(rows).unwrap_or(usize::MAX);
        first.share_rows(rows).len() as u64
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.index, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_each_other_and_the_first_is_the_largest() {
        for count in 1..=9 {
            for total in [0, 1, 7, 8, 60, 96, 129_280] {
                let mut next = 0;
                let largest = Rank::ALONE.other(0).share(total).len();
                assert_eq!(largest, total);
                let first = Rank::new(0, count).expect("a rank").share(total).len();
                for rank in Rank::new(0, count).expect("a rank").all() {
                    let share = rank.share(total);
                    assert_eq!(share.start, next);
                    assert!(share.len() <= first && first - share.len() <= 1);
                    next = share.end;
                }
                assert_eq!(next, total);
            }
        }
        assert_eq!(Rank::new(2, 2), None);
    }

    #[test]
    fn rows_are_shared_in_blocks_where_there_are_enough() {
        // The hidden width of DeepSeek-V3 has 56 blocks: not a whole number for each of 16 ranks.
        let shares = |count, rows| -> Vec<usize> {
            let ranks = Rank::new(0, count).expect("a rank").all();
            ranks.map(|rank| rank.share_rows(rows).len()).collect()
        };
        let of_16 = shares(16, 7168);
        assert_eq!(of_16[..8], [512; 8]);
        assert_eq!(of_16[8..], [384; 8]);
        assert_eq!(shares(8, 7168), [896; 8]);
        assert_eq!(shares(3, 256), [88, 88, 80]);
        assert_eq!(shares(3, 100), [34, 33, 33]);
        assert_eq!(shares(4, 200), [56, 48, 48, 48]);
        for (count, rows) in [(16, 7168), (3, 256), (5, 129_280), (1, 96)] {
            let shares = shares(count, rows);
            assert_eq!(shares.iter().sum::<usize>(), rows);
            assert_eq!(Rank::rows_max(rows as u64, count), shares[0] as u64);
            assert!(shares.is_sorted_by(|left, right| left >= right));
        }
    }

    #[test]
    fn no_rank_is_beyond_the_last_one() {
        assert_eq!(Rank::new(2, 2), None);
        assert_eq!(Rank::new(0, WORLD_SIZE_MAX + 1), None);
    }
}
