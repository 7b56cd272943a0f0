//! Whose the children are: adopted where nothing controls them, left alone where something else does.
//!
//! A deletion with `--cascade=orphan` leaves the children without a controller, and a ModelDeployment of the same name
//! takes them over as they are, so that they serve on and are removed with it. Invariant: what something else controls is
//! never written, whatever labels it has. The surprise: a controller that is gone counts as something else. Its pods are
//! no replicas of a successor of the same name, because Kubernetes' garbage collector is about to remove them.

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use operator_api::EventReason;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::names;
use crate::plan::{Action, EventKind, Kind, Plan};
use crate::snapshot::{PodView, Snapshot};
use crate::status;

/// What controls an object. Of a uid 32 bits of the hash are kept, since there are ten thousand pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Controller {
    /// Nothing.
    #[default]
    Nothing,
    /// A ModelDeployment of the name that the object's label says.
    Deployment(u32),
    /// Something else.
    Other,
}

impl Controller {
    /// What controls the object with this metadata.
    pub fn of(metadata: &ObjectMeta) -> Self {
        let mut owners = metadata.owner_references.iter().flatten();
        let Some(owner) = owners.find(|owner| owner.controller == Some(true)) else {
            return Self::Nothing;
        };
        let mut labels = metadata.labels.iter();
        let is_named =
            labels.any(|labels| labels.get(names::MODEL_DEPLOYMENT) == Some(&owner.name));
        if owner.kind == operator_api::KIND && is_named {
            Self::with_uid(&owner.uid)
        } else {
            Self::Other
        }
    }

    /// The ModelDeployment of that uid.
    pub fn with_uid(uid: &str) -> Self {
        let [a, b, c, d, ..]: [u8; 32] = Sha256::digest(uid.as_bytes()).into();
        Self::Deployment(u32::from_be_bytes([a, b, c, d]))
    }

    /// Whether nothing controls the object.
    pub fn is_nothing(self) -> bool {
        self == Self::Nothing
    }
}

impl Snapshot {
    /// Whether something else than the ModelDeployment controls a pod with its labels. One without a uid is only
    /// supposed, by someone who asks what would be: it stands for the one that is there.
    pub fn is_foreign(&self, pod: &PodView) -> bool {
        let uid = self.deployment.metadata.uid.as_deref();
        let is_ours = |uid| pod.controller == Controller::with_uid(uid);
        !pod.controller.is_nothing() && !uid.is_none_or(is_ours)
    }

    /// Whether a ModelDeployment of the same name that is gone controls a pod, as far as is seen. Either it is about to be
    /// removed, or it was left behind and that is not seen yet: until it is known which, nothing is made in its place.
    pub fn is_of_predecessor(&self, pod: &PodView) -> bool {
        let is_there = !pod.deleting && !pod.is_finished();
        is_there && pod.controller != Controller::Other && self.is_foreign(pod)
    }
}

/// Whether an object has the labels of a child of that deployment, and nothing controls it.
pub(crate) fn is_left_behind(metadata: &ObjectMeta, deployment: &str) -> bool {
    let has = |key, value| {
        let mut labels = metadata.labels.iter();
        labels.any(|labels| labels.get(key).is_some_and(|found| found == value))
    };
    Controller::of(metadata).is_nothing()
        && has(names::MANAGED_BY, "cachalot")
        && has(names::MODEL_DEPLOYMENT, deployment)
}

/// The reference that makes a ModelDeployment the controller of a child.
pub(crate) fn owner_reference(name: &str, uid: &str) -> OwnerReference {
    OwnerReference {
        api_version: format!("{}/{}", operator_api::GROUP, operator_api::VERSION),
        kind: operator_api::KIND.to_owned(),
        name: name.to_owned(),
        uid: uid.to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// Lets a plan begin with the adoption of pods, config maps and claim templates that nothing controls. What the plan
/// writes or removes anyway is left to it; services, budgets and network policies are applied with their owner.
pub(crate) fn adopt(plan: &mut Plan, snapshot: &Snapshot) {
    let metadata = &snapshot.deployment.metadata;
    let (Some(owner), Some(owner_uid)) = (&metadata.name, &metadata.uid) else {
        return;
    };
    let written: BTreeSet<(Kind, &str)> = plan.actions.iter().map(Action::target).collect();
    let pods = snapshot.pods.iter().filter(|pod| !pod.deleting);
    let pods = pods.map(|pod| (Kind::Pod, &pod.name, &pod.uid, pod.controller));
    let maps = snapshot.config_maps.iter();
    let maps = maps.map(|map| (Kind::ConfigMap, &map.name, &map.uid, map.controller));
    let templates = snapshot.claim_templates.iter();
    let kind = Kind::ResourceClaimTemplate;
    let templates = templates.map(|one| (kind, &one.name, &one.uid, one.controller));
    let adopted: Vec<Action> = pods
        .chain(maps)
        .chain(templates)
        .filter(|(.., controller)| controller.is_nothing())
        .filter(|(kind, name, ..)| !written.contains(&(*kind, name.as_str())))
        .map(|(kind, name, uid, _)| Action::Adopt {
            kind,
            name: name.clone(),
            uid: uid.clone(),
            owner: Box::new(owner_reference(owner, owner_uid)),
        })
        .collect();
    if adopted.is_empty() {
        return;
    }
    let names: Vec<String> = adopted
        .iter()
        .map(|action| action.target().1.to_owned())
        .collect();
    let note = status::listed("nothing controlled them any more: adopted", &names);
    let reason = EventReason::ChildrenAdopted.as_str();
    plan.events
        .push(status::event(EventKind::Normal, reason, &note));
    plan.actions.splice(0..0, adopted);
}
