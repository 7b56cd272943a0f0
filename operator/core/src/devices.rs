//! GPUs that Kubernetes gives out by resource claims: what ResourceSlices publish, what claims hold.
//!
//! Only whole GPUs of NVIDIA's driver that lie on one node are counted, and only from pools that are
//! complete at their newest generation, which is what kube-scheduler allocates from. Our own claims are
//! counted by the pods they are made for, since a pod takes its devices from the moment it is planned;
//! those of everyone else are counted by their allocation. The surprise: a claim of someone else may hold
//! a part of a GPU, and is then counted as a whole one.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{PodResourceClaim, PodSpec};
use k8s_openapi::api::resource::v1::{
    CELDeviceSelector, Device, DeviceClaim, DeviceRequest, DeviceSelector, ExactDeviceRequest,
    ResourceClaim, ResourceClaimSpec, ResourceClaimTemplate, ResourceClaimTemplateSpec,
    ResourceSlice,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use operator_api::quantity::parse_millis;

use crate::fit::{DeviceKind, Layout};
use crate::names::{self, Revision};
use crate::resources::Resources;
use crate::snapshot::Claim;
use crate::validate::{ValidAccelerator, ValidDeployment};

/// The driver whose devices are counted.
pub const DRIVER: &str = "gpu.nvidia.com";
/// Device class of its whole GPUs.
pub const DEVICE_CLASS_DEFAULT: &str = "gpu.nvidia.com";
/// What the name of the claim in an engine pod begins with; the number of GPUs follows. A pod names a
/// template only, and what it takes must be known from the pod.
const CLAIM_PREFIX: &str = "cachalot-gpus-";
/// Name of the request in a claim.
const REQUEST: &str = "gpus";
/// bfloat16 arithmetic begins with this compute capability.
const COMPUTE_MAJOR_MIN: u64 = 8;

/// What is known of ResourceSlices and ResourceClaims.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ClaimNews {
    /// They are not watched.
    #[default]
    Off,
    /// They are watched and could not be read: why.
    Unread(String),
    /// They are known.
    Known,
}

/// Whole GPUs that a ResourceSlice publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceView {
    /// Node they are on.
    pub node: String,
    /// Pool the slice belongs to.
    pub pool: String,
    /// Generation of the pool.
    pub generation: i64,
    /// Slices that make the pool complete.
    pub slices: i64,
    /// GPUs by kind.
    pub gpus: BTreeMap<DeviceKind, u64>,
}

impl SliceView {
    /// The view of a slice; none when it is of another driver, or not of one node.
    pub fn of(slice: &ResourceSlice) -> Option<Self> {
        let spec = &slice.spec;
        if spec.driver != DRIVER {
            return None;
        }
        let mut gpus = BTreeMap::new();
        for device in spec.devices.iter().flatten() {
            if let Some(kind) = kind_of(device) {
                *gpus.entry(kind).or_insert(0) += 1;
            }
        }
        Some(Self {
            node: spec.node_name.clone()?,
            pool: spec.pool.name.clone(),
            generation: spec.pool.generation,
            slices: spec.pool.resource_slice_count,
            gpus,
        })
    }
}

/// The kind of a device; none when it is no whole GPU that can be used.
fn kind_of(device: &Device) -> Option<DeviceKind> {
    let attribute = |name: &str| {
        let attributes = device.attributes.as_ref()?;
        let qualified = format!("{DRIVER}/{name}");
        attributes.get(name).or_else(|| attributes.get(&qualified))
    };
    let text = |name: &str| attribute(name).and_then(|value| value.string.as_deref());
    let is_tainted = device
        .taints
        .iter()
        .flatten()
        .any(|taint| taint.effect == "NoSchedule" || taint.effect == "NoExecute");
    if text("type") != Some("gpu") || is_tainted {
        return None;
    }
    if let Some(version) = attribute("cudaComputeCapability").and_then(|v| v.version.as_deref()) {
        let major: u64 = version.split('.').next()?.parse().ok()?;
        if major < COMPUTE_MAJOR_MIN {
            return None;
        }
    }
    let product = text("productName").filter(|product| is_plain(product))?;
    let capacity = device.capacity.as_ref()?;
    let qualified = format!("{DRIVER}/memory");
    let memory = capacity
        .get("memory")
        .or_else(|| capacity.get(&qualified))?;
    Some(DeviceKind::Claimed {
        product: product.to_owned(),
        memory_bytes: u64::try_from(parse_millis(&memory.value.0)? / 1000).ok()?,
    })
}

/// Whether a product's name can stand in a CEL string as it is.
fn is_plain(product: &str) -> bool {
    (1..=128).contains(&product.len())
        && product
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || " ._-/()+".contains(c))
}

/// Devices of the driver that a claim holds, by pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllocationView {
    /// Names of devices by pool.
    pub devices: BTreeMap<String, BTreeSet<String>>,
}

impl AllocationView {
    /// The view of a claim; none when it holds nothing of the driver.
    pub fn of(claim: &ResourceClaim) -> Option<Self> {
        let allocation = claim.status.as_ref()?.allocation.as_ref()?;
        let results = allocation.devices.as_ref()?.results.iter().flatten();
        let mut view = Self::default();
        for result in results {
            // Access for administration takes nothing from others.
            if result.driver == DRIVER && result.admin_access != Some(true) {
                let devices = view.devices.entry(result.pool.clone()).or_default();
                devices.insert(result.device.clone());
            }
        }
        (!view.devices.is_empty()).then_some(view)
    }

    /// Whether a claim was made for a pod of ours, which counts it.
    pub fn is_ours(claim: &ResourceClaim) -> bool {
        let labels = claim.metadata.labels.as_ref();
        labels.is_some_and(|labels| {
            labels
                .get(names::MANAGED_BY)
                .is_some_and(|by| by == "cachalot")
                && labels.contains_key(names::MODEL_DEPLOYMENT)
        })
    }
}

/// GPUs of one node that claims may ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeDevices {
    /// Their kind. Where a node has several, the one it has most of; the others are not used.
    pub kind: DeviceKind,
    /// How many there are.
    pub total: u64,
    /// How many of them claims of others hold.
    pub taken: u64,
}

impl NodeDevices {
    /// What claims of others hold, as a claim on the node.
    pub fn claim(&self, node: &str) -> Claim {
        Claim {
            node: node.to_owned(),
            requests: Resources {
                claimed: self.taken,
                ..Resources::default()
            },
        }
    }
}

/// GPUs by node.
pub fn by_node<'a>(
    slices: impl IntoIterator<Item = &'a SliceView>,
    others: impl IntoIterator<Item = &'a AllocationView>,
) -> BTreeMap<String, NodeDevices> {
    let mut pools: BTreeMap<&str, Vec<&SliceView>> = BTreeMap::new();
    for slice in slices {
        pools.entry(&slice.pool).or_default().push(slice);
    }
    let mut held: BTreeMap<&str, u64> = BTreeMap::new();
    for (pool, devices) in others.into_iter().flat_map(|view| &view.devices) {
        let count = u64::try_from(devices.len()).unwrap_or(u64::MAX);
        *held.entry(pool).or_default() += count;
    }
    let mut nodes: BTreeMap<String, BTreeMap<&DeviceKind, (u64, u64)>> = BTreeMap::new();
    for (pool, mut slices) in pools {
        let newest = slices.iter().map(|slice| slice.generation).max();
        slices.retain(|slice| Some(slice.generation) == newest);
        let is_complete = slices
            .first()
            .is_some_and(|slice| usize::try_from(slice.slices) == Ok(slices.len()));
        if !is_complete {
            continue;
        }
        let taken = held.get(pool).copied().unwrap_or(0);
        for slice in slices {
            for (kind, count) in &slice.gpus {
                let kinds = nodes.entry(slice.node.clone()).or_default();
                let entry = kinds.entry(kind).or_insert((0, taken));
                entry.0 += count;
            }
        }
    }
    let most = |kinds: BTreeMap<&DeviceKind, (u64, u64)>| {
        let (kind, (total, taken)) = kinds.into_iter().max_by_key(|(_, (count, _))| *count)?;
        Some(NodeDevices {
            kind: kind.clone(),
            total,
            taken: taken.min(total),
        })
    };
    nodes
        .into_iter()
        .filter_map(|(node, kinds)| Some((node, most(kinds)?)))
        .collect()
}

/// The claim in the pod of a replica; none when its devices are not claimed.
pub fn pod_claim(layout: &Layout, template: &str) -> Option<PodResourceClaim> {
    matches!(layout.kind, DeviceKind::Claimed { .. }).then(|| PodResourceClaim {
        name: format!("{CLAIM_PREFIX}{}", layout.gpus_per_pod()),
        resource_claim_template_name: Some(template.to_owned()),
        ..PodResourceClaim::default()
    })
}

/// GPUs that a pod of ours takes by claims.
pub fn claimed_by(spec: &PodSpec) -> u64 {
    let claims = spec.resource_claims.iter().flatten();
    claims
        .filter(|claim| claim.resource_claim_template_name.is_some())
        .filter_map(|claim| claim.name.strip_prefix(CLAIM_PREFIX)?.parse::<u64>().ok())
        .fold(0, u64::saturating_add)
}

/// What a replica's claim asks for; none when its devices are not claimed.
pub fn claim_spec(valid: &ValidDeployment, layout: &Layout) -> Option<ResourceClaimSpec> {
    let DeviceKind::Claimed {
        product,
        memory_bytes,
    } = &layout.kind
    else {
        return None;
    };
    let ValidAccelerator::Nvidia {
        claim: Some(class), ..
    } = &valid.accelerator
    else {
        return None;
    };
    let expression = format!(
        "device.driver == '{DRIVER}' && device.attributes['{DRIVER}'].type == 'gpu' && device.attributes['{DRIVER}'].productName == '{product}' && device.capacity['{DRIVER}'].memory.compareTo(quantity('{memory_bytes}')) == 0"
    );
    Some(ResourceClaimSpec {
        devices: Some(DeviceClaim {
            requests: Some(vec![DeviceRequest {
                name: REQUEST.to_owned(),
                exactly: Some(ExactDeviceRequest {
                    device_class_name: class.clone(),
                    allocation_mode: Some("ExactCount".to_owned()),
                    count: Some(i64::from(layout.gpus_per_pod())),
                    selectors: Some(vec![DeviceSelector {
                        cel: Some(CELDeviceSelector { expression }),
                    }]),
                    ..ExactDeviceRequest::default()
                }),
                ..DeviceRequest::default()
            }]),
            ..DeviceClaim::default()
        }),
    })
}

/// The template from which Kubernetes makes the claim of each pod of a revision. Its labels are those of
/// the claims, so that they can be told from claims of others.
pub fn claim_template(
    valid: &ValidDeployment,
    layout: &Layout,
    revision: &Revision,
    mut metadata: ObjectMeta,
) -> Option<ResourceClaimTemplate> {
    let spec = claim_spec(valid, layout)?;
    let labels = metadata.labels.get_or_insert_default();
    labels.insert(names::REVISION.to_owned(), revision.to_string());
    Some(ResourceClaimTemplate {
        spec: ResourceClaimTemplateSpec {
            metadata: Some(ObjectMeta {
                labels: metadata.labels.clone(),
                ..ObjectMeta::default()
            }),
            spec,
        },
        metadata,
    })
}
