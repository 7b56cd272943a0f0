//! What each engine pod is doing, and which to start, drain and remove.
//!
//! Level-based: the answer follows from what exists now and remembers nothing. Invariants: one
//! pod at most for each replica index; never more pods than wanted plus surge; answering replicas
//! are removed only while the promised number stays. A failed pod stays as a tombstone until its
//! successor may start, because its annotations carry the count of failures.

mod group;
mod planner;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;

use crate::fit::Layout;
use crate::names::{self, Revision};
use crate::objects;
use crate::placement::{WhyNot, Wish};
use crate::plan::{Action, Kind, Object, Settings};
use crate::snapshot::{PodSamples, PodView, Snapshot};
use crate::time::seconds_between;
use crate::validate::ValidDeployment;

pub(crate) use group::GroupKey;
use planner::Planner;
pub use state::{Replica, State, observe, state};

/// Seconds a pod may be refused by the scheduler before another place is looked for.
const REFUSED_SECONDS: u64 = 15;
/// Seconds after which a group gives back what it holds because the scheduler refuses one of its pods
/// for a reason that the planner does not see.
const PARTLY_SECONDS: u64 = 300;
/// First pause before a failed replica is started again; doubles up to the longest.
const BACKOFF_SECONDS: u64 = 5;
/// The longest pause.
const BACKOFF_SECONDS_MAX: u64 = 300;
/// A replica that answered for so long starts counting its failures anew.
const HEALTHY_SECONDS: u64 = 600;
/// Nodes that refused a replica and are remembered.
const REFUSED_NODES_MAX: usize = 8;
/// Seconds after which endpoints have forgotten a draining replica and its load can be believed.
const SETTLE_SECONDS: u64 = 5;

/// What is to be done about replicas.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moves {
    /// Writes, in order.
    pub actions: Vec<Action>,
    /// Names of pods that are created.
    pub created: Vec<String>,
    /// Names of pods that begin to drain.
    pub drained: Vec<String>,
    /// Names of pods that are removed, with why.
    pub removed: Vec<(String, String)>,
    /// Replicas that are wanted and have no place, with why not for each node.
    pub unplaced: u32,
    /// Why not.
    pub why_not: Vec<WhyNot>,
    /// The quota that allows no further GPUs, in words.
    pub over_quota: Option<String>,
    /// Replicas on nodes whose GPUs are at fault, in words.
    pub sick: Vec<String>,
    /// Replicas that move off nodes that are being emptied, in words.
    pub evacuated: Vec<String>,
    /// Replicas that cannot, in words.
    pub stuck: Vec<String>,
    /// First choices of the pods that are created.
    pub nodes: Vec<String>,
    /// Replicas that wait until others have left their place, in words.
    pub waiting: Vec<String>,
    /// Replicas that give way to others of higher priority, in words.
    pub preempted: Vec<String>,
    /// Replicas that failed as often as their restart budget allows, in words.
    pub exhausted: Vec<String>,
    /// When to look again.
    pub wake_after: Option<Duration>,
}

impl Moves {
    pub(crate) fn wake(&mut self, seconds: u64) {
        let after = Duration::from_secs(seconds.max(1));
        self.wake_after = Some(self.wake_after.map_or(after, |before| before.min(after)));
    }

    fn remove(&mut self, pod: &PodView, why: &str) {
        self.remove_if(pod, why, None);
    }

    /// Removes all pods of a replica that are not leaving yet, the one that takes requests first.
    fn remove_all(&mut self, replica: &Replica<'_>, why: &str) {
        let mut pods: Vec<&PodView> = replica.pods().filter(|pod| !pod.deleting).collect();
        pods.sort_by_key(|pod| pod.rank());
        for pod in pods {
            self.remove(pod, why);
        }
    }

    /// Removes a pod; with `if_silent`, only if that node is found silent once more.
    fn remove_if(&mut self, pod: &PodView, why: &str, if_silent: Option<String>) {
        // One that would get its place now, or wait for more to leave, does not need it any more.
        let is_of_it = |action: &Action| match action {
            Action::Release { name, .. } | Action::PatchPod { name, .. } => *name == pod.name,
            _ => false,
        };
        self.actions.retain(|action| !is_of_it(action));
        self.actions.push(Action::Delete {
            kind: Kind::Pod,
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            if_silent,
        });
        self.removed.push((pod.name.clone(), why.to_owned()));
    }
}

/// A revision and how many replicas are to run it.
#[derive(Clone, Debug, PartialEq)]
pub struct Side {
    /// The wish that it came from.
    pub valid: ValidDeployment,
    /// How a replica is laid out.
    pub layout: Layout,
    /// The revision.
    pub revision: Revision,
    /// The operator's configuration that it was made with.
    pub settings: Settings,
    /// Replicas that are to run it.
    pub wanted: u32,
    /// Nodes that hold its weights.
    pub holders: Vec<String>,
}

/// Everything [`moves`] decides from.
#[derive(Clone, Copy, Debug)]
pub struct Given<'a> {
    /// The wish as it is now.
    pub valid: &'a ValidDeployment,
    /// What replicas are to run; never empty, the first is what most are moving to.
    pub sides: &'a [Side],
    /// Replicas wanted: the sum over sides.
    pub wanted: u32,
    /// Whether a rollout is under way, so that surge may be used.
    pub is_rolling: bool,
    /// What was observed.
    pub snapshot: &'a Snapshot,
}

/// Decides what to do about replicas.
pub fn moves(given: Given<'_>, replicas: &[Replica<'_>]) -> Moves {
    let mut moves = Moves::default();
    let mut planner = Planner::new(given, replicas);
    planner.tell_sick(&mut moves);
    planner.remove_lost(&mut moves);
    planner.tear(&mut moves);
    planner.finish_draining(&mut moves);
    planner.move_refused(&mut moves);
    planner.settle_waiting(&mut moves);
    planner.evacuate(&mut moves);
    planner.take_back(&mut moves);
    planner.complete(&mut moves);
    planner.start(&mut moves);
    planner.give_way(&mut moves);
    planner.retire(&mut moves);
    moves
}

/// Decides what to do about replicas while there is no plan for new ones: those that drain still
/// leave, and a deployment that wants none still stops.
pub fn moves_without_plan(
    valid: &ValidDeployment,
    wanted: u32,
    snapshot: &Snapshot,
    replicas: &[Replica<'_>],
) -> Moves {
    let mut moves = moves_of_preempted(valid.rollout.drain_timeout_seconds, snapshot, replicas);
    for replica in replicas {
        if snapshot.contest.claimant_of(replica.pods()).is_some() {
            continue;
        }
        if let Some(why) = drained(
            replica,
            snapshot,
            valid.rollout.drain_timeout_seconds,
            &mut moves,
        ) {
            moves.remove_all(replica, why);
        } else if wanted == 0 && replica.is_ready() {
            moves.actions.push(drain(replica.pod, snapshot.now));
            moves.drained.push(replica.pod.name.clone());
            moves.wake(SETTLE_SECONDS);
        } else if wanted == 0 && replica.is_live() {
            moves.remove_all(replica, "fewer replicas are wanted");
        } else {
            for pod in planner::torn(replica, snapshot) {
                moves.remove(pod, planner::TORN);
            }
        }
    }
    moves
}

/// Replicas whose place another one takes leave, whatever else may be decided.
pub fn moves_of_preempted(
    drain_timeout_seconds: u32,
    snapshot: &Snapshot,
    replicas: &[Replica<'_>],
) -> Moves {
    let mut moves = Moves::default();
    let is_claimed =
        |replica: &&Replica<'_>| snapshot.contest.claimant_of(replica.pods()).is_some();
    for replica in replicas.iter().filter(is_claimed) {
        if let Some(why) = drained(replica, snapshot, drain_timeout_seconds, &mut moves) {
            moves.remove_all(replica, why);
        }
    }
    planner::give_way(snapshot, replicas.iter(), &mut moves);
    moves
}

/// Why a draining replica may go; none while it has to wait, or does not drain.
fn drained(
    replica: &Replica<'_>,
    snapshot: &Snapshot,
    timeout_seconds: u32,
    moves: &mut Moves,
) -> Option<&'static str> {
    let State::Draining { since } = replica.state else {
        return None;
    };
    let waited = seconds_between(since, snapshot.now);
    if !replica.pod.ready {
        return Some("it does not answer any more");
    }
    if waited >= u64::from(timeout_seconds) {
        return Some("its drain timeout is over");
    }
    if waited >= SETTLE_SECONDS && is_idle(snapshot.samples.get(&replica.pod.name), since) {
        return Some("it has finished its requests");
    }
    moves.wake(SETTLE_SECONDS.saturating_sub(waited));
    None
}

/// What a replica needs, and where this deployment's replicas are and failed.
fn wish<'a>(side: &'a Side, replicas: &[Replica<'_>]) -> Wish<'a> {
    let mut own = BTreeMap::new();
    let mut avoid = Vec::new();
    for replica in replicas {
        let is_bad = matches!(
            replica.state,
            State::Failed { .. } | State::Lost { .. } | State::Failing { .. }
        );
        // Of a group the first pod is the one that its state is about.
        for (index, pod) in replica.pods().enumerate() {
            let Some(node) = pod.place().map(str::to_owned) else {
                continue;
            };
            if is_bad && index == 0 {
                avoid.push(node);
            } else {
                *own.entry(node).or_insert(0) += 1;
            }
        }
    }
    Wish {
        layout: &side.layout,
        requests: objects::engine_requests(&side.valid, &side.layout),
        placement: &side.valid.placement,
        own,
        avoid,
        holders: side.holders.iter().map(String::as_str).collect(),
    }
}

/// Nodes that refused a pod or those before it in its place, the latest last.
fn refused_before(pod: &PodView) -> Vec<String> {
    let mut nodes: Vec<String> = pod.refused_nodes().into_iter().map(str::to_owned).collect();
    if pod.is_refused_by_kubelet()
        && let Some(node) = &pod.node
    {
        nodes.retain(|known| known != node);
        nodes.push(node.clone());
    }
    let more = nodes.len().saturating_sub(REFUSED_NODES_MAX);
    nodes.split_off(more)
}

/// Indices of the pods that a plan creates.
fn created_indices(moves: &Moves) -> BTreeSet<u32> {
    let pods = moves.actions.iter().filter_map(|action| match action {
        Action::Create(Object::Pod(pod)) => pod.metadata.labels.as_ref(),
        _ => None,
    });
    pods.filter_map(|labels| labels.get(names::REPLICA)?.parse().ok())
        .collect()
}

/// Whether a sample taken after endpoints had time to forget the pod shows no request.
fn is_idle(samples: Option<&PodSamples>, draining_since: Timestamp) -> bool {
    samples
        .and_then(|samples| samples.latest.as_ref())
        .is_some_and(|sample| {
            let settled = seconds_between(draining_since, sample.at) >= SETTLE_SECONDS - 1;
            settled && sample.report.running == 0 && sample.report.waiting == 0
        })
}

/// Failures in a row, this one included; one that came after a long healthy time is the first.
pub fn failures_of(pod: &PodView, at: Timestamp) -> u32 {
    let healthy = pod
        .created
        .map_or(0, |created| seconds_between(created, at));
    let before = if healthy >= HEALTHY_SECONDS {
        0
    } else {
        pod.number(names::FAILURES)
    };
    before.saturating_add(1)
}

/// Pause before the successor of a pod starts: 5, 10, 20 … 300 seconds.
pub fn pause_seconds(failures: u32) -> u64 {
    let doublings = failures.saturating_sub(1).min(16);
    (BACKOFF_SECONDS << doublings).min(BACKOFF_SECONDS_MAX)
}

fn drain(pod: &PodView, now: Timestamp) -> Action {
    Action::PatchPod {
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        labels: BTreeMap::from([(names::SERVING.to_owned(), "false".to_owned())]),
        annotations: BTreeMap::from([(names::DRAIN_SINCE.to_owned(), Some(now.to_string()))]),
    }
}

fn serve_again(pod: &PodView) -> Action {
    Action::PatchPod {
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        labels: BTreeMap::from([(names::SERVING.to_owned(), "true".to_owned())]),
        annotations: BTreeMap::from([(names::DRAIN_SINCE.to_owned(), None)]),
    }
}
