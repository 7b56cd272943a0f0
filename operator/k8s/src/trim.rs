//! From Kubernetes objects to the small values that the mirrors keep.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use operator_api::{GpuFaultStatus, ModelDeployment};
use operator_core::{Claim, ConfigMapView, Controller, PodPhase, PodView, names, priority};

use crate::packed::Packed;
use crate::watch::Key;

/// A ModelDeployment: packed for its own passes, and open what is asked of it again and again or while another is planned.
#[derive(Debug, PartialEq)]
pub struct Wish {
    /// Whether its replicas follow its load.
    pub scales: bool,
    /// Whether what its engines say is held against each other: a rollout with an analysis is under way.
    pub compares: bool,
    /// Replicas that it promises to keep.
    pub floor: u32,
    /// GPUs at fault that it remembers.
    pub gpu_faults: Box<[GpuFaultStatus]>,
    pub(crate) whole: Packed<ModelDeployment>,
}

/// A pod of ours: packed, and open what is asked of all pods again and again.
#[derive(Debug, PartialEq)]
pub struct ChildPod {
    /// Its priority.
    pub priority: i32,
    /// Whether it holds a place that others have not left yet.
    pub reserves: bool,
    /// Whether its engine has something to tell.
    pub is_asked: bool,
    /// Whether it leaves.
    pub drains: bool,
    /// Tells pods of one name apart that follow each other: made from the uid.
    pub incarnation: u64,
    /// Node it is bound to.
    pub node: Option<Box<str>>,
    /// Tells apart what it takes, and of which node; 0: nothing.
    pub takes: u64,
    /// How much of its name is that of its ModelDeployment; none: its label has to be looked at.
    owner_bytes: Option<u16>,
    whole: Packed<PodView>,
}

impl Wish {
    /// Whether anything is done because of what its engines say about their load.
    pub fn is_steered(&self) -> bool {
        self.scales || self.compares
    }
}

impl ChildPod {
    pub(crate) fn of(pod: &PodView) -> Result<Self, String> {
        let is_engine = pod.label(names::COMPONENT) == names::ENGINE;
        let owner = pod.label(names::MODEL_DEPLOYMENT);
        let owner_bytes = pod.name.starts_with(owner).then(|| owner.len().try_into());
        Ok(Self {
            priority: pod.priority,
            reserves: pod.is_reserving(),
            // Of a group only the first rank has load to tell of.
            is_asked: is_engine
                && pod.rank() == 0
                && pod.phase == PodPhase::Running
                && !pod.deleting
                && pod.address.is_some(),
            drains: pod.annotations.get(names::DRAIN_SINCE).is_some(),
            incarnation: hashed(&pod.uid),
            node: pod.node.as_deref().map(Box::from),
            takes: pod.claim().map_or(0, |claim| hashed(&claim).max(1)),
            owner_bytes: owner_bytes.and_then(Result::ok),
            whole: Packed::of(pod)?,
        })
    }

    /// The pod, made anew each time; none if it does not read what it wrote.
    pub fn view(&self) -> Option<PodView> {
        self.whole.unpack()
    }

    /// The ModelDeployment of a pod that is kept under `key`.
    pub fn owner(&self, key: &Key) -> Option<Key> {
        let namespace = Arc::clone(&key.namespace);
        let of_name = self
            .owner_bytes
            .and_then(|bytes| key.name.get(..bytes.into()));
        match of_name {
            Some(name) => Some(Key::new(namespace, name)),
            None => Some(Key::new(
                namespace,
                self.view()?.label(names::MODEL_DEPLOYMENT),
            )),
        }
    }
}

fn hashed(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// A config map of ours.
#[derive(Debug, PartialEq)]
pub struct ChildConfigMap {
    /// Name of its ModelDeployment.
    pub deployment: Box<str>,
    /// What controls it.
    pub controller: Controller,
    pub(crate) whole: Packed<ConfigMap>,
}

impl ChildConfigMap {
    /// Its content.
    pub fn view(&self) -> Option<ConfigMapView> {
        Some(ConfigMapView {
            controller: self.controller,
            ..ConfigMapView::of(&self.whole.unpack()?)
        })
    }
}

pub(crate) fn key_of(metadata: &ObjectMeta) -> Key {
    Key::new(
        metadata.namespace.clone().unwrap_or_default(),
        metadata.name.clone().unwrap_or_default(),
    )
}

pub(crate) fn deployment_label(metadata: &ObjectMeta) -> Option<String> {
    metadata
        .labels
        .as_ref()?
        .get(names::MODEL_DEPLOYMENT)
        .cloned()
}

pub(crate) fn child_pod(pod: Pod) -> Result<Option<ChildPod>, String> {
    match deployment_label(&pod.metadata) {
        Some(_) => ChildPod::of(&PodView::of(&pod)).map(Some),
        None => Ok(None),
    }
}

pub(crate) fn child_config_map(map: ConfigMap) -> Result<Option<ChildConfigMap>, String> {
    let Some(deployment) = deployment_label(&map.metadata) else {
        return Ok(None);
    };
    let controller = Controller::of(&map.metadata);
    // What its view is made of.
    let whole = ConfigMap {
        metadata: ObjectMeta {
            name: map.metadata.name,
            uid: map.metadata.uid,
            ..ObjectMeta::default()
        },
        data: map.data,
        ..ConfigMap::default()
    };
    Ok(Some(ChildConfigMap {
        deployment: deployment.into(),
        controller,
        whole: Packed::of(&whole)?,
    }))
}

/// The claim of a pod that the watch of our own pods does not see.
pub(crate) fn other_claim(pod: &Pod, served: Option<&str>) -> Option<Claim> {
    let labels = pod.metadata.labels.as_ref();
    let ours = labels.is_some_and(|labels| {
        labels
            .get(names::MANAGED_BY)
            .is_some_and(|by| by == "cachalot")
            && labels.contains_key(names::MODEL_DEPLOYMENT)
    });
    if ours && (served.is_none() || pod.metadata.namespace.as_deref() == served) {
        return None;
    }
    Claim::of(pod)
}

/// What is left of an object's metadata: nothing that changes with every write, nothing that is only bulk.
pub(crate) fn trim_metadata(metadata: &mut ObjectMeta) {
    metadata.managed_fields = None;
    metadata.resource_version = None;
    if let Some(annotations) = metadata.annotations.as_mut() {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
}

pub(crate) fn trim_deployment(mut deployment: ModelDeployment) -> Result<Option<Wish>, String> {
    trim_metadata(&mut deployment.metadata);
    Ok(Some(Wish {
        scales: deployment.spec.autoscaling.is_some(),
        compares: deployment.spec.rollout.analysis.is_some() && is_rolling_out(&deployment),
        floor: priority::floor(&deployment.spec),
        gpu_faults: deployment
            .status
            .as_ref()
            .map(|status| status.gpu_faults.as_slice().into())
            .unwrap_or_default(),
        whole: Packed::of(&deployment)?,
    }))
}

/// Whether a revision is under way that not every replica has answered with, and that was not given up.
fn is_rolling_out(deployment: &ModelDeployment) -> bool {
    let status = deployment.status.as_ref();
    let rollout = status.and_then(|status| status.rollout.as_ref());
    rollout.is_some_and(|rollout| {
        rollout.failure.is_none()
            && rollout.stable_revision.is_some()
            && rollout.stable_revision != rollout.target_revision
    })
}

pub(crate) fn trim_service(mut service: Service) -> Result<Option<Packed<Service>>, String> {
    trim_metadata(&mut service.metadata);
    service.status = None;
    if deployment_label(&service.metadata).is_none() {
        service.spec = None;
        service.metadata.annotations = None;
    }
    Packed::of(&service).map(Some)
}

pub(crate) fn trim_policy(
    mut policy: NetworkPolicy,
) -> Result<Option<Packed<NetworkPolicy>>, String> {
    // Others' policies matter by name only, and only where a group might want that name.
    let name = policy.metadata.name.as_deref().unwrap_or_default();
    if names::owner_of_ranks(name).is_none() {
        return Ok(None);
    }
    trim_metadata(&mut policy.metadata);
    if deployment_label(&policy.metadata).is_none() {
        policy.spec = None;
        policy.metadata.annotations = None;
    }
    Packed::of(&policy).map(Some)
}

pub(crate) fn trim_budget(
    mut budget: PodDisruptionBudget,
) -> Result<Option<Packed<PodDisruptionBudget>>, String> {
    trim_metadata(&mut budget.metadata);
    budget.status = None;
    if deployment_label(&budget.metadata).is_none() {
        budget.spec = None;
        budget.metadata.annotations = None;
    }
    Packed::of(&budget).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_of_a_pod_is_what_its_label_says_whatever_its_name() {
        for (name, owner) in [
            ("m-0-abc-0", "m"),
            ("shortened-0", "a-long-name"),
            ("x", ""),
        ] {
            let pod: Pod = serde_json::from_value(serde_json::json!({
                "metadata": {"name": name, "labels": {names::MODEL_DEPLOYMENT: owner}}}))
            .expect("a pod");
            let child = ChildPod::of(&PodView::of(&pod)).expect("it has a JSON form");
            let found = child.owner(&Key::new("d", name));
            assert_eq!(found, Some(Key::new("d", owner)), "{name}");
        }
    }

    #[test]
    fn revisions_are_compared_while_one_with_an_analysis_is_under_way() {
        let failure =
            serde_json::json!({"at": "2026-01-01T00:00:00Z", "attempt": 0, "message": "m"});
        let rollout = |stable: Option<&str>, failure: &serde_json::Value| serde_json::json!({"stableRevision": stable, "targetRevision": "b", "failure": failure});
        let none = serde_json::Value::Null;
        for (analysis, rollout, compares) in [
            (true, rollout(Some("a"), &none), true),
            (false, rollout(Some("a"), &none), false),
            (true, rollout(Some("b"), &none), false),
            (true, rollout(None, &none), false),
            (true, rollout(Some("a"), &failure), false),
        ] {
            let mut deployment = serde_json::json!({
                "apiVersion": "cachalot.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "m"},
                "spec": {"model": {"source": "file:///m"}, "rollout": {}}, "status": {"rollout": rollout},
            });
            if analysis {
                deployment["spec"]["rollout"]["analysis"] = serde_json::json!({});
            }
            let deployment = serde_json::from_value(deployment).expect("a ModelDeployment");
            let wish = trim_deployment(deployment).expect("it has a JSON form");
            let found = wish.expect("it is kept").is_steered();
            assert_eq!(found, compares, "{rollout}, analysis: {analysis}");
        }
    }
}
