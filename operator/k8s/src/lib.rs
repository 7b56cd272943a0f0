//! The only importer of the Kubernetes client: watches, server-side apply, events, lease, scraping.
//!
//! Nothing here decides anything about models. Watches become a `Snapshot` of plain values, `operator-core` turns that
//! into actions, and this crate carries them out.

pub mod apply;
pub mod claims;
pub mod client;
pub mod error;
pub mod events;
pub mod guard;
pub mod http;
pub mod lease;
mod ledger;
pub mod list;
mod opened;
mod packed;
pub mod prometheus;
mod protobuf;
pub mod read;
pub mod retry;
mod rivals;
pub mod sampling;
pub mod scrape;
#[cfg(test)]
mod standin;
mod trim;
mod wakes;
pub mod watch;
pub mod world;
pub mod write;

/// Owner of the fields we apply, and our name in `managedFields`.
pub const FIELD_MANAGER: &str = "cachalot";

pub use kube::Client;

/// The time a decision is made at, in whole milliseconds.
pub fn now() -> jiff::Timestamp {
    let now = jiff::Timestamp::now();
    jiff::Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}
