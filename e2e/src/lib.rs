//! What the tests against a real Kubernetes share: a cluster driven as a user drives it (kubectl and
//! HTTP), labs that start and stop with a test, and waiting for a condition instead of sleeping.
//!
//! Tests that need a cluster are compiled only with the feature `lab`; `make test` starts what they
//! need. Nothing here decides anything: a failing wait ends with the last thing that was seen.

pub mod chat;
pub mod cluster;
pub mod ending;
pub mod lab;
pub mod wait;

pub use cluster::{Cluster, Namespace};
pub use ending::Ending;
pub use lab::Lab;
pub use wait::eventually;

use std::path::{Path, PathBuf};

/// The workspace's root.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// A tool that `make up` or `make tools` puts into `.lab/bin`, else the one on the PATH.
pub fn tool(name: &str) -> PathBuf {
    let ours = root().join(".lab/bin").join(name);
    if ours.exists() { ours } else { name.into() }
}
