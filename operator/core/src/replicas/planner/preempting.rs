//! Both sides of preemption: the replica that takes a place, and those that give way.
//!
//! The one that takes a place is made at once and held back by a scheduling gate: its pod is the
//! reservation, counted on its node by every plan, so that nobody takes the room that becomes free.
//! Those who give way are drained by their own plan and come back where there is room. The gate goes
//! when the room is there. Where room appears elsewhere meanwhile, the place is left to those who
//! have it.

use std::collections::BTreeSet;

use super::{Planner, Side};
use crate::objects::Slot;
use crate::placement::{self, Offers};
use crate::plan::Action;
use crate::preemption::{self, Ask, Taking};
use crate::priority::{Contest, Priority, Rival, Victim};
use crate::replicas::{Moves, Replica, SETTLE_SECONDS, State, drain};
use crate::resources::Resources;
use crate::snapshot::{PodView, Snapshot};

/// Failures in a row after which a replica takes nobody's place any more: it would disturb others
/// again and again and serve nobody.
const FAILURES_MAX: u32 = 2;

/// Takes replicas out of the Service that another ModelDeployment of higher priority takes the place
/// of, and removes those that do not answer anyway.
pub(in crate::replicas) fn give_way<'a>(
    snapshot: &Snapshot,
    replicas: impl Iterator<Item = &'a Replica<'a>>,
    moves: &mut Moves,
) {
    for replica in replicas {
        let Some(why) = snapshot.contest.claimed(replica.pods()) else {
            continue;
        };
        moves.preempted.push(format!("{}: {why}", replica.pod.name));
        if replica.is_ready() {
            moves.actions.push(drain(replica.pod, snapshot.now));
            moves.drained.push(replica.pod.name.clone());
            moves.wake(SETTLE_SECONDS);
        } else if replica.is_live() {
            moves.remove_all(replica, &why);
        }
    }
}

/// Uids of pods that give way to a replica that may not be disturbed: one of this ModelDeployment, or
/// one that is worth as much.
pub(super) fn spoken_for(
    contest: &Contest,
    own: Priority,
    replicas: &[Replica<'_>],
) -> BTreeSet<String> {
    let waiting = replicas
        .iter()
        .filter(|replica| replica.state == State::Waiting);
    let others = contest.reservations.iter().map(|rival| &*rival.pod);
    waiting
        .flat_map(Replica::pods)
        .chain(others.filter(|pod| pod.priority >= own.value))
        .flat_map(|pod| pod.victims().map(|victim| victim.uid.to_owned()))
        .collect()
}

/// What a pod waits for.
pub(super) fn waiting_words(pod: &PodView) -> String {
    let owners = crate::explain::owners(pod).join(", ");
    format!(
        "{} waits until replicas of {owners}, of lower priority, have left node {}",
        pod.name,
        pod.planned_nodes().join(", ")
    )
}

impl<'a> Planner<'a> {
    /// What the pods of a side are worth.
    pub(super) fn priority(side: &Side, contest: &Contest) -> Priority {
        Priority::of(
            side.valid.placement.priority_class.as_deref(),
            &contest.classes,
        )
    }

    /// Whether another one takes the place of a replica.
    pub(super) fn gives_way(&self, replica: &Replica<'_>) -> bool {
        let contest = &self.given.snapshot.contest;
        contest.claimant_of(replica.pods()).is_some()
    }

    /// Replicas whose place another one takes leave.
    pub(in crate::replicas) fn give_way(&mut self, moves: &mut Moves) {
        let staying = self
            .replicas
            .iter()
            .filter(|replica| !self.gone.contains(replica.pod.name.as_str()));
        give_way(self.given.snapshot, staying, moves);
        for replica in self.replicas {
            if self.gives_way(replica) {
                self.gone.insert(&replica.pod.name);
            }
        }
    }

    /// Replicas that wait for a place get it when it is free, give it up when it will not be or when
    /// there is room elsewhere, and wait on otherwise.
    pub(in crate::replicas) fn settle_waiting(&mut self, moves: &mut Moves) {
        let waiting: Vec<(&'a Replica<'a>, usize)> = self
            .live()
            .filter(|replica| replica.state == State::Waiting)
            .filter_map(|replica| Some((replica, self.side(replica)?)))
            .collect();
        // None of them is there yet: what they are counted for is free, until one gets it.
        for (replica, _) in &waiting {
            if let Some(node) = replica.pod.planned_nodes().first() {
                self.room.give_back(node, replica.pod.requests);
            }
        }
        let (now, later): (Vec<_>, Vec<_>) = waiting
            .into_iter()
            .partition(|(replica, side)| self.gets_place(replica, *side));
        for (replica, _) in now {
            moves.actions.push(Action::Release {
                name: replica.pod.name.clone(),
                uid: replica.pod.uid.clone(),
            });
        }
        for (replica, side) in later {
            self.wait_on(moves, replica, side);
        }
    }

    /// Whether a replica's place is free now; then it is taken.
    fn gets_place(&mut self, replica: &Replica<'_>, side: usize) -> bool {
        let planned = replica.pod.planned_nodes();
        let node = planned.first().and_then(|name| self.room.node(name));
        let Some(node) = node else { return false };
        let is_free = placement::why_not(node, &self.wishes[side], &self.room).is_none();
        if is_free {
            self.room.take(&node.name, replica.pod.requests);
        }
        is_free
    }

    fn wait_on(&mut self, moves: &mut Moves, replica: &'a Replica<'a>, side: usize) {
        let planned = replica.pod.planned_nodes();
        let node = planned.first().and_then(|name| self.room.node(name));
        let wish = &self.wishes[side];
        let will_fit = node.is_some_and(|node| {
            let leaving = self.leaving(&node.name);
            placement::standing(node, wish).is_none()
                && placement::shortage(wish, node, self.room.free_with(node, leaving)).is_none()
        });
        self.gone.insert(&replica.pod.name);
        if !will_fit {
            moves.remove(replica.pod, "its place was taken by others meanwhile");
            return;
        }
        let offers = Offers::new(wish, &self.room);
        if offers.best(&[], self.lacks_on_demand()).is_ok() {
            moves.remove(
                replica.pod,
                "there is room elsewhere, and nobody has to leave",
            );
            return;
        }
        self.gone.remove(replica.pod.name.as_str());
        if let Some(node) = node {
            self.room.take(&node.name, replica.pod.requests);
        }
        moves.waiting.push(waiting_words(replica.pod));
    }

    /// What those take that leave a node for one of ours, or for one that is worth as much.
    fn leaving(&self, node: &str) -> Resources {
        let rivals = self.given.snapshot.contest.rivals.iter();
        rivals
            .filter(|rival| rival.is_among(&self.spoken_for))
            .fold(Resources::default(), |sum, rival| sum + rival.on(node))
    }

    /// Whether a replica is missing that nothing of ours is about to make room for. What a rollout
    /// adds for a while takes nobody's place.
    fn is_missing(&self, moves: &Moves) -> bool {
        let nodes = &self.given.snapshot.cluster.nodes;
        let answers = |node: &String| nodes.get(node).is_some_and(|node| node.ready);
        let leaving = self.replicas.iter().filter(|replica| match replica.state {
            State::Draining { .. } => true,
            State::Leaving => replica.pod.node.as_ref().is_some_and(answers),
            _ => false,
        });
        let created = u32::try_from(moves.created.len()).unwrap_or(u32::MAX);
        let leaving = u32::try_from(leaving.count()).unwrap_or(u32::MAX);
        let there = self.count(|_| true).saturating_add(leaving);
        there.saturating_add(created) < self.given.wanted
    }

    /// Finds a place that others of lower priority have to leave first; false when there is none.
    pub(super) fn preempt(&mut self, moves: &Moves, index: usize, slot: &mut Slot) -> bool {
        let contest = &self.given.snapshot.contest;
        let may = Self::priority(&self.given.sides[index], contest).preempts
            && !contest.rivals.is_empty()
            && slot.failures <= FAILURES_MAX
            && self.is_missing(moves);
        let taking = may.then(|| {
            preemption::choose(Ask {
                wish: &self.wishes[index],
                room: &self.room,
                contest,
                spoken_for: &self.spoken_for,
                on_demand_only: self.lacks_on_demand().is_some(),
            })
        });
        let Some(Taking { node, victims }) = taking.flatten() else {
            return false;
        };
        slot.nodes = vec![node];
        slot.preempts = victims.iter().flat_map(Victim::words).collect();
        let pods = victims.iter().flat_map(Rival::pods);
        self.spoken_for.extend(pods.map(|pod| pod.uid.clone()));
        true
    }
}
