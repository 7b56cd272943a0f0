//! What is free on each node: kept up to date change by change, so that a decision does not add up all pods.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use operator_core::devices::{ClaimNews, NodeDevices};
use operator_core::{Claim, Cluster, NodeView};

use crate::watch::Key;

/// Nodes and what is taken on them, kept up to date change by change.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Shared with the snapshots of decisions under way.
    pub(crate) cluster: Arc<Cluster>,
    claims: HashMap<Key, Claim>,
    /// Nodes as they are themselves.
    plain: HashMap<String, Arc<NodeView>>,
    /// GPUs that claims may ask for.
    devices: BTreeMap<String, NodeDevices>,
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
        match &node {
            Some(node) => self.plain.insert(name.to_string(), Arc::clone(node)),
            None => self.plain.remove(name),
        };
        let devices = self.devices.get(name);
        let node = node.map(|node| match devices {
            Some(_) => Arc::new(NodeView::clone(&node).with_devices(devices)),
            None => node,
        });
        let nodes = &mut Arc::make_mut(&mut self.cluster).nodes;
        match node {
            Some(node) => nodes.insert(name.to_string(), node),
            None => nodes.remove(name),
        };
    }

    /// The GPUs that claims may ask for, by node; what claims of others hold counts like a pod.
    pub(crate) fn set_devices(&mut self, devices: BTreeMap<String, NodeDevices>) {
        let before = std::mem::replace(&mut self.devices, devices);
        let names: BTreeSet<String> = before.keys().chain(self.devices.keys()).cloned().collect();
        for name in names {
            let after = self.devices.get(&name);
            if before.get(&name) == after {
                continue;
            }
            let held = after.map(|devices| devices.claim(&name));
            // No pod has such a name.
            self.set(&Key::new("", format!("devices of {name}")), held);
            if let Some(node) = self.plain.get(&name).cloned() {
                self.set_node(&name, Some(node));
            }
        }
    }

    /// What is known of resource claims.
    pub(crate) fn set_news(&mut self, news: ClaimNews) {
        if self.cluster.claims != news {
            Arc::make_mut(&mut self.cluster).claims = news;
        }
    }
}
