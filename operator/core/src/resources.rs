//! What pods ask for and nodes have.

use std::collections::BTreeMap;
use std::ops::{Add, AddAssign};

use k8s_openapi::api::core::v1::PodSpec;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use operator_api::quantity::parse_millis;
use serde::{Deserialize, Serialize};

use crate::mig::{MigDevices, MigProfile};

/// The extended resource of NVIDIA GPUs.
pub const NVIDIA_GPU: &str = "nvidia.com/gpu";

/// Amounts the planner counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Resources {
    /// Processor time in thousandths of a core.
    pub cpu_millis: u64,
    /// Memory.
    pub memory_bytes: u64,
    /// Devices counted as `nvidia.com/gpu`.
    pub gpus: u64,
    /// Devices counted as `nvidia.com/mig-<profile>`.
    pub mig: MigDevices,
    /// GPUs given out by resource claims.
    pub claimed: u64,
    /// Pods.
    pub pods: u64,
}

impl Resources {
    /// Reads a resource list of Kubernetes; what it does not name counts as zero.
    pub fn of(list: &BTreeMap<String, Quantity>) -> Self {
        Self::read(list.keys(), |key| list.get(key))
    }

    /// The same of a list that is not in one piece; a key may come twice.
    fn read<'a>(
        keys: impl Iterator<Item = &'a String>,
        get: impl Fn(&str) -> Option<&'a Quantity>,
    ) -> Self {
        let millis = |key: &str| {
            get(key)
                .and_then(|quantity| parse_millis(&quantity.0))
                .unwrap_or(0)
        };
        let units = |key: &str| u64::try_from(millis(key) / 1000).unwrap_or(u64::MAX);
        let mut mig = MigDevices::default();
        for key in keys {
            if let Some(profile) = MigProfile::of_resource(key) {
                mig.set(profile, units(key));
            }
        }
        Self {
            cpu_millis: u64::try_from(millis("cpu")).unwrap_or(u64::MAX),
            memory_bytes: units("memory"),
            gpus: units(NVIDIA_GPU),
            mig,
            claimed: 0,
            pods: units("pods"),
        }
    }

    /// What a scheduler reserves for a pod: the sum over containers and sidecars, or the largest
    /// init container where that is more, plus overhead.
    pub fn of_pod(spec: &PodSpec) -> Self {
        let requests = |container: &k8s_openapi::api::core::v1::Container| {
            let resources = container.resources.as_ref();
            let requests = resources.and_then(|r| r.requests.as_ref());
            let limits = resources.and_then(|r| r.limits.as_ref());
            let keys = requests.into_iter().chain(limits).flat_map(BTreeMap::keys);
            // An extended resource may be given as a limit alone.
            let is_extended =
                |key: &str| key == NVIDIA_GPU || MigProfile::of_resource(key).is_some();
            Self::read(keys, |key| {
                let limit = || limits.filter(|_| is_extended(key))?.get(key);
                requests.and_then(|list| list.get(key)).or_else(limit)
            })
        };
        let mut sum = spec
            .containers
            .iter()
            .map(requests)
            .fold(Self::default(), Add::add);
        for container in spec.init_containers.iter().flatten() {
            if container.restart_policy.as_deref() == Some("Always") {
                sum += requests(container);
            } else {
                sum = sum.max(requests(container));
            }
        }
        if let Some(overhead) = &spec.overhead {
            sum += Self::of(overhead);
        }
        Self {
            pods: 1,
            claimed: crate::devices::claimed_by(spec),
            ..sum
        }
    }

    /// What is left of `self` when `used` is gone; never below zero.
    pub fn minus(self, used: Self) -> Self {
        Self {
            cpu_millis: self.cpu_millis.saturating_sub(used.cpu_millis),
            memory_bytes: self.memory_bytes.saturating_sub(used.memory_bytes),
            gpus: self.gpus.saturating_sub(used.gpus),
            mig: self.mig.minus(used.mig),
            claimed: self.claimed.saturating_sub(used.claimed),
            pods: self.pods.saturating_sub(used.pods),
        }
    }

    /// Whether no more is asked for than `free` has.
    pub fn fit_in(&self, free: &Self) -> bool {
        let Self {
            cpu_millis,
            memory_bytes,
            gpus,
            mig,
            claimed,
            pods,
        } = self;
        *cpu_millis <= free.cpu_millis
            && *memory_bytes <= free.memory_bytes
            && *gpus <= free.gpus
            && mig.fit_in(&free.mig)
            && *claimed <= free.claimed
            && *pods <= free.pods
    }

    /// Devices of every kind.
    pub fn devices(&self) -> u64 {
        self.gpus
            .saturating_add(self.mig.total())
            .saturating_add(self.claimed)
    }

    /// Amounts of extended resources of accelerators by name; those that are zero are left out.
    pub fn accelerators(&self) -> BTreeMap<String, u64> {
        let gpus = (self.gpus > 0).then(|| (NVIDIA_GPU.to_owned(), self.gpus));
        let mig = self.mig.iter();
        let mig = mig.map(|(profile, count)| (profile.resource(), count));
        gpus.into_iter().chain(mig).collect()
    }

    fn max(self, other: Self) -> Self {
        Self {
            cpu_millis: self.cpu_millis.max(other.cpu_millis),
            memory_bytes: self.memory_bytes.max(other.memory_bytes),
            gpus: self.gpus.max(other.gpus),
            mig: self.mig.max(other.mig),
            claimed: self.claimed.max(other.claimed),
            pods: self.pods.max(other.pods),
        }
    }
}

impl Add for Resources {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            cpu_millis: self.cpu_millis.saturating_add(other.cpu_millis),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            gpus: self.gpus.saturating_add(other.gpus),
            mig: self.mig.plus(other.mig),
            claimed: self.claimed.saturating_add(other.claimed),
            pods: self.pods.saturating_add(other.pods),
        }
    }
}

impl AddAssign for Resources {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// Bytes as a person reads them: GiB from one GiB up, else MiB.
pub fn human_bytes(bytes: u64) -> String {
    let gib = bytes as f64 / f64::from(1 << 30);
    if gib >= 1.0 {
        format!("{gib:.1} GiB")
    } else {
        format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
    }
}
