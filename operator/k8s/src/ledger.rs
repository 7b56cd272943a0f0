//! What is free on each node: kept up to date change by change, so that a decision does not add up all pods.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use operator_core::devices::{ClaimNews, NodeDevices};
use operator_core::{Claim, Cluster, NodeView};

use crate::trim::ChildPod;
use crate::watch::Key;

/// Who takes something from a node. What is watched is shared with its mirror.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Taker {
    /// A pod of ours.
    Pod(Arc<ChildPod>),
    /// Anyone else, or a pod that does not exist yet.
    Other(Arc<Claim>),
}

impl Taker {
    /// The node, and what is taken; none where nothing is.
    fn takes(&self) -> Option<Claim> {
        match self {
            Self::Pod(pod) => pod.view()?.claim(),
            Self::Other(claim) => Some(Claim::clone(claim)),
        }
    }
}

/// Nodes and what is taken on them, kept up to date change by change.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Shared with the snapshots of decisions under way.
    pub(crate) cluster: Arc<Cluster>,
    takers: HashMap<Key, Taker>,
    /// Nodes as they are themselves.
    plain: HashMap<String, Arc<NodeView>>,
    /// GPUs that claims may ask for.
    devices: BTreeMap<String, NodeDevices>,
}

impl Ledger {
    /// Who takes something under a pod's name from now on; none when nobody does.
    pub(crate) fn set(&mut self, pod: &Key, taker: Option<Taker>) {
        if let Some(Taker::Pod(after)) = &taker
            && let Some(Taker::Pod(before)) = self.takers.get_mut(pod)
            && before.takes == after.takes
        {
            // Most of what happens to a pod changes nothing here; a packed pod is not opened for it.
            *before = Arc::clone(after);
            return;
        }
        let after = taker.as_ref().and_then(Taker::takes);
        let before = match taker.filter(|_| after.is_some()) {
            Some(taker) => self.takers.insert(pod.clone(), taker),
            None => self.takers.remove(pod),
        };
        let before = before.as_ref().and_then(Taker::takes);
        if before == after {
            return;
        }
        // Copies only while a snapshot is held by a decision under way.
        let cluster = Arc::make_mut(&mut self.cluster);
        if let Some(claim) = before {
            cluster.remove(&claim);
        }
        if let Some(claim) = after {
            cluster.add(&claim);
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
        let nodes = Arc::make_mut(&mut Arc::make_mut(&mut self.cluster).nodes);
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
            let held = after.map(|devices| Taker::Other(Arc::new(devices.claim(&name))));
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
