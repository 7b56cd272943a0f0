//! What happens by itself as time passes: a toy scheduler, toy kubelets, and Kubernetes' collector
//! of pods whose node is gone.

use std::sync::Arc;

use engine_spec::LoadReport;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodCondition, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::world::{Key, World};
use crate::names;
use crate::objects::preferred_nodes;
use crate::placement::tolerates;
use crate::resources::Resources;
use crate::snapshot::{Cluster, LoadSample, NodeView, Scheduled, TaintEffect};

/// Seconds after which a pod whose node is gone is collected.
const COLLECT_SECONDS: u64 = 40;
/// Requests that a busy replica may have, less one.
const REQUESTS_MAX: u64 = 4;

/// Restarts in place that are told of.
const RESTARTS_TOLD: i32 = 6;

/// How long things take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Seconds from bound to ready, at least.
    pub start_seconds_min: u64,
    /// Seconds from bound to ready, at most.
    pub start_seconds_max: u64,
    /// Seconds a deleted pod takes to go, at most.
    pub delete_seconds_max: u64,
    /// Times longer that a slow kubelet takes.
    pub slow_factor: u64,
    /// Chance in a thousand that a kubelet is slow about a pod.
    pub slow_kubelet: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            start_seconds_min: 3,
            start_seconds_max: 43,
            delete_seconds_max: 20,
            slow_factor: 8,
            slow_kubelet: 0,
        }
    }
}

impl World {
    /// Lets time pass: pods are bound, start, and go.
    pub fn clock(&mut self, seconds: u64) {
        self.now = later(self.now, seconds);
        let joined: Vec<_> = {
            let now = self.now;
            let (ready, waiting) = std::mem::take(&mut self.joining)
                .into_iter()
                .partition(|(at, _)| *at <= now);
            self.joining = waiting;
            ready
        };
        for (_, node) in joined {
            let name = node.metadata.name.clone().unwrap_or_default();
            self.tell(format!("node {name} joins"));
            self.put_node(node);
        }
        self.collect();
        self.sweep();
        self.land();
        let keys: Vec<Key> = self.pods.keys().cloned().collect();
        let mut bound: Option<Cluster> = None;
        for key in &keys {
            let Some(pod) = self.pods.get(key) else {
                continue;
            };
            let is_ours = !pod.view.label(names::MODEL_DEPLOYMENT).is_empty();
            if !is_ours || pod.view.is_finished() {
                continue;
            }
            if pod.view.node.is_none() {
                if !pod.view.deleting && !is_gated(&pod.pod) {
                    let cluster = bound.get_or_insert_with(|| self.bound());
                    let cluster = cluster.clone();
                    if self.bind(key, &cluster) {
                        bound = None;
                    }
                }
            } else if pod.ready_at.is_none() {
                self.admit(key);
            } else {
                self.live(key);
            }
        }
    }

    /// The next time at which something happens by itself; none when nothing will.
    pub fn next_event(&self) -> Option<Timestamp> {
        let soon = later(self.now, 1);
        let pods = self.pods.values().flat_map(|pod| {
            let starting = pod.ready_at.filter(|at| *at > self.now && !pod.view.ready);
            let is_new = pod.ready_at.is_none()
                && !is_gated(&pod.pod)
                && pod.view.scheduled == Scheduled::NotYet
                && !pod.view.is_finished();
            [starting, pod.gone_at, is_new.then_some(soon)]
        });
        let looks = self.wishes.values().map(|wish| wish.due);
        let joins = self.joining.iter().map(|(at, _)| Some(*at));
        let lands = self.late.iter().map(|(at, ..)| Some(*at));
        let collects = self.uncollected.iter().map(|(at, ..)| Some(*at));
        let all = pods.chain(looks).chain(joins).chain(lands);
        all.chain(collects).flatten().min()
    }

    /// Deleted pods whose time has come are gone, unless their node is silent. Those of nodes that
    /// are gone are collected.
    fn sweep(&mut self) {
        let now = self.now;
        let mut gone = Vec::new();
        let mut orphaned = Vec::new();
        for (key, pod) in &self.pods {
            let node = pod.view.node.as_ref();
            let exists = node.is_none_or(|node| self.nodes.contains_key(node));
            let answers = node.is_none_or(|node| self.is_node_ready(node));
            match pod.gone_at {
                Some(at) if at <= now && (answers || !exists) => gone.push(key.clone()),
                None if !exists => orphaned.push(key.clone()),
                _ => {}
            }
        }
        for key in gone {
            self.pods.remove(&key);
            for wish in self.wishes.values_mut() {
                wish.samples.remove(&key.1);
            }
        }
        for key in orphaned {
            if let Some(pod) = self.pods.get_mut(&key) {
                pod.gone_at = Some(later(now, COLLECT_SECONDS));
            }
        }
    }

    /// The scheduling gates of a pod go; false when it has none.
    pub(super) fn release(&mut self, key: &Key) -> bool {
        let was_gated = self.pods.get(key).is_some_and(|pod| is_gated(&pod.pod));
        self.change_pod(key, |pod| {
            pod.spec.get_or_insert_default().scheduling_gates = None;
            let annotations = pod.metadata.annotations.get_or_insert_default();
            annotations.remove(names::PREEMPTS);
        });
        was_gated
    }

    /// The scheduler's turn with a pod; true when it found a node.
    fn bind(&mut self, key: &Key, cluster: &Cluster) -> bool {
        let stored = &self.pods[key];
        let asked = preferred_nodes(&stored.pod);
        let spec = stored.pod.spec.clone().unwrap_or_default();
        let fits = |node: &&Arc<NodeView>| {
            let is_offered = asked.is_empty() || asked.contains(&node.name);
            let selected = spec.node_selector.iter().flatten();
            let is_selected = selected
                .into_iter()
                .all(|(key, value)| node.labels.get(key) == Some(value.as_str()));
            let is_open = node.taints.iter().all(|taint| {
                taint.effect == TaintEffect::PreferNoSchedule
                    || spec
                        .tolerations
                        .iter()
                        .flatten()
                        .any(|t| tolerates(t, taint))
            });
            is_offered
                && is_selected
                && is_open
                && node.ready
                && !node.unschedulable
                && stored.view.requests.fit_in(&cluster.free(node))
        };
        let chosen = cluster
            .nodes
            .values()
            .filter(fits)
            .min_by_key(|node| asked.iter().position(|name| *name == node.name))
            .map(|node| node.name.clone());
        let now = self.now;
        let found = chosen.is_some();
        let words = chosen.clone().unwrap_or_default();
        self.change_pod(key, |pod| {
            pod.spec.get_or_insert_default().node_name = chosen;
            let status = pod.status.get_or_insert_default();
            let message = if found { "" } else { "no node fits" };
            set_condition(status, "PodScheduled", found, now, message);
        });
        if found {
            self.tell(format!("{} is bound to {words}", key.1));
            self.starts(key);
        }
        found
    }

    /// A kubelet takes in a pod that came with its node, or refuses it for good.
    fn admit(&mut self, key: &Key) {
        let view = Arc::clone(&self.pods[key].view);
        let node = view.node.clone().unwrap_or_default();
        if view.deleting || !self.is_node_ready(&node) {
            return;
        }
        let others = self.pods.iter().filter(|(other, pod)| {
            *other != key && pod.ready_at.is_some() && pod.view.node.as_ref() == Some(&node)
        });
        let taken = others
            .filter_map(|(_, pod)| pod.claim.as_ref())
            .fold(Resources::default(), |sum, claim| sum + claim.requests);
        let free = self.nodes[&node].view.allocatable.minus(taken);
        if view.requests.fit_in(&free) {
            self.starts(key);
            return;
        }
        let reason = if view.requests.gpus > free.gpus {
            "OutOfnvidia.com/gpu"
        } else {
            "OutOfcpu"
        };
        self.tell(format!("{node} refuses {}: {reason}", key.1));
        let now = self.now;
        self.change_pod(key, |pod| {
            let status = pod.status.get_or_insert_default();
            status.phase = Some("Failed".into());
            status.reason = Some(reason.into());
            status.message = Some("the kubelet has no room for it".into());
            set_condition(status, "Ready", false, now, "");
        });
    }

    fn starts(&mut self, key: &Key) {
        let Pace {
            start_seconds_min: least,
            start_seconds_max: most,
            ..
        } = self.pace;
        let mut seconds = least + self.chance.below(most.saturating_sub(least));
        if self.chance(self.pace.slow_kubelet) {
            self.tell(format!("the kubelet is slow about {}", key.1));
            seconds *= self.pace.slow_factor;
        }
        let at = later(self.now, seconds);
        if let Some(stored) = self.pods.get_mut(key) {
            stored.ready_at = Some(at);
        }
    }

    fn live(&mut self, key: &Key) {
        let stored = &self.pods[key];
        let view = Arc::clone(&stored.view);
        let is_due = stored.ready_at.is_some_and(|at| at <= self.now);
        let now = self.now;
        if !view
            .node
            .as_ref()
            .is_some_and(|node| self.is_node_ready(node))
        {
            if view.ready {
                self.change_pod(key, |pod| {
                    let status = pod.status.get_or_insert_default();
                    set_condition(status, "Ready", false, now, "");
                });
            }
            return;
        }
        if view.ranks() > 1 && !self.is_whole(key) {
            self.lose_rank(key);
            return;
        }
        if !is_due || view.deleting {
            return;
        }
        if view.label(names::COMPONENT) == names::INSPECT {
            let report = self.report().to_owned();
            self.change_pod(key, |pod| {
                let status = pod.status.get_or_insert_default();
                end(status, "Succeeded", "", 0, &report, now);
            });
            return;
        }
        if self.is_bad(view.label(names::REVISION)) {
            self.crash(key);
            return;
        }
        if !view.ready {
            self.tell(format!("{} is ready", key.1));
            self.change_pod(key, |pod| {
                let status = pod.status.get_or_insert_default();
                status.phase = Some("Running".into());
                set_condition(status, "Ready", true, now, "");
            });
        }
        self.sample(key, view.label(names::SERVING) == "true");
    }

    /// Whether every rank of a pod's group has a running pod on a node that answers.
    fn is_whole(&self, key: &Key) -> bool {
        let view = &self.pods[key].view;
        let running = self.pods.iter().filter(|((space, _), pod)| {
            let (mate, node) = (&pod.view, pod.view.node.as_ref());
            *space == key.0
                && mate.label(names::MODEL_DEPLOYMENT) == view.label(names::MODEL_DEPLOYMENT)
                && mate.group() == view.group()
                && !mate.is_finished()
                && pod.ready_at.is_some()
                && node.is_some_and(|node| self.is_node_ready(node))
        });
        u32::try_from(running.count()).is_ok_and(|count| count == view.ranks())
    }

    /// A rank waits for the others; one that ran with them ends and is started again in place.
    fn lose_rank(&mut self, key: &Key) {
        let stored = &self.pods[key];
        if !stored.view.ready {
            return;
        }
        let restarts = stored.view.container.restarts;
        let now = self.now;
        self.tell(format!("{} lost a rank", key.1));
        self.change_pod(key, |pod| {
            let status = pod.status.get_or_insert_default();
            set_condition(status, "Ready", false, now, "");
            let restarts = i32::try_from(restarts).unwrap_or(0).saturating_add(1);
            status.container_statuses = Some(vec![crashed(restarts, "", now)]);
        });
    }

    /// The container of a pod that has begun ends and is started again in place; with a message, that end is told of.
    pub(super) fn restart_pod(&mut self, key: &Key, message: Option<&str>) {
        let stored = &self.pods[key];
        let view = Arc::clone(&stored.view);
        if stored.ready_at.is_none() || view.is_finished() {
            return;
        }
        let now = self.now;
        self.change_pod(key, |pod| {
            let status = pod.status.get_or_insert_default();
            set_condition(status, "Ready", false, now, "");
            let restarts = i32::try_from(view.container.restarts).unwrap_or(0);
            // More would only take time.
            let restarts = restarts.saturating_add(1).min(RESTARTS_TOLD);
            if let Some(message) = message {
                status.container_statuses = Some(vec![crashed(restarts, message, now)]);
            }
        });
        self.starts(key);
    }

    /// A pod of a bad revision ends, or is started again in place; which of them is in its name.
    fn crash(&mut self, key: &Key) {
        if key.1.bytes().map(u32::from).sum::<u32>() % 2 == 0 {
            self.tell(format!("{} crashes for good", key.1));
            self.end_pod(key, "");
            return;
        }
        let (now, pause) = (self.now, self.pace.start_seconds_max);
        self.change_pod(key, |pod| {
            let status = pod.status.get_or_insert_default();
            let containers = status.container_statuses.get_or_insert_default();
            let restarts = containers.first().map_or(0, |one| one.restart_count);
            // More would only take time.
            if restarts < RESTARTS_TOLD {
                *containers = vec![crashed(restarts + 1, "", now)];
            }
        });
        if let Some(stored) = self.pods.get_mut(key) {
            stored.ready_at = Some(later(now, pause));
        }
    }

    /// Requests come to replicas that serve and run out in those that drain.
    fn sample(&mut self, key: &Key, is_serving: bool) {
        let mut report = LoadReport::default();
        if self.is_busy {
            let busy = self.chance.below(REQUESTS_MAX);
            let running = if is_serving { busy } else { busy / 3 };
            report.running = u32::try_from(running).unwrap_or(0);
            let waiting = if is_serving {
                self.chance.below(REQUESTS_MAX)
            } else {
                0
            };
            report.waiting = u32::try_from(waiting).unwrap_or(0);
        }
        let owner = self.pods[key]
            .view
            .label(names::MODEL_DEPLOYMENT)
            .to_owned();
        let at = self.now;
        if let Some(wish) = self.wishes.get_mut(&(key.0.clone(), owner)) {
            let samples = wish.samples.entry(key.1.clone()).or_default();
            samples.take_load(LoadSample { at, report });
        }
    }

    /// A pod ends for good.
    pub(super) fn end_pod(&mut self, key: &Key, reason: &str) {
        let now = self.now;
        self.change_pod(key, |pod| {
            let status = pod.status.get_or_insert_default();
            end(status, "Failed", reason, 137, "", now);
        });
    }
}

fn is_gated(pod: &Pod) -> bool {
    let gates = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.scheduling_gates.as_ref());
    gates.is_some_and(|gates| !gates.is_empty())
}

pub(super) fn later(now: Timestamp, seconds: u64) -> Timestamp {
    let seconds = i64::try_from(seconds).unwrap_or(0);
    now.checked_add(SignedDuration::from_secs(seconds))
        .unwrap_or(now)
}

fn crashed(restart_count: i32, message: &str, now: Timestamp) -> ContainerStatus {
    ContainerStatus {
        restart_count,
        last_state: Some(ContainerState {
            terminated: Some(ContainerStateTerminated {
                exit_code: 1,
                reason: Some("Error".into()),
                message: Some(message.to_owned()),
                finished_at: Some(Time(now)),
                ..ContainerStateTerminated::default()
            }),
            ..ContainerState::default()
        }),
        ..ContainerStatus::default()
    }
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
