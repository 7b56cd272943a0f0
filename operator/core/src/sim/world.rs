//! The simulated cluster: a store of objects, what the operator sees of it, and what its writes do.
//!
//! Views and claims are made anew only when an object changes, and shared; a story costs little
//! more than the plans that are made in it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use operator_api::ModelDeployment;

use super::nature::Pace;
use super::view::View;
use super::{Broken, epoch};
use crate::devices::{ClaimNews, NodeDevices};
use crate::inventory::Inventory;
use crate::names;
use crate::priority::PriorityClassView;
use crate::snapshot::{
    Claim, ClaimTemplateView, Cluster, ConfigMapView, NodeView, PodSamples, PodView, QuotaView,
    Snapshot,
};

/// Happenings kept for the story of a broken rule.
const STORY_MAX: usize = 80;

/// Namespace and name.
pub type Key = (String, String);

/// A source of chance that gives the same numbers for the same seed (splitmix64).
#[derive(Clone, Debug)]
pub struct Seed(pub u64);

impl Seed {
    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_u64() % end.max(1)
    }

    /// One of several.
    pub fn of<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        let pick = self.below(u64::try_from(all.len()).unwrap_or(u64::MAX));
        all.get(usize::try_from(pick).unwrap_or(0))
    }
}

/// A pod, and what is made of it whenever it changes.
#[derive(Clone, Debug)]
pub(super) struct StoredPod {
    pub(super) pod: Pod,
    pub(super) view: Arc<PodView>,
    pub(super) claim: Option<Claim>,
    /// When it becomes ready, or its inspection ends; none before it is bound.
    pub(super) ready_at: Option<Timestamp>,
    /// When it is gone, once it is deleted.
    pub(super) gone_at: Option<Timestamp>,
}

impl StoredPod {
    pub(super) fn new(pod: Pod) -> Self {
        Self {
            view: Arc::new(PodView::of(&pod)),
            claim: Claim::of(&pod),
            pod,
            ready_at: None,
            gone_at: None,
        }
    }
}

/// A node, and the view of it.
#[derive(Clone, Debug)]
pub(super) struct StoredNode {
    pub(super) node: Node,
    pub(super) view: Arc<NodeView>,
}

/// A ModelDeployment, what belongs to it alone, and when the operator looks at it.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    pub(super) deployment: Arc<ModelDeployment>,
    pub(super) service: Option<Arc<Service>>,
    pub(super) ranks_service: Option<Arc<Service>>,
    pub(super) ranks_policy: Option<Arc<NetworkPolicy>>,
    pub(super) budget: Option<Arc<PodDisruptionBudget>>,
    pub(super) samples: BTreeMap<String, PodSamples>,
    /// When the operator looks again by itself.
    pub(super) due: Option<Timestamp>,
    /// Whether something happened to it that the operator was told of.
    pub(super) is_woken: bool,
    /// Whether it waits for room, and is woken by some.
    pub(super) is_hungry: bool,
}

/// The simulated cluster.
#[derive(Clone, Debug)]
pub struct World {
    /// The time.
    pub now: Timestamp,
    pub(super) seed: u64,
    pub(super) chance: Seed,
    pub(super) pace: Pace,
    pub(super) wishes: BTreeMap<Key, Wish>,
    pub(super) pods: BTreeMap<Key, StoredPod>,
    /// Config maps with the name of the wish they belong to.
    pub(super) config_maps: BTreeMap<Key, (String, Arc<ConfigMapView>)>,
    /// Claim templates with the name of the wish they belong to.
    pub(super) claim_templates: BTreeMap<Key, (String, Arc<ClaimTemplateView>)>,
    /// GPUs that claims may ask for, by node.
    pub(super) devices: BTreeMap<String, NodeDevices>,
    pub(super) nodes: BTreeMap<String, StoredNode>,
    /// Nodes that left, and when one like them joins.
    pub(super) joining: Vec<(Timestamp, Node)>,
    /// Pods, by uid, whose controller is gone, and when the garbage collector comes for them.
    pub(super) uncollected: Vec<(Timestamp, Key, String)>,
    pub(super) view: View,
    /// Nodes that ever joined later.
    pub(super) joined: u32,
    /// Until when the API server answers nobody.
    pub(super) silent_until: Option<Timestamp>,
    /// Steps for which nothing is seen yet.
    pub(super) blind_steps: u64,
    /// Pods whose last write has no known outcome; the operator reads them before it plans.
    /// With what a create that got no answer was to make.
    pub(super) unsure: BTreeMap<Key, Option<Box<Pod>>>,
    /// Creates that take effect later, when nobody waits for them any more.
    pub(super) late: Vec<(Timestamp, Key, Pod)>,
    /// Of all revisions, so many per mille never answer.
    pub(super) bad_revision: u64,
    /// Until when a pod is not deleted because a create of it may still take effect.
    pub(super) held: BTreeMap<Key, Timestamp>,
    /// Quotas by namespace; what they say is used is counted anew.
    pub(super) quotas: BTreeMap<String, Vec<QuotaView>>,
    /// Priority classes.
    pub(super) classes: Vec<Arc<PriorityClassView>>,
    /// Pods that answered until something else than the operator ended that.
    pub(super) lost: BTreeSet<Key>,
    /// Whether requests come; without, replicas are idle.
    pub(super) is_busy: bool,
    report: String,
    uids: u64,
    story: Vec<String>,
}

impl World {
    /// A world of what was listed. `report` is what an inspection finds.
    pub fn new(seed: u64, inventory: Inventory, report: String, pace: Pace) -> Self {
        let devices = inventory.devices();
        let Inventory {
            nodes,
            pods,
            config_maps,
            services: _,
            budgets: _,
            network_policies: _,
            quotas,
            slices: _,
            claims: _,
            claim_templates: _,
            claims_unread: _,
            priority_classes,
            deployments,
        } = inventory;
        let mut world = Self {
            now: epoch(),
            seed,
            chance: Seed(seed),
            pace,
            wishes: BTreeMap::new(),
            pods: BTreeMap::new(),
            config_maps: BTreeMap::new(),
            claim_templates: BTreeMap::new(),
            devices,
            nodes: BTreeMap::new(),
            joining: Vec::new(),
            uncollected: Vec::new(),
            view: View::default(),
            joined: 0,
            silent_until: None,
            blind_steps: 0,
            unsure: BTreeMap::new(),
            late: Vec::new(),
            held: BTreeMap::new(),
            bad_revision: 0,
            quotas: BTreeMap::new(),
            classes: priority_classes
                .iter()
                .map(|class| Arc::new(PriorityClassView::of(class)))
                .collect(),
            lost: BTreeSet::new(),
            is_busy: true,
            report,
            uids: 0,
            story: Vec::new(),
        };
        for node in nodes {
            world.put_node(node);
        }
        for pod in pods {
            let key = key_of(&pod.metadata);
            let mut stored = StoredPod::new(pod);
            // What is bound already runs, or will go on starting as it was.
            stored.ready_at = stored.view.node.as_ref().map(|_| world.now);
            stored.gone_at = stored.view.deleting.then_some(world.now);
            world.pods.insert(key, stored);
        }
        for map in config_maps {
            let view = Arc::new(ConfigMapView::of(&map));
            let owner = owner_of(&map.metadata);
            world
                .config_maps
                .insert(key_of(&map.metadata), (owner, view));
        }
        for quota in &quotas {
            let namespace = quota.metadata.namespace.clone().unwrap_or_default();
            if let Some(view) = QuotaView::of(quota) {
                world.quotas.entry(namespace).or_default().push(view);
            }
        }
        for deployment in deployments {
            world.put_wish(deployment);
        }
        world.see_everything();
        world
    }

    /// True with a chance of `per_mille` in a thousand.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        per_mille > 0 && self.chance.below(1000) < per_mille
    }

    /// Adds to the story.
    pub fn tell(&mut self, what: String) {
        if self.story.len() >= STORY_MAX {
            self.story.remove(0);
        }
        self.story.push(format!("{} {what}", self.now));
    }

    /// A broken rule with the story so far.
    pub fn broken(&self, what: String) -> Box<Broken> {
        Box::new(Broken {
            seed: self.seed,
            what,
            story: self.story.clone(),
        })
    }

    /// What inspections find.
    pub(super) fn report(&self) -> &str {
        &self.report
    }

    pub(super) fn uid(&mut self) -> String {
        self.uids += 1;
        format!("uid-{}", self.uids)
    }

    /// A wish appears, or its spec is what is given; the status is kept.
    pub fn put_wish(&mut self, mut deployment: ModelDeployment) {
        let key = key_of(&deployment.metadata);
        match self.wishes.get_mut(&key) {
            Some(wish) => {
                let before = &wish.deployment;
                let generation = before.metadata.generation.unwrap_or(0);
                deployment.metadata.generation = Some(generation + 1);
                deployment.metadata.uid.clone_from(&before.metadata.uid);
                deployment.status.clone_from(&before.status);
                wish.deployment = Arc::new(deployment);
                wish.is_woken = true;
            }
            None => {
                deployment.metadata.generation.get_or_insert(1);
                if deployment.metadata.uid.is_none() {
                    deployment.metadata.uid = Some(self.uid());
                }
                let wish = Wish {
                    deployment: Arc::new(deployment),
                    service: None,
                    ranks_service: None,
                    ranks_policy: None,
                    budget: None,
                    samples: BTreeMap::new(),
                    due: None,
                    is_woken: true,
                    is_hungry: false,
                };
                self.wishes.insert(key, wish);
            }
        }
    }

    /// Changes a spec as a user would.
    pub fn edit(&mut self, key: &Key, change: impl FnOnce(&mut operator_api::ModelDeploymentSpec)) {
        if let Some(wish) = self.wishes.get(key) {
            let mut deployment = (*wish.deployment).clone();
            change(&mut deployment.spec);
            self.put_wish(deployment);
        }
    }

    /// The user deletes a ModelDeployment; Kubernetes collects what it owned.
    pub fn remove_wish(&mut self, key: &Key) {
        self.remove_wish_slowly(key, 0);
    }

    /// The same, with a garbage collector that takes so long to come for the pods.
    pub(super) fn remove_wish_slowly(&mut self, key: &Key, seconds: u64) {
        if self.wishes.remove(key).is_none() {
            return;
        }
        let (namespace, name) = key;
        self.config_maps
            .retain(|(space, _), (owner, _)| space != namespace || owner != name);
        self.claim_templates
            .retain(|(space, _), (owner, _)| space != namespace || owner != name);
        let at = super::nature::later(self.now, seconds);
        for pod in self.pods_of(key) {
            let uid = self.pods[&pod].view.uid.clone();
            self.uncollected.push((at, pod, uid));
        }
        self.collect();
    }

    /// The garbage collector removes the pods that it comes to.
    pub(super) fn collect(&mut self) {
        let now = self.now;
        let (due, waiting) = std::mem::take(&mut self.uncollected)
            .into_iter()
            .partition(|(at, ..)| *at <= now);
        self.uncollected = waiting;
        for (_, key, uid) in due {
            if self.pods.get(&key).is_some_and(|pod| pod.view.uid == uid) {
                self.delete_pod(&key, self.pace.delete_seconds_max);
            }
        }
    }

    /// Names of the wishes.
    pub fn keys(&self) -> Vec<Key> {
        self.wishes.keys().cloned().collect()
    }

    pub(super) fn pods_of(&self, key: &Key) -> Vec<Key> {
        let (namespace, name) = key;
        self.pods
            .iter()
            .filter(|((space, _), pod)| {
                space == namespace && pod.view.label(names::MODEL_DEPLOYMENT) == name
            })
            .map(|(key, _)| key.clone())
            .collect()
    }

    /// A node joins, or changes.
    pub fn put_node(&mut self, node: Node) {
        let view = NodeView::of(&node);
        let devices = self.devices.get(&view.name);
        let view = Arc::new(view.with_devices(devices));
        self.nodes
            .insert(view.name.clone(), StoredNode { node, view });
    }

    /// Changes a node; false when there is none of that name.
    pub fn change_node(&mut self, name: &str, change: impl FnOnce(&mut Node)) -> bool {
        let Some(stored) = self.nodes.get(name) else {
            return false;
        };
        let mut node = stored.node.clone();
        change(&mut node);
        self.put_node(node);
        true
    }

    /// Changes a pod; its view and claim follow.
    pub(super) fn change_pod(&mut self, key: &Key, change: impl FnOnce(&mut Pod)) {
        if let Some(stored) = self.pods.get_mut(key) {
            change(&mut stored.pod);
            let view = PodView::of(&stored.pod);
            if *stored.view != view {
                stored.view = Arc::new(view);
                stored.claim = Claim::of(&stored.pod);
            }
        }
    }

    /// What the operator sees.
    pub fn snapshot(&self, key: &Key) -> Option<Snapshot> {
        self.snapshot_of(key, &self.view)
    }

    /// What is.
    pub fn truth(&self, key: &Key) -> Option<Snapshot> {
        self.snapshot_of(key, &View::of(self))
    }

    fn snapshot_of(&self, key: &Key, view: &View) -> Option<Snapshot> {
        let wish = self.wishes.get(key)?;
        let (namespace, name) = key;
        let wanted = wish.deployment.spec.model.config_map_ref.as_ref();
        let model_config = wanted
            .and_then(|wanted| {
                self.config_maps
                    .get(&(namespace.clone(), wanted.name.clone()))
            })
            .map(|(_, map)| Arc::clone(map));
        let is_own = |space: &String| space == namespace;
        Some(Snapshot {
            now: self.now,
            deployment: Arc::clone(&wish.deployment),
            pods: view
                .pods
                .iter()
                .filter(|((space, _), pod)| {
                    is_own(space) && pod.view.label(names::MODEL_DEPLOYMENT) == name
                })
                .map(|(_, pod)| Arc::clone(&pod.view))
                .collect(),
            config_maps: self
                .config_maps
                .iter()
                .filter(|((space, _), (owner, _))| is_own(space) && owner == name)
                .map(|(_, (_, map))| Arc::clone(map))
                .collect(),
            claim_templates: self
                .claim_templates
                .iter()
                .filter(|((space, _), (owner, _))| is_own(space) && owner == name)
                .map(|(_, (_, template))| Arc::clone(template))
                .collect(),
            model_config,
            service: wish.service.clone(),
            ranks_service: wish.ranks_service.clone(),
            ranks_policy: wish.ranks_policy.clone(),
            disruption_budget: wish.budget.clone(),
            quotas: view.quotas.get(namespace).cloned().unwrap_or_default(),
            contest: view.contest(self, &wish.deployment),
            cluster: Arc::new(Cluster {
                claims: ClaimNews::Known,
                ..view.cluster()
            }),
            samples: wish.samples.clone(),
            demand: None,
            gpu_faults: self
                .wishes
                .iter()
                .filter(|(other, _)| *other != key)
                .filter_map(|(_, other)| other.deployment.status.as_ref())
                .flat_map(|status| status.gpu_faults.iter().cloned())
                .collect(),
            refusal: None,
        })
    }

    /// The nodes and what bound pods take of them.
    pub(super) fn bound(&self) -> Cluster {
        let nodes = self.nodes.values().map(|node| Arc::clone(&node.view));
        let claims = self
            .pods
            .values()
            .filter(|pod| pod.view.node.is_some())
            .filter_map(|pod| pod.claim.as_ref());
        Cluster::new(nodes, claims)
    }

    /// Whether pods of a revision never answer; the same for all of its pods, and decided by the seed.
    pub(super) fn is_bad(&self, revision: &str) -> bool {
        let number = u64::from_str_radix(revision, 16).unwrap_or(0);
        Seed(self.seed ^ number).below(1000) < self.bad_revision
    }

    /// Whether a revision may count as failed: its pods never answer, or start too slowly for the deadline.
    pub(super) fn is_suspect(&self, revision: &str, snapshot: &Snapshot) -> bool {
        let deadline = snapshot.deployment.spec.rollout.progress_deadline_seconds;
        let longest = self.pace.start_seconds_max * self.pace.slow_factor;
        self.is_bad(revision)
            || deadline
                .is_some_and(|seconds| i64::from(seconds) <= i64::try_from(longest).unwrap_or(0))
    }

    /// Whether a node is there and answers.
    pub(super) fn is_node_ready(&self, name: &str) -> bool {
        self.nodes.get(name).is_some_and(|node| node.view.ready)
    }
}

pub(super) fn key_of(metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> Key {
    (
        metadata.namespace.clone().unwrap_or_default(),
        metadata.name.clone().unwrap_or_default(),
    )
}

pub(super) fn owner_of(
    metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
) -> String {
    let labels = metadata.labels.as_ref();
    labels
        .and_then(|labels| labels.get(names::MODEL_DEPLOYMENT))
        .cloned()
        .unwrap_or_default()
}
