//! The ranks that serve one replica together: a process group, and one scheduler for all of them.
//!
//! [`ProcessGroup`] is what a backend needs to compute with its share of a model: it tells the others its part of a
//! buffer and gets theirs. [`TcpGroup`] does so over sockets, [`Alone`] has nobody to tell. Rank 0 schedules: a
//! [`LeadingExecutor`] sends every batch to all before it computes its own part, a [`Follower`] computes what it is sent.
//!
//! Invariant: all ranks run the same operations in the same order, and each message says which it belongs to. Nothing
//! waits without a limit: a rank that is gone or silent ends the group with an error that names it, on every rank.

mod codec;
mod door;
mod error;
mod exchange;
mod executor;
mod group;
mod join;
mod poll;
mod secret;
mod tcp;
mod wire;

pub use codec::{CodecError, Command};
pub use error::GroupError;
pub use exchange::{Columns, ExpertOutputs, Owners};
pub use executor::{Follower, LeadingExecutor, Next};
pub use group::{Alone, Layout, ProcessGroup};
pub use join::{Joining, Terms, join, lead_at};
pub use secret::{Secret, SecretError};
pub use tcp::TcpGroup;
