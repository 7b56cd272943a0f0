//! The directory of each node in which replicas keep fetched weights, and the nodes that hold a model's.
//!
//! A node counts when a replica answered there with the weights of this source. It is remembered in the status, so that
//! it outlives pods and operators, until the node is gone. That a node still holds them is likely, not certain: its
//! engines remove the longest unused model when the directory is full. So it is a preference and no more.

use std::collections::BTreeSet;

use operator_api::{NodeCacheStatus, quantity};

use crate::inspect::source_hash;
use crate::plan::Settings;
use crate::replicas::Replica;
use crate::snapshot::Snapshot;
use crate::validate::ValidDeployment;

/// Nodes that are remembered.
pub const NODES_MAX: usize = 64;
/// Directories at the root of a node that are its own.
const SYSTEM: &[&str] = &[
    "bin", "boot", "dev", "etc", "lib", "lib64", "proc", "root", "run", "sbin", "sys", "usr",
];

/// The directory, the same on every node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeCache {
    /// Absolute path on the node.
    pub path: String,
    /// What the models in it may take together; no limit without it.
    pub limit_bytes: Option<u64>,
}

impl NodeCache {
    /// Reads what an administrator typed; `limit` is a quantity, or empty for none.
    ///
    /// # Errors
    /// What is expected of the path, or of the limit.
    pub fn new(path: &str, limit: &str) -> Result<Self, NodeCacheRefused> {
        let parts: Vec<&str> = path.split('/').skip(1).collect();
        let is_plain = |part: &&str| {
            let mut letters = part.chars();
            !part.is_empty()
                && !part.starts_with('.')
                && letters.all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let is_own = parts.len() >= 2 && !SYSTEM.contains(&parts[0]) && path.len() <= 256;
        if !path.starts_with('/') || !is_own || !parts.iter().all(is_plain) {
            return Err(NodeCacheRefused::Path);
        }
        let limit_bytes = match limit {
            "" => None,
            limit => Some(
                quantity::Quantity::from(limit)
                    .value()
                    .filter(|bytes| *bytes > 0)
                    .ok_or(NodeCacheRefused::Limit)?,
            ),
        };
        Ok(Self {
            path: path.to_owned(),
            limit_bytes,
        })
    }

    /// The cache that the replicas of a deployment share with others of their node. Not those that fetch nothing, and
    /// not those of an image of the user's, which others' weights are not trusted to.
    pub fn of<'a>(valid: &ValidDeployment, settings: &'a Settings) -> Option<&'a Self> {
        let is_shared = valid.source.is_fetched() && valid.template.image.is_none();
        settings.node_cache.as_ref().filter(|_| is_shared)
    }
}

/// What was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeCacheRefused {
    /// The path.
    Path,
    /// The limit.
    Limit,
}

/// What is known after `snapshot`: nodes where a replica of `revision` answers, then those remembered.
pub fn remember(
    valid: &ValidDeployment,
    settings: &Settings,
    revision: &str,
    replicas: &[Replica<'_>],
    snapshot: &Snapshot,
) -> Option<NodeCacheStatus> {
    NodeCache::of(valid, settings)?;
    let mut answering: Vec<&String> = replicas
        .iter()
        .filter(|replica| replica.revision() == revision)
        .flat_map(Replica::pods)
        .filter(|pod| pod.ready && !pod.deleting)
        .filter_map(|pod| pod.node.as_ref())
        .collect();
    answering.sort();
    let before = snapshot.deployment.status.as_ref();
    let before = before.and_then(|status| status.node_cache.as_ref());
    let remembered = holders(before, valid, settings);
    let model = source_hash(valid);
    let mut seen = BTreeSet::new();
    let nodes: Vec<String> = answering
        .into_iter()
        .chain(&remembered)
        .filter(|node| snapshot.cluster.nodes.contains_key(*node) && seen.insert(*node))
        .take(NODES_MAX)
        .cloned()
        .collect();
    (!nodes.is_empty()).then_some(NodeCacheStatus { model, nodes })
}

/// Nodes that hold the weights of a deployment.
pub fn holders(
    known: Option<&NodeCacheStatus>,
    valid: &ValidDeployment,
    settings: &Settings,
) -> Vec<String> {
    known
        .filter(|known| known.model == source_hash(valid))
        .filter(|_| NodeCache::of(valid, settings).is_some())
        .map_or(Vec::new(), |known| known.nodes.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_its_own_and_a_quantity_are_taken() {
        for (path, limit, expected) in [
            ("/var/lib/cachalot", "", Ok(None)),
            ("/mnt/nvme0/models.v1", "500Gi", Ok(Some(500 << 30))),
            ("/data/c", "1.5T", Ok(Some(1_500_000_000_000))),
            ("", "", Err(NodeCacheRefused::Path)),
            ("/", "", Err(NodeCacheRefused::Path)),
            ("/cachalot", "", Err(NodeCacheRefused::Path)),
            ("var/lib/cachalot", "", Err(NodeCacheRefused::Path)),
            ("/var/lib/../kubelet", "", Err(NodeCacheRefused::Path)),
            ("/var//lib", "", Err(NodeCacheRefused::Path)),
            ("/var/lib/", "", Err(NodeCacheRefused::Path)),
            ("/etc/cachalot", "", Err(NodeCacheRefused::Path)),
            ("/var/lib/a b", "", Err(NodeCacheRefused::Path)),
            ("/var/lib/cachalot", "0", Err(NodeCacheRefused::Limit)),
            ("/var/lib/cachalot", "much", Err(NodeCacheRefused::Limit)),
        ] {
            let found = NodeCache::new(path, limit).map(|cache| cache.limit_bytes);
            assert_eq!(found, expected, "{path} {limit}");
        }
    }
}
