//! What each engine pod is doing, from what Kubernetes says about it and about its node.

use engine_spec::EndReport;
use jiff::Timestamp;

use super::group;
use crate::names;
use crate::snapshot::{PodPhase, PodView, Scheduled, Snapshot, Terminated};
use crate::time::seconds_between;

/// Seconds a node may be not ready before its replicas are replaced. Kubernetes has waited 40 s
/// by itself before it says so.
pub(super) const NODE_GRACE_SECONDS: u64 = 15;
/// Restarts in place after which a replica that does not answer counts as failing.
const RESTARTS_MAX: u32 = 2;

/// What an engine pod is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// The scheduler refuses it.
    Refused {
        /// Its words.
        message: String,
    },
    /// It holds a place that others have not left yet.
    Waiting,
    /// It exists and does not answer yet.
    Starting,
    /// It fails again and again in place.
    Failing {
        /// What it last said.
        message: String,
    },
    /// It answers.
    Ready,
    /// It finishes its requests and gets no new ones.
    Draining {
        /// Since when.
        since: Timestamp,
    },
    /// It is being deleted, something else controls it, or it lost a rank that it ran with and what is left of it is to go.
    Leaving,
    /// It ended for good.
    Failed {
        /// When.
        at: Timestamp,
        /// Why.
        message: String,
    },
    /// Its node does not answer.
    Lost {
        /// The node.
        node: String,
    },
}

/// A replica and what it is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica<'a> {
    /// Its pod. Of a group: the one that its state is about, else the first rank, which takes the
    /// requests.
    pub pod: &'a PodView,
    /// The other pods of its group that exist, by rank; none for a replica of one pod.
    pub mates: Vec<&'a PodView>,
    /// What it is doing.
    pub state: State,
}

impl<'a> Replica<'a> {
    /// A replica of one pod.
    pub fn alone(pod: &'a PodView, state: State) -> Self {
        Self {
            pod,
            mates: Vec::new(),
            state,
        }
    }

    /// All its pods that exist.
    pub fn pods(&self) -> impl Iterator<Item = &'a PodView> {
        std::iter::once(self.pod).chain(self.mates.iter().copied())
    }

    /// Ranks that have no pod.
    pub fn missing_ranks(&self) -> Vec<u32> {
        let is_missing = |rank: &u32| self.pods().all(|pod| pod.rank() != *rank);
        (0..self.pod.ranks()).filter(is_missing).collect()
    }
    /// Whether it counts towards the wanted number.
    pub fn is_live(&self) -> bool {
        matches!(
            self.state,
            State::Refused { .. }
                | State::Waiting
                | State::Starting
                | State::Failing { .. }
                | State::Ready
        )
    }

    /// Whether it answers and gets requests.
    pub fn is_ready(&self) -> bool {
        self.state == State::Ready
    }

    /// Its revision.
    pub fn revision(&self) -> &str {
        self.pod.label(names::REVISION)
    }

    /// Index of the replica it is.
    pub fn index(&self) -> Option<u32> {
        self.pod.label(names::REPLICA).parse().ok()
    }
}

/// All replicas of a deployment and what they are doing.
pub fn observe(snapshot: &Snapshot) -> Vec<Replica<'_>> {
    let pods = snapshot.pods.iter().map(AsRef::as_ref);
    let engines = pods
        .filter(|pod| pod.label(names::COMPONENT) == names::ENGINE)
        .map(|pod| (pod, state(pod, snapshot)));
    let mut replicas = group::join(engines);
    replicas.sort_by(|left, right| left.pod.name.cmp(&right.pod.name));
    replicas
}

/// What a pod is doing, its group aside.
pub fn state(pod: &PodView, snapshot: &Snapshot) -> State {
    if snapshot.is_foreign(pod) {
        return State::Leaving;
    }
    if pod.is_finished() {
        return State::Failed {
            at: ended_at(pod).unwrap_or(snapshot.now),
            message: ended_words(pod),
        };
    }
    if pod.deleting {
        return State::Leaving;
    }
    if let Some(node) = &pod.node
        && is_lost(node, pod, snapshot)
    {
        return State::Lost { node: node.clone() };
    }
    if pod.label(names::SERVING) == "false" {
        let since = pod.annotations.get(names::DRAIN_SINCE);
        let since = since.and_then(|text| text.parse().ok());
        return State::Draining {
            // Someone may have set the label by hand; such a pod must not drain for ever.
            since: since.or(pod.created).unwrap_or(snapshot.now),
        };
    }
    if pod.is_reserving() {
        return State::Waiting;
    }
    if pod.ready {
        return State::Ready;
    }
    if let Scheduled::Refused { message, .. } = &pod.scheduled {
        return State::Refused {
            message: message.clone(),
        };
    }
    failing_in_place(pod).map_or(State::Starting, |message| State::Failing { message })
}

fn is_lost(node: &str, pod: &PodView, snapshot: &Snapshot) -> bool {
    match snapshot.cluster.nodes.get(node) {
        Some(node) if node.ready => false,
        Some(node) => node
            .ready_changed
            .is_none_or(|since| seconds_between(since, snapshot.now) >= NODE_GRACE_SECONDS),
        // News of a new node may arrive after news of the pod on it.
        None => pod
            .created
            .is_none_or(|created| seconds_between(created, snapshot.now) >= NODE_GRACE_SECONDS),
    }
}

/// Words on a container that keeps failing, or cannot begin.
fn failing_in_place(pod: &PodView) -> Option<String> {
    let container = &pod.container;
    if let Some((reason, message)) = container.waiting.as_deref() {
        match reason.as_str() {
            "ImagePullBackOff"
            | "ErrImagePull"
            | "InvalidImageName"
            | "ErrImageNeverPull"
            | "CreateContainerConfigError"
            | "CreateContainerError"
            | "RunContainerError" => {
                return Some(format!("{reason}: {message}"));
            }
            _ => {}
        }
    }
    let ended = container.terminated.as_ref()?;
    (container.restarts >= RESTARTS_MAX).then(|| {
        format!(
            "restarted {} times: {}",
            container.restarts,
            terminated_words(ended)
        )
    })
}

fn terminated_words(ended: &Terminated) -> String {
    let report = EndReport::from_message(&ended.message);
    let message = report.as_ref().map_or(&*ended.message, |it| &it.message);
    let message = message.trim();
    let words = format!("{}, exit code {}", ended.reason, ended.exit_code);
    if message.is_empty() {
        words
    } else {
        format!("{words}: {message}")
    }
}

fn ended_at(pod: &PodView) -> Option<Timestamp> {
    let ended = pod.container.terminated.as_ref().and_then(|t| t.finished);
    ended.or(pod.ready_changed).or(pod.created)
}

fn ended_words(pod: &PodView) -> String {
    let mut parts = Vec::new();
    if !pod.reason.is_empty() {
        parts.push(pod.reason.clone());
    }
    if !pod.message.is_empty() {
        parts.push(pod.message.clone());
    }
    parts.extend(pod.container.terminated.as_deref().map(terminated_words));
    if parts.is_empty() {
        parts.push(if pod.phase == PodPhase::Succeeded {
            "ended".into()
        } else {
            "failed".into()
        });
    }
    parts.join(": ")
}
