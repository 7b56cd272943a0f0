//! What the operator's writes do to the simulated cluster.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use operator_api::ModelDeploymentStatus;

use super::nature::later;
use super::world::{Key, StoredPod, World, owner_of};
use crate::ownership::Controller;
use crate::plan::{Action, Kind, Object};
use crate::priority::Priority;
use crate::snapshot::{ClaimTemplateView, ConfigMapView};

impl World {
    /// Stores the status, as its own writer would.
    pub fn store_status(&mut self, key: &Key, status: ModelDeploymentStatus) {
        if let Some(wish) = self.wishes.get_mut(key) {
            let mut deployment = (*wish.deployment).clone();
            deployment.status = Some(status);
            wish.deployment = Arc::new(deployment);
        }
    }

    /// Carries out one write; true when it changed anything. The operator sees its own writes at
    /// once, unless the answer is lost: then it learns of them like of anything else.
    pub fn write(&mut self, wish: &Key, action: &Action, is_unheard: bool) -> bool {
        let namespace = wish.0.clone();
        match action {
            Action::Create(Object::Pod(pod)) | Action::Apply(Object::Pod(pod)) => {
                let key = (namespace, pod.metadata.name.clone().unwrap_or_default());
                let is_new = !self.pods.contains_key(&key);
                if is_new {
                    self.create(&key, pod);
                }
                // A create that meets "already exists" reads what is there.
                self.hear(&key, is_unheard);
                is_new
            }
            Action::Create(object) | Action::Apply(object) => self.apply(wish, object.clone()),
            Action::PatchPod {
                name,
                uid,
                labels,
                annotations,
            } => {
                let key = (namespace, name.clone());
                if !self.is_it(&key, uid) {
                    return false;
                }
                self.change_pod(&key, |pod| {
                    let stored = pod.metadata.labels.get_or_insert_default();
                    stored.extend(labels.clone());
                    let stored = pod.metadata.annotations.get_or_insert_default();
                    for (key, value) in annotations {
                        match value {
                            Some(value) => stored.insert(key.clone(), value.clone()),
                            None => stored.remove(key),
                        };
                    }
                });
                self.hear(&key, is_unheard);
                true
            }
            Action::Release { name, uid } => {
                let key = (namespace, name.clone());
                let done = self.is_it(&key, uid) && self.release(&key);
                self.hear(&key, is_unheard);
                done
            }
            Action::Adopt {
                kind,
                name,
                uid,
                owner,
            } => {
                let key = (namespace, name.clone());
                self.adopt(*kind, &key, uid, owner, is_unheard)
            }
            Action::Delete {
                kind: Kind::Pod,
                name,
                uid,
                ..
            } => {
                let key = (namespace, name.clone());
                let done =
                    self.is_it(&key, uid) && self.delete_pod(&key, self.pace.delete_seconds_max);
                self.hear(&key, is_unheard);
                done
            }
            Action::Delete {
                kind: Kind::ResourceClaimTemplate,
                name,
                ..
            } => self
                .claim_templates
                .remove(&(namespace, name.clone()))
                .is_some(),
            Action::Delete {
                kind: Kind::Service,
                ..
            } => self
                .wishes
                .get_mut(wish)
                .is_some_and(|wish| wish.ranks_service.take().is_some()),
            Action::Delete {
                kind: Kind::NetworkPolicy,
                ..
            } => self
                .wishes
                .get_mut(wish)
                .is_some_and(|wish| wish.ranks_policy.take().is_some()),
            Action::Delete { name, .. } => self
                .config_maps
                .remove(&(namespace, name.clone()))
                .is_some(),
        }
    }

    fn adopt(
        &mut self,
        kind: Kind,
        key: &Key,
        uid: &str,
        owner: &OwnerReference,
        is_unheard: bool,
    ) -> bool {
        let controller = Controller::with_uid(&owner.uid);
        match kind {
            Kind::Pod => {
                let is_it = self.is_it(key, uid);
                if is_it {
                    self.change_pod(key, |pod| {
                        let owners = pod.metadata.owner_references.get_or_insert_default();
                        owners.push(owner.clone());
                    });
                }
                self.hear(key, is_unheard);
                is_it
            }
            Kind::ConfigMap => self.config_maps.get_mut(key).is_some_and(|(_, map)| {
                Arc::make_mut(map).controller = controller;
                true
            }),
            _ => self.claim_templates.get_mut(key).is_some_and(|(_, one)| {
                Arc::make_mut(one).controller = controller;
                true
            }),
        }
    }

    /// A create gets no answer and takes effect later.
    pub fn delay(&mut self, wish: &Key, pod: &Pod, seconds: u64) {
        let key = (
            wish.0.clone(),
            pod.metadata.name.clone().unwrap_or_default(),
        );
        self.unsure.insert(key.clone(), Some(Box::new(pod.clone())));
        let until = later(self.now, super::HOLD_SECONDS);
        self.held.insert(key.clone(), until);
        self.late.push((later(self.now, seconds), key, pod.clone()));
    }

    /// Until when a delete has to wait because a create of that name may still take effect.
    pub fn held_until(&self, wish: &Key, action: &Action) -> Option<Timestamp> {
        let Action::Delete { name, .. } = action else {
            return None;
        };
        let until = self.held.get(&(wish.0.clone(), name.clone()));
        until.copied().filter(|until| *until > self.now)
    }

    /// Creates whose time has come take effect, unless the name is taken, a quota is in the way, or the owner is gone.
    pub(super) fn land(&mut self) {
        let now = self.now;
        let (due, waiting) = std::mem::take(&mut self.late)
            .into_iter()
            .partition(|(at, ..)| *at <= now);
        self.late = waiting;
        for (_, key, pod) in due {
            if self.make(&key, &pod) {
                self.tell(format!("the create of {} takes effect at last", key.1));
            }
        }
    }

    /// Makes a pod if the API server would; false when it is there, or refused.
    pub(super) fn make(&mut self, key: &Key, pod: &Pod) -> bool {
        let owner = pod.metadata.owner_references.iter().flatten().next();
        let has_owner = owner.is_some_and(|owner| {
            let wish = self.wishes.get(&(key.0.clone(), owner.name.clone()));
            wish.is_some_and(|wish| wish.deployment.metadata.uid.as_ref() == Some(&owner.uid))
        });
        if !has_owner || self.pods.contains_key(key) || self.is_over_quota(&key.0, pod) {
            return false;
        }
        self.create(key, pod);
        true
    }

    /// Whether a fresh read shows that what a write supposes of a node is not so.
    pub fn is_refuted(&mut self, action: &Action) -> bool {
        let Action::Delete {
            if_silent: Some(node),
            ..
        } = action
        else {
            return false;
        };
        if !self.is_node_ready(node) {
            return false;
        }
        self.tell(format!(
            "{node} is read once more and answers: not done: {action}"
        ));
        self.see_node(node);
        true
    }

    fn apply(&mut self, key: &Key, object: Object) -> bool {
        let uid = self.uid();
        let Some(wish) = self.wishes.get_mut(key) else {
            return false;
        };
        match object {
            Object::ConfigMap(mut map) => {
                map.metadata.uid = Some(uid);
                let (owner, view) = (owner_of(&map.metadata), ConfigMapView::of(&map));
                let name = (key.0.clone(), view.name.clone());
                self.config_maps.insert(name, (owner, Arc::new(view)));
            }
            Object::ResourceClaimTemplate(mut template) => {
                template.metadata.uid = Some(uid);
                let owner = owner_of(&template.metadata);
                let view = ClaimTemplateView::of(&template);
                let name = (key.0.clone(), view.name.clone());
                self.claim_templates.insert(name, (owner, Arc::new(view)));
            }
            Object::Service(mut service) => {
                service.metadata.uid = Some(uid);
                let is_front = service.metadata.name.as_ref() == Some(&key.1);
                let place = if is_front {
                    &mut wish.service
                } else {
                    &mut wish.ranks_service
                };
                *place = Some(Arc::new(*service));
            }
            Object::NetworkPolicy(mut policy) => {
                policy.metadata.uid = Some(uid);
                wish.ranks_policy = Some(Arc::new(*policy));
            }
            Object::PodDisruptionBudget(mut budget) => {
                budget.metadata.uid = Some(uid);
                wish.budget = Some(Arc::new(*budget));
            }
            Object::Pod(_) => return false,
        }
        true
    }

    fn is_it(&self, key: &Key, uid: &str) -> bool {
        self.pods.get(key).is_some_and(|pod| pod.view.uid == uid)
    }

    fn create(&mut self, key: &Key, pod: &Pod) {
        let mut pod = pod.clone();
        if let Some(spec) = &mut pod.spec {
            let priority = Priority::of(spec.priority_class_name.as_deref(), &self.classes);
            spec.priority = Some(priority.value);
        }
        pod.metadata.uid = Some(self.uid());
        pod.metadata.creation_timestamp = Some(Time(self.now));
        pod.status = Some(PodStatus {
            phase: Some("Pending".into()),
            ..PodStatus::default()
        });
        self.pods.insert(key.clone(), StoredPod::new(pod));
    }

    /// Marks a pod as being deleted; false when it is not there or already is.
    pub(super) fn delete_pod(&mut self, key: &Key, seconds_max: u64) -> bool {
        let Some(stored) = self.pods.get(key) else {
            return false;
        };
        if stored.view.deleting {
            return false;
        }
        let seconds = if stored.view.is_finished() {
            0
        } else {
            self.chance.below(seconds_max)
        };
        let (now, gone_at) = (self.now, later(self.now, seconds));
        self.change_pod(key, |pod| pod.metadata.deletion_timestamp = Some(Time(now)));
        if let Some(stored) = self.pods.get_mut(key) {
            stored.gone_at = Some(gone_at);
        }
        true
    }
}
