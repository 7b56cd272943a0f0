//! Why ranks cannot go on together.

use std::io;

use thiserror::Error;

/// See the module's description. Whatever it is, the group is of no use any more.
#[derive(Debug, Error)]
pub enum GroupError {
    /// A rank's process ended, or the connection to it did.
    #[error("rank {rank} is gone: {source}")]
    Lost {
        /// Which.
        rank: usize,
        /// What its socket said.
        source: io::Error,
    },
    /// Nothing came from ranks that should have sent something.
    #[error(
        "rank {ranks} was silent for {seconds:.1} s: it hangs, or the network to it is cut; mend that, or raise \
         --group-timeout-seconds"
    )]
    Silent {
        /// Which, separated by commas.
        ranks: String,
        /// For how long.
        seconds: f64,
    },
    /// A rank does something else than this one.
    #[error("rank {rank} is out of step: {problem}")]
    OutOfStep {
        /// Which.
        rank: usize,
        /// What it sent and what was expected.
        problem: String,
    },
    /// Rank 0 does not want this rank.
    #[error("rank 0 at {leader} refuses this rank: {reason}")]
    Refused {
        /// Where rank 0 is.
        leader: String,
        /// What it said.
        reason: String,
    },
    /// Ranks did not come.
    #[error(
        "rank {missing} did not join within {seconds} s; start every rank with the same --world-size and --leader, or raise \
         --join-timeout-seconds"
    )]
    NotComplete {
        /// Which, separated by commas.
        missing: String,
        /// How long this rank waited.
        seconds: u64,
    },
    /// Rank 0 was not found.
    #[error(
        "rank 0 did not answer at {leader} within {seconds} s ({last}); check --leader, and that rank 0 runs"
    )]
    NoLeader {
        /// Where it should be.
        leader: String,
        /// How long this rank tried.
        seconds: u64,
        /// What the last attempt ended with.
        last: String,
    },
    /// The address of rank 0 cannot be used.
    #[error("--leader {address}: {problem}")]
    Address {
        /// As given.
        address: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The operating system refused something local.
    #[error("a socket cannot be used: {0}")]
    Socket(#[from] io::Error),
    /// An earlier operation failed.
    #[error("the ranks parted earlier: {0}")]
    Parted(String),
}
