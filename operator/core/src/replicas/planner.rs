//! The moves of one plan, made in order: what is lost goes, what drains leaves, what is missing starts,
//! what is too many retires. Each takes what those before it gave and gave away into account.

mod evacuation;
mod gang;
mod preempting;
mod retiring;

pub(super) use preempting::give_way;

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use operator_api::Binding;

use super::state::NODE_GRACE_SECONDS;
use super::{
    Given, Moves, REFUSED_SECONDS, Replica, Side, State, created_indices, drained, failures_of,
    pause_seconds, refused_before, serve_again, wish,
};
use crate::gpu_faults;
use crate::names;
use crate::objects::{self, Slot};
use crate::placement::{self, Offers, Room, Wish};
use crate::plan::{Action, Object};
use crate::resources::NVIDIA_GPU;
use crate::snapshot::{PodView, Scheduled};
use crate::time::seconds_between;

pub(super) use gang::{TORN, torn};

pub(super) struct Planner<'a> {
    given: Given<'a>,
    replicas: &'a [Replica<'a>],
    room: Room<'a>,
    /// What a replica of each side needs.
    wishes: Vec<Wish<'a>>,
    /// Pods that this plan removes or takes back, by name.
    gone: BTreeSet<&'a str>,
    /// Pods that this plan creates on nodes that are not spot.
    on_demand: u32,
    /// Accelerators of the pods that this plan creates, by resource.
    granted: BTreeMap<String, u64>,
    /// Nodes for new replicas of each side, once one is asked for.
    offers: Vec<Option<Offers>>,
    /// Draining replicas of each side that this plan takes back.
    taken_back: Vec<u32>,
    /// Indices of all pods, whatever they are doing.
    indices: BTreeSet<u32>,
    /// Uids of pods that give way to replicas that are not to be disturbed.
    spoken_for: BTreeSet<String>,
    /// Replicas that move off nodes that are being emptied, by the name of their pod.
    evacuated: BTreeSet<&'a str>,
}

impl<'a> Planner<'a> {
    pub(super) fn new(given: Given<'a>, replicas: &'a [Replica<'a>]) -> Self {
        Self {
            given,
            replicas,
            room: Room::new(&given.snapshot.cluster),
            wishes: given
                .sides
                .iter()
                .map(|side| wish(side, replicas))
                .collect(),
            gone: BTreeSet::new(),
            on_demand: 0,
            granted: BTreeMap::new(),
            offers: vec![None; given.sides.len()],
            taken_back: vec![0; given.sides.len()],
            indices: replicas.iter().filter_map(Replica::index).collect(),
            spoken_for: preempting::spoken_for(
                &given.snapshot.contest,
                Self::priority(&given.sides[0], &given.snapshot.contest),
                replicas,
            ),
            evacuated: BTreeSet::new(),
        }
    }

    fn now(&self) -> Timestamp {
        self.given.snapshot.now
    }

    /// The side whose revision a replica runs.
    fn side(&self, replica: &Replica<'_>) -> Option<usize> {
        let mut sides = self.given.sides.iter();
        sides.position(|side| replica.revision() == side.revision.as_str())
    }

    /// Whether a replica is as wanted: of the revision of a side, on GPUs that are not at fault, and not on its way to another
    /// node. One that is not is replaced as in a rollout: within surge and what may be missing, and drained.
    fn is_current(&self, replica: &Replica<'_>) -> bool {
        self.side(replica).is_some() && self.may_stay(replica)
    }

    /// Whether a replica is as wanted on one side.
    fn is_current_on(&self, side: usize, replica: &Replica<'_>) -> bool {
        self.side(replica) == Some(side) && self.may_stay(replica)
    }

    fn may_stay(&self, replica: &Replica<'_>) -> bool {
        !self.evacuated.contains(replica.pod.name.as_str()) && self.fault(replica).is_none()
    }

    /// What reports the GPUs under a replica at fault, in words: its node, or its engine.
    fn fault(&self, replica: &Replica<'_>) -> Option<String> {
        let node = replica.pod.node.as_deref().unwrap_or_default();
        if let Some(fault) = self.fault_of_node(replica) {
            return Some(format!("node {node} reports {fault}"));
        }
        let fault = gpu_faults::of_replica(replica, self.given.snapshot)?;
        Some(format!(
            "the engine of {} reported {} of node {}: {}",
            fault.pod, fault.uuid, fault.node, fault.error
        ))
    }

    fn fault_of_node(&self, replica: &Replica<'_>) -> Option<String> {
        let Given {
            snapshot, sides, ..
        } = self.given;
        let side = &sides[self.side(replica).unwrap_or(0)];
        replica.pods().find_map(|pod| {
            let node = snapshot.cluster.nodes.get(pod.node.as_ref()?)?;
            placement::fault(node, side.layout.gpus(), &side.valid.placement)
        })
    }

    pub(super) fn tell_sick(&self, moves: &mut Moves) {
        moves.sick = self
            .live()
            .filter_map(|replica| {
                let fault = self.fault(replica)?;
                Some(format!("{fault}; pod {} is replaced", replica.pod.name))
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
        if replica.mates.is_empty() {
            moves.remove(replica.pod, why);
        } else {
            moves.remove_all(replica, why);
        }
    }

    /// A replica on a silent node is given up: its pod is deleted, so that it does not serve when
    /// the node comes back, and another index takes its place. What is seen of the node may be old,
    /// so it is read once more right before.
    pub(super) fn remove_lost(&mut self, moves: &mut Moves) {
        for replica in self.replicas {
            if let State::Lost { node } = &replica.state {
                self.gone.insert(&replica.pod.name);
                let why = format!("node {node} does not answer");
                moves.remove_if(replica.pod, &why, Some(node.clone()));
                for mate in replica.mates.iter().filter(|mate| !mate.deleting) {
                    moves.remove(mate, &why);
                }
            }
        }
        // A node that has just gone silent, or is not known yet, is looked at again when its grace is over.
        let on_silent_node = |replica: &&Replica<'_>| {
            let mut nodes = replica.pods().filter_map(|pod| pod.node.as_ref());
            nodes.any(|node| {
                let node = self.given.snapshot.cluster.nodes.get(node);
                node.is_none_or(|node| !node.ready)
            })
        };
        if self.live().any(|replica| on_silent_node(&replica)) {
            moves.wake(NODE_GRACE_SECONDS);
        }
    }

    pub(super) fn finish_draining(&mut self, moves: &mut Moves) {
        let timeout_seconds = self.given.valid.rollout.drain_timeout_seconds;
        for replica in self.replicas {
            if let Some(why) = drained(replica, self.given.snapshot, timeout_seconds, moves) {
                self.remove(moves, replica, why);
            }
        }
    }

    /// A pod that the scheduler refuses is given up when no node it was offered fits any more and
    /// another one does; otherwise it waits where it is.
    pub(super) fn move_refused(&mut self, moves: &mut Moves) {
        for replica in self.replicas {
            let State::Refused { .. } = replica.state else {
                continue;
            };
            if replica.pod.ranks() > 1 {
                self.give_back_refused(moves, replica);
                continue;
            }
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
            let wish = &self.wishes[self.side(replica).unwrap_or(0)];
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
    pub(super) fn take_back(&mut self, moves: &mut Moves) {
        for (index, side) in self.given.sides.iter().enumerate() {
            let present = self.count(|replica| self.is_current_on(index, replica));
            let mut missing = side.wanted.saturating_sub(present);
            for replica in self.replicas {
                let is_draining = matches!(replica.state, State::Draining { .. });
                if missing == 0 {
                    break;
                }
                let is_gone = self.gone.contains(replica.pod.name.as_str());
                let is_wanted = self.is_current_on(index, replica) && !self.gives_way(replica);
                if is_draining && !is_gone && is_wanted {
                    self.gone.insert(&replica.pod.name);
                    self.taken_back[index] += 1;
                    moves.actions.push(serve_again(replica.pod));
                    missing -= 1;
                }
            }
        }
    }

    pub(super) fn start(&mut self, moves: &mut Moves) {
        let taken_back: u32 = self.taken_back.iter().sum();
        let live = self.count(|_| true) + taken_back;
        let draining = self
            .replicas
            .iter()
            .filter(|replica| {
                matches!(replica.state, State::Draining { .. })
                    || self.given.snapshot.is_of_predecessor(replica.pod)
            })
            .filter(|replica| !self.gone.contains(replica.pod.name.as_str()))
            .count();
        let draining = u32::try_from(draining).unwrap_or(u32::MAX);
        let is_rolling = self.given.is_rolling
            || self.replicas.iter().any(|replica| {
                !self.is_current(replica)
                    && (replica.is_live() || matches!(replica.state, State::Draining { .. }))
            });
        let surge = if is_rolling {
            self.given.valid.rollout.surge_max
        } else {
            0
        };
        let allowed = self.given.wanted.saturating_add(surge);
        let mut room = allowed.saturating_sub(live + draining);
        for side in 0..self.given.sides.len() {
            let present = self.count(|replica| self.is_current_on(side, replica));
            let wanted = self.given.sides[side].wanted;
            let missing = wanted.saturating_sub(present + self.taken_back[side]);
            let budget = missing.min(room);
            room -= budget;
            self.start_on(moves, side, budget);
        }
        self.remove_tombstones(moves);
    }

    /// Starts up to `budget` replicas of a side.
    fn start_on(&mut self, moves: &mut Moves, side: usize, mut budget: u32) {
        budget -= self.succeed(moves, side, budget);
        let indices = created_indices(moves);
        let mut next = 0;
        while budget > 0 {
            let replica = self.free_index(&indices, next);
            next = replica.saturating_add(1);
            let slot = Slot {
                replica,
                ..self.slot()
            };
            if !self.create(moves, side, slot) {
                moves.unplaced += budget;
                break;
            }
            budget -= 1;
        }
    }

    /// A slot with nothing chosen yet.
    fn slot(&self) -> Slot {
        Slot {
            rollout_attempt: self.given.valid.rollout.attempt,
            ..Slot::default()
        }
    }

    /// Failed pods of revisions that no replica is to run any more.
    fn remove_tombstones(&mut self, moves: &mut Moves) {
        for replica in self.replicas {
            if let State::Failed { message, .. } = &replica.state
                && !replica.pod.deleting
                && replica.mates.is_empty()
                && self.side(replica).is_none()
            {
                self.remove(moves, replica, message);
            }
        }
    }

    /// Starts successors of failed pods whose pause is over; returns how many wanted replicas are
    /// spoken for, whether started or still waiting.
    fn succeed(&mut self, moves: &mut Moves, side: usize, budget: u32) -> u32 {
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
            if replica.pod.deleting || self.side(replica) != Some(side) {
                continue;
            }
            if !replica.mates.is_empty() {
                // Its successor may not meet what is left of it.
                spoken_for += u32::from(spoken_for < budget);
                continue;
            }
            let successor = self.successor(replica);
            if successor.is_some_and(|other| other.state == State::Waiting) {
                // It may yet be given up, and the count of failures with it.
                continue;
            }
            if successor.is_some() || spoken_for >= budget {
                self.remove(moves, replica, message);
                continue;
            }
            spoken_for += 1;
            let failures = self.failures(replica.pod, *at);
            let budget_max = self.given.valid.rollout.restart_budget;
            if failures > budget_max && !replica.pod.is_refused_by_kubelet() {
                moves.exhausted.push(format!(
                    "pod {} failed, the last of {failures} in a row: {message}",
                    replica.pod.name
                ));
                continue;
            }
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
                refused: refused_before(replica.pod),
                ..self.slot()
            };
            taken.insert(slot.replica);
            let waiting = moves.waiting.len();
            if self.create(moves, side, slot) {
                // Not before its successor exists and has a place: the count of failures must survive a restart.
                if moves.waiting.len() == waiting {
                    self.remove(moves, replica, message);
                }
            } else {
                moves.unplaced += 1;
            }
        }
        spoken_for
    }

    /// The replica that came after a failed one, in its place.
    fn successor(&self, failed: &Replica<'_>) -> Option<&Replica<'a>> {
        self.replicas.iter().find(|other| {
            other.index() == failed.index()
                && other.pod.number(names::ATTEMPT) > failed.pod.number(names::ATTEMPT)
                && other.revision() == failed.revision()
        })
    }

    /// Failures in a row of a failed pod; another `rollout.attempt` starts counting anew.
    fn failures(&self, pod: &PodView, at: Timestamp) -> u32 {
        if pod.number(names::ROLLOUT_ATTEMPT) == self.given.valid.rollout.attempt {
            failures_of(pod, at)
        } else {
            0
        }
    }

    /// The smallest index from `from` on that no pod has, whatever it is doing, and that is not
    /// `taken`.
    fn free_index(&self, taken: &BTreeSet<u32>, from: u32) -> u32 {
        (from..)
            .find(|index| !self.indices.contains(index) && !taken.contains(index))
            .unwrap_or(u32::MAX)
    }

    fn create(&mut self, moves: &mut Moves, index: usize, mut slot: Slot) -> bool {
        let side = &self.given.sides[index];
        if let Some(words) = self.over_quota(index, side.layout.pods.into()) {
            moves.over_quota = Some(words);
            return false;
        }
        if side.layout.pods > 1 {
            return self.create_group(moves, index, slot);
        }
        let on_demand_min = self.lacks_on_demand();
        let (wish, room) = (&self.wishes[index], &self.room);
        let offers = self.offers[index].get_or_insert_with(|| Offers::new(wish, room));
        match offers.best(&slot.refused, on_demand_min) {
            Ok(nodes) => slot.nodes = nodes,
            Err(_) if self.preempt(moves, index, &mut slot) => {}
            Err(why_not) => {
                moves.why_not = why_not;
                return false;
            }
        }
        if self.given.valid.placement.binding == Binding::Direct {
            slot.nodes.truncate(1);
        }
        self.grant(index, 1);
        if let Some(node) = slot.nodes.first() {
            self.on_demand += u32::from(self.is_on_demand(node));
            self.take(index, node);
            moves.nodes.push(node.clone());
        }
        push_pod(moves, side, &slot);
        true
    }

    /// What so many pods of a side need, by resource.
    fn accelerators(&self, index: usize, pods: u64) -> BTreeMap<String, u64> {
        let of_one = self.wishes[index].requests.accelerators().into_iter();
        of_one
            .map(|(resource, count)| (resource, count.saturating_mul(pods)))
            .collect()
    }

    /// Counts so many pods of a side against the quotas.
    fn grant(&mut self, index: usize, pods: u64) {
        for (resource, count) in self.accelerators(index, pods) {
            *self.granted.entry(resource).or_default() += count;
        }
    }

    /// Whether a node is there and not spot.
    fn is_on_demand(&self, node: &str) -> bool {
        let node = self.given.snapshot.cluster.nodes.get(node);
        node.is_some_and(|node| !crate::spot::is_spot(node))
    }

    /// Whether a live replica is on nodes that are not spot, or planned for such. A group that lacks a rank
    /// is not yet: the rank may come to a spot node.
    fn stands_on_demand(&self, replica: &Replica<'_>) -> bool {
        let mut pods = replica.pods();
        replica.missing_ranks().is_empty()
            && pods.all(|pod| pod.place().is_some_and(|node| self.is_on_demand(node)))
    }

    /// The least number of replicas on other nodes than spot, while too few are there.
    fn lacks_on_demand(&self) -> Option<u32> {
        let least = self.given.valid.placement.on_demand_min?;
        (self.on_demand_there() < least).then_some(least)
    }

    /// Replicas that stay and are not on spot nodes; those that a rollout replaces do not count.
    fn on_demand_there(&self) -> u32 {
        let sides = self.given.sides.iter().enumerate();
        let there = sides.map(|(index, side)| {
            let stand = |replica: &Replica<'_>| {
                self.is_current_on(index, replica) && self.stands_on_demand(replica)
            };
            self.count(stand).min(side.wanted)
        });
        there.sum::<u32>() + self.on_demand
    }

    /// A replica of a side that is created takes a node.
    fn take(&mut self, index: usize, name: &str) {
        let Some(node) = self.given.snapshot.cluster.nodes.get(name) else {
            return;
        };
        let before = placement::rank(node, &self.wishes[index], &self.room);
        self.room.take(name, self.wishes[index].requests);
        for wish in &mut self.wishes {
            *wish.own.entry(name.to_owned()).or_insert(0) += 1;
        }
        // Sides are filled one after the other: the next one looks at the room when its turn comes.
        if let Some(offers) = &mut self.offers[index] {
            offers.take(name, &before, &self.wishes[index], &self.room);
        }
    }

    /// The quota of the namespace under which no further replica can be made, in words.
    fn over_quota(&self, index: usize, pods: u64) -> Option<String> {
        if self.given.snapshot.quotas.is_empty() {
            return None;
        }
        let needs = self.accelerators(index, pods);
        let mut quotas = self.given.snapshot.quotas.iter();
        let exceeded = quotas.find_map(|quota| quota.exceeded(&needs, &self.granted))?;
        let words = match exceeded.resource {
            NVIDIA_GPU => "GPUs",
            other => other,
        };
        Some(format!(
            "ResourceQuota {} allows {} {words} in namespace {} and {} are asked for already; a replica needs {}. Raise requests.{}, or ask for fewer replicas",
            exceeded.quota,
            exceeded.limit.most,
            self.given.valid.namespace,
            exceeded.limit.used,
            needs.get(exceeded.resource).copied().unwrap_or(0),
            exceeded.resource,
        ))
    }
}

/// Creates the pod of a slot.
fn push_pod(moves: &mut Moves, side: &Side, slot: &Slot) {
    let Side {
        valid,
        layout,
        revision,
        settings,
        ..
    } = side;
    let pod = objects::engine_pod(valid, layout, settings, revision, slot);
    if !slot.preempts.is_empty() {
        let words = preempting::waiting_words([&PodView::of(&pod)]);
        moves.waiting.push(words);
    }
    moves
        .created
        .push(pod.metadata.name.clone().unwrap_or_default());
    moves
        .actions
        .push(Action::Create(Object::Pod(Box::new(pod))));
}
