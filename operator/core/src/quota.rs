//! Limits on the accelerators of a namespace, as its ResourceQuotas state them.
//!
//! A quota that Kubernetes would meet is met by the plan already: a replica it does not allow is not
//! tried. One with scopes holds for some pods only, and Kubernetes alone can say for which.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ResourceQuota;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use operator_api::quantity::parse_millis;

use crate::mig::MigProfile;
use crate::resources::NVIDIA_GPU;

/// What requests are called in a quota.
const PREFIX: &str = "requests.";

/// A quota that limits accelerators.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QuotaView {
    /// Name of the ResourceQuota.
    pub name: String,
    /// Limits by name of the resource, `requests.` left out.
    pub limits: BTreeMap<String, QuotaLimit>,
}

/// A limit on one resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QuotaLimit {
    /// Devices that all pods of the namespace may ask for.
    pub most: u64,
    /// Devices that they ask for now, as Kubernetes counts.
    pub used: u64,
}

/// A limit that is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded<'a> {
    /// Name of the ResourceQuota.
    pub quota: &'a str,
    /// Name of the resource.
    pub resource: &'a str,
    /// The limit.
    pub limit: QuotaLimit,
}

impl QuotaView {
    /// The view of a quota; none when it does not limit the accelerators of every pod.
    pub fn of(quota: &ResourceQuota) -> Option<Self> {
        let spec = quota.spec.as_ref()?;
        let scopes = spec.scopes.as_deref().unwrap_or_default();
        if !scopes.is_empty() || spec.scope_selector.is_some() {
            return None;
        }
        let count = |quantity: &Quantity| {
            let millis = parse_millis(&quantity.0)?;
            Some(u64::try_from(millis / 1000).unwrap_or(u64::MAX))
        };
        let used = quota.status.as_ref().and_then(|s| s.used.as_ref());
        let limits: BTreeMap<String, QuotaLimit> = spec
            .hard
            .iter()
            .flatten()
            .filter_map(|(key, most)| {
                let resource = key.strip_prefix(PREFIX)?;
                let is_ours = resource == NVIDIA_GPU || MigProfile::of_resource(resource).is_some();
                let limit = QuotaLimit {
                    most: count(most)?,
                    used: used.and_then(|used| count(used.get(key)?)).unwrap_or(0),
                };
                is_ours.then(|| (resource.to_owned(), limit))
            })
            .collect();
        (!limits.is_empty()).then(|| Self {
            name: quota.metadata.name.clone().unwrap_or_default(),
            limits,
        })
    }

    /// The first limit under which `needs`, amounts by resource, are not allowed on top of what is
    /// used and `granted`.
    pub fn exceeded(
        &self,
        needs: &BTreeMap<String, u64>,
        granted: &BTreeMap<String, u64>,
    ) -> Option<Exceeded<'_>> {
        self.limits.iter().find_map(|(resource, limit)| {
            let amount = |map: &BTreeMap<String, u64>| map.get(resource).copied().unwrap_or(0);
            let used = limit.used.saturating_add(amount(granted));
            let needs = amount(needs);
            (needs > 0 && used.saturating_add(needs) > limit.most).then_some(Exceeded {
                quota: &self.name,
                resource,
                limit: QuotaLimit { used, ..*limit },
            })
        })
    }
}
