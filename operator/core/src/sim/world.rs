//! The simulated cluster: a store of objects, a scheduler, kubelets, and a lagging view of it all.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine_spec::LoadReport;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{
    ConfigMap, ContainerState, ContainerStateTerminated, ContainerStatus, Node, NodeCondition, Pod,
    PodCondition, PodStatus, Service,
};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use operator_api::{ModelDeployment, ModelDeploymentStatus};

use super::{Broken, Faults, epoch};
use crate::names;
use crate::objects::preferred_nodes;
use crate::plan::{Action, Kind, Object};
use crate::resources::Resources;
use crate::snapshot::{
    Claim, Cluster, ConfigMapView, LoadSample, NodeView, PodSamples, PodView, Snapshot,
};

/// Happenings kept for the story of a broken rule.
const STORY_MAX: usize = 60;

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
}

/// What the operator sees.
#[derive(Clone, Debug, Default)]
struct View {
    pods: BTreeMap<String, Pod>,
    nodes: BTreeMap<String, Node>,
}

/// The simulated cluster.
#[derive(Clone, Debug)]
pub struct World {
    /// The time.
    pub now: Timestamp,
    seed: u64,
    chance: Seed,
    deployment: ModelDeployment,
    pods: BTreeMap<String, Pod>,
    config_maps: BTreeMap<String, ConfigMap>,
    service: Option<Service>,
    budget: Option<PodDisruptionBudget>,
    nodes: BTreeMap<String, Node>,
    /// When each bound pod becomes ready, or an inspection ends.
    ready_at: BTreeMap<String, Timestamp>,
    /// When each deleted pod is gone.
    gone_at: BTreeMap<String, Timestamp>,
    view: View,
    samples: BTreeMap<String, PodSamples>,
    report: String,
    uids: u64,
    story: Vec<String>,
}

impl World {
    /// A world with nothing but nodes and one wish. `report` is what an inspection finds.
    pub fn new(
        seed: u64,
        mut deployment: ModelDeployment,
        nodes: Vec<Node>,
        report: String,
    ) -> Self {
        deployment.metadata.generation = Some(1);
        let named = |node: Node| (node.metadata.name.clone().unwrap_or_default(), node);
        let mut world = Self {
            now: epoch(),
            seed,
            chance: Seed(seed),
            deployment,
            pods: BTreeMap::new(),
            config_maps: BTreeMap::new(),
            service: None,
            budget: None,
            nodes: nodes.into_iter().map(named).collect(),
            ready_at: BTreeMap::new(),
            gone_at: BTreeMap::new(),
            view: View::default(),
            samples: BTreeMap::new(),
            report,
            uids: 0,
            story: Vec::new(),
        };
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

    /// Views of the pods as they are.
    pub fn pod_views(&self) -> impl Iterator<Item = PodView> + '_ {
        self.pods.values().map(PodView::of)
    }

    fn see_everything(&mut self) {
        self.view = View {
            pods: self.pods.clone(),
            nodes: self.nodes.clone(),
        };
    }

    /// The operator's caches catch up, or do not.
    pub fn refresh(&mut self, faults: &Faults) {
        if self.chance(faults.restart) {
            self.tell("the operator starts anew".into());
            self.samples.clear();
            self.see_everything();
        } else if !self.chance(faults.stale_view) {
            self.see_everything();
        }
    }

    /// What the operator sees.
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot_of(&self.view)
    }

    /// What is.
    pub fn truth(&self) -> Snapshot {
        self.snapshot_of(&View {
            pods: self.pods.clone(),
            nodes: self.nodes.clone(),
        })
    }

    fn snapshot_of(&self, view: &View) -> Snapshot {
        let claims: Vec<Claim> = view.pods.values().filter_map(Claim::of).collect();
        let nodes = view.nodes.values().map(|node| Arc::new(NodeView::of(node)));
        Snapshot {
            now: self.now,
            deployment: Arc::new(self.deployment.clone()),
            pods: view
                .pods
                .values()
                .map(|pod| Arc::new(PodView::of(pod)))
                .collect(),
            config_maps: self
                .config_maps
                .values()
                .map(|map| Arc::new(ConfigMapView::of(map)))
                .collect(),
            model_config: None,
            service: self.service.clone().map(Arc::new),
            disruption_budget: self.budget.clone().map(Arc::new),
            cluster: Arc::new(Cluster::new(nodes, &claims)),
            samples: self.samples.clone(),
            demand: None,
        }
    }

    /// Stores the status, as its own writer would.
    pub fn store_status(&mut self, status: ModelDeploymentStatus) {
        self.deployment.status = Some(status);
    }

    /// Carries out one write; true when it changed anything. The operator sees its own writes at
    /// once, unless the answer is lost: then it learns of them like of anything else.
    pub fn write(&mut self, action: &Action, is_unheard: bool) -> bool {
        let before = is_unheard.then(|| self.view.clone());
        let changed = self.carry_out(action);
        if let Some(before) = before {
            self.view = before;
        }
        changed
    }

    fn carry_out(&mut self, action: &Action) -> bool {
        match action {
            Action::Create(Object::Pod(pod)) | Action::Apply(Object::Pod(pod)) => self.create(pod),
            Action::Create(object) | Action::Apply(object) => {
                match object.clone() {
                    Object::ConfigMap(mut map) => {
                        let name = map.metadata.name.clone().unwrap_or_default();
                        map.metadata.uid = Some(self.uid());
                        self.config_maps.insert(name, *map);
                    }
                    Object::Service(service) => self.service = Some(*service),
                    Object::PodDisruptionBudget(budget) => self.budget = Some(*budget),
                    Object::Pod(_) => {}
                }
                true
            }
            Action::PatchPod {
                name,
                uid,
                labels,
                annotations,
            } => {
                let patch = |pods: &mut BTreeMap<String, Pod>| {
                    let pod = pods
                        .get_mut(name)
                        .filter(|pod| pod.metadata.uid.as_ref() == Some(uid));
                    let Some(pod) = pod else { return false };
                    pod.metadata
                        .labels
                        .get_or_insert_default()
                        .extend(labels.clone());
                    let stored = pod.metadata.annotations.get_or_insert_default();
                    for (key, value) in annotations {
                        match value {
                            Some(value) => stored.insert(key.clone(), value.clone()),
                            None => stored.remove(key),
                        };
                    }
                    true
                };
                patch(&mut self.view.pods);
                patch(&mut self.pods)
            }
            Action::Delete {
                kind: Kind::Pod,
                name,
                uid,
            } => {
                let is_it = self
                    .pods
                    .get(name)
                    .is_some_and(|pod| pod.metadata.uid.as_ref() == Some(uid));
                is_it && self.delete_pod(name)
            }
            Action::Delete { name, .. } => self.config_maps.remove(name).is_some(),
        }
    }

    fn uid(&mut self) -> String {
        self.uids += 1;
        format!("uid-{}", self.uids)
    }

    fn create(&mut self, pod: &Pod) -> bool {
        let name = pod.metadata.name.clone().unwrap_or_default();
        if let Some(there) = self.pods.get(&name) {
            // A create that meets "already exists" reads what is there.
            self.view.pods.insert(name, there.clone());
            return false;
        }
        let mut pod = pod.clone();
        pod.metadata.uid = Some(self.uid());
        pod.metadata.creation_timestamp = Some(Time(self.now));
        pod.status = Some(PodStatus {
            phase: Some("Pending".into()),
            ..PodStatus::default()
        });
        self.view.pods.insert(name.clone(), pod.clone());
        self.pods.insert(name, pod);
        true
    }

    fn delete_pod(&mut self, name: &str) -> bool {
        let Some(pod) = self.pods.get_mut(name) else {
            return false;
        };
        if pod.metadata.deletion_timestamp.is_some() {
            return false;
        }
        let finished = pod
            .status
            .as_ref()
            .is_some_and(|s| matches!(s.phase.as_deref(), Some("Failed" | "Succeeded")));
        pod.metadata.deletion_timestamp = Some(Time(self.now));
        let seconds = if finished { 0 } else { self.chance.below(20) };
        let seen = pod.clone();
        self.gone_at
            .insert(name.to_owned(), later(self.now, seconds));
        self.view.pods.insert(name.to_owned(), seen);
        true
    }

    /// Lets time pass: pods are bound, start, and go.
    pub fn clock(&mut self, seconds: i64) {
        self.now = self
            .now
            .checked_add(SignedDuration::from_secs(seconds))
            .unwrap_or(self.now);
        let gone: Vec<String> = self
            .gone_at
            .iter()
            .filter(|(name, at)| **at <= self.now && !self.is_stuck(name))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.gone_at.remove(&name);
            self.ready_at.remove(&name);
            self.samples.remove(&name);
            self.pods.remove(&name);
        }
        let names: Vec<String> = self.pods.keys().cloned().collect();
        for name in names {
            self.bind(&name);
            self.live(&name);
        }
    }

    /// A pod on a silent node is not gone until the node is back.
    fn is_stuck(&self, pod: &str) -> bool {
        let node = self
            .pods
            .get(pod)
            .and_then(|pod| pod.spec.as_ref()?.node_name.as_ref());
        node.is_some_and(|node| !self.is_node_ready(node))
    }

    fn is_node_ready(&self, name: &str) -> bool {
        self.nodes
            .get(name)
            .is_some_and(|node| NodeView::of(node).ready)
    }

    fn bind(&mut self, name: &str) {
        let pod = &self.pods[name];
        let view = PodView::of(pod);
        if view.node.is_some() || view.deleting || view.is_finished() {
            return;
        }
        let asked = preferred_nodes(pod);
        let is_offered = |node: &String| asked.is_empty() || asked.contains(node);
        let bound: Vec<Claim> = self
            .pods
            .values()
            .filter(|pod| {
                pod.spec
                    .as_ref()
                    .is_some_and(|spec| spec.node_name.is_some())
            })
            .filter_map(Claim::of)
            .collect();
        let nodes = self.nodes.values().map(|node| Arc::new(NodeView::of(node)));
        let cluster = Cluster::new(nodes, &bound);
        let fits = |node: &NodeView| {
            let free = cluster.free(node);
            let Resources {
                cpu_millis,
                memory_bytes,
                gpus,
                pods,
            } = view.requests;
            node.ready
                && cpu_millis <= free.cpu_millis
                && memory_bytes <= free.memory_bytes
                && gpus <= free.gpus
                && pods <= free.pods
        };
        let chosen = cluster
            .nodes
            .values()
            .filter(|node| is_offered(&node.name) && fits(node))
            .min_by_key(|node| asked.iter().position(|name| *name == node.name))
            .map(|node| node.name.clone());
        let now = self.now;
        let delay = 3 + self.chance.below(40);
        let Some(pod) = self.pods.get_mut(name) else {
            return;
        };
        let status = pod.status.get_or_insert_default();
        match chosen {
            Some(node) => {
                pod.spec.get_or_insert_default().node_name = Some(node);
                set_condition(status, "PodScheduled", true, now, "");
                self.ready_at.insert(name.to_owned(), later(now, delay));
            }
            None => set_condition(status, "PodScheduled", false, now, "no node fits"),
        }
    }

    fn live(&mut self, name: &str) {
        let Some(ready_at) = self.ready_at.get(name).copied() else {
            return;
        };
        let view = PodView::of(&self.pods[name]);
        let node_ready = view
            .node
            .as_ref()
            .is_some_and(|node| self.is_node_ready(node));
        let (now, report) = (self.now, self.report.clone());
        let busy = self.chance.below(4);
        let Some(pod) = self.pods.get_mut(name) else {
            return;
        };
        let status = pod.status.get_or_insert_default();
        if view.is_finished() {
            return;
        }
        if !node_ready {
            set_condition(status, "Ready", false, now, "");
            return;
        }
        if now < ready_at || view.deleting {
            return;
        }
        if view.label(names::COMPONENT) == names::INSPECT {
            end(status, "Succeeded", "", 0, &report, now);
            return;
        }
        status.phase = Some("Running".into());
        set_condition(status, "Ready", true, now, "");
        // Requests come to pods that serve and run out in pods that drain.
        let running = if view.label(names::SERVING) == "true" {
            busy
        } else {
            busy / 3
        };
        let samples = self.samples.entry(name.to_owned()).or_default();
        let report = LoadReport {
            running: u32::try_from(running).unwrap_or(0),
            ..LoadReport::default()
        };
        samples.previous = samples.latest.replace(LoadSample { at: now, report });
    }

    /// Chance strikes.
    pub fn happen(&mut self, faults: &Faults) {
        if self.chance(faults.pod_deleted)
            && let Some(name) = self.any_pod()
        {
            self.tell(format!("someone deletes {name}"));
            let before = self.view.clone();
            self.delete_pod(&name);
            // Not a write of ours: the view learns of it later.
            self.view = before;
        }
        if self.chance(faults.pod_failed)
            && let Some(name) = self.any_pod()
        {
            self.tell(format!("{name} is evicted"));
            let now = self.now;
            if let Some(status) = self.pods.get_mut(&name).and_then(|pod| pod.status.as_mut()) {
                end(status, "Failed", "Evicted", 137, "", now);
            }
        }
        if self.chance(faults.node_silent) {
            let silent = self
                .nodes
                .keys()
                .filter(|node| !self.is_node_ready(node))
                .count();
            let pick = self
                .chance
                .below(u64::try_from(self.nodes.len()).unwrap_or(1));
            let name = self
                .nodes
                .keys()
                .nth(usize::try_from(pick).unwrap_or(0))
                .cloned();
            if let Some(name) = name {
                let ready = self.is_node_ready(&name);
                // Some nodes stay, or there is nothing to decide.
                if !ready || silent * 2 < self.nodes.len() {
                    self.set_node(&name, !ready);
                }
            }
        }
        if self.chance(faults.rescaled) {
            let replicas = i32::try_from(self.chance.below(5)).unwrap_or(1);
            self.tell(format!("the user asks for {replicas} replicas"));
            self.edit(|spec| spec.replicas = Some(replicas));
        }
        if self.chance(faults.revised) {
            let tokens = 64 + i32::try_from(self.chance.below(8)).unwrap_or(0) * 16;
            self.tell(format!("the user asks for a context of {tokens}"));
            self.edit(|spec| spec.context.max_tokens = Some(tokens));
        }
    }

    /// Changes the spec as a user would.
    pub fn edit(&mut self, change: impl FnOnce(&mut operator_api::ModelDeploymentSpec)) {
        change(&mut self.deployment.spec);
        let generation = self.deployment.metadata.generation.unwrap_or(0);
        self.deployment.metadata.generation = Some(generation + 1);
    }

    /// Every node answers again and every view is fresh.
    pub fn heal(&mut self) {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        for name in names {
            if !self.is_node_ready(&name) {
                self.set_node(&name, true);
            }
        }
        self.see_everything();
        self.tell("no more faults".into());
    }

    /// A node answers or falls silent.
    pub fn set_node(&mut self, name: &str, ready: bool) {
        self.tell(format!(
            "node {name} {}",
            if ready { "is back" } else { "falls silent" }
        ));
        let now = self.now;
        if let Some(node) = self.nodes.get_mut(name) {
            let status = node.status.get_or_insert_default();
            status.conditions = Some(vec![NodeCondition {
                type_: "Ready".into(),
                status: if ready { "True" } else { "Unknown" }.into(),
                last_transition_time: Some(Time(now)),
                ..NodeCondition::default()
            }]);
        }
    }

    fn any_pod(&mut self) -> Option<String> {
        let count = u64::try_from(self.pods.len())
            .ok()
            .filter(|count| *count > 0)?;
        let pick = usize::try_from(self.chance.below(count)).ok()?;
        let (name, pod) = self.pods.iter().nth(pick)?;
        let view = PodView::of(pod);
        (!view.deleting && !view.is_finished()).then(|| name.clone())
    }
}

fn later(now: Timestamp, seconds: u64) -> Timestamp {
    let seconds = i64::try_from(seconds).unwrap_or(0);
    now.checked_add(SignedDuration::from_secs(seconds))
        .unwrap_or(now)
}

fn set_condition(status: &mut PodStatus, kind: &str, holds: bool, now: Timestamp, message: &str) {
    let wanted = if holds { "True" } else { "False" };
    let conditions = status.conditions.get_or_insert_default();
    let since = conditions
        .iter()
        .find(|condition| condition.type_ == kind && condition.status == wanted)
        .and_then(|condition| condition.last_transition_time.clone());
    conditions.retain(|condition| condition.type_ != kind);
    conditions.push(PodCondition {
        type_: kind.to_owned(),
        status: wanted.to_owned(),
        message: Some(message.to_owned()),
        last_transition_time: Some(since.unwrap_or(Time(now))),
        ..PodCondition::default()
    });
}

fn end(
    status: &mut PodStatus,
    phase: &str,
    reason: &str,
    exit_code: i32,
    message: &str,
    now: Timestamp,
) {
    status.phase = Some(phase.to_owned());
    status.reason = Some(reason.to_owned());
    set_condition(status, "Ready", false, now, "");
    status.container_statuses = Some(vec![ContainerStatus {
        state: Some(ContainerState {
            terminated: Some(ContainerStateTerminated {
                exit_code,
                message: Some(message.to_owned()),
                finished_at: Some(Time(now)),
                ..ContainerStateTerminated::default()
            }),
            ..ContainerState::default()
        }),
        ..ContainerStatus::default()
    }]);
}
