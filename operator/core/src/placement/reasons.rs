//! Why nodes cannot take a replica: in words, with what would help, and grouped.

use std::collections::BTreeMap;
use std::fmt;

use super::DeviceWhyNot;
use crate::resources::human_bytes;

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
    /// An engine reported one of its GPUs.
    Reported(String),
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
            Self::Tainted(taint) => match TaintKind::of(taint) {
                TaintKind::Fault => "repair its GPUs; the taint says that they are at fault".into(),
                TaintKind::Unwell => {
                    "none: Kubernetes takes the taint away when the node is well again".into()
                }
                TaintKind::Removal => "none: the node is about to be removed".into(),
                TaintKind::Chosen => {
                    format!("add {taint} to spec.placement.tolerations, or remove the taint")
                }
            },
            Self::Faulty(_) => {
                "repair it; it is used again when the fault is no longer reported".into()
            }
            Self::Reported(_) => {
                "reset or replace that GPU and reboot the node, or replace the node".into()
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
            Self::Tainted(taint) => {
                let meaning = match TaintKind::of(taint) {
                    TaintKind::Fault => "says that GPUs are at fault",
                    TaintKind::Unwell => "says that the node is not well",
                    TaintKind::Removal => "says that the node is about to be removed",
                    TaintKind::Chosen => "is not tolerated; add it to spec.placement.tolerations",
                };
                write!(f, "taint {taint} {meaning}")
            }
            Self::Faulty(condition) => write!(f, "GPU fault {condition}"),
            Self::Reported(words) => write!(f, "GPU fault {words}"),
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

/// Who set a taint, and so what to do about it: to tolerate it is advice for one kind only.
enum TaintKind {
    /// Whatever checks GPUs: they are at fault.
    Fault,
    /// Kubernetes: the node is silent, starts, or runs out of something.
    Unwell,
    /// An autoscaler: the node goes.
    Removal,
    /// Whoever keeps the node for some pods.
    Chosen,
}

impl TaintKind {
    /// Of a taint in words, `key=value:effect`.
    fn of(taint: &str) -> Self {
        let key = taint.split(['=', ':']).next().unwrap_or_default();
        match () {
            () if crate::health::is_fault_taint(key) => Self::Fault,
            () if super::REMOVAL_TAINTS.contains(&key) => Self::Removal,
            () if KUBERNETES_TAINTS.iter().any(|own| key.starts_with(own)) => Self::Unwell,
            () => Self::Chosen,
        }
    }
}

/// How taints begin that Kubernetes and cloud controllers set by themselves
/// (https://kubernetes.io/docs/reference/labels-annotations-taints/).
const KUBERNETES_TAINTS: [&str; 2] = ["node.kubernetes.io/", "node.cloudprovider.kubernetes.io/"];

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_taints_that_somebody_chose_are_to_be_tolerated() {
        let cases = [
            ("team=vision:NoSchedule", true),
            ("nvidia.com/gpu-xid-error=true:NoSchedule", false),
            ("node.kubernetes.io/unreachable:NoExecute", false),
            ("node.kubernetes.io/disk-pressure:NoSchedule", false),
            (
                "node.cloudprovider.kubernetes.io/uninitialized:NoSchedule",
                false,
            ),
            ("ToBeDeletedByClusterAutoscaler=1764:NoSchedule", false),
            ("karpenter.sh/disrupted:NoSchedule", false),
        ];
        for (taint, chosen) in cases {
            let why_not = WhyNot::Tainted(taint.into());
            for advice in [why_not.to_string(), why_not.remedy()] {
                let tolerates = advice.contains("spec.placement.tolerations");
                assert_eq!(tolerates, chosen, "{advice}");
            }
            assert!(why_not.to_string().contains(taint));
        }
    }
}
