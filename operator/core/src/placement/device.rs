//! Why a node's devices are not those of a layout: other kinds, divided GPUs, too few of them.
//!
//! The kinds a node offers come from its labels, how many there are from the resources that its
//! device plugin counts, so a node can say that it has a kind and offer none of it.

use std::fmt;

use super::WhyNot;
use crate::devices::DRIVER;
use crate::fit::{DeviceKind, Layout, NodeGpus, offered_kinds};
use crate::mig;
use crate::resources::{NVIDIA_GPU, Resources};
use crate::snapshot::NodeView;

/// Why the devices of a node cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DeviceWhyNot {
    /// They are parts of GPUs, and the plan is for others.
    Divided {
        /// Their product.
        product: String,
        /// Devices that one replica needs.
        needs: u32,
    },
    /// Its GPUs are being divided anew.
    Repartitioning(String),
    /// It publishes no GPUs that claims may ask for.
    NotPublished,
    /// Its GPUs are given out by claims alone.
    ClaimsOnly,
    /// It has too few of a resource other than `nvidia.com/gpu`.
    Few {
        /// Name of the resource.
        resource: String,
        /// Devices needed.
        needs: u64,
        /// Devices there.
        has: u64,
    },
    /// Other pods hold them.
    Taken {
        /// Name of the resource.
        resource: String,
        /// Devices needed.
        needs: u64,
        /// Devices free.
        has: u64,
    },
}

impl DeviceWhyNot {
    /// The amount that is there.
    pub(super) fn amount(&mut self) -> Option<&mut u64> {
        match self {
            Self::Few { has, .. } | Self::Taken { has, .. } => Some(has),
            Self::Divided { .. }
            | Self::Repartitioning(_)
            | Self::NotPublished
            | Self::ClaimsOnly => None,
        }
    }

    /// What would make the node fit, for people.
    pub fn remedy(&self) -> String {
        match self {
            Self::Divided { needs: 0 | 1, .. } => {
                "set spec.accelerator.mig to allowed or only to plan for MIG devices too".into()
            }
            Self::Divided { needs, .. } => format!(
                "none: a replica needs {needs} devices, and nothing connects MIG devices with each other"
            ),
            Self::Repartitioning(_) => {
                "wait until the MIG manager has set nvidia.com/mig.config.state to success".into()
            }
            Self::NotPublished => "run the DRA driver on it".into(),
            Self::ClaimsOnly => "set spec.accelerator.claim to ask for them by claims".into(),
            Self::Few {
                resource, needs, ..
            } => format!("a node that offers {needs} of {resource}"),
            Self::Taken {
                resource,
                needs,
                has,
            } => format!(
                "free {} more of {resource} on one of them",
                needs.saturating_sub(*has)
            ),
        }
    }
}

impl fmt::Display for DeviceWhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Divided { product, .. } => {
                write!(
                    f,
                    "its GPUs are divided into {product}, which the plan is not for"
                )
            }
            Self::Repartitioning(state) => write!(
                f,
                "its GPUs are being divided anew: nvidia.com/mig.config.state={state}"
            ),
            Self::NotPublished => {
                write!(
                    f,
                    "publishes no GPUs of the driver {DRIVER} in ResourceSlices"
                )
            }
            Self::ClaimsOnly => f.write_str("its GPUs are given out by resource claims alone"),
            Self::Few {
                resource,
                needs,
                has,
            } => write!(f, "too few of {resource}: needs {needs}, has {has}"),
            Self::Taken {
                resource,
                needs,
                has,
            } => write!(f, "{resource} is taken: needs {needs}, {has} free"),
        }
    }
}

/// Why a node's devices are not of the kind a layout is for; none when they are.
pub(super) fn why_not(node: &NodeView, layout: &Layout) -> Option<WhyNot> {
    if let Some(state) = mig::repartitioning(node) {
        let state = state.to_owned();
        return Some(WhyNot::Device(DeviceWhyNot::Repartitioning(state)));
    }
    let mut offered = offered_kinds(node);
    if offered.clone().any(|kind| *kind == layout.kind) {
        return None;
    }
    let is_claim = |kind: &DeviceKind| matches!(kind, DeviceKind::Claimed { .. });
    let alike = offered
        .clone()
        .filter(|kind| is_claim(kind) == is_claim(&layout.kind));
    let nearest = alike.max_by_key(|kind| kind.usable_bytes());
    if nearest.is_none() && is_claim(&layout.kind) {
        return Some(WhyNot::Device(DeviceWhyNot::NotPublished));
    }
    if nearest.is_none() && offered.next().is_some() {
        return Some(WhyNot::Device(DeviceWhyNot::ClaimsOnly));
    }
    match (&node.gpus, nearest) {
        (NodeGpus::Old { compute_major }, _) => Some(WhyNot::OldGpu(*compute_major)),
        (NodeGpus::Shared, None) => Some(WhyNot::SharedGpu),
        (_, Some(kind)) => Some(other_kind(kind, layout)),
        (_, None) => Some(WhyNot::NoGpu),
    }
}

fn other_kind(kind: &DeviceKind, layout: &Layout) -> WhyNot {
    if !kind.can_combine() && layout.kind.can_combine() {
        return WhyNot::Device(DeviceWhyNot::Divided {
            product: kind.to_string(),
            needs: layout.gpus_per_pod(),
        });
    }
    let needs = layout.memory.total_bytes();
    match kind.usable_bytes() {
        Some(has) if has < needs => WhyNot::GpuMemory { needs, has },
        _ => WhyNot::OtherProduct(kind.to_string()),
    }
}

/// Why a node has too few devices of the layout's kind.
pub(super) fn shortage(
    kind: &DeviceKind,
    needs: &Resources,
    node: &NodeView,
    free: &Resources,
) -> Option<WhyNot> {
    let resource = match kind {
        DeviceKind::Claimed { .. } => format!("GPUs of {DRIVER}"),
        _ => kind.resource()?,
    };
    let needs = kind.count_in(needs);
    let (there, has) = (kind.count_in(&node.allocatable), kind.count_in(free));
    if has >= needs {
        return None;
    }
    Some(match (resource == NVIDIA_GPU, there < needs) {
        (true, true) => WhyNot::FewGpus { needs, has: there },
        (true, false) => WhyNot::GpusTaken { needs, has },
        (false, true) => WhyNot::Device(DeviceWhyNot::Few {
            resource,
            needs,
            has: there,
        }),
        (false, false) => WhyNot::Device(DeviceWhyNot::Taken {
            resource,
            needs,
            has,
        }),
    })
}
