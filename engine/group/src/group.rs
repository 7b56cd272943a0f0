//! What ranks do together, whatever carries it.

use std::fmt::Debug;
use std::ops::Range;
use std::time::Duration;

use engine_spec::Rank;

use crate::error::GroupError;

/// Which bytes of a buffer come from which rank.
///
/// A layout must be the same on all ranks, pieces of a rank ascending, and no byte two ranks'.
pub trait Layout {
    /// A piece of the buffer that rank `rank` fills; `None` after its last one.
    fn piece(&self, rank: usize, index: usize) -> Option<Range<usize>>;

    /// Bytes of all pieces of a rank.
    fn bytes(&self, rank: usize) -> usize {
        (0..)
            .map_while(|index| self.piece(rank, index))
            .map(|piece| piece.len())
            .sum()
    }
}

/// The ranks of a replica, as one of them sees them. All ranks must make the same calls in the same order.
pub trait ProcessGroup: Debug + Send + Sync {
    /// This one.
    fn rank(&self) -> Rank;

    /// Fills `buffer` with the pieces of all ranks; this rank's are there already.
    ///
    /// # Errors
    /// A rank is gone, silent, or not at this call. The group is of no use after that; so for all operations.
    fn all_gather(&self, buffer: &mut [u8], layout: &dyn Layout) -> Result<(), GroupError>;

    /// The same on rank 0 alone; the other ranks' buffers stay as they are.
    ///
    /// # Errors
    /// See [`ProcessGroup::all_gather`].
    fn gather(&self, buffer: &mut [u8], layout: &dyn Layout) -> Result<(), GroupError>;

    /// Waits until all ranks are here, which may take as long as `patience`.
    ///
    /// # Errors
    /// See [`ProcessGroup::all_gather`].
    fn barrier(&self, patience: Duration) -> Result<(), GroupError>;

    /// Rank 0 sends a message to all others.
    ///
    /// # Errors
    /// See [`ProcessGroup::all_gather`].
    fn broadcast(&self, message: &[u8]) -> Result<(), GroupError>;

    /// Silence after which a rank counts as gone.
    fn timeout(&self) -> Duration;

    /// Whether all ranks are connected still; waits for nothing, and does not look while another thread runs an operation.
    ///
    /// # Errors
    /// See [`ProcessGroup::all_gather`].
    fn check(&self) -> Result<(), GroupError>;

    /// Closes all connections, so that the other ranks learn that this one takes part no more.
    fn leave(&self, reason: &str);

    /// The other ranks wait for the next message, as long as `patience` for it to begin; whether one came.
    ///
    /// # Errors
    /// See [`ProcessGroup::all_gather`].
    fn receive(&self, message: &mut Vec<u8>, patience: Duration) -> Result<bool, GroupError>;
}

/// The group of a single rank: it has all of everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl ProcessGroup for Alone {
    fn rank(&self) -> Rank {
        Rank::ALONE
    }

    fn all_gather(&self, _: &mut [u8], _: &dyn Layout) -> Result<(), GroupError> {
        Ok(())
    }

    fn gather(&self, _: &mut [u8], _: &dyn Layout) -> Result<(), GroupError> {
        Ok(())
    }

    fn barrier(&self, _: Duration) -> Result<(), GroupError> {
        Ok(())
    }

    fn broadcast(&self, _: &[u8]) -> Result<(), GroupError> {
        Ok(())
    }

    fn timeout(&self) -> Duration {
        Duration::MAX
    }

    fn check(&self) -> Result<(), GroupError> {
        Ok(())
    }

    fn leave(&self, _: &str) {}

    fn receive(&self, _: &mut Vec<u8>, _: Duration) -> Result<bool, GroupError> {
        Ok(false)
    }
}
