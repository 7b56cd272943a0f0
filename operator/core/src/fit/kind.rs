//! Kinds of device, and which of them a node offers by its labels.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::mig::{MigProfile, MigStrategy};
use crate::pairs::Pairs;
use crate::resources::{NVIDIA_GPU, Resources};
use crate::snapshot::NodeView;

/// Share of a GPU's memory that is planned with, in percent: drivers keep some for themselves, and
/// the label counts it.
const GPU_USABLE_PERCENT: u64 = 95;
/// bfloat16 arithmetic begins with this compute capability.
const COMPUTE_MAJOR_MIN: u32 = 8;

/// A kind of device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DeviceKind {
    /// A node's processors.
    Cpu,
    /// GPUs of one product and memory size.
    Gpu {
        /// Value of `nvidia.com/gpu.product`.
        product: String,
        /// Memory of one GPU by its label.
        memory_bytes: u64,
    },
    /// MIG devices, parts of GPUs, of one product and profile.
    #[serde(rename_all = "camelCase")]
    Mig {
        /// Product with the profile at its end, as `nvidia.com/gpu.product` or
        /// `nvidia.com/mig-<profile>.product` has it.
        product: String,
        /// Memory of one device by its label.
        memory_bytes: u64,
        /// Profile.
        profile: MigProfile,
        /// How they are counted.
        strategy: MigStrategy,
    },
    /// GPUs given out by resource claims.
    #[serde(rename_all = "camelCase")]
    Claimed {
        /// Attribute `productName`.
        product: String,
        /// Capacity `memory` of one GPU.
        memory_bytes: u64,
    },
}

impl DeviceKind {
    /// Memory of one device that may be planned with.
    pub fn usable_bytes(&self) -> Option<u64> {
        self.memory_bytes()
            .map(|bytes| bytes / 100 * GPU_USABLE_PERCENT)
    }

    pub(super) fn memory_bytes(&self) -> Option<u64> {
        match self {
            Self::Cpu => None,
            Self::Gpu { memory_bytes, .. }
            | Self::Mig { memory_bytes, .. }
            | Self::Claimed { memory_bytes, .. } => Some(*memory_bytes),
        }
    }

    /// Product, for status.
    pub fn product(&self) -> Option<&str> {
        match self {
            Self::Cpu => None,
            Self::Gpu { product, .. }
            | Self::Mig { product, .. }
            | Self::Claimed { product, .. } => Some(product),
        }
    }

    /// What one device is called in sentences.
    pub fn noun(&self) -> &'static str {
        match self {
            Self::Cpu => "replica",
            Self::Gpu { .. } | Self::Claimed { .. } => "GPU",
            Self::Mig { .. } => "MIG device",
        }
    }

    /// The extended resource that a pod asks for.
    pub fn resource(&self) -> Option<String> {
        match self {
            Self::Cpu | Self::Claimed { .. } => None,
            Self::Mig {
                profile,
                strategy: MigStrategy::Mixed,
                ..
            } => Some(profile.resource()),
            Self::Gpu { .. } | Self::Mig { .. } => Some(NVIDIA_GPU.to_owned()),
        }
    }

    /// How many devices of this kind an amount has, on a node that offers them.
    pub fn count_in(&self, amount: &Resources) -> u64 {
        match self {
            Self::Cpu => 0,
            Self::Mig {
                profile,
                strategy: MigStrategy::Mixed,
                ..
            } => amount.mig.get(*profile),
            Self::Claimed { .. } => amount.claimed,
            Self::Gpu { .. } | Self::Mig { .. } => amount.gpus,
        }
    }

    /// Whether one replica can be on several of them: MIG devices have neither NVLink nor
    /// peer-to-peer copies between them.
    pub fn can_combine(&self) -> bool {
        !matches!(self, Self::Mig { .. })
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("CPU"),
            Self::Gpu { product, .. }
            | Self::Mig { product, .. }
            | Self::Claimed { product, .. } => f.write_str(product),
        }
    }
}

/// What the labels of a node say about the devices counted as `nvidia.com/gpu`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodeGpus {
    /// No GPU, or none that is labelled.
    #[default]
    None,
    /// GPUs that several pods share, or that are divided in a way their strategy does not allow.
    Shared,
    /// GPUs too old for the engine's arithmetic.
    Old {
        /// Compute capability, major part.
        compute_major: u32,
    },
    /// GPUs, or MIG devices of the strategy `single`, that can be used.
    Usable(DeviceKind),
}

impl NodeGpus {
    /// Reads the labels of gpu-feature-discovery.
    pub fn of(labels: &Pairs) -> Self {
        let label = |key: &str| labels.get(key).unwrap_or_default();
        let product = label("nvidia.com/gpu.product");
        let Ok(memory_mib) = label("nvidia.com/gpu.memory").parse::<u64>() else {
            return Self::None;
        };
        let strategy = label("nvidia.com/gpu.sharing-strategy");
        if product.ends_with("-SHARED") || !matches!(strategy, "" | "none") {
            return Self::Shared;
        }
        if let Ok(compute_major) = label("nvidia.com/gpu.compute.major").parse::<u32>()
            && compute_major < COMPUTE_MAJOR_MIN
        {
            return Self::Old { compute_major };
        }
        let memory_bytes = memory_mib.saturating_mul(1 << 20);
        let product = product.to_owned();
        if !product.contains("-MIG-") {
            return Self::Usable(DeviceKind::Gpu {
                product,
                memory_bytes,
            });
        }
        match MigProfile::of_product(&product) {
            Some(profile) => Self::Usable(DeviceKind::Mig {
                product,
                memory_bytes,
                profile,
                strategy: MigStrategy::Single,
            }),
            // gpu-feature-discovery says `-MIG-INVALID` when GPUs are not divided alike.
            None => Self::Shared,
        }
    }
}

/// Kinds of device that a node offers: under the MIG strategy `mixed` several. Those it has none of
/// are named only where it has none at all.
pub fn offered_kinds(node: &NodeView) -> impl Iterator<Item = &DeviceKind> + Clone {
    let usable = match &node.gpus {
        NodeGpus::Usable(kind) => Some(kind),
        _ => None,
    };
    let named = node.mig.iter().chain(&node.devices).chain(usable);
    let is_there = |kind: &DeviceKind| kind.count_in(&node.allocatable) > 0;
    let has_none = !named.clone().any(is_there);
    named.filter(move |kind| has_none || is_there(kind))
}
