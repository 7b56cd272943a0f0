//! What is free on each node: kept up to date change by change, so that a decision does not add up all pods.

use std::collections::HashMap;
use std::sync::Arc;

use operator_core::{Claim, Cluster, NodeView};

use crate::watch::Key;

/// Nodes and what is taken on them, kept up to date change by change.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Shared with the snapshots of decisions under way.
    pub(crate) cluster: Arc<Cluster>,
    claims: HashMap<Key, Claim>,
}

impl Ledger {
    /// What a pod takes from now on; none when it takes nothing.
    pub(crate) fn set(&mut self, pod: &Key, claim: Option<Claim>) {
        if self.claims.get(pod) == claim.as_ref() {
            return;
        }
        // Copies only while a snapshot is held by a decision under way.
        let used = &mut Arc::make_mut(&mut self.cluster).used;
        let before = match &claim {
            Some(claim) => self.claims.insert(pod.clone(), claim.clone()),
            None => self.claims.remove(pod),
        };
        if let Some(before) = before
            && let Some(sum) = used.get_mut(&before.node)
        {
            *sum = sum.minus(before.requests);
            if *sum == operator_core::Resources::default() {
                used.remove(&before.node);
            }
        }
        if let Some(claim) = claim {
            *used.entry(claim.node).or_default() += claim.requests;
        }
    }

    /// A node as it is now; none when it is gone.
    pub(crate) fn set_node(&mut self, name: &str, node: Option<Arc<NodeView>>) {
        let nodes = &mut Arc::make_mut(&mut self.cluster).nodes;
        match node {
            Some(node) => nodes.insert(name.to_string(), node),
            None => nodes.remove(name),
        };
    }
}
