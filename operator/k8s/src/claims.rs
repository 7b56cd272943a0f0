//! Resource claims as we see them: what drivers publish, what claims of others hold, our own templates.
//!
//! Followed only when the operator is told to, because clusters before Kubernetes 1.34 do not serve them and few give
//! out GPUs this way. Nobody waits for these mirrors: as long as one is not complete, ModelDeployments that ask for
//! claims are told why, and all others go on. The GPUs of each node are added up once for many changes, when the next
//! decision asks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceClaimTemplate, ResourceSlice};
use kube::Client;
use kube::api::Api;
use kube::runtime::watcher;
use operator_core::devices::{self, AllocationView, ClaimNews, NodeDevices, SliceView};
use operator_core::{ClaimTemplateView, names};
use tokio::task::JoinSet;

use crate::trim::deployment_label;
use crate::watch::{self, Change, Key, Mirror};
use crate::world::{World, api};

/// A claim template of ours.
#[derive(Clone, Debug, PartialEq)]
pub struct ChildTemplate {
    /// Name of its ModelDeployment.
    pub deployment: String,
    /// Its name and uid.
    pub view: Arc<ClaimTemplateView>,
}

/// The mirrors of `resource.k8s.io/v1`.
#[derive(Debug)]
pub struct Claims {
    /// GPUs that drivers publish.
    pub slices: Arc<Mirror<SliceView>>,
    /// Devices that claims of others hold.
    pub others: Arc<Mirror<AllocationView>>,
    /// Our claim templates.
    pub templates: Arc<Mirror<ChildTemplate>>,
    is_followed: AtomicBool,
    /// Whether slices or claims changed since the devices were added up.
    is_changed: AtomicBool,
}

impl Default for Claims {
    fn default() -> Self {
        Self {
            slices: Mirror::new("ResourceSlice"),
            others: Mirror::new("ResourceClaim"),
            templates: Mirror::new("ResourceClaimTemplate"),
            is_followed: AtomicBool::new(false),
            is_changed: AtomicBool::new(false),
        }
    }
}

impl Claims {
    /// Whether these kinds are watched.
    pub fn is_followed(&self) -> bool {
        self.is_followed.load(Ordering::Acquire)
    }

    /// What is known of them.
    pub fn news(&self) -> ClaimNews {
        fn unread<V>(mirror: &Mirror<V>) -> Option<String> {
            (!mirror.is_ready()).then(|| match mirror.trouble() {
                Some(trouble) => format!("{}: {trouble}", mirror.kind),
                None => format!("the first list of {} is not complete", mirror.kind),
            })
        }
        if !self.is_followed() {
            return ClaimNews::Off;
        }
        unread(&self.slices)
            .or_else(|| unread(&self.others))
            .or_else(|| unread(&self.templates))
            .map_or(ClaimNews::Known, ClaimNews::Unread)
    }

    /// GPUs by node, when they may differ from what was given before.
    pub(crate) fn changed_devices(&self) -> Option<BTreeMap<String, NodeDevices>> {
        if !self.is_changed.swap(false, Ordering::AcqRel) {
            return None;
        }
        let (slices, others) = (self.slices.read(), self.others.read());
        let slices = slices.values().filter_map(|entry| entry.as_deref().ok());
        let others = others.values().filter_map(|entry| entry.as_deref().ok());
        Some(devices::by_node(slices, others))
    }
}

pub(crate) fn child_template(
    template: ResourceClaimTemplate,
) -> Result<Option<ChildTemplate>, String> {
    let view = Arc::new(ClaimTemplateView::of(&template));
    Ok(deployment_label(&template.metadata).map(|deployment| ChildTemplate { deployment, view }))
}

/// The devices a claim holds, unless the pods of a namespace that is served count them.
fn other_allocation(claim: &ResourceClaim, served: Option<&str>) -> Option<AllocationView> {
    let is_counted = AllocationView::is_ours(claim)
        && (served.is_none() || claim.metadata.namespace.as_deref() == served);
    if is_counted {
        return None;
    }
    AllocationView::of(claim)
}

impl World {
    /// Starts the watches of resource claims; they run until `tasks` is dropped. `namespace` as in [`World::follow`].
    pub fn follow_claims(
        self: &Arc<Self>,
        tasks: &mut JoinSet<()>,
        client: &Client,
        namespace: Option<&str>,
    ) {
        self.claims.is_followed.store(true, Ordering::Release);
        let all = watcher::Config::default;

        let world = Arc::clone(self);
        tasks.spawn(watch::follow(
            Arc::clone(&self.claims.slices),
            Api::all(client.clone()),
            all().fields(&format!("spec.driver={}", devices::DRIVER)),
            |slice: ResourceSlice| Ok(SliceView::of(&slice)),
            move |_: Change<'_, SliceView>| world.devices_changed(),
        ));

        let world = Arc::clone(self);
        let served = namespace.map(str::to_string);
        let mut config = all();
        if namespace.is_none() {
            config = config.labels(&format!("{}!=cachalot", names::MANAGED_BY));
        }
        tasks.spawn(watch::follow(
            Arc::clone(&self.claims.others),
            Api::all(client.clone()),
            config,
            move |claim: ResourceClaim| Ok(other_allocation(&claim, served.as_deref())),
            move |_: Change<'_, AllocationView>| world.devices_changed(),
        ));

        let world = Arc::clone(self);
        let changed = move |change: Change<'_, ChildTemplate>| {
            let owners = [change.before, change.after].into_iter().flatten();
            for owner in owners.filter_map(|entry| entry.as_ref().ok()) {
                let namespace = Arc::clone(&change.key.namespace);
                world.wake(&Key::new(namespace, &*owner.deployment));
            }
        };
        tasks.spawn(watch::follow(
            Arc::clone(&self.claims.templates),
            api(client, namespace),
            all().labels(&format!(
                "{}=cachalot,{}",
                names::MANAGED_BY,
                names::MODEL_DEPLOYMENT
            )),
            child_template,
            changed,
        ));
    }

    fn devices_changed(&self) {
        self.claims.is_changed.store(true, Ordering::Release);
        self.room_appeared();
    }

    /// Takes in the API server's answer to a write of ours.
    pub fn wrote_claim_template(&self, template: ResourceClaimTemplate) {
        watch::write_through(&self.claims.templates, template, child_template, |_| ());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn claim(namespace: &str, ours: bool) -> ResourceClaim {
        let labels = if ours {
            json!({"app.kubernetes.io/managed-by": "cachalot", "cachalot.dev/model-deployment": "m"})
        } else {
            json!({})
        };
        let result =
            json!({"request": "r", "driver": "gpu.nvidia.com", "pool": "n", "device": "gpu-0"});
        serde_json::from_value(json!({
            "metadata": {"name": "c", "namespace": namespace, "labels": labels},
            "spec": {},
            "status": {"allocation": {"devices": {"results": [result]}}},
        }))
        .expect("a claim")
    }

    #[test]
    fn a_claim_of_ours_is_counted_by_its_pod_where_its_pod_is_seen() {
        assert!(other_allocation(&claim("d", true), None).is_none());
        assert!(other_allocation(&claim("d", true), Some("d")).is_none());
        assert!(other_allocation(&claim("e", true), Some("d")).is_some());
        assert!(other_allocation(&claim("d", false), None).is_some());
    }

    #[test]
    fn nothing_is_known_of_what_is_not_followed_or_not_complete() {
        let claims = Claims::default();
        assert_eq!(claims.news(), ClaimNews::Off);
        claims.is_followed.store(true, Ordering::Release);
        let ClaimNews::Unread(why) = claims.news() else {
            panic!("{:?}", claims.news());
        };
        assert!(why.contains("ResourceSlice"), "{why}");
    }
}
