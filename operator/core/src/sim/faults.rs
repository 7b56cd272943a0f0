//! Chance: what goes wrong, and what users and nodes do meanwhile.

use std::sync::Arc;

use engine_spec::{EndReport, GpuFault};
use k8s_openapi::api::core::v1::NodeCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::nature::later;
use super::view::Unseen;
use super::world::{Key, World};
use crate::names;
use crate::ownership::Controller;

/// Seconds that a silent API server stays silent, at most.
const SILENT_SECONDS_MAX: u64 = 60;
/// Seconds after which a create that got no answer takes effect, at most: API servers give up after a minute.
pub(super) const LATE_SECONDS_MAX: u64 = 60;
/// Seconds after which the garbage collector comes for the pods of a ModelDeployment that is gone, at most.
const COLLECT_SECONDS_MAX: u64 = 30;
/// Seconds after which a node like one that left joins.
const JOIN_SECONDS: u64 = 90;

/// How much goes wrong; each is a chance in a thousand, for each step of the clock or each write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// A write fails before it takes effect (409, 429, 5xx, no connection), and the rest of the
    /// plan is not carried out.
    pub lost_write: u64,
    /// A write takes effect but its answer is lost.
    pub lost_answer: u64,
    /// A create gets no answer and takes effect later.
    pub late_create: u64,
    /// The operator is killed right after a write took effect.
    pub killed: u64,
    /// The API server answers nobody for a while.
    pub silent_api: u64,
    /// The view is not refreshed in this step.
    pub stale_view: u64,
    /// The view of one kind, pods, nodes or quotas, is not refreshed when those of others are.
    pub torn_view: u64,
    /// The view is not refreshed for several steps: 410 Gone, and a relist that takes its time.
    pub relist: u64,
    /// Watch events come twice: who had news is told again.
    pub told_twice: u64,
    /// The operator starts anew and forgets everything.
    pub restart: u64,
    /// Someone deletes a pod.
    pub pod_deleted: u64,
    /// A pod ends for good.
    pub pod_failed: u64,
    /// A kubelet takes eight times as long to start a pod.
    pub slow_kubelet: u64,
    /// A node falls silent, or comes back.
    pub node_silent: u64,
    /// A node leaves for good; another like it joins later.
    pub node_gone: u64,
    /// A node's GPUs are reported at fault, or repaired.
    pub node_sick: u64,
    /// An engine ends because its GPU is at fault, and says so; it is started again in place.
    pub gpu_reported: u64,
    /// A node is booted anew.
    pub node_booted: u64,
    /// A node is cordoned, or opened again.
    pub node_cordoned: u64,
    /// Someone removes a Service, a budget or a config map of ours.
    pub meddled: u64,
    /// The user changes the number of replicas.
    pub rescaled: u64,
    /// The user changes something that forces new pods.
    pub revised: u64,
    /// Of the revisions that users make, so many per mille never answer: their pods crash.
    pub bad_revision: u64,
    /// The user deletes a ModelDeployment, and creates it again.
    pub recreated: u64,
    /// The same, but the user has its children stay (`--cascade=orphan`).
    pub orphaned: u64,
}

impl Faults {
    /// Everything goes wrong now and then.
    pub fn all() -> Self {
        Self {
            lost_write: 50,
            lost_answer: 50,
            late_create: 20,
            killed: 30,
            silent_api: 5,
            stale_view: 300,
            torn_view: 100,
            relist: 20,
            told_twice: 50,
            restart: 10,
            pod_deleted: 10,
            pod_failed: 20,
            slow_kubelet: 50,
            node_silent: 10,
            node_gone: 3,
            node_sick: 5,
            gpu_reported: 15,
            node_booted: 5,
            node_cordoned: 5,
            meddled: 10,
            rescaled: 10,
            revised: 5,
            bad_revision: 250,
            recreated: 2,
            orphaned: 2,
        }
    }
}

impl World {
    /// Chance strikes.
    pub fn happen(&mut self, faults: &Faults) {
        self.pace.slow_kubelet = faults.slow_kubelet;
        self.bad_revision = faults.bad_revision;
        if self.chance(faults.silent_api) && self.silent_until.is_none() {
            let seconds = 3 + self.chance.below(SILENT_SECONDS_MAX);
            self.tell(format!("the API server is silent for {seconds} s"));
            self.silent_until = Some(later(self.now, seconds));
        }
        self.trouble_pods(faults);
        self.trouble_nodes(faults);
        self.trouble_wishes(faults);
    }

    /// Whether the API server answers.
    pub fn answers(&self) -> bool {
        self.silent_until.is_none_or(|until| until <= self.now)
    }

    /// The operator's caches catch up, or do not.
    pub fn refresh(&mut self, faults: &Faults) {
        if !self.answers() {
            return;
        }
        self.silent_until = None;
        if self.chance(faults.restart) {
            self.restart();
        } else if self.chance(faults.relist) {
            let steps = 2 + self.chance.below(8);
            self.tell(format!("410 Gone: nothing is seen for {steps} steps"));
            self.blind_steps = steps;
        } else if self.blind_steps > 0 {
            self.blind_steps -= 1;
        } else if !self.chance(faults.stale_view) {
            let unseen = Unseen {
                pods: self.chance(faults.torn_view),
                nodes: self.chance(faults.torn_view),
                quotas: self.chance(faults.torn_view),
            };
            self.see(unseen);
        }
        if self.chance(faults.told_twice) {
            for wish in self.wishes.values_mut() {
                wish.is_woken = true;
            }
        }
    }

    fn trouble_pods(&mut self, faults: &Faults) {
        if self.chance(faults.pod_deleted)
            && let Some(key) = self.any_pod()
        {
            self.tell(format!("someone deletes {}", key.1));
            self.lose(&key);
            self.delete_pod(&key, self.pace.delete_seconds_max);
            // Nobody can know then whether a create of that name is still under way: left out.
            self.late.retain(|(_, pod, _)| *pod != key);
        }
        if self.chance(faults.pod_failed)
            && let Some(key) = self.any_pod()
        {
            self.tell(format!("{} is evicted", key.1));
            self.lose(&key);
            self.end_pod(&key, "Evicted");
        }
        if self.chance(faults.gpu_reported)
            && let Some(key) = self.any_pod()
        {
            self.report_gpu(&key);
        }
    }

    fn trouble_nodes(&mut self, faults: &Faults) {
        if self.chance(faults.node_silent)
            && let Some(name) = self.any_node()
        {
            let silent = self.nodes.values().filter(|node| !node.view.ready).count();
            let ready = self.is_node_ready(&name);
            // Some nodes stay, or there is nothing to decide.
            if !ready || (silent + 1) * 2 <= self.nodes.len() {
                self.set_node(&name, !ready);
            }
        }
        if self.chance(faults.node_gone)
            && self.nodes.len() > 1
            && let Some(name) = self.any_node()
        {
            self.tell(format!("node {name} leaves for good"));
            self.lose_node(&name);
            if let Some(stored) = self.nodes.remove(&name) {
                let mut next = stored.node;
                self.joined += 1;
                next.metadata.name = Some(format!("{name}-{}", self.joined));
                self.joining.push((later(self.now, JOIN_SECONDS), next));
            }
        }
        if self.chance(faults.node_sick)
            && let Some(name) = self.any_node()
        {
            let is_sick = !self.nodes[&name].view.faults.is_empty();
            self.set_sick(&name, !is_sick);
        }
        if self.chance(faults.node_booted)
            && let Some(name) = self.any_node()
        {
            self.boot(&name);
        }
        if self.chance(faults.node_cordoned)
            && let Some(name) = self.any_node()
        {
            let is_open = !self.nodes[&name].view.unschedulable;
            self.tell(format!("node {name} cordoned: {is_open}"));
            self.set_cordoned(&name, is_open);
        }
    }

    fn trouble_wishes(&mut self, faults: &Faults) {
        let keys = self.keys();
        let Some(key) = self.chance.of(&keys).cloned() else {
            return;
        };
        if self.chance(faults.meddled) {
            self.meddle(&key);
        }
        if self.chance(faults.rescaled) {
            let replicas = i32::try_from(self.chance.below(5)).unwrap_or(1);
            self.tell(format!(
                "the user asks for {replicas} replicas of {}",
                key.1
            ));
            self.edit(&key, |spec| match &mut spec.autoscaling {
                None => spec.replicas = Some(replicas),
                Some(range) => {
                    range.min_replicas = replicas.max(1);
                    range.max_replicas = range.max_replicas.max(range.min_replicas);
                }
            });
        }
        if self.chance(faults.revised) {
            let tokens = 64 + i32::try_from(self.chance.below(8)).unwrap_or(0) * 16;
            self.tell(format!("the user asks {} for a context of {tokens}", key.1));
            self.edit(&key, |spec| spec.context.max_tokens = Some(tokens));
        }
        if self.chance(faults.recreated)
            && let Some(wish) = self.wishes.get(&key)
        {
            let mut again = (*wish.deployment).clone();
            self.tell(format!("the user deletes {} and creates it again", key.1));
            again.metadata.uid = None;
            again.metadata.generation = None;
            again.status = None;
            let seconds = self.chance.below(COLLECT_SECONDS_MAX);
            self.remove_wish_slowly(&key, seconds);
            self.put_wish(again);
        }
        if self.chance(faults.orphaned) {
            self.tell(format!(
                "the user deletes {} but not its children, and creates it again",
                key.1
            ));
            self.orphan(&key);
        }
    }

    /// The user deletes a ModelDeployment with `--cascade=orphan` and creates it again: its children are there, and
    /// nothing controls them.
    fn orphan(&mut self, key: &Key) {
        let uid = self.uid();
        let before = self
            .wishes
            .get(key)
            .and_then(|wish| wish.deployment.metadata.uid.clone());
        let controller = Controller::with_uid(&before.unwrap_or_default());
        for pod in self.pods_of(key) {
            if self.pods[&pod].view.controller == controller {
                self.change_pod(&pod, |pod| pod.metadata.owner_references = None);
            }
        }
        let is_own = |(space, _): &Key, owner: &str| *space == key.0 && owner == key.1;
        for (name, (owner, map)) in &mut self.config_maps {
            if is_own(name, owner) {
                Arc::make_mut(map).controller = Controller::default();
            }
        }
        for (name, (owner, template)) in &mut self.claim_templates {
            if is_own(name, owner) {
                Arc::make_mut(template).controller = Controller::default();
            }
        }
        let Some(wish) = self.wishes.get_mut(key) else {
            return;
        };
        let mut again = (*wish.deployment).clone();
        again.metadata.uid = Some(uid);
        again.metadata.generation = Some(1);
        again.status = None;
        let services = [&mut wish.service, &mut wish.ranks_service];
        for service in services.into_iter().flatten() {
            Arc::make_mut(service).metadata.owner_references = None;
        }
        if let Some(policy) = &mut wish.ranks_policy {
            Arc::make_mut(policy).metadata.owner_references = None;
        }
        if let Some(budget) = &mut wish.budget {
            Arc::make_mut(budget).metadata.owner_references = None;
        }
        wish.deployment = Arc::new(again);
        wish.is_woken = true;
    }

    fn meddle(&mut self, key: &Key) {
        let pick = self.chance.below(4);
        let maps: Vec<Key> = self
            .config_maps
            .iter()
            .filter(|((space, _), (owner, _))| *space == key.0 && *owner == key.1)
            .map(|(key, _)| key.clone())
            .collect();
        let map = self.chance.of(&maps).cloned();
        let Some(wish) = self.wishes.get_mut(key) else {
            return;
        };
        wish.is_woken = true;
        match (pick, map) {
            (0, _) => wish.service = None,
            (1, _) => wish.budget = None,
            (2, _) => (wish.ranks_service, wish.ranks_policy) = (None, None),
            (_, Some(map)) => {
                self.config_maps.remove(&map);
            }
            (_, None) => return,
        }
        self.tell(format!("someone removes a child of {}", key.1));
    }

    /// Every node answers again, is open and healthy, and every view is fresh.
    pub fn heal(&mut self) {
        self.tell("no more faults".into());
        self.silent_until = None;
        self.blind_steps = 0;
        self.pace.slow_kubelet = 0;
        self.is_busy = false;
        for name in self.nodes.keys().cloned().collect::<Vec<_>>() {
            let view = &self.nodes[&name].view;
            let (ready, sick, closed) = (view.ready, !view.faults.is_empty(), view.unschedulable);
            if !ready {
                self.set_node(&name, true);
            }
            if sick {
                self.set_sick(&name, false);
            }
            if closed {
                self.set_cordoned(&name, false);
            }
            if self.remembers(&name) {
                self.boot(&name);
            }
        }
        for (at, _) in &mut self.joining {
            *at = self.now;
        }
        self.see_everything();
    }

    /// A node answers or falls silent.
    pub fn set_node(&mut self, name: &str, ready: bool) -> bool {
        let word = if ready { "is back" } else { "falls silent" };
        self.tell(format!("node {name} {word}"));
        if !ready {
            self.lose_node(name);
        }
        let status = if ready { "True" } else { "Unknown" };
        self.set_node_condition(name, "Ready", Some(status))
    }

    /// A node's GPUs are reported at fault, or repaired.
    pub fn set_sick(&mut self, name: &str, is_sick: bool) -> bool {
        let word = if is_sick { "at fault" } else { "healthy" };
        self.tell(format!("the GPUs of node {name} are {word}"));
        self.set_node_condition(name, "GpuMemWatch", is_sick.then_some("True"))
    }

    /// A node is booted anew, with all that runs there.
    fn boot(&mut self, name: &str) {
        self.tell(format!("node {name} is booted"));
        self.lose_node(name);
        let boot_id = self.uid();
        self.change_node(name, |node| {
            let status = node.status.get_or_insert_default();
            status.node_info.get_or_insert_default().boot_id = boot_id;
        });
        // A container that was waiting then to be started again shows the end before that one.
        let message = self.chance(500).then_some("");
        for key in self.pods_on(name) {
            self.restart_pod(&key, message);
        }
    }

    /// Whether a GPU of a node is remembered as at fault.
    fn remembers(&self, node: &str) -> bool {
        let statuses = self.wishes.values();
        let mut statuses = statuses.filter_map(|wish| wish.deployment.status.as_ref());
        statuses.any(|status| status.gpu_faults.iter().any(|fault| fault.node == node))
    }

    /// A node takes no new pods, or does again.
    pub fn set_cordoned(&mut self, name: &str, is_cordoned: bool) -> bool {
        self.change_node(name, |node| {
            node.spec.get_or_insert_default().unschedulable = is_cordoned.then_some(true);
        })
    }

    fn set_node_condition(&mut self, name: &str, kind: &str, status: Option<&str>) -> bool {
        let now = self.now;
        self.change_node(name, |node| {
            let conditions = node
                .status
                .get_or_insert_default()
                .conditions
                .get_or_insert_default();
            conditions.retain(|condition| condition.type_ != kind);
            if let Some(status) = status {
                conditions.push(NodeCondition {
                    type_: kind.into(),
                    status: status.into(),
                    last_transition_time: Some(Time(now)),
                    ..NodeCondition::default()
                });
            }
        })
    }

    /// Remembers that a replica stopped answering through no doing of the operator.
    fn lose(&mut self, key: &Key) {
        if self.pods.get(key).is_some_and(|pod| pod.view.ready) {
            self.lost.insert(key.clone());
        }
    }

    fn lose_node(&mut self, node: &str) {
        for key in self.pods_on(node) {
            self.lose(&key);
        }
    }

    fn pods_on(&self, node: &str) -> Vec<Key> {
        let on_it = |pod: &super::world::StoredPod| pod.view.node.as_deref() == Some(node);
        let pods = self.pods.iter().filter(|(_, pod)| on_it(pod));
        pods.map(|(key, _)| key.clone()).collect()
    }

    /// The engine of a pod ends because a GPU of its node is at fault.
    fn report_gpu(&mut self, key: &Key) {
        let view = &self.pods[key].view;
        let (Some(node), true) = (view.node.clone(), view.requests.devices() > 0) else {
            return;
        };
        let gpu = self.chance.below(8);
        let fault = GpuFault {
            uuid: format!("GPU-{node}-{gpu}"),
            error: "CUDA_ERROR_ECC_UNCORRECTABLE (214)".into(),
        };
        self.tell(format!("the engine of {} reports {}", key.1, fault.uuid));
        let report = EndReport {
            gpu_fault: Some(fault),
            message: "the device failed".into(),
        };
        self.lose(key);
        self.restart_pod(key, Some(&report.to_message()));
    }

    fn any_node(&mut self) -> Option<String> {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        self.chance.of(&names).cloned()
    }

    fn any_pod(&mut self) -> Option<Key> {
        let keys: Vec<Key> = self
            .pods
            .iter()
            .filter(|(_, pod)| !pod.view.label(names::MODEL_DEPLOYMENT).is_empty())
            .map(|(key, _)| key.clone())
            .collect();
        let key = self.chance.of(&keys)?;
        let view = &self.pods[key].view;
        (!view.deleting && !view.is_finished()).then(|| key.clone())
    }
}
