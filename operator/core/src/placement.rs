//! Which nodes can take a replica, in order of preference, and for every other node why not.
//!
//! Room is counted as kube-scheduler counts it: allocatable minus the requests of all pods, ours
//! that are not bound yet included. A replica is offered several nodes, best first, so that a
//! choice made on slightly old news is not wrong at once.

mod device;
mod reasons;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Toleration;

use crate::fit::Layout;
use crate::resources::Resources;
use crate::snapshot::{Cluster, NodeView, Taint, TaintEffect};
use crate::validate::ValidPlacement;

pub use device::DeviceWhyNot;
pub use reasons::{Group, WhyNot, grouped, groups};

/// Nodes a replica is offered.
pub const OFFERED_NODES_MAX: usize = 16;

/// What is free on each node while a plan takes it up.
#[derive(Clone, Debug)]
pub struct Room<'a> {
    cluster: &'a Cluster,
    taken: BTreeMap<String, Resources>,
    returned: BTreeMap<String, Resources>,
}

impl<'a> Room<'a> {
    /// The room a snapshot shows.
    pub fn new(cluster: &'a Cluster) -> Self {
        Self {
            cluster,
            taken: BTreeMap::new(),
            returned: BTreeMap::new(),
        }
    }

    /// Takes room on a node.
    pub fn take(&mut self, node: &str, amount: Resources) {
        *self.taken.entry(node.to_owned()).or_default() += amount;
    }

    /// The same room without what a pod that is not bound yet is counted for.
    pub fn without(&self, node: &str, amount: Resources) -> Self {
        let mut room = self.clone();
        room.give_back(node, amount);
        room
    }

    /// Gives room on a node back.
    pub fn give_back(&mut self, node: &str, amount: Resources) {
        *self.returned.entry(node.to_owned()).or_default() += amount;
    }

    /// What is free on a node.
    pub fn free(&self, node: &NodeView) -> Resources {
        self.free_with(node, Resources::default())
    }

    /// What would be free on a node if `given_up` were given back too.
    pub fn free_with(&self, node: &NodeView, given_up: Resources) -> Resources {
        let amount =
            |map: &BTreeMap<String, Resources>| map.get(&node.name).copied().unwrap_or_default();
        let returned = amount(&self.returned) + given_up;
        let used = self.cluster.used.get(node.name.as_str());
        let used = used.copied().unwrap_or_default() + amount(&self.taken);
        node.allocatable.minus(used.minus(returned))
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Option<&'a NodeView> {
        self.cluster.nodes.get(name).map(AsRef::as_ref)
    }

    /// All nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &'a NodeView> {
        self.cluster.nodes.values().map(AsRef::as_ref)
    }
}

/// What one replica needs of a node, and the preferences among nodes.
#[derive(Clone, Debug)]
pub struct Wish<'a> {
    /// How it is laid out.
    pub layout: &'a Layout,
    /// What it asks for.
    pub requests: Resources,
    /// Which nodes the user allows.
    pub placement: &'a ValidPlacement,
    /// Replicas of this deployment by node.
    pub own: BTreeMap<String, usize>,
    /// Nodes where a replica of this deployment failed not long ago.
    pub avoid: Vec<String>,
    /// Nodes that hold the weights.
    pub holders: BTreeSet<&'a str>,
}

/// Why a node cannot take a replica; none when it can.
pub fn why_not(node: &NodeView, wish: &Wish<'_>, room: &Room<'_>) -> Option<WhyNot> {
    standing(node, wish).or_else(|| shortage(wish, node, room.free(node)))
}

/// Reasons that do not change when pods come and go.
pub(crate) fn standing(node: &NodeView, wish: &Wish<'_>) -> Option<WhyNot> {
    if !node.ready {
        return Some(WhyNot::NotReady);
    }
    if node.unschedulable {
        return Some(WhyNot::Cordoned);
    }
    for (key, value) in &wish.placement.node_selector {
        if node.labels.get(key) != Some(value.as_str()) {
            return Some(WhyNot::Selector(format!("{key}={value}")));
        }
    }
    let on_gpus = wish.layout.gpus() > 0;
    if let Some(taint) = node.taints.iter().find(|taint| {
        taint.effect != TaintEffect::PreferNoSchedule
            && !(on_gpus && taint.key == crate::resources::NVIDIA_GPU)
            && !wish
                .placement
                .tolerations
                .iter()
                .any(|t| tolerates(t, taint))
    }) {
        let value = if taint.value.is_empty() {
            String::new()
        } else {
            format!("={}", taint.value)
        };
        return Some(WhyNot::Tainted(format!(
            "{}{value}:{:?}",
            taint.key, taint.effect
        )));
    }
    if !on_gpus {
        return None;
    }
    if let Some(fault) = node.faults.first() {
        return Some(WhyNot::Faulty(fault.clone()));
    }
    if let Some(words) = node.reported.first() {
        return Some(WhyNot::Reported(words.clone()));
    }
    device::why_not(node, wish.layout)
}

pub(crate) fn shortage(wish: &Wish<'_>, node: &NodeView, free: Resources) -> Option<WhyNot> {
    let needs = wish.requests;
    let devices = device::shortage(&wish.layout.kind, &needs, node, &free);
    if devices.is_some() {
        return devices;
    }
    if free.memory_bytes < needs.memory_bytes {
        return Some(WhyNot::Memory {
            needs: needs.memory_bytes,
            has: free.memory_bytes,
        });
    }
    if free.cpu_millis < needs.cpu_millis {
        return Some(WhyNot::Cpu {
            needs: needs.cpu_millis,
            has: free.cpu_millis,
        });
    }
    (free.pods < 1).then_some(WhyNot::Pods)
}

/// Whether a toleration accepts a taint, as Kubernetes defines it.
pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = match toleration.effect.as_deref().unwrap_or("") {
        "" => true,
        "NoSchedule" => taint.effect == TaintEffect::NoSchedule,
        "PreferNoSchedule" => taint.effect == TaintEffect::PreferNoSchedule,
        "NoExecute" => taint.effect == TaintEffect::NoExecute,
        _ => false,
    };
    let key = toleration.key.as_deref().unwrap_or("");
    let exists = toleration.operator.as_deref() == Some("Exists");
    effect
        && (key == taint.key || key.is_empty() && exists)
        && (exists || toleration.value.as_deref().unwrap_or("") == taint.value)
}

/// Nodes that can take a replica, best first, at most [`OFFERED_NODES_MAX`].
///
/// # Errors
/// When none can: why not, for each node.
pub fn offer(wish: &Wish<'_>, room: &Room<'_>) -> Result<Vec<String>, Vec<WhyNot>> {
    Offers::new(wish, room).best(&[], None)
}

/// Nodes on offer to replicas that are alike, kept in order while replicas take them, so that a
/// thousand replicas do not each look at every node.
#[derive(Clone, Debug)]
pub struct Offers {
    /// Nodes that fit, in order, by value of the label that replicas are spread over; all under
    /// one value when they are not spread.
    fitting: BTreeMap<String, BTreeSet<Rank>>,
    /// Replicas of this deployment by that value.
    counts: BTreeMap<String, usize>,
    /// Why not, for the others.
    why_not: BTreeMap<String, WhyNot>,
}

impl Offers {
    /// The offers that a snapshot shows.
    pub fn new(wish: &Wish<'_>, room: &Room<'_>) -> Self {
        let mut offers = Self {
            fitting: BTreeMap::new(),
            counts: BTreeMap::new(),
            why_not: BTreeMap::new(),
        };
        for node in room.nodes() {
            if wish.placement.spread_by.is_some()
                && let Some(own) = wish.own.get(&node.name)
            {
                *offers.counts.entry(domain(node, wish)).or_default() += own;
            }
            offers.put(node, wish, room);
        }
        offers
    }

    fn put(&mut self, node: &NodeView, wish: &Wish<'_>, room: &Room<'_>) {
        match why_not(node, wish, room) {
            None => {
                let ranks = self.fitting.entry(domain(node, wish)).or_default();
                ranks.insert(rank(node, wish, room));
            }
            Some(reason) => {
                self.why_not.insert(node.name.clone(), reason);
            }
        }
    }

    /// Nodes for the next replica, best first; those in `refused` come last. With `on_demand_min` no
    /// spot node is among them: so many replicas belong elsewhere.
    ///
    /// # Errors
    /// When there is none: why not, for each node.
    pub fn best(
        &self,
        refused: &[String],
        on_demand_min: Option<u32>,
    ) -> Result<Vec<String>, Vec<WhyNot>> {
        let mut domains: Vec<(usize, &BTreeSet<Rank>)> = self
            .fitting
            .iter()
            .map(|(domain, ranks)| (self.counts.get(domain).copied().unwrap_or(0), ranks))
            .collect();
        domains.sort_by_key(|(count, _)| *count);
        let (mut best, mut last) = (Vec::new(), Vec::new());
        for alike in domains.chunk_by(|(left, _), (right, _)| left == right) {
            // No more of each can be among the best than are offered in all.
            let reach = OFFERED_NODES_MAX + refused.len();
            let mut ranks: Vec<&Rank> = alike
                .iter()
                .flat_map(|(_, ranks)| {
                    let allowed = |rank: &&Rank| on_demand_min.is_none() || rank.pricey;
                    ranks.iter().filter(allowed).take(reach)
                })
                .collect();
            ranks.sort();
            for rank in ranks {
                if refused.contains(&rank.name) {
                    &mut last
                } else {
                    &mut best
                }
                .push(rank.name.clone());
            }
            if best.len() >= OFFERED_NODES_MAX {
                break;
            }
        }
        best.append(&mut last);
        best.truncate(OFFERED_NODES_MAX);
        if best.is_empty() {
            let held_back = self.fitting.values().flatten();
            let spot = held_back.filter_map(|_| Some(WhyNot::Spot(on_demand_min?)));
            return Err(self.why_not.values().cloned().chain(spot).collect());
        }
        Ok(best)
    }

    /// A replica takes a node: `before` is the room without it, `wish` and `room` are with it.
    pub fn take(&mut self, name: &str, before: &Rank, wish: &Wish<'_>, room: &Room<'_>) {
        let Some(node) = room.cluster.nodes.get(name) else {
            return;
        };
        let domain = domain(node, wish);
        if let Some(ranks) = self.fitting.get_mut(&domain) {
            ranks.remove(before);
            if ranks.is_empty() {
                self.fitting.remove(&domain);
            }
        }
        if wish.placement.spread_by.is_some() {
            *self.counts.entry(domain).or_default() += 1;
        }
        self.put(node, wish, room);
    }
}

/// Value of the label that replicas are spread over; empty when they are not spread.
fn domain(node: &NodeView, wish: &Wish<'_>) -> String {
    let key = wish.placement.spread_by.as_deref();
    key.map_or("", |key| node.label(key)).to_owned()
}

/// What reports the GPUs of a node at fault, unless the user accepts it; none for replicas that
/// need no GPU.
pub fn fault(node: &NodeView, gpus: u32, placement: &ValidPlacement) -> Option<String> {
    if gpus == 0 {
        return None;
    }
    let tainted = node.taints.iter().find(|taint| {
        crate::health::is_fault_taint(&taint.key)
            && taint.effect != TaintEffect::PreferNoSchedule
            && !placement.tolerations.iter().any(|t| tolerates(t, taint))
    });
    let tainted = tainted.map(|taint| format!("taint {}", taint.key));
    node.faults.first().cloned().or(tainted)
}

/// Taints of nodes that are about to be removed: by the Kubernetes cluster autoscaler and by Karpenter.
const REMOVAL_TAINTS: [&str; 2] = ["ToBeDeletedByClusterAutoscaler", "karpenter.sh/disrupted"];

/// What says that a node is being emptied, unless the user accepts it.
pub fn closing(node: &NodeView, placement: &ValidPlacement) -> Option<String> {
    let name = &node.name;
    if node.unschedulable {
        return Some(format!("node {name} is cordoned"));
    }
    let tainted = node.taints.iter().find(|taint| {
        REMOVAL_TAINTS.contains(&taint.key.as_str())
            && !placement.tolerations.iter().any(|t| tolerates(t, taint))
    });
    tainted.map(|taint| format!("node {name} has the taint {}", taint.key))
}

/// Order of nodes of one domain: those without recent failures, spot nodes where they are preferred,
/// those without taints to avoid and those that hold the weights come first; GPU replicas are packed so that whole nodes
/// stay free, CPU replicas go where most is free and away from GPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    failed_here: bool,
    /// Not spot, where spot is preferred.
    pricey: bool,
    tainted: bool,
    own: usize,
    lacks_weights: bool,
    first: u64,
    second: u64,
    name: String,
}

/// The rank of a node.
pub fn rank(node: &NodeView, wish: &Wish<'_>, room: &Room<'_>) -> Rank {
    let free = room.free(node);
    let (own, first) = if wish.layout.gpus() > 0 {
        (0, wish.layout.kind.count_in(&free))
    } else {
        let own = wish.own.get(&node.name).copied().unwrap_or(0);
        (own, node.allocatable.devices())
    };
    Rank {
        failed_here: wish.avoid.contains(&node.name),
        pricey: wish.placement.on_demand_min.is_some() && !crate::spot::is_spot(node),
        tainted: !node.taints.is_empty(),
        own,
        lacks_weights: !wish.holders.contains(node.name.as_str()),
        first,
        second: u64::MAX - free.memory_bytes,
        name: node.name.clone(),
    }
}
