//! The cluster as we see it: one mirror per kind, the ledger of what is taken on each node, and who has to be woken.
//!
//! [`World::snapshot`] turns this into the plain values that `operator-core` decides on. Children are found by the
//! prefix of their names, so the work for one ModelDeployment does not grow with the fleet.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, ResourceQuota, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::scheduling::v1::PriorityClass;
use kube::api::Api;
use kube::runtime::watcher;
use kube::{Client, Resource};
use operator_api::{GpuFaultStatus, ModelDeployment};
use operator_core::{
    Claim, Cluster, ConfigMapView, Demand, NodeView, PodSamples, PriorityClassView, QuotaView,
    Snapshot, names, status::Refusal,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;

use crate::claims::Claims;
use crate::ledger::{Ledger, Taker};
use crate::opened::Opened;
use crate::packed::Packed;
use crate::rivals::{self, Reservations};
pub use crate::trim::{ChildConfigMap, ChildPod, Wish};
use crate::trim::{
    child_config_map, child_pod, key_of, other_claim, trim_budget, trim_deployment, trim_policy,
    trim_service,
};
use crate::wakes::{Wakes, lock};
use crate::watch::{self, Change, Entry, Key, Malformed, Mirror};

/// Everything that is watched.
#[derive(Debug)]
pub struct World {
    /// The wishes.
    pub deployments: Arc<Mirror<Wish>>,
    /// Our pods.
    pub pods: Arc<Mirror<ChildPod>>,
    /// What all other pods take.
    pub others: Arc<Mirror<Claim>>,
    /// Nodes.
    pub nodes: Arc<Mirror<NodeView>>,
    /// Our config maps.
    pub config_maps: Arc<Mirror<ChildConfigMap>>,
    /// Services, of everyone: a name may be taken.
    pub services: Arc<Mirror<Packed<Service>>>,
    /// Disruption budgets, of everyone.
    pub budgets: Arc<Mirror<Packed<PodDisruptionBudget>>>,
    /// Network policies of everyone that have the name of a group's; empty where none are written.
    pub policies: Arc<Mirror<Packed<NetworkPolicy>>>,
    policies_followed: AtomicBool,
    /// Quotas that limit GPUs.
    pub quotas: Arc<Mirror<QuotaView>>,
    /// Resource claims, where they are followed.
    pub claims: Claims,
    /// Priority classes.
    pub classes: Arc<Mirror<PriorityClassView>>,
    reservations: Reservations,
    opened: Opened,
    ledger: Mutex<Ledger>,
    wakes: Wakes,
}

/// Of the mirrors of [`World::each`], the first so many are needed by every plan.
const NEEDED: usize = 8;

/// What a snapshot needs beside the mirrors.
#[derive(Clone, Debug, Default)]
pub struct Observations {
    /// The config map that the spec names.
    pub model_config: Option<Arc<ConfigMapView>>,
    /// What engine pods said, by pod name.
    pub samples: BTreeMap<String, PodSamples>,
    /// What Prometheus said.
    pub demand: Option<Demand>,
    /// What the API server refused in the pass before.
    pub refusal: Option<Refusal>,
}

impl World {
    /// A world in which nothing is known yet.
    pub fn new() -> Arc<Self> {
        Arc::new(World {
            deployments: Mirror::new("ModelDeployment"),
            pods: Mirror::new("Pod"),
            others: Mirror::new("PodClaim"),
            nodes: Mirror::new("Node"),
            config_maps: Mirror::new("ConfigMap"),
            services: Mirror::new("Service"),
            budgets: Mirror::new("PodDisruptionBudget"),
            policies: Mirror::new("NetworkPolicy"),
            policies_followed: AtomicBool::default(),
            quotas: Mirror::new("ResourceQuota"),
            claims: Claims::default(),
            classes: Mirror::new("PriorityClass"),
            reservations: Reservations::default(),
            opened: Opened::default(),
            ledger: Mutex::default(),
            wakes: Wakes::default(),
        })
    }

    /// The kinds whose first list is not complete; nobody plans before this is empty.
    pub fn waiting_for(&self) -> Vec<&'static str> {
        let needed = self.each().into_iter().take(NEEDED);
        let policies = self.follows_policies().then(|| Self::state(&self.policies));
        needed
            .chain(policies)
            .filter(|(_, ready, ..)| !ready)
            .map(|(kind, ..)| kind)
            .collect()
    }

    /// Kind, readiness, watch errors and size of every mirror.
    pub fn each(&self) -> Vec<(&'static str, bool, u64, usize)> {
        let mut all = vec![
            Self::state(&self.deployments),
            Self::state(&self.pods),
            Self::state(&self.others),
            Self::state(&self.nodes),
            Self::state(&self.config_maps),
            Self::state(&self.services),
            Self::state(&self.budgets),
            Self::state(&self.quotas),
            Self::state(&self.classes),
        ];
        if self.claims.is_followed() {
            let claims = &self.claims;
            all.extend([
                Self::state(&claims.slices),
                Self::state(&claims.others),
                Self::state(&claims.templates),
            ]);
        }
        if self.follows_policies() {
            all.push(Self::state(&self.policies));
        }
        all
    }

    fn state<V>(mirror: &Mirror<V>) -> (&'static str, bool, u64, usize) {
        (
            mirror.kind,
            mirror.is_ready(),
            mirror.errors(),
            mirror.read().len(),
        )
    }

    fn follows_policies(&self) -> bool {
        self.policies_followed.load(Ordering::Relaxed)
    }

    /// ModelDeployments that something happened to since the last call.
    pub fn take_woken(&self) -> BTreeSet<Key> {
        self.wakes.take()
    }

    /// Returns when [`World::take_woken`] has something to give.
    pub async fn woken(&self) {
        self.wakes.notify.notified().await;
    }

    /// Asks for a pass.
    pub fn wake(&self, key: &Key) {
        self.wakes.add([key.clone()]);
    }

    /// Remembers whether a ModelDeployment waits for room, so that it is woken when some appears.
    pub fn waits_for_room(&self, key: &Key, waits: bool) {
        let mut hungry = lock(&self.wakes.hungry);
        if waits {
            hungry.insert(key.clone());
        } else {
            hungry.remove(key);
        }
    }

    /// A ModelDeployment, for its own pass.
    pub fn deployment(&self, key: &Key) -> Option<Entry<ModelDeployment>> {
        let entry = self.deployments.get(key)?;
        Some(entry.and_then(|wish| match wish.whole.unpack() {
            Some(whole) => Ok(Arc::new(whole)),
            // Never to be taken for one that is gone.
            None => Err(Arc::new(Malformed {
                uid: String::new(),
                generation: None,
                conditions: None,
                message: "it could not be kept: its JSON form is not read back".into(),
            })),
        }))
    }

    /// The plain values for a decision about `deployment`, taken at `now`.
    pub fn snapshot(
        &self,
        key: &Key,
        deployment: Arc<ModelDeployment>,
        seen: Observations,
        now: Timestamp,
    ) -> Snapshot {
        let Observations {
            model_config,
            samples,
            demand,
            refusal,
        } = seen;
        let mut look = self.opened.look(key);
        let pods = children(&self.pods, key, |name, pod| {
            let view = look.open(name, pod)?;
            (view.label(names::MODEL_DEPLOYMENT) == &*key.name).then_some(view)
        });
        self.opened.keep(key, look);
        let config_maps = children(&self.config_maps, key, |_, map| {
            (*map.deployment == *key.name).then(|| map.view().map(Arc::new))?
        });
        let classes = self.classes.read();
        let classes = classes
            .values()
            .filter_map(|entry| entry.as_ref().ok().cloned());
        Snapshot {
            now,
            contest: rivals::contest(
                &deployment,
                key,
                classes.collect(),
                &self.pods,
                &self.deployments,
                &self.reservations,
            ),
            deployment,
            pods,
            config_maps,
            model_config,
            service: unpacked(&self.services, key),
            ranks_service: unpacked(&self.services, &ranks_key(key)),
            ranks_policy: unpacked(&self.policies, &ranks_key(key)),
            disruption_budget: unpacked(&self.budgets, key),
            quotas: self.quotas_of(&key.namespace),
            claim_templates: children(&self.claims.templates, key, |_, template| {
                (*template.deployment == *key.name).then(|| Arc::clone(&template.view))
            }),
            cluster: self.cluster(),
            samples,
            demand,
            gpu_faults: self.gpu_faults_but_of(key),
            refusal,
        }
    }

    /// Forgets what is kept for looks that follow each other closely; to be called now and then. True if there was something.
    pub fn tidy(&self) -> bool {
        self.opened.tidy()
    }

    /// GPUs at fault that others than `key` remember.
    fn gpu_faults_but_of(&self, key: &Key) -> Vec<GpuFaultStatus> {
        let deployments = self.deployments.read();
        let others = deployments.iter().filter(|(other, _)| *other != key);
        others
            .filter_map(|(_, entry)| entry.as_ref().ok())
            .flat_map(|wish| wish.gpu_faults.iter().cloned())
            .collect()
    }

    /// Nodes and what is taken on them.
    fn cluster(&self) -> Arc<Cluster> {
        let mut ledger = lock(&self.ledger);
        if self.claims.is_followed() {
            // News first: what is known then is in the devices that are read after it.
            let news = self.claims.news();
            if let Some(devices) = self.claims.changed_devices() {
                ledger.set_devices(devices);
            }
            ledger.set_news(news);
        }
        Arc::clone(&ledger.cluster)
    }

    pub(crate) fn room_appeared(&self) {
        self.wakes.room_appeared();
    }

    fn quotas_of(&self, namespace: &str) -> Vec<Arc<QuotaView>> {
        let first = Key::new(namespace, "");
        self.quotas
            .read()
            .range::<Key, _>((Bound::Included(&first), Bound::Unbounded))
            .take_while(|(key, _)| *key.namespace == *namespace)
            .filter_map(|(_, entry)| entry.as_ref().ok().map(Arc::clone))
            .collect()
    }

    /// Counts what a pod will take before it exists, so that two decisions do not give away the same GPU.
    pub fn assume(&self, namespace: &str, pod: &Pod) {
        let name = pod.metadata.name.clone().unwrap_or_default();
        let taker = Claim::of(pod).map(|claim| Taker::Other(Arc::new(claim)));
        lock(&self.ledger).set(&Key::new(namespace, name), taker);
    }

    /// Takes back what [`World::assume`] counted, unless the pod is there.
    pub fn unassume(&self, namespace: &str, name: &str) {
        self.count_pod(&Key::new(namespace, name));
    }

    /// Counts a pod as it is in the mirror, and wakes whose place it names. What is in the mirror is read under the lock
    /// of the ledger: an answer to a write and the watch may be taken in at once, and the newer has to count last.
    fn count_pod(&self, key: &Key) {
        let mut ledger = lock(&self.ledger);
        let pod = self.pods.get(key).and_then(Result::ok);
        self.wakes.add(self.reservations.set(key, pod.as_deref()));
        ledger.set(key, pod.map(Taker::Pod));
    }

    /// The same for a node.
    fn count_node(&self, name: &str) {
        let mut ledger = lock(&self.ledger);
        let view = self.nodes.get(&Key::new("", name)).and_then(Result::ok);
        ledger.set_node(name, view);
    }

    /// Takes in the API server's answer to a write of ours.
    pub fn wrote_pod(&self, pod: Pod) {
        let key = key_of(&pod.metadata);
        watch::write_through(&self.pods, pod, child_pod, |change| {
            if tells_more(&change) {
                self.pod_changed(change);
            }
        });
        self.count_pod(&key);
    }

    /// Pods of `owner` that are gone from the mirror although they were written while the list that does not name them was
    /// read: only a fresh read tells whether they exist. Each is given once.
    pub fn take_doubted(&self, owner: &Key) -> Vec<Key> {
        let prefix = format!("{}-", owner.name);
        self.pods
            .take_doubted(|pod| pod.namespace == owner.namespace && pod.name.starts_with(&prefix))
    }

    /// Takes in a node that was read because what is seen of it may be old.
    pub fn read_node(&self, node: Node) {
        let name = node.metadata.name.clone().unwrap_or_default();
        let trim = |node| Ok(Some(NodeView::of(&node)));
        watch::write_through(&self.nodes, node, trim, |change| self.node_changed(change));
        self.count_node(&name);
    }

    /// Takes in the API server's answer to a write of ours.
    pub fn wrote_config_map(&self, config_map: ConfigMap) {
        watch::write_through(&self.config_maps, config_map, child_config_map, |_| ());
    }

    /// Takes in the API server's answer to a write of ours.
    pub fn wrote_service(&self, service: Service) {
        watch::write_through(&self.services, service, trim_service, |_| ());
    }

    /// Takes in the API server's answer to a write of ours.
    pub fn wrote_budget(&self, budget: PodDisruptionBudget) {
        watch::write_through(&self.budgets, budget, trim_budget, |_| ());
    }

    /// Takes in the API server's answer to a write of ours.
    pub fn wrote_policy(&self, policy: NetworkPolicy) {
        watch::write_through(&self.policies, policy, trim_policy, |_| ());
    }

    /// Takes in the API server's answer to a write of ours. It carries the spec as it is by now, and the watch will find
    /// nothing new in a spec that came this way: whoever changed it meanwhile would wait for the next look at everything.
    pub fn wrote_deployment(&self, deployment: ModelDeployment) {
        watch::write_through(&self.deployments, deployment, trim_deployment, |change| {
            if !is_alike_but_for_status(change.before, change.after) {
                self.wakes.add([change.key.clone()]);
            }
        });
    }

    /// Starts every watch; they run until `tasks` is dropped. `namespace`: the only one whose models are served.
    pub fn follow(
        self: &Arc<Self>,
        tasks: &mut JoinSet<()>,
        client: &Client,
        namespace: Option<&str>,
    ) {
        let ours = || {
            watcher::Config::default().labels(&format!(
                "{}=cachalot,{}",
                names::MANAGED_BY,
                names::MODEL_DEPLOYMENT
            ))
        };
        let all = watcher::Config::default;

        let world = Arc::clone(self);
        let changed = move |change: Change<'_, Wish>| world.wakes.add([change.key.clone()]);
        tasks.spawn(watch::follow(
            Arc::clone(&self.deployments),
            api(client, namespace),
            all(),
            trim_deployment,
            changed,
        ));

        let world = Arc::clone(self);
        let changed = move |change: Change<'_, ChildPod>| world.pod_changed(change);
        tasks.spawn(watch::follow(
            Arc::clone(&self.pods),
            api(client, namespace),
            ours(),
            child_pod,
            changed,
        ));

        let world = Arc::clone(self);
        let changed = move |change: Change<'_, Claim>| world.claim_changed(change);
        // A pod without a node, or one that ended, takes nothing.
        let mut config =
            all().fields("spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed");
        if namespace.is_none() {
            config = config.labels(&format!("{}!=cachalot", names::MANAGED_BY));
        }
        let served = namespace.map(str::to_string);
        let trim = move |pod: Pod| Ok(other_claim(&pod, served.as_deref()));
        tasks.spawn(watch::follow(
            Arc::clone(&self.others),
            Api::all(client.clone()),
            config,
            trim,
            changed,
        ));

        let world = Arc::clone(self);
        let changed = move |change: Change<'_, NodeView>| world.node_changed(change);
        let trim = |node: Node| Ok(Some(NodeView::of(&node)));
        tasks.spawn(watch::follow(
            Arc::clone(&self.nodes),
            Api::all(client.clone()),
            all(),
            trim,
            changed,
        ));

        let world = Arc::clone(self);
        let changed = move |change: Change<'_, ChildConfigMap>| {
            world.wake_owner(
                change.key,
                owner(change.before, |map| map.deployment.to_string()),
                owner(change.after, |map| map.deployment.to_string()),
            );
        };
        tasks.spawn(watch::follow(
            Arc::clone(&self.config_maps),
            api(client, namespace),
            ours(),
            child_config_map,
            changed,
        ));

        let world = Arc::clone(self);
        let changed = move |change: Change<'_, Packed<Service>>| {
            world.wake_if_deployment(change.key);
            world.wake_owner_of_ranks(change.key);
        };
        tasks.spawn(watch::follow(
            Arc::clone(&self.services),
            api(client, namespace),
            all(),
            trim_service,
            changed,
        ));

        let world = Arc::clone(self);
        let changed = move |change: Change<'_, Packed<PodDisruptionBudget>>| {
            world.wake_if_deployment(change.key)
        };
        tasks.spawn(watch::follow(
            Arc::clone(&self.budgets),
            api(client, namespace),
            all(),
            trim_budget,
            changed,
        ));

        let world = Arc::clone(self);
        // Kubernetes counts a pod that is gone only now: there may be room under the quota again.
        let changed = move |_: Change<'_, QuotaView>| world.wakes.room_appeared();
        let trim = |quota: ResourceQuota| Ok(QuotaView::of(&quota));
        tasks.spawn(watch::follow(
            Arc::clone(&self.quotas),
            api(client, namespace),
            all(),
            trim,
            changed,
        ));

        let world = Arc::clone(self);
        let changed = move |change: Change<'_, PriorityClassView>| world.class_changed(change);
        let trim = |class: PriorityClass| Ok(Some(PriorityClassView::of(&class)));
        tasks.spawn(watch::follow(
            Arc::clone(&self.classes),
            Api::all(client.clone()),
            all(),
            trim,
            changed,
        ));
    }

    /// Starts the watch of network policies; to be called before anyone plans.
    pub fn follow_policies(
        self: &Arc<Self>,
        tasks: &mut JoinSet<()>,
        client: &Client,
        namespace: Option<&str>,
    ) {
        self.policies_followed.store(true, Ordering::Relaxed);
        let world = Arc::clone(self);
        let changed = move |change: Change<'_, Packed<NetworkPolicy>>| {
            world.wake_owner_of_ranks(change.key);
        };
        tasks.spawn(watch::follow(
            Arc::clone(&self.policies),
            api(client, namespace),
            watcher::Config::default(),
            trim_policy,
            changed,
        ));
    }

    fn wake_owner_of_ranks(&self, key: &Key) {
        if let Some(owner) = names::owner_of_ranks(&key.name) {
            self.wake_if_deployment(&Key::new(Arc::clone(&key.namespace), owner));
        }
    }

    fn class_changed(&self, _: Change<'_, PriorityClassView>) {
        // What a replica may take changes only for those who wait for room.
        self.wakes.room_appeared();
    }

    fn pod_changed(&self, change: Change<'_, ChildPod>) {
        let Change { key, before, after } = change;
        let (was, is) = (before.and_then(known), after.and_then(known));
        let freed = was.is_some_and(|pod| pod.takes != 0) && is.is_none_or(|pod| pod.takes == 0);
        self.count_pod(key);
        let both = [was, is].into_iter().flatten();
        self.wakes.add(both.filter_map(|pod| pod.owner(key)));
        if freed {
            self.wakes.room_appeared();
        }
    }

    fn claim_changed(&self, change: Change<'_, Claim>) {
        let Change { key, before, after } = change;
        let claim = after.and_then(|entry| entry.as_ref().ok()).cloned();
        lock(&self.ledger).set(key, claim.map(Taker::Other));
        if before.is_some() {
            self.wakes.room_appeared();
        }
    }

    fn node_changed(&self, change: Change<'_, NodeView>) {
        let Change { key, before, .. } = change;
        self.count_node(&key.name);
        self.wakes.room_appeared();
        if before.is_some() {
            let on_it = self
                .pods
                .read()
                .iter()
                .filter_map(|(pod, entry)| {
                    let child = known(entry)?;
                    let is_there = child.node.as_deref() == Some(&*key.name);
                    is_there.then(|| child.owner(pod))?
                })
                .collect::<BTreeSet<_>>();
            self.wakes.add(on_it);
        }
    }

    fn wake_owner(&self, key: &Key, before: Option<String>, after: Option<String>) {
        self.wakes.add(
            [before, after]
                .into_iter()
                .flatten()
                .map(|name| Key::new(Arc::clone(&key.namespace), name)),
        );
    }

    fn wake_if_deployment(&self, key: &Key) {
        if self.deployments.read().contains_key(key) {
            self.wakes.add([key.clone()]);
        }
    }
}

/// Children of a ModelDeployment: all are named `<its name>-…`, so they lie together in the mirror.
fn children<V, T>(
    mirror: &Mirror<V>,
    owner: &Key,
    mut pick: impl FnMut(&Arc<str>, &Arc<V>) -> Option<T>,
) -> Vec<T> {
    let prefix = Key::new(Arc::clone(&owner.namespace), format!("{}-", owner.name));
    mirror
        .read()
        .range::<Key, _>((Bound::Included(&prefix), Bound::Unbounded))
        .take_while(|(key, _)| {
            key.namespace == prefix.namespace && key.name.starts_with(&*prefix.name)
        })
        .filter_map(|(key, entry)| pick(&key.name, entry.as_ref().ok()?))
        .collect()
}

pub(crate) fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// Whether an answer to a write tells of more than what was written: the pod ended, or began to end, meanwhile.
fn tells_more(change: &Change<'_, ChildPod>) -> bool {
    let view = |entry: Option<&Entry<ChildPod>>| entry.and_then(known)?.view();
    let Some(mut before) = view(change.before) else {
        return false;
    };
    let Some(after) = view(change.after) else {
        return false;
    };
    before.controller = after.controller;
    before.labels.clone_from(&after.labels);
    before.annotations.clone_from(&after.annotations);
    before != after
}

fn known(entry: &Entry<ChildPod>) -> Option<&ChildPod> {
    entry.as_ref().ok().map(AsRef::as_ref)
}

/// Whether two wishes differ in nothing that people may write; one that was not known is told of by its watch.
fn is_alike_but_for_status(before: Option<&Entry<Wish>>, after: Option<&Entry<Wish>>) -> bool {
    let plain = |entry: &Entry<Wish>| {
        let mut wish = entry.as_ref().ok()?.whole.unpack()?;
        wish.status = None;
        Packed::of(&wish).ok()
    };
    match (before, after) {
        (Some(before), Some(after)) => plain(before) == plain(after),
        _ => true,
    }
}

fn owner<V>(entry: Option<&Entry<V>>, name: impl Fn(&V) -> String) -> Option<String> {
    entry
        .and_then(|entry| entry.as_ref().ok())
        .map(|value| name(value))
}

fn ranks_key(key: &Key) -> Key {
    Key::new(Arc::clone(&key.namespace), names::ranks(&key.name))
}

fn unpacked<K>(mirror: &Mirror<Packed<K>>, key: &Key) -> Option<Arc<K>>
where
    K: Serialize + DeserializeOwned + 'static,
{
    let packed = mirror.get(key)?.ok()?;
    packed.unpack().map(Arc::new)
}

#[cfg(test)]
mod following;
#[cfg(test)]
mod tests;
