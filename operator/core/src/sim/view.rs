//! What the operator sees of the simulated cluster, and what wakes it: the same rules as the
//! mirrors and wakes of `operator-k8s`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use operator_api::ModelDeployment;

use super::world::{Key, World};
use crate::names;
use crate::priority::{self, Contest, Rival};
use crate::snapshot::{Claim, Cluster, NodeView, PodView, QuotaView};

/// A pod as it was last seen.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) view: Arc<PodView>,
    claim: Option<Claim>,
}

/// Pods and nodes as they were last seen.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    pub(super) pods: BTreeMap<Key, Seen>,
    nodes: BTreeMap<String, Arc<NodeView>>,
    /// Quotas by namespace.
    pub(super) quotas: BTreeMap<String, Vec<Arc<QuotaView>>>,
}

/// Kinds whose watches are behind.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Unseen {
    pub(super) pods: bool,
    pub(super) nodes: bool,
    pub(super) quotas: bool,
}

impl View {
    /// The view that misses nothing.
    pub(super) fn of(world: &World) -> Self {
        let seen = |pod: &super::world::StoredPod| Seen {
            view: Arc::clone(&pod.view),
            claim: pod.claim.clone(),
        };
        Self {
            pods: world
                .pods
                .iter()
                .map(|(key, pod)| (key.clone(), seen(pod)))
                .collect(),
            nodes: world
                .nodes
                .iter()
                .map(|(name, node)| (name.clone(), Arc::clone(&node.view)))
                .collect(),
            quotas: world.quota_views(),
        }
    }

    /// Who else wants the nodes.
    pub(super) fn contest(&self, world: &World, deployment: &ModelDeployment) -> Contest {
        let ModelDeployment { metadata, spec, .. } = deployment;
        let own = (
            metadata.namespace.as_deref().unwrap_or_default(),
            metadata.name.as_deref().unwrap_or_default(),
        );
        let pods = self.pods.iter().map(|((namespace, _), pod)| {
            Rival::of(namespace.as_str().into(), Arc::clone(&pod.view))
        });
        Contest::of(
            own,
            spec.placement.priority_class_name.as_deref(),
            world.classes.clone(),
            pods,
            |(namespace, name)| {
                let other = world.wishes.get(&(namespace.to_string(), name.clone()));
                other.map_or(0, |other| priority::floor(&other.deployment.spec))
            },
        )
    }

    /// Nodes, and what is taken on them.
    pub(super) fn cluster(&self) -> Cluster {
        let claims = self.pods.values().filter_map(|pod| pod.claim.as_ref());
        Cluster::new(self.nodes.values().cloned(), claims)
    }
}

/// Whose pods have to leave before a pod can be bound.
fn owners_of_victims(pod: &PodView) -> impl Iterator<Item = Key> + '_ {
    pod.victims()
        .map(|victim| (victim.namespace.to_owned(), victim.deployment.to_owned()))
}

impl World {
    /// The operator's caches catch up; who has news is woken.
    pub fn see_everything(&mut self) {
        self.see(Unseen::default());
    }

    /// Caches catch up but for some: each kind has a watch of its own, and one may be behind the others.
    pub(super) fn see(&mut self, unseen: Unseen) {
        let mut fresh = View::of(self);
        if unseen.pods {
            fresh.pods.clone_from(&self.view.pods);
        }
        if unseen.nodes {
            fresh.nodes.clone_from(&self.view.nodes);
        }
        if unseen.quotas {
            fresh.quotas.clone_from(&self.view.quotas);
        }
        let mut woken: BTreeSet<Key> = BTreeSet::new();
        let mut is_room = self.view.quotas != fresh.quotas;
        let keys: BTreeSet<&Key> = self.view.pods.keys().chain(fresh.pods.keys()).collect();
        for key in keys {
            let (before, after) = (self.view.pods.get(key), fresh.pods.get(key));
            let is_same = match (before, after) {
                (Some(before), Some(after)) => Arc::ptr_eq(&before.view, &after.view),
                _ => false,
            };
            if is_same {
                continue;
            }
            for pod in [before, after].into_iter().flatten() {
                let owner = pod.view.label(names::MODEL_DEPLOYMENT);
                woken.insert((key.0.clone(), owner.to_owned()));
                woken.extend(owners_of_victims(&pod.view));
            }
            let claims = |seen: Option<&Seen>| seen.is_some_and(|seen| seen.claim.is_some());
            is_room |= claims(before) && !claims(after);
        }
        let names: BTreeSet<&String> = self.view.nodes.keys().chain(fresh.nodes.keys()).collect();
        for name in names {
            let is_same = match (self.view.nodes.get(name), fresh.nodes.get(name)) {
                (Some(before), Some(after)) => Arc::ptr_eq(before, after),
                _ => false,
            };
            if !is_same {
                is_room = true;
                let on_it = fresh
                    .pods
                    .iter()
                    .filter(|(_, pod)| pod.view.node.as_ref() == Some(name));
                woken.extend(on_it.map(|((namespace, _), pod)| {
                    let owner = pod.view.label(names::MODEL_DEPLOYMENT);
                    (namespace.clone(), owner.to_owned())
                }));
            }
        }
        for (key, wish) in &mut self.wishes {
            wish.is_woken |= woken.contains(key) || (is_room && wish.is_hungry);
        }
        self.view = fresh;
    }

    /// The operator reads one node.
    pub(super) fn see_node(&mut self, name: &str) {
        if let Some(node) = self.nodes.get(name) {
            let view = Arc::clone(&node.view);
            self.view.nodes.insert(name.to_owned(), view);
        }
    }

    /// The operator hears the answer to a write about a pod, unless it is lost.
    pub(super) fn hear(&mut self, key: &Key, is_lost: bool) {
        if is_lost {
            self.unsure.insert(key.clone(), None);
            return;
        }
        self.unsure.remove(key);
        let before = self.view.pods.get(key).map(|seen| &seen.view);
        let after = self.pods.get(key).map(|pod| &pod.view);
        let named: Vec<Key> = [before, after]
            .into_iter()
            .flatten()
            .flat_map(|view| owners_of_victims(view))
            .collect();
        for owner in named {
            if let Some(wish) = self.wishes.get_mut(&owner) {
                wish.is_woken = true;
            }
        }
        match self.pods.get(key) {
            Some(pod) => {
                let seen = Seen {
                    view: Arc::clone(&pod.view),
                    claim: pod.claim.clone(),
                };
                self.view.pods.insert(key.clone(), seen);
            }
            None => {
                self.view.pods.remove(key);
            }
        }
    }

    /// Reads back the pods of a wish whose last write has no known outcome; false when the API
    /// server does not answer.
    pub(super) fn settle(&mut self, wish: &Key) -> bool {
        let prefix = format!("{}-", wish.1);
        let is_own = |pod: &&Key| pod.0 == wish.0 && pod.1.starts_with(&prefix);
        let pods: Vec<Key> = self.unsure.keys().filter(is_own).cloned().collect();
        if !pods.is_empty() && !self.answers() {
            return false;
        }
        for pod in pods {
            // As `operator-k8s` does: a create is repeated, so that it cannot take effect later.
            if let Some(Some(created)) = self.unsure.get(&pod).cloned() {
                self.make(&pod, &created);
            }
            self.hear(&pod, false);
        }
        true
    }

    /// The operator starts anew: it remembers nothing and lists everything.
    pub fn restart(&mut self) {
        self.tell("the operator starts anew".into());
        self.unsure.clear();
        self.held.clear();
        // Its connections are closed: what was under way takes effect at once, or never.
        for (at, ..) in &mut self.late {
            *at = self.now;
        }
        if self.chance(500) {
            self.late.clear();
        }
        self.land();
        for wish in self.wishes.values_mut() {
            wish.samples.clear();
            wish.is_hungry = false;
            wish.is_woken = true;
        }
        self.see_everything();
    }

    /// Wishes that the operator looks at now.
    pub fn due(&self) -> Vec<Key> {
        self.wishes
            .iter()
            .filter(|(_, wish)| wish.is_woken || wish.due.is_some_and(|due| due <= self.now))
            .map(|(key, _)| key.clone())
            .collect()
    }
}
