//! A process's place among those that serve one replica together.
//!
//! Invariant: the shares of all ranks are consecutive, cover everything, and differ by one at most; the first rank's is
//! never the smaller one, so what is planned for it is enough for all.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Most ranks of a replica: each talks to every other.
pub const WORLD_SIZE_MAX: u32 = 64;

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
        assert_eq!(Rank::new(0, WORLD_SIZE_MAX + 1), None);
    }
}
