//! What each engine pod is doing, and which to start, drain and remove.
//!
//! Level-based: the answer follows from what exists now and remembers nothing. Invariants: one
//! pod at most for each replica index; never more pods than wanted plus surge; answering replicas
//! are removed only while the promised number stays. A failed pod stays as a tombstone until its
//! successor may start, because its annotations carry the count of failures.

mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use operator_api::Binding;

use crate::fit::Layout;
use crate::names::{self, Revision};
use crate::objects::{self, Slot};
use crate::placement::{self, Offers, Room, WhyNot, Wish};
use crate::plan::{Action, Kind, Object, Settings};
use crate::snapshot::{PodSamples, PodView, Scheduled, Snapshot};
use crate::time::seconds_between;
use crate::validate::ValidDeployment;

use state::NODE_GRACE_SECONDS;
pub use state::{Replica, State, observe};

/// Seconds a pod may be refused by the scheduler before another place is looked for.
const REFUSED_SECONDS: u64 = 15;
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
    /// First choices of the pods that are created.
    pub nodes: Vec<String>,
    /// When to look again.
    pub wake_after: Option<Duration>,
}

impl Moves {
    fn wake(&mut self, seconds: u64) {
        let after = Duration::from_secs(seconds.max(1));
        self.wake_after = Some(self.wake_after.map_or(after, |before| before.min(after)));
    }

    fn remove(&mut self, pod: &PodView, why: &str) {
        self.remove_if(pod, why, None);
    }

    /// Removes a pod; with `if_silent`, only if that node is found silent once more.
    fn remove_if(&mut self, pod: &PodView, why: &str, if_silent: Option<String>) {
        self.actions.push(Action::Delete {
            kind: Kind::Pod,
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            if_silent,
        });
        self.removed.push((pod.name.clone(), why.to_owned()));
    }
}

/// Everything [`moves`] decides from.
#[derive(Clone, Copy, Debug)]
pub struct Given<'a> {
    /// The wish.
    pub valid: &'a ValidDeployment,
    /// How a replica is laid out.
    pub layout: &'a Layout,
    /// Its revision.
    pub revision: &'a Revision,
    /// Replicas wanted.
    pub wanted: u32,
    /// The operator's configuration.
    pub settings: &'a Settings,
    /// What was observed.
    pub snapshot: &'a Snapshot,
}

/// Decides what to do about replicas.
pub fn moves(given: Given<'_>, replicas: &[Replica<'_>]) -> Moves {
    let mut moves = Moves::default();
    let mut planner = Planner {
        given,
        replicas,
        room: Room::new(&given.snapshot.cluster),
        wish: wish(given, replicas),
        gone: BTreeSet::new(),
        gpus_granted: 0,
        offers: None,
        indices: replicas.iter().filter_map(Replica::index).collect(),
    };
    planner.tell_sick(&mut moves);
    planner.remove_lost(&mut moves);
    planner.finish_draining(&mut moves);
    planner.move_refused(&mut moves);
    planner.take_back(&mut moves);
    planner.start(&mut moves);
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
    let mut moves = Moves::default();
    for replica in replicas {
        if let Some(why) = drained(replica, snapshot, valid.drain_timeout_seconds, &mut moves) {
            moves.remove(replica.pod, why);
        } else if wanted == 0 && replica.is_ready() {
            moves.actions.push(drain(replica.pod, snapshot.now));
            moves.drained.push(replica.pod.name.clone());
            moves.wake(SETTLE_SECONDS);
        } else if wanted == 0 && replica.is_live() {
            moves.remove(replica.pod, "fewer replicas are wanted");
        }
    }
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

struct Planner<'a> {
    given: Given<'a>,
    replicas: &'a [Replica<'a>],
    room: Room<'a>,
    wish: Wish<'a>,
    /// Pods that this plan removes or takes back, by name.
    gone: BTreeSet<&'a str>,
    /// GPUs of the pods that this plan creates.
    gpus_granted: u64,
    /// Nodes for new replicas, once one is asked for.
    offers: Option<Offers>,
    /// Indices of all pods, whatever they are doing.
    indices: BTreeSet<u32>,
}

impl<'a> Planner<'a> {
    fn now(&self) -> Timestamp {
        self.given.snapshot.now
    }

    fn is_of_revision(&self, replica: &Replica<'_>) -> bool {
        replica.revision() == self.given.revision.as_str()
    }

    /// Whether a replica is as wanted: of the current revision, on GPUs that are not at fault. One
    /// that is not is replaced as in a rollout: within surge and what may be missing, and drained.
    fn is_current(&self, replica: &Replica<'_>) -> bool {
        self.is_of_revision(replica) && self.fault(replica).is_none()
    }

    /// What reports the GPUs under a replica at fault.
    fn fault(&self, replica: &Replica<'_>) -> Option<String> {
        let Given {
            snapshot,
            valid,
            layout,
            ..
        } = self.given;
        let node = snapshot.cluster.nodes.get(replica.pod.node.as_ref()?)?;
        placement::fault(node, layout.gpus(), &valid.placement)
    }

    fn tell_sick(&self, moves: &mut Moves) {
        moves.sick = self
            .live()
            .filter_map(|replica| {
                let fault = self.fault(replica)?;
                let node = replica.pod.node.as_deref().unwrap_or_default();
                let pod = &replica.pod.name;
                Some(format!(
                    "node {node} reports {fault}; pod {pod} is replaced"
                ))
            })
            .collect();
    }

    fn live(&self) -> impl Iterator<Item = &'a Replica<'a>> + '_ {
        self.replicas
            .iter()
            .filter(|replica| replica.is_live() && !self.gone.contains(replica.pod.name.as_str()))
    }

    fn count(&self, test: impl Fn(&Replica<'_>) -> bool) -> u32 {
        u32::try_from(self.live().filter(|replica| test(replica)).count()).unwrap_or(u32::MAX)
    }

    fn remove(&mut self, moves: &mut Moves, replica: &'a Replica<'a>, why: &str) {
        self.gone.insert(&replica.pod.name);
        moves.remove(replica.pod, why);
    }

    /// A replica on a silent node is given up: its pod is deleted, so that it does not serve when
    /// the node comes back, and another index takes its place. What is seen of the node may be old,
    /// so it is read once more right before.
    fn remove_lost(&mut self, moves: &mut Moves) {
        for replica in self.replicas {
            if let State::Lost { node } = &replica.state {
                self.gone.insert(&replica.pod.name);
                let why = format!("node {node} does not answer");
                moves.remove_if(replica.pod, &why, Some(node.clone()));
            }
        }
        // A node that has just gone silent is looked at again when its grace is over.
        let on_silent_node = |replica: &&Replica<'_>| {
            let node = replica.pod.node.as_ref();
            node.and_then(|node| self.given.snapshot.cluster.nodes.get(node))
                .is_some_and(|node| !node.ready)
        };
        if self.live().any(|replica| on_silent_node(&replica)) {
            moves.wake(NODE_GRACE_SECONDS);
        }
    }

    fn finish_draining(&mut self, moves: &mut Moves) {
        let timeout_seconds = self.given.valid.drain_timeout_seconds;
        for replica in self.replicas {
            if let Some(why) = drained(replica, self.given.snapshot, timeout_seconds, moves) {
                self.remove(moves, replica, why);
            }
        }
    }

    /// A pod that the scheduler refuses is given up when no node it was offered fits any more and
    /// another one does; otherwise it waits where it is.
    fn move_refused(&mut self, moves: &mut Moves) {
        for replica in self.replicas {
            let State::Refused { .. } = replica.state else {
                continue;
            };
            let Scheduled::Refused { since, .. } = &replica.pod.scheduled else {
                continue;
            };
            let since = since.or(replica.pod.created).unwrap_or(self.now());
            let waited = seconds_between(since, self.now());
            if waited < REFUSED_SECONDS {
                moves.wake(REFUSED_SECONDS - waited);
                continue;
            }
            let planned = replica.pod.planned_nodes();
            let room = match planned.first() {
                Some(node) => self.room.without(node, replica.pod.requests),
                None => self.room.clone(),
            };
            let wish = &self.wish;
            let fits = |name: &&str| {
                let node = self.given.snapshot.cluster.nodes.get(*name);
                node.is_some_and(|node| placement::why_not(node, wish, &room).is_none())
            };
            if planned.iter().any(fits) {
                continue;
            }
            match placement::offer(wish, &room) {
                Ok(_) => self.remove(
                    moves,
                    replica,
                    "the nodes it was planned for are taken; another one has room",
                ),
                Err(why_not) => {
                    moves.unplaced += 1;
                    moves.why_not = why_not;
                }
            }
        }
    }

    /// Replicas that drain are taken back when they are wanted again.
    fn take_back(&mut self, moves: &mut Moves) {
        let mut missing = self
            .given
            .wanted
            .saturating_sub(self.count(|replica| self.is_current(replica)));
        for replica in self.replicas {
            let is_draining = matches!(replica.state, State::Draining { .. });
            if missing == 0 {
                return;
            }
            let is_gone = self.gone.contains(replica.pod.name.as_str());
            if is_draining && !is_gone && replica.pod.ready && self.is_current(replica) {
                self.gone.insert(&replica.pod.name);
                moves.actions.push(serve_again(replica.pod));
                missing -= 1;
            }
        }
    }

    fn start(&mut self, moves: &mut Moves) {
        let taken_back = moves
            .actions
            .iter()
            .filter(|action| matches!(action, Action::PatchPod { .. }))
            .count();
        let taken_back = u32::try_from(taken_back).unwrap_or(u32::MAX);
        let current = self.count(|replica| self.is_current(replica)) + taken_back;
        let live = self.count(|_| true) + taken_back;
        let draining = self
            .replicas
            .iter()
            .filter(|replica| matches!(replica.state, State::Draining { .. }))
            .filter(|replica| !self.gone.contains(replica.pod.name.as_str()))
            .count();
        let draining = u32::try_from(draining).unwrap_or(u32::MAX);
        let is_rolling = self.replicas.iter().any(|replica| {
            !self.is_current(replica)
                && (replica.is_live() || matches!(replica.state, State::Draining { .. }))
        });
        let surge = if is_rolling {
            self.given.valid.surge_max
        } else {
            0
        };
        let allowed = self.given.wanted.saturating_add(surge);
        let missing = self.given.wanted.saturating_sub(current);
        let mut budget = missing.min(allowed.saturating_sub(live + draining));
        budget -= self.succeed(moves, budget);
        let indices = created_indices(moves);
        let mut next = 0;
        while budget > 0 {
            let replica = self.free_index(&indices, next);
            next = replica.saturating_add(1);
            let slot = Slot {
                replica,
                ..Slot::default()
            };
            if !self.create(moves, slot) {
                moves.unplaced += budget;
                break;
            }
            budget -= 1;
        }
    }

    /// Starts successors of failed pods whose pause is over; returns how many wanted replicas are
    /// spoken for, whether started or still waiting.
    fn succeed(&mut self, moves: &mut Moves, budget: u32) -> u32 {
        let mut spoken_for = 0;
        let mut taken: BTreeSet<u32> = self
            .replicas
            .iter()
            .filter(|replica| !matches!(replica.state, State::Failed { .. }))
            .filter_map(Replica::index)
            .collect();
        for replica in self.replicas {
            let State::Failed { at, message } = &replica.state else {
                continue;
            };
            if replica.pod.deleting {
                continue;
            }
            let is_succeeded = self.replicas.iter().any(|other| {
                other.index() == replica.index()
                    && other.pod.number(names::ATTEMPT) > replica.pod.number(names::ATTEMPT)
                    && other.revision() == replica.revision()
            });
            if is_succeeded || !self.is_of_revision(replica) || spoken_for >= budget {
                self.remove(moves, replica, message);
                continue;
            }
            spoken_for += 1;
            let failures = failures_after(replica.pod, *at);
            let pause = pause_seconds(failures);
            let waited = seconds_between(*at, self.now());
            if waited < pause {
                moves.wake(pause - waited);
                continue;
            }
            let slot = Slot {
                // Another pod has the index only if someone meddled; then a free one is used.
                replica: match replica.index() {
                    Some(index) if !taken.contains(&index) => index,
                    _ => self.free_index(&taken, 0),
                },
                attempt: replica.pod.number(names::ATTEMPT).saturating_add(1),
                failures,
                nodes: Vec::new(),
                refused: refused_before(replica.pod),
            };
            taken.insert(slot.replica);
            if self.create(moves, slot) {
                // Not before its successor exists: the count of failures must survive a restart.
                self.remove(moves, replica, message);
            } else {
                moves.unplaced += 1;
            }
        }
        spoken_for
    }

    /// The smallest index from `from` on that no pod has, whatever it is doing, and that is not
    /// `taken`.
    fn free_index(&self, taken: &BTreeSet<u32>, from: u32) -> u32 {
        (from..)
            .find(|index| !self.indices.contains(index) && !taken.contains(index))
            .unwrap_or(u32::MAX)
    }

    fn create(&mut self, moves: &mut Moves, mut slot: Slot) -> bool {
        if let Some(words) = self.over_quota() {
            moves.over_quota = Some(words);
            return false;
        }
        let (wish, room) = (&self.wish, &self.room);
        let offers = self.offers.get_or_insert_with(|| Offers::new(wish, room));
        match offers.best(&slot.refused) {
            Ok(nodes) => slot.nodes = nodes,
            Err(why_not) => {
                moves.why_not = why_not;
                return false;
            }
        }
        if self.given.valid.placement.binding == Binding::Direct {
            slot.nodes.truncate(1);
        }
        self.gpus_granted += u64::from(self.given.layout.gpus());
        if let Some(node) = slot.nodes.first() {
            self.take(node);
            moves.nodes.push(node.clone());
        }
        let Given {
            valid,
            layout,
            revision,
            settings,
            ..
        } = self.given;
        let pod = objects::engine_pod(valid, layout, settings, revision, &slot);
        moves
            .created
            .push(pod.metadata.name.clone().unwrap_or_default());
        moves
            .actions
            .push(Action::Create(Object::Pod(Box::new(pod))));
        true
    }

    /// A replica that is created takes a node.
    fn take(&mut self, name: &str) {
        let Some(node) = self.given.snapshot.cluster.nodes.get(name) else {
            return;
        };
        let before = placement::rank(node, &self.wish, &self.room);
        self.room.take(name, self.wish.requests);
        *self.wish.own.entry(name.to_owned()).or_insert(0) += 1;
        if let Some(offers) = &mut self.offers {
            offers.take(name, &before, &self.wish, &self.room);
        }
    }

    /// The quota of the namespace under which no further replica can be made, in words.
    fn over_quota(&self) -> Option<String> {
        let needs = u64::from(self.given.layout.gpus());
        let quota = self.given.snapshot.quotas.iter().find(|quota| {
            let used = quota.gpus_used.saturating_add(self.gpus_granted);
            needs > 0 && used.saturating_add(needs) > quota.gpus_max
        })?;
        Some(format!(
            "ResourceQuota {} allows {} GPUs in namespace {} and {} are asked for already; a replica needs {needs}. Raise requests.{}, or ask for fewer replicas",
            quota.name,
            quota.gpus_max,
            self.given.valid.namespace,
            quota.gpus_used.saturating_add(self.gpus_granted),
            crate::resources::NVIDIA_GPU,
        ))
    }

    /// Removes replicas of other revisions and those beyond the wanted number.
    fn retire(&mut self, moves: &mut Moves) {
        let wanted = self.given.wanted;
        let promised = wanted.saturating_sub(self.given.valid.unavailable_max);
        let serving = self.count(|replica| replica.is_ready());
        let mut spare = serving.saturating_sub(promised);
        let current = self.count(|replica| self.is_current(replica));
        let mut excess = current.saturating_sub(wanted);
        let mut leaving: Vec<&'a Replica<'a>> = self.live().collect();
        leaving.sort_by_cached_key(|replica| self.retirement_order(replica));
        for replica in leaving {
            let is_current = self.is_current(replica);
            if is_current && excess == 0 {
                continue;
            }
            let why = if is_current {
                "fewer replicas are wanted"
            } else if self.is_of_revision(replica) {
                "the GPUs of its node are at fault"
            } else {
                "its revision is replaced"
            };
            if replica.is_ready() {
                if spare == 0 {
                    continue;
                }
                spare -= 1;
                self.gone.insert(&replica.pod.name);
                moves.actions.push(drain(replica.pod, self.now()));
                moves.drained.push(replica.pod.name.clone());
                moves.wake(SETTLE_SECONDS);
            } else {
                self.remove(moves, replica, why);
            }
            if is_current {
                excess -= 1;
            }
        }
    }

    /// Who goes first: those that do not answer, then the emptiest, then the highest index.
    fn retirement_order(&self, replica: &Replica<'_>) -> (u8, u64, std::cmp::Reverse<u32>) {
        let rank = match replica.state {
            State::Refused { .. } => 0,
            State::Failing { .. } => 1,
            State::Starting => 2,
            _ => 3,
        };
        let samples = self.given.snapshot.samples.get(&replica.pod.name);
        let busy = samples
            .and_then(|samples| samples.latest.as_ref())
            .map_or(0, |sample| {
                u64::from(sample.report.running) + u64::from(sample.report.waiting)
            });
        (
            rank,
            busy,
            std::cmp::Reverse(replica.index().unwrap_or(u32::MAX)),
        )
    }
}

/// What a replica needs, and where this deployment's replicas are and failed.
fn wish<'a>(given: Given<'a>, replicas: &[Replica<'_>]) -> Wish<'a> {
    let mut own = BTreeMap::new();
    let mut avoid = Vec::new();
    for replica in replicas {
        let planned = || {
            let nodes = replica.pod.planned_nodes();
            nodes.first().map(|node| (*node).to_owned())
        };
        let Some(node) = replica.pod.node.clone().or_else(planned) else {
            continue;
        };
        match replica.state {
            State::Failed { .. } | State::Lost { .. } | State::Failing { .. } => avoid.push(node),
            _ => *own.entry(node).or_insert(0) += 1,
        }
    }
    Wish {
        layout: given.layout,
        requests: objects::engine_requests(given.valid, given.layout),
        placement: &given.valid.placement,
        own,
        avoid,
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
fn failures_after(pod: &PodView, at: Timestamp) -> u32 {
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
