//! Quotas of the simulated cluster: counted anew from the pods, as Kubernetes would, and in the way of creates.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

use super::world::World;
use crate::resources::Resources;
use crate::snapshot::QuotaView;

impl World {
    /// Quotas of each namespace with what Kubernetes counts as used.
    pub(super) fn quota_views(&self) -> BTreeMap<String, Vec<Arc<QuotaView>>> {
        let used = |namespace: &String| {
            let pods = self
                .pods
                .iter()
                .filter(|((space, _), pod)| space == namespace && !pod.view.is_finished());
            pods.fold(Resources::default(), |sum, (_, pod)| {
                sum + pod.view.requests
            })
            .accelerators()
        };
        let view = |namespace: &String, quota: &QuotaView| {
            let mut quota = quota.clone();
            let used = used(namespace);
            for (resource, limit) in &mut quota.limits {
                limit.used = used.get(resource).copied().unwrap_or(0);
            }
            Arc::new(quota)
        };
        self.quotas
            .iter()
            .map(|(space, all)| {
                (
                    space.clone(),
                    all.iter().map(|one| view(space, one)).collect(),
                )
            })
            .collect()
    }

    /// Whether the API server refuses a pod because a quota allows no further devices.
    pub fn is_over_quota(&self, namespace: &str, pod: &Pod) -> bool {
        let needs = pod.spec.as_ref().map(Resources::of_pod);
        let needs = needs.unwrap_or_default().accelerators();
        let quotas = self.quota_views();
        let mut quotas = quotas.get(namespace).into_iter().flatten();
        quotas.any(|quota| quota.exceeded(&needs, &BTreeMap::new()).is_some())
    }
}
