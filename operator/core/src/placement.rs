//! Which nodes can take a replica, in order of preference, and for every other node why not.
//!
//! Room is counted as kube-scheduler counts it: allocatable minus the requests of all pods, ours
//! that are not bound yet included. A replica is offered several nodes, best first, so that a
//! choice made on slightly old news is not wrong at once.

mod device;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use k8s_openapi::api::core::v1::Toleration;

use crate::fit::Layout;
use crate::resources::{Resources, human_bytes};
use crate::snapshot::{Cluster, NodeView, Taint, TaintEffect};
use crate::validate::ValidPlacement;

pub use device::DeviceWhyNot;

/// Nodes a replica is offered.
pub const OFFERED_NODES_MAX: usize = 16;

/// Why a node cannot take a replica. Nodes that differ in `has` only are told of together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WhyNot {
    /// Its kubelet does not report Ready.
    NotReady,
    /// It is cordoned.
    Cordoned,
    /// It lacks a label of the node selector.
    Selector(String),
    /// It has a taint that is not tolerated.
    Tainted(String),
    /// A health check found its GPUs at fault.
    Faulty(String),
    /// It has no GPU.
    NoGpu,
    /// Its GPUs are shared by pods.
    SharedGpu,
    /// Its devices are divided, counted or given out in another way.
    Device(DeviceWhyNot),
    /// Its GPUs are too old.
    OldGpu(u32),
    /// Its GPUs are of a kind that was not asked for.
    OtherProduct(String),
    /// Its GPUs have too little memory each.
    GpuMemory {
        /// Bytes of one GPU needed.
        needs: u64,
        /// Bytes of one GPU there.
        has: u64,
    },
    /// It has too few GPUs.
    FewGpus {
        /// GPUs needed.
        needs: u64,
        /// GPUs there.
        has: u64,
    },
    /// Other pods hold its GPUs.
    GpusTaken {
        /// GPUs needed.
        needs: u64,
        /// GPUs free.
        has: u64,
    },
    /// Too little memory is free.
    Memory {
        /// Bytes needed.
        needs: u64,
        /// Bytes free.
        has: u64,
    },
    /// Too little processor time is free.
    Cpu {
        /// Millicores needed.
        needs: u64,
        /// Millicores free.
        has: u64,
    },
    /// It runs as many pods as it may.
    Pods,
    /// It is spot, and too few replicas are on other nodes.
    Spot(u32),
    /// It can take a rank, and all nodes together cannot take all ranks of one replica.
    FewRanks {
        /// Ranks of one replica.
        needs: u32,
        /// Ranks that have a place at once.
        has: u32,
    },
}

impl WhyNot {
    /// The amount that is there, and the same reason with it left out.
    fn split(&self) -> (u64, Self) {
        let mut same = self.clone();
        let amount = match &mut same {
            Self::GpuMemory { has, .. }
            | Self::FewGpus { has, .. }
            | Self::GpusTaken { has, .. }
            | Self::Memory { has, .. }
            | Self::Cpu { has, .. } => std::mem::take(has),
            Self::Device(why) => why.amount().map(std::mem::take).unwrap_or(0),
            _ => 0,
        };
        (amount, same)
    }

    fn with(mut self, amount: u64) -> Self {
        if let Self::GpuMemory { has, .. }
        | Self::FewGpus { has, .. }
        | Self::GpusTaken { has, .. }
        | Self::Memory { has, .. }
        | Self::Cpu { has, .. } = &mut self
        {
            *has = amount;
        }
        if let Self::Device(why) = &mut self
            && let Some(has) = why.amount()
        {
            *has = amount;
        }
        self
    }
}

impl WhyNot {
    /// What would make the node fit, for people.
    pub fn remedy(&self) -> String {
        match self {
            Self::NotReady => "bring its kubelet back, or delete the node".into(),
            Self::Cordoned => "kubectl uncordon it".into(),
            Self::Selector(label) => {
                format!("label it {label}, or take that out of spec.placement.nodeSelector")
            }
            Self::Tainted(taint) if is_fault(taint) => {
                "repair its GPUs; the taint says that they are at fault".into()
            }
            Self::Tainted(taint) => {
                format!("add {taint} to spec.placement.tolerations, or remove the taint")
            }
            Self::Faulty(_) => {
                "repair it; it is used again when the fault is no longer reported".into()
            }
            Self::NoGpu => "none: the plan is for GPUs".into(),
            Self::SharedGpu => {
                "offer GPUs, or MIG devices, that one pod has alone: no time-slicing, no MPS".into()
            }
            Self::Device(why) => why.remedy(),
            Self::OldGpu(_) => "none: bfloat16 needs newer GPUs".into(),
            Self::OtherProduct(product) => {
                format!("name {product} first in spec.accelerator.products to plan for it instead")
            }
            Self::GpuMemory { needs, .. } => format!(
                "GPUs that can give {} each, more of them per replica (spec.parallelism.tensor), or a smaller spec.context",
                human_bytes(*needs)
            ),
            Self::FewGpus { needs, .. } => format!("a node with {needs} GPUs"),
            Self::GpusTaken { needs, has } => {
                format!(
                    "free {} more GPUs on one of them",
                    needs.saturating_sub(*has)
                )
            }
            Self::Memory { needs, has } => format!(
                "free {} more memory on one of them",
                human_bytes(needs.saturating_sub(*has))
            ),
            Self::Cpu { needs, has } => {
                format!(
                    "free {}m more CPU on one of them",
                    needs.saturating_sub(*has)
                )
            }
            Self::Spot(_) => {
                "free an on-demand node, or lower spec.placement.spot.onDemandMin".into()
            }
            Self::Pods => "fewer pods on it, or a higher maxPods of its kubelet".into(),
            Self::FewRanks { needs, has } => {
                format!(
                    "room for {} more ranks on other nodes",
                    needs.saturating_sub(*has)
                )
            }
        }
    }
}

impl fmt::Display for WhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotReady => f.write_str("not ready"),
            Self::Cordoned => f.write_str("cordoned"),
            Self::Selector(label) => {
                write!(f, "without label {label} of spec.placement.nodeSelector")
            }
            Self::Tainted(taint) => write!(
                f,
                "taint {taint} is not tolerated; add it to spec.placement.tolerations"
            ),
            Self::Faulty(condition) => write!(f, "GPU fault {condition}"),
            Self::NoGpu => f.write_str("no GPU"),
            Self::SharedGpu => f.write_str("GPUs are shared by pods, which is not served"),
            Self::Device(why) => why.fmt(f),
            Self::OldGpu(major) => write!(
                f,
                "GPUs of compute capability {major}.x, needs 8.0 or newer"
            ),
            Self::OtherProduct(product) => write!(f, "{product} is not what the plan is for"),
            Self::GpuMemory { needs, has } => write!(
                f,
                "too little GPU memory: needs {} per GPU, has {}",
                human_bytes(*needs),
                human_bytes(*has)
            ),
            Self::FewGpus { needs, has } => write!(f, "too few GPUs: needs {needs}, has {has}"),
            Self::GpusTaken { needs, has } => {
                write!(f, "GPUs are taken: needs {needs}, {has} free")
            }
            Self::Memory { needs, has } => write!(
                f,
                "too little memory: needs {}, {} free",
                human_bytes(*needs),
                human_bytes(*has)
            ),
            Self::Cpu { needs, has } => write!(f, "too little CPU: needs {needs}m, {has}m free"),
            Self::Spot(least) => write!(
                f,
                "spot, and spec.placement.spot.onDemandMin = {least} replicas belong on other nodes"
            ),
            Self::Pods => f.write_str("runs as many pods as it may"),
            Self::FewRanks { needs, has } => write!(
                f,
                "can take a rank, but a replica needs places for {needs} and {has} have one"
            ),
        }
    }
}

/// Whether a taint in words, `key=value:effect`, says that GPUs are at fault.
fn is_fault(taint: &str) -> bool {
    let key = taint.split(['=', ':']).next().unwrap_or_default();
    crate::health::is_fault_taint(key)
}

/// Nodes that cannot take a replica for the same reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The reason, with the largest amount that one of them has.
    pub why_not: WhyNot,
    /// How many nodes.
    pub count: usize,
    /// Their names, in order.
    pub nodes: Vec<String>,
}

/// Reasons of nodes, grouped, most nodes first.
pub fn groups<'a>(reasons: impl IntoIterator<Item = (&'a str, WhyNot)>) -> Vec<Group> {
    let mut groups: BTreeMap<WhyNot, (u64, Vec<String>)> = BTreeMap::new();
    for (node, reason) in reasons {
        let (amount, same) = reason.split();
        let (most, nodes) = groups.entry(same).or_default();
        *most = amount.max(*most);
        nodes.push(node.to_owned());
    }
    let mut groups: Vec<Group> = groups
        .into_iter()
        .map(|(reason, (most, nodes))| Group {
            why_not: reason.with(most),
            count: nodes.len(),
            nodes,
        })
        .collect();
    groups.sort_by_key(|group| std::cmp::Reverse(group.count));
    groups
}

/// Reasons of all nodes, grouped: "3 nodes: …; 1 node: …", most nodes first.
pub fn grouped(reasons: impl IntoIterator<Item = WhyNot>) -> String {
    let groups = groups(reasons.into_iter().map(|reason| ("", reason)));
    if groups.is_empty() {
        return "the cluster has no nodes".into();
    }
    let lines: Vec<String> = groups
        .into_iter()
        .map(|Group { why_not, count, .. }| {
            let nodes = if count == 1 { "node" } else { "nodes" };
            format!("{count} {nodes}: {why_not}")
        })
        .collect();
    lines.join("; ")
}

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
        let used = amount(&self.cluster.used) + amount(&self.taken);
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

/// Order of nodes of one domain: those without recent failures, spot nodes where they are preferred,
/// and those without taints to avoid come first; GPU replicas are packed so that whole nodes stay free, CPU replicas go where most is free
/// and away from GPUs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    failed_here: bool,
    /// Not spot, where spot is preferred.
    pricey: bool,
    tainted: bool,
    own: usize,
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
        first,
        second: u64::MAX - free.memory_bytes,
        name: node.name.clone(),
    }
}
